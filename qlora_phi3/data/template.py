"""Which chat template a model is trained with: the family's own, with the assistant's words marked.

The templates in `qlora_phi3/templates/` are the models' own with `{% generation %}` marks around the assistant's
words and its end token. They render to the very same text, which `choose_template` checks against the tokenizer's own
template before it takes one. Marks, because the difference of two rendered prefixes leaks the next turn's header into
the loss. What is done with the marks, and with turns a template does not have, is left to `render.py`.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qlora_phi3.errors import DataError

TEMPLATE_FOLDER = Path(__file__).parent.parent / "templates"


#: In the order they are compared: of two that render alike, the first is taken.
FAMILY = (
    "phi3",
    "phi35",
    "phi3-medium",
    "phi4",
    "phi4-mini",
    "phi4-first",
    "phi4-reasoning",
    "phi4-mini-reasoning",
)


HOW_TO_SET = (
    f"Set [data] chat_template to one of {', '.join(FAMILY)}, or to a .jinja file with {{% generation %}} marks."
)


MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template with its assistant spans marked.

    Args:
        name: of the family, `the model's own`, or the path it was read from.
        source: jinja with `{% generation %}` marks.
        bos_token, eos_token: what those variables of the template stand for; empty where the model's own writes none.
        roles: those that it renders.
        has_tools: whether the system turn has a place for tool definitions.
        end_of_turn: the text that ends an assistant's turn, `<|end|>` or `<|im_end|>`.
    """

    name: str
    source: str
    bos_token: str
    eos_token: str
    roles: frozenset[str]
    has_tools: bool
    end_of_turn: str


def choose_template(tokenizer: Any, name: str = "auto") -> ChatTemplate:
    """The marked template that a model is trained with.

    Args:
        tokenizer: a fast tokenizer of transformers; read, not changed.
        name: `auto` for the one that renders as the tokenizer's own does; a name of `FAMILY`; or the path of a .jinja
            file.

    Raises:
        DataError: none renders alike; no such name or file; no marks in it; its special tokens are not the tokenizer's.
    """
    if name in FAMILY:
        return _inspect(name, _family_source(name), tokenizer)
    if name != "auto":
        return _inspect(name, _read_template(name), tokenizer)
    if not tokenizer.chat_template:
        guess = _guess_by_tokens(tokenizer)
        return _inspect(guess, _family_source(guess), tokenizer)
    own = tokenizer.get_chat_template()
    return _inspect("the model's own", own, tokenizer) if MARK.search(own) else _match_own(own, tokenizer)


def _read_template(name: str) -> str:
    path = Path(name).expanduser()
    if path.suffix != ".jinja" or not path.is_file():
        raise DataError(
            f"[data] chat_template = {name!r} is neither a name nor a .jinja file.", f"The names: {', '.join(FAMILY)}."
        )
    source = path.read_text(encoding="utf-8")
    if not MARK.search(source):
        raise DataError(
            f"[data] chat_template = {name!r} has no {{% generation %}} marks, so that nobody knows what to learn.",
            "Put {% generation %} and {% endgeneration %} around the assistant's words and its end token.",
        )
    return source


def template_variables(tokenizer: Any, bos_token: str, eos_token: str) -> dict[str, Any]:
    """What `apply_chat_template` hands to a template, with the two tokens that a template may write itself."""
    return {**tokenizer.special_tokens_map, "bos_token": bos_token, "eos_token": eos_token}


def render_template(
    source: str, messages: list[Message], variables: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the character spans [start, end) inside the marks. Raises jinja2.TemplateError."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        [messages], chat_template=source, return_assistant_tokens_mask=True, **variables
    )
    return texts[0], spans[0]


def _chat(*turns: str) -> list[Message]:
    return [{"role": turn.split()[0], "content": turn} for turn in turns]


#: What every template must render alike: one turn, two, three, and an open end.
PROBES = (
    _chat("user one", "assistant one"),
    _chat("user one", "assistant one", "user two", "assistant two"),
    _chat("user one", "assistant one", "user two", "assistant two", "user three"),
)


#: What tells templates apart that agree so far, and which turns one has.
SYSTEM_PROBES = (
    _chat("system one", "user one", "assistant one"),
    [{"role": "system", "content": ""}, *_chat("user one", "assistant one")],
)


TOOL_PROBE = _chat("user one", "assistant one", "tool one", "assistant two")


TOOLS_PROBE = [{"role": "system", "content": "system one", "tools": "tools one"}, *_chat("user one", "assistant one")]


