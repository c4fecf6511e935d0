"""`qlora-phi3 vram-check`: whether a recipe fits a card, and how, before a byte of it is spent."""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_phi3.cli.options import debug_option, set_option
from qlora_phi3.errors import CannotTellError, DeviceError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from qlora_phi3.hardware.gpu import Gpu
    from qlora_phi3.memory.cached import CachedVramCheck
    from qlora_phi3.memory.report import VramReport

BESIDE = "beside the recipe"
FITS, DOES_NOT_FIT = 0, 3
#: Columns of what is no terminal, unless the variable COLUMNS says otherwise.
PIPED_WIDTH = 100


@click.command("vram-check")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--gpu", metavar="NAME", help="Ask about a card that is not here: --gpu 'RTX 4070 Laptop'.")
@click.option("--vram", metavar="SIZE", help="Ask about any card of a size: --vram 12GB.")
@click.option("--all", "every_card", is_flag=True, help="A table of all consumer cards from 4 to 24 GB.")
@click.option("--max-length", "longest", is_flag=True, help="The longest row that still fits each card.")
@click.option(
    "--fit",
    is_flag=False,
    flag_value=BESIDE,
    metavar="[FILE]",
    help="Write the set-up that was found as a recipe: to FILE, or beside RECIPE.",
)
@click.option("--json", "wants_json", is_flag=True, help="Print JSON, for programs.")
@set_option
@debug_option
@click.pass_context
def vram_check(
    ctx: click.Context,
    recipe: Path | None,
    gpu: str | None,
    vram: str | None,
    every_card: bool,
    longest: bool,
    fit: str | None,
    wants_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Say whether RECIPE fits a card, and with which set-up it is fastest; without RECIPE, what the card here has free.

    \b
    Examples:
      qlora-phi3 vram-check
      qlora-phi3 vram-check recipes/chat.toml
      qlora-phi3 vram-check recipes/chat.toml --vram 12GB
      qlora-phi3 vram-check recipes/chat.toml --all

    Nothing is loaded, downloaded or put on the card. Exit codes: 0 it fits, 3 it does not, 2 bad input, 4 cannot tell (no card
    here, or the shapes of a model of the hub are not).
    """
    if recipe is None and fit is not None and Path(fit).suffix == ".toml" and Path(fit).is_file():
        recipe, fit = Path(fit), BESIDE  # --fit RECIPE.toml: the recipe was taken for the option's value
    _check_options(recipe, gpu, vram, every_card=every_card, longest=longest, fit=fit, overrides=overrides)
    if recipe is None:
        with _for_programs_too(wants_json=wants_json):
            _tell_card(_find_device(gpu, vram), wants_json=wants_json)
        return
    with _for_programs_too(wants_json=wants_json), _asking(ctx, recipe, overrides) as question:
        if longest:
            code = _tell_longest(question, gpu, vram, wants_json=wants_json)
        elif every_card:
            code = _tell_survey(question, wants_json=wants_json)
        else:
            code = _tell_answer(question, _find_device(gpu, vram), fit, wants_json=wants_json)
    ctx.exit(code)


def _check_options(
    recipe: Path | None,
    gpu: str | None,
    vram: str | None,
    *,
    every_card: bool,
    longest: bool,
    fit: str | None,
    overrides: Sequence[str],
) -> None:
    """Refuse what cannot go together."""
    if gpu is not None and vram is not None:
        raise UserError(f"--gpu {gpu!r} and --vram {vram} both name a card.", "Keep one.")
    about_recipe = {"--all": every_card, "--max-length": longest, "--fit": fit, "--set": overrides}
    for option, given in about_recipe.items():
        if given and recipe is None:
            raise UserError(f"{option} asks about a recipe, and none is given.", "Name one, such as recipes/chat.toml.")
    if every_card and (gpu or vram):
        raise UserError("--all asks about every card, --gpu and --vram about one.", "Keep one of them.")
    if every_card and longest:
        raise UserError("--all and --max-length are two tables.", "Ask for one after the other.")
    if fit and (every_card or longest):
        raise UserError("--fit writes the set-up for one card.", "Leave --all and --max-length out.")
    if fit not in (None, BESIDE) and Path(str(fit)).suffix != ".toml":
        raise UserError(f"--fit {fit}: it writes a recipe, whose name ends in .toml.", "Name it so.")


def _find_device(gpu: str | None, vram: str | None) -> "Gpu":
    """The card that is asked about.

    Raises:
        DeviceError: nobody knows it, or its size cannot be read; NoDeviceError where there is none here.
    """
    from qlora_phi3.hardware.gpu import find_gpu, gpu_of_size, read_gpu
    from qlora_phi3.units import parse_size

    if gpu is not None:
        return find_gpu(gpu)
    if vram is None:
        return read_gpu()
    try:
        num_bytes = parse_size(vram, binary=True)
    except ValueError as error:
        raise DeviceError(f"--vram: {error}") from error
    return gpu_of_size(num_bytes)


def _card_here() -> "Gpu | None":
    """The card of this computer, if it has one that answers."""
    from qlora_phi3.hardware.gpu import read_gpu

    try:
        return read_gpu()
    except DeviceError:
        return None


@contextmanager
def _for_programs_too(*, wants_json: bool) -> Iterator[None]:
    """For a program, "cannot tell" is an answer as well."""
    try:
        yield
    except CannotTellError as error:
        if wants_json:
            _print_json({**_nothing_known(), "verdict": "cannot_tell", "reason": str(error)})
        raise


@contextmanager
def _asking(ctx: click.Context, recipe: Path, overrides: tuple[str, ...]) -> Iterator["CachedVramCheck"]:
    """A question whose work is shown on stderr."""
    from qlora_phi3.cli.options import libraries_silenced
    from qlora_phi3.memory.cached import CachedVramCheck
    from qlora_phi3.ui.console import Watcher

    watcher = Watcher()
    try:
        with nullcontext() if ctx.meta.get("debug") else libraries_silenced():
            yield CachedVramCheck(recipe, overrides, watcher)
    finally:
        watcher.close()


def _nothing_known() -> dict[str, None]:
    from qlora_phi3.memory.report import VramReport

    return dict.fromkeys([*(field.name for field in fields(VramReport)), "others", "other_processes_bytes"])


def _tell_card(device: "Gpu", *, wants_json: bool) -> None:
    if wants_json:
        _print_json({"device": asdict(device), "other_processes_bytes": device.other_processes_bytes})
        return
    from qlora_phi3.ui.vram import show_card

    with _console() as console:
        show_card(console, device)


def _tell_answer(question: "CachedVramCheck", device: "Gpu", fit: str | None, *, wants_json: bool) -> int:
    target = None if fit is None else _fit_target(question, device, fit)
    report = question.about_card(device)
    question.teller.close()
    if wants_json:
        from qlora_phi3.memory.report import as_json

        _print_json(as_json(report))
    else:
        from qlora_phi3.ui.vram import show_answer

        with _console() as console:
            show_answer(console, report)
    if target is not None:
        _write_fit(question, report, target)
    return FITS if report.fits else DOES_NOT_FIT


def _fit_target(question: "CachedVramCheck", device: "Gpu", fit: str) -> Path:
    """Where --fit writes; refused before the work begins where something is there already."""
    path = Path(fit)
    if fit == BESIDE:
        size = math.ceil(device.total_bytes / 2**30)
        path = question.path.with_name(f"{question.path.stem}-{size}gb.toml")
    if path.exists():
        raise _is_there(path)
    if not path.absolute().parent.is_dir():
        raise UserError(f"--fit {path}: there is no folder {path.absolute().parent}.", "Make it, or name another file.")
    return path


def _is_there(path: Path) -> UserError:
    return UserError(
        f"{path} is there already, and --fit overwrites nothing.", "Name another file, or delete it first."
    )


def _write_fit(question: "CachedVramCheck", report: "VramReport", target: Path) -> None:
    """Write the recipe of the plan; say so on stderr, where a program that reads JSON is not disturbed."""
    from qlora_phi3.memory.fit import write_fitted

    if not report.fits:
        click.echo(f"{target} is not written, as nothing fits.", err=True)
        return
    try:
        write_fitted(question.recipe, question.text, question.overrides, report, source=question.path, target=target)
    except FileExistsError as error:
        raise _is_there(target) from error
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}.", "Name another file.") from error
    click.echo(f"Written: {target}. Train it with: qlora-phi3 run {target}", err=True)


def _tell_survey(question: "CachedVramCheck", *, wants_json: bool) -> int:
    from qlora_phi3.memory.tables import gpu_table_as_json, group_gpus, group_of_one

    is_local = _card_here()
    rows = question.about_every_card([*([group_of_one(is_local)] if is_local else []), *group_gpus()])
    question.teller.close()
    if wants_json:
        _print_json({"cards": gpu_table_as_json(rows)})
    else:
        from qlora_phi3.ui.vram import show_gpu_table

        with _console() as console:
            show_gpu_table(console, rows)
    return FITS if any(row.report.fits for row in rows) else DOES_NOT_FIT


def _tell_longest(question: "CachedVramCheck", gpu: str | None, vram: str | None, *, wants_json: bool) -> int:
    from qlora_phi3.memory.tables import group_gpus

    if gpu or vram:
        devices = [_find_device(gpu, vram)]
    else:
        is_local = _card_here()
        devices = [*([is_local] if is_local else []), *(group.device for group in group_gpus())]
    rows = question.about_length(devices)
    question.teller.close()
    if wants_json:
        _print_json({"cards": [asdict(row) for row in rows]})
    else:
        from qlora_phi3.ui.vram import show_max_lengths

        with _console() as console:
            show_max_lengths(console, rows)
    return FITS if any(row.max_length for row in rows) else DOES_NOT_FIT


@contextmanager
def _console() -> Iterator["Console"]:
    """The terminal, or lines without blanks at their ends where stdout is none."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        yield console
        return
    with console.capture() as captured:
        console.width = shutil.get_terminal_size((PIPED_WIDTH, 0)).columns
        yield console
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))
