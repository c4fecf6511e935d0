"""A LoRA update as blocks, whatever format it came from: at a block's rows and columns, W grows by scaling * up @ down.

One block is a plain LoRA. Several side by side are loralib's MergedLinear, adapters of q, k and v apart, or loralib's Conv2d.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["linear", "embedding", "conv2d"]


#: Called with the number of layers done and of all layers.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankBlock:
    """scaling * up @ down, added at `first_row`, `first_column` of the weight; down (r, columns), up (rows, r)."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    first_row: int = 0
    first_column: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraDelta:
    """What an adapter adds to one layer's weight of (out_features, in_features).

    An embedding's weight is taken as (dim, num_embeddings), a Conv2d's flattened to (out, in * kernel_size**2).
    """

    out_features: int
    in_features: int
    blocks: tuple[LowRankBlock, ...]
    kind: Kind = "linear"
    kernel_size: int = 1
    #: DoRA's size of every row of the adapted weight, (out_features,).
    magnitude: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Updates by the name of their layer in the base, and tensors held whole (biases, modules_to_save) by their name in it."""

    deltas: Mapping[str, LoraDelta]
    whole: Mapping[str, Tensor] = field(default_factory=dict)


def stack(delta: LoraDelta) -> tuple[Tensor, Tensor, float]:
    """One pair of matrices for all blocks: A stacked, B placed block by block.

    Blocks with the same A share its rows. Where their scalings differ the largest is kept and the others are folded into B, which
    then is fp32 at least: one rounding of 6e-8.

    Returns:
        A (rank, in_features), B (out_features, rank), scaling.
    """
    blocks, scaling = delta.blocks, max(block.scaling for block in delta.blocks)
    dtype = _common_dtype(blocks, folded=any(block.scaling != scaling for block in blocks))
    starts: list[int] = []
    rank = 0
    for number, block in enumerate(blocks):
        twin = next((i for i in range(number) if _shares_down(blocks[i], block)), None)
        starts.append(rank if twin is None else starts[twin])
        rank += len(block.lora_A) if twin is None else 0
    lora_A = torch.zeros(rank, delta.in_features, dtype=dtype)
    lora_B = torch.zeros(delta.out_features, rank, dtype=dtype)
    for start, block in zip(starts, blocks, strict=True):
        ranks = slice(start, start + len(block.lora_A))
        lora_A[ranks, block.first_column : block.first_column + block.lora_A.shape[1]] = block.lora_A.to(dtype)
        lora_B[block.first_row : block.first_row + len(block.lora_B), ranks] = scale_lora_b(
            block.lora_B, block.scaling / scaling
        ).to(dtype)
    return lora_A, lora_B, scaling


def scale_lora_b(lora_B: Tensor, factor: float) -> Tensor:
    """B times a factor: as it is for 1, else rounded once to fp32 (float64 stays)."""
    if factor == 1:
        return lora_B
    return (lora_B.double() * factor).to(torch.promote_types(lora_B.dtype, torch.float32))


def _common_dtype(blocks: Iterable[LowRankBlock], *, folded: bool) -> torch.dtype:
    dtypes = [tensor.dtype for block in blocks for tensor in (block.lora_A, block.lora_B)]
    return reduce(torch.promote_types, [*dtypes, torch.float32] if folded else dtypes)


def _shares_down(first: LowRankBlock, second: LowRankBlock) -> bool:
    return first.first_column == second.first_column and torch.equal(first.lora_A, second.lora_A)


def relative_difference(first: LoraDelta, second: LoraDelta) -> float:
    """Norm of the difference of two whole updates over the norm of the first, in float64.

    The updates, up to 50 million weights each, are never formed: with U = Q R and D = S P, |U D| is |R P|. Infinite where sizes
    or DoRA's magnitudes differ at all.
    """
    same_size = (first.out_features, first.in_features) == (second.out_features, second.in_features)
    if not same_size or not _equal(first.magnitude, second.magnitude):
        return float("inf")
    difference = _norm([*first.blocks, *(replace(block, scaling=-block.scaling) for block in second.blocks)], first)
    if difference == 0:
        return 0.0
    norm = _norm(first.blocks, first)
    return difference / norm if norm else float("inf")


def _norm(blocks: Sequence[LowRankBlock], shape: LoraDelta) -> float:
    """Frobenius norm of the sum of blocks."""
    rank = sum(len(block.lora_A) for block in blocks)
    lora_B = torch.zeros(shape.out_features, rank, dtype=torch.float64)
    lora_A = torch.zeros(shape.in_features, rank, dtype=torch.float64)
    start = 0
    for block in blocks:
        stop = start + len(block.lora_A)
        lora_B[block.first_row : block.first_row + len(block.lora_B), start:stop] = (
            block.lora_B.double() * block.scaling
        )
        lora_A[block.first_column : block.first_column + block.lora_A.shape[1], start:stop] = block.lora_A.T
        start = stop
    left, right = (torch.linalg.qr(matrix, mode="r").R for matrix in (lora_B, lora_A))
    return float((left @ right.T).norm())


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    return first is second if first is None or second is None else torch.equal(first, second)
