"""`qlora-phi3 run`: train what a recipe says."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_phi3.cli.options import debug_option, set_option, silence_libraries
from qlora_phi3.errors import RunError

if TYPE_CHECKING:
    from qlora_phi3.recipe.schema import Recipe
    from qlora_phi3.runfolder import RunFolder
    from qlora_phi3.training.run import RunResult
    from qlora_phi3.ui.console import ConsoleReporter

NEWEST = "newest"


@click.command()
@click.argument("recipe", metavar="RECIPE", required=False, type=click.Path(path_type=Path))
@click.option(
    "--resume",
    is_flag=False,
    flag_value=NEWEST,
    metavar="[RUN]",
    help="Go on with an unfinished run: its folder, or the newest of this recipe.",
)
@click.option("--no-rehearsal", is_flag=True, help="Do not try the heaviest step before the first.")
@set_option
@debug_option
@click.pass_context
def run(
    ctx: click.Context, recipe: Path | None, resume: str | None, no_rehearsal: bool, overrides: tuple[str, ...]
) -> None:
    """Train the model that RECIPE describes.

    \b
    Examples:
      qlora-phi3 run recipes/chat.toml
      qlora-phi3 run recipes/chat.toml --set lora.r=32
      qlora-phi3 run recipes/chat.toml --resume

    Ctrl-C saves and says how to go on, and so does SIGTERM. Everything lies in runs/<recipe>/<time>/.
    """
    recipe, resume = _sort_out(ctx, recipe, resume)

    from qlora_phi3.recipe.load import is_local_data, load_recipe

    if no_rehearsal:
        overrides = (*overrides, "memory.rehearsal=false")
    loaded = load_recipe(recipe, overrides, is_file=is_local_data)

    from qlora_phi3.runfolder import find_run, run_group_name

    name = run_group_name(recipe)
    wanted = None if resume in (None, NEWEST) else resume
    folder = None if resume is None else find_run(Path(loaded.training.output_dir), name, wanted)

    from qlora_phi3.ui.console import LogInterval, open_console

    training = loaded.training
    log_interval = LogInterval(training.logging_strategy, training.logging_steps, training.warmup_steps)
    with open_console(log_interval, plain=training.disable_tqdm) as view, _ended_as_by_ctrl_c():
        try:
            quiet = not ctx.meta.get("debug") and training.log_level == "passive"
            result = _train(loaded, name, recipe.parent, view, folder, quiet=quiet)
        except KeyboardInterrupt as interrupt:
            raise view.interruption(folder) from interrupt
    view.finish(result.steps, result.loss_before, result.loss_after, result.seconds, result.folder.adapter)


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, with which systems end a program, do what Ctrl-C does; Windows knows no such signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _sort_out(ctx: click.Context, recipe: Path | None, resume: str | None) -> tuple[Path, str | None]:
    """The recipe and the run to resume, where the recipe was left out or taken for the value of --resume."""
    if recipe is not None:
        return recipe, resume
    if resume is None or resume == NEWEST:
        raise click.MissingParameter(ctx=ctx, param=ctx.command.params[0])
    place = Path(resume)
    if place.suffix == ".toml":
        return place, NEWEST
    if (place / "recipe.toml").is_file():
        return place / "recipe.toml", resume
    raise RunError(
        f"There is no run folder {resume}, and no recipe is named.", "Write: qlora-phi3 run RECIPE.toml --resume"
    )


def _train(
    recipe: "Recipe", name: str, base_folder: Path, view: "ConsoleReporter", folder: "RunFolder | None", *, quiet: bool
) -> "RunResult":
    """Start the libraries, then train."""
    # Read by libgomp when torch loads it: threads that wait for one another soon give their core away. Demo model, two threads
    # on two cores: idle 348-362 tokens/s against 336-390 as libgomp does it, beside two busy programs 108 against 85.
    # OMP_WAIT_POLICY=passive is better still on a busy computer, and on an idle one half as fast (209-218).
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    view.progress("Starting torch, transformers and peft", 0, None)
    if quiet:
        silence_libraries()
    from qlora_phi3.training.report import describe_load
    from qlora_phi3.training.run import run as train

    view.progress("Starting torch, transformers and peft", 1, 1)
    if line := describe_load():
        view.warning(line)
    return train(recipe, name, base_folder, reporter=view, resume=folder)
