"""`qlora-phi3 vram-check`: whether a recipe fits a GPU, and with which plan, before anything is loaded."""

import math
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from qlora_phi3.cli.options import check_new_file, debug_option, find_recipe, named_gpu, set_option, shipped_files, watching
from qlora_phi3.cli.output import echo, echo_json, print_rich
from qlora_phi3.errors import CannotTellError, DeviceError, NoDriverError, UserError, quoted

if TYPE_CHECKING:
    from qlora_phi3.hardware.gpu import Gpu
    from qlora_phi3.memory.cached import CachedVramCheck
    from qlora_phi3.memory.report import VramReport

NEXT_TO_RECIPE = "next to the recipe"
DOES_NOT_FIT = 3


@click.command("vram-check")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--gpu", metavar="NAME", help="Check for a GPU that is not here: --gpu 'RTX 4070 Laptop'.")
@click.option("--vram", metavar="SIZE", help="Check for any GPU of a size: --vram 12GB.")
@click.option("--all", "every_gpu", is_flag=True, help="A table of all consumer GPUs from 4 to 24 GB.")
@click.option("--max-length", is_flag=True, help="The longest row that still fits each GPU.")
@click.option("--processes", type=click.IntRange(1), default=1, metavar="N", help="N processes share a step, a GPU each.")
@click.option(
    "--fit",
    is_flag=False,
    flag_value=NEXT_TO_RECIPE,
    metavar="[FILE]",
    help="Write the plan that was found as a recipe: to FILE, or next to RECIPE.",
)
@click.option("--json", "wants_json", is_flag=True, help="Print JSON, for programs.")
@set_option
@debug_option
@click.pass_context
def vram_check(ctx: click.Context, /, **options: Any) -> None:
    """Check whether RECIPE fits a GPU, and with which plan it is fastest; without RECIPE, which models fit.

    On a computer without an NVIDIA driver the recipe is checked for its processor and memory, which a run would use.

    \b
    Examples:
      qlora-phi3 vram-check
      qlora-phi3 vram-check --vram 8GB
      qlora-phi3 vram-check my.toml
      qlora-phi3 vram-check chat --vram 12GB
      qlora-phi3 vram-check chat --all

    Nothing is loaded, downloaded or put on the GPU. Exit codes: 0 it fits, 3 it does not, 2 bad input, 4 cannot tell (the GPU
    cannot be read, or the shapes of a model of the hub are not here).
    """
    from dataclasses import asdict, fields

    from qlora_phi3.memory.cached import CachedVramCheck
    from qlora_phi3.memory.report import VramReport

    chosen = SimpleNamespace(**options)  # the options above, by name
    if chosen.recipe is None and (fit := Path(chosen.fit or "")).suffix == ".toml" and fit.is_file():
        # --fit RECIPE.toml: the recipe was taken for the option's value
        chosen.recipe, chosen.fit = fit, NEXT_TO_RECIPE
    try:
        _check_options(chosen)
        if chosen.recipe is None:
            device = _find_device(chosen)
            as_json = {"device": asdict(device), "other_processes_bytes": device.other_processes_bytes}
            _show(chosen, "show_gpu", device, as_json)
            if not chosen.wants_json:
                _show_models(device, chosen)
            return
        check = CachedVramCheck(find_recipe(chosen.recipe), chosen.overrides, watching, chosen.processes)
        fits = (_show_table if chosen.max_length or chosen.every_gpu else _show_report)(check, chosen)
    except UserError as error:  # for a program, that is a result as well
        if chosen.wants_json:
            names = [*(field.name for field in fields(VramReport)), "processes", "other_processes_bytes"]
            verdict = "cannot_tell" if isinstance(error, CannotTellError) else "error"
            echo_json({**dict.fromkeys(names), "verdict": verdict, "reason": str(error)})
        raise
    ctx.exit(0 if fits else DOES_NOT_FIT)


def _show_models(device: "Gpu", options: SimpleNamespace) -> None:
    """Which model of the family fits the GPU."""
    with watching() as watcher:
        watcher.info("Starting torch, transformers and peft")
        from qlora_phi3.memory.proposal import compare_models

        models = compare_models(device, watcher.progress, watcher.info)
    click.echo("")
    _show(options, "show_models", models, None)
    echo("\nTime: 1,000 rows of 2,048 tokens, by a cost model. For your own: qlora-phi3 init my-chats.jsonl")


