"""The chat template of a model, and conversations rendered with it.

The templates in `qlora_phi3/templates/` are the models' own, with `{% generation %}` marks around the assistant's words and its
end token. They render to exactly the same text: `choose_template` compares them with the tokenizer's own template. The marks are
needed because the difference of two rendered prefixes would put the next turn's header into the loss.
"""

import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from qlora_phi3.data.formats import Chat
from qlora_phi3.data.messages import SkipRow, Turn
from qlora_phi3.data.tokenizer import Span
from qlora_phi3.errors import DataError, first_line
from qlora_phi3.units import GIB, format_count

TEMPLATE_DIR = Path(__file__).parent.parent / "templates"
#: In the order of comparison: of two that render alike, the first is taken.
FAMILY = ("phi3", "phi35", "phi3-medium", "phi4", "phi4-mini", "phi4-first", "phi4-reasoning", "phi4-mini-reasoning")
#: SHA-256, the first 16 digits, of the templates that Microsoft published. Tests compare each with its marked twin.
PUBLISHED = frozenset({
    "605841622bcb6572",  # Phi-3-medium-4k-instruct
    "268b6082ceb7176d",  # Phi-3-mini-4k-instruct.april-2024
    "dcaee66df77bfbb7",  # Phi-3-mini-4k-instruct
    "78d976a442bcde2f",  # Phi-3.5-mini-instruct
    "febf589225c9728a",  # Phi-4-mini-instruct
    "46bcd040271c497e",  # Phi-4-mini-instruct.without-eos
    "cbb504cb43fec3f8",  # Phi-4-mini-reasoning
    "8d77d9bb286ab8b1",  # Phi-4-reasoning
    "a41fb8727c4f1e72",  # phi-4.december-2024
    "fe4120415a3858b8",  # phi-4
})  # fmt: skip
SET_TEMPLATE_HINT = f"Set [data] chat_template to one of {', '.join(FAMILY)}, or to a .jinja file with {{% generation %}} marks."
MARK_HINT = "Put {% generation %} and {% endgeneration %} around the assistant's words and its end token."
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
SYSTEM_MOVED = "system turn put ahead of the user's words: the model's template has none"
TOOL_AS_USER = "tool turn rendered as a user turn: the model's template has none"
TOOLS_AS_TEXT = "tool definitions put into the system turn as text: the model's template has no place for them"
#: How long the templates of a tokenizer may run when they are tried, and how many bytes they may take.
TEMPLATE_SECONDS, TEMPLATE_BYTES = 20, 2 * GIB
#: Phi-4-mini's, around a JSON array.
CALL_TOKENS = ("<|tool_call|>", "<|/tool_call|>")
#: White space beyond ASCII at the start of a message, such as U+3000, with which paragraphs begin in Chinese and Japanese, or
#: U+00A0. Phi-3's special tokens take all white space after them along, llama.cpp's only that of ASCII: it reads other ids.
LEADING_UNICODE_SPACE = re.compile(r"[ \t-\r]*[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
#: What a template is rendered with: role and content; in the system turn of Phi-4-mini also `tools`.
Message = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A chat template with marks around the assistant's words."""

    name: str  #: Of the family, `the model's own`, or the path it was read from.
    source: str  #: Jinja with `{% generation %}` marks.
    roles: frozenset[str]  #: Those that it renders.
    has_tools: bool  #: Whether the system turn has a place for tool definitions.
    end_of_turn: str  #: The text that ends an assistant's turn, `<|end|>` or `<|im_end|>`.
    thinking: bool  #: Whether an assistant's thinking has a place before its answer: `<think>` and `</think>` around it.
    call_tokens: tuple[str, str]  #: The tokens before and after an assistant's tool calls; empty where the model has none.
    own: str  #: The model's template where `source` is its marked twin and nobody published it: every row is rendered by both.
    variables: Mapping[str, Any]  #: What `source` is rendered with, beside the messages: the special tokens it names.
    own_variables: Mapping[str, Any]  #: As `variables`, for `own`; the two can differ in `bos_token` and `eos_token`.
    rendered: str  #: A conversation, as it renders it.
    is_own: bool  #: Whether it is none of the family's published ones, so that each rendering is checked.


class _TooLong(BaseException):
    """No Exception, so that no template and no probe can catch it."""


@contextmanager
def _limits() -> Iterator[None]:
    """Let templates run for `TEMPLATE_SECONDS` and take `TEMPLATE_BYTES`; Windows and other threads have no limit."""
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource
    import signal

    def stop(*_: object) -> None:
        raise _TooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = psutil.Process().memory_info().vms + TEMPLATE_BYTES
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (size if soft == resource.RLIM_INFINITY else min(soft, size), hard))
    try:
        yield
    except _TooLong:
        message = f"The model's chat template does not end within {TEMPLATE_SECONDS} seconds."
        raise DataError(message, SET_TEMPLATE_HINT) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@_limits()
