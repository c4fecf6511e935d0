"""The merged model's tensors, computed a few rows at a time from the base's files and the adapter.

Onto "nf4" a weight is what the model was trained on: the base's, quantized and dequantized again, plus the update. Onto
"original" it is the number in the base's file plus the update: the file's own, not what the run's dtype made of it, because that
merge is for those who trust the published weights over any rounding. Everything is summed in fp32 and cast once.

The models that a proof compares: the live one, and what was or can be made of it.
"""

import hashlib
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
from qlora_phi3.export.streamed import StreamedModel, TrainedBase, stream_live, stream_plain
from qlora_phi3.model.quantized import add_bytes, dequantize, is_stored_quantized
from qlora_phi3.model.weights import TensorInfo, Weights

Onto = Literal["nf4", "original"]


class MergedWeights:
    """The tensors of the merged model; a `Weights`.

    What the run held in 4 bit, what the adapter adds to and what it replaces comes in `dtype`; everything else in the base's own
    bytes. On the way the base is held against the run's record (`RecordedBase.compared`).
    """

    def __init__(self, base: RecordedBase, deltas: AdapterDeltas, *, onto: Onto, dtype: torch.dtype) -> None:
        """Nothing but headers is read.

        Args:
            base: arithmetic is done on its device.
            dtype: float16, bfloat16 or float32.

        Raises:
            ExportError: a tensor of the base has another shape than the adapter's, or there is no original to merge onto.
        """
        self.base, self.deltas, self.onto, self.dtype = base, deltas, onto, dtype
        for name, target in deltas.targets.items():
            _check_shape(base, name, target.shape)
        for name, key in deltas.replaced.items():
            _check_shape(base, EMBEDDING if name == HEAD and deltas.unties else name, deltas.stored.info[key].shape)
        quantized = next((name for name in base.info if is_stored_quantized(base.stored, name)), None)
        if onto == "original" and quantized is not None:
            base.iter_row_chunks(quantized)  # raises: there is no original
        self.info: Mapping[str, TensorInfo] = self._plan()

    def _plan(self) -> dict[str, TensorInfo]:
        info = dict(self.base.info)
        if self.deltas.unties:
            info[HEAD] = info[EMBEDDING]
        return {name: TensorInfo(info[name].shape, self._dtype_of(name, info[name].dtype)) for name in info}

    def _dtype_of(self, name: str, own: torch.dtype) -> torch.dtype:
        return self.dtype if self._is_cast(name) else own

    def _is_cast(self, name: str) -> bool:
        return name in self.deltas.targets or name in self.deltas.replaced or self.base.record.is_quantized(name)

    def iter_row_chunks(self, name: str) -> Iterator[Tensor]:
        """As `Weights.pieces`.

        Raises:
            ExportError: a value is no number, or beyond the range of `dtype`.
            ModelError: the base's file cannot be read.
        """
        trained = self.deltas.replaced.get(name)
        rows = self._base_rows(name) if trained is None else self.deltas.stored.iter_row_chunks(trained)
        if name in self.deltas.targets:
            rows = _add(rows, self.deltas.read(name), self.base.device)
        return (_cast(name, piece, self.dtype) for piece in rows) if self._is_cast(name) else rows

    def _base_rows(self, name: str) -> Iterator[Tensor]:
        """The base's rows to which the update is added."""
        record = self.base.record
        source = EMBEDDING if name == HEAD and self.deltas.unties else name  # a head that was tied is the embedding
        if not record.is_quantized(name):
            rows = self.base.iter_row_chunks(source)
            # Not quantized, the trained weight is the file's in the run's dtype.
            return (piece.to(record.dtype) for piece in rows) if name in self.deltas.targets else rows
        if self.onto == "original" and name in self.base.compared:
            return self.base.iter_row_chunks(name)
        quantized = self.base.quantized(name)  # held against the record, whatever is merged onto
        return (
            self.base.iter_row_chunks(name) if self.onto == "original" or quantized is None else dequantize(quantized)
        )


def _check_shape(base: RecordedBase, name: str, shape: tuple[int, ...]) -> None:
    found = base.info[name].shape if name in base.info else "missing"
    if found != shape:
        raise ExportError(
            f"{name} is {found} in the base, and the adapter was trained on {shape}.",
            "Give the base that the run names.",
        )


