"""report.html of a run, the texts of `qlora-phi3 runs`, and the charts in them.

The page is one file without JavaScript that needs no network. The texts are jinja2 templates in `pages/`. What a run's files
hold is data of other people: jinja2 escapes it for HTML, and `printable` for terminals, direction marks included.
"""

import io
import json
from collections.abc import Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

from qlora_phi3.errors import RunError, printable, quoted
from qlora_phi3.files import atomic_write, foreign_errors
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.ui.console import describe_ends, draw_curve, mean_ends
from qlora_phi3.ui.runs import Run, draw_plot, read_run, scan, size_of, verdict, warnings
from qlora_phi3.units import MIB, format_count, format_duration, format_gib

#: Name of the page in the directory of a run.
PAGE = "report.html"
#: Points of a curve: more steps are averaged, so that the page of a long run is not larger.
MOST_POINTS = 300
#: The smoothed loss is the mean over this share of the steps.
SMOOTHED_SHARE = 0.05
#: Steps in the table that stands for the charts where matplotlib is missing.
TABLE_ROWS = 20
#: A line of a chart: its label (empty: not in the legend), steps, values, and matplotlib's settings of a line.
Curve = tuple[str, Sequence[int], Sequence[float], dict[str, Any]]
#: Colors of a chart -> what stands in the page for them, so that it follows the reader's light or dark scheme.
INK, FAINT, FIRST, SECOND = "#555555", "#bbbbbc", "#2563eb", "#d9480f"
THIN, LINE = {"color": FAINT, "linewidth": 0.8}, {"color": FIRST, "linewidth": 1.5}
DOTTED = {"color": SECOND, "linewidth": 1.5, "marker": "o", "markersize": 4}
SCHEME = {INK: "currentColor", FAINT: "var(--faint)", FIRST: "var(--first)", SECOND: "var(--second)"}


def write_page(folder: RunFolder) -> Path:
    """Write report.html from the other files of a run; RunError where they are damaged or the disk refuses."""
    run = read_run(folder)
    with foreign_errors(
        RunError, f"{folder.path / PAGE} cannot be made: {{reason}}.", "The other files of the run are complete."
    ):
        recipe = folder.recipe.read_text(encoding="utf-8", errors="replace") if folder.recipe.is_file() else ""
        text = render("report.html.jinja", run=run, charts=draw_charts(run), recipe=recipe)
    atomic_write(folder.path / PAGE, text)
    return folder.path / PAGE


def render(template: str, **values: Any) -> str:
    """The text of a template of `pages/`; it is HTML where its name says so."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qlora_phi3", "pages"),
        autoescape="html" in template,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "gib": show_size, "duration": format_duration, "count": format_count, "curve": draw_curve, "sizes": list_sizes,
        "quoted": quoted, "ends": mean_ends, "describe_ends": describe_ends,
        "tojson_plain": lambda value: json.dumps(value, ensure_ascii=False),
        "largest": lambda values: max(values, default=0),
        "median": lambda values: median(values or [0.0]),
    }  # fmt: skip
    functions = {"verdict": verdict, "warnings": warnings, "draw_plot": draw_plot, "now": datetime.now().astimezone, "zip": zip}
    return environment.get_template(template).render(**functions, table_rows=TABLE_ROWS, smoothed_share=SMOOTHED_SHARE, **values)


def show_size(num_bytes: int) -> str:
    """A size for people, where few bytes are not none."""
    return "< 1 MiB" if 0 < num_bytes < MIB / 2 else format_gib(num_bytes)


def list_sizes(folder: RunFolder) -> list[tuple[str, int]]:
    """The files and directories of a run with their bytes, by name."""
    return [(entry.name, size_of(entry)) for entry in scan(folder.path)]


def draw_charts(run: Run) -> Sequence[tuple[str, str]]:
    """Title and inline SVG of each chart of the page; none without matplotlib, or without two steps."""
    from markupsafe import Markup

    if find_spec("matplotlib") is None or len(run.steps) < 2:
        return []
    steps, losses = run.series("loss")
    half = max(1, round(SMOOTHED_SHARE * len(losses) / 2))
    smooth = [mean(losses[max(0, index - half) : index + half + 1]) for index in range(len(losses))]
    loss = [("each step", steps, losses, THIN), ("training", steps, smooth, LINE)]
    drawn: dict[str, list[Curve]] = {"Loss per token": [*loss, ("held-out", *run.series("eval_loss"), DOTTED)]}
    for key in ("learning_rate", "grad_norm", "tokens_per_second"):
        title = key.capitalize().replace("_", " ").replace("Grad norm", "Gradient norm")
        drawn[title] = [("", *run.series(key), LINE)]
    charts = []
    for title, curves in drawn.items():
        svg = draw_svg(curves, salt=title, marks=[step for step, _, _ in run.events], log=title == "Gradient norm")
        for color, name in SCHEME.items():
            svg = svg.replace(color, name)
        charts.append((title, Markup(svg)))
    return charts


def draw_comparison(first: Run, second: Run) -> str:
    """A file with the training and the held-out losses of two runs over each other; RunError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise RunError("--svg needs matplotlib, which is not installed.", "Install it: pip install 'qlora-phi3[report]'")
    curves: list[Curve] = []
    for name, run, color in (("a", first, FIRST), ("b", second, SECOND)):
        curves.append((f"{name}, training", *run.series("loss"), {**THIN, "color": color, "alpha": 0.6}))
        curves.append((f"{name}, held-out", *run.series("eval_loss"), {**DOTTED, "color": color}))
    return draw_svg(curves, salt="runs", background="white")


def draw_svg(
    curves: Sequence[Curve], *, salt: str, marks: Sequence[int] = (), log: bool = False, background: str = "none"
) -> str:
    """An SVG element of curves over the steps, made without pyplot.

    Args:
        salt: makes the ids in it differ from those of other charts in one page.
        marks: steps of events, drawn as vertical lines.
        background: a color; "none" for that of the page.
        log: a logarithmic scale, where the values span more than two decades.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    values = [value for _, _, values, _ in curves for value in values]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "axes.formatter.limits": (-3, 5)}):
        figure = Figure(figsize=(5.2, 2.1), layout="constrained", facecolor=background)
        axes = figure.add_subplot(xlabel="step", facecolor="none")
        for label, steps, heights, style in curves:
            axes.plot(*thin(steps, heights), label=label if label and steps else "_", **style)
        for step in marks[:MOST_POINTS]:
            axes.axvline(step, color=SECOND, linewidth=0.8, linestyle=":")
        if log and values and 0 < 100 * min(values) < max(values):
            axes.set_yscale("log")
        if any(label for label, *_ in curves):
            axes.legend(frameon=False, labelcolor=INK, ncols=3, loc="upper right")
        axes.tick_params(color=INK, labelcolor=INK)
        axes.xaxis.label.set_color(INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def thin(steps: Sequence[int], values: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    """At most MOST_POINTS points: the last step and the mean of each group of equally many."""
    size = -(-len(steps) // MOST_POINTS)
    groups = range(0, len(steps), max(1, size))
    return [steps[min(at + size, len(steps)) - 1] for at in groups], [mean(values[at : at + size]) for at in groups]
