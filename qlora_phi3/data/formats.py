"""Rows as people keep them, read into one shape: a `Chat` of turns, or a `Document` of raw text.

| format | columns | becomes |
|---|---|---|
| `messages` | `messages` (OpenAI: role, content), `system`, `tools` | the turns; one of `weight` 0 is not learned |
| `sharegpt` | `conversations` (from/value or role/content), `system`, `tools` | the turns |
| `alpaca` | `instruction`, `output`, `input`, `system`, `history` | history, then one question and one answer |
| `prompt_completion` | `prompt`, `completion` (strings or message lists) | as turns; only the completion is learned |
| `text` | `text` | raw text without a template; every token is learned |

Every role is mapped and none is dropped: an unknown one is an error. A row that cannot be used raises `SkipRow`,
which the caller counts with its reason. Templates and tokens are left to `render.py`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_phi3.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]


#: Names of roles in the wild (OpenAI, ShareGPT, LLaMA-Factory, Gemini exports) and what they are here.
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}


#: What a question and an answer are called in the wild, the likelier names first.
QUESTION_COLUMNS = ("instruction", "question", "prompt", "query", "input", "user", "human", "problem", "source", "src")


ANSWER_COLUMNS = (
    "output",
    "answer",
    "response",
    "completion",
    "reply",
    "assistant",
    "bot",
    "solution",
    "target",
    "tgt",
)


class SkipRow(Exception):  # noqa: N818 - not a fault of the program: the caller counts it and goes on
    """This row cannot be trained on; the message is the reason, the same words for the same reason."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `supervised` says whether an assistant's turn is supervised."""

    role: Role
    text: str
    supervised: bool = True


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and the definitions of the tools it may call, as text (JSON as a rule)."""

    turns: tuple[Turn, ...]
    tools: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """Raw text, learned as a whole."""

    text: str


@dataclass(frozen=True, slots=True)
class Format:
    """The columns that make up a format, and how its rows are read. `read` is given the row and where it stands."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], Chat | Document]


def detect_format(row: Mapping[str, Any]) -> str | None:
    """Name of the first format whose required columns the row has (a null counts as absent), or None."""
    return next(
        (name for name, form in FORMATS.items() if all(row.get(key) is not None for key in form.required)), None
    )


def guess_mapping(row: Mapping[str, Any]) -> tuple[str, dict[str, str]] | None:
    """Format and `fields` that would fit a row of foreign columns, guessed from their names; None where nothing is likely.

    The first likely question and the first likely answer, or a column that holds a list of messages.
    """
    for column, value in row.items():
        if (
            isinstance(value, Sequence)
            and value
            and isinstance(value[0], Mapping)
            and {"role", "from"} & value[0].keys()
        ):
            return "messages", {"messages": column}
    names = {column.lower(): column for column in row}
    question, answer = (
        next((names[name] for name in choice if name in names), None) for choice in (QUESTION_COLUMNS, ANSWER_COLUMNS)
    )
    if question is None or answer is None:
        return None
    if question == "prompt":
        return "prompt_completion", {"completion": answer}
    mapped = {"instruction": question, "output": answer, "input": names.get("context", "input")}
    return "alpaca", {ours: theirs for ours, theirs in mapped.items() if ours != theirs}


def check_fields(fields: Mapping[str, str], format_name: str) -> None:
    """Refuse a field map that names a column no format (or not this one) has.

    Raises:
        DataError: names the column and those that exist.
    """
    forms = FORMATS.values() if format_name == "auto" else [FORMATS[format_name]]
    known = sorted({column for form in forms for column in form.required + form.optional})
    for ours in fields:
        if ours not in known:
            raise DataError(
                f"[data] fields maps {ours!r}, which is no column of format {format_name!r}.",
                f"The left side is our name, the right side yours. Ours are: {', '.join(known)}.",
            )


def rename_columns(row: Mapping[str, Any], fields: Mapping[str, str]) -> Mapping[str, Any]:
    """The row with the mapped columns under our names: `fields` maps our name to theirs."""
    return {**row, **{ours: row.get(theirs) for ours, theirs in fields.items()}} if fields else row


def read_row(row: Mapping[str, Any], format_name: str, where: str) -> Chat | Document:
    """Read one row whose columns have our names.

    Args:
        row: column -> value.
        format_name: a key of `FORMATS`.
        where: `file:line`, for errors.

    Raises:
        UnusableRow: the row has nothing to learn or a field of the wrong type.
        DataError: a role nobody knows.
    """
    form = FORMATS[format_name]
    for column in form.required:
        if row.get(column) is None:
            raise SkipRow(f"no {column!r}")
    example = form.read(row, where)
    if isinstance(example, Chat):
        _check_chat(example)
    elif not example.text.strip():
        raise SkipRow("the text is empty")
    return example


