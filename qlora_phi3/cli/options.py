"""Options that several commands share, and what `--debug` switches off: the silence of the libraries."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qlora_phi3.errors import DeviceError, RecipeError, RunError, UserError, disk_error_hint
from qlora_phi3.units import parse_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from qlora_phi3.hardware.gpu import Gpu
    from qlora_phi3.ui.console import Watcher

F = TypeVar("F", bound=Callable[..., Any])

#: `--debug`: show the traceback of a user error, and the libraries' warnings. Stored as `ctx.meta["debug"]`.
debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, _, value: ctx.meta.update(debug=value),
    help="Show tracebacks and library warnings.",
)
#: `--set table.key=value`, any number of times; the command's argument is `overrides`, a tuple of strings.
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Change a key of the recipe: --set lora.r=32"
)
#: `--base`, of commands that load a run.
base_option = click.option(
    "--base", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Folder of the run's base, if it has moved."
)


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """What Tab offers for RUN: recipes with runs, their newest run, below a `/` each run, and directories."""
    from click.shell_completion import CompletionItem

    runs = sorted(path.parent for path in Path("runs").glob("*/*/report.json"))
    names = [name for run in runs for name in (run.parent.name, f"{run.parent.as_posix()}/latest")]
    names += [run.as_posix() for run in runs if "/" in incomplete]
    found = [CompletionItem(name) for name in dict.fromkeys(names) if name.startswith(incomplete)]
    return [CompletionItem(incomplete, type="dir"), *found]


def sampling_options(max_new_tokens: int) -> Callable[[F], F]:
    """`--temperature`, `--top-p`, `--top-k`, and `--max-new-tokens` with its default; `check_sampling` reads the first three."""
    limit = click.IntRange(1)
    shared = (
        click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0, the default: always the likeliest token."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw from this share of the probability."),
        click.option("--top-k", type=limit, help="Draw from this many of the likeliest tokens."),
        click.option("--max-new-tokens", type=limit, default=max_new_tokens, show_default=True, help="Of an answer, at most."),
    )
    return lambda command: reduce(lambda made, option: option(made), reversed(shared), command)


def check_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `inference.Sampling`; UserError for an option that has no effect at temperature 0."""
    for name in ("top_p", "top_k"):
        if options[name] is not None and not options["temperature"]:
            option = f"--{name.replace('_', '-')} {options[name]}"
            raise UserError(f"{option} has no effect: at temperature 0 nothing is drawn.", "Add --temperature 0.7.")
    return {"temperature": options["temperature"], "top_p": options["top_p"] or 1.0, "top_k": options["top_k"] or 0}


def named_gpu(gpu: str | None, vram: str | None) -> "Gpu | None":
    """The GPU that --gpu or --vram names, None without both; UserError for both, DeviceError where the table has no such GPU."""
    from qlora_phi3.hardware.gpu import find_gpu, gpu_of_size

    if gpu is not None and vram is not None:
        raise UserError(f"--gpu {gpu!r} and --vram {vram} both name a GPU.", "Keep one.")
    if gpu is not None or vram is None:
        return None if gpu is None else find_gpu(gpu)
    try:
        num_bytes = parse_size(f"{vram}GB" if vram.isdecimal() else vram, binary=True)
    except ValueError as error:
        raise DeviceError(f"--vram: {error}", "Write what the box says, such as --vram 12GB.") from error
    return gpu_of_size(num_bytes)


@contextmanager
def watching() -> "Iterator[Watcher]":
    """What is being computed, as one temporary line on stderr; without the libraries' warnings, and log lines below an error."""
    import logging
    import warnings

    from qlora_phi3.ui.console import Watcher

    watcher, before = Watcher(), logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            if not click.get_current_context().meta.get("debug"):
                warnings.simplefilter("ignore")
                logging.disable(logging.WARNING)  # some libraries reset their loggers when imported
            yield watcher
    finally:
        logging.disable(before)
        watcher.close()


def shipped_files(folder: str, suffix: str) -> dict[str, Path]:
    """Name -> recipe ("recipes", "toml") or page ("docs", "md") that ships: in the package, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    found = package / folder if (package / folder).is_dir() else package.parent / folder
    return {path.stem: path for path in sorted(found.glob(f"*.{suffix}"))}


def find_recipe(path: Path) -> Path:
    """The recipe that a person names: a path, also without `.toml`; else the name of a recipe that ships, such as `chat`.
    RecipeError for a run, and for a name that is none of these; that a `.toml` file is missing is said where it is read.
    """
    from qlora_phi3.runfolder import resolve_run

    is_name = len(path.parts) == 1 and not path.suffix and not os.path.lexists(path)
    if is_name and (own := path.with_suffix(".toml")).is_file():
        return own
    recipes = shipped_files("recipes", "toml")
    if is_name and path.name in recipes:
        return recipes[path.name]
    if is_name and path.name.isdecimal():
        hint = f"Name a recipe first; --max-length of vram-check takes no value, --set training.max_length={path} changes it."
        raise RecipeError(f"{path} is no recipe.", hint)
    if path.suffix != ".toml" and not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        with suppress(RunError):
            raise RecipeError(f"{path} names a run, and a recipe is wanted.", f"Its recipe: {resolve_run(path).recipe}")
    if is_name:
        hint = f"Give the path of a .toml file, or a recipe that ships: {', '.join(recipes)}."
        raise RecipeError(f"{path}: there is no such file, and no recipe of that name.", hint)
    return path


def check_new_file(target: Path, option: str = "--out") -> None:
    """Refuse, before anything is computed, a recipe that could not be written: UserError."""
    from qlora_phi3.files import check_directory

    if target.suffix != ".toml":
        raise UserError(f"{option} {target}: a recipe is written, whose name ends in .toml.".lstrip(), "Name it so.")
    if os.path.lexists(target):
        hint = f"Name another file with {option or '--out'}, or delete it."
        raise UserError(f"{target} exists already, and no file is overwritten.", hint)
    check_directory(target, option)


def create_file(target: Path, text: str) -> None:
    """Write a new file; UserError where it exists, or cannot be written."""
    try:
        with target.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror}.", f"{disk_error_hint(error)}, or name another file."
        ) from error


def silence_libraries() -> None:
    """Without --debug, hide warnings, and log lines below an error, for the rest of the process; before torch is imported."""
    import logging
    import warnings

    if click.get_current_context().meta.get("debug"):
        return
    # torch's C++ code writes two or three lines for each out-of-memory error that a run recovers from; both read this at import.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    # torch resets the level of its own logger when it is imported; without Triton (Windows) its flop_counter logs a warning.
    for name in (
        "bitsandbytes", "transformers", "datasets", "accelerate", "peft", "trl", "torch", "torch.utils.flop_counter",
        "huggingface_hub",
    ):  # fmt: skip
        logging.getLogger(name).setLevel(logging.ERROR)
