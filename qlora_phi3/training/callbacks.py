"""Training that has gone wrong without an error: a loss that is no number, or gradients that are all zero.

Ctrl-C, and what asks a program to end (SIGTERM): finish the step, save, stop; a second one stops at once.

Windows: the driver spills into the computer's memory instead of saying no, and a step takes many times as long.

NVIDIA's drivers for Windows (and so under WSL) page a card's memory out rather than fail an allocation. A run that outgrows
its card then neither stops nor gets its out-of-memory, it crawls. So it is allowed no more than is free on the card when it
starts: PyTorch's allocator raises, and `oom.py` does the rest. Other programs can still push it out later, which shows in the
time of a step.
"""

import math
import platform
import signal
import sys
import threading
from collections import deque
from collections.abc import Sequence
from statistics import median
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_phi3.errors import UserError
from qlora_phi3.reporter import EvalRecord, OomRecord, Reporter, StepRecord
from qlora_phi3.runfolder import RunFolder, append_metrics, read_metrics


class DivergedError(UserError):
    """The run cannot go on learning; the adapter of the last checkpoint is sound."""


def check_loss(loss: float, step: int) -> None:
    """Refuse a loss that is not finite, before the optimizer makes the weights the same."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"The loss of step {step} is {loss}.",
            "Lower [training] learning_rate or max_grad_norm and go on from the last checkpoint in a new run.",
        )


class GradientGuard(TrainerCallback):  # type: ignore[misc]
    """Looks at the gradients right before the optimizer uses them.

    Args:
        scaled: fp16's GradScaler is in use; it skips a step whose gradients overflow, so that they are not looked at here.
    """

    def __init__(self, *, scaled: bool) -> None:
        self.scaled = scaled
        self.checked = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Stop before a step that would poison the weights, and at the first one that would teach nothing."""
        if self.scaled:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = float(get_total_norm(gradients)) if gradients else 0.0
        step = state.global_step + 1
        if not math.isfinite(norm):
            raise DivergedError(
                f"The gradient of step {step} is {norm}.", "Lower [training] learning_rate and start a new run."
            )
        if norm == 0 and not self.checked:
            raise DivergedError(
                f"The gradient of step {step} is exactly zero: nothing would be learned.",
                "Check that the rows hold answers to learn and that [lora] reaches the model.",
            )
        self.checked = True


class StopOnInterrupt(TrainerCallback):  # type: ignore[misc]
    """While entered, SIGINT and SIGTERM ask the Trainer to save and stop after the step it is in."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._cached) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _cached(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        what, again = ("Ctrl-C", "Press it again") if number == signal.SIGINT else ("SIGTERM", "Send it again")
        self.reporter.warning(f"{what}: saving after this step. {again} to stop at once.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end."""
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control


#: Left free for what the allocator does not count, the kernels CUDA loads when they are first used. Not measured.
SPARE_BYTES = 128 * 2**20


#: Steps that a step is compared with, how many there must be, and how many times slower is worth a warning.
REMEMBERED_STEPS = 20


FEWEST_STEPS = 5


SUSPICIOUS_FACTOR = 5.0


def driver_spills() -> bool:
    """Whether this system's driver moves a card's memory out where it should say no: Windows, and WSL, which uses its driver."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def cap_to_free_memory(device: torch.device) -> int | None:
    """Let this process allocate no more than is free on its card now, where the driver would spill.

    Elsewhere the driver says no by itself, and a cap would only keep the run from memory that another program gives back.

    Returns:
        Bytes this process may hold, what it holds already included; None where there is no cap.
    """
    if device.type != "cuda" or not driver_spills():
        return None
    free, total = torch.cuda.mem_get_info(device)
    room = max(0, free - SPARE_BYTES) + torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    return room


class SpillWatch:
    """Compares each step with those before it, and says once that one took many times as long."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=REMEMBERED_STEPS)  # seconds, seconds a token
        self._told = False

    def look(self, tokens: int, seconds: float) -> str | None:
        """The line to show after a step of so many tokens, or None.

        A short batch takes more time a token and a long one more time, both rightly: only what exceeds both counts.
        """
        measured = (seconds, seconds / max(1, tokens))
        usual = [median(column) for column in zip(*self._steps, strict=True)]
        count = len(self._steps)
        self._steps.append(measured)
        if self._told or count < FEWEST_STEPS:
            return None
        factor = min(now / before for now, before in zip(measured, usual, strict=True))
        if factor <= SUSPICIOUS_FACTOR:
            return None
        self._told = True
        cause = (
            "the driver has probably moved memory of the card into the computer's, because another program took it"
            if driver_spills()
            else "another program is probably computing on the card, or the card slows down to cool"
        )
        return f"This step took {factor:.0f} times as long as those before it: {cause}. Close what else uses the card."


class MetricsWriter:
    """Passes everything on to another listener, and keeps what was measured in metrics.jsonl."""

    def __init__(self, reporter: Reporter, folder: RunFolder) -> None:
        self._listener = reporter
        self._folder = folder
        self.info, self.warning, self.progress = reporter.info, reporter.warning, reporter.progress
        self.checkpoint_saved = reporter.checkpoint_saved

    def begin(self, first_step: int, total_steps: int, earlier: Sequence[float] = ()) -> None:
        """Add the losses that earlier sessions of the run wrote down."""
        losses = [record["loss"] for record in read_metrics(self._folder) if record["kind"] == "train"]
        self._listener.begin(first_step, total_steps, earlier or losses)

    def step(self, record: StepRecord) -> None:
        """Write the step down, then show it."""
        append_metrics(self._folder, record.as_dict())
        self._listener.step(record)

    def evaluation(self, record: EvalRecord) -> None:
        """Write the evaluation down, then show it."""
        append_metrics(self._folder, record.as_dict())
        self._listener.evaluation(record)

    def oom(self, record: OomRecord) -> None:
        """Write the out-of-memory down, then show it."""
        append_metrics(self._folder, record.as_dict())
        self._listener.oom(record)
