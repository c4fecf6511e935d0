"""What a chat template puts before, between and after the words of a conversation, found by rendering it."""

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

#: A special token of the family, and the white space after it.
ENDING = re.compile(r"<\|[^|>\s]+\|>\s*")

Message = dict[str, str]


def chat(*turns: str) -> list[Message]:
    """A conversation of turns such as `user How are you?`."""
    return [{"role": role, "content": content} for role, _, content in (turn.partition(" ") for turn in turns)]


#: Conversations that a reading of a template is held against.
PROBES = (
    chat("user one"),
    chat("system be kind", "user one"),
    chat("user one", "assistant two", "user three"),
    chat("system be kind", "user one", "assistant two", "user three", "assistant four", "user five"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """The fixed text around the words of each turn.

    Args:
        opening: in front of the first user turn where there is no system turn; a system prompt of the template's own.
        system: before and after a system turn's words; None where the template has no such turn.
        user: before a user's words, and after them up to where the assistant's begin.
        after_assistant: the end of turn, and what else stands before the next turn.
    """

    opening: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    after_assistant: str

    @property
    def end_of_turn(self) -> str:
        """The token that ends a turn: `<|end|>` or `<|im_end|>`."""
        return self.after_assistant.rstrip()

    def render(self, messages: list[Message]) -> str:
        """The prompt of a conversation that ends with the user's turn."""
        text = self.opening if messages[0]["role"] != "system" else ""
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": ("", self.after_assistant)}
        for message in messages:
            if message["role"] == "system" and self.system is None:
                text += self.opening
                continue
            before, after = around[message["role"]]
            text += before + message["content"] + after
        return text


def read_turns(tokenizer: Any, template: str) -> Turns | None:
    """Read a chat template; None where it cannot be told in fixed pieces, each checked on `PROBES`.

    A begin-of-text token that the template itself writes is left out.
    """
    render = _renderer(tokenizer, template)
    try:
        before_user, between, after_answer, _ = _cut(
            render(chat("user (1)", "assistant (2)", "user (3)")), "(1)", "(2)", "(3)"
        )
        with_system = render(chat("system (1)", "user (2)"))
        ending = ENDING.match(after_answer)
        user = after_answer[ending.end() :] if ending else after_answer
        if ending is None or not before_user.endswith(user):
            return None
        system = None
        if "(1)" in with_system and "(2)" in with_system:
            before_system, after_system, _ = _cut(with_system, "(1)", "(2)")
            system = (before_system, after_system.removesuffix(user))
        turns = Turns(
            opening=before_user.removesuffix(user),
            system=system,
            user=(user, between),
            after_assistant=ending.group(),
        )
        said = [probe for probe in PROBES if system is not None or probe[0]["role"] != "system"]
        return turns if all(turns.render(probe) == render(probe) for probe in said) else None
    except (TemplateError, TypeError, ValueError):
        return None


def _renderer(tokenizer: Any, template: str) -> Any:
    def render(messages: list[Message]) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return text.removeprefix(tokenizer.bos_token or "")

    return render


def _cut(text: str, *words: str) -> list[str]:
    """The text before, between and after words that stand in it in this order; ValueError where one does not."""
    parts = []
    for word in words:
        at = text.index(word)
        parts.append(text[:at])
        text = text[at + len(word) :]
    return [*parts, text]
