"""Rows of the usual formats, read into one shape: a `Chat` of turns, or a `Document` of raw text.

| format | columns | becomes |
|---|---|---|
| `messages` | `messages` (OpenAI: role, content), `system`, `tools` | the turns; one of `weight` 0 is not supervised |
| `sharegpt` | `conversations` (from/value or role/content), `system`, `tools` | the turns |
| `alpaca` | `instruction`, `output`, `input`, `system`, `history` | history, then one question and one answer |
| `prompt_completion` | `prompt`, `completion` (strings or message lists) | turns; only the completion is supervised |
| `text` | `text` | raw text without a template; every token is supervised |

Every role is mapped and none is dropped: an unknown one is an error. A row that cannot be used raises `SkipRow`,
which the caller counts with its reason.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from qlora_phi3.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]

#: Names of roles in published data (OpenAI, ShareGPT, LLaMA-Factory, Gemini exports), and the role each stands for.
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
}

#: Names of columns in published data that hold a question or an answer, the likelier names first.
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
    """This row cannot be trained on. The message is the reason: the same words for the same reason."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `supervised` is about an assistant's turn."""

    role: Role
    text: str
    supervised: bool = True


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and the definitions of the tools it may call, as text (usually JSON)."""

    turns: tuple[Turn, ...]
    tools: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """Raw text; every token is supervised."""

    text: str


@dataclass(frozen=True, slots=True)
class Format:
    """The columns of a format, and the function that reads its rows, called with the row and its `file:line`."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], Chat | Document]


def detect_format(row: Mapping[str, Any]) -> str | None:
    """Name of the first format whose required columns the row has (a null counts as absent), or None."""
    for name, form in FORMATS.items():
        if all(row.get(column) is not None for column in form.required):
            return name
    return None


def guess_mapping(row: Mapping[str, Any]) -> tuple[str, dict[str, str]] | None:
    """Guess from the names of a row's columns the format and the `fields` that fit it; None where no column has a likely name.

    They are a column that holds a list of messages, or the likeliest question and the likeliest answer.
    """
    for column, value in row.items():
        first = value[0] if isinstance(value, Sequence) and value else None
        if isinstance(first, Mapping) and {"role", "from"} & first.keys():
            return "messages", {"messages": column}
    names = {column.lower(): column for column in row}
    question = next((names[name] for name in QUESTION_COLUMNS if name in names), None)
    answer = next((names[name] for name in ANSWER_COLUMNS if name in names), None)
    if question is None or answer is None:
        return None
    if question == "prompt":
        return "prompt_completion", {"completion": answer}
    fields = {"instruction": question, "output": answer, "input": names.get("context", "input")}
    return "alpaca", {ours: theirs for ours, theirs in fields.items() if ours != theirs}


def check_fields(fields: Mapping[str, str], format_name: str) -> None:
    """Check the left side of [data] fields.

    Raises:
        DataError: the format (or, for "auto", every format) has no such column.
    """
    forms = FORMATS.values() if format_name == "auto" else [FORMATS[format_name]]
    known = sorted({column for form in forms for column in form.required + form.optional})
    for ours in fields:
        if ours not in known:
            raise DataError(
                f"[data] fields maps {ours!r}, which is no column of format {format_name!r}.",
                f"The left side is the format's name, the right side yours. The format's names are: {', '.join(known)}.",
            )


def read_row(row: Mapping[str, Any], format_name: str, where: str) -> Chat | Document:
    """Read one row whose columns have the format's names.

    Args:
        row: column -> value.
        format_name: a key of `FORMATS`.
        where: `file:line`, for errors.

    Raises:
        SkipRow: the row has nothing to learn or a field of the wrong type.
        DataError: an unknown role.
    """
    form = FORMATS[format_name]
    for column in form.required:
        if row.get(column) is None:
            raise SkipRow(f"no {column!r}")
    example = form.read(row, where)
    if isinstance(example, Document):
        if not example.text.strip():
            raise SkipRow("the text is empty")
        return example
    if not example.turns:
        raise SkipRow("the conversation is empty")
    answers = [turn for turn in example.turns if turn.role == "assistant" and turn.supervised]
    if not answers:
        raise SkipRow("no assistant turn to learn from")
    if not all(turn.text.strip() for turn in answers):
        raise SkipRow("an assistant turn is empty")
    return example


def _read_conversation(column: str, row: Mapping[str, Any], where: str) -> Chat:
    return _with_system_and_tools(_read_turns(row[column], column, where), row)


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
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    context = [replace(turn, supervised=False) for turn in _read_turns(prompt, "prompt", where)]
    return Chat((*context, *_read_turns(completion, "completion", where)))


def _read_turns(messages: Any, column: str, where: str) -> tuple[Turn, ...]:
    """The turns of a list of messages, or of the JSON text of one (a .csv has no other way)."""
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
            f"{where}: unknown role {name!r}.", f"Rename it in the data; the known roles are {', '.join(ROLES)}."
        )
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    texts = [_content(content), _text(json.dumps(calls, ensure_ascii=False), "tool_calls") if calls else ""]
    return Turn(role, "\n".join(text for text in texts if text), supervised=message.get("weight") != 0)


def _content(content: Any) -> str:
    """The text of a message: a string, null, or OpenAI's list of parts."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return _text(content, "content")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise SkipRow(f"a part of a message is {kind!r}, not text")
    return "\n".join(_text(part.get("text"), "content") for part in content)


def _with_system_and_tools(turns: tuple[Turn, ...], row: Mapping[str, Any]) -> Chat:
    system, tools = _text(row.get("system"), "system"), row.get("tools") or ""
    tools = _text(tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False), "tools")
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


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


#: In the order of detection: ultrachat_200k has `prompt` next to `messages`, Alpaca sets have `text` next to `output`.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), ("system", "tools"), partial(_read_conversation, "messages")),
    "sharegpt": Format(("conversations",), ("system", "tools"), partial(_read_conversation, "conversations")),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history", "tools"), _read_alpaca),
    "prompt_completion": Format(("prompt", "completion"), (), _read_prompt_completion),
    "text": Format(("text",), (), lambda row, where: Document(_text(row["text"], "text"))),
}
