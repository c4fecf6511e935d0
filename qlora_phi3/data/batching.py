"""Which rows of one optimizer step share a micro-batch: a plan on lengths in tokens alone, without torch.

The recipe sets the batch of the optimizer step. How it is split decides memory and speed, and changes nothing that is learned.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace

from qlora_phi3.execution import MicroBatchPlan


def split_plan(plan: MicroBatchPlan, lengths: Sequence[int]) -> MicroBatchPlan:
    """Lower the tokens of a micro-batch just enough that the rows of one no longer share it.

    Args:
        lengths: tokens of the rows of one micro-batch that `plan` made, at least two rows.
    """
    half = (sum(lengths) + 1) // 2 if plan.packing else (len(lengths) + 1) // 2 * max(lengths)
    return replace(plan, max_tokens=max(half, *lengths))


def plan_micro_batches(
    lengths: Sequence[int], *, max_tokens: int, max_rows: int, packing: bool, boundary: int | None
) -> list[list[int]]:
    """Split the rows of one optimizer step into micro-batches. The same input always gives the same plan.

    Args:
        lengths: tokens of each row.
        max_tokens: most tokens of a micro-batch, padding counted. A row that is longer by itself stands alone.
        max_rows: most rows of a padded micro-batch; a packed one is bounded by its tokens only.
        packing: lay rows end to end in one sequence; otherwise pad them to the longest of their micro-batch.
        boundary: `original_max_position_embeddings` of a longrope model, else None. transformers picks the long or
            the short rope factors from the largest position in a batch, so rows longer than the boundary never
            share a micro-batch with rows that are not.

    Returns:
        Indices into `lengths`: every row exactly once, longest rows first.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    limit = float("inf") if boundary is None else boundary
    plan: list[list[int]] = []
    for group in ([row for row in order if lengths[row] > limit], [row for row in order if lengths[row] <= limit]):
        plan += _pack(group, lengths, max_tokens) if packing else _pad(group, lengths, max_tokens, max_rows)
    return plan


def _pack(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Best-fit decreasing: each row goes where it leaves the fewest tokens free, or into a micro-batch of its own."""
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, number of the pack), sorted
    for row in order:
        fit = bisect_left(free, (lengths[row], 0))
        if fit < len(free):
            left, pack = free.pop(fit)
        else:
            left, pack = max_tokens, len(packs)
            packs.append([])
        packs[pack].append(row)
        insort(free, (left - lengths[row], pack))
    return packs


def _pad(order: Sequence[int], lengths: Sequence[int], max_tokens: int, max_rows: int) -> list[list[int]]:
    """Neighbours in length share a micro-batch, as many as rows and padded tokens allow."""
    batches: list[list[int]] = []
    for row in order:
        batch = batches[-1] if batches else []
        if batch and len(batch) < max_rows and lengths[batch[0]] * (len(batch) + 1) <= max_tokens:
            batch.append(row)
        else:
            batches.append([row])
    return batches
