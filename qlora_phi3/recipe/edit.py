"""Values as TOML writes them, and setting keys in the text of a recipe, whose comments and order stay.

tomlkit is imported where it is used: a recipe without an error is read without it (15 ms).
"""

import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_phi3.errors import RecipeError, printable
from qlora_phi3.recipe.schema import Recipe

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

#: Column of the comment behind a new value, where the value is short enough; and columns of the heading.
COMMENT_COLUMN, WIDTH = 36, 100
#: A longer key with its value has its reason on the line above.
WIDEST_KEY = 60


@dataclass(frozen=True, slots=True)
class Choice:
    """A key, its new value, and the reason, which becomes a comment; an empty reason adds no comment."""

    table: str
    key: str
    value: Any
    reason: str


def format_toml(value: object) -> str:
    """A value as TOML writes it on one line: strings, numbers, booleans, lists and inline tables."""
    import tomlkit

    if not isinstance(value, dict):
        return tomlkit.item(value).as_string()
    table = tomlkit.inline_table()
    table.update(value)
    return table.as_string()


def commented_toml(tables: Mapping[str, Sequence[tuple[str, Any, str]]], heading: Sequence[str]) -> str:
    """A recipe of (key, value, reason): the reason behind each key, or above one that is long; `heading` as comments on top."""
    lines = ["# " + printable(line).replace("\n", " ") for line in heading]
    for table, keys in tables.items():
        lines += ["", f"[{table}]"]
        pairs = [(f"{key} = {format_toml(value)}", printable(" ".join(reason.split()))) for key, value, reason in keys]
        width = max((len(pair) for pair, _ in pairs if len(pair) <= WIDEST_KEY), default=0)
        for pair, reason in pairs:
            lines += [f"{pair:<{width}}   # {reason}"] if len(pair) <= WIDEST_KEY else [f"# {reason}", pair]
    return "\n".join((*lines, ""))


def fit_recipe(recipe: Recipe, text: str, choices: Sequence[Choice], heading: str) -> tuple[Recipe, str]:
    """Set keys of a recipe; of several choices for one key the last counts. Returns the recipe with the choices made, and its
    text with Unix line ends. RecipeError where the edited text would not give it.

    `recipe` is what the `text` of the recipe file says, with the changes of the command line. `heading` is put above everything,
    as comments.
    """
    import tomlkit

    document = tomlkit.parse(text.removeprefix("\ufeff").replace("\r\n", "\n").rstrip("\n") + "\n")
    tables: dict[str, dict[str, Any]] = {}
    for choice in {(choice.table, choice.key): choice for choice in choices}.values():
        tables.setdefault(choice.table, {})[choice.key] = choice.value
        _set(document, choice)
    updated = {table: getattr(recipe, table).model_copy(update=keys) for table, keys in tables.items()}
    chosen = recipe.model_copy(update=updated)
    comment = textwrap.fill(heading, WIDTH, initial_indent="# ", subsequent_indent="# ")
    written = f"{comment}\n\n{tomlkit.dumps(document)}"
    with suppress(ValueError):  # of tomllib or pydantic
        if Recipe.model_validate(tomllib.loads(written)).model_dump() == chosen.model_dump():
            return chosen, written
    hint = "Write its tables as sections: [training], and the keys below it."
    raise RecipeError("The recipe is written in a way that cannot be edited automatically.", hint)


def _set(document: "TOMLDocument", choice: Choice) -> None:
    """Replace the value of the key, or add the key at the end of its table, or the table at the end of the document."""
    import tomlkit
    from tomlkit.items import InlineTable, Table

    text = format_toml(choice.value)
    value: Any = tomlkit.value(text)
    if choice.table not in document:
        document.append(choice.table, tomlkit.table())
    table: Any = document[choice.table]
    current = table.get(choice.key)
    if isinstance(current, Table):  # a section such as [lora.rank_pattern]
        for key in current.keys() - choice.value.keys():
            del current[key]
        current.update(choice.value)
        value = current
    elif current is None and isinstance(table, Table):
        # Comments and blank lines before the next header belong to the table that ends there; the key goes above them.
        body = table.value.body
        end = len(body)
        while end and body[end - 1][0] is None:
            end -= 1
        trailing = body[end:]
        del body[end:]
        table.append(choice.key, value)
        body.extend(trailing)
    else:
        table[choice.key] = value  # keeps the indent and the comment of the former value
    if not choice.reason:
        return
    if isinstance(table, InlineTable):  # which can hold no comment
        table.trivia.indent += f"# {choice.key}: {choice.reason}\n"
    elif value.trivia.comment:
        value.trivia.indent = f"# {choice.reason}\n{value.trivia.indent}"
    else:
        width = len(f"{value.trivia.indent}{choice.key} = {text}")
        value.comment(choice.reason)
        value.trivia.comment_ws = " " * max(1, COMMENT_COLUMN - width)