def choose_template(tokenizer: Any, name: str = "auto") -> ChatTemplate:
    """The marked template that a model is trained with. DataError where none renders the same text; there is no such name or
    file, or no marks in it; it writes special tokens that the tokenizer lacks; or it runs too long or takes too much memory.

    Args:
        tokenizer: a fast tokenizer of transformers; it is not changed.
        name: `auto` for the one that renders as the tokenizer's own does; a name of `FAMILY`; or the path of a .jinja file.
    """
    if name == "auto" and tokenizer.chat_template:
        try:
            own = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                f"The tokenizer has several chat templates ({', '.join(tokenizer.chat_template)}) and none is the default.",
                SET_TEMPLATE_HINT,
            ) from error
        try:
            own.encode()
        except UnicodeEncodeError as error:
            message = f"The model's chat template holds a character that is none, {own[error.start]!r}."
            raise DataError(message, SET_TEMPLATE_HINT) from error
        return _inspect("the model's own", own, tokenizer) if MARK.search(own) else _match_own(own, tokenizer)
    if name == "auto":
        vocabulary = tokenizer.get_vocab()
        if not {"<|user|>", "<|assistant|>", "<|end|>"} <= vocabulary.keys() and "<|im_sep|>" not in vocabulary:
            message = "The tokenizer has neither a chat template nor the special tokens of the Phi-3 family."
            raise DataError(message, SET_TEMPLATE_HINT)
        name = "phi4" if "<|im_sep|>" in vocabulary else "phi4-mini" if "<|tool_call|>" in vocabulary else "phi3"
    if name in FAMILY:
        return _inspect(name, _family_source(name), tokenizer)
    path = Path(name).expanduser()
    if path.suffix != ".jinja" or not path.is_file():
        names = ", ".join(FAMILY)
        raise DataError(f"[data] chat_template = {name!r} is neither a name nor a .jinja file.", f"The names: {names}.")
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"[data] chat_template = {name!r} cannot be read: {first_line(error)}.", "Check the file.") from error
    if not MARK.search(source):
        raise DataError(f"[data] chat_template = {name!r} has no {{% generation %}} marks.", MARK_HINT)
    return _inspect(name, source, tokenizer)


@cache
def _family_source(name: str) -> str:
    return (TEMPLATE_DIR / f"{name}.jinja").read_text(encoding="utf-8")


def _chat(*turns: str) -> list[Message]:
    return [{"role": turn.split()[0], "content": turn} for turn in turns]


#: What every template must render alike: one turn, two, three, and an open end.
PROBES = (
    _chat("user one", "assistant one"),
    _chat("user one", "assistant one", "user two", "assistant two"),
    _chat("user one", "assistant one", "user two", "assistant two", "user three"),
)
#: What distinguishes templates that render those alike, and shows which turns one has.
SYSTEM_PROBES = (
    _chat("system one", "user one", "assistant one"),
    [{"role": "system", "content": ""}, *_chat("user one", "assistant one")],
)
TOOL_PROBE = _chat("user one", "assistant one", "tool one", "assistant two")
TOOLS_PROBE = [{"role": "system", "content": "system one", "tools": "tools one"}, *_chat("user one", "assistant one")]


def _match_own(own: str, tokenizer: Any) -> ChatTemplate:
    """The family's template that renders as the tokenizer's own does, with or without its bos and eos tokens."""
    own_variables = _template_variables(tokenizer)
    expected = [_try_render(own, probe, own_variables) for probe in (*PROBES, *SYSTEM_PROBES)]
    best, most = None, 0
    for name in FAMILY:
        for left_out in ((), ("eos_token",), ("bos_token",), ("bos_token", "eos_token")):
            variables = {**own_variables, **dict.fromkeys(left_out, "")}
            texts = [_try_render(_family_source(name), probe, variables) for probe in (*PROBES, *SYSTEM_PROBES)]
            agreed = sum(a == b for a, b in zip(texts, expected, strict=True))
            if texts[: len(PROBES)] == expected[: len(PROBES)] and agreed > most:
                best, most = (name, variables), agreed
    if best is None:
        raise DataError(
            "The tokenizer's chat template renders like none of the Phi-3 family, so that the assistant's words in it "
            "are not known.",
            SET_TEMPLATE_HINT,
        )
    name, variables = best
    return _inspect(name, _family_source(name), tokenizer, variables, own)


