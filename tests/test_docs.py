"""The commands of the README and the docs, the generated pages, and the pinned versions, compared with the program."""

import re
import shlex
import sys
import tomllib
from itertools import chain
from pathlib import Path

import click
import pytest

from qlora_phi3.cli.main import main
from qlora_phi3.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("#")[0].split(" > ")[0].strip() for kind, text in BLOCKS if not kind for line in text.splitlines()]


def commands_of(page):
    """The commands in a page's blocks of shell lines; a line that ends in a backslash goes on in the next one."""
    blocks = re.findall(r"```(?:|bash|sh|console)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split(" #")[0].split(" > ")[0].strip() for line in lines if line.startswith("qlora-phi3 ")]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = sorted({line for page in PAGES for line in commands_of(page)})


@pytest.mark.parametrize("line", LINES)
def test_the_program_accepts_every_command_of_the_docs(line):
    arguments, command = shlex.split(line)[1:], main
    while isinstance(command, click.Group) and arguments:  # `qlora-phi3 cache` is a command and a group
        command = command.get_command(None, arguments.pop(0))
    command.make_context("readme", arguments, resilient_parsing=False, **main.context_settings)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python3 ")])
def test_every_script_of_the_readme_exists(line):
    assert (ROOT / shlex.split(line)[1]).is_file()


def test_the_readme_shows_both_kinds_of_command():
    assert len([line for line in COMMANDS if line.startswith("qlora-phi3 ")]) >= 5
    assert [line for line in COMMANDS if line.startswith("python3 ")] == [
        "python3 scripts/demo.py",
        "python3 scripts/test.py",
    ]


def test_the_shortest_recipe_of_the_readme_loads(tmp_path):
    (text,) = [text for kind, text in BLOCKS if kind == "toml"]
    (tmp_path / "my.toml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path / "my.toml").training.batch_size == 16


def test_the_python_of_the_docs_compiles():
    blocks = [text for page in PAGES for text in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)]
    assert blocks
    for text in blocks:
        compile(text, "docs", "exec")


def test_every_link_of_the_docs_leads_to_a_file():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_pages_made_from_the_program_are_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from make_docs import PAGES

    for name, render in PAGES.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == render(), "run: python scripts/make_docs.py"


def test_the_tested_set_satisfies_the_ranges_of_the_project():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    requirements = chain(project["dependencies"], *project["optional-dependencies"].values())
    for requirement in map(Requirement, requirements):
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert sys.version_info >= (3, 11)
