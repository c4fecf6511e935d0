"""Which template is chosen for each model's own on the hub, and what becomes of turns that it does not have."""

import json
from dataclasses import replace

import pytest
from tiny import TEMPLATE_FOLDER, build_tokenizer, hub_template
from tokenizers import AddedToken

from qlora_phi3.data import template
from qlora_phi3.data.formats import Chat
from qlora_phi3.data.messages import SkipRow, Turn
from qlora_phi3.data.prepare import prepare_datasets
from qlora_phi3.data.template import (
    CALL_TOKENS,
    FAMILY,
    LEADING_UNICODE_SPACE,
    SYSTEM_MOVED,
    TEMPLATE_DIR,
    TOOL_AS_USER,
    TOOLS_AS_TEXT,
    choose_template,
    fit_turns,
    render_chat,
)
from qlora_phi3.errors import DataError
from qlora_phi3.recipe.schema import Data

CHOSEN = {
    "Phi-3-mini-4k-instruct": ("phi3", {"system"}),
    "Phi-3-mini-4k-instruct.april-2024": ("phi3-medium", set()),
    "Phi-3-medium-4k-instruct": ("phi3-medium", set()),
    "Phi-3.5-mini-instruct": ("phi35", {"system"}),
    "phi-4": ("phi4", {"system"}),
    "phi-4.december-2024": ("phi4-first", {"system"}),
    "Phi-4-reasoning": ("phi4-reasoning", set()),
    "Phi-4-mini-instruct": ("phi4-mini", {"system", "tool"}),
    "Phi-4-mini-instruct.without-eos": ("phi4-mini", {"system", "tool"}),
    "Phi-4-mini-reasoning": ("phi4-mini-reasoning", {"system", "tool"}),
}
MARKED = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% generation %}{{ message['content'] }}<|end|>"
    "{% endgeneration %}{% endfor %}"
)


def test_the_table_of_templates_is_complete():
    assert {name for name, _ in CHOSEN.values()} == set(FAMILY)


@pytest.mark.parametrize("model", CHOSEN)
def test_each_models_own_template_finds_its_marked_twin(model):
    template = choose_template(build_tokenizer(hub_template(model)))
    name, roles = CHOSEN[model]
    assert template.name == name
    assert template.roles == {"user", "assistant"} | roles
    assert template.has_tools == ("mini" in model and "Phi-4" in model)
    assert template.end_of_turn == ("<|im_end|>" if "phi4" in name and "mini" not in name else "<|end|>")


@pytest.mark.parametrize("model", CHOSEN)
@pytest.mark.parametrize("asks", [False, True])
def test_the_marked_twin_renders_what_the_models_own_renders(model, asks):
    tokenizer = build_tokenizer(hub_template(model))
    template = choose_template(tokenizer)
    messages = [
        {"role": "user", "content": "one\n"},
        {"role": "assistant", "content": " two {{ 3 }} <&>"},
        {"role": "user", "content": ""},
    ]
    if "system" in template.roles:
        messages.insert(0, {"role": "system", "content": "zero"})
    twin = tokenizer.apply_chat_template(
        messages,
        chat_template=template.source,
        tokenize=False,
        add_generation_prompt=asks,
        **template.variables,
    )
    assert twin == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)


def test_a_template_of_its_own_with_marks_is_used_as_it_is():
    template = choose_template(
        build_tokenizer(
            MARKED.replace("{% generation", "{%- if message['role'] == 'assistant' %}{% generation").replace(
                "endgeneration %}", "endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
            )
        )
    )
    assert (template.name, template.end_of_turn) == ("the model's own", "<|end|>")


def test_an_unknown_template_is_refused_with_the_key_and_the_names():
    chatml = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    with pytest.raises(DataError, match="chat_template"):
        choose_template(build_tokenizer(chatml))


