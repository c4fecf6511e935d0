"""What is supervised: the assistant's words and its end token, and nothing else, whatever the words are."""

import numpy as np
import pytest
from tiny import TEMPLATE_FOLDER, build_byte_tokenizer, build_tokenizer, hub_template

from qlora_phi3.data.formats import Chat
from qlora_phi3.data.messages import Turn
from qlora_phi3.data.template import choose_template, render_chat
from qlora_phi3.data.tokenize import Rendered, tokenize_rows
from qlora_phi3.data.tokenizer import SpecialTokens
from qlora_phi3.execution import IGNORE_INDEX

MODELS = sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja"))
WORDS = [
    "Hello there",
    "  two spaces ahead",
    "\n\nlines ahead",
    "spaces and lines behind  \n\n",
    "🎉",
    "emoji behind 🎉",
    "日本語",
    "é ﬁ ² Å",
    "x",
    "\u00a0no break",
    "def f():\n\n    return 1\n",
    "a<|endoftext|>b",
]


def tokenize(chat, template, tokenizer):
    text, spans, notes = render_chat(chat, template)
    ((_, ids, labels),) = tokenize_rows([Rendered(1, text, spans, is_chat=True)], tokenizer, None)
    return ids, labels, notes


def chat_of(*texts):
    return Chat(tuple(Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)))


@pytest.mark.parametrize("model", MODELS)
def test_ids_are_those_of_the_models_own_template_and_labels_are_the_assistants_turns(model):
    tokenizer = build_tokenizer(hub_template(model))
    template = choose_template(tokenizer)
    header, end = (
        tokenizer.convert_tokens_to_ids(token)
        for token in (["<|im_sep|>", "<|im_end|>"] if template.end_of_turn == "<|im_end|>" else ["<|assistant|>", "<|end|>"])
    )
    for number, first in enumerate(WORDS):
        second = WORDS[(number * 5 + 1) % len(WORDS)]
        chat = chat_of(second, first, first, second)
        ids, labels, notes = tokenize(chat, template, tokenizer)
        messages = [{"role": turn.role, "content": turn.text} for turn in chat.turns]
        assert ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
        # Another way to the labels: every answer stands between its header token and its end token. Phi-4 closes all
        # its headers with the same token, a system turn first, so there the answers are the last and the third to last.
        headers = np.flatnonzero(ids == header)
        starts = headers[[-3, -1]] if template.end_of_turn == "<|im_end|>" else headers
        expected = np.full_like(ids, IGNORE_INDEX)
        for start in starts + 1:
            stop = start + np.flatnonzero(ids[start:] == end)[0] + 1
            expected[start:stop] = ids[start:stop]
        assert labels.tolist() == expected.tolist()
        assert notes == []


@pytest.mark.parametrize("model", ["phi-4", "Phi-4-mini-instruct"])
@pytest.mark.parametrize("strip", [False, True])
def test_bytes_as_tokens_and_special_tokens_that_take_white_space_on_both_sides_change_nothing(model, strip):
    tokenizer = build_byte_tokenizer(hub_template(model), strip=strip)
    template = choose_template(tokenizer)
    for words in WORDS:
        ids, labels, _ = tokenize(chat_of(words, words, "q", words), template, tokenizer)
        seen = words.strip() if strip else words
        assert tokenizer.decode(ids[labels != IGNORE_INDEX]) == f"{seen}{template.end_of_turn}" * 2


def test_decoding_the_supervised_tokens_gives_the_words_and_the_end_token():
    tokenizer = build_tokenizer(hub_template("Phi-3-mini-4k-instruct"))
    template = choose_template(tokenizer)
    for words in WORDS:
        ids, labels, _ = tokenize(chat_of("question", words), template, tokenizer)
        # rstrip of <|assistant|> takes the white space ahead; the model never sees it, nor could it write it
        assert tokenizer.decode(ids[labels != IGNORE_INDEX]).replace("> b", ">b") == words.lstrip() + "<|end|>"


def test_the_end_token_in_the_words_of_the_assistant_does_not_end_the_supervised_span():
    tokenizer = build_tokenizer(hub_template("Phi-3-mini-4k-instruct"))
    ids, labels, _ = tokenize(chat_of("q", "a<|end|>b"), choose_template(tokenizer), tokenizer)
    assert tokenizer.decode(ids[labels != IGNORE_INDEX]) == "a<|end|> b<|end|>"
    assert SpecialTokens(tokenizer).pattern.search("a<|end|>b")
    assert not SpecialTokens(tokenizer).pattern.search("a <|other|> b")


def test_an_unsupervised_turn_has_no_labels():
    tokenizer = build_tokenizer(hub_template("Phi-3-mini-4k-instruct"))
    chat = Chat((Turn("user", "q"), Turn("assistant", "one", supervised=False), Turn("assistant", "two")))
    ids, labels, _ = tokenize(chat, choose_template(tokenizer), tokenizer)
    assert tokenizer.decode(ids[labels != IGNORE_INDEX]) == "two<|end|>"


def test_without_spans_every_position_but_the_first_is_supervised():
    tokenizer = build_tokenizer(hub_template("Phi-3-mini-4k-instruct"))
    text, _, _ = render_chat(chat_of("q", "a"), choose_template(tokenizer))
    ((_, ids, labels),) = tokenize_rows([Rendered(1, text, None, is_chat=True)], tokenizer, None)
    assert labels[0] == IGNORE_INDEX
    assert labels[1:].tolist() == ids[1:].tolist()


def test_raw_text_is_supervised_and_ends_once():
    tokenizer = build_tokenizer(hub_template("Phi-3-mini-4k-instruct"))
    texts = ["some words", "some words<|endoftext|>"]
    rendered = [Rendered(number, text, None, is_chat=False) for number, text in enumerate(texts)]
    (_, ids, labels), (_, same, _) = tokenize_rows(rendered, tokenizer, None)
    assert tokenizer.decode(ids) == "some words<|endoftext|>"
    assert ids.tolist() == same.tolist()
    assert labels.tolist() == [IGNORE_INDEX, *ids[1:].tolist()]


def test_a_character_of_several_tokens_at_the_end_of_a_span_is_supervised():
    tokenizer = build_byte_tokenizer(hub_template("phi-4"), strip=False)
    ((_, ids, labels),) = tokenize_rows([Rendered(1, "ab🎉c", [(1, 3)], is_chat=True)], tokenizer, None)
    assert tokenizer.decode(ids[labels != IGNORE_INDEX]) == "b🎉"