def _inspect(
    name: str, source: str, tokenizer: Any, variables: Mapping[str, Any] | None = None, own: str | None = None
) -> ChatTemplate:
    """Find out by rendering which turns a template has; with `own` given, a turn counts only where both render it alike."""
    own_variables = _template_variables(tokenizer)
    variables = own_variables if variables is None else variables
    probes = {"system": SYSTEM_PROBES[0], "tool": TOOL_PROBE}
    unpublished = own if own and sha256(own.encode()).hexdigest()[:16] not in PUBLISHED else ""

    def renders(probe: list[Message], words: str) -> bool:
        text = _try_render(source, probe, variables) or ""
        is_alike = own is None or text == _try_render(own, probe, own_variables)
        return is_alike and words in text

    return ChatTemplate(
        name=name,
        source=source,
        roles=frozenset({"user", "assistant"} | {role for role in probes if renders(probes[role], f"{role} one")}),
        has_tools=renders(TOOLS_PROBE, "tools one"),
        end_of_turn=_check_marks(name, source, tokenizer, variables),
        thinking="reasoning" in name or "<think>" in source or "<think>" in tokenizer.get_vocab(),
        call_tokens=CALL_TOKENS if set(CALL_TOKENS) <= tokenizer.get_vocab().keys() else ("", ""),
        own=unpublished,
        variables={name: value for name, value in variables.items() if name in source},  # each costs time in each row
        own_variables={name: value for name, value in own_variables.items() if name in (own or "")},
        rendered=_try_render(source, PROBES[1], variables) or "",
        is_own=name not in FAMILY or bool(unpublished),
    )


def _check_marks(name: str, source: str, tokenizer: Any, variables: Mapping[str, Any]) -> str:
    """The end of turn after the marked words. Raises DataError where a mark is missing or a token is unknown."""
    try:
        text, spans = _render(source, PROBES[0], variables)
    except Exception as error:
        raise DataError(f"The chat template {name!r} cannot be rendered: {first_line(error)}.", SET_TEMPLATE_HINT) from error
    answer = PROBES[0][1]["content"]
    marked = text[slice(*spans[0])] if len(spans) == 1 else ""
    before, _, after = marked.partition(answer)
    if answer not in marked or before.strip().removeprefix("<think>").strip():
        reason = "does not mark the assistant's words once a turn, and them alone"
        raise DataError(f"The chat template {name!r} {reason}.", MARK_HINT)
    vocabulary = tokenizer.get_vocab()
    for token in re.findall(r"<\|[^|>]+\|>", text):
        if token not in vocabulary:
            message = f"The chat template {name!r} writes {token}, which is no token of this model."
            raise DataError(message, "Write chat_template = 'auto' in [data] for the model's own.")
    end = after.strip()
    if end not in {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}:
        ends = f"ends the marked words with {end!r}, not with a special token" if end else "marks no end of the turn"
        raise DataError(f"The chat template {name!r} {ends}.", MARK_HINT)
    return end


def render_chat(chat: Chat, template: ChatTemplate) -> tuple[str, list[Span], list[str]]:
    """A conversation as text, the spans of characters to supervise, and the notes of `fit_turns`. SkipRow where the template
    refuses the conversation; DataError where a turn is not to be supervised, and the template's marks do not separate the turns.
    """
    messages, notes = fit_turns(chat, template)
    try:
        text, spans = _render(template.source, messages, template.variables)
    except Exception as error:  # a template is a program: it may divide by zero
        raise SkipRow(f"the chat template refuses it: {first_line(error)}") from error
    if template.own and text != _try_render(template.own, messages, template.own_variables):
        raise SkipRow("the model's own chat template renders it otherwise (it strips or adds text), as the export would")
    supervised = [turn.supervised for turn in chat.turns if turn.role == "assistant"]
    if len(spans) != len(supervised):
        raise DataError(
            f"The chat template {template.name!r} marks {format_count(len(spans), 'span')} in a conversation of "
            f"{len(supervised)} assistant turns, so that not each of them is learned or left out as it should be.",
            "Mark each assistant turn once in the template of [data] chat_template.",
        )
    if template.is_own:  # nobody published it: it may drop words, or not end each answer
        if not all(message["content"] in text for message in messages):
            raise SkipRow("the chat template leaves out or changes the words of a turn")
        if not all(text[start:end].rstrip().endswith(template.end_of_turn) for start, end in spans):
            raise SkipRow("the chat template marks an answer without the end of its turn")
        if any(text[:start].rstrip().endswith("<think>") and "<think>" in text[start:end] for start, end in spans):
            raise SkipRow("the chat template begins the thinking that the row begins too")
    return text, [span for span, is_supervised in zip(spans, supervised, strict=True) if is_supervised], notes


