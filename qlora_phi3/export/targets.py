"""What stands where an export is to go: an export of what, which of its files may be replaced, and whether it will do as it is.

An export lists in its record all files it wrote; nothing else is ever replaced.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_phi3.errors import ExportError
from qlora_phi3.runfolder import RunFolder

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


def read_standing(folder: Path) -> dict[str, Any]:
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


def why_unfit(folder: Path, key: str, *, verify: bool) -> str | None:
    """Why what stands in a folder is not the whole merged model of this key, proved where that is wanted; None where it is."""
    report = read_standing(folder)
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
    report = read_standing(folder)
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
    report = read_standing(gguf.parent)
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
