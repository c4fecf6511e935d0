"""Complete checkpoints: a manifest of file sizes is written last, and only a checkpoint that matches its manifest is resumed.

transformers writes a checkpoint file by file. A kill in between leaves one that fails when it is resumed, or, if only the
optimizer is missing, is resumed silently with a new optimizer.
"""

import json
from pathlib import Path

from qlora_phi3.files import atomic_write, flush_to_disk

MANIFEST = "sealed.json"


def write_manifest(checkpoint: Path) -> None:
    """Flush every file of a checkpoint to the disk, then write their sizes."""
    flush_to_disk(checkpoint)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    atomic_write(checkpoint / MANIFEST, json.dumps(sizes, indent=2))


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has a manifest and all its files have the sizes of the manifest."""
    try:
        sizes: dict[str, int] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def find_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """Find the checkpoint to resume from.

    Returns:
        The newest complete checkpoint, or None; and the newer ones that are incomplete, the newest first.
    """
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    incomplete: list[Path] = []
    for path in sorted(numbered, key=step_of, reverse=True):
        if is_complete(path):
            return path, incomplete
        incomplete.append(path)
    return None, incomplete


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])
