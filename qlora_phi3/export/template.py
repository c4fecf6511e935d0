"""What ends an assistant's turn in a trained model, and the chat template it must be given where the base has another."""

import re
from dataclasses import dataclass
from pathlib import Path

from qlora_phi3.dataset.template import ChatTemplate, choose_template
from qlora_phi3.errors import DataError, ExportError
from qlora_phi3.model import load_tokenizer
from qlora_phi3.recipe.tables import Model

#: Marks of the assistant's words, which only training reads.
MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class EndOfTurn:
    """The id that ends a turn; and the template that was trained with, None where it is the base's own."""

    token_id: int
    template: str | None


def read_end_of_turn(base: Path, chat_template: str) -> EndOfTurn:
    """Read it off the template that the run trained with.

    Args:
        chat_template: the recipe's [data] chat_template, or the file that the run kept of it.

    Raises:
        ExportError: the end of a turn is no single token.
    """
    tokenizer = load_tokenizer(Model(name=str(base)))
    trained = choose_template(tokenizer, chat_template)
    token_id = tokenizer.convert_tokens_to_ids(trained.end_of_turn)
    if not isinstance(token_id, int) or tokenizer.decode([token_id]).strip() != trained.end_of_turn:
        raise ExportError(
            f"The chat template ends a turn with '{trained.end_of_turn}', which is no single token of {base}.",
            "Train with the family's own template.",
        )
    is_own = bool(tokenizer.chat_template) and (chat_template == "auto" or _own_name(tokenizer) == trained.name)
    return EndOfTurn(token_id, None if is_own else _without_marks(trained))


def _own_name(tokenizer: object) -> str | None:
    try:
        return choose_template(tokenizer).name
    except DataError:
        return None


def _without_marks(template: ChatTemplate) -> str:
    return MARKS.sub("", template.source)
