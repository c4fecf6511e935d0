"""How llama.cpp and Ollama build a prompt: special tokens, white space next to them, where a turn ends, the Modelfile.

llama.cpp has one rule about white space: in a model whose name contains `phi-3` or `phi3`, every special token but three removes
the white space of ASCII after it (llama-vocab.cpp, "Handle per token attributes"). It cannot load a model of that name without
those three and `</s>`. In every other model no token removes any.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from qlora_phi3.adapters.base_files import DOWNLOAD_AGAIN, GENERATION_CONFIG
from qlora_phi3.data.tokenizer import load_tokenizer
from qlora_phi3.errors import ExportError
from qlora_phi3.export.request import MODELFILE
from qlora_phi3.family import read_architecture
from qlora_phi3.files import atomic_file, disk_errors, read_json_object
from qlora_phi3.inference import ENDS_OF_TURN, stop_ids
from qlora_phi3.recipe.schema import Model

#: Tokens that llama.cpp's rule leaves alone, and those that a model named phi-3 must have.
UNTOUCHED = ("<unk>", "<s>", "<|endoftext|>")
REQUIRED = (*UNTOUCHED, "</s>")
NAMED_PHI_3 = re.compile(r"phi-?3", re.IGNORECASE)
#: A special token of the family, and the white space after it.
ENDING = re.compile(r"<\|[^|>\s]+\|>\s*")
Message = dict[str, str]


def chat(*turns: str) -> list[Message]:
    """A conversation of turns such as `user How are you?`."""
    return [{"role": role, "content": content} for role, _, content in (turn.partition(" ") for turn in turns)]


#: Conversations on which the pieces of a template are checked.
PROBES = (
    chat("user one"),
    chat("system be kind", "user one"),
    chat("user one", "assistant two", "user three"),
    chat("system be kind", "user one", "assistant two", "user three", "assistant four", "user five"),
)
#: White space that people write and that a tokenizer with more rules of its own reads as other ids; and what is after a special
#: token in Chinese and Japanese paragraphs, which llama.cpp reads as other ids under either rule.
PADDED = chat("user  one ", "assistant  two ", "user \nthree\n")
INDENTED = chat("user \u3000one")
#: Largest context in tokens for Ollama; Phi-4's cache then takes 1.6 GiB in 16 bit (40 layers, 10 heads of 128).
LARGEST_CONTEXT = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """The fixed text around the content of each turn."""

    opening: str  #: Before the first user turn if there is no system turn; a system prompt of the template's own.
    system: tuple[str, str] | None  #: Before and after a system turn's content; None if the template has no such turn.
    user: tuple[str, str]  #: Before a user's content, and after it up to the assistant's content.
    after_assistant: str  #: The end of turn, and other text before the next turn.

    @property
    def end_of_turn(self) -> str:
        """The token that ends a turn: `<|end|>` or `<|im_end|>`."""
        return self.after_assistant.rstrip()

    def render(self, messages: list[Message]) -> str:
        """Render the prompt of a conversation that ends with the user's turn."""
        text = self.opening if messages[0]["role"] != "system" else ""
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": ("", self.after_assistant)}
        for message in messages:
            if message["role"] == "system" and self.system is None:
                text += self.opening
                continue
            before, after = around[message["role"]]
            text += before + message["content"] + after
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """How llama.cpp builds a prompt."""

    name: str  #: `general.name`, which decides about white space
    #: The model's own, without the white space that its tokens remove and llama.cpp's would not; None where it has none.
    template: str | None
    turns: Turns | None  #: the same as fixed text around the words; None where the template is not of that form
    add_bos: bool  #: whether a conversation begins with the begin-of-text token
    end_of_turn: int | None  #: id of the token that ends an assistant's turn; None where it is unknown
    notes: tuple[str, ...]  #: what llama.cpp will do differently, for a person to read


