"""Checksums of a base's tensors as a run holds them, so that an export can tell whether it works on the same ones.

Double quantization takes the mean of all absmax off as its offset. torch sums it in another order with another number of threads:
1 and 2 threads gave other last bits for Phi-3's larger layers (torch 2.13 on CPU). The codes do not depend on it. So codes have a
checksum of their own, and the mean is kept: with it the rest comes out the same again on any number of threads. Mean and some of
the codes also tell other weights from the same ones quantized on other hardware.

A 4-bit base on the disk, in bitsandbytes' own form, so that an export can take the very bits a run was trained on.

4-bit weights made again from a base's files, a chunk at a time: to the bit what loading through transformers gives.

transformers casts a weight to the model's dtype and hands it to bitsandbytes, which rounds blocks of 64 to 4-bit codes and their
largest values (absmax), less their mean over the whole tensor, to 8 bit in blocks of 256. Blocks do not know of each other, so
only absmax is kept until the end. bitsandbytes' CPU quantizer holds about 25 bytes a weight meanwhile: hence small chunks.
"""

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)
from bitsandbytes.utils import unpack_tensor_to_dict
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from qlora_phi3.errors import ModelError, RunError, disk_error_hint
from qlora_phi3.model.weights import StoredWeights, TensorInfo, Weights, read_tensor, rows_per_piece

#: Bytes brought from a card at once.
_PIECE_BYTES = 16 * 2**20


#: Bytes of two codes each that are kept as they are, of a 4-bit tensor.
SAMPLED_BYTES = 1024


#: 2^32 / the golden ratio: its multiples, modulo 2^32, lie evenly, and in step with no row length.
_GOLDEN = 2_654_435_769


def tensor_checksum(parameter: Tensor) -> str:
    """SHA-256, in hex, of a parameter's bytes.

    Args:
        parameter: any shape and device; of a 4-bit one (it carries a `quant_state`) the packed codes, then absmax, then, where
            it is quantized itself, its own absmax and offset are read.
    """
    return str(tensor_record(parameter)["sha256"])


def tensor_record(parameter: Tensor) -> dict[str, Any]:
    """What a run notes down of a parameter: its kind and checksum; of a 4-bit one that of its codes too, and what tells it apart.

    Returns:
        {"kind": "plain", "sha256": hex} or
        {"kind": "4bit", "sha256": hex, "codes": hex, "mean_absmax": float, "sampled_codes": hex}.
    """
    state = getattr(parameter, "quant_state", None)
    return (
        {"kind": "plain", "sha256": checksum_of([parameter])} if state is None else quantized_record(parameter, state)
    )


def sample_codes(packed: Tensor) -> bytes:
    """`SAMPLED_BYTES` of a tensor's packed codes, spread over it; all of one that has fewer."""
    flat = packed.detach().view(-1)
    places = [(number * _GOLDEN % 2**32) * len(flat) >> 32 for number in range(SAMPLED_BYTES)]
    chosen = flat if len(flat) <= SAMPLED_BYTES else flat[torch.tensor(places, device=flat.device)]
    return bytes(chosen.cpu().numpy())


def quantized_record(packed: Tensor, state: Any) -> dict[str, Any]:
    """`tensor_record` of a 4-bit tensor given as its packed codes, (n / 2, 1), and its bitsandbytes `QuantState`."""
    digest = add_bytes(hashlib.sha256(), packed)
    codes = digest.hexdigest()
    for tensor in (state.absmax, *((state.state2.absmax, state.offset) if state.nested else ())):
        add_bytes(digest, tensor)
    mean = float(state.offset if state.nested else state.absmax.mean())  # of fp32, which JSON keeps to the last bit
    return {
        "kind": "4bit",
        "sha256": digest.hexdigest(),
        "codes": codes,
        "mean_absmax": mean,
        "sampled_codes": sample_codes(packed).hex(),
    }


def checksum_of(pieces: Iterable[Tensor]) -> str:
    """The checksum of tensors one after the other; of all pieces of a plain tensor it is the tensor's own."""
    digest = hashlib.sha256()
    for piece in pieces:
        add_bytes(digest, piece)
    return digest.hexdigest()