def _add(rows: Iterator[Tensor], delta: LoraDelta, device: torch.device) -> Iterator[Tensor]:
    """Rows of a weight with their part of the update, fp32.

    DoRA brings each row of the sum to its trained length; PEFT divides by the norm over in_features of base plus update.
    """
    lora_A, lora_B = delta.lora_A.to(device), delta.lora_B.to(device)
    start = 0
    for piece in rows:
        weight = piece.to(device=device, dtype=torch.float32)
        stop = start + len(weight)
        weight.addmm_(lora_B[start:stop], lora_A, alpha=delta.scaling)
        if delta.magnitude is not None:
            magnitude = delta.magnitude[start:stop].to(device)
            weight.mul_((magnitude / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1))
        start = stop
        yield weight


def _cast(name: str, piece: Tensor, dtype: torch.dtype) -> Tensor:
    """The one cast, to the CPU.

    Raises:
        ExportError: NaN, infinity, or a value that `dtype` does not reach.
    """
    ends = torch.stack(piece.aminmax())  # rounding keeps the order, so no value between them overflows if they do not
    if not ends.to(dtype).isfinite().all():
        largest = float(ends.abs().max())
        if not ends.isfinite().all():
            raise ExportError(
                f"{name} of the merged model holds NaN or infinity.", "Check the base's files and the run."
            )
        raise ExportError(
            f"{name} of the merged model reaches {largest:g}; {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:g}.",
            "Export with --dtype bf16.",
        )
    return piece.to(dtype).cpu()


Opener = Callable[[], StreamedModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A merge to be scored.

    `origin`: what it is held against, base and adapter side by side; None for the live model. `checked`: whether it is.
    `checksums`: of its tensors, each once it has been read.
    """

    onto: Onto
    open: Opener
    checksums: Mapping[str, str]
    origin: Opener | None = None
    checked: bool = True


def live_model(base: RecordedBase, config: dict[str, Any], adapter: Path) -> Opener:
    """The model as it was trained.

    Args:
        config: the contents of the base's config.json.
        adapter: the run's PEFT folder.
    """
    return partial(stream_live, TrainedBase(base), config, adapter, device=base.device)


def make_candidates(
    base: RecordedBase,
    deltas: AdapterDeltas,
    config: dict[str, Any],
    adapter: Path,
    *,
    dtype: torch.dtype,
    ontos: Sequence[Onto] = ("nf4", "original"),
    checked: Sequence[Onto] = ("nf4", "original"),
) -> list[Candidate]:
    """The merges, computed on the way.

    Args:
        dtype: of the export.
        checked: those to be held against what they are made of, which may be a pass of its own.
    """
    merged_config = {**config, "tie_word_embeddings": False} if deltas.unties else config
    candidates = []
    for onto in ontos:
        weights = _Noting(MergedWeights(base, deltas, onto=onto, dtype=dtype))
        parts = _UnmergedBase(base, deltas, onto)
        candidates.append(
            Candidate(
                onto=onto,
                open=partial(stream_plain, weights, merged_config, device=base.device),
                checksums=weights.checksums,
                origin=None if parts.is_live else partial(stream_live, parts, config, adapter, device=base.device),
                checked=onto in checked,
            )
        )
    return candidates


class _Noting:
    """Weights whose checksums are noted down as they are read, so that files can be held against what was scored."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.info = weights, weights.info
        self.checksums: dict[str, str] = {}

    def iter_row_chunks(self, name: str) -> Iterator[Tensor]:
        """As `Weights.pieces`."""
        digest = hashlib.sha256()
        for piece in self.weights.iter_row_chunks(name):
            add_bytes(digest, piece)
            yield piece
        self.checksums[name] = digest.hexdigest()


class _UnmergedBase:
    """The base's values that a merge is made of; a `Weights`.

    The run rounded embedding, head and norms to its dtype, and a merge keeps them as the file has them. In a base stored in fp16
    and trained in bf16 (SmolLM2-135M) that alone was a mean KL of 4e-5, which is no fault of the merge.
    """

    def __init__(self, base: RecordedBase, deltas: AdapterDeltas, onto: Onto) -> None:
        self.base, self.trained, self.onto = base, TrainedBase(base), onto
        self.targets, self.info = deltas.targets, base.info

    @property
    def is_live(self) -> bool:
        """Whether the live model has the same values."""
        record = self.base.record
        return all(
            self._as_trained(name) or (not record.is_quantized(name) and self.info[name].dtype == record.dtype)
            for name in self.info
        )

    def _as_trained(self, name: str) -> bool:
        if self.base.record.is_quantized(name):
            return self.onto == "nf4"
        return name in self.targets

    def iter_row_chunks(self, name: str) -> Iterator[Tensor]:
        """As `Weights.pieces`."""
        return self.trained.iter_row_chunks(name) if self._as_trained(name) else self.base.iter_row_chunks(name)
