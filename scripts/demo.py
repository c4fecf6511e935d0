"""Fine-tune a real small model on real conversations, on any computer: `python3 scripts/demo.py`.

Makes the virtual environment .venv, installs qlora-phi3 into it, makes the demo's base model and data in the folder demo,
runs recipes/demo.toml, and asks the model a question before and after. Done once, the first steps are skipped. Further
arguments go to `qlora-phi3 run`.
"""

import argparse
import json
import shlex
import sys
import time
from typing import List  # noqa: UP035 - this file, too, must parse on older Pythons

from environment import REPOSITORY, TORCH_NOTE, make_environment, run, say


def main() -> None:
    """Do all steps in their order; the first that fails ends it with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=TORCH_NOTE)
    _, arguments = parser.parse_known_args()
    programs = make_environment(".venv", "gguf")
    python = str(programs / "python")
    say("Making the base model: SmolLM2-135M-Instruct in the shape of Phi-3")
    run([python, "scripts/make_demo_model.py"])
    say("Making the data: questions and answers from Python's own docstrings")
    run([python, "scripts/make_demo_data.py"])
    say("Training: qlora-phi3 run recipes/demo.toml")
    began = time.time()
    try:
        run([str(programs / "qlora-phi3"), "run", "recipes/demo.toml", *arguments])
    except SystemExit:
        tell_how_to_go_on(arguments, began)
        raise
    if any(path.stat().st_mtime > began - 2 for path in REPOSITORY.glob("runs/demo/*/adapter")):
        say("Asking it a question that was held out, before and after: scripts/ask_demo.py")
        run([python, "scripts/ask_demo.py"])


def tell_how_to_go_on(arguments: List[str], began: float) -> None:  # noqa: UP006
    """Name the command that goes on with the newest run, where it was worked on since `began` and is not done."""
    reports = sorted(REPOSITORY.glob("runs/demo/*/report.json"))
    if not reports or reports[-1].stat().st_mtime < began - 2:  # some disks keep whole seconds only
        return
    if json.loads(reports[-1].read_text(encoding="utf-8"))["status"] != "done":
        again = arguments if "--resume" in arguments else ["--resume", *arguments]
        print("In short: python3 scripts/demo.py " + " ".join(map(shlex.quote, again)), file=sys.stderr)


if __name__ == "__main__":
    main()
