"""`qlora-phi3 run`: train what a recipe says."""

from pathlib import Path

import click

from qlora_phi3.cli.options import debug_option, set_option

NEWEST = "newest"


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
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
    ctx: click.Context, recipe: Path, resume: str | None, no_rehearsal: bool, overrides: tuple[str, ...]
) -> None:
    """Train the model that RECIPE describes.

    \b
    Examples:
      qlora-phi3 run recipes/chat.toml
      qlora-phi3 run recipes/chat.toml --set lora.r=32
      qlora-phi3 run recipes/chat.toml --resume

    Ctrl-C saves and says how to go on. Everything lies in runs/<recipe>/<time>/.
    """
    from qlora_phi3.recipe.load import load_recipe

    loaded = load_recipe(recipe, (*overrides, "memory.rehearsal=false") if no_rehearsal else overrides)

    from qlora_phi3.runfolder import RunFolder, name_of_runs, newest_run

    name, folder = name_of_runs(recipe), None
    if resume is not None:
        folder = newest_run(Path(loaded.training.output_dir), name) if resume == NEWEST else RunFolder(Path(resume))
        folder.read_report()

    from qlora_phi3.show.live import Cadence, open_view

    training = loaded.training
    cadence = Cadence(strategy=training.logging_strategy, steps=training.logging_steps)
    with open_view(cadence, plain=training.disable_tqdm) as view:
        view.progress("Starting torch, transformers and peft", 0, None)
        if not ctx.meta.get("debug") and training.log_level == "passive":
            _quieten()
        from qlora_phi3.training.run import run as train

        view.progress("Starting torch, transformers and peft", 1, 1)
        result = train(loaded, name, recipe.parent, listener=view, resume=folder)
    view.finish(result.steps, result.loss_before, result.loss_after, result.seconds, result.folder.adapter)


def _quieten() -> None:
    """Leave the terminal to the run: the libraries' hints are for developers, and `--debug` shows them."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "transformers", "datasets", "accelerate", "peft", "trl", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
