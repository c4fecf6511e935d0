"""One message of a conversation, under the keys that published data use, read into a `Turn`.

What a message holds and no key here reads is reported as not read. A message or a row whose switch says so is not learned.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from numbers import Number
from typing import Any, Literal

from qlora_phi3.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
#: Names of roles in published data (OpenAI, ShareGPT, LLaMA-Factory, Gemini exports), and the role each stands for.
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
}
#: Keys that say whether a message, a part of it or a row is learned: Axolotl, ms-swift, LLaMA-Factory, OpenAI; torchtune.
SWITCHES = ("train", "training", "trainable", "learn", "loss", "loss_mask", "loss_weight", "weight", "masked")
SWITCH_NAMES = frozenset(SWITCHES)
#: The one that is true for what is not learned.
REVERSED = "masked"
#: How an empty cell gets into a file as text (pandas, Alpaca, SQL, Excel).
NO_VALUE = frozenset(("", "<noinput>", "nan", "NaN", "None", "none", "null", "NULL", "N/A", "n/a", "<NA>", "#N/A"))
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text", "parts")
CALL_ROLES = frozenset(("function_call", "tool_call"))
THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")
CALL_KEYS = ("tool_calls", "function_call")
#: Of OpenAI's tool calls; the family's models write none of them.
IDS = frozenset(("id", "tool_call_id", "call_id", "index"))
#: Names that a tool call's arguments have: OpenAI, older sets, LangChain, Anthropic.
ARGUMENTS = ("arguments", "parameters", "args", "input")
CALL_KEYS_READ = IDS | {"type", "function", "name", *ARGUMENTS}
#: A name that may say what is learned, and is none of SWITCHES.
SWITCH_LIKE = re.compile(r"(no_|do_|is_)?(train|learn|mask|loss)(_.*|ed|ing|able)?", re.IGNORECASE)
#: Names of columns of preference data, whose answers are not all good ones.
match_preference = cache(re.compile(
    r"((chosen|rejected)(_.*)?|.*_(chosen|rejected)|kto_tag|prefer(ence|red).*|winner|completions"
    r"|(negative|positive)_(messages|response|answer|output|completion)s?"
    r"|(conversation|response|answer|output|completion)_?[abjk1-9])",
    re.IGNORECASE,
).fullmatch)  # fmt: skip
#: Names of columns that tell good answers from bad ones if they hold a judgement: true, 0, "bad", a score.
match_judgement = cache(re.compile(
    r"labels?|(is_)?(correct|good|accepted|(un)?desirable)|correctness|upvotes|scores?|ratings?|rewards?|ranks?", re.IGNORECASE
).fullmatch)  # fmt: skip
JUDGEMENTS = frozenset({
    "true", "false", "yes", "no", "t", "f", "y", "n", "+", "-", "good", "bad", "correct", "incorrect", "right", "wrong",
    "chosen", "rejected", "accepted", "reject", "desirable", "undesirable", "positive", "negative", "pos", "neg", "pass",
    "passed", "fail", "failed", "valid", "invalid", "safe", "unsafe", "thumbs_up", "thumbs_down", "\U0001f44d", "\U0001f44e",
    "wahr", "falsch", "richtig",
})  # fmt: skip


class SkipRow(Exception):  # noqa: N818 - not a fault of the program: the caller counts it and goes on
    """This row cannot be trained on. The message is the reason: the same words for the same reason."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    text: str
    supervised: bool = True  #: Whether an assistant's turn is learned.
    thinking: str = ""  #: What an assistant thought before it answered.
    calls: str = ""  #: The JSON array of the tools it calls, each with "name" and "arguments".