def read_turns(tokenizer: Any, template: str) -> Turns | None:
    """Split a chat template into fixed pieces by rendering it; None if that fails on one of `PROBES`.

    A begin-of-text token that the template itself writes is left out.
    """

    def render(messages: list[Message]) -> str:
        text: str = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(tokenizer.bos_token or "")

    try:
        with_answer, with_system = render(chat("user (1)", "assistant (2)", "user (3)")), render(chat("system (1)", "user (2)"))
        before_user, between, after_answer, _ = re.split(r"\([123]\)", with_answer, maxsplit=3)
        ending = ENDING.match(after_answer)
        user = after_answer[ending.end() :] if ending else after_answer
        if ending is None or not before_user.endswith(user):
            return None
        system = None
        if "(1)" in with_system and "(2)" in with_system:
            before_system, after_system, _ = re.split(r"\([12]\)", with_system, maxsplit=2)
            system = (before_system, after_system.removesuffix(user))
        turns = Turns(opening=before_user.removesuffix(user), system=system, user=(user, between), after_assistant=ending.group())
        probes = [probe for probe in PROBES if system is not None or probe[0]["role"] != "system"]
        return turns if all(turns.render(probe) == render(probe) for probe in probes) else None
    except (TemplateError, TypeError, ValueError):
        return None


def plan_prompting(tokenizer: Any, name: str) -> Prompting:
    """Choose name and template so that llama.cpp reads a conversation as the ids that the model was trained on."""
    vocabulary = tokenizer.get_vocab()
    # Take llama.cpp's rule where it is nearer to what this tokenizer does than no rule, and llama.cpp can load the model.
    stripping = [token.rstrip for token in tokenizer.added_tokens_decoder.values() if token.content not in UNTOUCHED]
    rule = all(token in vocabulary for token in REQUIRED) and 2 * sum(stripping) > len(stripping)
    template = turns = None
    notes: tuple[str, ...] = ()
    if tokenizer.chat_template:
        template, notes = _fit_template(tokenizer, tokenizer.get_chat_template(), rule)
        turns = read_turns(tokenizer, template)
        ids = tokenizer.apply_chat_template(PROBES[0], tokenize=True, return_dict=False)
    else:
        ids = tokenizer("one").input_ids
    end = turns.end_of_turn if turns else next((text for text in ENDS_OF_TURN if text in vocabulary), None)
    return Prompting(
        name=general_name(name, rule=rule),
        template=template,
        turns=turns,
        add_bos=tokenizer.bos_token_id is not None and bool(ids[0] == tokenizer.bos_token_id),
        end_of_turn=vocabulary.get(end),
        notes=notes,
    )


def general_name(name: str, *, rule: bool) -> str:
    """The name of a model, changed so that it contains `phi-3` or `phi3` exactly where llama.cpp's rule is wanted."""
    if rule:
        return name if NAMED_PHI_3.search(name) else f"{name} (Phi-3)"
    return NAMED_PHI_3.sub("Phi 3", name)


def _fit_template(tokenizer: Any, template: str, rule: bool) -> tuple[str, tuple[str, ...]]:
    """The template that gives llama.cpp the same ids, and notes where there is none."""
    if not _reads_alike(tokenizer, rule, template, template, PROBES):
        shortened = template
        for token in tokenizer.added_tokens_decoder.values():
            if token.rstrip:  # white space in a template may be written as `\n`
                shortened = re.sub(f"({re.escape(token.content)})" + r"(?:\\[nrt]|\s)+", r"\1", shortened)
        if not _reads_alike(tokenizer, rule, template, shortened, PROBES):
            note = (
                "llama.cpp reads the chat template as other ids than the model was trained on: its special tokens do not "
                "remove the white space next to them."
            )
            return template, (note,)
        template = shortened
    kinds = {
        "begins or ends with white space": PADDED,
        "begins with white space beyond ASCII, such as U+3000 or U+00A0,": INDENTED,
    }
    for kind, probe in kinds.items():
        if not _reads_alike(tokenizer, rule, template, template, (probe,)):
            return template, (f"A message that {kind} has other ids in llama.cpp than in training: remove it there.",)
    return template, ()


