"""The screen of a run on a terminal: what is computed, how far it is, and how long it still takes, in eleven lines.

`ConsoleReporter` knows everything that is shown; rich's refresh thread draws it a few times a second, beside the training. On a
terminal that is too small for it there is one progress bar.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.text import Text

from qlora_phi3.hardware.gpu import GpuLoad, read_load
from qlora_phi3.recipe.schema import Training
from qlora_phi3.reporter import RunOutline, StepRecord
from qlora_phi3.ui.console import COLOURS, TRAINING, ConsoleReporter, EtaEstimator, build_progress, draw_curve, mean_ends
from qlora_phi3.ui.vram import draw_bar
from qlora_phi3.units import describe_duration, format_count, format_gib

#: Columns and lines that a terminal needs for the screen, and columns of its bars.
MIN_COLUMNS, MIN_LINES, BAR_COLUMNS = 60, 15, 16
#: Columns beside the curves, and the widest curve.
BESIDE_CURVE, WIDEST_CURVE = 48, 64
#: Between two readings of the GPU.
SENSOR_SECONDS = 1.0


class RunProgress(Progress):
    """Progress bars until a run begins, then its screen."""

    reporter: ConsoleReporter | None = None  #: Set by `open_console`.
    nvml: Any = None  #: The module `pynvml`, or a stand-in.
    _load: GpuLoad | None = None
    _reader: threading.Timer | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, or the screen where the terminal is large enough."""
        eta = None if self.reporter is None else self.reporter.eta
        if self.reporter is None or eta is None or self.console.width < MIN_COLUMNS or self.console.height < MIN_LINES:
            yield from super().get_renderables()
            return
        lines = [Text("─" * MIN_COLUMNS, style="dim")]
        lines += [Text.assemble((f"{name:10}", "bold"), shown) for name, shown in self._rows(self.reporter, eta)]
        for line in lines:  # not filled up with blanks, which a terminal that becomes narrower would wrap
            line.truncate(self.console.width, overflow="ellipsis")
        yield Text("\n", no_wrap=True).join(lines)

    def _rows(self, reporter: ConsoleReporter, eta: EtaEstimator) -> Iterator[tuple[str, Text]]:
        """The name and the contents of each line."""
        outline, record, step = eta.outline, reporter.last_step, reporter.step_number
        total, epochs = outline.total_steps, outline.epochs
        load = self._read_load() if outline.budget_bytes else None
        sensors = [] if load is None else [(load.watts, "W"), (load.celsius, "°C")]
        yield "device", Text(outline.device + "".join(f"  {value:.0f} {unit}" for value, unit in sensors if value is not None))
        yield "plan", Text(outline.plan)
        others = [f"{task.description}  {task.fields['figures']}" for task in self.tasks if task.description != TRAINING]
        yield "now", Text(others[-1] if others else TRAINING if step < total else "Saving the adapter")
        bar = draw_bar(BAR_COLUMNS, [(step, "█", COLOURS["done"])], total)
        epoch = epochs * step / total if record is None else record.epoch
        yield "done", bar.append(f"  {step:,} of {format_count(total, 'step')}, epoch {epoch:.2f} of {epochs:.3g}")
        left, by = eta.left(), "measured" if eta.is_measured else "estimated"
        ahead = "the time left is known after two steps" if left is None else f"about {describe_duration(left)} left, {by}"
        if step >= total and others:
            ahead = "the steps are done"  # what follows them is not in the estimate
        yield "time", Text(f"{describe_duration(eta.passed())} since step {outline.first_step:,}, {ahead}")
        columns = min(WIDEST_CURVE, self.console.width - BESIDE_CURVE)
        yield "loss", _with_curve(reporter.losses, columns, mean_ends(reporter.losses) if reporter.losses else None)
        yield "held-out", _with_curve(reporter.eval_losses, columns)
        step_figures = "not known yet"
        if record is not None:
            norm = "not finite" if record.grad_norm is None else f"{record.grad_norm:.3g}"
            speed = f"{record.tokens_per_second:,.0f} tokens/s"
            step_figures = f"learning rate {record.learning_rate:.2e}  gradient norm {norm}  {speed}"
        yield "step", Text(step_figures)
        yield "memory", _describe_memory(outline, record, load)
        yield "events", Text(", ".join(reversed(reporter.events)), style=COLOURS["warning"]) if reporter.events else Text("none")

    def _read_load(self) -> GpuLoad | None:
        """Watts, temperature and memory, at most about a second old: a thread of its own waits for the driver."""

        def read() -> None:
            self._load = read_load(nvml=self.nvml)

        if self._reader is None or not self._reader.is_alive():
            self._reader = threading.Timer(SENSOR_SECONDS, read)
            self._reader.daemon = True
            self._reader.start()
        return self._load


def _with_curve(losses: Sequence[float], columns: int, ends: tuple[float, float, int] | None = None) -> Text:
    """The first and the last loss, or `ends` of them as `mean_ends`, and the curve between."""
    if len(losses) < 2:
        return Text(f"{losses[0]:.4f}" if losses else "not known yet")
    first, last, count = ends or (losses[0], losses[-1], 1)
    means = f"  means of {count} steps" if count > 1 else ""
    return Text.assemble(f"{first:.4f} -> {last:.4f}  ", (draw_curve(losses, columns), COLOURS["curve"]), means)


def _describe_memory(outline: RunOutline, record: StepRecord | None, load: GpuLoad | None) -> Text:
    """The memory of this process, now and as planned, within the budget; on a CPU its resident memory, at most until now."""
    used, kind = 0 if record is None else record.peak_memory_bytes, "of tensors"
    if not outline.budget_bytes:
        tensors = f", plan {format_gib(outline.predicted_bytes)} of tensors" if outline.predicted_bytes else ""
        return Text(f"{format_gib(used)} resident at most{tensors}" if used else "not known yet")
    if load is not None and load.own_bytes:  # the driver shows no process in some containers and on Windows
        used, kind = load.own_bytes, "now"
    planned, budget = outline.predicted_bytes, outline.budget_bytes
    colour = COLOURS["warning" if used > planned else "done"]
    parts = [(used, "█", colour), (max(0, planned - used), "▒", colour)]
    text = f"  {format_gib(used)} {kind}, plan {format_gib(planned)}, budget {format_gib(budget)}"
    return draw_bar(BAR_COLUMNS, parts, max(budget, used)).append(text)


@contextmanager
def open_console(training: Training | None = None, *, quiet: bool = False) -> Iterator[ConsoleReporter]:
    """A reporter whose bars end with the block: of a run, which shows its screen, or without `training` of other work in one bar.

    `quiet`: nothing is shown.
    """
    console, errors = Console(quiet=quiet), Console(stderr=True, quiet=quiet)
    plain = not console.is_terminal or (training is not None and training.disable_tqdm)
    with build_progress(console, disable=plain, kind=RunProgress) as bars:
        reporter = ConsoleReporter(console, errors if plain else console, training or Training(), bars)
        reporter.has_one_bar = training is None
        vars(bars)["reporter"] = reporter
        yield reporter
