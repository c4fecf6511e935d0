"""stdout and stderr whose reader is gone, or that were closed before the program began."""

import os
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from workshop import call

from qlora_phi3.cli.output import ask

COMMAND = [sys.executable, "-m", "qlora_phi3"]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such descriptors")


def schema(**options):
    return subprocess.run([*COMMAND, "recipe", "schema"], check=False, **options)


def test_a_reader_that_is_gone_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    result = schema(stdout=writer, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (0, b"")


def test_an_error_for_nobody_keeps_its_exit_code():
    reader, writer = os.pipe()
    os.close(reader)
    assert subprocess.run([*COMMAND, "recipe", "check", "none.toml"], stderr=writer, check=False).returncode == 2


def test_a_terminal_that_is_closed_is_no_error():
    terminal, end = os.openpty()
    os.close(terminal)
    result = schema(stdout=end, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_are_no_error(closed):
    shell = subprocess.run(["sh", "-c", f'"$0" -m qlora_phi3 recipe schema {closed}', sys.executable], check=False)
    assert shell.returncode == 0


def test_keys_that_were_typed_before_a_question_do_not_answer_it(monkeypatch):
    terminal, end = os.openpty()
    os.write(terminal, b"2\n")
    assert select.select([end], [], [], 5)[0]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(fileno=lambda: end))
    monkeypatch.setattr("click.prompt", lambda question, **_: select.select([end], [], [], 0)[0])
    assert ask("Model") == []


def test_a_slow_reader_of_a_pipe_that_does_not_wait_gets_everything():
    whole = schema(capture_output=True).stdout
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen([*COMMAND, "recipe", "schema"], stdout=writer)
    os.close(writer)
    read = b""
    while part := os.read(reader, 4096):
        read += part
        time.sleep(0.01)
    assert (process.wait(), read) == (0, whole)


def test_a_file_that_cannot_grow_is_an_error(tmp_path):
    command = f'ulimit -f 1; "$0" -m qlora_phi3 recipe schema > {tmp_path / "schema.json"}'
    result = subprocess.run(["sh", "-c", command, sys.executable], stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "ulimit -f" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_every_command_in_one_line(monkeypatch, shop, number):
    import qlora_phi3.recipe.load as load

    monkeypatch.setattr(load, "load_recipe", lambda *args, **kwargs: signal.raise_signal(number))
    for words in (("vram-check", "mine.toml", "--vram", "8GB"), ("recipe", "check", "mine.toml")):
        result = call(*words)
        assert (result.exit_code, result.stderr) == (130, "Stopped.\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch):
    import qlora_phi3.recipe.load as load

    seen = []
    monkeypatch.setattr(load, "recipe_schema", lambda: seen.append(signal.getsignal(signal.SIGHUP)) or {})
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert call("recipe", "schema").exit_code == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [signal.SIG_IGN]
