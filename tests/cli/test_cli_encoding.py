"""Output where the encoding of stdout lacks characters that we print."""

import os
import subprocess
import sys

import pytest
from workshop import Workshop, call

from qlora_phi3.cli.output import ASCII_SYMBOLS

#: Shows every symbol of vram-check: processes, budget, margin, free memory.
TOO_LARGE = ("--vram", "8GB", "--set", "memory.budget=300MiB")
#: Starts the command line with one more command, whose body is the rest.
WITH_COMMAND = """
from qlora_phi3.cli.main import main
@main.command()
def last_lines():
    {body}
main(["last-lines"])
"""
FINISH = """
    import qlora_phi3.ui.live as ui
    from qlora_phi3.reporter import RunOutline
    from qlora_phi3.runfolder import RunFolder
    from pathlib import Path
    from types import SimpleNamespace
    with ui.open_console() as reporter:
        earlier = [{"kind": "train", "loss": loss} for loss in (3.0, 2.0, 1.0)]
        reporter.begin(RunOutline(total_steps=3, epochs=1, earlier=earlier))
        reporter.warning("\u6570\u636e.jsonl")
        result = SimpleNamespace(folder=RunFolder(Path("caf\u00e9")), steps=3, loss_before=2.0, loss_after=1.0, seconds=5.0)
        reporter.finish(result, [])
"""


def run_python(*arguments, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=False)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-8"])
def test_a_run_reaches_its_last_line_in_every_encoding(encoding):
    code, out, err = run_python("-c", WITH_COMMAND.format(body=FINISH), encoding=encoding)
    assert code == 0, err
    curve, *_, done, _, _, _ = out.decode(encoding).splitlines()
    assert curve.split()[2] == {"utf-8": "█▅▁", "cp437": "█=_"}.get(encoding, "#=_")
    assert done.startswith("Done: 3 steps in 0:05, all sessions, from reading the data to saving. ")
    name = "caf\\u00e9" if encoding == "ascii" else "café"
    assert done.endswith(f"{name}{os.sep}adapter")
    assert ("数据.jsonl" if encoding == "utf-8" else "\\u6570\\u636e.jsonl") in err.decode(encoding)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base):
    """A recipe whose answer of `vram-check --vram 8GB` is in the cache of the child processes."""
    path = tmp_path_factory.mktemp("encoding")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "LOCALAPPDATA"):
            patch.setenv(variable, str(path / "own"))
        recipe = Workshop(path, base).write(quantization={"bnb_4bit_compute_dtype": "bfloat16"})
        assert call("vram-check", str(recipe), *TOO_LARGE).exit_code == 3
        yield recipe


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["recipe", "check", "RECIPE"], 0),
        (["vram-check", "RECIPE", *TOO_LARGE], 3),
        (["run", "数据.toml"], 2),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_command_prints_its_result_in_every_encoding(recipe, arguments, exit_code):
    words = [str(recipe) if word == "RECIPE" else word for word in arguments]
    lines = {}
    for encoding in ("cp1252", "ascii", "utf-8"):
        code, out, err = run_python("-m", "qlora_phi3", *words, encoding=encoding)
        assert code == exit_code, err
        assert b"Traceback" not in err
        lines[encoding] = len((out or err).splitlines())
    assert len(set(lines.values())) == 1
    assert lines["utf-8"] > 0


def test_every_symbol_has_an_ascii_character_of_the_same_width():
    assert all(
        len(symbol) == 1 and len(ascii_symbol) == 1 and ascii_symbol.isascii() for symbol, ascii_symbol in ASCII_SYMBOLS.items()
    )
