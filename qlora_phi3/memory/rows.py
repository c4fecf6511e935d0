"""The rows a plan must carry, as lengths in tokens: the usual step, and the heaviest micro-batch; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_phi3.dataset.pack import MicroBatchPlan, plan_micro_batches


@dataclass(frozen=True, slots=True)
class RowLengths:
    """Tokens of every row that is trained on, longest first, and of the longest held-out one (0: none)."""

    training: tuple[int, ...]
    longest_evaluation: int
    batch_size: int
    #: The data could not be read: every row counts as long as a row may be.
    assumed: bool = False

    @property
    def longest(self) -> int:
        """Of the training rows."""
        return self.training[0]

    def heaviest_step(self) -> tuple[int, ...]:
        """The longest rows that can meet in one optimizer step."""
        return self.training[: self.batch_size]

    def usual_step(self) -> tuple[int, ...]:
        """As many rows as a step has, spread evenly over all lengths."""
        number, total = min(self.batch_size, len(self.training)), len(self.training)
        return tuple(self.training[(2 * index + 1) * total // (2 * number)] for index in range(number))


def read_lengths(training: Sequence[int], evaluation: Sequence[int], batch_size: int) -> RowLengths:
    """Of rows that were tokenised."""
    return RowLengths(tuple(sorted(training, reverse=True)), max(evaluation, default=0), batch_size)


def assume_lengths(max_length: int, batch_size: int) -> RowLengths:
    """The worst case: every row as long as a row may be."""
    return RowLengths((max_length,) * batch_size, max_length, batch_size, assumed=True)


def heaviest_micro_batch(rows: RowLengths, plan: MicroBatchPlan) -> tuple[tuple[int, ...], bool]:
    """Tokens of each row of the fullest micro-batch that any step can have, and whether a step can have several.

    A packed micro-batch is taken as filled to its last token where a step has that many.
    """
    step = rows.heaviest_step()
    groups = plan_micro_batches(
        step, max_tokens=plan.max_tokens, max_rows=plan.max_rows, packing=plan.packing, boundary=plan.longrope_boundary
    )
    several = len(groups) > 1
    if not plan.packing:
        heaviest = max(groups, key=lambda group: len(group) * max(step[row] for row in group))
        return tuple(step[row] for row in heaviest), several
    filled = max(rows.longest, min(plan.max_tokens, sum(step)))
    return _fill(rows.longest, filled), several


def _fill(longest: int, tokens: int) -> tuple[int, ...]:
    """Rows of `longest` tokens, and a shorter one, that make so many tokens."""
    whole, rest = divmod(tokens, longest)
    return (longest,) * whole + ((rest,) if rest else ())


def count_micro_batches(lengths: Sequence[int], plan: MicroBatchPlan) -> int:
    """Micro-batches of a step with rows of these lengths."""
    return len(
        plan_micro_batches(
            lengths,
            max_tokens=plan.max_tokens,
            max_rows=plan.max_rows,
            packing=plan.packing,
            boundary=plan.longrope_boundary,
        )
    )
