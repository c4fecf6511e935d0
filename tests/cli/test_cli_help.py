"""The help, the documentation that ships, what Tab offers, and lines on a narrow terminal."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from run_files import write_run
from workshop import call

from qlora_phi3.cli import output
from qlora_phi3.cli.docs import render
from qlora_phi3.cli.main import COMMANDS, main
from qlora_phi3.cli.options import complete_run

PAGES = Path(__file__).parents[2] / "docs"


def test_the_help_lists_every_command_and_imports_none_of_them():
    program = (
        "import sys; from qlora_phi3.cli.main import main; main(['--help'], standalone_mode=False);"
        "print([name for name in sys.modules if name.startswith('qlora_phi3')], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    listed = result.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    needed = ["", ".cli", ".errors", ".cli.output", ".cli.main"]
    assert sorted(eval(result.stderr)) == sorted(f"qlora_phi3{name}" for name in needed)


def test_the_help_of_a_command_imports_only_click_and_what_all_commands_share():
    program = (
        "import sys, click; from qlora_phi3.cli.main import COMMANDS, main\n"
        "for name in COMMANDS: main.get_command(click.Context(main), name)\n"
        "print(sorted(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = set(eval(result.stdout))
    commands = {f"qlora_phi3.cli.{name.replace('-', '_')}" for name in COMMANDS}
    shared = {
        "qlora_phi3",
        *(f"qlora_phi3.{name}" for name in ("cli", "cli.main", "cli.options", "cli.output", "errors", "units")),
    }
    assert {name for name in found if name.startswith("qlora_phi3")} == commands | shared
    assert not found & {"dataclasses", "hashlib", "json", "logging", "subprocess", "tempfile"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_is_listed_exists(name):
    assert isinstance(main.get_command(click.Context(main), name), click.Command)


def test_the_recipes_that_ship_are_listed():
    shown = call("recipe", "--help").stdout.partition("Recipes that ship:\n")[2].split()
    assert set(shown) == {path.stem for path in (PAGES.parent / "recipes").glob("*.toml")}


def test_the_documentation_is_listed_and_printed():
    listed = call("docs").stdout
    assert all(f"{path.stem} " in listed for path in PAGES.glob("*.md"))
    assert call("docs", "data").stdout == (PAGES / "data.md").read_text(encoding="utf-8")


def test_a_page_in_a_terminal_has_no_markdown_and_links_are_commands(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    table = "| a | b |\n|---|---|\n| 1 | see [gguf.md](gguf.md) |"
    shown = render(f"# Head\n\n{table}\n\n**Rows** of [your own](data.md), {'word ' * 30}")
    assert "qlora-phi3 docs gguf" in shown
    assert "your own (qlora-phi3 docs data)" in " ".join(shown.split())
    assert not any(mark in shown for mark in ("](", "**", "|---", "# Head"))
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("", ["a", "runs/a/latest", "b", "runs/b/latest"]),
        ("runs/b", ["runs/b/latest", "runs/b/1"]),
        ("runs/a/", ["runs/a/latest", "runs/a/1", "runs/a/2"]),
        ("other/", []),
    ],
)
def test_tab_offers_runs_and_directories(tmp_path, monkeypatch, typed, offered):
    monkeypatch.chdir(tmp_path)
    for name in ("a/1", "a/2", "b/1"):
        write_run(tmp_path / "runs" / name)
    first, *others = complete_run(None, None, typed)
    assert (first.type, first.value) == ("dir", typed)
    assert [item.value for item in others] == offered


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("of twelve letters, and of more", "of twelve letters,\nand of more\n"),
        ("type: qlora-phi3 run my-chats.toml", "type:\nqlora-phi3 run my-chats.toml\n"),
        ("Read qlora-phi3 docs gguf. Or take others.", "Read\nqlora-phi3 docs gguf.\nOr take others.\n"),
        ("qlora-phi3 chat a --prompt 'One. Two, three' or so", "qlora-phi3 chat a --prompt 'One. Two, three' or so\n"),
        ("a-word-without-any-space", "a-word-without-any-space\n"),
    ],
)
def test_a_terminal_breaks_lines_between_words_and_no_command(monkeypatch, capsys, text, shown):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.echo(text)
    assert capsys.readouterr().out == shown
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    output.echo(text)
    assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    {
        "eval x --rows abc": "--rows: 'abc' is not a whole number of 1 or more. `qlora-phi3 eval --help` explains it.",
        "eval x --rows 0": "--rows: 0 is not a whole number of 1 or more. `qlora-phi3 eval --help` explains it.",
        "chat x --temperature hot": "--temperature: 'hot' is not a number of 0 or more. `qlora-phi3 chat --help` explains it.",
        "chat x --top-p 2": "--top-p: 2.0 is not a number above 0, at most 1. `qlora-phi3 chat --help` explains it.",
        "runs why --spikes 51": (
            "--spikes: 51 is not a whole number of 1 or more, at most 50. `qlora-phi3 runs why --help` explains it."
        ),
        "export x --format hg": "--format: 'hg' is not one of 'hf', 'gguf'. `qlora-phi3 export --help` explains it.",
        "chat x --base gone": "--base: Directory 'gone' does not exist. `qlora-phi3 chat --help` explains it.",
        "eval": "Missing argument 'RUN'. `qlora-phi3 eval --help` explains it.",
        "evl x": "There is no command 'evl'. Did you mean 'eval'? `qlora-phi3 --help` explains it.",
        "init a.json b.json": "DATA is one name. For several files put a pattern in quotes: qlora-phi3 init '*.json'",
    }.items(),
)
def test_a_mistake_on_the_command_line_is_one_line_with_what_is_allowed(words, line):
    result = CliRunner().invoke(main, words.split(), prog_name="qlora-phi3")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"Error: {line}\n")


def test_a_group_without_a_command_shows_its_help():
    assert "Commands:\n  check" in CliRunner().invoke(main, ["recipe"]).output


def test_a_page_that_is_not_there_has_a_nearest_one():
    assert "Did you mean data? The pages are " in call("docs", "dta").stderr


def test_an_option_of_the_command_above_is_said_to_come_before():
    refused = call("runs", "show", "--dir", "elsewhere")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("Error: --dir comes before show: ")
    assert refused.stderr.endswith(" runs --dir ... show\n")


@pytest.mark.parametrize(("given", "value"), [(None, "3000"), ("7", "7")])
def test_threads_that_wait_soon_give_their_core_away_in_every_command(monkeypatch, given, value):
    """Generation took five times as long beside two other programs where only `run` set it."""
    monkeypatch.setenv("GOMP_SPINCOUNT", given or "")
    if given is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    CliRunner().invoke(main, ["docs"])
    assert os.environ["GOMP_SPINCOUNT"] == value