def _check_chat(chat: Chat) -> None:
    if not chat.turns:
        raise SkipRow("the conversation is empty")
    answers = [turn for turn in chat.turns if turn.role == "assistant" and turn.supervised]
    if not answers:
        raise SkipRow("no assistant turn to learn from")
    if not all(turn.text.strip() for turn in answers):
        raise SkipRow("an assistant turn is empty")


def _read_messages(row: Mapping[str, Any], where: str) -> Chat:
    return _with_system_and_tools(_read_turns(row["messages"], "messages", where), row)


def _read_sharegpt(row: Mapping[str, Any], where: str) -> Chat:
    return _with_system_and_tools(_read_turns(row["conversations"], "conversations", where), row)


def _read_alpaca(row: Mapping[str, Any], where: str) -> Chat:
    question, extra = _text(row["instruction"], "instruction"), _text(row.get("input"), "input")
    if extra.strip():  # the wording of Microsoft's Phi-3 samples
        question = f"{question}\n Input: {extra}"
    turns: list[Turn] = []
    for pair in _list(row.get("history"), "history"):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise SkipRow("'history' is not a list of [question, answer] pairs")
        turns += [Turn("user", _text(pair[0], "history")), Turn("assistant", _text(pair[1], "history"))]
    turns += [Turn("user", question), Turn("assistant", _text(row["output"], "output"))]
    return _with_system_and_tools(tuple(turns), row)


def _read_prompt_completion(row: Mapping[str, Any], where: str) -> Chat:
    prompt, completion = row["prompt"], row["completion"]
    asked = (Turn("user", prompt),) if isinstance(prompt, str) else _read_turns(prompt, "prompt", where)
    answered = (
        (Turn("assistant", completion),)
        if isinstance(completion, str)
        else _read_turns(completion, "completion", where)
    )
    return Chat((*(Turn(turn.role, turn.text, supervised=False) for turn in asked), *answered))


def _read_text(row: Mapping[str, Any], where: str) -> Document:
    return Document(_text(row["text"], "text"))


def _read_turns(messages: Any, column: str, where: str) -> tuple[Turn, ...]:
    """A list of messages, or the JSON text of one (a .csv has no other way)."""
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError:
            raise SkipRow(f"{column!r} is text, and not the JSON of a list of messages") from None
    return tuple(_read_turn(message, column, where) for message in _list(messages, column))


def _read_turn(message: Any, column: str, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise SkipRow(f"a message of {column!r} is {_kind(message)}, not an object")
    name = message.get("role") if message.get("role") is not None else message.get("from")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if not isinstance(name, str):
        raise SkipRow(f"a message of {column!r} has no role")
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise DataError(
            f"{where}: nobody knows the role {name!r}.",
            f"Rename it in the data; the known roles are {', '.join(ROLES)}.",
        )
    return Turn(role, _join_text(_content(content), _tool_calls(message)), supervised=message.get("weight") != 0)


def _content(content: Any) -> str:
    """The text of a message: a string, null, or OpenAI's list of parts."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return _text(content, "content")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise SkipRow(f"a part of a message is {kind!r}, not text")
    return "\n".join(_text(part.get("text"), "content") for part in content)


def _tool_calls(message: Mapping[str, Any]) -> str:
    """The calls of an assistant's message as JSON text, or an empty string."""
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    return json.dumps(calls, ensure_ascii=False) if calls else ""


def _with_system_and_tools(turns: tuple[Turn, ...], row: Mapping[str, Any]) -> Chat:
    system, tools = _text(row.get("system"), "system"), row.get("tools") or ""
    if not isinstance(tools, str):
        tools = json.dumps(tools, ensure_ascii=False)
    return Chat((Turn("system", system), *turns) if system.strip() else turns, tools)


def _text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SkipRow(f"{column!r} is {_kind(value)}, not text")
    try:
        value.encode()  # JSON may hold half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError:
        raise SkipRow(f"{column!r} holds half a Unicode surrogate pair") from None
    return value


def _list(value: Any, column: str) -> Sequence[Any]:
    if value is None or value == "":
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise SkipRow(f"{column!r} is {_kind(value)}, not a list")
    return value


def _join_text(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


#: In the order of detection: ultrachat_200k has `prompt` beside `messages`, Alpaca sets have `text` beside `output`.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), ("system", "tools"), _read_messages),
    "sharegpt": Format(("conversations",), ("system", "tools"), _read_sharegpt),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history", "tools"), _read_alpaca),
    "prompt_completion": Format(("prompt", "completion"), (), _read_prompt_completion),
    "text": Format(("text",), (), _read_text),
}