def is_empty(value: Any) -> bool:
    """Whether a cell, a column or a key holds nothing: null, NaN as pandas writes it, and empty text, lists and objects."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (not value and hasattr(value, "__len__"))


@dataclass(slots=True)
class Columns:
    """A row, or a message, that notes which of its keys were read."""

    row: Mapping[str, Any]
    read: set[str] = field(default_factory=set)

    def take(self, *names: str) -> Any:
        """The value of the first of these keys that is not empty; None if all are."""
        for name in names:
            if name in self.row:
                self.read.add(name)
                if not is_empty(value := self.row[name]):
                    return value
        return None

    def unread(self) -> list[str]:
        """The keys that hold something and were not read."""
        return [str(name) for name, value in self.row.items() if name not in self.read and not is_empty(value)]


def is_switched_off(columns: Columns) -> bool:
    """Whether a row, a message or a part of one is not to be learned; SkipRow for switches that are unclear or contradict."""
    states = set()
    for name in SWITCHES if not SWITCH_NAMES.isdisjoint(columns.row) else ():
        if (value := columns.take(name)) is None:
            continue
        if isinstance(value, str):
            text = value.strip().lower()
            try:
                value = WORDS[text] if text in WORDS else float(text)
            except ValueError:
                raise SkipRow(f"{name!r} is neither true nor false") from None
        if not isinstance(value, int | float):
            raise SkipRow(f"{name!r} is {kind_of(value)}, and not true, false, 0 or 1")
        if value not in (0, 1):
            raise SkipRow(f"{name!r} is a weight other than 0 and 1, and a turn is learned or not")
        states.add(bool(value) != (name == REVERSED))
    if len(states) > 1:
        raise SkipRow(f"its switches ({', '.join(name for name in SWITCHES if name in columns.row)}) contradict each other")
    return states == {False}


def read_turns(messages: Any, column: str, where: str, unread: set[str]) -> tuple[Turn, ...]:
    """The turns of a list of messages, or of the JSON text of one (a .csv has no other way), which stands in a `column` of the
    row. SkipRow where a message is of another shape, or of another kind than text; DataError for an unknown role.

    `where` is `file:line`, for errors. The names of all keys that were not read are added to `unread`.
    """
    if isinstance(messages, str):
        messages = parse_json(messages)
        if messages is None:
            raise SkipRow(f"{column!r} is text, and not the JSON of a list of messages")
    return tuple(_read_message(message, column, where, unread) for message in as_rows(messages, column))


def _read_message(message: Any, column: str, where: str, unread: set[str]) -> Turn:
    if not isinstance(message, Mapping):
        raise SkipRow(f"a message of {column!r} is {kind_of(message)}, not an object")
    if len(message) == 2 and (usual := _read_usual(message)) is not None:
        return usual
    columns = Columns(message, {*IDS})
    name = columns.take(*ROLE_KEYS)
    if not isinstance(name, str):
        raise SkipRow(f"a message of {column!r} has no role")
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise DataError(f"{where}: unknown role {name!r}.", f"Rename it in the data; the known roles are {', '.join(ROLES)}.")
    off = is_switched_off(columns)
    details = columns.take("train_detail")
    for detail in as_rows(parse_json(details, details) if isinstance(details, str) else details, "train_detail"):
        if not isinstance(detail, Mapping) or is_switched_off(Columns(detail)):
            raise SkipRow("'train_detail' switches a part of a message off, and a turn is learned or not")
    columns.read.update({"type"} if message.get("type") in ("message", "text") else ())
    content = columns.take(*CONTENT_KEYS)
    if role == "tool" and isinstance(content, Mapping) and not {"parts", "text"} & content.keys():
        content = to_json(content, "content")
    parts = list(_read_parts(content, unread))
    states = {is_on for _, _, is_on in parts if is_on is not None}
    if role == "assistant" and len(states) > 1:
        raise SkipRow("a part of an assistant's turn is switched off, and a turn is learned or not")
    text, thinking = ("".join(words for kind, words, _ in parts if kind == wanted) for wanted in ("text", "thinking"))
    calls = ""
    if role == "assistant":
        calls = read_calls(columns.take(*CALL_KEYS), unread)
        thinking = thinking or read_text(columns.take(*THINKING_KEYS), "thinking")
    elif role == "system":  # Phi-4-mini's own form; `formats` takes them from here
        calls = read_tools(columns.take("tools"))
    if text.lstrip()[:1] in ("{", "[") and (calls or name.strip().lower() in CALL_ROLES) and role == "assistant":
        text, calls = _calls_in_text(text, calls, unread)
    check_unread(columns.row, columns.unread(), where)
    unread.update(f"{key} (of messages)" for key in columns.unread())
    return Turn(role, text, not (off or states == {False}), thinking, calls)


def _read_usual(message: Mapping[str, Any]) -> Turn | None:
    """The turn of a message that is a role and a text, as nearly every one is; None for any other."""
    name = message.get(ROLE_KEYS[0], message.get(ROLE_KEYS[1]))
    content = message.get(CONTENT_KEYS[0], message.get(CONTENT_KEYS[1]))
    role = ROLES.get(name) if type(name) is str and name not in CALL_ROLES else None
    return None if role is None or type(content) is not str else Turn(role, read_text(content, "content"))


def _calls_in_text(text: str, calls: str, unread: set[str]) -> tuple[str, str]:
    """Text and calls of a turn whose text is calls, as ShareGPT's function_call has it, or is those of `calls` again."""
    if is_empty(parse_json(text)):
        return text, calls
    try:
        found = read_calls(text, unread)
    except SkipRow:
        if calls:
            return text, calls
        raise
    return ("", found) if calls in ("", found) else (text, calls)


