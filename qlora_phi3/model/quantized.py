"""Everything that knows bitsandbytes' 4-bit storage: loading it, its checksums, its files, and quantizing again bit for bit.

A 4-bit weight consists of codes, two in a byte, and of the largest absolute value (absmax) of each block of 64 weights. With
double quantization the absmax of a tensor, minus their mean (the offset), are stored in 8 bit in blocks of 256. The last bits of
that mean depend on the number of threads (torch 2.13 on CPU, Phi-3's larger layers); the codes do not. A run therefore records a
checksum of the codes, and the mean: with it `quantize` gives the same bits on any number of threads.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from qlora_phi3.errors import ModelError, first_line
from qlora_phi3.files import atomic_dir, disk_errors
from qlora_phi3.model.weights import StoredWeights, TensorInfo, Weights, read_tensor, rows_per_chunk
from qlora_phi3.recipe.schema import Quantization

#: Weights in a 4-bit block, and absmax in a block of double quantization: bitsandbytes' defaults, which the recipe uses.
BLOCK, NESTED_BLOCK = 64, 256
#: Weights quantized at once. On a CPU bitsandbytes' quantizer takes about 25 bytes a weight, and this many stay in the
#: processor's cache.
CHUNK_WEIGHTS, GPU_CHUNK_WEIGHTS = 2**16, 2**24
#: Packed bytes of a 4-bit tensor that a run records, two codes each.
SAMPLED_BYTES = 1024
#: 2^32 / the golden ratio: its multiples modulo 2^32 are evenly spread, and in step with no row length.
_GOLDEN = 2_654_435_769
#: Bytes copied from the GPU at once for a checksum; and the size of a file of a saved 4-bit base, whose tensors are in host
#: memory at once while it is written.
_COPY_BYTES, _FILE_BYTES = 16 * 2**20, 256 * 2**20


def quantization_config(config: Quantization, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Translate the recipe's [quantization] for transformers; None if the base stays in 16 or 32 bit."""
    if not config.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def disable_cpu_repacking(model: nn.Module) -> None:
    """Stop bitsandbytes 0.50 from repacking 4-bit weights in place at the first evaluation on CPUs with AVX512-BF16.

    bitsandbytes never undoes it, and training afterwards is silently wrong: the first layer's gradient norm fell to 15 %. Remove
    this when bitsandbytes restores the weights in `train()`.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantized_weights(model: nn.Module) -> dict[str, Any]:
    """Every `Params4bit` of a base, with or without an adapter, under its name in the base's checkpoint."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in base.named_parameters()
        if isinstance(parameter, bnb.nn.Params4bit)
    }


def tensor_record(parameter: Tensor) -> dict[str, Any]:
    """Compute what a run records about a parameter of any shape, dtype and device.

    Returns {"kind": "plain", "sha256": hex} or, for a 4-bit parameter (it has a `quant_state`), the result of `quantized_record`.
    """
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return quantized_record(parameter, state)
    return {"kind": "plain", "sha256": checksum_of([parameter])}


def quantized_record(packed: Tensor, state: Any) -> dict[str, Any]:
    """Compute what a run records about a 4-bit tensor.

    Args:
        packed: the codes, (n / 2, 1) uint8.
        state: its bitsandbytes `QuantState`.

    Returns:
        {"kind": "4bit", "sha256": hex, "codes": hex, "mean_absmax": float, "sampled_codes": hex}. `sha256` covers the codes,
        absmax, and with double quantization absmax's own absmax and the offset; `codes` the codes alone.
    """
    digest = add_bytes(hashlib.sha256(), packed)
    codes = digest.hexdigest()
    for tensor in (state.absmax, *((state.state2.absmax, state.offset) if state.nested else ())):
        add_bytes(digest, tensor)
    return {
        "kind": "4bit",
        "sha256": digest.hexdigest(),
        "codes": codes,
        # A float made from fp32, which JSON represents exactly.
        "mean_absmax": float(state.offset if state.nested else state.absmax.mean()),
        "sampled_codes": sample_codes(packed).hex(),
    }


def sample_codes(packed: Tensor) -> bytes:
    """Read `SAMPLED_BYTES` of a tensor's packed codes, (n / 2, 1) uint8, evenly spread; all of them if it has fewer."""
    flat = packed.detach().view(-1)
    if len(flat) > SAMPLED_BYTES:
        places = [(number * _GOLDEN % 2**32) * len(flat) >> 32 for number in range(SAMPLED_BYTES)]
        flat = flat[torch.tensor(places, device=flat.device)]
    return bytes(flat.cpu().numpy())


