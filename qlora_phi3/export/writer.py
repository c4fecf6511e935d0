"""A checkpoint written as it is computed: safetensors of a chosen size, each whole or not there, and an index over them.

safetensors' own writer wants a file's tensors in memory together. The format is a header of names, types and places, known
beforehand, and then the bytes; they are written here a piece at a time, and read back by the library in the tests.

One export at a time writes into a place.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, cast

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from qlora_phi3.errors import ExportError, RunError, disk_error_hint
from qlora_phi3.files import atomic_write, user_state_dir
from qlora_phi3.model.weights import DTYPES, INDEX_NAME, WEIGHTS_NAME, TensorInfo, Weights
from qlora_phi3.units import format_gib

#: In the folder while it is not finished: which shards are whole, and what they were made from.
PROGRESS_NAME = ".shards.json"


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


#: Told after every piece: bytes written of all bytes.
Progress = Callable[[int, int], None]


#: What to keep beside a shard in the progress file, given its tensors' names.
Notes = Callable[[Sequence[str]], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file of the checkpoint to be: its tensors in the order of their bytes, and its size to the byte."""

    file_name: str
    names: tuple[str, ...]
    header: bytes
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A finished checkpoint: its files, how many of them stood there already, and the notes of all shards together."""

    files: tuple[Path, ...]
    num_resumed: int
    notes: Mapping[str, Any]


def plan_shards(info: Mapping[str, TensorInfo], shard_bytes: int) -> tuple[Shard, ...]:
    """Share tensors out to files, in their order.

    Args:
        shard_bytes: of tensors in a file, at most; a larger tensor gets a file of its own.

    Returns:
        One `model.safetensors`, or `model-00001-of-0000N.safetensors` and so on, as transformers names them.
    """
    groups: list[list[str]] = []
    filled = 0
    for name, tensor in info.items():
        if not groups or filled + tensor.num_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.num_bytes
    count = len(groups)
    return tuple(
        _plan_shard(WEIGHTS_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors", names, info)
        for number, names in enumerate(groups, start=1)
    )


def _plan_shard(file_name: str, names: Sequence[str], info: Mapping[str, TensorInfo]) -> Shard:
    ordered = sorted(names, key=lambda name: -info[name].dtype.itemsize)  # so that every tensor is aligned to its type
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        start, end = end, end + info[name].num_bytes
        dtype, shape = _NAMES[info[name].dtype], list(info[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    whole = len(text).to_bytes(8, "little") + text
    return Shard(file_name=file_name, names=tuple(ordered), header=whole, num_bytes=len(whole) + end)


def missing_bytes(shards: Sequence[Shard], folder: Path, key: str) -> int:
    """Bytes of disk that `write_shards` will still take: all shards, less those that stand there whole and what it takes away."""
    whole = _whole(shards, folder, _read_progress(folder, _key(shards, key)))
    gained = sum(path.stat().st_size for path in _leftovers(folder, whole))
    return max(0, sum(shard.num_bytes for shard in shards if shard.file_name not in whole) - gained)


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse what will not fit.

    Args:
        folder: need not exist yet; the disk is that of the nearest folder above that does.

    Raises:
        ExportError: fewer bytes are free than are needed.
    """
    standing = next(path for path in [folder, *folder.resolve().parents] if path.is_dir())
    free = shutil.disk_usage(standing).free
    if free < needed_bytes:
        raise ExportError(
            f"The export needs {format_gib(needed_bytes)} on the disk of {standing}, and {format_gib(free)} are free.",
            "Free the disk, or choose another --out.",
        )


def write_shards(
    weights: Weights,
    folder: Path,
    shards: Sequence[Shard],
    *,
    key: str,
    progress: Progress | None = None,
    notes: Notes | None = None,
) -> Written:
    """Write the planned shards and, where there are several, their index; go on after the shards that stand there whole.

    Any other weights in the folder, of an attempt under another key, are taken away.

    `forget_progress` takes the progress file away once everything else is in the folder too.

    Args:
        shards: `plan_shards(weights.info, …)`.
        key: names everything that decides the bytes (base, adapter, dtype, onto …); shards made under another key are
            written again.

    Raises:
        ExportError: the disk is full or refuses; what is whole stays. Or what `weights.pieces` raises.
    """
    whole_key = _key(shards, key)
    done = _read_progress(folder, whole_key)
    total, written, resumed = sum(shard.num_bytes for shard in shards), 0, 0
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        whole = _whole(shards, folder, done)
        if not done:
            forget_progress(folder)  # or, killed after the first shard, it would vouch for that one with its old key
        for path in _leftovers(folder, whole):
            path.unlink()
        for shard in shards:
            if shard.file_name in whole:
                resumed += 1
            else:
                _write_shard(weights, folder, shard, _counting(progress, written, total))
                done[shard.file_name] = {"num_bytes": shard.num_bytes, "notes": notes(shard.names) if notes else {}}
                atomic_write(folder / PROGRESS_NAME, json.dumps({"key": whole_key, "shards": done}))
            written += shard.num_bytes
            if progress:
                progress(written, total)
        files = [folder / shard.file_name for shard in shards]
        if len(shards) > 1:
            atomic_write(folder / INDEX_NAME, _index(weights.info, shards))
            files.append(folder / INDEX_NAME)
    together: dict[str, Any] = {}
    for shard in shards:
        together |= done[shard.file_name]["notes"]
    return Written(files=tuple(files), num_resumed=resumed, notes=together)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Make a disk that is full or refuses an ExportError."""
    try:
        yield
    except (OSError, RunError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else error.message
        goes_on = ": it goes on at the last whole file" if (folder / PROGRESS_NAME).is_file() else ""
        raise ExportError(
            f"{folder} cannot be written: {reason.rstrip('.')}.",
            f"{disk_error_hint(error)}, and give the same command again{goes_on}.",
        ) from error


@contextmanager
def ensure_dir(folder: Path) -> Iterator[None]:
    """Make a folder before anything long is done for it; where nothing came into it, it goes again.

    Raises:
        ExportError: it cannot be made or written.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        yield
    finally:
        for path in new:
            with suppress(OSError):  # it holds something, or has another name by now
                path.rmdir()