def check_unread(row: Mapping[Any, Any], names: Iterable[Any], where: str) -> None:
    """Refuse preference data, in which not every answer is to be learned (DataError), and unknown switches (SkipRow), among
    `names`: keys of the row, or of a message in it, that nothing reads.
    """
    found = sorted(str(name) for name in names if not is_empty(row[name]) and _is_preference(str(name), row[name]))
    if found:
        listed = ", ".join(map(repr, found))
        raise DataError(
            f"{where} has {listed}, as preference data have (DPO, KTO, rewards), and this trainer learns every answer of a row.",
            "Keep only rows with good answers, and say what these columns are not: [data] ignore_columns = "
            f"{json.dumps(found, ensure_ascii=False)}.",
        )
    for name in names:
        if SWITCH_LIKE.fullmatch(str(name)) and row[name] in (True, False, "true", "false", "True", "False"):
            raise SkipRow(f"{str(name)!r} may switch a turn off, and is not a switch that is known (qlora-phi3 docs data)")


def _is_preference(name: str, value: Any) -> bool:
    if match_preference(name) or not match_judgement(name):
        return match_preference(name) is not None
    if not isinstance(value, str):
        return isinstance(value, Number | list | dict)
    with suppress(ValueError):
        float(value)
        return True
    return value.strip().lower() in JUDGEMENTS


def _read_parts(content: Any, unread: set[str]) -> Iterator[tuple[str, str, bool | None]]:
    """The parts of one message's content, which OpenAI, Gemini, LLaMA-Factory and others name differently. Of each the kind
    ("text" or "thinking"), the text, and whether it is learned (None: it has no switch).
    """
    if isinstance(content, Sequence) and not isinstance(content, str):
        for part in content:
            yield from _read_parts(part, unread)
        return
    if not isinstance(content, Mapping):
        yield "text", read_text(content, "content"), None
        return
    columns = Columns(content)
    kind = columns.take("type", "content_type") or "text"
    if called := [key for key in ("functionCall", "functionResponse", "function_call") if not is_empty(content.get(key))]:
        raise SkipRow(f"a part of a message is {called[0]!r}, not text")
    kind = "thinking" if columns.take("thought") is True else kind
    is_on = not is_switched_off(columns)
    if kind in THINKING_KEYS:
        yield "thinking", read_text(columns.take(*THINKING_KEYS, *CONTENT_KEYS), kind), is_on
    elif kind not in ("text", "input_text", "output_text"):
        raise SkipRow(f"a part of a message is {str(kind)[:40]!r}, not text")
    elif content.keys().isdisjoint(CONTENT_KEYS):
        raise SkipRow(f"a part of a message has none of the keys {', '.join(CONTENT_KEYS)}")
    else:
        yield from _read_parts(columns.take("text", "value", "content", "parts"), unread)
        yield "text", "", is_on
    unread.update(f"{key} (of parts of messages)" for key in columns.unread())


