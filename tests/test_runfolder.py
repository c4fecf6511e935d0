"""The run that a person names: a directory, `latest`, a recipe file, or the name of a recipe."""

import json

import pytest

from qlora_phi3.errors import RunError
from qlora_phi3.runfolder import RunFolder, list_runs, resolve_run, write_report


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
