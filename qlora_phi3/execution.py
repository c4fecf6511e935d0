"""How a recipe is executed on a device: everything that decides memory and speed, and nothing that decides what is learned.

The recipe sets the batch of the optimizer step. Which of its rows share a micro-batch is planned here, on lengths in tokens alone
and without torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

#: The label of a position that is not supervised, as in `torch.nn.functional.cross_entropy`.
IGNORE_INDEX = -100

#: fp32 logits alive at once in the loss: 261 positions of Phi-3's 32,064 tokens. On CPU (Zen 5, 49,152 tokens, torch 2.13) 16 and
#: 32 MiB were 15 % faster than 64 MiB, whose buffers are new from the system each time, and 2.6 x as fast as 2 MiB.
DEFAULT_LOGITS_TILE_BYTES = 32 * 2**20
#: Tiles of the MLP where complete rows do not fit; each tile dequantizes its weights again. Predicted for one row of Phi-3-mini
#: (offloaded): of 4,096 tokens, tiles of 1,024 save 161 MiB, 512 177; of 16,384 tokens, 4,096 save 802 MiB, and so do 2,048.
SMALLEST_MLP_TILE_TOKENS, MOST_MLP_TILES = 1024, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchPlan:
    """How the rows of a batch become tensors."""

    max_tokens: int  #: Of a micro-batch, padding included; a single longer row is a micro-batch of its own.
    max_rows: int  #: Of a padded micro-batch; a packed one is bounded by its tokens only.
    packing: bool  #: Concatenate rows in one sequence (block-diagonal attention) instead of padding them.
    #: Rows longer than this never share a micro-batch with shorter ones (longrope switches its factors for the entire batch).
    longrope_boundary: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionPlan:
    """All that the memory plan may choose."""

    micro_batch: MicroBatchPlan  #: How the rows of an optimizer step become tensors.
    evaluation: MicroBatchPlan  #: The same for held-out rows.
    checkpoint_every: int  #: Every n-th decoder layer is recomputed in the backward pass; 1: all of them, 0: none.
    activation_offloading: bool  #: Move the inputs of recomputed layers to CPU memory until the backward pass.
    optim: str  #: transformers' name of the optimizer.
    #: Keep what attention's kernels return in recomputed layers, so that they run once; where the layer's input is kept.
    keep_attention: bool = False
    logits_tile_bytes: int = DEFAULT_LOGITS_TILE_BYTES  #: Bytes of fp32 logits alive at once in the loss.
    #: Tokens that go through a layer's norm and MLP at once, recomputed tile by tile in the backward pass; 0: all.
    mlp_tile_tokens: int = 0
    fused_kernels: bool = False  #: The layers use the Triton kernels of `model/kernels.py`.


def smaller_mlp_tile(tokens: int) -> int:
    """Tile size, in tokens, for the MLPs of a micro-batch of `tokens` tokens; smaller tiles would hardly save more."""
    return max(SMALLEST_MLP_TILE_TOKENS, -(-tokens // MOST_MLP_TILES))


def split_plan(plan: MicroBatchPlan, lengths: Sequence[int]) -> MicroBatchPlan:
    """Lower the tokens of a micro-batch just enough that the rows of one no longer share it; `lengths` are the tokens of the rows
    of one micro-batch that `plan` made, at least two rows.
    """
    half = (sum(lengths) + 1) // 2 if plan.packing else (len(lengths) + 1) // 2 * max(lengths)
    return replace(plan, max_tokens=max(half, *lengths))


def plan_micro_batches(lengths: Sequence[int], plan: MicroBatchPlan) -> list[list[int]]:
    """Split the rows of one optimizer step, of `lengths` tokens, into micro-batches; the same input always gives the same split.
    Returns indices into `lengths`: every row exactly once, longest rows first.

    transformers picks longrope's long or short factors from the largest position in a batch, so rows longer than the plan's
    boundary never share a micro-batch with rows that are not.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    boundary = float("inf") if plan.longrope_boundary is None else plan.longrope_boundary
    split: list[list[int]] = []
    for group in ([row for row in order if lengths[row] > boundary], [row for row in order if lengths[row] <= boundary]):
        split += _pack(group, lengths, plan) if plan.packing else _pad(group, lengths, plan)
    return split


def share_rows(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Share the rows of one optimizer step among processes: about as many tokens each, and at most ceil(rows / count) rows.
    Returns for each process indices into `lengths`, in their order; together every row exactly once.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    tokens, most = [0] * count, math.ceil(len(lengths) / count)
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        process = min((number for number in range(count) if len(shares[number]) < most), key=tokens.__getitem__)
        shares[process].append(row)
        tokens[process] += lengths[row]
    return [sorted(share) for share in shares]


def _pack(order: Sequence[int], lengths: Sequence[int], plan: MicroBatchPlan) -> list[list[int]]:
    """Best-fit decreasing: each row goes where it leaves the fewest tokens free, or into a micro-batch of its own."""
    packs: list[list[int]] = []
    free: list[int] = []  # tokens left in each pack
    for row in order:
        fitting = (pack for pack in range(len(packs)) if free[pack] >= lengths[row])
        pack = min(fitting, key=free.__getitem__, default=len(packs))
        if pack == len(packs):
            packs.append([])
            free.append(plan.max_tokens)
        packs[pack].append(row)
        free[pack] -= lengths[row]
    return packs


def _pad(order: Sequence[int], lengths: Sequence[int], plan: MicroBatchPlan) -> list[list[int]]:
    """Neighbours in length share a micro-batch, as many as rows and padded tokens allow."""
    batches: list[list[int]] = []
    for row in order:
        batch = batches[-1] if batches else []
        if batch and len(batch) < plan.max_rows and lengths[batch[0]] * (len(batch) + 1) <= plan.max_tokens:
            batch.append(row)
        else:
            batches.append([row])
    return batches
