"""What stands where an export is to go: an export of what, which of its files may be replaced, and whether it will do as it is.

An export lists in its record all files it wrote; nothing else is ever replaced.

What is to be exported, from where to where; everything that can be checked before torch starts.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_phi3.errors import ExportError, RunError
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.units import parse_size

CARD, REPORT, MODELFILE = "README.md", "export_report.json", "Modelfile"


OTHER_PLACE = "Move it away, or give --out another folder."


def key_of(run: RunFolder, *, dtype: str, onto: str) -> str:
    """Names everything that decides the bytes of a merged model."""
    from importlib.metadata import version  # here, as `--help` reads this module and has 0.1 s

    digest = hashlib.sha256()
    adapter = (run.adapter / "adapter_config.json", run.adapter / "adapter_model.safetensors")
    for path in (run.base, *adapter, run.held_out, run.chat_template):
        if path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    asked = f"{dtype} {onto} {version('qlora-phi3')}"
    return hashlib.sha256(digest.digest() + asked.encode()).hexdigest()


def read_existing_report(folder: Path) -> dict[str, Any]:
    """The record of the export that stands in a folder; empty where there is none that can be read."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def written_files(report: Mapping[str, Any]) -> list[str]:
    """Names of all files that an export wrote into its folder, by its record."""
    files = report.get("files")
    written = files.get("written") if isinstance(files, dict) else None
    return [str(name) for name in written] if isinstance(written, list) else []


def reuse_blocker(folder: Path, key: str, *, verify: bool) -> str | None:
    """Why what stands in a folder is not the whole merged model of this key, proved where that is wanted; None where it is."""
    report = read_existing_report(folder)
    if report.get("key") != key or "gguf" in report:
        return "is no merged model of this run as it is now"
    if verify and not report.get("proof"):
        return "was written with --no-verify"
    if report.get("fault"):
        return "is not what was trained"
    written = written_files(report)
    lacking = [name for name in written if not (folder / name).is_file()]
    return f"lacks {lacking[0]}" if lacking else None if written else "does not list its files"


def check_replaceable(folder: Path) -> None:
    """Refuse to put a merged model in place of anything but a merged model.

    Raises:
        ExportError: the folder holds what no export wrote, or a GGUF.
    """
    if not folder.is_dir():
        return
    report = read_existing_report(folder)
    written = written_files(report)
    for path in sorted(folder.iterdir()):
        if path.name not in written or (path.is_dir() and not path.is_symlink()):
            raise ExportError(f"{folder} holds {path.name}, which no export wrote.", OTHER_PLACE)
    if "gguf" in report:
        raise ExportError(f"{folder} holds a GGUF, in whose place no merged model is put.", OTHER_PLACE)


def check_gguf_replaceable(gguf: Path, key: str, *, force: bool) -> None:
    """A GGUF's folder may hold other things: refuse to replace a file that no export wrote, or unasked one of another run.

    Card, Modelfile and report of another type of the same model are replaced unasked.

    Raises:
        ExportError: which file it is.
    """
    report = read_existing_report(gguf.parent)
    for path in (gguf, *(gguf.with_name(name) for name in (MODELFILE, CARD, REPORT))):
        if not path.exists():
            continue
        if path.name not in written_files(report):
            raise ExportError(f"{path} exists, and no export wrote it.", OTHER_PLACE)
        if not force and (path == gguf or report.get("key") != key):
            raise ExportError(f"{path} exists.", "Give --out another folder, or --force to replace it.")


def failed_place(target: Path) -> Path:
    """Where a merged model goes whose proof failed."""
    return target.with_name(f"{target.name}.failed-proof")


#: A shard holds at least the largest tensor whatever is asked for; less than this makes thousands of files.
SMALLEST_SHARD = 2**20


#: As people write them, and as torch does.
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


#: The GGUF type that holds each of them to the bit.
USUAL_QUANTS = {"fp16": "f16", "bf16": "bf16", "fp32": "f32"}


