"""Setting keys in the text of a recipe; comments, order and all other lines stay as the author wrote them."""

import textwrap
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tomlkit
from tomlkit.items import InlineTable, Item, Key, Table

from qlora_phi3.errors import RecipeError
from qlora_phi3.recipe.messages import format_toml, toml_item
from qlora_phi3.recipe.schema import Recipe

#: Column of the comment behind a new value, where the value is short enough.
COMMENT_COLUMN = 36
#: Columns of the heading.
WIDTH = 100


@dataclass(frozen=True, slots=True)
class Choice:
    """A key, its new value, and the reason, which becomes a comment; an empty reason adds no comment."""

    table: str
    key: str
    value: Any
    reason: str


def fit_recipe(recipe: Recipe, text: str, choices: Sequence[Choice], heading: str) -> tuple[Recipe, str]:
    """Set keys of a recipe.

    Args:
        recipe: what `text` says, with the changes of the command line.
        text: of the recipe file.
        choices: the keys to set; of several for one key the last counts.
        heading: to put above everything, as comments.

    Returns:
        The recipe with the choices made, and its text with Unix line ends.

    Raises:
        RecipeError: the edited text would not give that recipe.
    """
    document = tomlkit.parse(text.removeprefix("\ufeff").replace("\r\n", "\n").rstrip("\n") + "\n")
    tables: dict[str, dict[str, Any]] = {}
    for choice in {(choice.table, choice.key): choice for choice in choices}.values():
        tables.setdefault(choice.table, {})[choice.key] = choice.value
        _set(document, choice)
    chosen = recipe.model_copy(
        update={table: getattr(recipe, table).model_copy(update=keys) for table, keys in tables.items()}
    )
    comment = textwrap.fill(heading, WIDTH, initial_indent="# ", subsequent_indent="# ")
    written = f"{comment}\n\n{tomlkit.dumps(document)}"
    try:
        same = Recipe.model_validate(tomllib.loads(written)).model_dump() == chosen.model_dump()
    except ValueError:  # of tomllib or pydantic
        same = False
    if not same:
        raise RecipeError(
            "The recipe is written in a way that cannot be edited automatically.",
            "Write its tables as sections: [training], and the keys below it.",
        )
    return chosen, written


def _set(document: tomlkit.TOMLDocument, choice: Choice) -> None:
    """Replace the value of the key, or add the key at the end of its table, or the table at the end of the document."""
    value: Item = toml_item(choice.value)
    if choice.table not in document:
        document.append(choice.table, tomlkit.table())
    table = document[choice.table]
    current = table.get(choice.key)
    if isinstance(current, Table):  # a section such as [lora.rank_pattern]
        for key in current.keys() - choice.value.keys():
            del current[key]
        current.update(choice.value)
        value = current
    elif current is None and isinstance(table, Table):
        # Comments and blank lines before the next header belong to the table that ends there; the key goes above them.
        body = table.value.body
        trailing: list[tuple[Key | None, Item]] = []
        while body and body[-1][0] is None:
            trailing.insert(0, body.pop())
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
        width = len(f"{value.trivia.indent}{choice.key} = {format_toml(choice.value)}")
        value.comment(choice.reason)
        value.trivia.comment_ws = " " * max(1, COMMENT_COLUMN - width)