@cache
def _family_source(name: str) -> str:
    return (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def _match_own(own: str, tokenizer: Any) -> ChatTemplate:
    """The family's template that renders as the tokenizer's own does, be it with or without its bos and eos tokens."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    variables = template_variables(tokenizer, bos, eos)
    theirs = [_try_render(own, probe, variables) for probe in (*PROBES, *SYSTEM_PROBES)]
    best, most = None, 0
    for name in FAMILY:
        for tokens in dict.fromkeys((b, e) for b in (bos, "") for e in (eos, "")):
            variables = template_variables(tokenizer, *tokens)
            ours = [_try_render(_family_source(name), probe, variables) for probe in (*PROBES, *SYSTEM_PROBES)]
            agreed = sum(a == b for a, b in zip(ours, theirs, strict=True))
            if ours[: len(PROBES)] == theirs[: len(PROBES)] and agreed > most:
                best, most = (name, *tokens), agreed
    if best is None:
        raise DataError(
            "The tokenizer's chat template renders like none of the Phi-3 family, so that the assistant's words in it "
            "are not known.",
            HOW_TO_SET,
        )
    name, bos, eos = best
    return _inspect(name, _family_source(name), tokenizer, bos=bos, eos=eos, own=own)


def _guess_by_tokens(tokenizer: Any) -> str:
    """A tokenizer without a template: the special tokens say whose it is."""
    vocabulary = tokenizer.get_vocab()
    if "<|im_sep|>" in vocabulary:
        return "phi4"
    if {"<|user|>", "<|assistant|>", "<|end|>"} <= vocabulary.keys():
        return "phi4-mini" if "<|tool_call|>" in vocabulary else "phi3"
    raise DataError(
        "The tokenizer has neither a chat template nor the special tokens of the Phi-3 family.",
        HOW_TO_SET,
    )


def _inspect(
    name: str, source: str, tokenizer: Any, *, bos: str | None = None, eos: str | None = None, own: str | None = None
) -> ChatTemplate:
    """Learn by rendering what a template can say; beside the model's own, a turn counts only where both agree."""
    all_bos, all_eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    bos, eos = all_bos if bos is None else bos, all_eos if eos is None else eos

    def says(probe: list[Message], words: str) -> bool:
        text = _try_render(source, probe, template_variables(tokenizer, bos, eos)) or ""
        alike = own is None or text == _try_render(own, probe, template_variables(tokenizer, all_bos, all_eos))
        return alike and words in text

    return ChatTemplate(
        name=name,
        source=source,
        bos_token=bos,
        eos_token=eos,
        roles=frozenset(
            {"user", "assistant"}
            | ({"system"} if says(SYSTEM_PROBES[0], "system one") else set())
            | ({"tool"} if says(TOOL_PROBE, "tool one") else set())
        ),
        has_tools=says(TOOLS_PROBE, "tools one"),
        end_of_turn=_check_marks(name, source, tokenizer, template_variables(tokenizer, bos, eos)),
    )


def _check_marks(name: str, source: str, tokenizer: Any, variables: dict[str, Any]) -> str:
    """The end of turn after the marked words. Raises DataError where the marks or the tokens are not in order."""
    from jinja2 import TemplateError

    try:
        text, spans = render_template(source, PROBES[0], variables)
    except TemplateError as error:
        raise DataError(f"The chat template {name!r} cannot be rendered: {error}.", HOW_TO_SET) from error
    answer = PROBES[0][1]["content"]
    marked = text[slice(*spans[0])] if len(spans) == 1 else ""
    if answer not in marked:
        raise DataError(
            f"The chat template {name!r} does not mark the assistant's words, once a turn.",
            "Put {% generation %} and {% endgeneration %} around the words and their end token.",
        )
    vocabulary = tokenizer.get_vocab()
    for token in re.findall(r"<\|[^|>]+\|>", text):
        if token not in vocabulary:
            raise DataError(
                f"The chat template {name!r} writes {token}, which is no token of this model.",
                "Write chat_template = 'auto' in [data] for the model's own.",
            )
    return marked.split(answer, 1)[1].strip()


def _try_render(source: str, messages: list[Message], variables: dict[str, Any]) -> str | None:
    """The rendered text; None where the template refuses the conversation (an unknown role, say)."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template([messages], chat_template=source, **variables)
    except (TemplateError, TypeError):
        return None
    return str(texts[0])