DEFAULT_ONTO, DEFAULT_DTYPE = "auto", "fp16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An export as it was asked for."""

    run: RunFolder
    #: Contents of the run's report.json.
    report: dict[str, Any]
    #: Of the model: what the run was filed under when it was made.
    name: str
    #: `key_of` the merged model.
    key: str
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

    @property
    def gguf_file(self) -> Path | None:
        """The .gguf file to write."""
        return self.gguf_target and self.gguf_target / f"{self.name}-{self.quant}.gguf"


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
        ExportError, RunError: the run is none or not done, a size is unreadable, the hub will not take a push, or a target is
            where it must not be.
    """
    folder, report = find_finished_run(run, verify=verify)
    if base is not None and not (base / "config.json").is_file():
        what = "has no config.json" if base.is_dir() else "is no folder"
        raise ExportError(f"--base {base} {what}.", "Give the folder of the checkpoint that was trained on.")
    gguf, quant = kind == "gguf", (quant or USUAL_QUANTS[dtype]).lower()
    asked = "".join(f"-{value}" for value, usual in ((onto, DEFAULT_ONTO), (dtype, DEFAULT_DTYPE)) if value != usual)
    of_quant = "" if quant == USUAL_QUANTS[dtype] else f"-{quant}"
    target = folder.path / f"merged{asked}" if out is None or gguf else out
    gguf_target = (out or folder.path / f"gguf{asked}{of_quant}") if gguf else None
    request = Request(
        run=folder,
        report=report,
        name=str(report.get("name") or f"phi3-{str(report.get('started'))[:10]}"),  # and nothing of a path
        key=key_of(folder, dtype=DTYPES[dtype], onto=onto),
        target=target.resolve(),  # a link stays, and what it leads to is written
        gguf_target=gguf_target and gguf_target.resolve(),
        quant=quant,
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
    if push is not None:
        from qlora_phi3.export.hub import check_push

        check_push(push, private=private)
    check_targets(request)
    return request


def find_finished_run(place: Path, *, verify: bool) -> tuple[RunFolder, dict[str, Any]]:
    """The run of a folder, or the newest run below it, with its report.

    Args:
        verify: the held-out rows are needed too.

    Raises:
        RunError: there is none. ExportError: it did not finish, or its adapter is gone.
    """
    if not place.is_dir():
        raise RunError(f"There is no folder {place}.", "Give the folder of a finished run, such as runs/chat/TIME.")
    if not (place / "report.json").is_file():
        below = sorted(
            (report.parent for deep in ("*", "*/*") for report in place.glob(f"{deep}/report.json")),
            key=lambda run: run.name,
        )
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
    adapter = folder.adapter
    for needed in (
        adapter / "adapter_config.json",
        adapter / "adapter_model.safetensors",
        folder.base,
        folder.recipe,
    ):
        if not needed.is_file():
            raise ExportError(f"{needed} is missing.", "Export a whole run; or train again.")
    if verify and not folder.held_out.is_file():
        raise ExportError(f"{folder.held_out} is missing, on which the proof is made.", "Export with --no-verify.")
    return folder, report


def _find_sources(run: RunFolder, base: Path | None) -> list[Path]:
    """The folders that are read."""
    sources = [run.adapter, run.checkpoints, run.quantized_base, *([base] if base else [])]
    try:
        name = str(json.loads(run.base.read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return sources  # told by `base.read_record`, which needs the whole of it
    if Path(name).is_dir():
        return [*sources, Path(name)]
    from huggingface_hub.constants import HF_HUB_CACHE  # here, as `--help` reads this module

    return [*sources, Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}")]


def check_targets(request: Request) -> None:
    """Nothing is written into what is read nor over it, and what goes for --force is what earlier exports wrote.

    Raises:
        ExportError: which it is.
    """
    sources = _find_sources(request.run, request.base)
    _check_target(request, sources)
    if request.gguf_file is not None:
        _check_gguf_target(request, request.gguf_file, sources)


def find_reusable(request: Request) -> dict[str, Any] | None:
    """The record of the merged model that is there already and will do: for a GGUF, or to be pushed."""
    wanted = request.gguf_target is not None or (request.push is not None and not request.force)
    if not wanted or reuse_blocker(request.target, request.key, verify=request.verify) is not None:
        return None
    return read_existing_report(request.target)


def _check_target(request: Request, sources: Sequence[Path]) -> None:
    target, run = request.target, request.run.path.resolve()
    _check_outside(target, sources)
    for source in (run, *(source.resolve() for source in sources)):
        if _holds(target, source):
            what = "the run itself" if source == run else f"{source}, which is read"
            raise ExportError(f"--out {target} holds {what}.", "Choose a folder of its own.")
    if _holds(target, Path.cwd()):
        raise ExportError(f"--out {target} is the folder you work in, or holds it.", "Choose a folder of its own.")
    if request.verify:
        check_replaceable(failed_place(target))
    if not target.exists() or find_reusable(request) is not None:
        return
    why = reuse_blocker(target, request.key, verify=request.verify)
    if request.gguf_target is not None and not request.force and (target / REPORT).is_file():
        raise ExportError(f"{target}, from which a GGUF is made, {why}.", "--force makes it anew; or move it away.")
    check_replaceable(target)
    if not request.force and request.gguf_target is None:
        because = f" and {why}" if request.push else ""
        raise ExportError(f"{target} exists{because}.", "Give --out another folder, or --force to replace it.")


def _check_gguf_target(request: Request, gguf: Path, sources: Sequence[Path]) -> None:
    """A GGUF's folder may hold other things, but nothing that is read, and no model."""
    folder = gguf.parent
    _check_outside(folder, [*sources, request.target])
    if folder == request.run.path.resolve():
        raise ExportError(f"--out {folder} is the run itself.", "Choose a folder of its own.")
    if any(folder.glob("*.safetensors")):
        raise ExportError(f"--out {folder} holds a model, whose card a GGUF would replace.", "Choose another folder.")
    check_gguf_replaceable(gguf, request.key, force=request.force)


def _check_outside(target: Path, sources: Sequence[Path]) -> None:
    for source in sources:
        if _holds(source.resolve(), target):
            raise ExportError(f"--out {target} is inside {source}, which is read.", "Choose another folder.")
    standing = next(path for path in (target, *target.parents) if path.exists())
    if not standing.is_dir():
        raise ExportError(f"--out {target}: {standing} is a file.", "Choose a folder.")


def _holds(folder: Path, path: Path) -> bool:
    return folder == path or folder in path.parents


def _size(option: str, text: str, least: int) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ExportError(f"{option} {error}") from error
    if size < least:
        raise ExportError(f"{option} {text} is too little.", f"Give at least {least // 2**20} MiB.")
    return size
