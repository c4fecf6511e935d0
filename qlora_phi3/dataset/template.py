"""Which chat template a model is trained with: the family's own, with the assistant's words marked.

The templates in `qlora_phi3/templates/` are the models' own with `{% generation %}` marks around the assistant's words and its
end token. They render to the very same text, which `choose_template` checks against the tokenizer's own template before it
takes one. Marks, because the difference of two rendered prefixes leaks the next turn's header into the loss. What is done with
the marks, and with turns a template does not have, is left to `render.py`.
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
        name: `auto` for the one that renders as the tokenizer's own does; a name of `FAMILY`; or the path of a .jinja file.

    Raises:
        DataError: none renders alike; no such name or file; no marks in it; its special tokens are not the tokenizer's.
    """
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    if name == "auto":
        own = tokenizer.get_chat_template() if tokenizer.chat_template else None
        if own is None:
            return _finish(_guess_by_tokens(tokenizer), tokenizer, bos, eos)
        if MARK.search(own):
            return _finish("the model's own", tokenizer, bos, eos, own)
        return _match_own(own, tokenizer, bos, eos)
    if name in FAMILY:
        return _finish(name, tokenizer, bos, eos)
    path = Path(name).expanduser()
    if path.suffix != ".jinja" or not path.is_file():
        raise DataError(
            f"[data] chat_template = {name!r} is neither a name nor a .jinja file.",
            f"The names are {', '.join(FAMILY)}.",
        )
    source = path.read_text(encoding="utf-8")
    if not MARK.search(source):
        raise DataError(
            f"[data] chat_template = {name!r} has no {{% generation %}} marks, so that nobody knows what to learn.",
            "Put {% generation %} and {% endgeneration %} around the assistant's words and its end token.",
        )
    return _finish(name, tokenizer, bos, eos, source)


def templatetemplate_variables(tokenizer: Any, bos_token: str, eos_token: str) -> dict[str, Any]:
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


def _match_own(own: str, tokenizer: Any, bos: str, eos: str) -> ChatTemplate:
    """The family's template that renders as the tokenizer's own does, be it with or without its bos and eos tokens."""
    variables = template_variables(tokenizer, bos, eos)
    wanted = [_try_render(own, probe, variables) for probe in PROBES]
    wanted_system = [_try_render(own, probe, variables) for probe in SYSTEM_PROBES]
    alike: list[tuple[int, str, str, str]] = []
    for name in FAMILY:
        for some_bos, some_eos in dict.fromkeys((b, e) for b in (bos, "") for e in (eos, "")):
            tried = template_variables(tokenizer, some_bos, some_eos)
            if [_try_render(_family_source(name), probe, tried) for probe in PROBES] == wanted:
                system = [_try_render(_family_source(name), probe, tried) for probe in SYSTEM_PROBES]
                agreed = sum(a == b for a, b in zip(system, wanted_system, strict=True))
                alike.append((agreed, name, some_bos, some_eos))
    if not alike:
        raise DataError(
            "The tokenizer's chat template renders like none of the Phi-3 family, so that nobody knows which words are the assistant's.",
            f"Set [data] chat_template to one of {', '.join(FAMILY)}, or to a .jinja file with {{% generation %}} marks.",
        )
    _, name, some_bos, some_eos = max(alike, key=lambda candidate: candidate[0])
    return _finish(name, tokenizer, some_bos, some_eos, own=own)


def _guess_by_tokens(tokenizer: Any) -> str:
    """A tokenizer without a template: the special tokens say whose it is."""
    vocabulary = tokenizer.get_vocab()
    if "<|im_sep|>" in vocabulary:
        return "phi4"
    if {"<|user|>", "<|assistant|>", "<|end|>"} <= vocabulary.keys():
        return "phi4-mini" if "<|tool_call|>" in vocabulary else "phi3"
    raise DataError(
        "The tokenizer has neither a chat template nor the special tokens of the Phi-3 family.",
        f"Set [data] chat_template to one of {', '.join(FAMILY)}, or to a .jinja file with {{% generation %}} marks.",
    )


def _finish(
    name: str, tokenizer: Any, bos: str, eos: str, source: str | None = None, *, own: str | None = None
) -> ChatTemplate:
    """Learn what a template can say, by rendering; where the model's own is known, a turn counts only if that has it too."""
    source = source if source is not None else _family_source(name)
    variables = template_variables(tokenizer, bos, eos)
    text, spans = render_template(source, PROBES[0], variables)
    answer = PROBES[0][1]["content"]
    if len(spans) != 1 or answer not in (span := text[slice(*spans[0])]):
        raise DataError(
            f"The chat template {name!r} does not mark the assistant's words.",
            "Put {% generation %} around the words and their end token, once a turn.",
        )
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in re.findall(r"<\|[^|>]+\|>", text) if token not in vocabulary]
    if unknown:
        raise DataError(
            f"The chat template {name!r} writes {unknown[0]}, which is no token of this model.",
            "Set [data] chat_template to the model's own; 'auto' finds it.",
        )

    def says(probe: list[Message], words: str) -> bool:
        ours = _try_render(source, probe, variables)
        alike = own is None or ours == _try_render(own, probe, template_variables(tokenizer, *_own_tokens(tokenizer)))
        return alike and words in (ours or "")

    extra = {role for role, probe in (("system", SYSTEM_PROBES[0]), ("tool", TOOL_PROBE)) if says(probe, f"{role} one")}
    return ChatTemplate(
        name=name,
        source=source,
        bos_token=bos,
        eos_token=eos,
        roles=frozenset({"user", "assistant"} | extra),
        has_tools=says(TOOLS_PROBE, "tools one"),
        end_of_turn=span.split(answer, 1)[1].strip(),
    )


def _own_tokens(tokenizer: Any) -> tuple[str, str]:
    return tokenizer.bos_token or "", tokenizer.eos_token or ""


def _try_render(source: str, messages: list[Message], variables: dict[str, Any]) -> str | None:
    """The rendered text; None where the template refuses the conversation (an unknown role, say)."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template([messages], chat_template=source, **variables)
    except (TemplateError, TypeError):
        return None
    return str(texts[0])
