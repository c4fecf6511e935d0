"""What llama.cpp does to a prompt around its words: special tokens, white space beside them, where a turn ends.

llama.cpp knows one rule about white space: in a model whose name contains `phi-3` or `phi3`, every special token takes the
white space after it along, but for three (llama-vocab.cpp, "Handle per token attributes"). It cannot load a model of that name
without those three and `</s>`. In every other model no token takes any.

The Modelfile with which `ollama create` takes a .gguf file: its template, where it stops, how much it looks back.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from qlora_phi3.errors import ExportError
from qlora_phi3.export.bundle import DOWNLOAD_AGAIN, GENERATION_CONFIG
from qlora_phi3.export.stop import PROBES, Message, Turns, chat, read_turns
from qlora_phi3.family import read_architecture
from qlora_phi3.files import read_json_object
from qlora_phi3.model.phi3 import load_tokenizer
from qlora_phi3.recipe.schema import Model

UNTOUCHED = ("<unk>", "<s>", "<|endoftext|>")


RULE_NEEDS = (*UNTOUCHED, "</s>")


NAMES_RULE = re.compile(r"phi-?3", re.IGNORECASE)


#: What people write that a tokenizer with more rules of its own reads as other ids.
PADDED = chat("user  one ", "assistant  two ", "user \nthree\n")


OTHER_IDS = (
    "llama.cpp reads the chat template as other ids than the model was trained on: its special tokens do not take the white "
    "space beside them along."
)


STRIP_MESSAGES = (
    "A message that begins or ends with white space becomes other ids in llama.cpp than in training; strip it."
)


ENDS_OF_TURN = ("<|end|>", "<|im_end|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """How llama.cpp is told to build a prompt.

    Args:
        name: `general.name`, which decides about white space.
        template: the chat template to write; the model's own, but for white space that its tokens take along and llama.cpp's
            would not. None where the model has none.
        turns: the same in fixed pieces; None where it cannot be told so.
        add_bos: whether a conversation begins with the begin-of-text token.
        end_of_turn: id of the token that ends an assistant's turn; None where nobody knows it.
        notes: what llama.cpp will do differently, for a person to read.
    """

    name: str
    template: str | None
    turns: Turns | None
    add_bos: bool
    end_of_turn: int | None
    notes: tuple[str, ...]


def plan_prompting(tokenizer: Any, name: str) -> Prompting:
    """Choose name and template so that llama.cpp reads a conversation as the ids that the model was trained on."""
    vocabulary = tokenizer.get_vocab()
    rule = _takes_rule(tokenizer.added_tokens_decoder.values(), vocabulary)
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    notes: tuple[str, ...] = ()
    if template is not None:
        template, notes = _fit_template(tokenizer, template, rule)
    turns = read_turns(tokenizer, template) if template is not None else None
    end = turns.end_of_turn if turns else next((text for text in ENDS_OF_TURN if text in vocabulary), None)
    return Prompting(
        name=general_name(name, rule=rule),
        template=template,
        turns=turns,
        add_bos=_begins_with_bos(tokenizer),
        end_of_turn=vocabulary.get(end),
        notes=notes,
    )


def general_name(name: str, *, rule: bool) -> str:
    """The name of a model, changed so that it contains `phi-3` or `phi3` exactly where llama.cpp's rule is wanted."""
    if rule:
        return name if NAMES_RULE.search(name) else f"{name} (Phi-3)"
    return NAMES_RULE.sub("Phi 3", name)


def _takes_rule(added: Any, vocabulary: dict[str, int]) -> bool:
    """Whether the rule is nearer to what this tokenizer does than no rule is, and llama.cpp can load it."""
    stripping = [token.rstrip for token in added if token.content not in UNTOUCHED]
    return all(token in vocabulary for token in RULE_NEEDS) and 2 * sum(stripping) > len(stripping)


def _fit_template(tokenizer: Any, template: str, rule: bool) -> tuple[str, tuple[str, ...]]:
    """The template that gives llama.cpp the same ids, and notes on where none does."""
    if not _reads_alike(tokenizer, rule, template, template, PROBES):
        shortened = _drop_white_space(tokenizer, template)
        if not _reads_alike(tokenizer, rule, template, shortened, PROBES):
            return template, (OTHER_IDS,)
        template = shortened
    return template, () if _reads_alike(tokenizer, rule, template, template, (PADDED,)) else (STRIP_MESSAGES,)


def _reads_alike(tokenizer: Any, rule: bool, template: str, other: str, probes: Iterable[list[Message]]) -> bool:
    """Whether this tokenizer with `template` and llama.cpp with `other` see the same text between special tokens.

    A conversation that the template refuses is passed over.
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
        if _take_white_space(ours, left, right) != _take_white_space(theirs, [], llama_right):
            return False
    return True


def _take_white_space(text: str, left: list[str], right: list[str]) -> str:
    """The text without the white space that tokens take along, before them (`left`) or after."""
    for tokens, pattern in ((right, r"({})\s+"), (left, r"\s+({})")):
        if tokens:
            text = re.sub(pattern.format("|".join(map(re.escape, tokens))), r"\1", text)
    return text


def _drop_white_space(tokenizer: Any, template: str) -> str:
    """The template without the white space that its special tokens take along; a `\\n` in it may be written as such."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.rstrip:
            template = re.sub(f"({re.escape(token.content)})" + r"(?:\\[nrt]|\s)+", r"\1", template)
    return template


