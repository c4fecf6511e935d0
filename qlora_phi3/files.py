"""Atomic writes, disk errors in one line, checksums, JSON files, and the directories of the user.

Every file that must survive a kill or a power cut is written through `atomic_file` or `atomic_dir`: the content goes to a
temporary name in the same directory, is flushed to the disk, and is renamed. A reader sees the old content or the new one.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from qlora_phi3.errors import RunError, UserError, disk_error_hint

APP_NAME = "qlora-phi3"
#: Age at which a temporary file outside a run directory belongs to no process that still writes it.
STALE_SECONDS = 3600


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to; at the end it replaces `target`, or is removed if anything fails.

    Raises:
        OSError: the disk is full or refuses the write; `target` is unchanged. See `disk_errors`.
    """
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield staging
        flush_to_disk(staging)
        staging.replace(target)
        flush_directory(target.parent)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """Yield a temporary empty directory to fill; at the end it replaces `target`, or is removed if anything fails.

    Raises:
        OSError: the disk is full or refuses the write; `target` is unchanged.
    """
    staging = target.with_name(f".{target.name}.partial")
    remove(staging)
    staging.mkdir(parents=True)
    try:
        yield staging
        replace_dir(staging, target)
    finally:
        remove(staging)


def replace_dir(staging: Path, target: Path) -> None:
    """Flush the directory `staging` to the disk and rename it to `target`; a former `target` is removed only afterwards.

    Raises:
        OSError: a rename failed; `target` is as it was before.
    """
    former = target.with_name(f".{target.name}.former")
    flush_to_disk(staging)
    remove(former)
    if os.path.lexists(target):  # a link whose target is gone, too
        target.replace(former)
    try:
        staging.replace(target)
    except OSError:
        if os.path.lexists(former):
            former.replace(target)
        raise
    flush_directory(target.parent)
    remove(former)


def atomic_write(target: Path, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all.

    Raises:
        RunError: the disk is full or refuses the write; `target` is unchanged.
    """
    hint = "{cause}, then continue with --resume."
    with disk_errors(target, hint=hint), atomic_file(target) as staging:
        staging.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def disk_errors(
    path: Path, error_class: type[UserError] = RunError, *, hint: str = "{cause}, or choose another directory."
) -> Iterator[None]:
    """Raise one line for a disk that is full or refuses a write.

    Args:
        path: what is written, for the message.
        error_class: raised in place of an OSError, a SafetensorError, or the RuntimeError of torch's zip writer.
        hint: what to do; `{cause}` stands for what fits the error (`errors.disk_error_hint`).
    """
    try:
        yield
    except (OSError, RuntimeError, _safetensor_error()) as error:
        cause = error if isinstance(error, OSError) else _hidden_cause(error, path)
        reason = str(getattr(cause, "strerror", None) or cause).strip() or type(error).__name__
        if cause is error and isinstance(error, RuntimeError):
            # torch.save reports a full disk as a RuntimeError of its zip writer, which only counts bytes (torch 2.13).
            if not _is_torch_writer(error):
                raise
            reason = "the disk accepted fewer bytes than were written, as a full disk does"
        message = f"{path} cannot be written: {reason.splitlines()[0].rstrip('.')}."
        raise error_class(message, hint.format(cause=disk_error_hint(cause))) from error


def _is_torch_writer(error: Exception) -> bool:
    texts = ("inline_container", "PytorchStreamWriter", "iostream error", "Parent directory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def _hidden_cause(error: Exception, path: Path) -> Exception:
    """The OSError behind an error of a library's writer, which names its number or nothing; else the error itself."""
    if number := re.search(r"os error (\d+)", str(error)):  # safetensors writes Rust's text
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if _is_torch_writer(error):
        directory = next((parent for parent in (path, *path.parents) if parent.is_dir()), Path())
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                file.write(bytes(2**20))
                file.flush()
                os.fsync(file.fileno())
        except OSError as found:
            return found
    return error


def _safetensor_error() -> type[Exception]:
    """Called only after something was raised, so that `--help` does not pay for the import."""
    from safetensors import SafetensorError

    return SafetensorError


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a directory with everything in it."""
    if path.is_dir():
        for inner in path.iterdir():
            if not inner.is_symlink():
                flush_to_disk(inner)
        flush_directory(path)
    else:
        with path.open("rb+" if os.name == "nt" else "rb") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """fsync the names in a directory; Windows has no such call and needs none."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its parents, and flush their names to the disk; FileExistsError where it is there already."""
    created = [path, *takewhile(lambda parent: not parent.exists(), path.parents)]
    path.mkdir(parents=True)
    for directory in created:
        flush_directory(directory.parent)


def remove_leftovers(directory: Path, *, older_than_seconds: float = 0.0) -> None:
    """Remove what killed processes left of `atomic_file` and `atomic_dir` in a directory."""
    for path in (*directory.glob(".*.partial"), *directory.glob(".*.former")):
        with suppress(OSError):
            if path.lstat().st_mtime <= time.time() - older_than_seconds:
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with everything in it; a missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_object(path: Path, error_class: type[UserError], hint: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        error_class: the file cannot be read, is not JSON, or holds no object; with `hint`.
    """
    if path.exists() and not path.is_file():
        raise error_class(f"{path} is no regular file.", hint)  # reading a named pipe would wait forever
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise error_class(f"{path} cannot be read: {error.strerror or error}.", hint) from error
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise error_class(f"{path} is not JSON: {error}.", hint) from error
    if not isinstance(value, dict):
        raise error_class(f"{path} holds no JSON object.", hint)
    return value


def user_state_dir() -> Path:
    """Directory for what runs measured on this computer; on Linux `~/.local/state/qlora-phi3`, or below XDG_STATE_HOME."""
    import platformdirs

    return platformdirs.user_state_path(APP_NAME, appauthor=False)


def user_cache_dir() -> Path:
    """Directory for what can be computed again; on Linux `~/.cache/qlora-phi3`, or below XDG_CACHE_HOME."""
    import platformdirs

    return platformdirs.user_cache_path(APP_NAME, appauthor=False)
