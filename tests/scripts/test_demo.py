"""Ctrl-C in `scripts/demo.py`: the program that it runs can save, and the command that resumes is printed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import demo

SCRIPTS = Path(demo.__file__).parent

#: What the training does at Ctrl-C: it saves for a second, then exits with 130.
SAVING = """
import signal, sys, time
def save(*_):
    print("saving", flush=True)
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a process group that is sent SIGINT, as a terminal does")
def test_ctrl_c_waits_until_the_program_has_saved():
    parent = (
        f"import sys; sys.path.append({str(SCRIPTS)!r})\nfrom environment import run; run([sys.executable, '-c', {SAVING!r}])"
    )
    program = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    for _ in range(2):  # a second Ctrl-C must not kill it either
        os.killpg(program.pid, signal.SIGINT)
        time.sleep(0.1)
    assert program.communicate(timeout=30)[0].split()[-1] == "saved"
    assert program.returncode == 130


@pytest.mark.parametrize(
    ("status", "arguments", "command"),
    [
        ("interrupted", [], "python3 scripts/demo.py --resume\n"),
        ("failed", ["--set", "lora.r=8"], "python3 scripts/demo.py --resume --set lora.r=8\n"),
        ("interrupted", ["--resume"], "python3 scripts/demo.py --resume\n"),
        ("done", [], ""),
    ],
)
def test_the_command_that_resumes_is_printed_if_a_run_is_not_done(tmp_path, monkeypatch, capsys, status, arguments, command):
    monkeypatch.setattr(demo, "REPOSITORY", tmp_path)
    folder = tmp_path / "runs" / "demo" / "now"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"status": status}), encoding="utf-8")
    demo.print_resume_command(arguments, time.time())
    assert capsys.readouterr().err.endswith(command)
    demo.print_resume_command(arguments, time.time() + 60)
    assert capsys.readouterr().err == ""
