"""`qlora-phi3 inspect` on the command line: what is printed, in which form, and what is refused."""

import json

import pytest
from rich.console import Console
from workshop import call

from qlora_phi3.ui.inspect import legend, shown


def test_inspect_shows_rows_with_the_learned_text_marked_and_then_the_figures(shop):
    result = call("inspect", str(shop.write(data={"eval_size": 8})))
    assert result.exit_code == 0, result.stderr
    first = result.stdout.splitlines()[1]
    assert first.startswith("chats.jsonl:1: ")
    assert "[[" in result.stdout
    assert "<|end|>]]" in result.stdout
    assert "40 rows to train on and 8 to measure on" in result.stdout
    assert "< the recipe's" in result.stdout
    assert "\x1b" not in result.stdout


def test_text_of_the_data_cannot_control_the_terminal_or_be_read_as_markup(shop):
    turns = [{"role": "user", "content": "\x1b[31m[bold]x[/bold]"}, {"role": "assistant", "content": "<script>[red]\x07"}]
    (shop.path / "evil.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    recipe = shop.write(data={"train": "evil.jsonl"}, training={"do_eval": False})
    result = call("inspect", str(recipe), "--row", "1", "--html", str(shop.path / "page.html"))
    assert result.exit_code == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert "[bold]x[/bold]" in result.stdout
    assert "[red]" in result.stdout
    page = (shop.path / "page.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_long_line_is_shown_complete_and_without_what_controls_a_terminal():
    assert shown("y" * 3000) == "y" * 3000
    assert shown("\x1b[31mred") == "\\x1b[31mred"


def test_json_has_the_statistics_the_rows_and_the_problems(shop):
    result = call("inspect", str(shop.write(training={"max_length": 26})), "--row", "2", "--json")
    value = json.loads(result.stdout)
    assert value["statistics"]["report"]["max_length"] == 26
    (row,) = value["rows"]
    assert row["name"].endswith("chats.jsonl:2")
    assert sum(len(piece["ids"]) for piece in row["pieces"]) == row["num_tokens"] == 26
    assert all("chats.jsonl:" in problem["name"] for problem in value["problems"])
    assert len(value["problems"]) == value["statistics"]["report"]["truncated"] > 0


def test_ids_are_printed_a_token_a_line(shop):
    result = call("inspect", str(shop.write()), "--row", "1", "--ids")
    lines = result.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("chats.jsonl:1")) + 1
    count = int(lines[start - 1].split()[1])
    assert all(line.split()[0].isdecimal() for line in lines[start : start + count])
    assert sum(line.split()[1] == "learned" for line in lines[start : start + count]) == int(lines[start - 1].split()[3])


def test_problems_are_none_where_every_row_is_used(shop):
    assert call("inspect", str(shop.write()), "--problems").stdout == "No row is left out or cut.\n"


def test_an_existing_page_is_not_overwritten_and_a_row_that_is_none_is_refused(shop):
    (shop.path / "page.html").write_text("mine", encoding="utf-8")
    result = call("inspect", str(shop.write()), "--html", str(shop.path / "page.html"))
    assert (result.exit_code, (shop.path / "page.html").read_text(encoding="utf-8")) == (2, "mine")


def test_a_page_in_a_directory_that_is_not_there_is_one_line(shop):
    result = call("inspect", str(shop.write()), "--html", "gone/page.html")
    line = f"Error: --html gone/page.html: there is no directory {shop.path / 'gone'}. Make it, or name another file.\n"
    assert (result.exit_code, result.stderr) == (2, line)
    result = call("inspect", str(shop.write()), "--row", "999")
    assert result.exit_code == 2
    assert "--row 999" in result.stderr


@pytest.mark.parametrize(("colour", "how"), [("1", "underlined"), (None, "green and underlined")])
def test_the_legend_names_no_colour_where_there_is_none(monkeypatch, colour, how):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if colour:
        monkeypatch.setenv("NO_COLOR", colour)
    console = Console(force_terminal=True, color_system="standard")
    assert legend(console).startswith(f"Learned: {how}, with the token")
