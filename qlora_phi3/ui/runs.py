"""Runs as `qlora-phi3 runs` and report.html show them: read from the files of a run alone, without a model.

What a file holds that this version cannot read, as after a kill, is left out; only a damaged report.json is an error.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from time import time
from typing import TYPE_CHECKING, Any

from qlora_phi3.errors import RunError
from qlora_phi3.files import read_json_object
from qlora_phi3.runfolder import RunFolder, is_locked, read_metrics
from qlora_phi3.ui.console import describe_ends
from qlora_phi3.units import format_count

if TYPE_CHECKING:
    from qlora_phi3.data.report import DataReport
    from qlora_phi3.memory.report import MemoryReport

#: Steps before and after a step whose median loss is its usual loss.
SPIKE_WINDOW = 10
#: A step that has fewer before it is not judged; and how many times the usual distance from the median is much.
FEW_STEPS, SPIKE_SPREADS = 3, 3.0
#: A held-out loss that ends by more than this share above its lowest value has risen.
RISEN_SHARE = 0.01
#: With fewer answers, the number of those that ended by themselves means nothing.
MIN_ANSWERS = 4
#: Columns and lines of a plot.
PLOT_WIDTH, PLOT_HEIGHT = 60, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run in the list; None where a figure is not known."""

    path: str
    status: str
    started: str
    steps: int | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    rows: int | None
    seconds: float | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of samples.json; `ended`: the model ended it by itself."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out prompt with the row's own answer, the base's, and the tuned model's."""

    prompt: str
    expected: str
    base: Answer
    tuned: Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the files of a run hold. `steps` and `evaluations` are records of metrics.jsonl with a finite loss."""

    folder: RunFolder
    report: Mapping[str, Any]
    status: str
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    events: Sequence[tuple[int, str, Sequence[str]]]  #: Step, what happened there, and the rows.
    data: "DataReport | None"
    predicted: "MemoryReport | None"
    measured: "MemoryReport | None"
    samples: Sequence[Sample]
    no_samples: str  #: Why there are none, or fewer than the recipe wants; empty where no reason is known.

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps that have a finite figure of this name, and the figures."""
        records = self.evaluations if key.startswith("eval_") else self.steps
        found = [(record["step"], float(record[key])) for record in records if _is_finite(record.get(key))]
        return [step for step, _ in found], [value for _, value in found]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def read_status(folder: RunFolder, report: Mapping[str, Any]) -> str:
    """done, interrupted, failed; running where a process writes the run, killed where none does any more."""
    status = str(report.get("status", "unknown"))
    return status if status != "running" or is_locked(folder) else "killed"


def list_summaries(root: Path) -> list[RunSummary]:
    """Every run in `root`, or in a directory in it, the newest first; one whose report.json cannot be read is "damaged"."""
    groups = [root, *(Path(entry.path) for entry in scan(root) if entry.is_dir())]
    folders = [RunFolder(Path(entry.path)) for group in groups for entry in scan(group) if entry.is_dir()]
    found = [folder for folder in folders if folder.report.exists() or folder.recipe.is_file()]
    found.sort(key=lambda run: (run.started, run.path.name), reverse=True)
    return [_summarize(folder) for folder in found]


def _summarize(folder: RunFolder) -> RunSummary:
    report: dict[str, Any] = {"status": "damaged"}
    with suppress(RunError):
        report = folder.read_report()
    records, status = [] if report.get("status") == "done" else read_metrics(folder.metrics), read_status(folder, report)
    losses = [(record["step"], record.get("eval_loss")) for record in records if record["kind"] == "eval"]
    seconds = report.get("seconds")
    if report.get("status") == "running" and seconds is not None:  # of earlier sessions; this one began when it wrote the report
        began, written = folder.report.stat().st_mtime, folder.metrics.stat().st_mtime if folder.metrics.is_file() else 0.0
        seconds += max(0.0, (time() if status == "running" else written) - began)
    return RunSummary(
        path=str(folder.path),
        status=status,
        started=folder.started.astimezone().isoformat(timespec="seconds"),
        steps=report.get("steps", max((record["step"] for record in records if record["kind"] == "train"), default=None)),
        eval_loss_before=report.get("eval_loss_before", next((loss for step, loss in losses if step == 0), None)),
        eval_loss_after=report.get("eval_loss_after", losses[-1][1] if losses and losses[-1][0] else None),
        rows=report.get("data", {}).get("train_rows"),
        seconds=seconds,
        size_bytes=sum(map(size_of, scan(folder.path))),
    )


