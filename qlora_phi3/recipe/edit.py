"""A recipe's text with some keys set, each with its reason as a comment; everything else stays as its author wrote it."""

import re
import textwrap
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_phi3.recipe.load import recipe_as_toml
from qlora_phi3.recipe.messages import format_toml
from qlora_phi3.recipe.schema import Recipe

HEADER = re.compile(r"\s*\[\s*(\w+)\s*\]\s*(#.*)?")


#: A key's line: up to the value, the value (text in quotes, or what has no comment sign), and a comment.
LINE = r"(\s*{key}\s*=\s*)(\"(?:[^\"\\]|\\.)*\"|'[^']*'|[^#]*?)(\s*)(#.*)?"


#: Where comments begin, as far as keys and values leave room.
COMMENT_COLUMN = 36


WIDTH = 100


@dataclass(frozen=True, slots=True)
class Choice:
    """A key, the value it gets, and why; no reason, no comment."""

    table: str
    key: str
    value: Any
    reason: str


def fit_recipe(recipe: Recipe, text: str, choices: Sequence[Choice], heading: str) -> tuple[Recipe, str]:
    """Set keys of a recipe.

    Args:
        recipe: what `text` holds, and what the command line added to it.
        text: of the recipe's file.
        heading: to put above all, as comments.

    Returns:
        The recipe with the choices made, and the text that says so. Where the file is written in a way that cannot be edited line
        by line (inline tables, dotted keys), every key is written out anew.
    """
    tables: dict[str, dict[str, Any]] = {}
    for choice in choices:
        tables.setdefault(choice.table, {})[choice.key] = choice.value
    chosen = recipe.model_copy(
        update={table: getattr(recipe, table).model_copy(update=keys) for table, keys in tables.items()}
    )
    above = textwrap.fill(heading, WIDTH, initial_indent="# ", subsequent_indent="# ") + "\n\n"
    edited = above + _edit(text, choices)
    if not _says(edited, chosen):
        edited = above + _edit(recipe_as_toml(recipe), choices)
    return chosen, edited


def _says(text: str, recipe: Recipe) -> bool:
    try:
        return Recipe.model_validate(tomllib.loads(text)).model_dump() == recipe.model_dump()
    except ValueError:  # both tomllib's and pydantic's errors are
        return False


def _edit(text: str, choices: Sequence[Choice]) -> str:
    lines = text.removeprefix("\ufeff").splitlines()
    for choice in choices:
        _set(lines, choice)
    return "\n".join(lines) + "\n"


def _set(lines: list[str], choice: Choice) -> None:
    """Replace the key's line in its table, or add one at the table's end, or the table at the end of all."""
    begin = next((number for number, line in enumerate(lines) if _table(line) == choice.table), None)
    if begin is None:
        lines += ["", f"[{choice.table}]", _per_layer_fit(choice)]
        return
    end = next((number for number in range(begin + 1, len(lines)) if _table(lines[number])), len(lines))
    last = begin
    for number in range(begin + 1, end):
        found = re.fullmatch(LINE.format(key=re.escape(choice.key)), lines[number])
        if found:
            lines[number : number + 1] = _replaced(found, choice)
            return
        if lines[number].strip() and not lines[number].lstrip().startswith("#"):
            last = number
    lines.insert(last + 1, _per_layer_fit(choice))


def _table(line: str) -> str | None:
    found = HEADER.fullmatch(line)
    return found[1] if found else None


def _per_layer_fit(choice: Choice) -> str:
    pair = f"{choice.key} = {format_toml(choice.value)}"
    return f"{pair:<{COMMENT_COLUMN}}# {choice.reason}" if choice.reason else pair


def _replaced(found: re.Match[str], choice: Choice) -> list[str]:
    """The line with its new value; the author's comment stays behind it, and the reason goes above."""
    pair = f"{found[1]}{format_toml(choice.value)}"
    if not found[4]:
        return [f"{pair:<{COMMENT_COLUMN}}# {choice.reason}" if choice.reason else pair]
    line = f"{pair:<{len(found[1] + found[2] + found[3]) - 1}} {found[4]}"
    return [f"# {choice.reason}", line] if choice.reason else [line]
