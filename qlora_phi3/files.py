"""Files and directories that are complete or absent; disk errors as one line; checksums; the directories of this user.

Every write of this program that must survive a kill or a power cut goes through `atomic_file` or `atomic_dir`: the content is
written beside the target, flushed to the disk, and renamed. A reader sees the old content or the new, never a part.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_phi3.errors import RunError, UserError, disk_error_hint

APP_NAME = "qlora-phi3"


def user_state_dir() -> Path:
    """Directory for what runs measured on this computer; on Linux `~/.local/state/qlora-phi3`, or below XDG_STATE_HOME."""
    import platformdirs

    return platformdirs.user_state_path(APP_NAME, appauthor=False)


def user_cache_dir() -> Path:
    """Directory for what can be computed again; on Linux `~/.cache/qlora-phi3`, or below XDG_CACHE_HOME."""
    import platformdirs

    return platformdirs.user_cache_path(APP_NAME, appauthor=False)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file to; it replaces `target` at the end, and is removed if anything fails.

    Raises:
        OSError: the disk is full or refuses; see `disk_errors`.
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
    """An empty directory beside `target` to write to; it replaces `target` at the end, and is removed if anything fails.

    Raises:
        OSError: the disk is full or refuses; `target` is then as it was before.
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
    """Flush `staging` to the disk and rename it to `target`; what stood there is removed only then."""
    former = target.with_name(f".{target.name}.former")
    flush_to_disk(staging)
    remove(former)
    if target.exists():
        target.replace(former)
    try:
        staging.replace(target)
    except OSError:
        if former.exists():
            former.replace(target)
        raise
    flush_directory(target.parent)
    remove(former)


def atomic_write(target: Path, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all.

    Raises:
        RunError: the disk is full or refuses; what stood at `target` still stands.
    """
    hint = "{cause}, then go on with --resume."
    with disk_errors(target, hint=hint), atomic_file(target) as staging:
        staging.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def disk_errors(
    path: Path, error_class: type[UserError] = RunError, *, hint: str = "{cause}, or choose another place."
) -> Iterator[None]:
    """Report a disk that is full or refuses in one line.

    Args:
        path: what is written, for the message.
        error_class: raised in place of an OSError, a SafetensorError, or the RuntimeError of torch's zip writer.
        hint: what to do; `{cause}` stands for the remedy that fits the error ("Free the disk").
    """
    try:
        yield
    except (OSError, RuntimeError, _safetensors_error()) as error:
        if isinstance(error, RuntimeError) and not _is_zip_writer_error(error):
            raise
        reason = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
        if _is_zip_writer_error(error):
            reason = "the disk took fewer bytes than were written, as a full one does"
        raise error_class(
            f"{path} cannot be written: {reason.splitlines()[0].rstrip('.')}.",
            hint.format(cause=disk_error_hint(error)),
        ) from error


def _safetensors_error() -> type[Exception]:
    """Evaluated only when something was raised, so that no command pays for the import."""
    from safetensors import SafetensorError

    return SafetensorError


def _is_zip_writer_error(error: BaseException) -> bool:
    """torch.save reports a full disk as a RuntimeError of its zip writer, which only counts bytes (torch 2.13)."""
    return isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStreamWriter" in str(error))


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a directory with all it holds."""
    if path.is_dir():
        for inner in path.rglob("*"):
            if inner.is_file():
                _fsync(inner)
            elif inner.is_dir():
                flush_directory(inner)
        flush_directory(path)
    else:
        _fsync(path)


def _fsync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """fsync the names in a directory; Windows has no such call and keeps them safe by itself."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with all it holds; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_object(path: Path, error_class: type[UserError], hint: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        error_class: the file cannot be read, is not JSON, or holds no object; `hint` says what to do.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise error_class(f"{path} cannot be read: {error}.", hint) from error
    if not isinstance(value, dict):
        raise error_class(f"{path} holds no JSON object.", hint)
    return value
