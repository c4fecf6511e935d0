"""What is exported and where to: everything that can be checked before torch starts.

Only files that an earlier export lists in its report (`export_report.json`) are ever replaced.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_phi3.errors import ExportError
from qlora_phi3.files import sha256_file
from qlora_phi3.runfolder import RunFolder, resolve_run
from qlora_phi3.units import parse_size

CARD, REPORT, MODELFILE = "README.md", "export_report.json", "Modelfile"
#: In the staging directory: the scores, until the export ends. An interrupted export leaves them for the next one.
SCORED = ".scored.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
#: The values of --dtype: torch's name, and the GGUF type that holds it bit for bit.
DTYPES = {"fp16": ("float16", "f16"), "bf16": ("bfloat16", "bf16"), "fp32": ("float32", "f32")}
DEFAULT_ONTO, DEFAULT_DTYPE = "auto", "fp16"
#: Types that the gguf package itself can write, largest first.
PLAIN = ("f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
#: llama.cpp's file types that need no importance matrix, and the bits of a weight, averaged over all weights of Llama-3.1-8B
#: with its embedding and head (the table in llama.cpp's tools/quantize/README.md).
QUANTIZED = {
    "q2_k": 3.16, "q3_k_s": 3.64, "q3_k_m": 4.00, "q3_k_l": 4.30, "iq4_xs": 4.46, "iq4_nl": 4.68,
    "q4_k_s": 4.67, "q4_k_m": 4.89, "q5_k_s": 5.57, "q5_k_m": 5.70, "q6_k": 6.56,
}  # fmt: skip
QUANTS = (*PLAIN, *QUANTIZED)
#: A name that every version of Ollama takes: [namespace/]model[:tag], types/model/name.go of its source.
OLLAMA_NAME = re.compile(r"(\w[\w-]{0,79}/)?\w(?:[\w-]|\.(?!\.)){0,79}(:\w[\w.-]{0,79})?", re.ASCII)
#: A smaller shard size would make thousands of files.
MIN_SIZE_BYTES = 2**20
OTHER_PLACE = "Move it away, or give --out another folder."
FORCE = "Give --out another folder, or --force to replace it."


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The options of `qlora-phi3 export`, as they are typed."""

    out: Path | None = None
    kind: str = "hf"  # or "gguf"
    quant: str | None = None  # None: the GGUF type that holds `dtype` bit for bit
    dtype: str = DEFAULT_DTYPE  # a key of `DTYPES`
    onto: str = DEFAULT_ONTO
    base: Path | None = None
    shard_size: str = "5GB"
    max_ram: str | None = None
    verify: bool = True
    force: bool = False
    push: str | None = None
    private: bool = False
    ollama: str | None = None  # the model's name in Ollama; needs kind "gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An export whose options, run and targets are checked."""

    options: ExportOptions
    run: RunFolder
    report: dict[str, Any]  # contents of the run's report.json
    name: str  # of the model: the recipe's name when the run started
    key: str  # `merge_key` of the merged model
    target: Path  # directory of the merged model; a GGUF is made from it and written to `gguf_file`
    gguf_file: Path | None
    quant: str  # llama.cpp's name of the GGUF type
    dtype: str  # torch's name of the dtype of the merged model
    shard_bytes: int
    max_ram_bytes: int | None


def make_request(run: Path, options: ExportOptions) -> Request:
    """Check the options of an export, its run (a directory of a finished one, or of several) and its targets. ExportError or
    RunError where no run is finished, a size cannot be read, a push is refused, or a target must not be written.

    Without `options.out` the export goes into the run, under a name that contains every option that changes the weights, and of a
    GGUF always its type.
    """
    folder, report = find_finished_run(run, verify=options.verify)
    if options.base is not None and not (options.base / "config.json").is_file():
        hint = "Give the folder of the base that was trained on."
        raise ExportError(f"--base {options.base} has no config.json.", hint)
    name = str(report.get("name") or f"phi3-{str(report.get('started'))[:10]}")  # never a path, which is private
    dtype, default_quant = DTYPES[options.dtype]
    quant = (options.quant or default_quant).lower()
    if quant not in QUANTS:
        raise ExportError(f"There is no --quant '{quant}'.", f"The names: {', '.join(QUANTS)}.")
    suffix = "" if options.onto == DEFAULT_ONTO else f"-{options.onto}"
    suffix += "" if options.dtype == DEFAULT_DTYPE else f"-{options.dtype}"
    target, gguf_file = folder.path / f"merged{suffix}", None
    if options.kind == "gguf":
        gguf_file = (options.out or folder.path / f"gguf{suffix}-{quant}").resolve() / f"{name}-{quant}.gguf"
    elif options.out is not None:
        target = options.out
    request = Request(
        options=options,
        run=folder,
        report=report,
        name=name,
        key=merge_key(folder, dtype=dtype, onto=options.onto),
        target=target.resolve(),  # of a link, the directory it leads to is replaced, and the link stays
        gguf_file=gguf_file,
        quant=quant,
        dtype=dtype,
        shard_bytes=_parse_size_option("--shard-size", options.shard_size),
        max_ram_bytes=None if options.max_ram is None else _parse_size_option("--max-ram", options.max_ram),
    )
    if options.push is not None:
        from qlora_phi3.export.hub import check_push  # not at the top: `--help` reads this module

        check_push(options.push, private=options.private)
    check_targets(request)
    return request