def add_bytes(digest: Any, tensor: Tensor) -> Any:
    """Put a tensor's bytes, of any shape and device, into one of hashlib's digests; returns it."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for start in range(0, len(raw), _PIECE_BYTES):
        digest.update(memoryview(cast(Any, raw[start : start + _PIECE_BYTES].cpu().numpy())))
    return digest


#: A file's tensors are brought into memory at once when it is written.
_FILE_BYTES = 256 * 2**20


def save_quantized(model: nn.Module, folder: Path) -> None:
    """Write every 4-bit weight of a model, under the names of the base's checkpoint, into safetensors with an index.

    Each is stored as transformers stores it: `x.weight` (n / 2, 1) uint8, `x.weight.absmax`, `x.weight.quant_map`, with double
    quantization `x.weight.nested_absmax` and `x.weight.nested_quant_map`, and `x.weight.quant_state.bitsandbytes__nf4`.

    Args:
        model: the base, with or without an adapter.
        folder: whole afterwards, or as it was before.

    Raises:
        RunError: the disk is full or refuses.
    """
    draft = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_torch_state_dict(_stored(model), draft, max_shard_size=_FILE_BYTES)
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise RunError(f"The 4-bit base cannot be kept in {folder}: {error}.", f"{disk_error_hint(error)}.") from error


def _stored(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, weight in quantized_weights(model).items():
        tensors[name] = weight.data
        for part, tensor in weight.quant_state.as_dict(packed=True).items():
            # What layers share (quant_map) would be stored for the first of them only.
            tensors[f"{name}.{part}"] = tensor.clone() if part.endswith("quant_map") else tensor
    return tensors


def quantized_weights(model: nn.Module) -> dict[str, Any]:
    """Every `Params4bit` of a base, with or without an adapter, under its name in the base's checkpoint."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in base.named_parameters()
        if isinstance(parameter, bnb.nn.Params4bit)
    }


#: Weights in a 4-bit block, and first-level absmax in a block of double quantization: bitsandbytes' defaults, the recipe's too.
BLOCK, NESTED_BLOCK = 64, 256


#: Weights quantized at once on a CPU: what they need stays in the processor's cache.
CHUNK_WEIGHTS = 2**16


#: The same on a card.
CARD_CHUNK_WEIGHTS = 2**24


