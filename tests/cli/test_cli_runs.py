"""`qlora-phi3 runs`: the list, one run, two runs, deleting, and the rows behind a jump of the loss."""

import json
import os
import shutil
import time
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from filelock import FileLock
from run_files import data_report, divergence_record, evaluation_record, sample, step_record, write_run
from workshop import Workshop, call, read_lines

from qlora_phi3.cli.main import main
from qlora_phi3.runfolder import LOCK, RunFolder
from qlora_phi3.ui.console import mean_ends
from qlora_phi3.ui.runs import Spike, differing_keys, draw_plot, find_spikes, list_summaries


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def list_json():
    return json.loads(call("runs", "--json").stdout)


def test_the_list_has_a_line_for_each_run_the_newest_first(here):
    write_run(here / "runs" / "mine" / "1", started="2026-11-28T07:00:00+00:00")
    write_run(here / "runs" / "other" / "1", started="2026-11-29T07:00:00+00:00", seconds=3700)
    lines = call("runs").stdout.splitlines()
    assert lines == [
        "RUN      STATUS  STEPS  ROWS   HELD-OUT LOSS     TIME   SIZE",
        "other/1  done       10    40  4.000 -> 2.500  1:01:40  3 MiB",
        "mine/1   done       10    40  4.000 -> 2.500     1:23  3 MiB",
    ]
    assert call("runs", "list").stdout.splitlines() == lines
    assert call("runs", "--dir", "runs/mine").stdout.splitlines()[1].startswith("1  ")


def test_sizes_count_every_file_and_json_has_the_same_figures(here):
    folder = write_run(here / "runs" / "mine" / "1")
    (run,) = list_json()
    assert run["size_bytes"] == sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
    del run["size_bytes"], run["started"]
    assert run == {
        "path": "runs/mine/1", "status": "done", "steps": 10, "eval_loss_before": 4.0, "eval_loss_after": 2.5, "rows": 40,
        "seconds": 83.0,
    }  # fmt: skip


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_did_not_end_is_read_from_its_metrics(here, status):
    records = [evaluation_record(0, 4.0), *(step_record(n) for n in range(1, 301)), evaluation_record(300, 3.0), step_record(301)]
    folder = write_run(here / "runs" / "mine" / "1", records=records)
    folder.report.write_text(json.dumps({"status": status, "started": "2026-11-29T07:00:00+00:00"}), encoding="utf-8")
    with folder.metrics.open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 302')  # cut by a kill
    (run,) = list_json()
    assert (run["status"], run["steps"], run["eval_loss_before"], run["eval_loss_after"]) == (status, 301, 4.0, 3.0)


def test_a_run_is_running_while_a_process_holds_its_lock_and_killed_after_that(here):
    folder = write_run(here / "runs" / "mine" / "1", status="running")
    assert list_json()[0]["status"] == "killed"
    with FileLock(folder.path / LOCK):
        assert list_json()[0]["status"] == "running"
    assert list_json()[0]["status"] == "killed"


def test_the_time_of_a_run_that_is_resumed_grows_from_that_of_its_earlier_sessions(here):
    folder = write_run(here / "runs" / "mine" / "1", status="running", seconds=1000.0)
    now = time.time()
    os.utime(folder.report, (now - 50, now - 50))  # written when this session began
    os.utime(folder.metrics, (now - 20, now - 20))
    assert list_json()[0]["seconds"] == pytest.approx(1030)
    with FileLock(folder.path / LOCK):
        assert list_json()[0]["seconds"] == pytest.approx(1050, abs=5)


@pytest.mark.parametrize("text", ["{", "[1]", '{"seconds": "soon"}', '{"eval_loss_before": "low"}', "[" * 10_000, None])
def test_a_damaged_report_leaves_the_other_runs_in_the_list(here, text):
    write_run(here / "runs" / "mine" / "1")
    damaged = write_run(here / "runs" / "mine" / "2")
    damaged.report.unlink() if text is None else damaged.report.write_text(text, encoding="utf-8")
    assert sorted(run["status"] for run in list_json()) == ["damaged", "done"]
    assert call("runs").exit_code == 0
    assert call("runs", "show", str(damaged.path)).exit_code == 2


def test_without_runs_the_list_says_how_to_train_one(here):
    result = call("runs")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "qlora-phi3 run RECIPE.toml" in result.stderr
    assert call("runs", "--json").stdout == "[]\n"
    assert call("runs", "show", "mine").exit_code == 2


