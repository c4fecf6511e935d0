"""What watches a run: Ctrl-C, the time since a checkpoint, slow steps, the held-out loss, and the writer of metrics.jsonl."""

import math
import platform
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_phi3.reporter import Record, Reporter, record_as_json
from qlora_phi3.runfolder import RunFolder, append_metrics
from qlora_phi3.training.divergence import copy_to_memory
from qlora_phi3.training.processes import count_processes, own_rank

AnyRecord = TypeVar("AnyRecord", bound=Record)

#: The file of a checkpoint with the best weights.
BEST = "best.pt"


class StopOnRequest:
    """Makes `Phi3Trainer` save and stop after the current step, once `requested` is set."""

    requested = False
    is_signalled = False  #: The signal came to this process; several processes stop once all of them know.


@contextmanager
def stop_on_interrupt(reporter: Reporter, callback: StopOnRequest) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP set `requested` of the callback; a second one raises KeyboardInterrupt.

    SIGHUP, of a terminal that closes, stays ignored where it is (`nohup`). A terminal often sends it several times, and the
    system's SIGTERM may follow: only a second SIGINT or SIGTERM stops at once.
    """

    def request_stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if callback.is_signalled:
            if name == "SIGHUP":
                return
            raise KeyboardInterrupt
        callback.is_signalled, callback.requested = True, callback.requested or count_processes() == 1
        if number == signal.SIGINT:
            reporter.warning("Ctrl-C: saving, then stopping. Press it again to stop at once.")
        elif count_processes() == 1:  # launchers send SIGTERM where another process has ended, which is then reported
            reporter.warning(f"{name}: saving, then stopping. Send SIGTERM to stop at once.")

    is_main = threading.current_thread() is threading.main_thread()  # the only thread that may set handlers
    names = ("SIGINT", "SIGTERM", "SIGHUP") if is_main else ()  # Windows has no SIGHUP
    signals = [signal.Signals[name] for name in names if hasattr(signal, name)]
    if is_main and signal.SIG_IGN in map(signal.getsignal, signals[2:]):  # `nohup`
        signals = signals[:2]
    handlers_before = {number: signal.signal(number, request_stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in handlers_before.items():
            if signal.getsignal(number) is request_stop:
                signal.signal(number, handler)


class SaveByTime(TrainerCallback):  # type: ignore[misc]
    """Requests a checkpoint at the end of a step that is `minutes` or more after the last checkpoint; 0: never."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock, self._saved = minutes * 60, clock, clock()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count from the start of this session."""
        self._saved = self._clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Request a checkpoint where one is due."""
        if self._seconds and self._clock() - self._saved >= self._seconds:
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count from here."""
        self._saved = self._clock()


#: Kept free for the kernels that CUDA loads at their first use, which PyTorch's allocator does not count. Not measured.
SPARE_BYTES = 128 * 2**20
#: Steps that a step is compared with, the fewest of them, and how many times slower a step must be for a warning.
COMPARED_STEPS, FEWEST_STEPS, SUSPICIOUS_FACTOR = 20, 5, 5.0


def driver_spills() -> bool:
    """Whether the GPU's driver moves GPU memory into the computer's memory instead of failing: Windows and WSL."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def cap_to_free_memory(device: torch.device) -> int | None:
    """Limit this process to the GPU memory that is free now, where the driver would spill.

    A run that spills does not fail, it becomes many times slower. Under the limit PyTorch's allocator raises, and `oom.py`
    recovers. Elsewhere a limit would only keep memory from the run that other programs free later.

    Returns the bytes that this process may allocate, including what it has already; None where there is no limit.
    """
    if device.type != "cuda" or not driver_spills():
        return None
    free, total = torch.cuda.mem_get_info(device)
    limit_bytes = max(0, free - SPARE_BYTES) + torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
    return limit_bytes


class SpillWatch:
    """Compares each step with the steps before it, and warns once of one that took many times as long."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=COMPARED_STEPS)  # seconds, seconds per token
        self._warned = False

    def observe(self, tokens: int, seconds: float) -> str | None:
        """Add a step; returns the warning to show, or None.

        A short batch takes more time per token and a long one more time: a step is slow if it exceeds both medians.
        """
        current, earlier = (seconds, seconds / max(1, tokens)), list(self._steps)
        self._steps.append(current)
        if self._warned or len(earlier) < FEWEST_STEPS:
            return None
        factor = min(now / median(usual) for now, *usual in zip(current, *earlier, strict=True))
        if factor <= SUSPICIOUS_FACTOR:
            return None
        self._warned = True
        return (
            f"This step took {factor:.0f} times as long as those before it. Close other programs that use the GPU: they take its "
            "time, and on Windows its driver moves memory that they take into the computer's memory."
        )