def _reads_alike(tokenizer: Any, rule: bool, template: str, other: str, probes: Iterable[list[Message]]) -> bool:
    """Whether this tokenizer with `template` and llama.cpp with `other` see the same text between special tokens.

    A conversation that the template refuses is skipped.
    """
    added = tokenizer.added_tokens_decoder.values()
    left = [token.content for token in added if token.lstrip]
    right = [token.content for token in added if token.rstrip]
    llama_right = [token.content for token in added if rule and token.content not in UNTOUCHED]
    for probe in probes:
        try:
            ours, theirs = (
                tokenizer.apply_chat_template(probe, chat_template=source, tokenize=False, add_generation_prompt=True)
                for source in (template, other)
            )
        except TemplateError:
            continue
        if _remove_white_space(ours, left, right) != _remove_white_space(theirs, [], llama_right, r"[ \t-\r]"):
            return False
    return True


def _remove_white_space(text: str, left: list[str], right: list[str], space: str = r"\s") -> str:
    """The text without the white space (`space`, a pattern) before the tokens of `left` and after those of `right`."""
    for tokens, pattern in ((right, rf"({{}}){space}+"), (left, rf"{space}+({{}})")):
        if tokens:
            text = re.sub(pattern.format("|".join(map(re.escape, tokens))), r"\1", text)
    return text


def write_modelfile(folder: Path, gguf: Path, system: str = "") -> tuple[str, tuple[str, ...]]:
    """Write the Modelfile with which `ollama create` takes a .gguf file, next to it; `folder` is the export that it was made of.
    Returns the system turn in it, and notes on `system`, that of all training rows, if any. ExportError where its
    generation_config.json cannot be read; ModelError where the tokenizer or the config cannot.
    """
    tokenizer, target = load_tokenizer(Model(name=str(folder))), gguf.with_name(MODELFILE)
    prompting = plan_prompting(tokenizer, gguf.stem)
    config = read_json_object(folder / GENERATION_CONFIG, ExportError, DOWNLOAD_AGAIN)
    stops = tokenizer.convert_ids_to_tokens(sorted(stop_ids(config.get("eos_token_id"), prompting.end_of_turn)))
    architecture = read_architecture(str(folder))
    # With longrope no more than the short factors serve, because llama.cpp decides by this number.
    limits = (architecture.longrope_boundary, architecture.max_position_embeddings, LARGEST_CONTEXT)
    lines = [f"FROM ./{gguf.name}"]
    if prompting.turns:  # without it Ollama guesses the template from the one inside the file
        lines.append(f'TEMPLATE """{build_template(prompting.turns)}"""')
    placed = '"""' not in system and not (prompting.turns and prompting.turns.system is None)
    lines += [f'SYSTEM """{system}"""'] if system and placed else []
    lines += [f"PARAMETER stop {json.dumps(stop)}" for stop in stops if stop is not None]
    lines += [f"PARAMETER num_ctx {min(limit for limit in limits if limit is not None)}", ""]
    with disk_errors(target, ExportError), atomic_file(target) as staging:
        staging.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    note = "The Modelfile has the system turn of all training rows; llama-cli needs it after -sys."
    lost = "The system turn of all training rows has no place in the Modelfile: begin the first question with it."
    return system if placed else "", (note if placed else lost,) if system else ()


def build_template(turns: Turns) -> str:
    """A chat template in Go's language, for Ollama.

    All white space is in quotes, so that `{{-` may break lines. As in Ollama's own templates, a conversation whose last turn is
    the assistant's leaves that turn open, to be continued.
    """

    def literal(text: str) -> str:
        """JSON's escapes are Go's too."""
        return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""

    content = "{{ .Content }}"
    branches = {"user": literal(turns.user[0]) + content + literal(turns.user[1])}
    if turns.system is not None:
        branches["system"] = literal(turns.system[0]) + content + literal(turns.system[1])
    branches["assistant"] = content + "{{ if not $last }}" + literal(turns.after_assistant) + "{{ end }}"
    lines = ["{{- range $i, $_ := .Messages }}", "{{- $last := eq (len (slice $.Messages $i)) 1 }}"]
    if turns.opening:
        condition = "eq $i 0" if turns.system is None else "and (eq $i 0) (ne .Role `system`)"
        lines += ["{{- if " + condition + " }}" + literal(turns.opening), "{{- end }}"]
    for number, (role, branch) in enumerate(branches.items()):
        lines.append("{{- " + ("else " if number else "") + f"if eq .Role `{role}` }}}}" + branch)
    return "\n".join([*lines, "{{- end }}", "{{- end }}"])
