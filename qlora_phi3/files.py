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

from qlora_phi3.errors import RunError, UserError, disk_error_hint, first_line

APP_NAME = "qlora-phi3"
#: Objects and lists in one another that a JSON file may have; those that are read here have fewer than 10.
MAX_DEPTH = 64
#: How the file begins that Git leaves in place of a large one.
LFS_POINTER = b"version https://git-lfs"
#: Directory of 4-bit bases below the user's cache, and the file that describes an entry.
BASES_DIR, CACHE_ENTRY_NAME = "bases", "entry.json"
#: Age at which a temporary file outside a run directory belongs to no process that still writes it.
STALE_SECONDS = 3600


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to; at the end it replaces `target`, or is removed if anything fails. OSError where
    the disk is full or refuses the write (see `disk_errors`); `target` is unchanged.
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
    """Yield a temporary empty directory to fill; at the end it replaces `target`. If anything fails, as with `atomic_file`, it is
    removed and `target` is unchanged.
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
    """Flush the directory `staging` to the disk and rename it to `target`; a former `target` is removed only afterwards. OSError
    where a rename failed; `target` is as it was before.
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


def atomic_write(target: Path, text: str, hint: str = "{cause}, then continue with --resume.") -> None:
    """Write a text file in UTF-8, completely or not at all: RunError where the disk is full or refuses; `target` is unchanged."""
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


def check_directory(target: Path, option: str) -> None:
    """Refuse, before anything is computed, a file in a directory that does not exist, or takes no file: UserError.

    `option` names the file, and is empty where it was not given.
    """
    if not (parent := target.absolute().parent).is_dir():
        raise UserError(f"{option} {target}: there is no directory {parent}.".lstrip(), "Make it, or name another file.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {target}: you may not write to {parent}.".lstrip(), "Name a file in another directory.")


def is_dir(path: str | Path) -> bool:
    """Whether there is such a directory; False for a name that no file system takes, where `Path.is_dir` raises (Python 3.11)."""
    with suppress(OSError, ValueError):
        return Path(path).is_dir()
    return False


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


def hash_file(path: Path) -> str:
    """XXH3 of a file's bytes, in hex: as fast as reading, against damage, not against a forger."""
    from xxhash import xxh3_128

    with path.open("rb") as file:
        return hashlib.file_digest(file, xxh3_128).hexdigest()


def file_state(path: str | Path) -> list[int] | None:
    """Size and times of a file or directory, which a change of its content changes; None where there is none."""
    with suppress(OSError):
        found = Path(path).stat()
        return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    return None


def read_json_object(path: Path, error_class: type[UserError], hint: str) -> dict[str, Any]:
    """Read a JSON file that holds an object; `error_class` with `hint` where it cannot be read, is not JSON, or holds none."""
    if path.exists() and not path.is_file():
        raise error_class(f"{path} is no regular file.", hint)  # reading a named pipe would wait forever
    try:
        check_no_pointer(path, error_class)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise error_class(f"{path} cannot be read: {error.strerror or error}.", hint) from error
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise error_class(f"{path} is not JSON: {error}.", hint) from error
    if not isinstance(value, dict):
        raise error_class(f"{path} holds no JSON object.", hint)
    if nesting(value, MAX_DEPTH) > MAX_DEPTH:  # copying and printing it would exceed Python's recursion limit
        raise error_class(f"{path} is nested more than {MAX_DEPTH} deep.", hint)
    return value


def nesting(value: object, enough: int) -> int:
    """How deep lists and tables are nested; counting ends above `enough`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not inner or enough < 0:
        return bool(inner)
    return 1 + max(nesting(each, enough - 1) for each in inner)


def check_no_pointer(path: Path, error_class: type[UserError]) -> None:
    """Raise `error_class` where a file is what Git leaves of a large file that was not fetched; OSError if it cannot be read."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise error_class(f"{path} is a Git LFS pointer, not the file itself.", "Fetch the files: git lfs pull")


@contextmanager
def foreign_errors(error_class: type[UserError], message: str, hint: str) -> Iterator[None]:
    """Raise one line for whatever a library raises over a damaged file of someone else.

    transformers, tokenizers and PEFT assume the types of what they parse: an own JSON file with one changed value made them raise
    TypeError, AttributeError, IndexError, RecursionError, a bare Exception (tokenizers) or a panic of Rust. Use it only around
    the call that parses. Running out of memory passes.

    Args:
        message: what cannot be read; `{reason}` stands for the first line of the library's error.
    """
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        names = {kind.__name__ for kind in type(error).__mro__}
        if "OutOfMemoryError" in names or not names & {"Exception", "PanicException"}:
            raise
        raise error_class(message.replace("{reason}", first_line(error)), hint) from error


def save_for_later(path: Path, text: str) -> None:
    """Write a file of the user's state or cache, whatever is there; a directory that cannot be written is ignored."""
    with suppress(OSError, RunError):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, older_than_seconds=STALE_SECONDS)
        if not path.is_file():
            remove(path)
        atomic_write(path, text)


def user_state_dir() -> Path:
    """Directory for what runs measured on this computer; on Linux `~/.local/state/qlora-phi3`, or below XDG_STATE_HOME."""
    import platformdirs

    return platformdirs.user_state_path(APP_NAME, appauthor=False)


def datasets_dir() -> Path:
    """Directory of the datasets library's cache, found without importing it."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets"))


def row_cache_dir() -> Path:
    """Directory of tokenized rows."""
    return datasets_dir() / APP_NAME


def user_cache_dir() -> Path:
    """Directory for what can be computed again; on Linux `~/.cache/qlora-phi3`, or below XDG_CACHE_HOME."""
    import platformdirs

    return platformdirs.user_cache_path(APP_NAME, appauthor=False)