def _begins_with_bos(tokenizer: Any) -> bool:
    """By a conversation, for that is what the model was trained on; by plain text where there is no chat template."""
    if tokenizer.bos_token_id is None:
        return False
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(PROBES[0], tokenize=True, return_dict=False)
    else:
        ids = tokenizer("one").input_ids
    return bool(ids[0] == tokenizer.bos_token_id)


#: Tokens of context where the model has more; Phi-4's cache then takes 1.6 GiB in 16 bit (40 layers, 10 heads of 128).
LARGEST_CONTEXT = 8192


def write_modelfile(folder: Path, gguf: Path, target: Path, *, force: bool = False) -> Path:
    """Write the Modelfile of a .gguf file that was made from a checkpoint.

    Args:
        folder: the checkpoint.
        gguf: the file, named by its name alone where it lies beside the Modelfile.
        target: the file to write.
        force: replace it.

    Raises:
        ExportError: it is there already, or generation_config.json cannot be read.
        ModelError: the folder's tokenizer or config cannot be read.
    """
    if target.exists() and not force:
        raise ExportError(f"{target} exists.", "Give another place, or --force.")
    tokenizer = load_tokenizer(Model(name=str(folder)))
    prompting = plan_prompting(tokenizer, gguf.stem)
    stop_ids = {*read_stops(folder), *([] if prompting.end_of_turn is None else [prompting.end_of_turn])}
    stops = tokenizer.convert_ids_to_tokens(sorted(stop_ids))
    beside = gguf.resolve().parent == target.resolve().parent
    text = build_modelfile(
        f"./{gguf.name}" if beside else str(gguf.resolve()),
        prompting.turns,
        stops=[stop for stop in stops if stop is not None],
        num_ctx=choose_context(folder),
    )
    target.write_text(text, encoding="utf-8", newline="\n")
    return target


def build_modelfile(source: str, turns: Turns | None, *, stops: Iterable[str], num_ctx: int) -> str:
    """The text of a Modelfile; without `turns` Ollama guesses the template from the one inside the file."""
    template = f'TEMPLATE """{build_template(turns)}"""\n' if turns else ""
    return (
        f"FROM {source}\n"
        + template
        + "".join(f"PARAMETER stop {json.dumps(stop)}\n" for stop in stops)
        + f"PARAMETER num_ctx {num_ctx}\n"
    )


def build_template(turns: Turns) -> str:
    """A chat template in Go's language, for Ollama.

    All white space stands in quotes, so that `{{-` may break lines. As in Ollama's own templates, a conversation whose last
    turn is the assistant's leaves that turn open, to be gone on with.
    """
    branches = {"user": _around(turns.user[0], turns.user[1])}
    if turns.system is not None:
        branches["system"] = _around(*turns.system)
    branches["assistant"] = "{{ .Content }}{{ if not $last }}" + _literal(turns.after_assistant) + "{{ end }}"
    lines = ["{{- range $i, $_ := .Messages }}", "{{- $last := eq (len (slice $.Messages $i)) 1 }}"]
    if turns.opening:
        without = " (ne .Role `system`)" if turns.system is not None else ""
        lines.append(
            "{{- if " + (f"and (eq $i 0){without}" if without else "eq $i 0") + " }}" + _literal(turns.opening)
        )
        lines.append("{{- end }}")
    for number, (role, branch) in enumerate(branches.items()):
        lines.append("{{- " + ("else " if number else "") + f"if eq .Role `{role}` }}}}" + branch)
    return "\n".join([*lines, "{{- end }}", "{{- end }}"])


def _around(before: str, after: str) -> str:
    return _literal(before) + "{{ .Content }}" + _literal(after)


def _literal(text: str) -> str:
    """A text as an action of Go's templates; JSON's escapes are Go's too."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def read_stops(folder: Path) -> list[int]:
    """The ids that generation stops at, by generation_config.json; none where it is not there."""
    path = folder / GENERATION_CONFIG
    stops: Any = read_json_object(path, ExportError, DOWNLOAD_AGAIN).get("eos_token_id") if path.is_file() else None
    return [] if stops is None else list(stops) if isinstance(stops, list) else [stops]


def choose_context(folder: Path) -> int:
    """Tokens of context for Ollama; with longrope no more than the short factors serve, for llama.cpp goes by this number."""
    architecture = read_architecture(str(folder))
    return min(architecture.longrope_boundary or LARGEST_CONTEXT, architecture.max_position_embeddings, LARGEST_CONTEXT)