def test_a_template_that_renders_alike_only_at_times_is_refused():
    own = hub_template("Phi-3-mini-4k-instruct") + "{% if messages | length > 4 %}!{% endif %}"
    with pytest.raises(DataError):
        choose_template(build_tokenizer(own))


def test_a_turn_that_the_models_own_template_renders_otherwise_does_not_count_as_one_it_has():
    own = hub_template("Phi-3-mini-4k-instruct").replace("<|system|>", "<|system|> System:")
    template = choose_template(build_tokenizer(own))
    assert (template.name, template.roles) == ("phi3", {"user", "assistant"})


def test_a_tokenizer_without_a_template_is_told_by_its_special_tokens():
    assert choose_template(build_tokenizer(None)).name == "phi3"


def test_a_template_is_chosen_by_name_or_read_from_a_file_with_marks(tmp_path):
    tokenizer = build_tokenizer(hub_template("Phi-3-mini-4k-instruct"))
    assert choose_template(tokenizer, "phi35").name == "phi35"
    path = tmp_path / "mine.jinja"
    path.write_text((TEMPLATE_DIR / "phi3.jinja").read_text(encoding="utf-8"), encoding="utf-8")
    mine, own = choose_template(tokenizer, str(path)), choose_template(tokenizer)
    assert (mine.source, mine.roles, mine.end_of_turn) == (own.source, own.roles, own.end_of_turn)
    path.write_text("{% for m in messages %}{% generation %}", encoding="utf-8")
    with pytest.raises(DataError):
        choose_template(tokenizer, str(path))


SYSTEM, USER, ANSWER, TOOL = Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a"), Turn("tool", "t")


@pytest.mark.parametrize(
    ("model", "turns", "tools", "expected", "notes"),
    [
        ("Phi-3-mini-4k-instruct", (SYSTEM, USER, ANSWER), "", "system:s user:u assistant:a", []),
        ("Phi-3-medium-4k-instruct", (SYSTEM, USER, ANSWER), "", "user:s\n\nu assistant:a", [SYSTEM_MOVED]),
        (
            "Phi-3-medium-4k-instruct",
            (USER, ANSWER, SYSTEM, ANSWER),
            "",
            "user:u assistant:a user:s assistant:a",
            [SYSTEM_MOVED],
        ),
        (
            "Phi-3-mini-4k-instruct",
            (USER, ANSWER, TOOL, ANSWER),
            "",
            "user:u assistant:a user:t assistant:a",
            [TOOL_AS_USER],
        ),
        ("Phi-4-mini-instruct", (USER, ANSWER, TOOL, ANSWER), "", "user:u assistant:a tool:t assistant:a", []),
        ("Phi-4-mini-instruct", (SYSTEM, USER, ANSWER), "[]", "system:s+[] user:u assistant:a", []),
        ("Phi-3-mini-4k-instruct", (USER, ANSWER), "[]", "system:[] user:u assistant:a", [TOOLS_AS_TEXT]),
        (
            "Phi-3-medium-4k-instruct",
            (SYSTEM, USER, ANSWER),
            "[]",
            "user:s\n\n[]\n\nu assistant:a",
            [TOOLS_AS_TEXT, SYSTEM_MOVED],
        ),
    ],
)
def test_what_a_template_has_no_turn_for_is_moved_and_noted_never_dropped(model, turns, tools, expected, notes):
    template = choose_template(build_tokenizer(hub_template(model)))
    messages, noted = fit_turns(Chat(turns, tools), template)
    rendered = [f"{m['role']}:{m['content']}" + (f"+{m['tools']}" if "tools" in m else "") for m in messages]
    assert " ".join(rendered) == expected
    assert noted == notes


#: xllamacpp 2026.10.11549 on a .gguf of `tiny.build_tokenizer` named phi-3: of 31 characters that are or look like white space,
#: these gave other ids than the tokenizer after `<|user|>` and after `<|user|>\n`; within a text and before a token none did.
OTHER_IDS_IN_LLAMA_CPP = {0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}


