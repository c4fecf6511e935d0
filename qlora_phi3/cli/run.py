"""`qlora-phi3 run`: train what a recipe describes."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_phi3.cli.options import complete_run, debug_option, find_recipe, set_option, silence_libraries
from qlora_phi3.cli.output import keep_running_without_output
from qlora_phi3.errors import RunError

if TYPE_CHECKING:
    from qlora_phi3.runfolder import RunFolder

NEWEST = "newest"


@click.command()
@click.argument("recipe", metavar="[RECIPE]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--resume",
    is_flag=False,
    flag_value=NEWEST,
    metavar="[RUN]",
    shell_complete=complete_run,
    help="Continue an unfinished run: RUN, or without it the newest of RECIPE. With --set training.num_train_epochs (or "
    "max_steps) above what a finished run had, a copy of that run is trained on.",
)
@click.option("--no-rehearsal", is_flag=True, help="Do not run the heaviest step once before the first.")
@set_option
@debug_option
@click.pass_context
def run(ctx: click.Context, recipe: Path | None, resume: str | None, no_rehearsal: bool, overrides: tuple[str, ...]) -> None:
    """Train the model that RECIPE describes: a file, or the name of a recipe that ships, such as chat.

    \b
    Examples:
      qlora-phi3 run my.toml
      qlora-phi3 run chat --set lora.r=32
      qlora-phi3 run my.toml --resume

    Ctrl-C, SIGTERM and SIGHUP save a checkpoint and print how to continue. Everything is written to runs/<recipe>/<time>/.
    """
    from qlora_phi3.hardware.gpu import take_launch

    keep_running_without_output()
    ctx.meta["is_silent"] = os.environ.get("RANK", "0") != "0"  # process 0 shows what all have in common
    rank, count = take_launch(os.environ)
    recipe, resume = _recipe_and_run(ctx, recipe, resume)
    if no_rehearsal:
        overrides = (*overrides, "memory.rehearsal=false")
    connection: AbstractContextManager[None] = nullcontext()
    if count > 1:
        from qlora_phi3.training.processes import connected

        connection = connected(rank, count)
    with connection:
        _train(ctx, recipe, resume, overrides, rank, count)


def _train(ctx: click.Context, recipe: Path, resume: str | None, overrides: tuple[str, ...], rank: int, count: int) -> None:
    """Train with the GPU of this process, of so many that share the run."""
    from qlora_phi3.data.prepare import check_files
    from qlora_phi3.hardware.gpu import choose_gpu, hide_other_gpus
    from qlora_phi3.recipe.load import check_processes, describe_unusual, load_recipe
    from qlora_phi3.runfolder import find_run, find_unfinished, run_group_name

    loaded = load_recipe(recipe, overrides, check_files=True)
    check_processes(loaded.training, count)
    check_files(loaded.data, recipe.parent, evaluate=loaded.training.do_eval)  # torch is not imported yet
    name, training, named = run_group_name(recipe), loaded.training, None if resume == NEWEST else resume
    folder = None if resume is None else find_run(Path(training.output_dir), name, named)
    unfinished = None if folder is not None else find_unfinished(Path(training.output_dir) / name)
    hide_other_gpus(choose_gpu(loaded.memory.gpu, rank if count > 1 else None), rank)

    from qlora_phi3.ui.live import open_console
    from qlora_phi3.ui.page import write_page
    from qlora_phi3.ui.runs import read_run, warnings

    with open_console(training, quiet=ctx.meta["is_silent"]) as console:

        def save_page(written: "RunFolder") -> None:
            nonlocal folder
            folder = folder and written  # a copy of a run that was done
            try:
                write_page(written)
            except RunError as error:
                console.warning(str(error))

        if line := describe_unusual(loaded):
            console.warning(line)
        if unfinished is not None:
            console.warning(
                f"{unfinished.path} is unfinished, and this is a new run. To go on with that one: {unfinished.resume_command}"
            )
        try:
            console.progress("Starting torch, transformers and peft", 0, None)
            if not ctx.meta.get("debug") and training.log_level == "passive":
                silence_libraries()
            from qlora_phi3.training.run import run as train

            console.progress("Starting torch, transformers and peft", 1, 1)
            asked = {override.partition("=")[0].strip() for override in overrides}
            result = train(loaded, name, recipe.parent, reporter=console, resume=folder, asked=asked, at_end=save_page)
        except KeyboardInterrupt as interrupt:
            raise console.interruption(folder) from interrupt
    notes = [] if ctx.meta["is_silent"] else warnings(read_run(result.folder))
    console.finish(result, notes)


def _recipe_and_run(ctx: click.Context, recipe: Path | None, resume: str | None) -> tuple[Path, str | None]:
    """The recipe and the run to resume, also where the recipe was left out or was parsed as the value of --resume."""
    from qlora_phi3.runfolder import resolve_run

    if recipe is not None:
        return find_recipe(recipe), resume
    if resume == NEWEST:
        raise click.UsageError("--resume needs a run or a recipe: --resume RUN, or RECIPE --resume.", ctx)
    if resume is None:
        raise click.UsageError("Missing argument 'RECIPE', or --resume RUN.", ctx)
    path = Path(resume)
    if path.suffix == ".toml":
        return path, NEWEST
    folder = resolve_run(resume)
    return folder.recipe, str(folder.path)
