"""Conversations into token ids and labels.

Supervised is what the model has to write itself: the assistant's words and its end token; neither the line break
after it nor the closing `<|endoftext|>`. Label -100 elsewhere, and always at position 0, which nothing predicts.
Labels are not shifted.

What a model's template has no turn for is never dropped; each case is noted, and counted in the report:
- a system turn, where there is none (Phi-3-medium, the first Phi-3-mini, Phi-4-reasoning), is put ahead of the next
  user turn's text with a blank line between; where no user turn follows at once, it becomes a user turn;
- a tool's result becomes a user turn (Phi-4-mini has a turn for it), a function call is the assistant's;
- tool definitions stand in the system turn: in Phi-4-mini's own place for them, else as text after a blank line.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qlora_phi3.dataset.formats import Chat, Turn, UnusableRow
from qlora_phi3.dataset.template import ChatTemplate, Message, render_template, template_variables
from qlora_phi3.errors import DataError

IGNORED = -100

SYSTEM_MOVED = "system turn put ahead of the user's words: the model's template has none"
TOOL_AS_USER = "tool turn rendered as a user turn: the model's template has none"
TOOLS_AS_TEXT = "tool definitions put into the system turn as text: the model's template has no place for them"

Ids = np.ndarray[tuple[int], np.dtype[np.int32]]
Span = tuple[int, int]


def fit_turns(chat: Chat, template: ChatTemplate) -> tuple[list[Message], list[str]]:
    """The messages that a template is rendered with, and a note for each thing it has no turn for."""
    notes: list[str] = []
    turns = list(chat.turns)
    tools = chat.tools if template.has_tools else ""
    if chat.tools:
        head = turns.pop(0).text if turns and turns[0].role == "system" else ""
        if not template.has_tools:
            head = _blank_line(head, chat.tools)
            notes.append(TOOLS_AS_TEXT)
        turns.insert(0, Turn("system", head))
    if any(turn.role == "tool" for turn in turns) and "tool" not in template.roles:
        turns = [Turn("user", turn.text) if turn.role == "tool" else turn for turn in turns]
        notes.append(TOOL_AS_USER)
    if any(turn.role == "system" for turn in turns) and "system" not in template.roles:
        turns = list(_move_system_turns(turns))
        notes.append(SYSTEM_MOVED)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    if tools:
        messages[0]["tools"] = tools
    return messages, notes


def render_chat(chat: Chat, template: ChatTemplate, tokenizer: Any) -> tuple[str, list[Span], list[str]]:
    """A conversation as text, the character spans [start, end) to learn, and the notes of `fit_turns`.

    Raises:
        UnusableRow: the template refuses the conversation.
        DataError: the template's marks do not tell the turns apart.
    """
    from jinja2 import TemplateError

    messages, notes = fit_turns(chat, template)
    variables = template_variables(tokenizer, template.bos_token, template.eos_token)
    try:
        text, spans = render_template(template.source, messages, variables)
    except TemplateError as error:
        raise UnusableRow(f"the chat template refuses it: {error}") from error
    learned = [turn.learned for turn in chat.turns if turn.role == "assistant"]
    if not all(learned) and len(spans) != len(learned):
        raise DataError(
            f"The chat template {template.name!r} marks {len(spans)} spans in a conversation of {len(learned)} "
            "assistant turns, so that the turns not to be learned cannot be told apart.",
            "Mark each assistant turn once in the template of [data] chat_template.",
        )
    return text, spans if all(learned) else [span for span, is_on in zip(spans, learned, strict=True) if is_on], notes


def tokenize_chats(
    texts: Sequence[str], spans: Sequence[Sequence[Span]] | None, tokenizer: Any
) -> list[tuple[Ids, Ids]]:
    """Ids and labels of rendered conversations: the ids are those of `apply_chat_template`.

    Args:
        texts: rendered conversations.
        spans: of each text, the character spans to learn; None: learn every token.
    """
    batch = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    rows = []
    for index, ids in enumerate(batch["input_ids"]):
        row = np.asarray(ids, dtype=np.int32)
        labels = row.copy() if spans is None else np.full_like(row, IGNORED)
        for span in spans[index] if spans is not None else ():
            first, last = _find_tokens(batch, index, span)
            labels[first:last] = row[first:last]
        labels[:1] = IGNORED
        rows.append((row, labels))
    return rows


def tokenize_documents(texts: Sequence[str], tokenizer: Any) -> list[tuple[Ids, Ids]]:
    """Ids and labels of raw text: as the tokenizer starts a text by itself, closed by the end-of-text token."""
    batch = tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False)
    rows = []
    for ids in batch["input_ids"]:
        closed = [] if ids and ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
        row = np.asarray([*ids, *closed], dtype=np.int32)
        labels = row.copy()
        labels[:1] = IGNORED
        rows.append((row, labels))
    return rows


def special_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches a text that would be read as one of the tokenizer's special tokens, by accident or as an injection."""
    tokens = sorted({*tokenizer.all_special_tokens, *(t for t in tokenizer.get_added_vocab() if t.startswith("<|"))})
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _find_tokens(batch: Any, index: int, span: Span) -> tuple[int, int]:
    """The tokens [first, last) that lie in a span of characters.

    A special token with `rstrip` covers the white space after it, so the token at the first character may be the
    header before the span: a token counts only when it starts inside. A character of several byte tokens belongs to
    all of them.
    """
    start, end = span
    inside = (batch.char_to_token(index, spot) for spot in range(start, end))
    first = next((t for t in inside if t is not None and batch.token_to_chars(index, t).start >= start), None)
    if first is None:
        return 0, 0
    backwards = (batch.char_to_token(index, spot) for spot in range(end - 1, start - 1, -1))
    last = next(t for t in backwards if t is not None)
    size = len(batch["input_ids"][index])
    while last + 1 < size and (chars := batch.token_to_chars(index, last + 1)) is not None and chars.start < end:
        last += 1
    return first, last + 1


def _move_system_turns(turns: Sequence[Turn]) -> Iterable[Turn]:
    waiting = ""
    for turn in turns:
        if turn.role == "system":
            waiting = _blank_line(waiting, turn.text)
        elif turn.role == "user":
            yield Turn("user", _blank_line(waiting, turn.text))
            waiting = ""
        else:
            if waiting:
                yield Turn("user", waiting)
            yield turn
            waiting = ""
    if waiting:
        yield Turn("user", waiting)


def _blank_line(before: str, after: str) -> str:
    return f"{before}\n\n{after}" if before and after else before or after