def test_a_message_that_llama_cpp_reads_as_other_ids_is_recognised():
    """transformers drops all white space after such a token, llama.cpp what isspace() of a byte in the C locale is."""
    tokenizer = build_tokenizer(hub_template("Phi-3-mini-4k-instruct"))
    bare = tokenizer("<|user|>x", add_special_tokens=False).input_ids
    found = set()
    for code in [*range(0xD800), *range(0xE000, 0x10000)]:
        ids = tokenizer(f"<|user|>{chr(code)}x", add_special_tokens=False).input_ids
        is_kept = chr(code).encode().strip(b" \t\n\v\f\r") != b""
        found |= {code} if ids == bare and is_kept else set()
        for text in (f"{chr(code)}x", f"\n {chr(code)}"):
            assert bool(LEADING_UNICODE_SPACE.match(text)) == (code in found)
    assert found == OTHER_IDS_IN_LLAMA_CPP


@pytest.mark.parametrize("text", ["", "x\u3000", " x", "\n\nx \u3000", "\ufeff x", "\u200bx", "\x1cx", "\r\n"])
def test_white_space_elsewhere_is_read_alike(text):
    assert not LEADING_UNICODE_SPACE.match(text)


OWN = hub_template("Phi-3-mini-4k-instruct")
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("path", sorted(TEMPLATE_FOLDER.glob("*.jinja")), ids=lambda path: path.stem)
def test_a_published_template_needs_no_comparison_and_any_other_has_one(path):
    source = path.read_text(encoding="utf-8")
    assert choose_template(build_tokenizer(source)).own == ""
    assert choose_template(build_tokenizer(source + "{# edited #}")).own == source + "{# edited #}"


@pytest.mark.parametrize(
    ("edited", "words", "renders_alike"),
    [
        (OWN.replace("message['content']", "message['content'] | trim"), "plain", True),
        (OWN.replace("message['content']", "message['content'] | trim"), " led by a space", False),
        (OWN.replace("message['content']", "message['content'].split('</think>')[-1]"), "<think>t</think>a", False),
        (OWN.replace("message['content']", "(1 // (message['content'] | length - 3)) | string"), "abc", False),
    ],
)  # fmt: skip
def test_a_row_that_the_models_own_template_renders_otherwise_is_not_used(edited, words, renders_alike):
    chat = Chat((Turn("user", "q"), Turn("assistant", words)))
    if not renders_alike:
        with pytest.raises((SkipRow, DataError)):
            render_chat(chat, choose_template(build_tokenizer(edited)))
        return
    assert words in render_chat(chat, choose_template(build_tokenizer(edited)))[0]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (FOREVER, "does not end within"),
        ("{{ 'x' * 99999999999 }}", "none of the Phi-3 family"),
        ("{{ 1 / 0 }}", "none of the Phi-3 family"),
        ("{% generation %}{{ 1 / 0 }}{% endgeneration %}", "cannot be rendered: division by zero"),
        (f"{{% generation %}}{FOREVER}{{% endgeneration %}}", "does not end within"),
        ("{% if %}", "none of the Phi-3 family"),
        (
            "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
            "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}",
            "marks no end of the turn",
        ),
        ({"tool_use": OWN}, "none is the default"),
        (OWN + "\ud800", "a character that is none, '\\ud800'"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_ends_in_one_line(monkeypatch, source, said):
    monkeypatch.setattr(template, "TEMPLATE_SECONDS", 1)
    with pytest.raises(DataError) as caught:
        choose_template(build_tokenizer(source))
    assert said in caught.value.message


def test_a_file_that_is_no_text_is_no_template(tmp_path):
    (tmp_path / "a.jinja").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="cannot be read"):
        choose_template(build_tokenizer(OWN), str(tmp_path / "a.jinja"))


