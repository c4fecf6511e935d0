"""Tensors by name, a few rows at a time: what is on the disk, and whatever is computed from it.

Files are read, not mapped: mapped pages count as resident memory, and a file that is cut while it is mapped kills the process.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_phi3.errors import ModelError, UserError

#: Bytes of a piece, at most; see `rows_per_piece`.
PIECE_BYTES = 4 * 2**20


#: Rows of every piece but a tensor's last are a multiple of this, so that no block of 64 weights is ever cut.
ROW_MULTIPLE = 64


WEIGHTS_NAME = "model.safetensors"


INDEX_NAME = "model.safetensors.index.json"


#: safetensors' names of the element types.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and element type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


class Weights(Protocol):
    """Tensors that can be asked for piece by piece."""

    @property
    def info(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in the base's own names."""

    def iter_row_chunks(self, name: str) -> Iterator[Tensor]:
        """Consecutive rows of dim 0 on the CPU, about `PIECE_BYTES` each; their `cat` is the tensor.

        A piece belongs to the caller, who may change it. Every piece but the last has a multiple of `ROW_MULTIPLE` rows.
        """


def rows_per_piece(info: TensorInfo) -> int:
    """Rows of dim 0 in a piece: a multiple of `ROW_MULTIPLE` of at most `PIECE_BYTES`, where that is not none."""
    row_bytes = max(1, prod(info.shape[1:]) * info.dtype.itemsize)
    return max(1, PIECE_BYTES // row_bytes // ROW_MULTIPLE) * ROW_MULTIPLE


def read_tensor(weights: Weights, name: str) -> Tensor:
    """A whole tensor, on the CPU."""
    info = weights.info[name]
    whole = torch.empty(info.shape, dtype=info.dtype)
    if not info.shape:
        return next(weights.iter_row_chunks(name)).reshape(())
    row = 0
    for piece in weights.iter_row_chunks(name):
        whole[row : row + len(piece)] = piece
        row += len(piece)
    return whole


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where a tensor's bytes lie."""

    path: Path
    offset: int
    info: TensorInfo


class StoredWeights:
    """The tensors of safetensors files; nothing is held but where they lie."""

    def __init__(self, places: Mapping[str, TensorLocation]) -> None:
        self.places = places
        self.info: Mapping[str, TensorInfo] = {name: place.info for name, place in places.items()}

    def iter_row_chunks(self, name: str) -> Iterator[Tensor]:
        """As `Weights.pieces`; a tensor without dimensions comes as (1,).

        Raises:
            ModelError: the file became shorter since it was opened, or cannot be read.
        """
        place = self.places[name]
        shape = place.info.shape or (1,)
        step = rows_per_piece(place.info)
        try:
            with place.path.open("rb", buffering=0) as file:
                file.seek(place.offset)
                for row in range(0, shape[0], step):
                    piece = torch.empty((min(step, shape[0] - row), *shape[1:]), dtype=place.info.dtype)
                    _fill(file.readinto, piece)
                    yield piece
        except (OSError, EOFError) as error:
            raise ModelError(
                f"{place.path}: {name} cannot be read: {error}.",
                "Download the checkpoint again, whole, as safetensors.",
            ) from error


def _fill(readinto: Callable[[Any], int | None], piece: Tensor) -> None:
    view = memoryview(cast(Any, piece.view(-1).view(torch.uint8).numpy()))
    while view:
        count = readinto(view)
        if not count:
            raise EOFError(f"{len(view)} bytes are missing at the end of the file")
        view = view[count:]


def open_weights(folder: Path) -> StoredWeights:
    """The tensors of a model folder: `model.safetensors`, or the shards that its index names.

    Raises:
        ModelError: only pickles are there, a shard is missing or cut, or the index names a tensor that its shard has not.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return open_file(folder / WEIGHTS_NAME)
    index = folder / INDEX_NAME
    if not index.is_file():
        raise _no_weights(folder)
    shards: dict[str, Mapping[str, TensorLocation]] = {}
    places = {}
    for name, shard in sorted(_read_index(index).items()):
        if shard not in shards:
            shards[shard] = _open_shard(index, shard, name)
        if name not in shards[shard]:
            raise ModelError(
                f"{index} puts {name} into {shard}, which does not hold it.", "Download the checkpoint again, whole."
            )
        places[name] = shards[shard][name]
    return StoredWeights(places)


def open_file(path: Path, *, error: type[UserError] = ModelError) -> StoredWeights:
    """The tensors of one safetensors file.

    Raises:
        error: the file is missing, no safetensors, or cut; the message names the first tensor that is not whole.
    """
    return StoredWeights(_read_header(path, error))


def _read_index(path: Path) -> dict[str, str]:
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name): str(shard) for name, shard in named.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is no index of a checkpoint: {error!r}.", "Download the checkpoint again, whole."
        ) from error
    for name, shard in shards.items():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(
                f"{path} puts {name} into '{shard}', which is no safetensors file beside it.",
                "Use the checkpoint's safetensors; a pickle can run code when it is read.",
            )
    return shards


def _open_shard(index: Path, shard: str, name: str) -> Mapping[str, TensorLocation]:
    path = index.with_name(shard)
    if not path.is_file():
        raise ModelError(
            f"{path} is missing; it holds {name}, by {index.name}.", "Download the checkpoint again, whole."
        )
    return _read_header(path, ModelError)


def _no_weights(folder: Path) -> ModelError:
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        return ModelError(
            f"{folder} holds its weights only as a pickle ({pickles[0].name}), which can run code when it is read.",
            "Use the checkpoint as safetensors.",
        )
    return ModelError(
        f"{folder} holds no {WEIGHTS_NAME} and no {INDEX_NAME}.", "Give the folder of a whole checkpoint."
    )


def _read_header(path: Path, error: type[UserError]) -> dict[str, TensorLocation]:
    """Where each tensor of a safetensors file lies, by its header; the file's length is checked against it."""
    hint = "Fetch or write the file again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise error(f"{path} is cut short: {size} bytes, less than its header, or no safetensors file.", hint)
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            places = {str(name): _place(path, 8 + length, str(name), entry, error) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise error(f"{path} cannot be read as safetensors: {cause!r}.", hint) from cause
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
        if place.offset + place.info.num_bytes > size:
            raise error(f"{path} is cut short at {size} bytes: {name} is not whole.", hint)
    try:
        with safe_open(path, framework="pt"):  # the library's own checks: no gap, no overlap, nothing beyond the end
            pass
    except (SafetensorError, OSError) as cause:
        raise error(f"{path} cannot be read as safetensors: {cause}.", hint) from cause
    return places


def _place(path: Path, start: int, name: str, entry: dict[str, Any], error: type[UserError]) -> TensorLocation:
    if entry["dtype"] not in DTYPES:
        known = ", ".join(DTYPES)
        raise error(f"{path}: {name} is stored as {entry['dtype']}; known are {known}.", "Use a checkpoint of those.")
    info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
    return TensorLocation(path, start + int(entry["data_offsets"][0]), info)


def split_rows(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in the pieces that `Weights.pieces` promises; views, not copies."""
    step = rows_per_piece(TensorInfo(tuple(tensor.shape), tensor.dtype))
    for row in range(0, len(tensor), step):
        yield tensor[row : row + step]
