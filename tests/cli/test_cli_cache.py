"""`qlora-phi3 cache`: what runs keep is listed with its size, deleted when asked for, and changes nothing that is learned."""

import json
import os

import pytest
from click.testing import CliRunner
from filelock import FileLock
from workshop import call, read_json, read_lines

from qlora_phi3.cli.main import main
from qlora_phi3.model import base_cache


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A base of 3 MiB, rows of 2 MiB and two answers of 512 KiB; the directories of their kinds."""
    for name in ("XDG_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    bases, answers = (tmp_path / "XDG_CACHE_HOME" / "qlora-phi3" / name for name in ("bases", "vram-check"))
    rows = tmp_path / "HF_DATASETS_CACHE" / "qlora-phi3"
    (bases / "1").mkdir(parents=True)
    (bases / "1" / "entry.json").write_text('{"description": "a base\\u001b[31m, NF4"}', encoding="utf-8")
    (bases / "1" / "model.safetensors").write_bytes(bytes(3 * 2**20))
    (rows / "2").mkdir(parents=True)
    (rows / "2" / "report.json").write_text('{"name": "chats.jsonl", "rows_kept": 1200}', encoding="utf-8")
    (rows / "2" / "rows.arrow").write_bytes(bytes(2 * 2**20))
    answers.mkdir(parents=True)
    for name in "ab":
        (answers / f"{name}.json").write_bytes(bytes(2**19))
    for number, name in enumerate(("bases", "rows", "vram-check")):
        for file in tmp_path.glob(f"*/qlora-phi3/{name}/**/*") if number != 1 else rows.rglob("*"):
            os.utime(file, (1.7e9, 1.7e9 + 86400 * number))
    monkeypatch.setenv("TZ", "UTC")
    return {"bases": bases / "1", "rows": rows / "2", "vram-check": answers}


def test_each_kind_has_a_line_with_its_number_and_size(kept):
    other = kept["rows"].with_name("3")
    other.mkdir()
    (other / "rows.arrow").write_bytes(bytes(2**20))
    os.utime(other / "rows.arrow", (1.6e9, 1.6e9))
    assert call("cache").stdout.splitlines() == [
        "bases           3 MiB  last used 2023-11-14 22:13  1 base",
        "rows            3 MiB  last used 2023-11-15 22:13  2 tokenized files",
        "vram-check      1 MiB  last used 2023-11-16 22:13  2 answers",
        "In all 7 MiB.",
    ]


def test_with_all_everything_is_listed_with_its_size_and_last_use(kept):
    lines = call("cache", "--all").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["bases", "1", "3", "MiB", "last", "used", "2023-11-14", "22:13", "a", "base\\x1b[31m,", "NF4"],
        ["rows", "2", "2", "MiB", "last", "used", "2023-11-15", "22:13", "chats.jsonl,", "rows:", "1,200"],
        ["vram-check", "1", "MiB", "last", "used", "2023-11-16", "22:13", "2", "answers"],
        ["In", "all", "6", "MiB."],
    ]


def test_what_a_kill_left_is_listed_and_deleted(kept):
    (kept["bases"] / "entry.json").unlink()
    assert call("cache", "--all").stdout.splitlines()[0].endswith("incomplete")
    assert call("cache", "clean", "bases", "--yes").exit_code == 0
    assert [path.exists() for path in kept.values()] == [False, True, True]


def test_nothing_is_deleted_before_the_answer_is_yes(kept):
    refused = CliRunner().invoke(main, ["cache", "clean"], input="n\n")
    assert (refused.exit_code, refused.stdout.splitlines()[-1]) == (0, "Nothing was deleted.")
    assert "Add --yes" in call("cache", "clean").stderr  # no answer on stdin
    assert [path.exists() for path in kept.values()] == [True, True, True]
    agreed = CliRunner().invoke(main, ["cache", "clean"], input="y\n")
    assert agreed.exit_code == 0
    assert "In all 6 MiB." in agreed.stdout
    assert [path.exists() for path in kept.values()] == [False, False, False]
    assert call("cache").stdout == call("cache", "clean").stdout == "Nothing is kept.\n"


def test_what_another_process_writes_is_not_deleted(kept):
    partial = kept["rows"].with_name("3.partial")
    partial.mkdir()
    with FileLock(kept["rows"].with_name("3.lock")):
        result = call("cache", "clean", "rows", "--yes")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {partial} is being written. Try again")
    assert partial.exists()
    assert call("cache", "clean", "rows", "--yes").exit_code == 0
    assert not partial.exists()


def test_a_second_run_reads_the_base_from_the_cache_and_learns_the_same(shop, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(base_cache, "MIN_CHECKPOINT_BYTES", 0)
    shop.write(training={"max_steps": 3})
    outputs = [shop.run() for _ in range(2)]
    assert ["The 4-bit base is read from the cache" in output.stdout + output.stderr for output in outputs] == [False, True]
    assert f"{shop.base}, NF4 double, float32" in call("cache", "--all").stdout
    first, second = shop.runs()
    losses = [[line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line] for run in (first, second)]
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 3
    tensors = [read_json(run / "base.json")["tensors"] for run in (first, second)]
    assert tensors[0] == tensors[1]
    adapters = [run / "adapter" for run in (first, second)]
    names = ("adapter_model.safetensors", "adapter_config.json", "config.json")
    assert [(adapters[0] / name).read_bytes() == (adapters[1] / name).read_bytes() for name in names] == [True] * 3
    assert json.loads((second / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(shop.base)