def read_calls(calls: Any, unread: set[str]) -> str:
    """The JSON array of an assistant's tool calls: name and arguments, an object, as the family's models write them."""
    if isinstance(calls, str) and calls.strip():
        text, calls = calls, parse_json(calls)
        if calls is None and text.strip() != "null":
            raise SkipRow("the tool calls are text, and not JSON")
    if is_empty(calls):
        return ""
    found = []
    for call in [calls] if isinstance(calls, Mapping) else as_rows(calls, "tool_calls"):
        call = parse_json(call) if isinstance(call, str) else call
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise SkipRow("a tool call has no name")
        holders = (inner,) if inner is call else (inner, call)
        given = [holder[key] for holder in holders for key in ARGUMENTS if not is_empty(holder.get(key))] or [{}]
        if len(given) > 1:
            raise SkipRow("a tool call has its arguments twice")
        arguments = parse_json(given[0]) if isinstance(given[0], str) else given[0]
        if not isinstance(arguments, Mapping):
            raise SkipRow("the arguments of a tool call are not a JSON object")
        found.append({"name": inner["name"], "arguments": arguments})
        for part in (call, inner):
            unread.update(f"{key} (of tool calls)" for key in part if key not in CALL_KEYS_READ and not is_empty(part[key]))
    return to_json(found, "tool_calls")


def read_tools(tools: Any) -> str:
    """The definitions of tools as text: as it is, or the JSON of the objects; empty where there are none."""
    if isinstance(tools, str):
        is_none = tools.strip() in NO_VALUE or (tools.strip()[:1] in ("[", "{") and is_empty(parse_json(tools, tools)))
        return "" if is_none else read_text(tools, "tools")
    if is_empty(tools):
        return ""
    if isinstance(tools, Sequence):
        tools = [parse_json(tool, tool) if isinstance(tool, str) else tool for tool in tools]
    return to_json(tools, "tools")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. One that has a key twice would lose a value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def parse_json(text: str, otherwise: Any = None) -> Any:
    """The value of a JSON text; `otherwise` where it is none, or has a key twice in an object."""
    try:
        return DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return otherwise


def to_json(value: Any, column: str) -> str:
    """A value as JSON. SkipRow where it holds what JSON has not: NaN, a date, bytes."""
    try:
        return read_text(json.dumps(value, ensure_ascii=False, allow_nan=False), column)
    except (TypeError, ValueError, RecursionError):
        raise SkipRow(f"{column!r} holds a value that JSON has not, such as NaN or a date") from None


def read_system(value: Any, unread: set[str]) -> str:
    """A system text: text, or a message's content or parts of it (Bedrock, Gemini)."""
    content = {key: item for key, item in value.items() if key != "role"} if isinstance(value, Mapping) else value
    parts = list(_read_parts(content, unread))
    unread.update("thinking (of the system text)" for kind, _, _ in parts if kind == "thinking")
    return "".join(text for kind, text, _ in parts if kind == "text")


def read_text(value: Any, column: str) -> str:
    """Text, or nothing where the value is empty. SkipRow for anything else, and for text that no tokenizer takes."""
    if is_empty(value):
        return ""
    if not isinstance(value, str):
        raise SkipRow(f"{column!r} is {kind_of(value)}, not text")
    try:
        value.encode()  # JSON may hold half of a surrogate pair
    except UnicodeEncodeError:
        raise SkipRow(f"{column!r} holds half a Unicode surrogate pair") from None
    return value


def as_rows(value: Any, column: str) -> Sequence[Any]:
    """A list, or nothing where the value is empty."""
    if is_empty(value):
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise SkipRow(f"{column!r} is {kind_of(value)}, not a list")
    return value


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
