"""Ctrl-C: finish the step, save, stop; a second one stops at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_phi3.training.listener import Listener


class StopOnInterrupt(TrainerCallback):  # type: ignore[misc]
    """While entered, SIGINT asks the Trainer to save and stop after the step it is in."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.listener.warn("Ctrl-C: saving after this step. Press it again to stop at once.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end."""
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control
