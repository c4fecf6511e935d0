"""What a run tells while it goes on; who shows it is not known here."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.units import format_count, format_gib


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step, as it stands in metrics.jsonl."""

    step: int
    epoch: float
    #: Mean negative log-likelihood over the step's supervised tokens, nats.
    loss: float
    token_accuracy: float
    learning_rate: float
    grad_norm: float | None
    rows: int
    tokens: int
    supervised_tokens: int
    step_seconds: float
    tokens_per_second: float
    #: Highest device memory allocated so far (CUDA), or highest resident memory of the process (CPU).
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": "train", **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """One evaluation, as it stands in metrics.jsonl."""

    step: int
    #: Mean negative log-likelihood over all supervised tokens of the held-out rows, nats.
    eval_loss: float
    eval_token_accuracy: float
    supervised_tokens: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": "eval", **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class OomRecord:
    """One out-of-memory that was survived, as it stands in metrics.jsonl."""

    #: The step it happened in; of an evaluation, the step it came after.
    step: int
    phase: Literal["training", "evaluation"]
    #: What was done before the batch was computed again: nothing but the cache emptied; micro-batches made smaller from here
    #: on; or, from here on, every layer recomputed with its input kept in the computer's memory; or the MLPs in tiles.
    remedy: Literal["again", "split", "offload", "tile"]
    #: Rows of the micro-batch, and their tokens without padding.
    rows: int
    tokens: int
    #: The layout it happened under, and that from here on.
    before: MicroBatchPlan
    after: MicroBatchPlan
    #: What this process had allocated on the card, and what was free there (None on a CPU).
    allocated_bytes: int | None
    free_bytes: int | None
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": "oom", **asdict(self)}

    def as_line(self) -> str:
        """For people."""
        where = f"Step {self.step}" if self.phase == "training" else f"Evaluation after step {self.step}"
        held = "" if self.allocated_bytes is None else f" with {format_gib(self.allocated_bytes)} allocated"
        done = {
            "again": "The cache is emptied and it is computed again",
            "split": f"It is computed again in micro-batches of at most {self.after.max_tokens:,} tokens, as are those to come",
            "offload": "It is computed again, as are those to come, with every layer recomputed from the computer's memory",
            "tile": "It is computed again, as are those to come, with the MLPs in tiles",
        }[self.remedy]
        rows = format_count(self.rows, "row")
        return f"{where}: memory ran out{held}, in {rows} of {self.tokens:,} tokens. {done}; nothing is lost."


#: `Reporter.progress` by itself: called with the activity, what is done of it, and the total (None: not known).
Progress = Callable[[str, int, int | None], None]


class Reporter(Protocol):
    """Someone who watches a run."""

    def info(self, line: str) -> None:
        """One fact, one line."""

    def warning(self, line: str) -> None:
        """Something a person should look at, one line."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        """How far a part of the work is; `done == total` ends it. `total` is None where it is not known."""

    def begin(self, first_step: int, total_steps: int, earlier: Sequence[float] = ()) -> None:
        """Training starts after `first_step`; `earlier` are the losses of the steps before, where they are known."""

    def step(self, record: StepRecord) -> None:
        """An optimizer step is done."""

    def evaluation(self, record: EvalRecord) -> None:
        """An evaluation is done."""

    def checkpoint_saved(self, checkpoint: Path) -> None:
        """A checkpoint is on the disk."""

    def oom(self, record: OomRecord) -> None:
        """Memory ran out, and the run goes on."""
