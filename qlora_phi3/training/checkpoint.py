"""Checkpoints that are whole or not there: sealed after the last byte, and only sealed ones are resumed from.

transformers writes a checkpoint file by file; a kill in between leaves one that is an error on resuming, or, without its
optimizer, is resumed in silence with a fresh one. The seal names every file with its size.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from qlora_phi3.errors import RunError, disk_error_hint
from qlora_phi3.files import atomic_write

MANIFEST = "sealed.json"


def write_manifest(checkpoint: Path) -> None:
    """Flush every file of a checkpoint to the disk and write down their sizes, last of all."""
    sizes = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    atomic_write(checkpoint / MANIFEST, json.dumps(sizes, indent=2))


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was sealed and no file of it has another size since."""
    try:
        sizes: dict[str, int] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def find_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint, and the newer ones that were passed over because they are not."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    broken: list[Path] = []
    for path in sorted(numbered, key=step_of, reverse=True):
        if is_complete(path):
            return path, broken
        broken.append(path)
    return None, broken


def step_of(checkpoint: Path) -> int:
    """The optimizer step a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


@contextmanager
def removed_on_error(target: Path) -> Iterator[None]:
    """Remove what was half written when the disk is full or refuses, and say so in one line.

    Raises:
        RunError: the write failed; `target` is gone, and what was saved before it still stands.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save tells of a full disk as a RuntimeError of its zip writer, safetensors as its own error.
        shutil.rmtree(target, ignore_errors=True)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "inline_container" in reason:  # torch's zip writer, which knows no more than that fewer bytes arrived
            reason = "the disk took fewer bytes than were written, as a full one does"
        raise RunError(
            f"{target} cannot be written: {reason.rstrip('.')}.",
            f"{disk_error_hint(error)}, then go on with --resume; earlier checkpoints stand.",
        ) from error