def find_finished_run(path: Path, *, verify: bool) -> tuple[RunFolder, dict[str, Any]]:
    """The run that `path` names (`resolve_run`), with its report; RunError where there is none. ExportError where it did not
    finish, or lacks a file that an export (or `verify`) needs.
    """
    run = resolve_run(path)
    report = run.read_report()
    if report.get("status") != "done":
        hint = f"Finish it: {run.resume_command}"
        raise ExportError(f"The run {run.path} is not finished: its status is {report.get('status')}.", hint)
    for needed in (*(run.adapter / name for name in ADAPTER_FILES), run.base, run.recipe):
        if not needed.is_file():
            raise ExportError(f"{needed} is missing.", "Put it back, or train again.")
    if verify and not run.held_out.is_file():
        raise ExportError(f"{run.held_out} is missing, and the proof needs it.", "Export with --no-verify.")
    return run, report


def merge_key(run: RunFolder, *, dtype: str, onto: str) -> str:
    """A hash of everything that decides the bytes of a merged model: two exports with one key have the same weights."""
    from importlib.metadata import version  # not at the top: `--help` reads this module and has 0.1 s

    digest = hashlib.sha256()
    for path in (run.base, *(run.adapter / name for name in ADAPTER_FILES), run.held_out, run.chat_template):
        if path.is_file():
            digest.update(path.name.encode() + bytes.fromhex(sha256_file(path)))
    return hashlib.sha256(digest.digest() + f"{dtype} {onto} {version('qlora-phi3')}".encode()).hexdigest()


