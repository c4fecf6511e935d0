"""What commands show on the terminal while they work: rich's progress bars, or plain lines where the output is no terminal.

`ConsoleReporter` shows a run (with `ui/live.py`) or an export, `show_export` the end of an export. `Watcher` shows one temporary
line on stderr, for commands that print a result on stdout. rich is imported only where it is needed: an answer from the cache
starts without it.
"""

import math
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_phi3.errors import LONGEST_LINE, Interrupted, printable, quoted, wrap_words
from qlora_phi3.reporter import DivergenceRecord, EvalRecord, OomRecord, RunOutline, StepRecord
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.units import describe_duration, describe_epochs, format_count, format_duration, format_percent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from qlora_phi3.export.run import Exported
    from qlora_phi3.recipe.schema import Training
    from qlora_phi3.training.run import RunResult

#: Characters of the loss curve, lowest first. cli/main.py writes others where the output's encoding lacks them.
CURVE_BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 24
#: Columns that a terminal needs to show the speed next to the loss, and the curve next to both.
MIN_WIDTH_SPEED, MIN_WIDTH_CURVE = 70, 110
#: Name of the training bar, and of the work whose share counts for the time left.
TRAINING, EVALUATING = "Training", "Measuring on held-out rows"
#: Colours that are read on a light and on a dark background, from the 256 of most terminals.
COLOURS = {"curve": "color(32)", "done": "color(29)", "warning": "color(166)"}
#: Events that the screen of a run shows.
SHOWN_EVENTS = 3
#: Seconds of a run, and share by which it must differ from what was announced, for a line with the measured time.
ANNOUNCED_SECONDS, ANNOUNCED_SHARE = 60.0, 0.25
REFRESHES_PER_SECOND = 4
#: Seconds between two plain lines about the same work.
PLAIN_INTERVAL_SECONDS = 10.0
#: Seconds of steps that an estimate of the remaining time is based on. rich's default of 30 s gives no estimate at all for
#: steps that are longer, as on small GPUs.
SPEED_PERIOD_SECONDS = 3600.0
#: Steps after which the measured time replaces that of the cost model.
BLENDED_STEPS = 3
#: The latest steps, whose mean time counts: enough for rows of many lengths, few enough to follow a GPU that becomes slower.
MEAN_STEPS = 200


def shown(text: str, *, longest_line: int = sys.maxsize) -> str:
    """A text without what controls a terminal, and with files below the current directory by their relative paths."""
    return printable(text, longest_line=longest_line).replace(f"{Path.cwd()}{os.sep}", "")


def print_line(console: "Console", line: str, style: str | None = None) -> None:
    """Print a line, on a terminal in lines that end between words."""
    line = shown(line, longest_line=LONGEST_LINE)
    line = wrap_words(line, console.width) if console.is_terminal else line
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


