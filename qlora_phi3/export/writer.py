"""Write a checkpoint as its tensors are computed: safetensors files of a chosen size, each complete or absent, and their index.

safetensors' own writer needs all tensors of a file in memory. We write the header, which is known before, and then the bytes, a
chunk at a time. Also here: the staging directory of an export, and the locks against a second one.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, cast

import torch
from filelock import FileLock, Timeout
from huggingface_hub import split_state_dict_into_shards_factory

from qlora_phi3.errors import ExportError
from qlora_phi3.files import atomic_file, disk_errors, user_state_dir
from qlora_phi3.model.weights import DTYPES, INDEX_NAME, TensorInfo, Weights
from qlora_phi3.units import format_gib

#: For `disk_errors`.
DISK_HINT = "{cause}, and give the same command again; a complete proof is used again."
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file of the checkpoint: its tensors in the order of their bytes, and its size to the byte."""

    file_name: str
    names: tuple[str, ...]
    header: bytes
    num_bytes: int


def plan_shards(info: Mapping[str, TensorInfo], shard_bytes: int) -> tuple[Shard, ...]:
    """Distribute tensors over files as transformers does: `model.safetensors`, or `model-00001-of-0000N.safetensors` and so on,
    each with at most `shard_bytes` of tensors, or a single larger one.
    """
    split = split_state_dict_into_shards_factory(
        dict(info),
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    shards = []
    for file_name, names in split.filename_to_tensors.items():
        ordered = sorted(names, key=lambda name: -info[name].dtype.itemsize)  # so that every tensor is aligned to its dtype
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in ordered:
            start, end = end, end + info[name].num_bytes
            dtype, shape = DTYPE_NAMES[info[name].dtype], list(info[name].shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        full = len(text).to_bytes(8, "little") + text
        shards.append(Shard(file_name=file_name, names=tuple(ordered), header=full, num_bytes=len(full) + end))
    return tuple(shards)


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raise ExportError for what does not fit on the disk of a directory, or of the nearest one above that exists."""
    existing = next(path for path in [folder, *folder.resolve().parents] if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        needed = format_gib(needed_bytes)
        message = f"The export needs {needed} on the disk of {existing}, and {format_gib(free)} are free."
        raise ExportError(message, "Free disk space, or choose another --out.")


def write_shards(
    weights: Weights, folder: Path, shard_bytes: int, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write the files of `plan_shards` and, where there are several, their index. ExportError where the disk is full or refuses,
    or what `weights.iter_row_chunks` raises. `progress` is called after every chunk: bytes written, of all bytes.
    """
    shards, written = plan_shards(weights.info, shard_bytes), 0
    total = sum(shard.num_bytes for shard in shards)

    def report(new: int) -> None:
        progress(written + new, total)

    with disk_errors(folder, ExportError, hint=DISK_HINT):
        folder.mkdir(parents=True, exist_ok=True)
        for shard in shards:
            _write_shard(weights, folder, shard, report)
            written += shard.num_bytes
            report(0)
        if len(shards) > 1:
            size = sum(tensor.num_bytes for tensor in weights.info.values())
            names = dict(sorted((name, shard.file_name) for shard in shards for name in shard.names))
            index = json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=2) + "\n"
            with atomic_file(folder / INDEX_NAME) as staging:
                staging.write_text(index, encoding="utf-8", newline="\n")


def _write_shard(weights: Weights, folder: Path, shard: Shard, progress: Callable[[int], None]) -> None:
    """Write one file; each chunk is written while the next one is computed."""
    with atomic_file(folder / shard.file_name) as staging, staging.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        _write_all(file.write, shard.header)
        writing: Future[None] | None = None
        for name in shard.names:
            for chunk in weights.iter_row_chunks(name):
                if writing is not None:
                    writing.result()
                    progress(file.tell())
                data = cast(Any, chunk.contiguous().view(-1).view(torch.uint8).numpy())
                writing = pool.submit(_write_all, file.write, data)
        if writing is not None:
            writing.result()
        if file.tell() != shard.num_bytes:
            raise ValueError(f"{shard.file_name} took {file.tell()} bytes, and {shard.num_bytes} were planned")


def _write_all(write: Callable[[Any], int | None], data: Any) -> None:
    """Write every byte: an unbuffered file may take only a part."""
    view = memoryview(data)
    while view:
        view = view[write(view) or 0 :]


@contextmanager
def ensure_dir(folder: Path) -> Iterator[None]:
    """Create a directory, or raise ExportError, before any long work is done; it is removed again if it stays empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with disk_errors(folder, ExportError, hint=DISK_HINT):
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        yield
    finally:
        for path in new:
            with suppress(OSError):  # it holds something, or was renamed
                path.rmdir()


@contextmanager
def staging_dir(draft: Path, reusable: str) -> Iterator[None]:
    """Create the staging directory of an export. Of an attempt that ended or was killed, only the file `reusable` stays in it."""
    with ensure_dir(draft):
        with disk_errors(draft, ExportError, hint=DISK_HINT):
            _empty(draft, reusable)
        try:
            yield
        finally:
            with suppress(OSError):  # it was renamed
                _empty(draft, reusable)


def _empty(folder: Path, reusable: str) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)  # not `files.remove`: what cannot be removed must not be exported
        elif path.name != reusable:
            path.unlink()


@contextmanager
def locked(places: Iterable[Path]) -> Iterator[None]:
    """Lock directories against other exports of this user, or raise ExportError; a killed process releases its locks.

    The lock files are elsewhere, because a directory is renamed and uploaded.
    """
    folder = user_state_dir() / "locks"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        folder = Path(tempfile.gettempdir())
    with ExitStack() as held:
        for place in places:
            name = hashlib.sha256(os.path.normcase(place).encode()).hexdigest()[:32]
            with disk_errors(folder, ExportError, hint=DISK_HINT):
                try:
                    held.enter_context(FileLock(folder / f"{name}.lock", timeout=0))
                except Timeout as error:
                    message = f"Another export is writing {place}."
                    raise ExportError(message, "Wait for it, or give --out another folder.") from error
        yield