def _parse_size_option(option: str, text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ExportError(f"{option} {error}", "Write a size such as 5GB.") from error
    if size < MIN_SIZE_BYTES:
        raise ExportError(f"{option} {text} is too small.", f"Give at least {MIN_SIZE_BYTES // 2**20} MiB.")
    return size


def check_targets(request: Request) -> None:
    """Raise ExportError for a target that is inside or over anything that is read, or holds what no export wrote."""
    if is_finished_gguf(request):  # nothing is written
        return
    options, target, gguf, run = request.options, request.target, request.gguf_file, request.run.path.resolve()
    sources = _find_sources(request.run, options.base)
    _check_outside(target, sources)
    for source in (run, *sources, Path.cwd()):
        if source.is_relative_to(target):
            raise ExportError(f"--out {target} is or holds {source}, which must stay.", "Choose another folder.")
    if options.verify:
        check_replaceable(failed_path(target))
    if target.exists() and find_reusable(request) is None:
        reason = reuse_blocker(target, request.key, verify=options.verify)
        if gguf is not None and not options.force and (target / REPORT).is_file():
            hint = "Give --force to make it again, or move it away."
            raise ExportError(f"{target}, from which the GGUF would be made, {reason}.", hint)
        check_replaceable(target)
        if not options.force and gguf is None:
            raise ExportError(f"{target} exists and {reason}." if options.push else f"{target} exists.", FORCE)
    if gguf is not None:
        _check_outside(gguf.parent, [*sources, target])
        if gguf.parent == run:
            raise ExportError(f"--out {run} is the run itself.", "Choose another folder.")
        if any(gguf.parent.glob("*.safetensors")):
            message = f"--out {gguf.parent} holds a model, whose card a GGUF would replace."
            raise ExportError(message, "Choose another folder.")
        # Files of another type of the same model are replaced without --force; other files of the directory stay.
        existing = read_existing_report(gguf.parent)
        for path in (gguf, *(gguf.with_name(name) for name in (MODELFILE, CARD, REPORT))):
            if path.exists() and path.name not in existing["files"]["written"]:
                raise ExportError(f"{path} exists, and no export wrote it.", OTHER_PLACE)
            if path.exists() and not options.force and (path == gguf or existing.get("key") != request.key):
                raise ExportError(f"{path} exists.", FORCE)


def is_finished_gguf(request: Request) -> bool:
    """Whether the GGUF that --ollama asks for is there, complete and of this very run, and need only be created in Ollama."""
    path, options = request.gguf_file, request.options
    if path is None or options.ollama is None or options.force or options.push is not None:
        return False
    report = read_existing_report(path.parent)
    same = report.get("key") == request.key and report.get("gguf") == {"file": path.name, "quant": request.quant}
    proved = not options.verify or bool(report.get("proof"))
    return same and proved and not report.get("fault") and all(path.with_name(name).is_file() for name in (path.name, MODELFILE))


def staging_path(target: Path) -> Path:
    """Where a merged model is written until it is complete."""
    return target.with_name(f".{target.name}.partial")


def has_proof(request: Request) -> bool:
    """Whether an interrupted export of the same model left its proof for the next one."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        saved = json.loads((staging_path(request.target) / SCORED).read_text(encoding="utf-8"))
        return str(saved["key"]).startswith(request.key)
    return False


def _find_sources(run: RunFolder, base: Path | None) -> list[Path]:
    """The directories that an export reads, links resolved."""
    sources = [run.adapter, run.checkpoints, run.quantized_base, *([base] if base else [])]
    with suppress(OSError, ValueError, KeyError, TypeError):  # `base.read_record` reports a damaged file
        name = str(json.loads(run.base.read_text(encoding="utf-8"))["name"])
        from huggingface_hub.constants import HF_HUB_CACHE  # not at the top: `--help` reads this module

        is_folder = Path(name).is_dir()
        sources.append(Path(name) if is_folder else Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}"))
    return [source.resolve() for source in sources]


def _check_outside(target: Path, sources: Sequence[Path]) -> None:
    for source in sources:
        if target.is_relative_to(source):
            raise ExportError(f"--out {target} is inside {source}, which is read.", "Choose another folder.")
    existing = next(path for path in (target, *target.parents) if path.exists())
    if not existing.is_dir():
        raise ExportError(f"--out {target}: {existing} is a file.", "Choose a folder.")


def check_replaceable(folder: Path) -> None:
    """Raise ExportError for a directory that holds a file that no export wrote, or a GGUF."""
    report = read_existing_report(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name not in report["files"]["written"] or (path.is_dir() and not path.is_symlink()):
            raise ExportError(f"{folder} holds {path.name}, which no export wrote.", OTHER_PLACE)
    if "gguf" in report:
        raise ExportError(f"{folder} holds a GGUF, which a merged model does not replace.", OTHER_PLACE)


def find_reusable(request: Request) -> dict[str, Any] | None:
    """The report of an existing merged model that a GGUF can be made from, or that can be pushed; None where there is none."""
    options, folder = request.options, request.target
    is_wanted = request.gguf_file is not None or (options.push is not None and not options.force)
    is_reusable = is_wanted and reuse_blocker(folder, request.key, verify=options.verify) is None
    return read_existing_report(folder) if is_reusable else None


def reuse_blocker(folder: Path, key: str, *, verify: bool) -> str | None:
    """Why a directory is not the complete merged model of this key, proved where `verify` asks for it; None where it is."""
    report = read_existing_report(folder)
    if report.get("key") != key or "gguf" in report or not report["files"]["written"]:
        return "is not a merged model of this run in its present state"
    if verify and not report.get("proof"):
        return "was written with --no-verify"
    if report.get("fault"):
        return "differs from what was trained"
    return next((f"lacks {name}" for name in report["files"]["written"] if not (folder / name).is_file()), None)


def read_existing_report(folder: Path) -> dict[str, Any]:
    """The report of the export in a directory; where there is none that can be read, one that lists no written files."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        return {**report, "files": {**report["files"], "written": [str(name) for name in report["files"]["written"]]}}
    except (OSError, ValueError, KeyError, TypeError):
        return {"files": {"written": []}}


def failed_path(target: Path) -> Path:
    """Where a merged model goes whose proof failed."""
    return target.with_name(f"{target.name}.failed-proof")
