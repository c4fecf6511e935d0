"""Ctrl-C, and what asks a program to end (SIGTERM): finish the step, save, stop; a second one stops at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_phi3.training.listener import Listener


class StopOnInterrupt(TrainerCallback):  # type: ignore[misc]
    """While entered, SIGINT and SIGTERM ask the Trainer to save and stop after the step it is in."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        what, again = ("Ctrl-C", "Press it again") if number == signal.SIGINT else ("SIGTERM", "Send it again")
        self.listener.warn(f"{what}: saving after this step. {again} to stop at once.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end."""
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control