def test_a_run_is_shown_with_its_results_events_files_and_the_next_command(here):
    records = [evaluation_record(0, 4.0), *(step_record(n, 4 - n / 10) for n in range(1, 11)), evaluation_record(10, 2.5)]
    folder = write_run(here / "runs" / "mine" / "1", records=[*records, divergence_record(("\x1b[31m:1",))])
    shown = call("runs", "show", "mine").stdout
    for words in (
        "runs/mine/1: done", "fell from 4.0000 to 2.5000", "3.8500 -> 3.0500 (means of the first and last 2 steps)",
        "0.0001 to 0.001", "2 rows skipped: no answer",
        "3.00 GiB, predicted 2.00 GiB",
        "Step 5 diverged", "\\x1b[31m:1", "3 MiB  adapter", "qlora-phi3 export runs/mine/1",
    ):  # fmt: skip
        assert words in shown
    assert "\x1b" not in shown
    folder.report.write_text('{"status": "interrupted"}', encoding="utf-8")
    assert "Next: qlora-phi3 run --resume runs/mine/1" in call("runs", "show", "mine").stdout


def test_times_are_named_and_one_measurement_is_a_number_without_a_curve(here):
    folder = write_run(here / "runs" / "mine" / "1", records=[evaluation_record(0, 2.1414), step_record(1), step_record(2)])
    folder.samples.write_text(json.dumps({"samples": [sample()], "reason": "1 of 8 rows can be answered."}), encoding="utf-8")
    lines = call("runs", "show", "mine").stdout.splitlines()
    assert "Held-out loss  2.1414" in lines
    assert "Time           1:23, all sessions, from reading the data to saving; 0:01 of it in steps" in lines
    assert f"Started        {folder.started.astimezone():%Y-%m-%d %H:%M:%S} on NVIDIA Test" in lines
    assert "1 of 8 rows can be answered." in lines


def test_two_runs_of_one_name_are_told_apart_by_their_directories(here):
    write_run(here / "runs" / "mine" / "1", started="2026-11-28T07:00:00+00:00")
    write_run(here / "runs" / "mine" / "2", started="2026-11-29T07:00:00+00:00")
    assert call("runs", "show", "mine").stdout.startswith("runs/mine/2: done")
    assert call("runs", "show", "mine/1").stdout.startswith("runs/mine/1: done")


def test_a_comparison_has_the_keys_that_differ_the_results_and_both_curves(here):
    write_run(here / "runs" / "a" / "1", recipe={"lora": {"r": 8, "use_dora": False}, "model": {"name": "phi"}})
    slower = [evaluation_record(0, 4.0), *(step_record(n, 4.0) for n in range(1, 11)), evaluation_record(10, 3.5)]
    write_run(here / "runs" / "b" / "1", recipe={"lora": {"r": 16}, "model": {"name": "phi"}}, records=slower)
    result = call("runs", "compare", "a", "b", "--svg", "both.svg")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["[lora]", "r", "8", "16"] in rows
    assert ["[lora]", "use_dora", "false", "null"] in rows
    assert "name" not in result.stdout
    assert "4.0000 -> 2.5000" in result.stdout
    assert "4.0000 -> 3.5000" in result.stdout
    assert (here / "both.svg").read_text(encoding="utf-8").startswith("<svg")
    assert call("runs", "compare", "a", "a").stdout.count("the same") == 2
    write_run(here / "runs" / "c" / "1", records=[evaluation_record(0, 4.0), step_record(1, 4.0)])
    rows = [line.split() for line in call("runs", "compare", "c", "a").stdout.splitlines()]
    assert next(row for row in rows if row[:1] == ["held-out"])[:5] == ["held-out", "loss", "4.0000", "->", "?"]


def test_differing_keys_lists_only_those_with_other_values():
    assert differing_keys({"lora": {"r": 8, "bias": "none"}}, {"lora": {"r": 9, "bias": "none"}, "x": 3}) == [("[lora] r", 8, 9)]


def test_a_plot_has_both_curves_on_one_scale():
    lines = draw_plot(([0, 10], [4.0, 2.0]), ([0, 10], [4.0, 3.0]))
    assert lines[0].startswith("   4.000 |#")
    assert lines[9].startswith("   2.000 |")
    assert lines[9].endswith("a")
    assert [line for line in lines if line.endswith("b")] == [lines[4]]
    assert "step 10" in lines[-1]


