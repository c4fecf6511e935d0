"""The base's own tokenizer, loaded and tried without importing torch itself, so that rows can be looked at soon; special tokens.

Special tokens that a row holds as text are tokenized as text, so that no text can begin or end a turn. A row without such text,
nearly every row, is tokenized by the model's tokenizer as it is. In any other row the special tokens of the words are broken by a
mark before the template is rendered. Those that the template itself writes are then the only ones that are whole; they get names
that no text has, the marks are taken out, and a copy of the tokenizer that knows the special tokens by these names alone
tokenizes the text. It treats white space beside them as the model's tokenizer does.
"""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_phi3.data.messages import SkipRow
from qlora_phi3.errors import ModelError
from qlora_phi3.family import Architecture
from qlora_phi3.files import foreign_errors, read_json_object
from qlora_phi3.recipe.schema import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
#: Text that a tokenizer must turn into ids when it is loaded.
PROBE = "A probe, with <|end|> in it.\n"
#: Breaks a special token; around a special token that is one. Unicode's noncharacters, which no text has.
MARK, AROUND = "\ufdd0", "\ufdd1"
#: An assistant's thinking stands between them in its own words; they do not end a turn.
THINKING = ("<think>", "</think>")
#: Characters [start, end) of a text.
Span = tuple[int, int]


def load_tokenizer(config: Model) -> "PreTrainedTokenizerBase":
    """Load the base's own fast tokenizer; ModelError where the base has none, or its files cannot be read."""
    from transformers import AutoTokenizer

    hint = "Point [model] name at a complete checkpoint that includes its tokenizer files."
    try:
        with foreign_errors(ModelError, f"The tokenizer of {config.name} cannot be read: {{reason}}.", hint):
            tokenizer = AutoTokenizer.from_pretrained(config.name, revision=config.revision)
            if not tokenizer.is_fast:
                raise ModelError(f"{config.name} has no fast tokenizer (tokenizer.json).", "Use a checkpoint that has one.")
            # What is damaged without being refused shows in use.
            ids = tokenizer(PROBE, add_special_tokens=True).input_ids
            tokenizer.decode([*ids, *tokenizer.all_special_ids])
            if not all(isinstance(token, str) for token in tokenizer.all_special_tokens) or not ids:
                raise ValueError("it gives no ids, or special tokens that are no text")
            if tokenizer.chat_template is not None:
                tokenizer.get_chat_template()
            return tokenizer
    except ModelError:
        for name in TOKENIZER_JSON:  # the library does not say which file it is
            if (path := Path(config.name, name)).is_file():
                read_json_object(path, ModelError, hint)
        raise


def check_token_ids(rows: Iterable[Any], tokenizer: "PreTrainedTokenizerBase", architecture: Architecture, name: str) -> None:
    """Refuse rows with a token that has no row in the embedding: ModelError with the token, its id and the number of its rows.

    `rows` are data sets of `prepare_datasets`; their `input_ids` are read a column at a time. `name` is for the message.
    """
    import pyarrow.compute  # type: ignore[import-untyped]

    for dataset in rows:
        for batch in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000):
            largest = pyarrow.compute.max(batch["input_ids"].combine_chunks().flatten()).as_py()
            if largest is not None and largest >= architecture.vocab_size:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise ModelError(
                    f"The data have the token {token!r} with id {largest:,}, and the embedding of {name} has "
                    f"{architecture.vocab_size:,} rows (vocab_size).",
                    "Use the tokenizer that belongs to the weights, or remove that token from tokenizer.json.",
                )


class SpecialTokens:
    """The special tokens of one tokenizer, and how text that holds them is tokenized.

    `written` is a rendered conversation: what the chat template writes is special, whatever the tokenizer says.
    """

    def __init__(self, tokenizer: Any, written: str = "") -> None:
        self.tokenizer = tokenizer
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        self.names = tuple(sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True))
        forgeable = (
            name for name in self.names if added.get(name, True) or re.fullmatch(r"<\|.*\|>|</?s>", name) or name in written
        )
        self._whole_or_mark = _any_of((*self.names, MARK))
        #: Whether special tokens take the white space after them along, as Phi-3's do.
        self.takes_space = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
        #: Matches text that the tokenizer would read as a token that shapes the conversation.
        self.pattern = _any_of(name for name in forgeable if name not in THINKING)

    def break_in(self, text: str) -> str:
        """Break every special token in a text that a row holds. SkipRow where the text has the marks themselves."""
        if MARK in text or AROUND in text:
            raise SkipRow("its text holds a special token and a Unicode noncharacter")
        if any(len(found[0]) == 1 for found in self.pattern.finditer(text)):
            raise SkipRow("its text holds a special token of one character, which cannot be told from the token")
        return self.pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text)

    def encode(self, text: str, spans: Iterable[Span] = ()) -> tuple[Any, list[Span]]:
        """Tokenize a rendered text in which `break_in` broke the special tokens of the words. Returns a `tokenizers.Encoding`,
        whose ids `ids_of` turns into the model's, and the spans moved to its characters.
        """
        pieces, moves, position = [], [], 0
        for found in self._whole_or_mark.finditer(text):
            pieces += [text[position : found.start()], "" if found[0] == MARK else f"{AROUND}{found[0]}{AROUND}"]
            moves.append((found.end(), -1 if found[0] == MARK else 2))
            position = found.end()
        plain = "".join((*pieces, text[position:]))
        moved = [
            (start + sum(by for end, by in moves if end <= start), stop + sum(by for end, by in moves if end <= stop))
            for start, stop in spans
        ]
        return self._renamed[0].encode(plain, add_special_tokens=False), moved

    def ids_of(self, encoding: Any, *, with_ends: bool) -> list[int]:
        """The model's ids of what `encode` returned; `with_ends` between those that the tokenizer puts around a text."""
        _, real_ids = self._renamed
        ids = [real_ids.get(token_id, token_id) for token_id in encoding.ids]
        before, after = self._ends if with_ends else ([], [])
        return [*before, *ids, *after]

    def whole_in(self, text: str) -> list[str]:
        """The special tokens in a rendered text that are not broken."""
        return [found[0] for found in self._whole_or_mark.finditer(text) if found[0] not in (MARK, *THINKING)]

    @cached_property
    def _renamed(self) -> tuple[Any, dict[int, int]]:
        """The copy of the tokenizer, and from an id in it to that of the model where they differ."""
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["content"] = f"{AROUND}{token['content']}{AROUND}"
        copy: Any = Tokenizer.from_str(json.dumps({**state, "truncation": None, "padding": None}))
        added: dict[int, Any] = self.tokenizer.added_tokens_decoder
        return copy, {copy.token_to_id(f"{AROUND}{token.content}{AROUND}"): token_id for token_id, token in added.items()}

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before a text and after it, such as the start of a text."""
        bare = self.tokenizer("x", add_special_tokens=False).input_ids
        ids = list(self.tokenizer("x").input_ids)
        first = next(place for place in range(len(ids)) if ids[place : place + len(bare)] == bare)
        return ids[:first], ids[first + len(bare) :]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")
