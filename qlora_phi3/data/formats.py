"""Rows of the usual formats, read into one shape: a `Chat` of turns, or a `Document` of raw text.

| format | columns | becomes |
|---|---|---|
| `messages` | `messages` (OpenAI: role, content), `system`, `tools` | the turns; one that is switched off is not supervised |
| `sharegpt` | `conversations` (from/value or role/content), `system`, `tools` | the turns |
| `alpaca` | `instruction`, `output`, `input`, `system`, `history`, `tools` | history, then one question and one answer |
| `prompt_completion` | `prompt`, `completion` (text or messages), `system`, `tools` | turns; the completion is supervised |
| `text` | `text` | raw text without a template; every token is supervised |

`SYNONYMS` lists other names of these columns. Every role is mapped and none is dropped: an unknown one is an error. A row that
cannot be used raises `SkipRow`, which the caller counts with its reason. What a row holds beside these columns is in `unread`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qlora_phi3.data import messages
from qlora_phi3.data.messages import Columns, SkipRow, Turn
from qlora_phi3.errors import DataError

#: Other names that a format's column has in published data; the first that is not empty is read.
SYNONYMS = {
    "system": ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction", "instructions"),
    "tools": ("tools", "functions"),
    "input": ("input", "context"),
}
#: Beside `text`, columns with these names say that it is one part of the row and not all of it.
NOT_A_DOCUMENT = re.compile(
    r"role|labels?|answers?|summary|output|response|target|completion|question|instruction|reply|highlights|translation|intent"
    r"|sentiment|emotion|category|parent_id|message_tree_id",
    re.IGNORECASE,
)
#: Columns of pictures and sound, which the family's text models do not take.
MEDIA = frozenset(("image", "images", "video", "videos", "audio", "audios"))
#: Words for an empty cell that no turn is.
NO_ANSWER = frozenset(("<nooutput>", "nan", "NaN"))
INPUT_IGNORED = "'input' or 'system' is a word for an empty cell (nan, None, <noinput>): read as empty"
EMPTY_WORD = "an answer is a word that may stand for an empty cell (None, null, N/A): learned as it is"
EMPTY_TURN = "a user's turn is empty"
LIST_ANSWER = "an answer is the JSON of a list of texts, as a .csv has several answers: learned as it is"
#: What people read for a format whose name says too little.
TITLES = {"sharegpt": "ShareGPT's conversations", "alpaca": "Alpaca's instruction, input and output"}
#: Names of columns in published data that hold a question or an answer, the likelier names first.
QUESTION_COLUMNS = ("instruction", "question", "prompt", "query", "input", "user", "human", "problem", "source", "src")
ANSWER_COLUMNS = ("output", "answer", "response", "completion", "reply", "assistant", "bot", "solution", "target", "tgt")


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and the definitions of the tools it may call, as text (usually JSON)."""

    turns: tuple[Turn, ...]
    tools: str = ""
    switched_off: bool = False  #: A turn is not supervised because the row says so.
    unread: tuple[str, ...] = ()  #: Names of the columns and keys that hold something and were not read.
    notes: tuple[str, ...] = ()  #: What is remarkable in the row.


