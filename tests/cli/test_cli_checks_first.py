"""What the files tell is said before torch is loaded: in a process that cannot import it."""

import subprocess
import sys

import pytest
from trained_run import leave_trained
from workshop import write_chats

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from qlora_phi3.cli.main import main; main(prog_name='qlora-phi3')"


@pytest.fixture(scope="module")
def place(tmp_path_factory, base):
    """A directory with a trained run, chats, an empty file, and a list without rows."""
    path = tmp_path_factory.mktemp("place")
    leave_trained(path / "runs" / "mine" / "1", base)
    (path / "runs" / "mine" / "1" / "report.json").write_text('{"status": "done"}', encoding="utf-8")
    write_chats(path / "chats.jsonl")
    (path / "empty.jsonl").touch()
    (path / "list.json").write_text("[]", encoding="utf-8")
    (path / "folder").mkdir()
    (path / "base").symlink_to(base)
    recipe = f"[model]\nname = '{base}'\n[data]\ntrain = 'chats.jsonl'\n"
    (path / "mine.toml").write_text(recipe, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "line"),
    {
        "eval mine --data gone.jsonl": "There is no data file 'gone.jsonl' in ",
        "eval mine --data empty.jsonl": "empty.jsonl is empty.",
        "eval mine --out gone/a.json": "--out gone/a.json: there is no directory ",
        "eval mine --base gone": "--base: Directory 'gone' does not exist.",
        "chat base --compare": "base has no adapter: there is nothing to compare.",
        "run mine.toml --set data.train=empty.jsonl": "empty.jsonl is empty.",
        "run mine.toml --set data.eval=list.json": "list.json holds no rows.",
        "inspect mine.toml --html gone/a.html": "--html gone/a.html: there is no directory ",
    }.items(),
)
def test_it_is_said_before_torch_is_loaded(place, words, line):
    command = [sys.executable, "-c", WITHOUT_TORCH, *words.split()]
    result = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