def fit_turns(chat: Chat, template: ChatTemplate) -> tuple[list[Message], list[str]]:
    """The messages to render, and a note for each kind of turn that the template does not have.

    - A system turn, where the template has none (Phi-3-medium, the first Phi-3-mini, Phi-4-reasoning), is put ahead of
      the next user turn's text with a blank line between. Where no user turn follows at once, it becomes a user turn.
    - A tool's result becomes a user turn (Phi-4-mini has a turn for it); a function call is the assistant's.
    - Tool definitions stand in the system turn: in Phi-4-mini's own place for them, else as text after a blank line.
    - An assistant's thinking stands before its answer, and its tool calls after it. SkipRow where the model has no place for it.
    """
    notes: list[str] = []
    turns = list(chat.turns)
    tools = chat.tools if template.has_tools else ""
    if chat.tools:
        head = turns.pop(0).text if turns and turns[0].role == "system" else ""
        if not template.has_tools:
            head = _join(head, chat.tools)
            notes.append(TOOLS_AS_TEXT)
        turns.insert(0, Turn("system", head))
    if any(turn.role == "tool" for turn in turns) and "tool" not in template.roles:
        turns = [Turn("user", turn.text) if turn.role == "tool" else turn for turn in turns]
        notes.append(TOOL_AS_USER)
    if any(turn.role == "system" for turn in turns) and "system" not in template.roles:
        turns = list(_move_system_turns(turns))
        notes.append(SYSTEM_MOVED)
    messages = [{"role": turn.role, "content": _words(turn, template)} for turn in turns]
    if tools:
        messages[0]["tools"] = tools
    return messages, notes


def _words(turn: Turn, template: ChatTemplate) -> str:
    """What stands in a turn."""
    text, before, after = turn.text, *template.call_tokens
    if turn.calls:
        text = f"{text}{before}{turn.calls}{after}" if before else "\n".join(part for part in (text, turn.calls) if part)
    if not turn.thinking:
        return text
    if not template.thinking:
        raise SkipRow("an assistant's thinking, which only the family's reasoning models have a place for")
    if "<think>" in text:
        raise SkipRow("an assistant's thinking stands both in its answer and in a key of its own")
    return f"<think>\n{turn.thinking.strip()}\n</think>\n\n{text}"


def _move_system_turns(turns: Sequence[Turn]) -> Iterator[Turn]:
    waiting = ""
    for turn in turns:
        if turn.role == "system":
            waiting = _join(waiting, turn.text)
            continue
        if waiting and turn.role != "user":
            yield Turn("user", waiting)
        yield Turn("user", _join(waiting, turn.text)) if turn.role == "user" else turn
        waiting = ""
    if waiting:
        yield Turn("user", waiting)


def _join(before: str, after: str) -> str:
    return f"{before}\n\n{after}" if before and after else before or after


def _template_variables(tokenizer: Any) -> dict[str, Any]:
    """What `apply_chat_template` passes to a template, with the two tokens that it may write itself."""
    return {**tokenizer.special_tokens_map, "bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}


def _render(source: str, messages: list[Message], variables: Mapping[str, Any], *, marked: bool = True) -> tuple[str, list[Span]]:
    """The text of a conversation and, of a `marked` template, the spans inside the marks. Raises jinja2.TemplateError."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template([messages], chat_template=source, return_assistant_tokens_mask=marked, **variables)
    return str(texts[0]), spans[0] if marked else []


def _try_render(source: str, messages: list[Message], variables: Mapping[str, Any]) -> str | None:
    """The text of a conversation; None where the template refuses it (for example because of its role)."""
    try:
        return _render(source, messages, variables, marked=False)[0]
    except Exception:  # a template is a program, and may raise anything
        return None
