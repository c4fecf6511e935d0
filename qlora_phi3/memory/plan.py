"""The plan of a run, the row lengths it must carry, and the reasons that `vram-check` and `--fit` show for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES, ExecutionPlan, plan_micro_batches
from qlora_phi3.memory.cost import StepKernels, StepSeconds, StepWorkload
from qlora_phi3.memory.report import MemoryReport
from qlora_phi3.memory.simulate import StepShape
from qlora_phi3.recipe.schema import Memory, Training
from qlora_phi3.units import format_gib


@dataclass(frozen=True, slots=True)
class RowLengths:
    """Tokens of every row that is trained on, longest first, of the longest held-out one (0: none), and of all held-out rows."""

    training: tuple[int, ...]
    longest_evaluation: int
    batch_size: int
    evaluation_tokens: int = 0
    #: The data could not be read: every row counts as long as a row may be.
    assumed: bool = False
    #: As of `RowSummary`.
    origin: str = ""
    problem: str = ""

    @property
    def longest(self) -> int:
        """Tokens of the longest training row."""
        return self.training[0]

    def typical_step(self) -> tuple[int, ...]:
        """As many rows as a step has, spread evenly over all lengths."""
        number, total = min(self.batch_size, len(self.training)), len(self.training)
        return tuple(self.training[(2 * index + 1) * total // (2 * number)] for index in range(number))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was chosen for a device, and why."""

    execution: ExecutionPlan
    memory: MemoryReport
    fits: bool
    kernels: StepKernels
    #: Of a typical step, as its time is.
    workload: StepWorkload
    seconds: StepSeconds
    #: Of an evaluation of all held-out rows.
    evaluation_seconds: float
    #: Key of the recipe -> why it has this value.
    reasons: dict[str, str]

    @property
    def step_seconds(self) -> float:
        """The time of a typical step."""
        return self.seconds.total


def read_lengths(training: Sequence[int], evaluation: Sequence[int], batch_size: int) -> RowLengths:
    """The lengths of tokenized rows, in tokens."""
    return RowLengths(tuple(sorted(training, reverse=True)), max(evaluation, default=0), batch_size, sum(evaluation))


def assume_lengths(max_length: int, batch_size: int) -> RowLengths:
    """The worst case: every row as long as a row may be."""
    return RowLengths((max_length,) * batch_size, max_length, batch_size, assumed=True)