def _check_options(options: SimpleNamespace) -> None:
    """Refuse options that cannot be combined."""
    fit, tables = options.fit, options.every_gpu or options.max_length
    about_recipe = {
        "--all": options.every_gpu, "--max-length": options.max_length, "--fit": fit, "--set": options.overrides,
        "--processes": options.processes > 1,
    }  # fmt: skip
    for option, given in about_recipe.items():
        if given and options.recipe is None:
            raise UserError(f"{option} is about a recipe, and none is given.", "Name one, such as chat or my.toml.")
    if options.every_gpu and (options.gpu or options.vram):
        raise UserError("--all is about every GPU, --gpu and --vram about one.", "Keep one of them.")
    if options.every_gpu and options.max_length:
        raise UserError("--all and --max-length are two tables.", "Run one after the other.")
    if fit and tables:
        raise UserError("--fit writes the plan for one GPU.", "Leave --all and --max-length out.")


def _find_device(options: SimpleNamespace, check: "CachedVramCheck | None" = None) -> "Gpu":
    """The GPU that is named, else the one of this computer that a run of the recipe would use. DeviceError where it is not in the
    table, or its size cannot be read; NoDeviceError where there is none here.
    """
    from qlora_phi3.hardware.gpu import choose_gpu, read_gpu

    if named := named_gpu(options.gpu, options.vram):
        return named
    return choose_gpu(check.wanted_gpu if check else "auto") or read_gpu()  # which says why none can be read


def _show_report(check: "CachedVramCheck", options: SimpleNamespace) -> bool:
    """The report for one GPU, or for the processor of a computer that has none, and --fit; returns whether the recipe fits."""
    from qlora_phi3.hardware.gpu import read_cpu
    from qlora_phi3.memory.report import as_json

    try:
        device = _find_device(options, check)
    except NoDriverError:
        device = read_cpu()
    except DeviceError:
        _ = check.recipe  # what is wrong with the recipe is said first
        raise
    target = None if options.fit is None else _fit_target(check.path, device, options.fit)
    report = check.report(device)
    _show(options, "show_report", report, as_json(report))
    if target is not None:
        _write_fit(check, report, target)
    return report.fits


def _fit_target(recipe: Path, device: "Gpu", fit: str) -> Path:
    """Where --fit writes, refused before the work begins; for a recipe that ships, never in an installed package."""
    path = Path(fit)
    if fit == NEXT_TO_RECIPE:
        size = "cpu" if device.is_cpu else f"{math.ceil(device.total_bytes / 2**30)}gb"
        path = recipe.with_name(f"{recipe.stem}-{size}.toml")
        path = Path(path.name) if recipe in shipped_files("recipes", "toml").values() else path
    check_new_file(path, "--fit")
    return path


def _write_fit(check: "CachedVramCheck", report: "VramReport", target: Path) -> None:
    """Write the recipe of the plan, and report it on stderr, where a program that reads JSON is not disturbed."""
    from qlora_phi3.memory.suggestions import write_fitted

    if not report.fits:
        echo(f"{target} is not written, as nothing fits.", err=True)
        return
    text = check.path.read_text(encoding="utf-8-sig")
    try:
        write_fitted(check.recipe, text, check.overrides, report, source=check.path, target=target)
    except OSError as error:  # also where the file was made meanwhile
        raise UserError(f"{target} cannot be written: {error.strerror}.", "Name another file.") from error
    echo(f"Written: {target}. Train it with: qlora-phi3 run {quoted(target)}", err=True)


def _show_table(check: "CachedVramCheck", options: SimpleNamespace) -> bool:
    """The table of --all or --max-length: of the GPU that is named; or of the one here, if it answers, and of all groups of
    consumer GPUs. Returns whether the recipe, or any row, fits any of them.
    """
    from dataclasses import asdict

    from qlora_phi3.memory.tables import group_gpus, table_row_as_json

    named = named_gpu(options.gpu, options.vram)
    devices = [named] if named else []
    if not named:
        with suppress(DeviceError):
            devices.append(_find_device(options, check))
        devices += group_gpus()
    if options.max_length:
        rows = check.max_lengths(devices)
        _show(options, "show_max_lengths", rows, {"gpus": [asdict(row) for row in rows]})
        return any(row.max_length for row in rows)
    reports = check.gpu_table(devices)
    _show(options, "show_gpu_table", reports, {"gpus": list(map(table_row_as_json, reports))})
    return any(report.fits for report in reports)


def _show(options: SimpleNamespace, function: str, result: Any, as_json: Any) -> None:
    """Print JSON, or what a function of `ui.vram` shows; where stdout is no terminal, lines without blanks at their ends."""
    if options.wants_json:
        echo_json(as_json)
        return
    from qlora_phi3.ui import vram

    print_rich(lambda console: getattr(vram, function)(console, result))
