"""The rows a plan must carry, as lengths in tokens: the usual step, and the heaviest micro-batch; no torch.

Why a plan is as it is, in the words that `vram-check` shows and `--fit` writes beside each key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_phi3.data.batching import plan_micro_batches
from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES, ExecutionPlan, MicroBatchPlan
from qlora_phi3.memory.cost import StepTime, StepWorkload
from qlora_phi3.memory.predict import Prediction
from qlora_phi3.memory.simulate import StepShape
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.units import format_gib


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
    return _fill_rows(rows.longest, filled), several


def _fill_rows(longest: int, tokens: int) -> tuple[int, ...]:
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


QUESTION_COLUMNS = "the recipe asks for it"


def explain_choices(
    recipe: Recipe,
    execution: ExecutionPlan,
    *,
    num_passes: int,
    longest: int,
    refused: Mapping[ExecutionPlan, int],
    limit_bytes: int,
) -> dict[str, str]:
    """Key of the recipe -> why the plan gives it this value.

    Args:
        num_passes: forward passes of a usual step.
        longest: tokens of the longest row.
        refused: kinds of set-up that would be faster and do not fit, and what each would take on the card, in bytes.
        limit_bytes: what may be predicted on the card.
    """
    pinned = _pinned(recipe)
    reasons = {
        "micro_batch_tokens": _of_micro_batch(execution, num_passes, longest),
        "gradient_checkpointing": _of_recomputing(execution),
        "checkpoint_every_n_layers": _of_every(execution) + _next_faster(refused, limit_bytes),
        "activation_offloading": "recomputation alone does not make enough room"
        if execution.activation_offloading
        else "there is room on the card",
        "optim": "its state may leave the card where that is full; where it is not, this is as fast as adamw_8bit"
        if execution.optim.startswith("paged")
        else "its state fits beside everything else",
        "logits_tile": "the fastest size"
        if execution.logits_tile_bytes >= DEFAULT_LOGITS_TILE_BYTES
        else "less memory",
        "mlp_tile_tokens": _of_mlp_tiles(execution),
    }
    return {key: QUESTION_COLUMNS if pinned[key] else reason for key, reason in reasons.items()}


def in_words(execution: ExecutionPlan) -> str:
    """What is kept of a step, and where."""
    every = execution.checkpoint_every
    kept = {0: "keeping all activations", 1: "recomputing all layers"}.get(every, f"recomputing one layer in {every}")
    tiled = ", the MLPs in tiles" if execution.mlp_tile_tokens else ""
    return kept + (", offloaded" if execution.activation_offloading else "") + tiled


def _pinned(recipe: Recipe) -> dict[str, bool]:
    training, memory = recipe.training, recipe.memory
    return {
        "micro_batch_tokens": bool(training.micro_batch_size or memory.micro_batch_tokens != "auto"),
        "gradient_checkpointing": training.gradient_checkpointing != "auto",
        "checkpoint_every_n_layers": memory.checkpoint_every_n_layers != "auto",
        "activation_offloading": training.activation_offloading != "auto",
        "optim": training.optim != "auto",
        "logits_tile": memory.logits_tile != "auto",
        "mlp_tile_tokens": memory.mlp_tile_tokens != "auto",
    }


def _of_micro_batch(execution: ExecutionPlan, num_passes: int, longest: int) -> str:
    if num_passes == 1:
        return "a whole step at once"
    if execution.micro_batch.max_tokens <= longest:
        return "the longest row alone; more at once would gain under 2%, not fit, or ask for more recomputation"
    return f"{num_passes} forward passes a step; more tokens at once would gain under 2% or not fit"


def _of_recomputing(execution: ExecutionPlan) -> str:
    if execution.checkpoint_every:
        return "makes room"
    if execution.mlp_tile_tokens:
        return "no whole layer is computed twice; the MLPs alone are (mlp_tile_tokens)"
    return "there is room to keep every activation"


def _of_every(execution: ExecutionPlan) -> str:
    every = execution.checkpoint_every
    return {0: "none", 1: "all of them, the leanest"}.get(every, f"recomputing one layer in {every} makes enough room")


def _of_mlp_tiles(execution: ExecutionPlan) -> str:
    if not execution.mlp_tile_tokens:
        return "0: not needed"
    if execution.checkpoint_every == 1:
        return "the last resort: without it the longest row does not fit"
    return "the MLPs of all layers are computed twice; nothing as fast fits without"


def _next_faster(refused: Mapping[ExecutionPlan, int], limit_bytes: int) -> str:
    """The leanest kind that would be faster and does not fit."""
    if not refused:
        return ""
    kind, needed = min(refused.items(), key=lambda item: item[1])
    room = format_gib(limit_bytes)
    return f"; {in_words(kind)} would take about {format_gib(needed)} for the longest row alone, of {room} beside the margin"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLimits:
    """What the plan needs to know of a device, in bytes and a second."""

    limit_bytes: int
    tflops_16bit: float
    bandwidth_bytes_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was chosen, and why."""

    prediction: Prediction
    #: Of a usual step, as its cost.
    workload: StepWorkload
    step_time: StepTime
    #: Key of the recipe -> why it has this value.
    reasons: dict[str, str]

    @property
    def execution(self) -> ExecutionPlan:
        """As the run takes it."""
        return self.prediction.execution

    @property
    def fits(self) -> bool:
        """Whether it fits the limit it was made for."""
        return self.prediction.fits


def step_shape(rows: RowLengths, execution: ExecutionPlan) -> StepShape:
    """The heaviest that a run with this set-up must carry."""
    lengths, several = heaviest_micro_batch(rows, execution.micro_batch)
    longest, plan = rows.longest_evaluation, execution.evaluation
    again = max(1, min(plan.max_tokens // longest, rows.batch_size, plan.max_rows)) if longest else 0
    return StepShape(lengths=lengths, evaluation_lengths=(longest,) * again, accumulates=several)