#: Does one piece of work on each chunk, and comes back when all are done.
RunAll = Callable[[Callable[[tuple[int, Tensor]], None], Iterable[tuple[int, Tensor]]], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a base was brought to 4 bit."""

    quant_type: str
    double_quant: bool


@dataclass(frozen=True, slots=True)
class Quantized:
    """A 4-bit tensor: packed codes, (n / 2, 1) uint8, and bitsandbytes' `QuantState`, both on one device.

    `mean_absmax` is what the offset of double quantization would be, whatever it was told to be.
    """

    packed: Tensor
    state: Any
    mean_absmax: float


def quantize(
    weights: Weights,
    name: str,
    *,
    dtype: torch.dtype,
    scheme: Scheme,
    device: torch.device,
    offset: float | None = None,
) -> Quantized:
    """Quantize a tensor as loading it does.

    Args:
        dtype: the dtype the run loaded the base in; weights are cast to it first.
        offset: the mean of absmax as the run noted it (`checksum.tensor_record`); without it the mean is taken here, and
            its last bits depend on the number of threads.

    Returns:
        The quantized tensor on `device`.
    """
    info = weights.info[name]
    num_weights = info.num_bytes // info.dtype.itemsize
    packed = torch.empty((num_weights + 1) // 2, 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-num_weights // BLOCK), dtype=torch.float32, device=device)

    def quantize_chunk(chunk: tuple[int, Tensor]) -> None:
        start, values = chunk
        codes, state = quantize_4bit(values, quant_type=scheme.quant_type, blocksize=BLOCK)
        packed[start // 2 : start // 2 + len(codes)] = codes
        absmax[start // BLOCK : start // BLOCK + len(state.absmax)] = state.absmax

    with _one_thread_each(device) as run_all:
        done = 0
        for piece in weights.iter_row_chunks(name):
            flat = piece.to(device=device, dtype=dtype).view(-1)
            run_all(quantize_chunk, _chunks(flat, done))
            done += len(flat)
    state = QuantState(
        absmax=absmax,
        shape=torch.Size(info.shape),
        dtype=dtype,
        blocksize=BLOCK,
        code=get_4bit_type(scheme.quant_type, device=device),
        quant_type=scheme.quant_type,
    )
    mean = absmax.mean()
    offset = float(mean) if offset is None else offset
    return Quantized(packed, _nested(state, offset) if scheme.double_quant else state, float(mean))


def _chunks(flat: Tensor, before: int) -> Iterator[tuple[int, Tensor]]:
    """Parts of a piece, each with the number of weights of the tensor before it."""
    step = CHUNK_WEIGHTS if flat.device.type == "cpu" else CARD_CHUNK_WEIGHTS
    for start in range(0, len(flat), step):
        yield before + start, flat[start : start + step]


@contextmanager
def _one_thread_each(device: torch.device) -> Iterator[RunAll]:
    """Work on as many chunks at once as torch may use threads, each chunk in one thread.

    With its own threads torch meets after each of the dozen operations on a chunk; on a processor that others use too, two
    threads were so three to ten times slower than one (torch 2.13).
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        yield lambda work, chunks: deque(map(work, chunks), maxlen=0)
        return
    torch.set_num_threads(1)  # also what new threads begin with
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield lambda work, chunks: deque(pool.map(work, chunks), maxlen=0)
    finally:
        torch.set_num_threads(threads)


def _nested(state: Any, offset: float) -> Any:
    """The state with absmax quantized itself, as `quantize_4bit(compress_statistics=True)` does it."""
    mean = torch.tensor(offset, dtype=torch.float32, device=state.absmax.device)
    absmax, state2 = quantize_blockwise(state.absmax - mean, blocksize=NESTED_BLOCK)
    return QuantState(
        absmax=absmax,
        shape=state.shape,
        dtype=state.dtype,
        blocksize=state.blocksize,
        code=state.code,
        quant_type=state.quant_type,
        offset=mean,
        state2=state2,
    )


def dequantize(quantized: Quantized) -> Iterator[Tensor]:
    """The rows of a 4-bit tensor as the model computes with them, in the pieces that `Weights.pieces` promises.

    Yields:
        (rows, columns) in the state's dtype, on the quantized tensor's device.
    """
    state = quantized.state
    absmax = _absmax(state)
    rows, columns = state.shape
    step = rows_per_piece(TensorInfo((rows, columns), state.dtype))
    for row in range(0, rows, step):
        first, last = row * columns, min(rows, row + step) * columns
        part = QuantState(
            absmax=absmax[first // state.blocksize : -(-last // state.blocksize)],
            shape=torch.Size((min(rows, row + step) - row, columns)),
            dtype=state.dtype,
            blocksize=state.blocksize,
            code=state.code,
            quant_type=state.quant_type,
        )
        yield dequantize_4bit(quantized.packed[first // 2 : (last + 1) // 2], part)


def _absmax(state: Any) -> Tensor:
    """First-level absmax, (n / 64,) fp32."""
    if not state.nested:
        return state.absmax.float()  # type: ignore[no-any-return]
    return dequantize_blockwise(state.absmax, state.state2) + state.offset  # type: ignore[no-any-return]


def read_quantized(stored: StoredWeights, name: str, device: torch.device) -> Quantized:
    """A 4-bit tensor that bitsandbytes or `save_quantized` wrote.

    Raises:
        ModelError: a part of it is missing.
    """
    parts = {key: read_tensor(stored, key) for key in stored.info if key.startswith(f"{name}.")}
    try:
        state = QuantState.from_dict({key.removeprefix(f"{name}."): part for key, part in parts.items()}, device=device)
        mean = float(state.offset if state.nested else state.absmax.mean())
        return Quantized(read_tensor(stored, name).to(device), state, mean)
    except (KeyError, ValueError, AssertionError) as error:
        raise ModelError(
            f"{name} is not stored whole in 4 bit: {error!r}.", "Use the base's 16-bit weights."
        ) from error


def is_stored_quantized(stored: StoredWeights, name: str) -> bool:
    """Whether a file holds a tensor in 4 bit."""
    return f"{name}.quant_map" in stored.info


def logical_info(stored: StoredWeights) -> dict[str, TensorInfo]:
    """The tensors of files as the model knows them: 4-bit ones with their own shape and the dtype they stand for."""
    packed = [name for name in stored.info if is_stored_quantized(stored, name)]
    parts = {key for name in packed for key in stored.info if key.startswith(f"{name}.")}
    return {key: info for key, info in stored.info.items() if key not in parts} | {
        name: _stored_state(stored, name) for name in packed
    }


def _stored_state(stored: StoredWeights, name: str) -> TensorInfo:
    key = next((key for key in stored.info if key.startswith(f"{name}.quant_state.bitsandbytes__")), None)
    try:
        state = unpack_tensor_to_dict(read_tensor(stored, str(key)))
        return TensorInfo(tuple(state["shape"]), getattr(torch, state["dtype"]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{name} is not stored whole in 4 bit: {error!r}.", "Use the base's 16-bit weights."
        ) from error


def count_different_codes(first: Quantized, second: Quantized) -> int:
    """How many 4-bit codes of two tensors of one shape differ; 0 where only their absmax does."""
    count, step = 0, CARD_CHUNK_WEIGHTS
    for start in range(0, len(first.packed), step):
        differing = first.packed[start : start + step].cpu() ^ second.packed[start : start + step].cpu()
        count += int(((differing & 0x0F) != 0).sum() + ((differing & 0xF0) != 0).sum())
    return count
