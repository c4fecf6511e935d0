"""What an adapter adds to each weight of its base, whatever format it came from.

A `LoraDelta` is a sum of low-rank blocks: one for a plain LoRA, several for loralib's MergedLinear and Conv2d and for adapters
of q, k and v apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["linear", "embedding", "conv2d"]
#: Called with the number of layers done and of all layers.
Progress = Callable[[int, int], None] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankBlock:
    """scaling * lora_B @ lora_A, added to the weight from `first_row` and `first_column` on.

    lora_A is (r, columns), lora_B is (rows, r); both have the floating-point dtype of the adapter's file.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    first_row: int = 0
    first_column: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraDelta:
    """What an adapter adds to the weight (out_features, in_features) of one layer.

    The weight of an embedding counts as (dim, num_embeddings), that of a Conv2d as (out, in * kernel_size**2).
    """

    out_features: int
    in_features: int
    blocks: tuple[LowRankBlock, ...]
    kind: Kind = "linear"
    kernel_size: int = 1
    magnitude: Tensor | None = None  #: DoRA's length of every row of the adapted weight, (out_features,).

    @property
    def block(self) -> LowRankBlock:
        """The block of a delta of a single one, with lora_A (r, in_features) and lora_B (out_features, r)."""
        (block,) = self.blocks
        return block


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Deltas by the name of their layer, and tensors stored in full (biases, modules_to_save) by their name in the base."""

    deltas: Mapping[str, LoraDelta]
    full_tensors: Mapping[str, Tensor] = field(default_factory=dict)


def stack(delta: LoraDelta) -> tuple[Tensor, Tensor, float]:
    """Combine all blocks of a delta into one pair of matrices.

    Blocks with the same A share its rows. Where the scalings differ, the largest is kept and the others are multiplied into B,
    which then is fp32 or wider: one rounding of 6e-8.

    Returns:
        lora_A (rank, in_features), lora_B (out_features, rank), both of the blocks' common dtype, and the scaling.
    """
    blocks, scaling = delta.blocks, max(block.scaling for block in delta.blocks)
    dtypes = [tensor.dtype for block in blocks for tensor in (block.lora_A, block.lora_B)]
    if any(block.scaling != scaling for block in blocks):
        dtypes.append(torch.float32)
    dtype = reduce(torch.promote_types, dtypes)
    rank, starts = 0, list[int]()
    for block in blocks:
        same = (other.first_column == block.first_column and torch.equal(other.lora_A, block.lora_A) for other in blocks)
        starts.append(next((start for start, is_same in zip(starts, same, strict=False) if is_same), rank))
        rank = max(rank, starts[-1] + len(block.lora_A))
    lora_A = torch.zeros(rank, delta.in_features, dtype=dtype)
    lora_B = torch.zeros(delta.out_features, rank, dtype=dtype)
    for start, block in zip(starts, blocks, strict=True):
        ranks = slice(start, start + len(block.lora_A))
        rows = slice(block.first_row, block.first_row + len(block.lora_B))
        columns = slice(block.first_column, block.first_column + block.lora_A.shape[1])
        lora_A[ranks, columns] = block.lora_A.to(dtype)
        lora_B[rows, ranks] = scale_lora_b(block.lora_B, block.scaling / scaling).to(dtype)
    return lora_A, lora_B, scaling


def scale_lora_b(lora_B: Tensor, factor: float) -> Tensor:
    """lora_B (out, r) times a factor: unchanged for 1, else computed in float64 and rounded once to fp32 (float64 stays)."""
    if factor == 1:
        return lora_B
    return (lora_B.double() * factor).to(torch.promote_types(lora_B.dtype, torch.float32))


def relative_difference(first: LoraDelta, second: LoraDelta) -> float:
    """Norm of the difference of two deltas over the norm of the first, in float64; infinite where sizes or magnitudes differ."""
    magnitudes = [delta.magnitude for delta in (first, second) if delta.magnitude is not None]
    if len(magnitudes) == 1 or (magnitudes and not torch.equal(*magnitudes)):
        return float("inf")
    if (first.out_features, first.in_features) != (second.out_features, second.in_features):
        return float("inf")
    negated = (replace(block, lora_A=-block.lora_A) for block in second.blocks)
    difference, norm = _norm(replace(first, blocks=(*first.blocks, *negated))), _norm(first)
    return difference / norm if norm else float("inf") if difference else 0.0


def _norm(delta: LoraDelta) -> float:
    """Frobenius norm of a delta, whose up to 50 million weights are never formed: with B = Q R and A^T = S P, |B A| = |R P^T|."""
    blocks = [replace(block, lora_A=block.lora_A.double(), lora_B=block.lora_B.double()) for block in delta.blocks]
    lora_A, lora_B, scaling = stack(replace(delta, blocks=tuple(blocks)))
    left, right = (torch.linalg.qr(matrix, mode="r").R for matrix in (lora_B, lora_A.T))
    return scaling * float((left @ right.T).norm())
