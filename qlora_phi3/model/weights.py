"""Tensors by name, read in row chunks, from safetensors files or from whatever computes them (the `Weights` protocol).

Files are read, not mapped: mapped pages count as resident memory, and truncating a mapped file kills the process.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from qlora_phi3.errors import ModelError, UserError, first_line
from qlora_phi3.files import check_no_pointer, is_dir, read_json_object
from qlora_phi3.reporter import Progress
from qlora_phi3.units import MIB

#: Bytes of a row chunk, at most; see `rows_per_chunk`.
ROW_CHUNK_BYTES = 4 * 2**20
#: Every row chunk but a tensor's last has a multiple of this many rows, so that no 4-bit block of 64 weights is split.
ROW_MULTIPLE = 64
WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
#: safetensors' names of the element types.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DOWNLOAD_AGAIN = "Download the checkpoint again, complete, as safetensors."


def download_weights(name: str, revision: str | None, progress: Progress) -> Path:
    """The directory of a model's weights. Those of a hub model are downloaded where they are not here; huggingface_hub continues
    what was interrupted. It raises its own errors.

    Args:
        progress: called with the MiB that are done.
    """
    if is_dir(name):
        return Path(name)
    activity, done = f"Downloading {name} (MiB)", [0]

    class Bar(tqdm):  # type: ignore[misc]
        """huggingface_hub's bars of bytes, one for what comes and one for what is written."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            self._counts_bytes = options.get("unit") == "B"

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts_bytes and self.total and self.n // MIB > done[0]:
                done[0] = int(self.n // MIB)
                progress(activity, done[0], max(done[0] + 1, int(self.total // MIB)))

    folder = snapshot_download(name, revision=revision, allow_patterns=["model*.safetensors", INDEX_NAME], tqdm_class=Bar)
    if done[0]:
        progress(activity, done[0], done[0])
    return Path(folder)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and element type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the complete tensor."""
        return prod(self.shape) * self.dtype.itemsize


class Weights(Protocol):
    """Tensors that can be read in row chunks."""

    @property
    def info(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, by the base's own names."""

    def iter_row_chunks(self, name: str) -> Iterator[Tensor]:
        """Yield consecutive rows of dim 0, (rows, ...) each in the tensor's dtype; their `cat` is the tensor.

        A chunk is at most about `ROW_CHUNK_BYTES`, and belongs to the caller, who may change it. Every chunk but the last has a
        multiple of `ROW_MULTIPLE` rows.
        """


@dataclass(frozen=True, slots=True)
class ComputedWeights:
    """Tensors that a function computes as they are read; a `Weights`."""

    info: Mapping[str, TensorInfo]
    iter_row_chunks: Callable[[str], Iterator[Tensor]]


def rows_per_chunk(info: TensorInfo) -> int:
    """Rows of a row chunk: the largest multiple of `ROW_MULTIPLE` within `ROW_CHUNK_BYTES`, at least `ROW_MULTIPLE`."""
    row_bytes = max(1, prod(info.shape[1:]) * info.dtype.itemsize)
    return max(1, ROW_CHUNK_BYTES // row_bytes // ROW_MULTIPLE) * ROW_MULTIPLE


def split_rows(tensor: Tensor) -> Iterator[Tensor]:
    """Split a tensor, (rows, ...) of any dtype, into row chunks as `Weights.iter_row_chunks` promises them; views, not copies."""
    step = rows_per_chunk(TensorInfo(tuple(tensor.shape), tensor.dtype))
    for row in range(0, len(tensor), step):
        yield tensor[row : row + step]


def read_tensor(weights: Weights, name: str) -> Tensor:
    """Read a complete tensor into host memory, in its own shape and dtype."""
    info = weights.info[name]
    if not info.shape:
        return next(weights.iter_row_chunks(name)).reshape(())
    tensor, row = torch.empty(info.shape, dtype=info.dtype), 0
    for chunk in weights.iter_row_chunks(name):
        tensor[row : row + len(chunk)] = chunk
        row += len(chunk)
    return tensor


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where the bytes of a tensor are."""

    path: Path
    offset: int
    info: TensorInfo


class StoredWeights:
    """The tensors of safetensors files; only their locations are in memory."""

    def __init__(self, locations: Mapping[str, TensorLocation]) -> None:
        self.locations = locations
        self.info: Mapping[str, TensorInfo] = {name: location.info for name, location in locations.items()}

    def iter_row_chunks(self, name: str) -> Iterator[Tensor]:
        """As `Weights.iter_row_chunks`, on the CPU; a tensor without dimensions is yielded as (1,). ModelError where the file
        became shorter since it was opened, or cannot be read.
        """
        location = self.locations[name]
        shape = location.info.shape or (1,)
        step = rows_per_chunk(location.info)
        try:
            with location.path.open("rb") as file:
                file.seek(location.offset)
                for row in range(0, shape[0], step):
                    chunk = torch.empty((min(step, shape[0] - row), *shape[1:]), dtype=location.info.dtype)
                    data = memoryview(cast(Any, chunk.view(-1).view(torch.uint8).numpy()))
                    if missing := len(data) - file.readinto(data):
                        raise EOFError(f"{missing} bytes are missing at the end of the file")
                    yield chunk
        except (OSError, EOFError) as error:
            raise ModelError(f"{location.path}: {name} cannot be read: {error}.", _DOWNLOAD_AGAIN) from error


def open_weights(folder: Path) -> StoredWeights:
    """Open the tensors of a model folder: `model.safetensors`, or the shards that its index names. ModelError where there are
    only pickles, a shard is missing or truncated, or lacks a tensor that the index names.
    """
    weights, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if weights.is_file():
        return open_file(weights)
    if not index.is_file():
        refuse_pickles(folder)
        hint = "Give the folder of a complete checkpoint."
        raise ModelError(f"{folder} holds no {WEIGHTS_NAME} and no {INDEX_NAME}.", hint)
    shards: dict[str, StoredWeights] = {}
    locations = {}
    for name, shard in sorted(_read_index(index).items()):
        path = index.with_name(shard)
        if not path.is_file():
            raise ModelError(f"{path} is missing; {index.name} says that it holds {name}.", _DOWNLOAD_AGAIN)
        if shard not in shards:
            shards[shard] = open_file(path)
        if name not in shards[shard].info:
            raise ModelError(f"{index} says that {shard} holds {name}, which it does not.", _DOWNLOAD_AGAIN)
        locations[name] = shards[shard].locations[name]
    return StoredWeights(locations)


def refuse_pickles(folder: Path) -> None:
    """Raise a ModelError if a folder holds weights as pickles, and none as safetensors."""
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    if pickles and not any(folder.glob("*.safetensors")):
        message = f"{folder} holds its weights only as a pickle ({pickles[0]}), which can run code when it is read."
        raise ModelError(message, "Use the checkpoint as safetensors.")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file name; an index may name only safetensors files in its own folder."""
    try:
        weight_map = read_json_object(path, ModelError, _DOWNLOAD_AGAIN)["weight_map"]
        shards = {str(name): str(shard) for name, shard in weight_map.items()}
    except (KeyError, AttributeError) as error:
        raise ModelError(f"{path} is not the index of a checkpoint: {first_line(error)}.", _DOWNLOAD_AGAIN) from error
    hint = "Use the checkpoint's safetensors; a pickle can run code when it is read."
    for name, shard in shards.items():
        if Path(shard).name != shard or len(shard) > 200 or not shard.isprintable() or not shard.endswith(".safetensors"):
            raise ModelError(f"{path}: '{shard}', for {name}, is not a safetensors file in the same folder.", hint)
    return shards


def open_file(path: Path, *, error: type[UserError] = ModelError) -> StoredWeights:
    """Open the tensors of one safetensors file, of which only the header is read; `error` where it is missing, truncated or not
    safetensors, or has an element type that is not in DTYPES.
    """
    hint = "Download or write the file again."
    try:
        check_no_pointer(path, error)
        with safe_open(path, framework="pt"):  # checks the header, and that its tensors cover the file without gaps
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as cause:
        size = f" ({path.stat().st_size:,} bytes)" if path.is_file() else ""
        raise error(f"{path}{size} is no complete safetensors file: {cause}.", hint) from cause
    header.pop("__metadata__", None)
    locations = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise error(f"{path}: {name} has dtype {entry['dtype']}.", f"Use a checkpoint of {', '.join(DTYPES)}.")
        info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
        locations[name] = TensorLocation(path, 8 + length + entry["data_offsets"][0], info)
    return StoredWeights(locations)
