"""The models that a proof compares: the live one, and what was or can be made of it."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_phi3.checksum import add_bytes
from qlora_phi3.export.adapter import Updates
from qlora_phi3.export.base import RecordedBase
from qlora_phi3.export.merge import MergedWeights, Onto
from qlora_phi3.export.streamed import StreamedModel, TrainedBase, stream_live, stream_plain
from qlora_phi3.export.weights import Weights

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
    updates: Updates,
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
    merged_config = {**config, "tie_word_embeddings": False} if updates.unties else config
    candidates = []
    for onto in ontos:
        weights = _Noting(MergedWeights(base, updates, onto=onto, dtype=dtype))
        parts = _Parts(base, updates, onto)
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

    def pieces(self, name: str) -> Iterator[Tensor]:
        """As `Weights.pieces`."""
        digest = hashlib.sha256()
        for piece in self.weights.pieces(name):
            add_bytes(digest, piece)
            yield piece
        self.checksums[name] = digest.hexdigest()


class _Parts:
    """The base's values that a merge is made of; a `Weights`.

    The run rounded embedding, head and norms to its dtype, and a merge keeps them as the file has them. In a base stored in fp16
    and trained in bf16 (SmolLM2-135M) that alone was a mean KL of 4e-5, which is no fault of the merge.
    """

    def __init__(self, base: RecordedBase, updates: Updates, onto: Onto) -> None:
        self.base, self.trained, self.onto = base, TrainedBase(base), onto
        self.targets, self.info = updates.targets, base.info

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

    def pieces(self, name: str) -> Iterator[Tensor]:
        """As `Weights.pieces`."""
        return self.trained.pieces(name) if self._as_trained(name) else self.base.pieces(name)
