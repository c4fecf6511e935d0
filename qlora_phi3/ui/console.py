"""What a run looks like on the terminal while it goes on; plain lines where the output is no terminal.

A line on stderr that says what is being worked on, and goes away at the end.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from qlora_phi3.errors import Interrupted
from qlora_phi3.reporter import EvalRecord, OomRecord, StepRecord
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.units import format_count

if TYPE_CHECKING:
    from rich.progress import Progress

#: Heights of the loss curve's characters.
BARS = "▁▂▃▄▅▆▇█"


CURVE_WIDTH = 24


#: A terminal needs this many columns to show the curve beside the figures, and this many for the speed.
WIDE, NARROW = 110, 70


TRAINING = "Training"


#: Seconds between two plain lines about the same part of the work.
PLAIN_EVERY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class LogInterval:
    """Which steps get a line of their own, as [training] logging_strategy and logging_steps say; and which are warm-up."""

    strategy: str
    #: Steps between lines; below 1 a share of all steps.
    steps: float
    #: Steps up to the learning rate; below 1 a share of all steps.
    warmup_steps: float = 0

    def shows(self, step: int, epoch: float, total: int) -> bool:
        """Whether this step is one of them."""
        if self.strategy == "no":
            return False
        if self.strategy == "epoch":
            return math.isclose(epoch, round(epoch), abs_tol=1e-9) or step == total
        return step % _whole(self.steps, total) == 0 or step in (1, total)

    def only_warms_up(self, total: int) -> bool:
        """Whether the learning rate is never reached in so many steps."""
        return _whole(self.warmup_steps, total) >= total


def _whole(steps: float, total: int) -> int:
    return math.ceil(steps * total) if steps < 1 else int(steps)


@dataclass(slots=True)
class EtaEstimator:
    """When a part of the work began and how far it was then, from which its end is estimated."""

    began: float
    first: int
    #: When it will end, by time.perf_counter(); None while nothing tells.
    ends: float | None = None

    def reach(self, done: int, total: int | None) -> None:
        """Estimate the end anew."""
        self.ends = None
        if total is not None and self.first < done < total:
            now = time.perf_counter()
            self.ends = now + (now - self.began) / (done - self.first) * (total - done)

    def seconds_left(self) -> float | None:
        """Until the end; None while nothing tells."""
        return None if self.ends is None else max(0.0, self.ends - time.perf_counter())


class ConsoleReporter:
    """Shows a run: facts above, one progress line below (terminal), or lines only."""

    def __init__(self, console: Console, errors: Console, log_interval: LogInterval, progress: Progress | None) -> None:
        self._console = console
        self._errors = errors
        self._log_interval = log_interval
        self._bar = progress
        self._tasks: dict[str, TaskID] = {}
        self._paces: dict[str, EtaEstimator] = {}
        self._spoken: dict[str, float] = {}
        self._losses: list[float] = []
        self._total = 0
        self._step = 0
        self._saved: tuple[int, RunFolder] | None = None

    def info(self, line: str) -> None:
        """Print a fact."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def warning(self, line: str) -> None:
        """Print what should be looked at, on stderr."""
        self._errors.print(f"Note: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Move a bar, or say now and then how far it is."""
        finished = total is not None and done >= total
        if self._bar is None:
            self._speak(what, done, total, finished)
            return
        if what not in self._tasks:
            self._open(what, done, total)
        self._move(what, done, total)
        if finished:
            self._bar.remove_task(self._tasks.pop(what))
        if TRAINING in self._tasks and self._console.width < WIDE:  # both lines together would be cut
            self._bar.update(self._tasks[TRAINING], visible=finished)

    def _speak(self, what: str, done: int, total: int | None, finished: bool) -> None:
        now = time.perf_counter()
        if what not in self._spoken:
            self._spoken[what] = now
            self.info(f"{what} ...")
        elif not finished and now - self._spoken[what] > PLAIN_EVERY_SECONDS:
            self._spoken[what] = now
            self.info(f"{what}: {done:,} of {total:,}" if total else f"{what}: {done:,}")
        if finished:
            self._spoken.pop(what)

    def _open(self, what: str, done: int, total: int | None) -> None:
        self._paces[what] = EtaEstimator(time.perf_counter(), done)
        if self._bar is not None:
            task = self._bar.add_task(what, total=total, completed=done, figures="", pace=self._paces[what])
            self._tasks[what] = task

    def _move(self, what: str, done: int, total: int | None, figures: str = "") -> None:
        self._paces[what].reach(done, total)
        if self._bar is not None:
            self._bar.update(self._tasks[what], completed=done, total=total, figures=figures)

    def begin(self, first_step: int, total_steps: int, earlier: Sequence[float] = ()) -> None:
        """Open the training bar; `earlier` are the losses of the steps that an earlier session took."""
        self._total, self._step = total_steps, first_step
        self._losses = list(earlier)
        if self._log_interval.only_warms_up(total_steps):
            self.warning(
                f"The whole run, {format_count(total_steps, 'step')}, is warm-up: the learning rate is never reached. "
                "Write [training] warmup_steps = 0."
            )
        self._open(TRAINING, first_step, total_steps)

    def step(self, record: StepRecord) -> None:
        """Move the training bar; a line of its own where the recipe's cadence says so and there is no bar."""
        self._losses.append(record.loss)
        self._step = record.step
        loss, speed = f"loss {record.loss:.4f}", f"{record.tokens_per_second:,.0f} tokens/s"
        width = self._console.width
        shown = [loss, *([speed] if width >= NARROW else []), *([draw_curve(self._losses)] if width >= WIDE else [])]
        self._move(TRAINING, record.step, self._total, "  ".join(shown))
        if self._bar is None and self._log_interval.shows(record.step, record.epoch, self._total):
            left = format_duration(self._paces[TRAINING].seconds_left() or 0.0)
            self.info(f"step {record.step}/{self._total}  {loss}  {speed}  {left} left")

    def evaluation(self, record: EvalRecord) -> None:
        """Print the held-out loss."""
        when = "Before training" if record.step == 0 else f"After step {record.step}"
        self.info(f"{when}: held-out loss {record.eval_loss:.4f}, token accuracy {record.eval_token_accuracy:.1%}")

    def checkpoint_saved(self, checkpoint: Path) -> None:
        """Print where a checkpoint lies."""
        self._saved = self._step, RunFolder(checkpoint.parent.parent)
        self.info(f"Saved {checkpoint}")

    def oom(self, record: OomRecord) -> None:
        """Print that memory ran out, and what was done."""
        self.warning(record.as_line())

    def interruption(self, resumed: RunFolder | None) -> Interrupted:
        """What a Ctrl-C that stopped everything at once has cost, and how to go on.

        Args:
            resumed: the run that this session went on with.
        """
        if not self._total and resumed is None:
            return Interrupted("Stopped before the first step: nothing is lost.", "Start again with the same command.")
        step, folder = self._saved or (None, resumed)
        if folder is None:
            return Interrupted(
                f"Stopped at once after step {self._step} of {self._total}, before any checkpoint was saved.",
                "Start again with the same command.",
            )
        where = f"after step {self._step} of {self._total}" if self._total else "before the first step"
        kept = f"; the newest checkpoint is of step {step}" if step is not None and step != self._step else ""
        return Interrupted(
            f"Stopped at once {where}{kept}.", f"Go on with: qlora-phi3 run {folder.recipe} --resume {folder.path}"
        )

    def finish(self, steps: int, before: float | None, after: float | None, seconds: float, adapter: Path) -> None:
        """Print the end of a run: the curve, before and after, and where the adapter is."""
        if self._losses:
            first, last, count = mean_ends(self._losses)
            ends = f"first and last {format_count(count, 'step')}" if count > 1 else "first and last step"
            self.info(f"Training loss  {draw_curve(self._losses)}  {first:.4f} -> {last:.4f} ({ends})")
        if before is not None and after is not None:
            self.info(f"Held-out loss  {before:.4f} -> {after:.4f}")
            if after > before:
                self.warning(
                    "On the held-out rows it is worse than before training. Try a smaller [training] learning_rate."
                )
        done = f"Done: {format_count(steps, 'step')} in {format_duration(seconds)}."
        self.info(f"{done} The adapter: {adapter.absolute()}")


class _Count(ProgressColumn):
    """How much is done, and of how much where that is known."""

    def render(self, task: Task) -> Text:
        """For example 7/75, or 1,280 where nobody knows the end."""
        done = f"{task.completed:,.0f}" if task.completed else ""
        return Text(done if task.total is None else f"{task.completed:,.0f}/{task.total:,.0f}", "progress.download")


class _Time(ProgressColumn):
    """How long it has taken, and how long it will still take where that can be told."""

    def render(self, task: Task) -> Text:
        """For example 0:19, 1:13 left."""
        left = task.fields["pace"].seconds_left()
        rest = "" if left is None else f", {format_duration(left)} left"
        return Text(f"{format_duration(task.elapsed or 0.0)}{rest}", "progress.remaining")


@contextmanager
def open_console(log_interval: LogInterval, *, plain: bool) -> Iterator[ConsoleReporter]:
    """A view on this terminal; plain lines where it is none, or `plain` asks for them."""
    console, errors = Console(), Console(stderr=True)
    if plain or not console.is_terminal:
        yield ConsoleReporter(console, errors, log_interval, None)
        return
    with open_bars(console) as progress:
        yield ConsoleReporter(console, progress.console, log_interval, progress)


def open_bars(console: Console) -> Progress:
    """The bars of a terminal: where it is narrow, the bar itself gives way and no figure is cut."""

    def whole() -> Column:
        return Column(no_wrap=True)

    return Progress(
        SpinnerColumn(table_column=whole()),
        TextColumn("{task.description}", table_column=whole(), markup=False),
        BarColumn(bar_width=CURVE_WIDTH),
        _Count(table_column=whole()),
        TextColumn("{task.fields[figures]}", table_column=whole(), markup=False),
        _Time(table_column=whole()),
        console=console,
        transient=True,
    )


def mean_ends(losses: Sequence[float]) -> tuple[float, float, int]:
    """The mean loss of the first tenth of the steps and of the last, and of how many steps each is: 1 to 10.

    One batch alone says more of its rows than of what was learned.
    """
    count = min(10, max(1, len(losses) // 10))
    return sum(losses[:count]) / count, sum(losses[-count:]) / count, count


def draw_curve(losses: Sequence[float]) -> str:
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


class Watcher:
    """Opens its line when there is something to say: an answer that was kept needs none, nor rich's progress bars.

    Silent where stderr is no terminal.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._card = ""

    def info(self, what: str) -> None:
        """Name what is being done now."""
        self._update(description=f"{self._card}{what}")

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Say how far the data have been read."""
        self.info(f"{what}: {done:,}" + (f" of {total:,}" if total else ""))

    def card(self, name: str, done: int, total: int) -> None:
        """Say which card is looked at, of how many."""
        self._card = f"{name}: " if name else ""
        self._update(completed=done, total=total)

    def close(self) -> None:
        """Take the line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _update(self, **changes: object) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            self._bar = _open_bar()
        self._bar.update(self._bar.task_ids[0], **changes)  # type: ignore[arg-type]


def _open_bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("", total=None)
    bar.start()
    return bar