class EtaEstimator:
    """Estimates the seconds that a run needs from `begin` on, with its evaluations and checkpoints.

    A step lasts from the end of the step before it, so that data and checkpoints count; evaluations between them do not, and
    count as long as the last one took. The first step of a session, which starts kernels and fills caches, counts only until
    there is a second one.
    """

    def __init__(self, outline: RunOutline) -> None:
        self.outline, self._step = outline, outline.first_step
        self.num_measured = 0  #: Steps.
        self._evaluations_left, self._evaluation_seconds = outline.evaluations, outline.evaluation_seconds
        self.evaluated_share = 0.0  #: Of the evaluation that runs, from 0 to 1.
        self._seconds: deque[float] = deque(maxlen=MEAN_STEPS)
        self._began = self._last = time.perf_counter()

    def step(self, record: StepRecord) -> None:
        """A step is done; those that diverged before it have no record."""
        seconds = (time.perf_counter() - self._last) / max(1, record.step - self._step)
        if self.num_measured == 1:
            self._seconds.clear()
        self._seconds.append(seconds if self.num_measured else record.step_seconds)
        self.num_measured += 1
        self._step, self._last = record.step, time.perf_counter()

    def evaluation(self, record: EvalRecord) -> None:
        """An evaluation is done."""
        self._evaluations_left = max(0, self._evaluations_left - 1)
        self._evaluation_seconds, self.evaluated_share = record.seconds, 0.0
        self._last += record.seconds  # they are no part of the next step

    @property
    def is_measured(self) -> bool:
        """Whether `left` follows from measured steps alone."""
        return self.num_measured >= BLENDED_STEPS

    def left(self) -> float | None:
        """Seconds that the run still needs; None where nothing tells."""
        modelled, steps = self.outline.step_seconds, max(0, self.outline.total_steps - self._step)
        if modelled is None and self.num_measured < 2:
            return None
        weight = 1.0 if modelled is None else min(1.0, self.num_measured / BLENDED_STEPS)
        measured = sum(self._seconds) / max(1, len(self._seconds))
        seconds = weight * measured + (1 - weight) * (modelled or 0.0)
        begun = min(time.perf_counter() - self._last, seconds) if steps and not self.evaluated_share else 0.0
        evaluations = max(0.0, self._evaluations_left - self.evaluated_share)
        return steps * seconds - begun + evaluations * self._evaluation_seconds

    def passed(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._began


class ConsoleReporter:
    """Shows a run: lines above, and on a terminal progress bars or the screen of `ui/live.py` below them.

    Warnings go to the console `errors`. The bars are from `build_progress`, disabled where the output is plain lines; which steps
    get one follows from the keys of `training`.
    """

    has_one_bar = False  #: Each work takes the bar of the one before it, which counts the time of all.

    def __init__(self, console: "Console", errors: "Console", training: "Training", bars: "Progress") -> None:
        self._console, self._errors, self._training, self._bars = console, errors, training, bars
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}
        self.eta: EtaEstimator | None = None  #: None until the run begins.
        self.last_step: StepRecord | None = None
        self.losses: list[float] = []
        self.eval_losses: list[float] = []
        self.events: deque[str] = deque(maxlen=SHOWN_EVENTS)
        self.step_number = self._total = 0
        self._announced = 0.0  # seconds
        self._saved: tuple[int, RunFolder] | None = None

    def info(self, line: str) -> None:
        """Print a fact on stdout."""
        print_line(self._console, line)

    def warning(self, line: str) -> None:
        """Print on stderr what the user should look at."""
        print_line(self._errors, f"Note: {line}", COLOURS["warning"])

    def progress(self, what: str, done: float, total: int | None) -> None:
        """Move the bar of `what`, and remove it at `done >= total`; without bars print a line at the start and every 10 s."""
        now, finished = time.perf_counter(), total is not None and done >= total
        if self._bars.disable and what not in self._tasks:
            self._last_line[what] = now
            self.info(f"{what} ...")
        elif self._bars.disable and not finished and now - self._last_line[what] > PLAIN_INTERVAL_SECONDS:
            self._last_line[what] = now
            self.info(f"{what}: {int(done):,} of {total:,}" if total else f"{what}: {int(done):,}")
        self._move(what, done, total)
        if self.eta is not None and what == EVALUATING and total:
            self.eta.evaluated_share = done / total
        if finished and not self.has_one_bar:
            self._bars.remove_task(self._tasks.pop(what))
        if TRAINING in self._tasks and self._console.width < MIN_WIDTH_CURVE:  # two bars would both be cut
            self._bars.update(self._tasks[TRAINING], visible=finished)

    def _move(self, what: str, done: float, total: int | None, figures: str = "") -> None:
        count = f"{int(done):,}/{total:,}" if total is not None else f"{int(done):,}" if done else ""
        fields: dict[str, Any] = {"figures": f"{count}  {figures}".rstrip(), "left": "" if total is None else "left"}
        if what in self._tasks:
            self._bars.update(self._tasks[what], completed=done, total=total, **fields)
        else:
            earlier = self._bars.tasks if self.has_one_bar else []
            self._tasks[what] = self._bars.add_task(what, completed=int(done), total=total, **fields)
            for task in earlier:
                self._bars.tasks[-1].start_time = task.start_time
                self._bars.remove_task(self._tasks.pop(task.description))
            if self.has_one_bar and total and not done:  # rich measures the speed from the second increase on
                self._bars.update(self._tasks[what], completed=1e-9)

    def begin(self, outline: RunOutline) -> None:
        """Announce the time of the run, and open its screen. Steps of earlier sessions do not count for the speed."""
        self.eta = EtaEstimator(outline)
        self._total, self.step_number = outline.total_steps, outline.first_step
        self.losses = [record["loss"] for record in outline.earlier if record["kind"] == StepRecord.kind]
        self.eval_losses = [record["eval_loss"] for record in outline.earlier if record["kind"] == EvalRecord.kind]
        if self._count_steps(self._training.warmup_steps) >= self._total:
            self.warning(
                f"All of the run's {format_count(self._total, 'step')} is warm-up: the learning rate is never reached. "
                "Write [training] warmup_steps = 0."
            )
        self._announce(self.eta, "estimated")
        self._move(TRAINING, outline.first_step, self._total)

    def _count_steps(self, number: float) -> int:
        """A number of steps, which below 1 is a share of all."""
        return math.ceil(number * self._total) if number < 1 else int(number)

    def _announce(self, eta: EtaEstimator, how: str) -> None:
        """Print the time of the run, where it is known and another one than was printed before."""
        outline, left = eta.outline, eta.left()
        seconds = 0.0 if left is None else left + eta.passed()
        if seconds < ANNOUNCED_SECONDS or abs(seconds - self._announced) < ANNOUNCED_SHARE * self._announced:
            return
        self._announced, steps = seconds, format_count(self._total - outline.first_step, "step")
        work = f"{steps} of {self._total:,}" if outline.first_step else f"{describe_epochs(outline.epochs)} ({steps})"
        self.info(f"About {describe_duration(seconds)} for {work}, {how}.")

    def step(self, record: StepRecord) -> None:
        """Move the training bar; without bars print a line for the steps that the recipe's logging keys name."""
        self.losses.append(record.loss)
        self.step_number, self.last_step = record.step, record
        figures, width = f"loss {record.loss:.4f}", self._console.width
        speed = f"{record.tokens_per_second:,.0f} tokens/s"
        figures += f"  {speed}" if width >= MIN_WIDTH_SPEED else ""
        figures += f"  {draw_curve(self.losses)}" if width >= MIN_WIDTH_CURVE else ""
        self._move(TRAINING, record.step, self._total, figures)
        if self.eta is None:
            return
        self.eta.step(record)
        if self._bars.disable and self._is_logged(record):
            left = self.eta.left()
            remaining = "" if left is None else f"  {format_duration(left)} left"
            self.info(f"step {record.step}/{self._total}  loss {record.loss:.4f}  {speed}{remaining}")
        if self._bars.disable and self.eta.num_measured == BLENDED_STEPS:
            self._announce(self.eta, "measured")

    def _is_logged(self, record: StepRecord) -> bool:
        """Whether this step gets a plain line; with logging_strategy "steps" the first and the last one always do."""
        if self._training.logging_strategy == "no":
            return False
        if self._training.logging_strategy == "epoch":
            return math.isclose(record.epoch, round(record.epoch), abs_tol=1e-9) or record.step == self._total
        return record.step % self._count_steps(self._training.logging_steps) == 0 or record.step in (1, self._total)

    def evaluation(self, record: EvalRecord) -> None:
        """Print the loss and the token accuracy on the held-out rows."""
        self.eval_losses.append(record.eval_loss)
        if self.eta is not None:
            self.eta.evaluation(record)
        when = "Before training" if record.step == 0 else f"After step {record.step}"
        self.info(f"{when}: held-out loss {record.eval_loss:.4f}, token accuracy {format_percent(record.eval_token_accuracy, 1)}")

    def checkpoint_saved(self, checkpoint: Path) -> None:
        """Print the path of a checkpoint; `interruption` names the step it was saved at."""
        self._saved = self.step_number, RunFolder(checkpoint.parent.parent)
        self.events.append(f"step {self.step_number}: checkpoint saved")
        self.info(f"Saved {checkpoint}")

    def oom(self, record: OomRecord) -> None:
        """Print that memory ran out, and how the run goes on."""
        self.events.append(f"step {record.step}: memory ran out ({record.remedy})")
        self.warning(record.as_line())

    def divergence(self, record: DivergenceRecord) -> None:
        """Print that a step diverged, and how the run goes on."""
        self.step_number = record.step
        self.events.append(f"step {record.step}: diverged, back to step {record.good_step}")
        self.warning(record.as_line())

    def interruption(self, resumed: RunFolder | None) -> Interrupted:
        """The error for a Ctrl-C that stopped a run without saving: what is lost, and the command that goes on.

        `resumed` is the run that this session resumed, if any.
        """
        saved, folder = self._saved or (None, resumed)
        step, total = self.step_number, self._total
        if not total:
            message = "Stopped before the first step: nothing is lost."
        elif folder is None and not step:
            message = f"Stopped at once after step 0 of {total}: nothing is lost."
        elif folder is None:
            message = f"Stopped at once after step {step} of {total}, before any checkpoint was saved."
        elif saved in (None, step):
            message = f"Stopped at once after step {step} of {total}."
        else:
            message = f"Stopped at once after step {step} of {total}; the newest checkpoint is of step {saved}."
        if folder is None:
            return Interrupted(message, "Start again with the same command.")
        return Interrupted(message, f"Go on with: {folder.resume_command}")

    def finish(self, result: "RunResult", notes: Sequence[str]) -> None:
        """Print the end of a run, its warnings, and what to do next."""
        if self.losses:
            self.info(f"Training loss  {draw_curve(self.losses)}  {describe_ends(self.losses)}")
        if result.loss_before is not None and result.loss_after is not None:
            self.info(f"Held-out loss  {result.loss_before:.4f} -> {result.loss_after:.4f}")
        for note in notes:
            self.warning(note)
        work = f"{format_count(result.steps, 'step')} in {format_duration(result.seconds)}"
        folder = result.folder.path.absolute()
        self.info(f"Done: {work}, all sessions, from reading the data to saving. The adapter: {result.folder.adapter.absolute()}")
        if (page := folder / "report.html").is_file():
            self.info(f"Report: {page}")
        run = quoted(shown(str(folder)))
        self.info(f"Next: qlora-phi3 chat {run} --compare")
        self.info(f"      qlora-phi3 eval {run}")
        self.info(f"      qlora-phi3 export {run} --ollama NAME")