def hash_rows(rows: Iterable[Tensor], report: Callable[[str], None], *, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """Pass the row chunks of a tensor on, of any shape, dtype and device, and at the end report its SHA-256 in hex; with `dtype`
    that of the tensor in this dtype.
    """
    digest = hashlib.sha256()
    for chunk in rows:
        add_bytes(digest, chunk if dtype is None else chunk.to(dtype))
        yield chunk
    report(digest.hexdigest())


def checksum_of(chunks: Iterable[Tensor]) -> str:
    """SHA-256, in hex, of consecutive tensors of any shape, dtype and device. The row chunks of a tensor give its own."""
    digest = hashlib.sha256()
    for chunk in chunks:
        add_bytes(digest, chunk)
    return digest.hexdigest()


def add_bytes(digest: Any, tensor: Tensor) -> Any:
    """Add a tensor's bytes, of any shape, dtype and device, to a hashlib digest, and return the digest."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for start in range(0, len(raw), _COPY_BYTES):
        digest.update(memoryview(cast(Any, raw[start : start + _COPY_BYTES].cpu().numpy())))
    return digest


def save_quantized(model: nn.Module, folder: Path) -> None:
    """Write every 4-bit weight of a model into safetensors files with an index, completely or not at all. RunError where the disk
    is full or refuses; `folder` is then as it was before.

    The format and the names are those of a checkpoint of transformers: `x.weight` (n / 2, 1) uint8, `x.weight.absmax`,
    `x.weight.quant_map`, with double quantization `x.weight.nested_absmax` and `x.weight.nested_quant_map`, and
    `x.weight.quant_state.bitsandbytes__nf4`.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in quantized_weights(model).items():
        tensors[name] = weight.data
        for part, tensor in weight.quant_state.as_dict(packed=True).items():
            # All layers share one quant_map tensor, and safetensors would store a shared tensor under one name only.
            tensors[f"{name}.{part}"] = tensor.clone() if part.endswith("quant_map") else tensor
    hint = "{cause}, or set [model] save_quantized = false."
    with disk_errors(folder, hint=hint), atomic_dir(folder) as staging:
        save_torch_state_dict(tensors, staging, max_shard_size=_FILE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """The kind of 4-bit quantization of a base."""

    quant_type: str
    double_quant: bool


@dataclass(frozen=True, slots=True)
class Quantized:
    """A 4-bit tensor."""

    packed: Tensor  #: The codes, (n / 2, 1) uint8.
    state: Any  #: bitsandbytes' `QuantState`, on the same device.
    mean_absmax: float  #: The mean of absmax in fp32, also if `state` was built with another offset.


def is_stored_quantized(stored: StoredWeights, name: str) -> bool:
    """Whether the files hold this tensor in 4 bit."""
    return f"{name}.quant_map" in stored.info


def stored_scheme(stored: StoredWeights) -> Scheme | None:
    """The quantization of the files' own 4-bit tensors, whatever a recipe says of it; None where they hold none."""
    mark = ".quant_state.bitsandbytes__"
    packed = next((name for name in sorted(stored.info) if mark in name), None)
    if packed is None:
        return None
    name, _, quant_type = packed.partition(mark)
    return Scheme(quant_type=quant_type, double_quant=f"{name}.nested_absmax" in stored.info)


def read_quantized(stored: StoredWeights, name: str, device: torch.device) -> Quantized:
    """Read a 4-bit tensor that bitsandbytes or `save_quantized` wrote; ModelError where a part of it is missing."""
    prefix = f"{name}."
    parts = {key.removeprefix(prefix): read_tensor(stored, key) for key in stored.info if key.startswith(prefix)}
    try:
        state = QuantState.from_dict(parts, device=device)
        mean = float(state.offset if state.nested else state.absmax.mean())
        return Quantized(read_tensor(stored, name).to(device), state, mean)
    except (KeyError, ValueError, AssertionError) as error:
        raise ModelError(f"The 4-bit tensor {name} is incomplete: {first_line(error)}.", "Use 16-bit weights.") from error


def logical_info(stored: StoredWeights) -> dict[str, TensorInfo]:
    """The tensors of files as the model has them: 4-bit ones with the shape and the dtype that they dequantize to. ModelError
    where a part of one is missing.
    """
    packed = [name for name in stored.info if is_stored_quantized(stored, name)]
    parts = {key for name in packed for key in stored.info if key.startswith(f"{name}.")}
    info = {key: info for key, info in stored.info.items() if key not in parts}
    for name in packed:
        state = read_quant_state(stored, name)
        info[name] = TensorInfo(tuple(state["shape"]), getattr(torch, state["dtype"]))
    return info


def read_quant_state(stored: StoredWeights, name: str) -> dict[str, Any]:
    """What the files say about a 4-bit tensor: shape, dtype, quant_type, blocksize, with double quantization nested_blocksize.
    ModelError where that is missing or damaged.
    """
    prefix = f"{name}.quant_state.bitsandbytes__"  # a JSON object in UTF-8, as uint8
    try:
        key = next(key for key in stored.info if key.startswith(prefix))
        state = json.loads(bytes(cast(Any, read_tensor(stored, key).numpy())))
        is_known = isinstance(getattr(torch, state["dtype"]), torch.dtype) and state["quant_type"] in ("nf4", "fp4")
        if not is_known or not all(type(size) is int and size > 0 for size in (*state["shape"], state["blocksize"])):
            raise ValueError(state)
        return dict(state)
    except (StopIteration, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"The 4-bit tensor {name} is incomplete: {first_line(error)}.", "Use 16-bit weights.") from error


def quantize(
    weights: Weights, name: str, *, dtype: torch.dtype, scheme: Scheme, device: torch.device, offset: float | None = None
) -> Quantized:
    """Quantize a tensor to the same bits as loading it through transformers, a chunk at a time.

    transformers casts a weight to the model's dtype and passes it to bitsandbytes. Blocks are independent, so only absmax needs
    the complete tensor.

    Args:
        dtype: the dtype in which the run loaded the base; weights are cast to it first.
        offset: the mean of absmax as the run recorded it (`tensor_record`). Without it the mean is computed here, and its last
            bits depend on the number of threads.
    """
    info = weights.info[name]
    num_weights = info.num_bytes // info.dtype.itemsize
    packed = torch.empty((num_weights + 1) // 2, 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-num_weights // BLOCK), dtype=torch.float32, device=device)
    step = CHUNK_WEIGHTS if device.type == "cpu" else GPU_CHUNK_WEIGHTS

    def quantize_chunk(chunk: tuple[int, Tensor]) -> None:
        start, values = chunk
        codes, state = functional.quantize_4bit(values, quant_type=scheme.quant_type, blocksize=BLOCK)
        packed[start // 2 : start // 2 + len(codes)] = codes
        absmax[start // BLOCK : start // BLOCK + len(state.absmax)] = state.absmax

    with _one_thread_each(device) as run_all:
        done = 0
        for rows in weights.iter_row_chunks(name):
            flat = rows.to(device=device, dtype=dtype).view(-1)
            chunks = ((done + at, flat[at : at + step]) for at in range(0, len(flat), step))
            deque(run_all(quantize_chunk, chunks), maxlen=0)
            done += len(flat)
    mean = float(absmax.mean())
    nested: dict[str, Any] = {}
    if scheme.double_quant:  # as `quantize_4bit(compress_statistics=True)` does it
        shift = torch.tensor(mean if offset is None else offset, dtype=torch.float32, device=device)
        absmax, state2 = functional.quantize_blockwise(absmax - shift, blocksize=NESTED_BLOCK)
        nested = {"offset": shift, "state2": state2}
    code, shape = functional.get_4bit_type(scheme.quant_type, device=device), torch.Size(info.shape)
    return Quantized(packed, QuantState(absmax, shape, code, BLOCK, scheme.quant_type, dtype, **nested), mean)


@contextmanager
def _one_thread_each(device: torch.device) -> Iterator[Callable[..., Iterable[None]]]:
    """Yield a `map` that processes as many chunks at once as torch may use threads, each chunk in one thread.

    torch's own threads synchronize after each of the dozen operations on a chunk. On a processor that others use too, two threads
    were so three to ten times slower than one (torch 2.13).
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        yield map
        return
    torch.set_num_threads(1)  # new threads inherit it
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


def dequantize(quantized: Quantized) -> Iterator[Tensor]:
    """Dequantize a 4-bit tensor in row chunks (rows, columns) as `Weights.iter_row_chunks` promises them, in the state's dtype,
    on the quantized tensor's device.
    """
    state = quantized.state
    absmax = state.absmax.float()
    if state.nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    rows, columns = state.shape
    step = rows_per_chunk(TensorInfo((rows, columns), state.dtype))
    for row in range(0, rows, step):
        end = min(rows, row + step)
        first, last = row * columns, end * columns
        blocks, shape = slice(first // state.blocksize, -(-last // state.blocksize)), torch.Size((end - row, columns))
        part = QuantState(absmax[blocks], shape, state.code, state.blocksize, state.quant_type, state.dtype)
        yield functional.dequantize_4bit(quantized.packed[first // 2 : (last + 1) // 2], part)


def count_different_codes(first: Quantized, second: Quantized) -> int:
    """Count the 4-bit codes that differ between two tensors of one shape; 0 if only their absmax differ."""
    count = 0
    for one, other in zip(*(torch.split(each.packed, GPU_CHUNK_WEIGHTS) for each in (first, second)), strict=True):
        differing = one.cpu() ^ other.cpu()
        count += int(((differing & 0x0F) != 0).sum() + ((differing & 0xF0) != 0).sum())
    return count
