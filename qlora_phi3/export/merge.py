"""The tensors of the merged model, and the models that a proof compares.

A merge adds the adapter's update to a weight in fp32, a few rows at a time, and casts once. Onto "nf4" the weight is the one that
was trained on: quantized to 4 bit (NF4 or FP4) and dequantized. Onto "original" it is the one in the base's file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_phi3.adapters.adapter_deltas import EMBEDDING, HEAD, AdapterDeltas
from qlora_phi3.adapters.delta import LoraDelta
from qlora_phi3.errors import ExportError
from qlora_phi3.export.base import RecordedBase
from qlora_phi3.export.streamed import StreamedModel, stream_live, stream_plain, trained_base
from qlora_phi3.model.quantized import dequantize, hash_rows, is_stored_quantized
from qlora_phi3.model.weights import ComputedWeights, TensorInfo, Weights

#: The name in reports and options; "nf4" stands for the 4-bit weights that were trained, whatever their type.
Onto = Literal["nf4", "original"]


class MergedWeights:
    """The tensors of the merged model; a `Weights`.

    What the run held in 4 bit, what the adapter adds to and what it replaces has the dtype of the export. Everything else keeps
    the bytes of the base. The base is compared with the run's record while it is read (`RecordedBase.compared`).
    """

    def __init__(self, base: RecordedBase, deltas: AdapterDeltas, *, onto: Onto, dtype: torch.dtype) -> None:
        """Read nothing but headers. The merge is computed on the device of `base`; `dtype` is float16, bfloat16 or float32.
        ExportError where a tensor of the base has another shape than the adapter's, or there is no original to merge onto.
        """
        self.base, self.deltas, self.onto, self.dtype = base, deltas, onto, dtype
        shapes: dict[str, tuple[int, ...]] = {name: target.shape for name, target in deltas.targets.items()}
        for name, key in deltas.replaced.items():
            shapes[EMBEDDING if name == HEAD and deltas.unties else name] = deltas.stored.info[key].shape
        for name, shape in shapes.items():
            found = base.info[name].shape if name in base.info else "missing"
            if found != shape:
                message = f"{name} is {found} in the base, and the adapter was trained on {shape}."
                raise ExportError(message, "Give the base that the run names.")
        quantized = next((name for name in base.info if is_stored_quantized(base.stored, name)), None)
        if onto == "original" and quantized is not None:
            base.iter_row_chunks(quantized)  # raises: there is no original
        info = dict(base.info)
        self.cast = {*deltas.targets, *deltas.replaced, *filter(base.record.is_quantized, info)}
        if deltas.unties:
            info[HEAD] = info[EMBEDDING]
        self.info: Mapping[str, TensorInfo] = {
            name: TensorInfo(own.shape, dtype if name in self.cast else own.dtype) for name, own in info.items()
        }

    def iter_row_chunks(self, name: str) -> Iterator[Tensor]:
        """The rows of a merged tensor: chunks (rows, ...) in `info[name].dtype`, on the CPU. ExportError for a value that is not
        finite, or beyond the range of `dtype`; ModelError where the base's file cannot be read.
        """
        base, record, is_target = self.base, self.base.record, name in self.deltas.targets
        if name in self.deltas.replaced:
            rows = self.deltas.stored.iter_row_chunks(self.deltas.replaced[name])
        elif record.is_quantized(name):
            quantized = None
            if self.onto == "nf4" or name not in base.compared:  # compared with the record, whatever is merged onto
                quantized = base.quantized(name)
            rows = dequantize(quantized) if quantized and self.onto == "nf4" else base.iter_row_chunks(name)
        else:
            source = EMBEDDING if name == HEAD and self.deltas.unties else name  # a head that was tied is the embedding
            rows = base.iter_row_chunks(source)
            if is_target:  # a weight that was not quantized was trained on in the run's dtype
                rows = (chunk.to(record.dtype) for chunk in rows)
        if is_target:
            rows = _add_delta(rows, self.deltas.read(name), base.device)
        return (_cast(name, chunk, self.dtype) for chunk in rows) if name in self.cast else rows


def _add_delta(rows: Iterator[Tensor], delta: LoraDelta, device: torch.device) -> Iterator[Tensor]:
    """Add the update of an adapter to chunks (rows, in_features) of a weight; yields them in fp32, on `device`.

    DoRA scales each row of the sum to its trained length; PEFT divides by the norm over in_features of base plus update.
    """
    lora_A, lora_B, start = delta.block.lora_A.to(device), delta.block.lora_B.to(device), 0
    for chunk in rows:
        weight = chunk.to(device=device, dtype=torch.float32)
        stop = start + len(weight)
        weight.addmm_(lora_B[start:stop], lora_A, alpha=delta.block.scaling)
        if delta.magnitude is not None:
            magnitude = delta.magnitude[start:stop].to(device)
            weight.mul_((magnitude / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1))
        start = stop
        yield weight


def _cast(name: str, chunk: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a chunk of a merged tensor, and move it to the CPU; ExportError for a value beyond the range of `dtype`."""
    ends = torch.stack(chunk.aminmax())  # rounding keeps the order: no value between them overflows unless they do
    if not ends.isfinite().all():
        raise ExportError(f"{name} of the merged model holds NaN or infinity.", "Check the base's files and the run.")
    if not ends.to(dtype).isfinite().all():
        largest, dtype_name = float(ends.abs().max()), str(dtype).removeprefix("torch.")
        message = f"{name} of the merged model reaches {largest:g}; {dtype_name} ends at {torch.finfo(dtype).max:g}."
        raise ExportError(message, "Export with --dtype bf16.")
    return chunk.to(dtype).cpu()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredModel:
    """A model that a proof scores: the live one, a merge, or the base of a merge with the adapter unmerged."""

    name: str  # "live", "nf4" or "original", which are reported; "nf4, unmerged" and so on, which merges are compared with
    open: Callable[[], StreamedModel]
    origin: str | None = None  # the model that it must agree with; None where that is not checked
    checksums: Mapping[str, str] | None = None  # of a merge, tensor -> SHA-256, filled as the tensors are read


