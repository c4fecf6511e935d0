"""What is to be exported, from where to where; everything that can be checked before torch starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_phi3.errors import ExportError
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.sizes import parse_size

#: A shard holds at least the largest tensor whatever is asked for; less than this makes thousands of files.
SMALLEST_SHARD = 2**20
#: As people write them, and as torch does.
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
USUAL_ONTO, USUAL_DTYPE = "auto", "fp16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An export as it was asked for."""

    run: RunFolder
    #: Contents of the run's report.json.
    report: dict[str, Any]
    #: The merged model's folder; a GGUF goes to `gguf_target`, made from it.
    target: Path
    gguf_target: Path | None
    #: llama.cpp's name of the quantization.
    quant: str
    #: torch's name.
    dtype: str
    onto: str
    #: Folder of the base, where it is not the one the run names.
    base: Path | None
    shard_bytes: int
    max_ram_bytes: int | None
    verify: bool
    force: bool
    push: str | None
    private: bool


def make_request(
    run: Path,
    *,
    out: Path | None,
    kind: str,
    quant: str | None,
    dtype: str,
    onto: str,
    base: Path | None,
    shard_size: str,
    max_ram: str | None,
    verify: bool,
    force: bool,
    push: str | None,
    private: bool,
) -> Request:
    """Check what the command line asks for.

    Args:
        out: where to write; without it beside the run, under a name that tells what was asked for beyond the usual.
        dtype: one of `DTYPES`.

    Raises:
        ExportError, RunError: the run is none or not done, a size is unreadable, or a target is where it must not be.
    """
    folder, report = find_finished_run(run)
    gguf = kind == "gguf"
    asked = "".join(f"-{value}" for value, usual in ((onto, USUAL_ONTO), (dtype, USUAL_DTYPE)) if value != usual)
    target = folder.path / f"merged{asked}" if out is None or gguf else out
    gguf_target = (out or folder.path / f"gguf{asked}") if gguf else None
    for place in filter(None, (target, gguf_target)):
        _check_target(place, folder, base)
    return Request(
        run=folder,
        report=report,
        target=target,
        gguf_target=gguf_target,
        quant=(quant or "f16").lower(),
        dtype=DTYPES[dtype],
        onto=onto,
        base=base,
        shard_bytes=_size("--shard-size", shard_size, SMALLEST_SHARD),
        max_ram_bytes=None if max_ram is None else _size("--max-ram", max_ram, SMALLEST_SHARD),
        verify=verify,
        force=force,
        push=push,
        private=private,
    )


def find_finished_run(place: Path) -> tuple[RunFolder, dict[str, Any]]:
    """The run of a folder, or the newest run below it, with its report.

    Raises:
        RunError: there is none. ExportError: it did not finish, or its adapter is gone.
    """
    if not (place / "report.json").is_file():
        below = sorted(report.parent for report in place.glob("*/report.json"))
        if place.name == "adapter" and (place.parent / "report.json").is_file():
            place = place.parent
        elif below:
            place = below[-1]
    folder = RunFolder(place)
    report = folder.read_report()
    if report.get("status") != "done":
        raise ExportError(
            f"The run {place} is not done: {report.get('status')}.",
            f"Finish it: qlora-phi3 run {folder.recipe} --resume {place}",
        )
    for needed in (folder.adapter / "adapter_config.json", folder.base, folder.recipe):
        if not needed.is_file():
            raise ExportError(f"{needed} is missing.", "Export a whole run; or train again.")
    return folder, report


def _check_target(target: Path, run: RunFolder, base: Path | None) -> None:
    """Nothing is written into the adapter, the checkpoints or the base, nor over a run or a working folder."""
    where = target.resolve()
    sources = [run.adapter, run.checkpoints, run.quantized_base, *([base] if base else [])]
    for source in sources:
        if where == source.resolve() or source.resolve() in where.parents:
            raise ExportError(f"--out {target} is inside {source}, which is read.", "Choose another folder.")
    if where == run.path.resolve() or where in run.path.resolve().parents:
        raise ExportError(f"--out {target} holds the run itself.", "Choose a folder of its own.")
    if target.exists() and not target.is_dir():
        raise ExportError(f"--out {target} is a file.", "Choose a folder.")


def _size(option: str, text: str, least: int) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ExportError(f"{option} {error}") from error
    if size < least:
        raise ExportError(f"{option} {text} is too little.", f"Give at least {least // 2**20} MiB.")
    return size
