"""`scripts/ask_demo.py` answers with the base and with the trained adapter of the newest run."""

import sys

import ask_demo
from trained_run import leave_trained


def test_the_two_answers_are_the_bases_and_the_adapters(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ask_demo, "REPOSITORY", tmp_path)
    monkeypatch.setattr(sys, "argv", ["ask_demo.py", "What", "is", "red?"])
    assert ask_demo.main() == 1
    assert "scripts/demo.py" in capsys.readouterr().err
    run = tmp_path / "runs" / "demo" / "2026-01-01_00-00-00"
    run.mkdir(parents=True)
    leave_trained(run, base)
    assert ask_demo.main() == 0
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("before: ")
    assert after.startswith("after:  ")
    assert before.split(maxsplit=1)[1:] != after.split(maxsplit=1)[1:]
