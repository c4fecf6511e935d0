"""The run that a person names: a directory, `latest`, a recipe file, or the name of a recipe."""

import json
from pathlib import Path

import pytest

from qlora_phi3.cli.run import _recipe_and_run
from qlora_phi3.errors import ModelError, RunError
from qlora_phi3.runfolder import RunFolder, find_model, list_runs, resolve_run, write_report


@pytest.fixture
def two_runs(tmp_path, monkeypatch):
    """Two runs of recipe `my`; the one that started later has the name that sorts first. The current directory is theirs."""
    for name, started in (
        ("2026-01-02_00-00-00", "2026-01-02T00:00:00+00:00"),
        ("2026-01-01_23-00-00", "2026-01-03T00:00:00+00:00"),
    ):
        folder = tmp_path / "runs" / "my" / name
        folder.mkdir(parents=True)
        (folder / "recipe.toml").touch()
        (folder / "report.json").write_text(json.dumps({"started": started}), encoding="utf-8")
    (tmp_path / "my.toml").touch()
    monkeypatch.chdir(tmp_path)
    return [run.path.name for run in list_runs(tmp_path / "runs")]


@pytest.mark.parametrize("text", ["my", "runs/my", "runs/my/latest", "my/latest", "my.toml", "runs", "runs/latest"])
def test_the_newest_run_of_a_recipe_has_many_names(two_runs, text):
    assert resolve_run(text).path.name == two_runs[-1] == "2026-01-01_23-00-00"


@pytest.mark.parametrize("end", ["", "/adapter", "/recipe.toml"])
def test_a_run_is_named_by_its_directory_its_adapter_or_its_recipe(two_runs, end):
    assert resolve_run(f"runs/my/{two_runs[0]}{end}").path.name == two_runs[0]


def test_a_name_without_a_run_lists_the_recipes_that_have_one(two_runs):
    with pytest.raises(RunError, match=r"There is no run other\. .* \(my\), .* the newest is runs/my/2026-01-01_23-00-00\."):
        resolve_run("other")


@pytest.mark.parametrize("text", ["my", "runs/my/latest", "runs/my/2026-01-01_23-00-00"])
def test_a_run_to_resume_has_every_name_of_a_run(two_runs, text):
    recipe, folder = _recipe_and_run(None, None, text)
    assert (recipe, Path(folder).name) == (Path(folder) / "recipe.toml", two_runs[-1])


def test_a_run_without_an_adapter_is_no_model(two_runs, tmp_path):
    with pytest.raises(ModelError, match=r"The run runs/my/2026-01-01_23-00-00 has no adapter"):
        find_model("my")
    (tmp_path / "runs" / "my" / two_runs[-1] / "adapter").mkdir()
    (tmp_path / "runs" / "my" / two_runs[-1] / "adapter" / "adapter_config.json").touch()
    assert find_model("my").name == two_runs[-1]


def test_a_model_here_comes_before_a_run_of_its_name_elsewhere(two_runs, tmp_path):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "config.json").touch()
    assert find_model("my") == Path("my")


def test_an_export_in_the_newest_run_is_found_by_latest(two_runs, tmp_path):
    merged = tmp_path / "runs" / "my" / two_runs[-1] / "merged"
    merged.mkdir()
    (merged / "config.json").touch()
    assert find_model("runs/my/latest/merged").resolve() == merged.resolve()
    with pytest.raises(RunError, match="There is no run"):
        find_model("runs/my/latest/gone")


def test_a_flipped_bit_in_a_report_is_noticed_wherever_it_is(tmp_path):
    folder = RunFolder(tmp_path)
    report = {"name": "my", "started": "2026-01-02T00:00:00+00:00", "seconds": 1.5, "steps": 3, "memory": {"é": [1e-9, None]}}
    write_report(folder, report)
    assert folder.read_report() == report
    whole = folder.report.read_bytes()
    for index in range(whole.index(b"my"), whole.index(b'"sha256"')):
        folder.report.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        try:
            assert folder.read_report() == report  # white space, whose place says nothing
        except RunError:
            continue