@contextmanager
def staging_dir(draft: Path, kept: Collection[str] = ()) -> Iterator[None]:
    """Make the folder of a draft; when it is left without a new name, it stays where a later attempt could go on in it.

    Args:
        kept: names of files to go on with, besides whole shards.
    """
    with ensure_dir(draft):
        try:
            yield
        finally:
            if draft.is_dir() and not any((draft / name).is_file() for name in (PROGRESS_NAME, *kept)):
                shutil.rmtree(draft, ignore_errors=True)


def forget_progress(folder: Path) -> None:
    """Take the progress file away; the folder is then no longer one to go on with."""
    (folder / PROGRESS_NAME).unlink(missing_ok=True)


def clear_draft(folder: Path, kept: Collection[str] = ()) -> None:
    """Empty a folder, but for what `write_shards` goes on with or takes away itself, and the files of these names."""
    for path in folder.iterdir():
        if path.name in (PROGRESS_NAME, *kept) or (path.suffix == ".safetensors" and path.is_file()):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _counting(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    return (lambda count: progress(before + count, total)) if progress else (lambda count: None)


def _key(shards: Sequence[Shard], key: str) -> str:
    digest = hashlib.sha256(key.encode())
    for shard in shards:
        digest.update(f"\n{shard.file_name}\n".encode() + shard.header)
    return digest.hexdigest()


def _read_progress(folder: Path, key: str) -> dict[str, dict[str, Any]]:
    """The shards that were finished under this key, by file name."""
    try:
        held = json.loads((folder / PROGRESS_NAME).read_text(encoding="utf-8"))
        return dict(held["shards"]) if held["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _whole(shards: Sequence[Shard], folder: Path, done: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Names of the shards that were finished and have their size."""
    standing = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    names = {shard.file_name for shard in shards if standing.get(shard.file_name) == shard.num_bytes}
    return names & done.keys()


def _leftovers(folder: Path, kept: Collection[str]) -> list[Path]:
    """What an attempt with other shards left: a reader would find it first, or upload it."""
    patterns = (WEIGHTS_NAME, "model-*-of-*.safetensors", INDEX_NAME, ".model*.safetensors.partial")
    return [path for pattern in patterns for path in folder.glob(pattern) if path.name not in kept]


def _write_shard(weights: Weights, folder: Path, shard: Shard, tell: Callable[[int], None]) -> None:
    """Write beside its place, flush to the disk, rename. A kill leaves the neighbour, which the next attempt overwrites."""
    draft = folder / f".{shard.file_name}.partial"
    try:
        with draft.open("wb", buffering=0) as file:
            _write_all(file.write, shard.header)
            _write_pieces(file, (piece for name in shard.names for piece in weights.iter_row_chunks(name)), tell)
            if file.tell() != shard.num_bytes:
                raise ValueError(f"{shard.file_name} took {file.tell()} bytes, and {shard.num_bytes} were planned")
            os.fsync(file.fileno())
        draft.replace(folder / shard.file_name)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _flush_names(folder)


def _write_pieces(file: FileIO, pieces: Iterable[Tensor], tell: Callable[[int], None]) -> None:
    """Write each piece while the next one is computed."""
    with ThreadPoolExecutor(1) as pool:
        disk_errors: Future[None] | None = None
        for piece in pieces:
            if disk_errors is not None:
                disk_errors.result()
                tell(file.tell())
            disk_errors = pool.submit(_write_all, file.write, _bytes_of(piece))
        if disk_errors is not None:
            disk_errors.result()


def _write_all(write: Callable[[Any], int | None], data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[write(view) or 0 :]


def _bytes_of(piece: Tensor) -> Any:
    return cast(Any, piece.contiguous().view(-1).view(torch.uint8).numpy())


def _flush_names(folder: Path) -> None:
    """Flush a folder's list of names, where the system knows how: Windows does not, and keeps them safe by itself."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _index(info: Mapping[str, TensorInfo], shards: Sequence[Shard]) -> str:
    where = {name: shard.file_name for shard in shards for name in shard.names}
    total = sum(tensor.num_bytes for tensor in info.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"


@contextmanager
def locked(places: Iterable[Path]) -> Iterator[None]:
    """Hold places against other exports of this user; the system lets go of them when the process is killed.

    The locks lie elsewhere, since a place is renamed, and shipped.

    Raises:
        ExportError: another export holds one of them.
    """
    folder = _lock_folder()
    with ExitStack() as held:
        for place in places:
            name = hashlib.sha256(os.path.normcase(place).encode()).hexdigest()[:32]
            with disk_errors(folder):
                try:
                    held.enter_context(FileLock(folder / f"{name}.lock", timeout=0))
                except Timeout as error:
                    hint = "Wait for it, or give --out another folder."
                    raise ExportError(f"Another export is writing {place}.", hint) from error
        yield


def _lock_folder() -> Path:
    """Of this user, or where nothing can be kept there the system's for what is temporary."""
    folder = user_state_dir() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir())
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
