"""Make the pictures of docs/images from a real run of the demo: `python scripts/make_screenshots.py [NAME ...]`.

Needs the demo's model and data (scripts/make_demo_model.py, scripts/make_demo_data.py), the extras chat and report, tmux, and for
report.png chromium. The commands are typed into a terminal of tmux, whose screen becomes an SVG. Look at what it made.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

REPOSITORY = Path(__file__).parents[1]
IMAGES = Path("docs/images")
COLUMNS, LINES = 100, 38
SESSION, PROMPT, PROMPT_LINE = "screenshots", "$ ", r"^\$\s*$"
PROGRAM = f"{shlex.quote(sys.executable)} -m qlora_phi3"
#: What makes the demo's run shorter.
DEMO = "--set data.max_rows=240 --set data.max_eval_rows=64 --set training.eval_strategy=steps --set training.eval_steps=0.2"
RUNS = Path("runs/demo")
QUESTION = "What does the function `os.path.basename` do?"
MOST_SECONDS = 1800.0


def tmux(*arguments: str) -> str:
    """Run a command of tmux; returns what it prints."""
    return subprocess.run(["tmux", "-L", SESSION, *arguments], check=True, capture_output=True, text=True).stdout


@contextmanager
def terminal() -> Iterator[None]:
    """A terminal of `COLUMNS` x `LINES` with an empty shell, in which `qlora-phi3` is this checkout's."""
    shell = f"PS1='{PROMPT}' bash --norc --noprofile"
    tmux("new-session", "-d", "-s", SESSION, "-x", str(COLUMNS), "-y", str(LINES), shell)
    try:
        enter(f'qlora-phi3() {{ {PROGRAM} "$@"; }}; clear')
        yield
    finally:
        tmux("kill-server")


def enter(line: str) -> None:
    """Type a line."""
    tmux("send-keys", "-t", SESSION, "-l", line)
    tmux("send-keys", "-t", SESSION, "Enter")


def wait_for(pattern: str) -> None:
    """Wait until the screen has text of this pattern."""
    until = time.monotonic() + MOST_SECONDS
    while not re.search(pattern, tmux("capture-pane", "-pt", SESSION), re.MULTILINE):
        if time.monotonic() > until:
            raise TimeoutError(f"no {pattern} on the screen:\n{tmux('capture-pane', '-pt', SESSION)}")
        time.sleep(0.5)


def take(name: str, title: str) -> None:
    """Write what the screen shows, without the prompt at its end, as an SVG."""
    screen = Text.from_ansi(tmux("capture-pane", "-ept", SESSION).rstrip().removesuffix("$"))
    paper = Console(width=COLUMNS, file=StringIO(), force_terminal=True, color_system="truecolor", record=True)
    paper.print(screen, soft_wrap=True)
    # Blocks of a bar stay side by side where the reader's font is narrower than the one the picture asks for.
    svg = paper.export_svg(title=title).replace(" textLength=", ' lengthAdjust="spacingAndGlyphs" textLength=')
    (IMAGES / name).write_text(svg, encoding="utf-8")


def type_and_take(name: str, command: str) -> None:
    """Run a command to its end in an empty terminal, and take its picture."""
    enter(f"clear; {command}")
    wait_for(PROMPT_LINE)
    take(name, command)


def picture_live() -> None:
    """The screen of a run at three quarters of its steps; the run then goes on to its end."""
    enter(f"clear; qlora-phi3 run recipes/demo.toml {DEMO}")
    wait_for(r"done .* 2[2-9] of 30")
    take("live.svg", "qlora-phi3 run recipes/demo.toml")
    wait_for(PROMPT_LINE)


def picture_inspect() -> None:
    """Three rows of the demo, the learned part of each marked, and the statistics."""
    type_and_take("inspect.svg", "qlora-phi3 inspect recipes/demo.toml")


def picture_chat() -> None:
    """A question to the base and to the tuned model of the run, in two columns."""
    enter("clear; qlora-phi3 chat demo --compare --max-new-tokens 60")
    wait_for(r"^>\s*$")
    enter(QUESTION)
    wait_for(r"tokens/s.*tokens/s")
    take("chat.svg", "qlora-phi3 chat demo --compare")
    tmux("send-keys", "-t", SESSION, "C-d")


def picture_report() -> None:
    """report.html of the run, at 1,000 pixels."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,1500"]
    text = (newest() / "report.html").read_text(encoding="utf-8").replace(f"{REPOSITORY.absolute()}/", "")
    target = (IMAGES / "report.png").absolute()
    with tempfile.TemporaryDirectory() as profile:
        page = Path(profile, "report.html")
        page.write_text(text, encoding="utf-8")
        words = ["chromium", *options, f"--user-data-dir={profile}", f"--screenshot={target}", page.as_uri()]
        subprocess.run(words, check=True)


def newest() -> Path:
    """The directory of the newest run."""
    return max(RUNS.glob("20*"))


#: Name of the file in docs/images -> what makes it. The first makes the run, in runs/demo, that the others show.
PICTURES: dict[str, Callable[[], None]] = {
    "live.svg": picture_live,
    "inspect.svg": picture_inspect,
    "chat.svg": picture_chat,
    "report.png": picture_report,
}


def main() -> None:
    """Make the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; default: all")
    arguments = parser.parse_args()
    os.chdir(REPOSITORY)
    IMAGES.mkdir(exist_ok=True)
    with terminal():
        for name in arguments.names or PICTURES:
            PICTURES[name]()
            print(IMAGES / name)


if __name__ == "__main__":
    main()
