"""Messages of `qlora-phi3 runs`, of report.html, and of the answers at the end of a run."""

from types import SimpleNamespace
from unittest import mock

import numpy
from click.testing import CliRunner
from message_table import Message
from run_files import data_report, step_record, write_run

from qlora_phi3.cli.runs import runs
from qlora_phi3.errors import RunError, UserError
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.training import order, samples
from qlora_phi3.training.order import read_step_rows
from qlora_phi3.ui import page


def command(*words):
    """`qlora-phi3 runs …`, with the error that it raises."""
    CliRunner().invoke(runs, list(words), catch_exceptions=False, standalone_mode=False)


def draw_without_matplotlib():
    with mock.patch.object(page, "find_spec", return_value=None):
        page.draw_comparison(None, None)


def delete_nothing(shop):
    write_run(shop.path / "runs" / "mine" / "1")
    with mock.patch("qlora_phi3.files.remove"):
        command("delete", "mine/1", "--yes")


def delete_without_an_answer(shop):
    write_run(shop.path / "runs" / "mine" / "1")
    command("delete", "mine/1")


def delete_a_group(shop):
    for name in "12":
        write_run(shop.path / "runs" / "mine" / name)
    command("delete", "mine", "--yes")


def page_of_nonsense(shop):
    folder = write_run(shop.path / "runs" / "mine" / "1")
    with mock.patch.object(page, "render", side_effect=TypeError("a number is missing")):
        page.write_page(folder)


def rows_of(shop, sha256, records):
    """Ask for the rows of a run of 4 rows, whose data have this checksum now."""
    folder = write_run(shop.path / "runs" / "mine" / "1", records=records)
    folder.recipe.write_text(shop.write().read_text(encoding="utf-8"), encoding="utf-8")
    report = SimpleNamespace(sha256=sha256)
    with (
        mock.patch.object(order, "prepare_recipe_data", return_value=(SimpleNamespace(train=[0] * 4, report=report), None, None)),
        mock.patch.object(order, "row_lengths", return_value=numpy.array([5, 5, 5, 5])),
    ):
        read_step_rows(folder, [], lambda *arguments: None)


def too_slow():
    with mock.patch.object(samples.time, "perf_counter", side_effect=[0.0, 101.0]):
        samples.limit_seconds(60.0, lambda *arguments: None)(8, 16)


def generation_fails(shop):
    """The warning that the reporter gets."""
    heard = []
    reporter = SimpleNamespace(progress=lambda *arguments: None, info=print, warning=heard.append)
    recipe = SimpleNamespace(training=SimpleNamespace(report_samples=1))
    context = SimpleNamespace(reporter=reporter, recipe=recipe, data=SimpleNamespace(evaluation=[None]))
    with mock.patch.object(samples, "_answer_with_both", side_effect=ValueError("no such cache")):
        samples.save_samples(None, context, RunFolder(shop.path), 0.0)
    raise RunError(*heard)


MESSAGES = [
    Message(
        name="svg-without-matplotlib",
        trigger=lambda shop: draw_without_matplotlib(),
        error=RunError,
        exit_code=2,
        says=("--svg", "matplotlib"),
        hint="pip install 'qlora-phi3[report]'",
    ),
    Message(
        name="delete-names-a-group",
        trigger=delete_a_group,
        error=RunError,
        exit_code=2,
        says=("mine",),
        hint="runs/mine/2",
    ),
    Message(
        name="run-not-deleted",
        trigger=delete_nothing,
        error=RunError,
        exit_code=2,
        says=("runs/mine/1",),
        hint="may write",
    ),
    Message(
        name="page-cannot-be-made",
        trigger=page_of_nonsense,
        error=RunError,
        exit_code=2,
        says=("report.html", "a number is missing"),
        hint="are complete",
    ),
    Message(
        name="no-run-to-show",
        trigger=lambda shop: command("show"),
        error=RunError,
        exit_code=2,
        says=("There is no run under runs",),
        hint="qlora-phi3 run RECIPE.toml",
    ),
    Message(
        name="no-directory-of-runs",
        trigger=lambda shop: command("--dir", "nosuch"),
        error=RunError,
        exit_code=2,
        says=("--dir nosuch: there is no such directory",),
        hint="Name the one",
    ),
    Message(
        name="delete-without-an-answer",
        trigger=delete_without_an_answer,
        error=UserError,
        exit_code=2,
        says=("There is no answer",),
        hint="Add --yes",
    ),
    Message(
        name="rows-of-changed-data",
        trigger=lambda shop: rows_of(shop, "c" * 64, []),
        error=RunError,
        exit_code=2,
        says=("runs/mine/1", "dddddddddddd -> cccccccccccc"),
        hint="Put the data of the run back",
    ),
    Message(
        name="rows-are-others",
        trigger=lambda shop: rows_of(shop, data_report().sha256, [step_record(1, tokens=21)]),
        error=RunError,
        exit_code=2,
        says=("Step 1", "21 tokens", "20"),
        hint="Put the data of the run back",
    ),
    Message(
        name="answers-take-too-long",
        trigger=lambda shop: too_slow(),
        error=RunError,
        exit_code=2,
        says=("3:22",),
        hint="[training] report_samples",
    ),
    Message(
        name="answers-fail",
        trigger=generation_fails,
        error=RunError,
        exit_code=2,
        says=("no such cache",),
        hint="The run itself is complete",
    ),
]
