"""What watches a training run: losses and gradients that are not finite, Ctrl-C, slow steps, and the writer of metrics.jsonl."""

import math
import platform
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_phi3.errors import UserError
from qlora_phi3.reporter import EvalRecord, OomRecord, Record, Reporter, StepRecord, record_as_json
from qlora_phi3.runfolder import RunFolder, append_metrics, read_metrics


class DivergedError(UserError):
    """The run cannot learn any more; the adapter of the last checkpoint is usable."""


def check_loss(loss: float, step: int) -> None:
    """Raise DivergedError at a loss that is not finite, before the optimizer writes it into the weights."""
    if not math.isfinite(loss):
        hint = "Lower [training] learning_rate or max_grad_norm and continue from the last checkpoint in a new run."
        raise DivergedError(f"The loss of step {step} is {loss}.", hint)


class GradientGuard(TrainerCallback):  # type: ignore[misc]
    """Checks the gradients before the optimizer uses them; in fp16 the Trainer has unscaled them by then.

    `scaled`: fp16's GradScaler is in use, which skips a step whose gradients overflow; there such a norm is no error.
    """

    def __init__(self, *, scaled: bool) -> None:
        self.scaled = scaled
        self.found_gradient = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Raise DivergedError where the norm of the gradients is not finite, or zero at the first step that is not skipped."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = float(get_total_norm(gradients)) if gradients else 0.0
        step = state.global_step + 1
        if not math.isfinite(norm):
            if self.scaled:
                return
            raise DivergedError(
                f"The gradient of step {step} is {norm}.", "Lower [training] learning_rate and start a new run."
            )
        if norm == 0 and not self.found_gradient:
            hint = "Check that the rows hold answers to learn and that [lora] reaches the model."
            raise DivergedError(f"The gradient of step {step} is exactly zero: nothing would be learned.", hint)
        self.found_gradient = True


class StopOnRequest(TrainerCallback):  # type: ignore[misc]
    """Makes the Trainer save and stop after the current step, once `requested` is set."""

    requested = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Request a checkpoint and the end of training."""
        if self.requested:
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def stop_on_interrupt(reporter: Reporter) -> Iterator[StopOnRequest]:
    """Let SIGINT and SIGTERM set `requested` of the callback that this gives; a second signal raises KeyboardInterrupt."""
    callback = StopOnRequest()

    def request_stop(number: int, frame: FrameType | None) -> None:
        if callback.requested:
            raise KeyboardInterrupt
        callback.requested = True
        if number == signal.SIGINT:
            reporter.warning("Ctrl-C: saving after this step. Press it again to stop at once.")
        else:
            reporter.warning("SIGTERM: saving after this step. Send it again to stop at once.")

    is_main = threading.current_thread() is threading.main_thread()  # the only thread that may set handlers
    signals = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    handlers_before = {number: signal.signal(number, request_stop) for number in signals}
    try:
        yield callback
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)


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

    Returns:
        Bytes this process may allocate, including what it has already; None where there is no limit.
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
        if driver_spills():
            return (
                f"This step took {factor:.0f} times as long as those before it: the driver has probably moved GPU memory into "
                "the computer's memory, because another program took it. Close other programs that use the GPU."
            )
        return (
            f"This step took {factor:.0f} times as long as those before it: another program is probably computing on the GPU, "
            "or the GPU slows down to cool. Close other programs that use the GPU."
        )


class MetricsWriter(TrainerCallback):  # type: ignore[misc]
    """A reporter that writes every record to metrics.jsonl and passes everything on to another reporter."""

    def __init__(self, reporter: Reporter, folder: RunFolder) -> None:
        self._reporter, self._folder = reporter, folder
        self.info, self.warning, self.progress = reporter.info, reporter.warning, reporter.progress
        self.begin, self.checkpoint_saved = reporter.begin, reporter.checkpoint_saved

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the first and the last step, and the losses that earlier sessions of the run wrote."""
        losses = [record["loss"] for record in read_metrics(self._folder.metrics) if record["kind"] == StepRecord.kind]
        self.begin(state.global_step, state.max_steps, losses)

    def step(self, record: StepRecord) -> None:
        """Write the step, then pass it on."""
        self._write(record)
        self._reporter.step(record)

    def evaluation(self, record: EvalRecord) -> None:
        """Write the evaluation, then pass it on."""
        self._write(record)
        self._reporter.evaluation(record)

    def oom(self, record: OomRecord) -> None:
        """Write the out-of-memory error, then pass it on."""
        self._write(record)
        self._reporter.oom(record)

    def _write(self, record: Record) -> None:
        append_metrics(self._folder, record_as_json(record))