def test_thinking_and_tool_calls_stand_where_the_models_write_them():
    chat = Chat((Turn("user", "q"), Turn("assistant", "a", thinking="t ", calls='[{"name": "f", "arguments": {}}]')))
    tokenizer = build_tokenizer(hub_template("Phi-4-mini-reasoning"))
    tokenizer.add_tokens([AddedToken(token, special=False) for token in CALL_TOKENS])
    text, spans, _ = render_chat(chat, choose_template(tokenizer))
    answer = '<think>\nt\n</think>\n\na<|tool_call|>[{"name": "f", "arguments": {}}]<|/tool_call|><|end|>'
    assert [text[start:end] for start, end in spans] == [answer]
    text, spans, _ = render_chat(replace_turn(chat, thinking=""), choose_template(build_tokenizer(OWN)))
    assert [text[start:end] for start, end in spans] == ['a\n[{"name": "f", "arguments": {}}]<|end|>']
    with pytest.raises(SkipRow, match="thinking, which only"):
        render_chat(chat, choose_template(build_tokenizer(OWN)))


def replace_turn(chat, **changes):
    return replace(chat, turns=(chat.turns[0], replace(chat.turns[1], **changes)))


ASSISTANT = "{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
OTHER = "{{ m.content }}<|end|>{% endif"
MINE = "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}ASSISTANT{% else %}" + OTHER + " %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (MINE.replace("ASSISTANT", ASSISTANT.replace("<|end|>", ".")), "ends the marked words with '.'"),
        (MINE.replace("ASSISTANT", ASSISTANT.replace("<|end|>", "<|end|><|user|>")), "ends the marked words"),
        (MINE.replace("ASSISTANT", ASSISTANT.replace("{{ m", "Answer: {{ m")), "and them alone"),
        ("{% generation %}" + OWN + "{% endgeneration %}", "and them alone"),
    ],
)
def test_marks_that_hold_more_or_less_than_an_answer_and_its_end_are_refused(source, said):
    with pytest.raises(DataError) as caught:
        choose_template(build_tokenizer(source))
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("edit", "turns", "said"),
    [
        (("{{ m.content }}<|end|>{% endg", "{{ m.content }}{% if loop.last %}<|end|>{% endif %}{% endg"),
         ("q", "a", "q", "a"), "without the end of its turn"),
        ((OTHER, "{{ m.content[:3] }}<|end|>{% endif"), ("long", "a"), "leaves out or changes"),
        ((OTHER, "{{ m.content.replace('&lt;', '<') }}<|end|>{% endif"), ("&lt;|end|>", "a"), "changes"),
        ((OTHER, "<{{ m.content }}<|end|>{% endif"), ("|end|>", "a"), "makes or removes special tokens"),
    ],
)  # fmt: skip
def test_a_row_that_a_marked_template_changes_is_counted(prepare_rows, edit, turns, said):
    source = MINE.replace("ASSISTANT", ASSISTANT)
    assert prepare_rows(source, turns).report.rows_kept == 1
    assert edit[0] in source
    with pytest.raises(DataError, match=said):
        prepare_rows(source.replace(*edit), turns)


def test_a_template_that_marks_some_turns_only_is_refused(prepare_rows):
    source = MINE.replace("ASSISTANT", "{% if loop.last %}" + ASSISTANT + "{% else %}{{ m.content }}<|end|>{% endif %}")
    with pytest.raises(DataError, match="marks 1 span in a conversation of 2 assistant turns"):
        prepare_rows(source, ("q", "a", "q", "a"))


@pytest.fixture
def prepare_rows(tmp_path):
    """One conversation, prepared with a template of its own."""

    def prepare(source, turns):
        roles = ("user", "assistant") * 2
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}), encoding="utf-8")
        tokenizer = build_tokenizer(source)
        return prepare_datasets(
            Data(train="a.jsonl"), max_length=100, evaluate=False, tokenizer=tokenizer, template=choose_template(tokenizer),
            base_dir=tmp_path, progress=lambda *_: None,
        )  # fmt: skip

    return prepare
