"""What a run looks like on the terminal while it goes on; plain lines where the output is no terminal."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qlora_phi3.training.listener import EvalRecord, OomRecord, StepRecord

#: Heights of the loss curve's characters.
BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 24
#: Seconds between two plain lines about the same part of the work.
PLAIN_EVERY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Cadence:
    """Which steps get a line of their own, as [training] logging_strategy and logging_steps say."""

    strategy: str
    #: Steps between lines; below 1 a share of all steps.
    steps: float

    def shows(self, step: int, epoch: float, total: int) -> bool:
        """Whether this step is one of them."""
        if self.strategy == "no":
            return False
        if self.strategy == "epoch":
            return math.isclose(epoch, round(epoch), abs_tol=1e-9) or step == total
        every = math.ceil(self.steps * total) if self.steps < 1 else int(self.steps)
        return step % every == 0 or step in (1, total)


class View:
    """Shows a run: facts above, one progress line below (terminal), or lines only."""

    def __init__(self, console: Console, errors: Console, cadence: Cadence, progress: Progress | None) -> None:
        self._console = console
        self._errors = errors
        self._cadence = cadence
        self._bar = progress
        self._tasks: dict[str, TaskID] = {}
        self._spoken: dict[str, float] = {}
        self._losses: list[float] = []
        self._training: TaskID | None = None
        self._total = 0
        self._began = (time.perf_counter(), 0)

    def say(self, line: str) -> None:
        """Print a fact."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        """Print what should be looked at, on stderr."""
        self._errors.print(f"Note: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Move a bar, or say now and then how far it is."""
        finished = total is not None and done >= total
        if self._bar is None:
            self._speak(what, done, total, finished)
            return
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total, figures="")
        self._bar.update(self._tasks[what], completed=done, total=total)
        if finished:
            self._bar.remove_task(self._tasks.pop(what))

    def _speak(self, what: str, done: int, total: int | None, finished: bool) -> None:
        now = time.perf_counter()
        if what not in self._spoken:
            self._spoken[what] = now
            self.say(f"{what} ...")
        elif not finished and now - self._spoken[what] > PLAIN_EVERY_SECONDS:
            self._spoken[what] = now
            self.say(f"{what}: {done:,} of {total:,}" if total else f"{what}: {done:,}")
        if finished:
            self._spoken.pop(what)

    def begin(self, first_step: int, total_steps: int) -> None:
        """Open the training bar."""
        self._total = total_steps
        self._began = (time.perf_counter(), first_step)
        if self._bar is not None:
            self._training = self._bar.add_task("Training", total=total_steps, completed=first_step, figures="")

    def step(self, record: StepRecord) -> None:
        """Move the training bar; a line of its own where the recipe's cadence says so and there is no bar."""
        self._losses.append(record.loss)
        figures = f"loss {record.loss:.4f}  {record.tokens_per_second:,.0f} tokens/s"
        if self._bar is not None and self._training is not None:
            self._bar.update(self._training, completed=record.step, figures=f"{figures}  {draw_curve(self._losses)}")
        elif self._cadence.shows(record.step, record.epoch, self._total):
            self.say(f"step {record.step}/{self._total}  {figures}  {self._time_left(record.step)} left")

    def _time_left(self, step: int) -> str:
        started, first = self._began
        seconds = (time.perf_counter() - started) / max(1, step - first) * (self._total - step)
        return format_duration(seconds)

    def evaluated(self, record: EvalRecord) -> None:
        """Print the held-out loss."""
        when = "Before training" if record.step == 0 else f"After step {record.step}"
        self.say(f"{when}: held-out loss {record.eval_loss:.4f}, token accuracy {record.eval_token_accuracy:.1%}")

    def saved(self, checkpoint: Path) -> None:
        """Print where a checkpoint lies."""
        self.say(f"Saved {checkpoint}")

    def ran_out(self, record: OomRecord) -> None:
        """Print that memory ran out, and what was done."""
        self.warn(record.as_line())

    def finish(self, steps: int, before: float | None, after: float | None, seconds: float, adapter: Path) -> None:
        """Print the end of a run: the curve, before and after, and where the adapter is."""
        if self._losses:
            self.say(f"Training loss  {draw_curve(self._losses)}  {self._losses[0]:.4f} -> {self._losses[-1]:.4f}")
        if before is not None and after is not None:
            self.say(f"Held-out loss  {before:.4f} -> {after:.4f}")
        self.say(f"Done: {steps} steps in {format_duration(seconds)}. The adapter: {adapter}")


@contextmanager
def open_view(cadence: Cadence, *, plain: bool) -> Iterator[View]:
    """A view on this terminal; plain lines where it is none, or `plain` asks for them."""
    console, errors = Console(), Console(stderr=True)
    if plain or not console.is_terminal:
        yield View(console, errors, cadence, None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield View(console, progress.console, cadence, progress)


def draw_curve(losses: list[float]) -> str:
    """The losses as a line of bars, averaged into at most `CURVE_WIDTH` of them; highest loss, highest bar."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    width = min(CURVE_WIDTH, len(finite))
    if not width:
        return ""
    edges = [round(index * len(finite) / width) for index in range(width + 1)]
    means = [sum(finite[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def format_duration(seconds: float) -> str:
    """Seconds as people read them: 0:07, 12:30, 3:05:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