@dataclass(frozen=True, slots=True)
class Document:
    """Raw text; every token is supervised. `unread` and `notes` are those of `Chat`."""

    text: str
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Format:
    """The columns of a format, and the function that reads its rows."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    #: Called with the row, its `file:line`, and the names of what was not read, to which it adds keys of messages.
    read: Callable[[Columns, str, set[str]], Chat | Document]


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
    fields = {"instruction": question, "output": answer}
    for ours, synonyms in SYNONYMS.items():
        theirs = (names.get(name.lower()) for name in synonyms)
        fields[ours] = next((name for name in theirs if name not in (None, question, answer)), ours)
    has_more = any(ours in names or fields.get(ours, ours) != ours for ours in ("input", "history"))
    if question == "prompt" and not has_more:
        del fields["instruction"]
        return "prompt_completion", {"completion": fields.pop("output")} | {k: v for k, v in fields.items() if k != v}
    return "alpaca", {ours: theirs for ours, theirs in fields.items() if ours != theirs}


def check_fields(fields: Mapping[str, str], format_name: str) -> None:
    """Raise DataError where the left side of [data] fields names a column that the format lacks. "auto" has no fields."""
    known = sorted(FORMATS[format_name].required + FORMATS[format_name].optional) if fields else []
    for ours in fields:
        if ours not in known:
            hint = f"The left side is the format's name, the right side yours. The format's names are: {', '.join(known)}."
            raise DataError(f"[data] fields maps {ours!r}, which is no column of format {format_name!r}.", hint)


def read_row(row: Mapping[str, Any], format_name: str, where: str) -> Chat | Document:
    """Read one row whose columns have the names of a format, a key of `FORMATS`; `where` is its `file:line`, for errors. SkipRow
    where it has nothing to learn or a field of the wrong type, DataError for an unknown role.
    """
    form = FORMATS[format_name]
    for column in form.required:
        if row.get(column) is None:
            raise SkipRow(f"no {column!r}")
    if found := [name for name in MEDIA & row.keys() if not messages.is_empty(row[name])]:
        raise SkipRow(f"its {min(found)!r} cannot be read by a text model")
    columns, keys = Columns(row), set[str]()
    if not messages.SWITCH_NAMES.isdisjoint(row) and messages.is_switched_off(columns):
        raise SkipRow(f"the row is switched off ({', '.join(name for name in messages.SWITCHES if name in row)})")
    example = form.read(columns, where, keys)
    left = columns.unread()
    if left:
        messages.check_unread(row, left, where)
    unread = (*left, *sorted(keys))
    if isinstance(example, Document):
        if not example.text.strip() or example.text.strip() in NO_ANSWER:
            raise SkipRow("the text is empty")
        return replace(example, unread=unread)
    if not example.turns:
        raise SkipRow("the conversation is empty")
    words = [turn.text.strip() for turn in example.turns]
    pairs = list(zip(example.turns, words, strict=True))
    answers = [(turn, text) for turn, text in pairs if turn.role == "assistant" and turn.supervised]
    if not answers:
        raise SkipRow("no assistant turn to learn from")
    if not all(text or turn.calls or turn.thinking for turn, text in answers):
        raise SkipRow("an assistant turn is empty")
    if not NO_ANSWER.isdisjoint(words):
        raise SkipRow("a turn is a word for an empty cell (nan, <nooutput>)")
    notes = [*example.notes]
    if any(text in messages.NO_VALUE for turn, text in answers if turn.text):
        notes.append(EMPTY_WORD)
    if any(turn.role == "user" and not text for turn, text in pairs):
        notes.append(EMPTY_TURN)
    lists = [messages.parse_json(text) for _, text in answers if text[:1] == "["]
    if any(isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) for item in value) for value in lists):
        notes.append(LIST_ANSWER)
    return replace(example, unread=unread, notes=tuple(notes))


def _read_conversation(column: str, columns: Columns, where: str, unread: set[str]) -> Chat:
    turns = messages.read_turns(columns.take(column), column, where, unread)
    return _with_system_and_tools(turns, columns, unread, switched_off=not all(turn.supervised for turn in turns))


def _read_alpaca(columns: Columns, where: str, unread: set[str]) -> Chat:
    question = messages.read_text(columns.take("instruction"), "instruction")
    extra = messages.read_text(columns.take(*SYNONYMS["input"]), "input")
    notes = (INPUT_IGNORED,) if extra and extra.strip() in messages.NO_VALUE - {""} else ()
    if extra.strip() and not notes:  # the wording of Microsoft's Phi-3 samples
        question = extra if question.strip() in messages.NO_VALUE else f"{question}\n Input: {extra}"
    turns: list[Turn] = []
    history = columns.take("history")
    for pair in messages.as_rows(messages.parse_json(history, history) if isinstance(history, str) else history, "history"):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise SkipRow("'history' is not a list of [question, answer] pairs")
        turns += [Turn("user", messages.read_text(pair[0], "history")), Turn("assistant", messages.read_text(pair[1], "history"))]
    output = columns.take("output")
    if isinstance(output, list):
        raise SkipRow("'output' is a list, as preference data have it, not text")
    turns += [Turn("user", question), Turn("assistant", messages.read_text(output, "output"))]
    chat = _with_system_and_tools(tuple(turns), columns, unread)
    return replace(chat, notes=(*notes, *chat.notes))


def _read_prompt_completion(columns: Columns, where: str, unread: set[str]) -> Chat:
    prompt = messages.read_turns(_as_messages(columns.take("prompt"), "user"), "prompt", where, unread)
    answers = messages.read_turns(_as_messages(columns.take("completion"), "assistant"), "completion", where, unread)
    context = [replace(turn, supervised=False) for turn in prompt]
    switched_off = not all(turn.supervised for turn in (*prompt, *answers))
    return _with_system_and_tools((*context, *answers), columns, unread, switched_off=switched_off)


def _as_messages(value: Any, role: str) -> Any:
    """A prompt or a completion as messages: text is one message, unless it is the JSON of messages, as a .csv has them."""
    if not isinstance(value, str | None):
        return value
    text = value or ""
    if re.match(r"\s*\[\s*\{\s*['\"](role|from|content|value)['\"]\s*:", text):
        return text
    return [{"role": role, "content": text}]


def check_document(columns: Iterable[str], where: str) -> None:
    """Refuse to take `text` for a document where other columns that were not read say what it is. Raises DataError."""
    if found := [name for name in columns if NOT_A_DOCUMENT.fullmatch(name)]:
        raise DataError(
            f"{where} has 'text' beside {', '.join(map(repr, found))}, so that it may not be a document of its own.",
            'To learn the text alone, write [data] format = "text"; else name the columns with [data] format and fields.',
        )


def _with_system_and_tools(turns: tuple[Turn, ...], columns: Columns, unread: set[str], *, switched_off: bool = False) -> Chat:
    system = messages.read_system(columns.take(*SYNONYMS["system"]), unread)
    tools = messages.read_tools(columns.take(*SYNONYMS["tools"]))
    notes = (INPUT_IGNORED,) if system and system.strip() in messages.NO_VALUE - {""} else ()
    if system.strip() and not notes:
        turns = (Turn("system", system), *turns)
    in_turns = [turn.calls for turn in turns if turn.role == "system" and turn.calls]
    if in_turns:  # tools in a system message, as Phi-4-mini has them
        if len(in_turns) > 1 or tools:
            raise SkipRow("tools are defined in more than one place")
        turns = tuple(replace(turn, calls="") if turn.role == "system" else turn for turn in turns)
    return Chat(turns, tools or "".join(in_turns), notes=notes, switched_off=switched_off)


#: In the order of detection: ultrachat_200k has `prompt` next to `messages`, Alpaca sets have `text` next to `output`.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), ("system", "tools"), partial(_read_conversation, "messages")),
    "sharegpt": Format(("conversations",), ("system", "tools"), partial(_read_conversation, "conversations")),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history", "tools"), _read_alpaca),
    "prompt_completion": Format(("prompt", "completion"), ("system", "tools"), _read_prompt_completion),
    "text": Format(("text",), (), lambda columns, where, unread: Document(messages.read_text(columns.take("text"), "text"))),
}
