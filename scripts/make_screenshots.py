"""Make the pictures of docs/images from real runs: `python scripts/make_screenshots.py [NAME ...]`.

Needs the demo's model and data (scripts/make_demo_model.py, scripts/make_demo_data.py). Each picture is a function of `PICTURES`
that returns an SVG. Look at what it made.
"""

import argparse
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from qlora_phi3.cli.options import silence_libraries
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.reporter import StepRecord
from qlora_phi3.ui.console import ConsoleReporter, LogInterval, build_progress
from qlora_phi3.ui.live import RunProgress

REPOSITORY = Path(__file__).parents[1]
COLUMNS, LINES = 100, 32
#: Step of the demo whose screen is the picture, and what makes its run short.
SHOWN_STEP = 19
DEMO = (
    "data.max_rows=56", "data.max_eval_rows=8", "training.batch_size=2", "training.eval_strategy=steps",
    "training.eval_steps=0.2", "training.max_length=128",
)  # fmt: skip


class PictureTakenError(Exception):
    """Ends the run."""


def picture_live() -> str:
    """The screen of `qlora-phi3 run` in the middle of the demo, with the lines above it."""
    from qlora_phi3.training.run import run

    lines: list[str] = []
    pictures: list[str] = []
    console = Console(width=COLUMNS, height=LINES, file=io.StringIO(), force_terminal=True)
    bars = build_progress(console, kind=RunProgress)

    class Photographer(ConsoleReporter):
        def info(self, line: str) -> None:
            lines.append(line)

        def step(self, record: StepRecord) -> None:
            super().step(record)
            if record.step == SHOWN_STEP:
                paper = Console(width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor", record=True)
                for line in lines:
                    paper.print(line, markup=False, highlight=False)
                paper.print(bars.get_renderable())
                pictures.append(paper.export_svg(title="qlora-phi3 run recipes/demo.toml"))
                raise PictureTakenError

    bars.reporter = Photographer(console, console, LogInterval("no", 1), bars)
    path = Path("recipes/demo.toml")
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(path, (*DEMO, f"training.output_dir={folder}"))
        try:
            run(recipe, "demo", path.parent, reporter=bars.reporter)
        except PictureTakenError:
            return pictures[0].replace(folder, "runs")
    raise RuntimeError(f"the run ended before step {SHOWN_STEP}")


#: Name of the file in docs/images -> what makes it.
PICTURES: dict[str, Callable[[], str]] = {"live.svg": picture_live}


def main() -> None:
    """Make the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; default: all")
    os.chdir(REPOSITORY)
    silence_libraries()
    target = Path("docs/images")
    target.mkdir(exist_ok=True)
    for name in parser.parse_args().names or PICTURES:
        (target / name).write_text(PICTURES[name](), encoding="utf-8")
        print(target / name)


if __name__ == "__main__":
    main()