def test_delete_asks_and_removes_only_the_runs_that_are_named(here):
    first, second = (write_run(here / "runs" / "mine" / name) for name in "12")
    refused = call("runs", "delete", "mine/1")  # no answer on stdin
    assert refused.exit_code == 2
    assert refused.stderr == "Error: There is no answer, so nothing is deleted. Add --yes to delete without a question.\n"
    refused = CliRunner().invoke(main, ["runs", "delete", "mine/1"], input="n\n")
    assert (refused.exit_code, refused.stdout.splitlines()[-1]) == (0, "Nothing was deleted.")
    assert "runs/mine/1: 3 MiB (adapter, checkpoints" in refused.stdout
    assert first.path.is_dir()
    assert call("runs", "delete", "runs/mine/1", "--yes").stdout.endswith("Deleted runs/mine/1\n")
    assert not first.path.exists()
    assert second.report.is_file()


def test_delete_refuses_a_group_of_runs_what_is_no_run_and_a_run_that_is_written(here):
    folder = write_run(here / "runs" / "mine" / "1")
    assert call("runs", "delete", "runs", "--yes").exit_code == 2  # the only one now, but no name of one
    second = write_run(here / "runs" / "mine" / "2")
    assert call("runs", "delete", "mine", "--yes").exit_code == 2
    shutil.rmtree(second.path)
    (here / "photos").mkdir()
    assert call("runs", "delete", "photos", "--yes").exit_code == 2
    with FileLock(folder.path / LOCK):
        assert call("runs", "delete", "mine/1", "--yes").exit_code == 2
    assert folder.report.is_file()
    assert call("runs", "delete", "mine/latest", "--yes").exit_code == 0
    assert not folder.path.exists()


@pytest.mark.parametrize("name", ["mine", "runs/mine", "mine.toml"])
def test_the_name_of_a_recipe_with_one_run_deletes_that_run_after_the_question(here, name):
    folder, other = (write_run(here / "runs" / recipe / "1") for recipe in ("mine", "other"))
    (here / "mine.toml").touch()
    asked = CliRunner().invoke(main, ["runs", "delete", name], input="y\n")
    assert (asked.exit_code, folder.path.exists(), other.path.exists()) == (0, False, True), asked.stderr
    assert asked.stdout.startswith("runs/mine/1: 3 MiB (adapter")


