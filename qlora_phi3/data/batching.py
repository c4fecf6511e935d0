"""Which rows of one optimizer step share a micro-batch: a plan on lengths in tokens alone, without torch.

The recipe sets the batch of the optimizer step. How it is split decides memory and speed, and changes nothing that is learned.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace

from qlora_phi3.execution import MicroBatchPlan

#: The label of a position that is not supervised, as in `torch.nn.functional.cross_entropy`.
IGNORE_INDEX = -100


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
    free: list[tuple[int, int]] = []  # (tokens left, number of the pack), sorted
    for row in order:
        fit = bisect_left(free, (lengths[row], 0))
        if fit < len(free):
            left, pack = free.pop(fit)
        else:
            left, pack = plan.max_tokens, len(packs)
            packs.append([])
        packs[pack].append(row)
        insort(free, (left - lengths[row], pack))
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
