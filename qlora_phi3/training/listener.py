"""What a run tells while it goes on; who shows it is not known here."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from qlora_phi3.runfolder import RunFolder, append_metrics


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


class Listener(Protocol):
    """Someone who watches a run."""

    def say(self, line: str) -> None:
        """One fact, one line."""

    def warn(self, line: str) -> None:
        """Something a person should look at, one line."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        """How far a part of the work is; `done == total` ends it. `total` is None where it is not known."""

    def begin(self, first_step: int, total_steps: int) -> None:
        """Training starts after `first_step`."""

    def step(self, record: StepRecord) -> None:
        """An optimizer step is done."""

    def evaluated(self, record: EvalRecord) -> None:
        """An evaluation is done."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is on the disk."""


class Recorder:
    """Passes everything on to another listener, and keeps steps and evaluations in metrics.jsonl."""

    def __init__(self, listener: Listener, folder: RunFolder) -> None:
        self._listener = listener
        self._folder = folder
        self.say, self.warn, self.progress = listener.say, listener.warn, listener.progress
        self.begin, self.saved = listener.begin, listener.saved

    def step(self, record: StepRecord) -> None:
        """Write the step down, then show it."""
        append_metrics(self._folder, record.as_dict())
        self._listener.step(record)

    def evaluated(self, record: EvalRecord) -> None:
        """Write the evaluation down, then show it."""
        append_metrics(self._folder, record.as_dict())
        self._listener.evaluated(record)