def build_progress(console: "Console", *, disable: bool = False, kind: "type[Progress] | None" = None) -> "Progress":
    """Progress bars that disappear when they end, of rich's class or one made from it. On a narrow terminal no figure is cut."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    fixed = Column(no_wrap=True)  # as TextColumn has it by default
    return (kind or Progress)(
        SpinnerColumn(table_column=fixed),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=CURVE_WIDTH),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(table_column=fixed),
        TimeRemainingColumn(table_column=fixed),
        TextColumn("{task.fields[left]}", style="progress.remaining"),
        console=console,
        transient=True,
        refresh_per_second=REFRESHES_PER_SECOND,
        disable=disable,
        speed_estimate_period=SPEED_PERIOD_SECONDS,
    )


def mean_ends(losses: Sequence[float], count: int = 0) -> tuple[float, float, int]:
    """Mean loss of the first steps, of the last ones, and how many: `count`, or a tenth, 3 to 10, but no more than a quarter.

    The loss of one batch depends mostly on its rows.
    """
    count = count or min(10, max(len(losses) // 10, min(3, len(losses) // 4), 1))
    return sum(losses[:count]) / count, sum(losses[-count:]) / count, count


def describe_ends(losses: Sequence[float]) -> str:
    """The two means of `mean_ends` in words; a few steps are taken alone."""
    first, last, count = mean_ends(losses)
    return f"{first:.4f} -> {last:.4f} ({f'means of the first and last {count} steps' if count > 1 else 'first and last step'})"


def draw_curve(losses: Sequence[float], columns: int = CURVE_WIDTH) -> str:
    """The finite losses as a line of at most so many characters.

    Each character is the mean of equally many steps; the highest mean is a full block, the lowest the smallest one.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    width = min(columns, len(finite))
    if not width:
        return ""
    edges = [round(index * len(finite) / width) for index in range(width + 1)]
    means = [sum(finite[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(CURVE_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(CURVE_BARS[round((mean - low) * scale)] for mean in means)


class Watcher:
    """One temporary line on stderr that names the current work; opened at the first call, silent where stderr is no terminal."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._gpu = ""

    def info(self, what: str) -> None:
        """Name the current work."""
        self._update(description=f"{self._gpu}{printable(what)}")

    def progress(self, what: str, done: float, total: int | None) -> None:
        """Name the current work with its units done, of `total` where that is known."""
        self.info(f"{what}: {int(done):,} of {total:,}" if total else f"{what}: {int(done):,}")

    def card(self, name: str, done: int, total: int) -> None:
        """Name the GPU that is being computed, and move the bar to `done` of `total` GPUs."""
        self._gpu = f"{name}: " if name else ""
        self._update(completed=done, total=total)

    def close(self) -> None:
        """Remove the line."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _update(self, **changes: Any) -> None:
        if not sys.stderr.isatty():
            return
        if self._bars is None:
            from rich.console import Console

            self._bars = build_progress(Console(stderr=True))
            self._bars.add_task("", total=None, figures="", left="")
            self._bars.start()
        self._bars.update(self._bars.task_ids[0], **changes)


def show_export(view: ConsoleReporter, exported: "Exported", *, for_ollama: bool = False) -> None:
    """Print the proof of an export and, unless it failed, what to do next; `for_ollama`: what follows says it for Ollama."""
    from qlora_phi3.export.bundle import other_bits_warning
    from qlora_phi3.export.stop import runaway_warning

    report = exported.report
    if warning := other_bits_warning(report):
        view.warning(warning)
    if report["proof"]:
        for line in proof_lines(report, quant=None if exported.gguf is None else exported.gguf.quant):
            view.info(line)
    else:
        view.warning("Not compared with the trained model (--no-verify).")
    if stops := report["stop_test"]:
        count = f"{stops['stopped']} of {stops['turns']}"
        if not stops["turns"]:
            view.info("Stop test: no turn to test.")
        elif stops["method"] == "generated":
            view.info(f"Stop test: {count} answers to held-out prompts ended by themselves.")
        else:
            view.info(f"Stop test: at {count} ends of held-out turns a stop id is the most likely token.")
        if warning := runaway_warning(stops):
            view.warning(warning)
    if exported.fault is not None:
        return
    if report["proof"]:
        is_trained = report["onto"] != "original" or report["base"].get("quantization") is None
        base = "the base" if is_trained else "the original base, on which it was not trained,"
        view.info(f"Proved: the merged model computes what {base} and the adapter compute together.")
    if exported.gguf is not None:
        for note in exported.gguf.notes:
            view.info(note)
        system = f" -sys {quoted(exported.gguf.system)}" if exported.gguf.system else ""
        view.info(f"Try it: llama-cli -m {quoted(exported.gguf.path)}{system}")
        if not for_ollama:
            name = exported.gguf.path.stem
            view.info(f"Ollama: ollama create {name} -f {shlex.quote(str(exported.folder / 'Modelfile'))}")
            view.info(f"        ollama run {name}")
    if exported.page:
        view.info(f"On the hub: {exported.page}")
    view.info(f"Done: {exported.folder.absolute()}")
    if exported.gguf is None:
        view.info(f"Next: qlora-phi3 chat {quoted(shown(str(exported.folder.absolute())))}")


def proof_lines(report: Mapping[str, Any], *, quant: str | None = None) -> list[str]:
    """The table of the proof in an export_report.json; `quant` is the type of the GGUF that was made, if one was."""
    from qlora_phi3.export.bundle import is_measured, score_label

    proof = report["proof"]
    lines = [f"{'':26}{'held-out loss':>14}{'mean KL':>9}{'largest KL':>12}{'same top token':>16}"]
    for score in proof["scores"]:
        name = score_label(score["name"], report)
        if score["name"] == "live":
            lines.append(f"{'live: ' + name:26}{score['loss']:>14.4f}")
            continue
        figures = f"{score['mean_kl']:>9.1e}{score['max_kl']:>12.1e}{format_percent(score['top_agreement'], 2):>16}"
        lines.append(f"{name:26}{score['loss']:>14.4f}{figures}")
    merged = f"the model {score_label(report['onto'], report)}"
    is_other = quant is not None and not is_measured(quant, report["dtype"])
    written = f"{quant}, made from {merged}; the file itself was not measured" if is_other else merged
    lines.append(f"Written: {written}.")
    scores = {score["name"]: score for score in proof["scores"]}
    if {"nf4", "original"} <= scores.keys() and not report.get("fault"):
        others = format_percent(1 - scores["original"]["top_agreement"], 2)
        lines.append(
            f"The adapter was trained on weights rounded to 4 bits: the model {score_label('nf4', report)} is the trained one "
            f"(--onto nf4). The original's weights are not rounded: there {others} of the most likely tokens are others."
        )
    meaning = "KL: how far the probabilities of the next token are from the live model's, 0 for equal."
    where = f"{meaning} Computed in fp32 on {format_count(proof['tokens'], 'token')} of {proof['rows']}"
    others = "held-out rows; the loss of a run or of eval is that of all held-out rows in the run's dtype."
    return [*lines, f"{where} {'rows that were trained on.' if proof['trained'] else others}"]
