"""What llama.cpp does to a prompt around its words: special tokens, white space beside them, where a turn ends.

llama.cpp knows one rule about white space: in a model whose name contains `phi-3` or `phi3`, every special token takes the
white space after it along, but for three (llama-vocab.cpp, "Handle per token attributes"). It cannot load a model of that name
without those three and `</s>`. In every other model no token takes any.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from qlora_phi3.export.turns import PROBES, Message, Turns, chat, read_turns

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