def scan(path: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a directory by name; none where it cannot be read."""
    with suppress(OSError), os.scandir(path) as entries:
        return sorted(entries, key=lambda entry: entry.name)
    return []


def size_of(entry: os.DirEntry[str]) -> int:
    """Bytes of a file, or of all files in a directory, without following links."""
    if entry.is_dir(follow_symlinks=False):
        return sum(map(size_of, scan(entry.path)))
    return entry.stat(follow_symlinks=False).st_size


def read_run(folder: RunFolder) -> Run:
    """Everything that the files of a run hold; RunError where report.json is missing or damaged."""
    from qlora_phi3.data.report import DataReport
    from qlora_phi3.memory.report import MemoryReport
    from qlora_phi3.reporter import DivergenceRecord, OomRecord

    report, records = folder.read_report(), read_metrics(folder.metrics)
    memory = {name: value for name, value in report.get("memory", {}).items() if isinstance(value, dict)}
    reports = {name: _as(MemoryReport, {k: v for k, v in value.items() if v is not None}) for name, value in memory.items()}
    events = []
    for record in records:
        kind = {OomRecord.kind: OomRecord, DivergenceRecord.kind: DivergenceRecord}.get(record["kind"])
        if kind is not None and (event := _as(kind, record)) is not None:
            events.append((event.step, event.as_line(), event.rows if kind is DivergenceRecord else ()))
    saved: dict[str, Any] = {}
    with suppress(RunError):
        saved = read_json_object(folder.samples, RunError, "")
    return Run(
        folder=folder,
        report=report,
        status=read_status(folder, report),
        steps=[record for record in records if record["kind"] == "train" and _is_finite(record.get("loss"))],
        evaluations=[record for record in records if record["kind"] == "eval" and _is_finite(record.get("eval_loss"))],
        events=events,
        data=_as(DataReport, report.get("data")),
        predicted=reports.get("predicted"),
        measured=reports.get("measured"),
        samples=_as(list[Sample], saved.get("samples")) or [],
        no_samples=str(saved.get("reason", "")),
    )


def _as(kind: Any, value: Any) -> Any:
    """A value from JSON as a dataclass, or a list of them; None where it is none."""
    from pydantic import TypeAdapter, ValidationError

    with suppress(ValidationError):
        return TypeAdapter(kind).validate_python(value)
    return None


def verdict(run: Run) -> str:
    """What came of a run, in one sentence or two."""
    steps, losses = run.series("eval_loss")
    if len(losses) > 1 and steps[0] == 0:
        change = "fell" if losses[-1] < losses[0] else "rose" if losses[-1] > losses[0] else "did not change,"
        result = f"The held-out loss {change} from {losses[0]:.4f} to {losses[-1]:.4f}."
    elif run.steps:
        result = f"Training loss {describe_ends(run.series('loss')[1])}; no held-out loss tells more."
    else:
        result = "No step was trained."
    if run.status != "done":
        return f"This run is not done: {run.status} after step {run.steps[-1]['step'] if run.steps else 0}. {result}"
    if not run.samples:
        return result
    if empty := sum(not sample.tuned.text for sample in run.samples):  # each of them ended by itself as well
        return f"{result} {empty} of {len(run.samples)} sample answers are empty."
    return f"{result} {sum(each.tuned.ended for each in run.samples)} of {len(run.samples)} sample answers ended by themselves."


def warnings(run: Run) -> list[str]:
    """What a person should look at, the most serious first."""
    (steps, losses), runaway = run.series("eval_loss"), sum(not sample.tuned.ended for sample in run.samples)
    lines = [str(run.report[key]) for key in ("error", "unlearned") if run.report.get(key)]
    if len(losses) > 1 and losses[-1] > losses[0]:
        lines.append("The held-out loss is higher than before training. Try a smaller [training] learning_rate.")
    elif len(losses) > 1 and losses[-1] > (1 + RISEN_SHARE) * min(losses):
        best = steps[losses.index(min(losses))]
        lines.append(f"The held-out loss was lowest after step {best} ({min(losses):.4f}) and rose since: train fewer epochs.")
    if len(run.samples) >= MIN_ANSWERS and 2 * runaway > len(run.samples):
        count = f"{runaway} of {len(run.samples)}"
        lines.append(f"{count} sample answers did not end by themselves: too little training, or rows cut at max_length.")
    if empty := sum(not sample.tuned.text for sample in run.samples):
        lines.append(f"{empty} of {len(run.samples)} sample answers are empty: the model ends its turn at once.")
    if run.events:
        lines.append(
            f"{format_count(len(run.events), 'event')} of memory that ran out or of a step that diverged: see report.html."
        )
    if run.data is not None and run.data.repeated:
        lines.append(run.data.warning_lines()[-1])
    return lines


def differing_keys(*recipes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """For each key of which two recipes have other values: `[table] key`, and the values; None where one lacks it."""
    flat = [
        {f"[{table}] {key}": value for table, keys in recipe.items() if isinstance(keys, dict) for key, value in keys.items()}
        for recipe in recipes
    ]
    rows = [(name, *(each.get(name) for each in flat)) for name in dict.fromkeys(name for each in flat for name in each)]
    return [row for row in rows if row[1] != row[2]]


def draw_plot(*curves: tuple[Sequence[int], Sequence[float]]) -> list[str]:
    """Curves, each its steps and its finite values, over each other in ASCII: `a` for the first, `b` for the second, `#` where
    they meet. A column shows the mean of its steps.
    """
    last = max(step for steps, _ in curves for step in steps)
    means: list[dict[int, float]] = []
    for steps, values in curves:
        columns: dict[int, list[float]] = {}
        for step, value in zip(steps, values, strict=True):
            columns.setdefault(round(step / max(1, last) * (PLOT_WIDTH - 1)), []).append(value)
        means.append({column: sum(group) / len(group) for column, group in columns.items()})
    heights = [value for curve in means for value in curve.values()]
    low, high = min(heights), max(heights)
    grid = [[" "] * PLOT_WIDTH for _ in range(PLOT_HEIGHT)]
    for mark, curve in zip("ab", means, strict=True):
        for column, value in curve.items():
            row = grid[round((high - value) / ((high - low) or 1) * (PLOT_HEIGHT - 1))]
            row[column] = mark if row[column] == " " else "#"
    labels = {0: f"{high:.3f}", PLOT_HEIGHT - 1: f"{low:.3f}"}
    lines = [f"{labels.get(number, ''):>8} |{''.join(row).rstrip()}" for number, row in enumerate(grid)]
    return [*lines, f"{'':8} +{'-' * PLOT_WIDTH}", f"{'':10}0{f'step {last:,}':>{PLOT_WIDTH - 1}}"]


@dataclass(frozen=True, slots=True)
class Spike:
    """A step, its loss, and the larger median of the losses before and after it, in nats per token."""

    step: int
    loss: float
    usual: float


def find_spikes(steps: Sequence[Mapping[str, Any]], count: int) -> list[Spike]:
    """The `count` steps whose loss stands out most; largest first.

    Such a loss is above the medians of the SPIKE_WINDOW steps before and of those after, by SPIKE_SPREADS times the median
    distance of their losses from these medians.
    """
    losses, spikes = [record["loss"] for record in steps], []
    for index, record in enumerate(steps):
        before, after = losses[max(0, index - SPIKE_WINDOW) : index], losses[index + 1 : index + 1 + SPIKE_WINDOW]
        if len(before) < FEW_STEPS:  # at the start a loss falls, and stands above those that follow
            continue
        usual = max(median(before), median(after or before))
        spread = median(abs(loss - median(side)) for side in (before, after) for loss in side)
        if losses[index] > usual + SPIKE_SPREADS * spread:
            spikes.append(Spike(record["step"], losses[index], usual))
    return sorted(spikes, key=lambda spike: spike.usual - spike.loss)[:count]