def build_models(
    base: RecordedBase,
    deltas: AdapterDeltas,
    config: dict[str, Any],
    adapter: Path,
    *,
    dtype: torch.dtype,
    ontos: Sequence[Onto] = ("nf4", "original"),
    checked: Sequence[Onto] = ("nf4", "original"),
) -> list[ScoredModel]:
    """The models of a proof, the live one first; a merge is computed while it is scored.

    `config` are the contents of the base's config.json, `adapter` is the run's PEFT directory, `dtype` that of the export. Of the
    merges `ontos`, those `checked` are compared with base and adapter unmerged, which may be a pass of its own.
    """
    merged_config = {**config, "tie_word_embeddings": False} if deltas.unties else config
    live = partial(stream_live, trained_base(base), config, adapter, device=base.device)
    models = [ScoredModel(name="live", open=live, origin="live")]
    for onto in ontos:
        weights, checksums = _record_checksums(MergedWeights(base, deltas, onto=onto, dtype=dtype))
        (unmerged, is_live), origin = _unmerged_base(base, deltas, onto), None
        if onto in checked:
            origin = "live" if is_live else f"{onto}, unmerged"
        build = partial(stream_plain, weights, merged_config, device=base.device)
        models.append(ScoredModel(name=onto, open=build, origin=origin, checksums=checksums))
        if origin not in (None, "live"):
            build = partial(stream_live, unmerged, config, adapter, device=base.device)
            models.append(ScoredModel(name=f"{onto}, unmerged", open=build))
    return models


def _record_checksums(weights: Weights) -> tuple[Weights, dict[str, str]]:
    """The same weights, and tensor -> SHA-256, filled as they are read, so that files can be compared with what was scored."""
    checksums: dict[str, str] = {}
    read = weights.iter_row_chunks
    hashed = ComputedWeights(weights.info, lambda name: hash_rows(read(name), partial(checksums.__setitem__, name)))
    return hashed, checksums


def _unmerged_base(base: RecordedBase, deltas: AdapterDeltas, onto: Onto) -> tuple[Weights, bool]:
    """The values of the base that a merge starts from, and whether the live model has all of the same values.

    The run rounded embedding, head and norms to its dtype, and a merge keeps them as the file has them. In a base stored in fp16
    and trained in bf16 (SmolLM2-135M) that alone was a mean KL of 4e-5, which is not a fault of the merge.
    """
    record, info, trained = base.record, base.info, trained_base(base)
    as_trained = {name for name in info if (onto == "nf4" if record.is_quantized(name) else name in deltas.targets)}
    others = info.keys() - as_trained
    is_live = not any(record.is_quantized(name) or info[name].dtype != record.dtype for name in others)
    weights = ComputedWeights(info, lambda name: (trained if name in as_trained else base).iter_row_chunks(name))
    return weights, is_live
