"""Where this program keeps what it learns about a computer: state that matters, and a cache that may go at any time."""

import hashlib
import os
import sys
from pathlib import Path

from qlora_phi3.errors import RunError, disk_error_hint


def user_state_dir() -> Path:
    """For what runs measured: `~/.local/state/qlora-phi3` (XDG_STATE_HOME), on Windows `%LOCALAPPDATA%\\qlora-phi3\\state`."""
    return _folder("XDG_STATE_HOME", ".local/state", "state")


def cache_folder() -> Path:
    """For what can be computed again: `~/.cache/qlora-phi3` (XDG_CACHE_HOME), on Windows `%LOCALAPPDATA%\\qlora-phi3\\cache`."""
    return _folder("XDG_CACHE_HOME", ".cache", "cache")


def _folder(variable: str, usual: str, kind: str) -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        return Path(local) / "qlora-phi3" / kind
    wanted = os.environ.get(variable, "")
    # The XDG rule: a relative path is to be ignored.
    return (Path(wanted) if Path(wanted).is_absolute() else Path.home() / usual) / "qlora-phi3"


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all: a temporary neighbour, flushed to the disk, then renamed.

    Raises:
        RunError: the disk is full or not writable; what stood at `path` still stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"{path} cannot be written: {error.strerror}.", f"{disk_error_hint(error)}, then go on with --resume."
        ) from error


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
