"""What a run reports while it trains: the records of metrics.jsonl, and the protocol of the objects that show them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.units import format_count, format_gib

#: Called with what is being done, how much is done, in parts too, and the total (None: not known). `done == total` ends it.
Progress = Callable[[str, float, int | None], None]
Phase = Literal["training", "evaluation"]
#: What is done about an out-of-memory error. "again": empty the cache and compute the batch again. The others also change all
#: later batches: "split" makes micro-batches smaller, "offload" recomputes every layer from inputs in the computer's memory,
#: "tile" computes the MLPs in tiles.
Remedy = Literal["again", "split", "offload", "tile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step."""

    kind: ClassVar[str] = "train"
    step: int
    epoch: float
    loss: float  #: Mean negative log-likelihood over the step's supervised tokens, nats.
    token_accuracy: float
    learning_rate: float
    grad_norm: float | None
    rows: int
    tokens: int
    supervised_tokens: int
    step_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int  #: Of the allocated GPU memory until now; on a CPU, of the process's resident memory.


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """One evaluation."""

    kind: ClassVar[str] = "eval"
    step: int
    eval_loss: float  #: Mean negative log-likelihood over all supervised tokens of the held-out rows, nats.
    eval_token_accuracy: float
    supervised_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OomRecord:
    """One out-of-memory error that the run recovered from."""

    kind: ClassVar[str] = "oom"
    step: int  #: The step that was computed; of an evaluation, the step it follows.
    phase: Phase
    remedy: Remedy
    rows: int  #: Of the micro-batch that failed.
    tokens: int  #: Of these rows, without padding.
    before: MicroBatchPlan  #: The plan that failed.
    after: MicroBatchPlan  #: The plan that is used from now on.
    allocated_bytes: int | None  #: At the failure, by torch's message; None on a CPU.
    free_bytes: int | None  #: On the GPU.
    reason: str

    def as_line(self) -> str:
        """The record in two sentences: where memory ran out, and what is done about it."""
        where = f"Step {self.step}" if self.phase == "training" else f"Evaluation after step {self.step}"
        rows = format_count(self.rows, "row")
        held = "" if self.allocated_bytes is None else f", with {format_gib(self.allocated_bytes)} allocated"
        remedy = {
            "again": "The batch is computed again with an empty cache; nothing is lost.",
            "split": f"It and all later batches use at most {self.after.max_tokens:,} tokens at once; nothing is lost.",
            "offload": "It and all later batches recompute every layer from the computer's memory; nothing is lost.",
            "tile": "It and all later batches compute the MLPs in tiles; nothing is lost.",
        }[self.remedy]
        return f"{where}: memory ran out in {rows} of {self.tokens:,} tokens{held}. {remedy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceRecord:
    """A step, or the evaluation after it, that diverged, and the return to the last good state."""

    kind: ClassVar[str] = "divergence"
    step: int
    reason: str
    good_step: int  #: The adapter and the optimizer are as after this step; the updates after it are undone.
    rows: tuple[str, ...]  #: Of the steps that diverged, as `file:row`; they are skipped. None in an evaluation.
    learning_rate_factor: float | None  #: Of the recipe's learning rate, from now on; None: the run ends.

    def as_line(self) -> str:
        """The record in a few sentences: what happened, and how the run goes on."""
        shown = ", ".join(self.rows[:4]) + (", ..." if len(self.rows) > 4 else "")
        skipped = f" {format_count(len(self.rows), 'row')} skipped ({shown})." if self.rows else ""
        rate = self.learning_rate_factor
        after = "" if rate is None else f" From now on the learning rate is {rate:g} of the recipe's."
        return f"Step {self.step} diverged: {self.reason}. Back to the adapter of step {self.good_step}.{skipped}{after}"


Record = StepRecord | EvalRecord | OomRecord | DivergenceRecord


def record_as_json(record: Record) -> dict[str, Any]:
    """A record as one line of metrics.jsonl holds it, its `kind` first."""
    return {"kind": record.kind, **asdict(record)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutline:
    """What is known of a run, or of what is left of a resumed one, before its first step."""

    total_steps: int
    epochs: float
    first_step: int = 0  #: Steps of earlier sessions.
    evaluations: int = 0  #: That this session makes.
    device: str = ""
    plan: str = ""  #: The execution plan, in words.
    predicted_bytes: int = 0  #: Of this process on the GPU, or of tensors on a CPU, at the peak; 0: not predicted.
    budget_bytes: int = 0  #: The most that it may take on the GPU; 0 on a CPU.
    step_seconds: float | None = None  #: By the cost model.
    evaluation_seconds: float = 0.0  #: By the cost model, or as the last one of an earlier session took; 0: not known.
    earlier: Sequence[Mapping[str, Any]] = ()  #: The records of earlier sessions, as in metrics.jsonl.


class Reporter(Protocol):
    """Shows or writes what a run reports."""

    def info(self, line: str) -> None:
        """Show one fact in one line."""

    def warning(self, line: str) -> None:
        """Show one line that a person should look at."""

    def progress(self, what: str, done: float, total: int | None) -> None:
        """Show how far a part of the work, `what` in words, is; `done == total` ends it, a total of None is not known."""

    def begin(self, outline: RunOutline) -> None:
        """Everything is loaded; what follows is the dry run, the evaluation before the first step, and the training."""

    def step(self, record: StepRecord) -> None:
        """An optimizer step is done."""

    def evaluation(self, record: EvalRecord) -> None:
        """An evaluation is done."""

    def checkpoint_saved(self, checkpoint: Path) -> None:
        """A checkpoint is on the disk."""

    def oom(self, record: OomRecord) -> None:
        """Memory ran out, and the run goes on."""

    def divergence(self, record: DivergenceRecord) -> None:
        """A step diverged, and the run went back to its last good state."""