def step_shape(rows: RowLengths, execution: ExecutionPlan) -> StepShape:
    """The heaviest micro-batches, of training and of evaluation, that a run with this plan can have.

    A packed micro-batch is taken as filled to its last token where a step has that many: with rows of the longest length, and a
    shorter one. The longest row is in the first one, so that a later one has the other rows at most.
    """
    step, plan = rows.training[: rows.batch_size], execution.micro_batch  # the longest rows that can meet in a step
    first, *others = (tuple(step[row] for row in group) for group in plan_micro_batches(step, plan))
    if plan.packing:
        first, others = _filled(step, plan.max_tokens), [_filled(step[1:], plan.max_tokens)] if others else []
    count: Callable[[Sequence[int]], int] = sum if plan.packing else lambda group: len(group) * max(group, default=0)
    later = max(others, key=count, default=())
    accumulates = bool(others) and count(later) >= count(first)
    longest, held_out = rows.longest_evaluation, execution.evaluation
    most = max(held_out.max_rows, rows.batch_size) if held_out.packing else held_out.max_rows
    num_held_out = max(1, min(held_out.max_tokens // longest, most)) if longest else 0
    return StepShape(
        lengths=max(first, later, key=count),
        evaluation_lengths=(longest,) * num_held_out,
        accumulates=accumulates,
        later_lengths=() if accumulates else later,
    )


def _filled(rows: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    """A packed micro-batch of as many tokens as it can have of these rows, longest first."""
    num_full, rest = divmod(max(rows[0], min(max_tokens, sum(rows))), rows[0])
    return (rows[0],) * num_full + ((rest,) if rest else ())


def describe_kind(execution: ExecutionPlan) -> str:
    """What a plan does with activations, in a few words."""
    every, tile = execution.checkpoint_every, execution.mlp_tile_tokens
    recomputed = {0: "no recomputation", 1: "recomputing all layers"}.get(every, f"recomputing one layer in {every}")
    kept = " but their attention" if execution.keep_attention and every else ""
    offloaded = ", offloading" if execution.activation_offloading else ""
    return f"{recomputed}{kept}{offloaded}{f', MLPs in tiles of {tile:,} tokens' if tile else ''}"


def describe_plan(execution: ExecutionPlan) -> str:
    """An execution plan in one line."""
    kernels = ", fused kernels" if execution.fused_kernels else ""
    return f"{execution.micro_batch.max_tokens:,} tokens at once, {describe_kind(execution)}, {execution.optim}{kernels}"


def explain_choices(
    training: Training,
    memory: Memory,
    execution: ExecutionPlan,
    rows: RowLengths,
    refused: Mapping[ExecutionPlan, int],
    limit_bytes: int,
) -> dict[str, str]:
    """Key of the recipe -> why the plan gives it this value.

    Args:
        refused: kinds of plan that would be faster and do not fit, and what each would need on the GPU, in bytes.
        limit_bytes: most that may be predicted on the GPU.
    """
    every, tile = execution.checkpoint_every, execution.mlp_tile_tokens
    num_passes = len(plan_micro_batches(rows.typical_step(), execution.micro_batch))
    if num_passes == 1:
        micro_batch = "the complete optimizer step in one forward pass"
    elif execution.micro_batch.max_tokens <= rows.longest:
        micro_batch = "the longest row alone; more would gain under 2 %, not fit, or need more recomputation"
    else:
        micro_batch = f"{num_passes} forward passes a step; more tokens at once would gain under 2 % or not fit"
    checkpointing = "saves memory" if every else "every activation fits"
    if tile and not every:
        checkpointing = "no layer is recomputed, only the MLPs (mlp_tile_tokens)"
    every_n = f"recomputing one layer in {every} saves enough memory" if every > 1 else "all layers: least memory"
    if refused:
        kind, needed = min(refused.items(), key=lambda item: item[1])
        every_n = (
            f"{every_n}; {describe_kind(kind)} would need about {format_gib(needed)} for the longest row alone, "
            f"and {format_gib(limit_bytes)} are available"
        )
    mlp_tile = "not needed"
    if tile and every == 1:
        mlp_tile = "the last resort: without it the longest row does not fit"
    elif tile:
        mlp_tile = "the MLPs of all layers are computed twice; nothing as fast fits without"
    where = "in host memory" if execution.activation_offloading else "on the GPU"
    kept = f"computed once and kept {where}" if execution.keep_attention else "keeping it would gain under 2 % or not fit"
    paged = "its state can leave a full GPU; otherwise it is as fast as adamw_8bit"
    offloading = "recomputation alone does not save enough memory" if execution.activation_offloading else "not needed"
    logits_tile = "the fastest size" if execution.logits_tile_bytes >= DEFAULT_LOGITS_TILE_BYTES else "less memory"
    choices = {
        "micro_batch_tokens": (training.micro_batch_size or memory.micro_batch_tokens != "auto", micro_batch),
        "gradient_checkpointing": (training.gradient_checkpointing != "auto", checkpointing),
        "checkpoint_every_n_layers": (memory.checkpoint_every_n_layers != "auto", every_n),
        "keep_attention": (memory.keep_attention != "auto", kept),
        "activation_offloading": (training.activation_offloading is execution.activation_offloading, offloading),
        "optim": (training.optim != "auto", paged if execution.optim.startswith("paged") else "its state fits"),
        "logits_tile": (memory.logits_tile != "auto", logits_tile),
        "mlp_tile_tokens": (memory.mlp_tile_tokens != "auto", mlp_tile),
    }
    return {key: "the recipe sets it" if pinned else reason for key, (pinned, reason) in choices.items()}