@pytest.mark.parametrize("has_steps", [True, False])
def test_steps_and_rows_are_listed_where_they_fit_in_the_terminal(here, monkeypatch, has_steps):
    write_run(here / "runs" / "mine" / "1", seconds=3700)
    shown = ["RUN     STATUS  STEPS  ROWS   HELD-OUT LOSS     TIME   SIZE", "RUN     STATUS   HELD-OUT LOSS     TIME   SIZE"]
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((len(shown[0]) - (not has_steps), 20)))
    with monkeypatch.context() as patch:
        patch.setattr("qlora_phi3.cli.runs.sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
        assert call("runs").stdout.splitlines()[0] == shown[not has_steps]


def test_a_comparison_takes_means_of_the_same_number_of_steps(here):
    for name, count in (("a", 30), ("b", 50)):
        write_run(here / "runs" / name / "1", records=[step_record(n, float(n)) for n in range(1, count + 1)])
    assert mean_ends(range(50))[2] == 5
    (line,) = [line for line in call("runs", "compare", "a", "b").stdout.splitlines() if "training loss" in line]
    assert line.split() == ["training", "loss", "(mean", "of", "3)", "2.0000", "->", "29.0000", "2.0000", "->", "49.0000"]


def test_without_a_name_the_newest_run_is_shown(here):
    write_run(here / "runs" / "mine" / "1", started="2026-11-20T10:00:00+00:00")
    write_run(here / "runs" / "other" / "2", started="2026-11-21T10:00:00+00:00")
    assert call("runs", "show").stdout.startswith("runs/other/2: ")


def test_report_makes_the_page_of_any_run(here):
    folder = write_run(here / "runs" / "mine" / "1")
    assert call("runs", "report", "mine").stdout == "runs/mine/1/report.html\n"
    assert "4.0000 to 2.5000" in (folder.path / "report.html").read_text(encoding="utf-8")


def test_a_spike_is_measured_from_the_median_of_its_neighbours():
    losses = [2.0] * 30
    losses[4], losses[20] = 5.0, 3.0
    spikes = find_spikes([{"step": n, "loss": loss} for n, loss in enumerate(losses, 1)], 5)
    assert [(spike.step, spike.loss, spike.usual) for spike in spikes] == [(5, 5.0, 2.0), (21, 3.0, 2.0)]
    assert find_spikes([{"step": 1, "loss": 2.0}], 5) == []
    falling = [5.6, 5.3, 5.0, 4.1, 3.2, 2.6, 2.1, 1.9, 1.7, 1.6, *[1.5] * 10]  # a steep start is no jump
    assert find_spikes([{"step": n, "loss": loss} for n, loss in enumerate(falling, 1)], 5) == []


@pytest.fixture
def two_spikes(monkeypatch):
    """Steps 4 and 5 stand out, whatever their losses are."""

    def find(steps, count):
        return [Spike(record["step"], record["loss"], 1.0) for record in steps if record["step"] in (4, 5)]

    monkeypatch.setattr("qlora_phi3.ui.runs.find_spikes", find)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    """A run of two epochs with answers to two prompts, on 40 rows of which one is long."""
    shop = Workshop(tmp_path_factory.mktemp("trained"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.path)
        shop.write(training={"num_train_epochs": 2, "report_samples": 2, "save_strategy": "no", "save_minutes": 0})
        result = shop.run()
    assert result.exit_code == 0, result.stderr
    return shop, RunFolder(shop.runs()[0])


def test_a_run_leaves_its_page_and_the_answers(trained):
    _, folder = trained
    samples = json.loads(folder.samples.read_text(encoding="utf-8"))["samples"]
    assert len(samples) == 2
    assert all(each["prompt"].startswith("What is ") for each in samples)
    assert samples[0]["prompt"] in (folder.path / "report.html").read_text(encoding="utf-8")


def test_why_finds_the_rows_of_a_step_as_the_trainer_drew_them(trained, two_spikes, monkeypatch):
    from qlora_phi3.training.order import read_step_rows

    shop, folder = trained
    monkeypatch.chdir(shop.path)
    steps = [record for record in read_lines(folder.metrics) if record["kind"] == "train"]
    rows = read_step_rows(folder, [record["step"] for record in steps], lambda *arguments: None)
    for record in steps:
        found = rows[record["step"]]
        assert record["rows"] == len(found)
        assert record["tokens"] == sum(row.tokens for row in found)
        assert record["supervised_tokens"] == sum(row.supervised for row in found)
    first, second = ([row.name for step in epoch for row in rows[step]] for epoch in (range(1, 11), range(11, 21)))
    assert sorted(first) == sorted(second) == sorted(set(first))
    assert first != second
    shown = call("runs", "why", "mine", "--spikes", "2")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.count("Step ") == 2
    assert shown.stdout.count("chats.jsonl:") == 8
    assert "What is " in shown.stdout


def test_the_order_of_a_run_whose_learning_rate_follows_its_evaluations_is_drawn_too(tmp_path):
    from qlora_phi3.recipe.schema import Training
    from qlora_phi3.training.order import _draw_order

    training = Training(batch_size=4, lr_scheduler_type="reduce_lr_on_plateau", warmup_steps=0)
    steps = _draw_order(RunFolder(tmp_path), training, 10, 3)
    assert sorted(row for step in steps for row in step) == list(range(10))


def test_why_says_plainly_that_the_data_changed(trained, two_spikes, monkeypatch, tmp_path):
    shop, folder = trained
    monkeypatch.chdir(shop.path)
    lines = (shop.path / "chats.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    copy = RunFolder(shutil.copytree(folder.path, tmp_path / "runs" / "mine" / "1"))
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(lines[1:]), encoding="utf-8")
    recipe = copy.recipe.read_text(encoding="utf-8").replace(str(shop.path / "chats.jsonl"), str(chats))
    copy.recipe.write_text(recipe, encoding="utf-8")
    result = call("runs", "why", str(copy.path))
    assert result.exit_code == 2
    assert "changed since it was trained" in result.stderr


def test_why_names_a_step_whose_rows_are_others_than_it_recorded(trained, two_spikes, monkeypatch, tmp_path):
    copy = RunFolder(shutil.copytree(trained[1].path, tmp_path / "runs" / "mine" / "1"))
    text = copy.metrics.read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    records[3]["tokens"] += 1
    copy.metrics.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    result = call("runs", "why", str(copy.path))
    assert result.exit_code == 2
    assert f"Step {records[3]['step']} " in result.stderr


def test_a_summary_of_a_directory_that_cannot_be_read_is_empty(tmp_path):
    assert list_summaries(tmp_path / "nowhere") == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert list_summaries(tmp_path / "file") == []
    os.mkdir(tmp_path / "notes")  # noqa: PTH102
    assert list_summaries(tmp_path) == []


def test_the_data_report_survives_json():
    from dataclasses import asdict

    from qlora_phi3.data.report import DataReport
    from qlora_phi3.ui.runs import _as

    assert _as(DataReport, json.loads(json.dumps(asdict(data_report())))) == data_report()
    assert _as(DataReport, {"sources": 3}) is None
    assert sample()["tuned"]["ended"]
