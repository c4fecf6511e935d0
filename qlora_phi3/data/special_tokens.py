"""Special tokens that a row holds as text are tokenized as text, so that no text can begin or end a turn.

A row without such text, nearly every row, is tokenized by the model's tokenizer as it is. In any other row the special tokens of
the words are broken by a mark before the template is rendered. Those that the template itself writes are then the only ones that
are whole; they get names that no text has, the marks are taken out, and a copy of the tokenizer that knows the special tokens by
these names alone tokenizes the text. It treats white space beside them as the model's tokenizer does.
"""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from qlora_phi3.data.messages import SkipRow

#: Breaks a special token; around a special token that is one. Unicode's noncharacters, which no text has.
MARK, AROUND = "\ufdd0", "\ufdd1"
#: An assistant's thinking stands between them in its own words; they do not end a turn.
THINKING = ("<think>", "</think>")
#: Characters [start, end) of a text.
Span = tuple[int, int]


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
        return self._renamed.encode(plain, add_special_tokens=False), moved

    def ids_of(self, encoding: Any) -> list[int]:
        """The model's ids of what `encode` returned."""
        return [self._real_ids.get(token_id, token_id) for token_id in encoding.ids]

    def whole_in(self, text: str) -> list[str]:
        """The special tokens in a rendered text that are not broken."""
        return [found[0] for found in self._whole_or_mark.finditer(text) if found[0] not in (MARK, *THINKING)]

    @cached_property
    def _renamed(self) -> Any:
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["content"] = f"{AROUND}{token['content']}{AROUND}"
        return Tokenizer.from_str(json.dumps({**state, "truncation": None, "padding": None}))

    @cached_property
    def _real_ids(self) -> dict[int, int]:
        """Id in the copy -> id of the model."""
        added = self.tokenizer.added_tokens_decoder
        return {self._renamed.token_to_id(f"{AROUND}{token.content}{AROUND}"): token_id for token_id, token in added.items()}

    @cached_property
    def ends(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before a text and after it, such as the start of a text."""
        bare = self.tokenizer("x", add_special_tokens=False).input_ids
        ids = list(self.tokenizer("x").input_ids)
        first = next(place for place in range(len(ids)) if ids[place : place + len(bare)] == bare)
        return ids[:first], ids[first + len(bare) :]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")
