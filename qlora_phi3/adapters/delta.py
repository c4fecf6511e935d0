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
class Block:
    """scaling * up @ down, added at `first_row`, `first_column` of the weight; down (r, columns), up (rows, r)."""

    down: Tensor
    up: Tensor
    scaling: float
    first_row: int = 0
    first_column: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What an adapter adds to one layer's weight of (out_features, in_features).

    An embedding's weight is taken as (dim, num_embeddings), a Conv2d's flattened to (out, in * kernel_size**2).
    """

    out_features: int
    in_features: int
    blocks: tuple[Block, ...]
    kind: Kind = "linear"
    kernel_size: int = 1
    #: DoRA's size of every row of the adapted weight, (out_features,).
    magnitude: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Updates by the name of their layer in the base, and tensors held whole (biases, modules_to_save) by their name in it."""

    updates: Mapping[str, Update]
    whole: Mapping[str, Tensor] = field(default_factory=dict)


def stack(update: Update) -> tuple[Tensor, Tensor, float]:
    """One pair of matrices for all blocks: A stacked, B placed block by block.

    Blocks with the same A share its rows. Where their scalings differ the largest is kept and the others are folded into B, which
    then is fp32 at least: one rounding of 6e-8.

    Returns:
        A (rank, in_features), B (out_features, rank), scaling.
    """
    blocks, scaling = update.blocks, max(block.scaling for block in update.blocks)
    dtype = _common_dtype(blocks, folded=any(block.scaling != scaling for block in blocks))
    starts: list[int] = []
    rank = 0
    for number, block in enumerate(blocks):
        twin = next((i for i in range(number) if _shares_down(blocks[i], block)), None)
        starts.append(rank if twin is None else starts[twin])
        rank += len(block.down) if twin is None else 0
    down = torch.zeros(rank, update.in_features, dtype=dtype)
    up = torch.zeros(update.out_features, rank, dtype=dtype)
    for start, block in zip(starts, blocks, strict=True):
        ranks = slice(start, start + len(block.down))
        down[ranks, block.first_column : block.first_column + block.down.shape[1]] = block.down.to(dtype)
        up[block.first_row : block.first_row + len(block.up), ranks] = fold(block.up, block.scaling / scaling).to(dtype)
    return down, up, scaling


def fold(up: Tensor, factor: float) -> Tensor:
    """B times a factor: as it is for 1, else rounded once to fp32 (float64 stays)."""
    if factor == 1:
        return up
    return (up.double() * factor).to(torch.promote_types(up.dtype, torch.float32))


def _common_dtype(blocks: Iterable[Block], *, folded: bool) -> torch.dtype:
    dtypes = [tensor.dtype for block in blocks for tensor in (block.down, block.up)]
    return reduce(torch.promote_types, [*dtypes, torch.float32] if folded else dtypes)


def _shares_down(first: Block, second: Block) -> bool:
    return first.first_column == second.first_column and torch.equal(first.down, second.down)


def relative_difference(first: Update, second: Update) -> float:
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


def _norm(blocks: Sequence[Block], shape: Update) -> float:
    """Frobenius norm of the sum of blocks."""
    rank = sum(len(block.down) for block in blocks)
    up = torch.zeros(shape.out_features, rank, dtype=torch.float64)
    down = torch.zeros(shape.in_features, rank, dtype=torch.float64)
    start = 0
    for block in blocks:
        stop = start + len(block.down)
        up[block.first_row : block.first_row + len(block.up), start:stop] = block.up.double() * block.scaling
        down[block.first_column : block.first_column + block.down.shape[1], start:stop] = block.down.T
        start = stop
    left, right = (torch.linalg.qr(matrix, mode="r").R for matrix in (up, down))
    return float((left @ right.T).norm())


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    return first is second if first is None or second is None else torch.equal(first, second)