class MetricsWriter:
    """A reporter that writes every record to metrics.jsonl (in process 0), and passes everything on to another reporter."""

    def __init__(self, reporter: Reporter, folder: RunFolder) -> None:
        self._folder, self.is_writer = folder, own_rank() == 0
        self.info, self.warning, self.progress = reporter.info, reporter.warning, reporter.progress
        self.begin, self.checkpoint_saved = reporter.begin, reporter.checkpoint_saved
        self.step, self.evaluation = self._written(reporter.step), self._written(reporter.evaluation)
        self.oom, self.divergence = self._written(reporter.oom), self._written(reporter.divergence)

    def _written(self, show: Callable[[AnyRecord], None]) -> Callable[[AnyRecord], None]:
        """A function that writes a record, then shows it."""

        def write(record: AnyRecord) -> None:
            if self.is_writer:
                append_metrics(self._folder, record_as_json(record))
            show(record)

        return write


class EarlyStopping(TrainerCallback):  # type: ignore[misc]
    """Keeps the best adapter of a run, and ends the run where the held-out loss no longer falls.

    The adapter with the lowest loss so far lies in the computer's memory (4 bytes a trained parameter), copied as `divergence.py`
    copies its last good state. A checkpoint holds it in BEST with all that decides, so that a resumed run ends as one that was
    not interrupted. All processes of a run measure the same loss and decide alike. The evaluation before the first step does not
    count: an adapter that has learned nothing is never the best.

    `patience`: evaluations without a lower loss; inf keeps the best and never ends the run; None does nothing.
    """

    def __init__(self, model: nn.Module, patience: float | None) -> None:
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._patience, self._weights = patience, list[Tensor]()
        #: Lowest held-out loss in nats per token, its step, and the evaluations since then.
        self._best_loss, self._best_step, self._num_since = math.inf, 0, 0

    @property
    def is_over(self) -> bool:
        """Whether training has to end."""
        return self._patience is not None and self._num_since >= self._patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Copy the weights where they are the best so far; end training after too many evaluations without a lower loss."""
        if self._patience is None or not state.global_step:
            return control
        loss, self._num_since = kwargs["metrics"]["eval_loss"], self._num_since + 1
        if loss < self._best_loss:
            self._weights = [copy_to_memory(weight, before) for weight, before in zip_longest(self._trained, self._weights)]
            self._best_loss, self._best_step, self._num_since = loss, state.global_step, 0
        control.should_training_stop |= self.is_over
        return control

    @torch.no_grad()
    def restore_best(self, state: TrainerState) -> dict[str, Any]:
        """Write the best weights into the model, at the end of a run.

        Returns why the run ended where it did and the loss of the adapter that it saves, for report.json; {} without evaluations.
        """
        if not self._weights:
            return {}
        for parameter, weight in zip(self._trained, self._weights, strict=True):
            parameter.copy_(weight)
        is_early = self.is_over and state.global_step < state.max_steps
        ended = f"{'stopped early after' if is_early else 'ended with'} step {state.global_step}; best step {self._best_step}"
        best = {"reason": ended, "best_step": self._best_step, "best_loss": self._best_loss}
        return {"early_stopping": best, "eval_loss_after": self._best_loss}

    def save(self, checkpoint: Path) -> None:
        """Write the best weights, and what decides, into a checkpoint."""
        if self._patience is not None:
            counters = (self._best_loss, self._best_step, self._num_since)
            torch.save({"counters": counters, "weights": self._weights}, checkpoint / BEST)

    def load(self, checkpoint: Path) -> None:
        """Read what `save` wrote; with `load_best_model_at_end` alone, versions before this one wrote nothing."""
        if self._patience is not None and (checkpoint / BEST).is_file():
            saved = torch.load(checkpoint / BEST, map_location="cpu", weights_only=True)
            (self._best_loss, self._best_step, self._num_since), self._weights = saved["counters"], saved["weights"]
