"""`qlora-phi3 runs`: the runs that are there, one of them, two side by side, and what made the loss of one jump."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_phi3.cli.options import complete_run, debug_option, watching
from qlora_phi3.cli.output import confirm, echo, echo_json
from qlora_phi3.errors import RunError, printable
from qlora_phi3.units import format_count, format_duration, format_gib

if TYPE_CHECKING:
    from qlora_phi3.runfolder import RunFolder

DEFAULT_ROOT = "runs"
DIRECTORY = click.option(
    "--dir", "root", type=click.Path(path_type=Path), default=DEFAULT_ROOT, show_default=True, help="Of the runs."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
RUN = click.argument("run", metavar="[RUN]", required=False, shell_complete=complete_run)


@click.group(invoke_without_command=True)
@DIRECTORY
@JSON
@debug_option
@click.pass_context
def runs(ctx: click.Context, root: Path, as_json: bool) -> None:
    """List the runs, show one, compare two, or find the rows behind a jump of the loss.

    \b
    Examples:
      qlora-phi3 runs
      qlora-phi3 runs show chat
      qlora-phi3 runs compare runs/chat/2026-11-21_10-00-00 runs/chat/latest
      qlora-phi3 runs why runs/chat/latest

    RUN is the directory of a run, runs/NAME/latest, or the name of a recipe: its newest run. Without RUN it is the newest of all.
    """
    ctx.obj = root
    if ctx.invoked_subcommand is None:
        print_list(root, as_json)


@runs.command("list")
@DIRECTORY
@JSON
@debug_option
def list_command(root: Path, as_json: bool) -> None:
    """List the runs, the newest first."""
    print_list(root, as_json)


def print_list(root: Path, as_json: bool) -> None:
    """Print a line for each run; without steps and rows where the lines would not fit in the terminal."""
    from qlora_phi3.runfolder import NO_RUNS
    from qlora_phi3.ui.runs import RunSummary, list_summaries

    if not root.is_dir() and root != Path(DEFAULT_ROOT):
        raise RunError(f"--dir {root}: there is no such directory.", "Name the one that holds the runs.")
    summaries = list_summaries(root)
    if as_json:
        from dataclasses import asdict

        echo_json([asdict(summary) for summary in summaries])
        return
    if not summaries:
        click.echo(f"There is no run under {root}. {NO_RUNS}", err=True)
        return

    def cells(run: RunSummary) -> list[str]:
        losses = ["?" if loss is None else f"{loss:.3f}" for loss in (run.eval_loss_before, run.eval_loss_after)]
        counts = ["" if count is None else f"{count:,}" for count in (run.steps, run.rows)]
        time = "" if run.seconds is None else format_duration(run.seconds)
        loss = "" if losses == ["?", "?"] else " -> ".join(losses)
        return [str(Path(run.path).relative_to(root)), run.status, *counts, loss, time, format_gib(run.size_bytes)]

    rows: list[list[str]] = [["RUN", "STATUS", "STEPS", "ROWS", "HELD-OUT LOSS", "TIME", "SIZE"], *map(cells, summaries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    if sys.stdout.isatty() and sum(widths) + 2 * (len(widths) - 1) > shutil.get_terminal_size().columns:
        rows, widths = [[*row[:2], *row[4:]] for row in rows], [*widths[:2], *widths[4:]]
    for line in rows:
        padded = [
            f"{cell:<{width}}" if at < 2 else f"{cell:>{width}}"
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo(printable("  ".join(padded).rstrip()))


@runs.command()
@RUN
@debug_option
@click.pass_obj
def show(root: Path, run: str | None) -> None:
    """Show what is known about RUN: results, curves, events, files, and what to do next."""
    print_text("runs_show.jinja", run=find(root, run))


@runs.command()
@click.argument("a", metavar="A", shell_complete=complete_run)
@click.argument("b", metavar="B", shell_complete=complete_run)
@click.option("--svg", type=click.Path(path_type=Path, dir_okay=False), help="Also draw the losses into this file.")
@debug_option
@click.pass_obj
def compare(root: Path, a: str, b: str, svg: Path | None) -> None:
    """Compare the runs A and B: recipes, results and curves."""
    from qlora_phi3.ui.runs import differing_keys

    first, second = find(root, a), find(root, b)
    keys = differing_keys(*(run.report.get("recipe", {}) for run in (first, second)))
    print_text("runs_compare.jinja", a=first, b=second, keys=keys)
    if svg is not None:
        from qlora_phi3.files import atomic_write
        from qlora_phi3.ui.page import draw_comparison

        atomic_write(svg, draw_comparison(first, second), hint="{cause}, or choose another directory.")
        click.echo(f"Drawn: {svg}")


@runs.command()
@RUN
@debug_option
@click.pass_obj
def report(root: Path, run: str | None) -> None:
    """Make the report.html of RUN (again), from its files alone."""
    from qlora_phi3.ui.page import write_page

    click.echo(printable(str(write_page(resolve(root, run)))))


@runs.command()
@RUN
@click.option("--spikes", type=click.IntRange(1, 50), default=3, show_default=True, help="Number of steps to show.")
@click.option("--full", is_flag=True, help="Every row of these steps, with its complete text.")
@debug_option
@click.pass_obj
def why(root: Path, run: str | None, spikes: int, full: bool) -> None:
    """Print the rows behind the largest jumps of the training loss of RUN.

    A jump is measured from the median loss of the ten steps before and after. Needs the data and the tokenizer of the run.
    """
    from qlora_phi3.ui.runs import SPIKE_WINDOW, find_spikes

    found = find(root, run)
    largest = find_spikes(found.steps, spikes)
    rows: dict[int, Any] = {}
    if largest:
        with watching() as watcher:
            watcher.info("Starting transformers")
            from qlora_phi3.training.order import read_step_rows

            rows = read_step_rows(found.folder, [spike.step for spike in largest], watcher.progress)
    values = {"spikes": largest, "rows": rows, "window": SPIKE_WINDOW, "full": full}
    print_text("runs_why.jinja", run=found, columns=shutil.get_terminal_size().columns, **values)


@runs.command()
@click.argument("names", metavar="RUN...", nargs=-1, required=True, shell_complete=complete_run)
@click.option("--yes", is_flag=True, help="Do not ask.")
@debug_option
@click.pass_obj
def delete(root: Path, names: tuple[str, ...], yes: bool) -> None:
    """Delete each RUN, or the only run of a recipe, with all checkpoints and exports; never one that is being written."""
    from qlora_phi3.files import remove
    from qlora_phi3.runfolder import list_runs, lock_run, resolve_run
    from qlora_phi3.ui.page import list_sizes

    named = {name: resolve_run(name, root) for name in names}
    folders = list(dict.fromkeys(named.values()))
    for name, folder in named.items():
        is_group = Path(name).name not in (folder.path.name, "latest")
        names_all = Path(name).name.removesuffix(".toml") == folder.path.parent.name
        if is_group and (not names_all or len(list_runs(folder.path.parent)) > 1):
            raise RunError(f"{name} is no single run.", f"Name the directory of each run to delete, such as {folder.path}.")
    for folder in folders:
        sizes = list_sizes(folder)
        click.echo(
            printable(f"{folder.path}: {format_gib(sum(size for _, size in sizes))} ({', '.join(name for name, _ in sizes)})")
        )
    if not yes and not confirm(f"Delete {format_count(len(folders), 'run')} for good?"):
        return
    for folder in folders:
        with lock_run(folder):
            remove(folder.path)
        remove(folder.path)
        if folder.path.exists():
            raise RunError(f"{folder.path} cannot be deleted completely.", "Check that you may write to it.")
        click.echo(printable(f"Deleted {folder.path}"))


def find(root: Path, name: str | None) -> Any:
    """The run of this name, or the newest, with what its files hold."""
    from qlora_phi3.ui.runs import read_run

    return read_run(resolve(root, name))


def resolve(root: Path, name: str | None) -> "RunFolder":
    """The run of this name, or the newest; RunError where there is none."""
    from qlora_phi3.runfolder import NO_RUNS, list_runs, resolve_run

    if name is None and not (runs := list_runs(root)):
        raise RunError(f"There is no run under {root}.", NO_RUNS)
    return runs[-1] if name is None else resolve_run(name, root)


def print_text(template: str, **values: Any) -> None:
    """Print a template's text without blank lines at its ends or two of them in a row."""
    from qlora_phi3.ui.page import render

    lines = [line.rstrip() for line in render(template, **values).strip().splitlines()]
    echo("\n".join(line for at, line in enumerate(lines) if line or lines[at - 1]))
