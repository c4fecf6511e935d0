"""Rows of every format, and every way a row can be unusable."""

import re
from datetime import date
from decimal import Decimal

import pytest

from qlora_phi3.data.formats import (
    EMPTY_TURN,
    EMPTY_WORD,
    INPUT_IGNORED,
    LIST_ANSWER,
    Chat,
    Document,
    check_fields,
    detect_format,
    read_row,
)
from qlora_phi3.data.messages import ROLES, SkipRow, Turn, check_unread
from qlora_phi3.errors import DataError


def read(row: dict[str, object]) -> Chat | Document:
    name = detect_format(row)
    assert name is not None
    return read_row(row, name, "a.jsonl:7")


def turns(row: dict[str, object]) -> list[tuple[str, str]]:
    chat = read(row)
    assert isinstance(chat, Chat)
    return [(turn.role, turn.text) for turn in chat.turns]


QUESTION_AND_ANSWER = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        {"messages": [{"role": "User", "content": [{"type": "text", "text": "q"}]}, {"role": "model", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "output": "a", "input": None, "history": None, "text": "prompt and all"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    ],
)
def test_every_format_reads_a_question_and_an_answer(row):
    assert turns(row) == QUESTION_AND_ANSWER


def test_alpaca_puts_the_input_below_the_instruction_as_microsofts_samples_do():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["q", "a"]]}
    assert turns(row) == [
        ("system", "Be brief."),
        *QUESTION_AND_ANSWER,
        ("user", "Add.\n Input: 1 2"),
        ("assistant", "3"),
    ]


def test_sharegpt_roles_are_mapped_and_no_turn_is_dropped():
    row = {
        "system": "s",
        "tools": '[{"name": "add"}]',
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": "add(1, 2)"},
            {"from": "observation", "value": "3"},
            {"from": "tool", "value": "4"},
            {"from": "system", "value": "t"},
            {"from": "gpt", "value": "a"},
        ],
    }
    assert turns(row) == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "add(1, 2)"),
        ("tool", "3"),
        ("tool", "4"),
        ("system", "t"),
        ("assistant", "a"),
    ]
    assert read(row) == Chat(read(row).turns, '[{"name": "add"}]')


def test_a_tool_call_is_kept_as_json_text():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert read(row).turns[1] == Turn("assistant", "", calls='[{"name": "add", "arguments": {"a": 1}}]')


def test_a_message_of_weight_0_and_the_answers_of_a_prompt_are_not_supervised():
    answers = [{"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "b", "weight": 1}]
    assert read({"messages": answers}) == Chat((Turn("assistant", "a", False), Turn("assistant", "b", True)), switched_off=True)
    row = {"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "completion": "b"}
    assert [turn.supervised for turn in read(row).turns] == [False, False, True]


def test_plain_text_stays_as_it_is():
    assert read({"text": " as it is\n"}) == Document(" as it is\n")


def test_the_most_specific_format_wins():
    assert detect_format({"prompt": "p", "prompt_id": "1", "messages": []}) == "messages"
    assert detect_format({"instruction": "i", "output": "o", "prompt": "p", "text": "t"}) == "alpaca"
    assert detect_format({"messages": None, "text": "t"}) == "text"
    assert detect_format({"question": "q"}) is None


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "the conversation is empty"),
        ({"messages": [USER]}, "no assistant turn to learn from"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "an assistant turn is empty"),
        ({"messages": [USER, {"role": "assistant"}]}, "an assistant turn is empty"),
        ({"messages": {"role": "user"}}, "'messages' is an object, not a list"),
        ({"messages": "hello"}, "'messages' is text, and not the JSON of a list of messages"),
        ({"messages": ["hello"]}, "a message of 'messages' is text, not an object"),
        ({"messages": [{"content": "q"}]}, "a message of 'messages' has no role"),
        ({"messages": [{"role": "user", "content": 3}]}, "'content' is a number, not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "a part of a message is 'image_url', not text",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "'content' holds half a Unicode surrogate pair"),
        ({"instruction": ["q"], "output": "a"}, "'instruction' is a list, not text"),
        ({"instruction": "q", "output": "a", "history": ["q"]}, "'history' is not a list of [question, answer] pairs"),
        ({"prompt": "q", "completion": ""}, "an assistant turn is empty"),
        ({"prompt": "\ud800", "completion": "a"}, "'content' holds half a Unicode surrogate pair"),
        (
            {"messages": [USER, {"role": "assistant", "content": "a"}], "tools": "\ud800"},
            "'tools' holds half a Unicode surrogate pair",
        ),
        ({"text": "  "}, "the text is empty"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, reason):
    with pytest.raises(SkipRow) as caught:
        read(row)
    assert str(caught.value) == reason


def test_a_missing_column_of_a_named_format_makes_a_row_unusable():
    with pytest.raises(SkipRow, match="no 'output'"):
        read_row({"instruction": "q"}, "alpaca", "a.csv:2")


def test_an_unknown_role_is_an_error_with_the_place_and_the_known_roles():
    with pytest.raises(DataError, match=r"a\.jsonl:7: .*'narrator'") as caught:
        read({"messages": [{"role": "narrator", "content": "Once."}]})
    assert all(role in str(caught.value) for role in ROLES)


def test_a_field_map_of_an_unknown_column_is_refused():
    check_fields({"instruction": "question"}, "alpaca")
    with pytest.raises(DataError, match="'question'"):
        check_fields({"question": "instruction"}, "alpaca")


def conversation(**answer):
    return {"messages": [USER, {"role": "assistant", "content": "a", **answer}, {"role": "assistant", "content": "b"}]}


OFF = [
    {"train": False}, {"training": False}, {"trainable": "false"}, {"loss": 0}, {"loss_mask": 0.0}, {"loss_weight": "0"},
    {"weight": "0.0"}, {"masked": True}, {"learn": "no"},
]  # fmt: skip
ON = [{"train": True}, {"loss_weight": 1.0}, {"weight": "1"}, {"masked": "false"}, {"train": None}, {"weight": ""}]


@pytest.mark.parametrize(("switch", "supervised"), [(off, False) for off in OFF] + [(on, True) for on in ON])
def test_a_turn_that_is_switched_off_under_any_name_is_not_learned(switch, supervised):
    chat = read(conversation(**switch))
    assert [turn.supervised for turn in chat.turns[1:]] == [supervised, True]
    assert chat.switched_off is not supervised
    parts = {"content": [{"type": "text", "text": "a", **switch}]}
    assert [turn.supervised for turn in read(conversation(**parts)).turns[1:]] == [supervised, True]
    row = {"messages": [USER, {"role": "assistant", "content": "a"}], **switch}
    if supervised:
        assert read(row).unread == ()
        return
    with pytest.raises(SkipRow, match="the row is switched off"):
        read(row)
    with pytest.raises(SkipRow, match="the row is switched off"):
        read({"text": "words", **switch})


@pytest.mark.parametrize(
    "switch",
    [
        {"weight": 0.5}, {"weight": 2}, {"loss_weight": "0.1"}, {"train": "maybe"}, {"loss_mask": [0, 1]},
        {"train": True, "weight": 0}, {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
        {"content": [{"text": "a", "train": False}, {"text": "b", "train": True}]},
    ],
)  # fmt: skip
def test_a_switch_that_is_neither_on_nor_off_makes_a_row_unusable(switch):
    with pytest.raises(SkipRow):
        read(conversation(**switch))


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"chosen": "g", "rejected": "b"}, "'chosen', 'rejected'"),
        ({"rejected_response": "b"}, "'rejected_response'"),
        ({"label": False}, "'label'"),
        ({"labels": [True, False]}, "'labels'"),
        ({"kto_tag": True}, "'kto_tag'"),
        ({"score": 0.1}, "'score'"),
        ({"Score_Rejected": 0.1}, "'Score_Rejected'"),
        ({"is_correct": "false"}, "'is_correct'"),
        ({"completions": ["a", "b"]}, "'completions'"),
        ({"response_a": "x", "response_b": "y", "winner": "a"}, "'response_a', 'response_b', 'winner'"),
    ],
)
def test_preference_data_are_refused_by_name(columns, named):
    row = {"instruction": "q", "output": "a", **columns}
    with pytest.raises(DataError) as caught:
        check_unread(row, row, "a.jsonl:1")
    assert caught.value.message.startswith(f"a.jsonl:1 has {named}, ")
    assert "ignore_columns = [" in caught.value.hint


def test_a_label_that_is_a_name_and_an_empty_one_are_no_preference():
    row = {"label": "sports", "rejected": None, "chosen": "", "scores": [], "grade": 3}
    check_unread(row, row, "a.jsonl:1")


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "a"}], "topic": "x", "empty": "", "id": 0}, ("topic", "id")),
        ({"messages": [{**USER, "name": "Ann"}, {"role": "assistant", "content": "a"}]}, ("name (of messages)",)),
        ({"messages": [USER, {"role": "assistant", "content": "a", "text": "b"}]}, ("text (of messages)",)),
        ({"messages": [{"role": "user", "thinking": "t", "content": "q"}, {"role": "assistant", "content": "a"}]},
         ("thinking (of messages)",)),
        ({"messages": [{"role": "user", "content": [{"text": "q", "cited": 1}]}, {"role": "assistant", "content": "a"}]},
         ("cited (of parts of messages)",)),
        ({"instruction": "q", "output": "a", "input": "i", "context": "c"}, ("context",)),
        ({"instruction": "q", "output": "a", "system": "s", "system_prompt": "t"}, ("system_prompt",)),
        ({"prompt": "q", "completion": "a", "context": "c"}, ("context",)),
        ({"text": "words", "title": "t", "url": float("nan")}, ("title",)),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1", "name": "f", "extra": 1}]}]},
         ("extra (of tool calls)",)),
    ],
)  # fmt: skip
def test_what_a_row_holds_and_is_not_read_is_named(row, unread):
    assert read(row).unread == unread


@pytest.mark.parametrize("key", ["system", "system_prompt", "systemInstruction", "instructions"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, {"role": "assistant", "content": "a"}]},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
    ],
)
@pytest.mark.parametrize("value", ["s", [{"text": "s"}], {"role": "system", "parts": [{"text": "s"}]}])
def test_a_system_text_under_any_name_is_the_first_turn(row, key, value):
    assert turns({**row, key: value}) == [("system", "s"), *QUESTION_AND_ANSWER]
    assert read({**row, key: value}).unread == ()


@pytest.mark.parametrize(
    "content",
    [
        "one two",
        ["one", " two"],
        [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}],
        [{"type": "text", "value": "one two"}],
        [{"type": "input_text", "text": "one two"}],
        [{"content": "one"}, " two"],
        {"content_type": "text", "parts": ["one", " two"]},
    ],
)
@pytest.mark.parametrize("key", ["content", "value", "text", "parts"])
def test_the_parts_of_a_message_are_read_under_any_key_and_joined_with_nothing_between(key, content):
    assert turns({"messages": [{"role": "user", key: content}, {"role": "assistant", "content": "a"}]})[0] == (
        "user",
        "one two",
    )


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"tool_calls": '[{"name": "f", "arguments": {"x": 1}}]'},
        {"tool_calls": ['{"name": "f", "parameters": {"x": 1}}']},
        {"function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
    ],
)
def test_a_tool_call_is_name_and_arguments_once_however_it_is_written(calls):
    turn = read({"messages": [USER, {"role": "assistant", "content": None, **calls}]}).turns[1]
    assert (turn.text, turn.calls) == ("", '[{"name": "f", "arguments": {"x": 1}}]')


@pytest.mark.parametrize("tools", [[], "[]", "", None, "null", "{}", " [ ] "])
def test_no_tools_are_no_tools(tools):
    assert read({"messages": [USER, {"role": "assistant", "content": "a"}], "tools": tools}).tools == ""


def test_tools_as_text_in_a_list_are_not_quoted_twice():
    row = {"messages": [USER, {"role": "assistant", "content": "a"}], "functions": ['{"name": "f"}']}
    assert read(row).tools == '[{"name": "f"}]'


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_is_read_under_any_name(key):
    answer = {"role": "assistant", "content": "a", key: "t"}
    assert read({"messages": [USER, answer]}).turns[1] == Turn("assistant", "a", thinking="t")
    parts = {"role": "assistant", "content": [{"type": key, key: "t"}, {"type": "text", "text": "a"}]}
    assert read({"messages": [USER, parts]}).turns[1] == Turn("assistant", "a", thinking="t")


@pytest.mark.parametrize("value", [float("nan"), "nan", "None", "<noinput>", "null"])
def test_an_empty_cell_written_as_a_word_is_no_input_and_no_answer(value):
    assert turns({"instruction": "q", "input": value, "output": "a"}) == QUESTION_AND_ANSWER
    if value in ("nan", "<nooutput>"):
        with pytest.raises(SkipRow, match="empty cell"):
            read({"instruction": "q", "output": value})


def test_an_input_without_an_instruction_is_the_question():
    assert turns({"instruction": " ", "input": "q", "output": "a"}) == QUESTION_AND_ANSWER


def test_an_empty_question_is_noted_and_pictures_make_a_row_unusable():
    assert read({"instruction": " ", "output": "a"}).notes == (EMPTY_TURN,)
    with pytest.raises(SkipRow, match="'images' cannot be read"):
        read({"instruction": "q", "output": "a", "images": ["x.png"]})


ANSWER = {"role": "assistant", "content": "Look."}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"tool_calls": "[{'name': 'f'}]"}, "the tool calls are text, and not JSON"),
        (
            {"tool_calls": [{"name": "f", "arguments": {"x": 1}, "parameters": {"y": 1}}]},
            "a tool call has its arguments twice",
        ),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{}x"}}]}, "are not a JSON object"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}]}, "are not a JSON object"),
        ({"tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}, "that JSON has not"),
        ({"tool_calls": [{"name": "f", "arguments": {"x": date(2026, 1, 1)}}]}, "that JSON has not"),
        ({"tool_calls": [{"arguments": {}}]}, "a tool call has no name"),
        ({"content": [{"type": "thinking", "thinking": "t", "train": False}, {"text": "a"}]}, "is switched off"),
        ({"content": [{"text": "a", "functionCall": {"name": "f"}}]}, "'functionCall', not text"),
        ({"train_detail": '[{"train": 0}]'}, "'train_detail' switches"),
        ({"Train": False}, "'Train' may switch"),
        ({"mask": True}, "'mask' may switch"),
        ({"content": "nan"}, "a word for an empty cell"),
    ],
)
def test_an_answer_that_would_be_learned_otherwise_than_it_is_meant_makes_its_row_unusable(answer, reason):
    with pytest.raises(SkipRow, match=re.escape(reason)):
        read({"messages": [USER, {**ANSWER, **answer}]})


@pytest.mark.parametrize("arguments", ["arguments", "parameters", "args", "input"])
def test_the_arguments_of_a_call_are_read_under_any_name(arguments):
    call = {"name": "f", arguments: {"x": 1}}
    assert read({"messages": [USER, {**ANSWER, "tool_calls": [call]}]}).turns[1].calls == '[{"name": "f", "arguments": {"x": 1}}]'


def test_a_call_that_the_text_holds_too_is_learned_once_and_other_text_stays():
    answer = {"role": "assistant", "content": '[{"name": "f", "arguments": {}}]', "tool_calls": [{"name": "f"}]}
    turn = read({"messages": [USER, answer]}).turns[1]
    assert (turn.text, turn.calls) == ("", '[{"name": "f", "arguments": {}}]')
    turn = read({"messages": [USER, {"role": "function_call", "content": "{name: f}"}]}).turns[1]
    assert (turn.text, turn.calls) == ("{name: f}", "")


def test_tools_in_a_system_message_are_definitions_of_tools():
    system = {"role": "system", "content": "s", "tools": '[{"name": "f"}]'}
    chat = read({"messages": [system, USER, ANSWER]})
    assert (chat.tools, chat.turns[0], chat.unread) == ('[{"name": "f"}]', Turn("system", "s"), ())
    with pytest.raises(SkipRow, match="more than one place"):
        read({"messages": [system, USER, ANSWER], "tools": [{"name": "g"}]})


@pytest.mark.parametrize("key", ["chosen", "rejected_content", "rating", "rank", "label"])
def test_a_judgement_inside_a_message_is_one_of_the_row(key):
    with pytest.raises(DataError, match=f"'{key}'"):
        read({"messages": [USER, {**ANSWER, key: 1}]})


@pytest.mark.parametrize("value", ["rejected", "Undesirable", "👎", "-", "negative", "0.3", 1, Decimal("0.0"), {"a": 1}])
def test_a_label_that_judges_is_a_preference_however_it_is_written(value):
    with pytest.raises(DataError):
        check_unread({"label": value}, ["label"], "a.jsonl:1")


def test_a_prompt_and_a_completion_that_are_json_of_messages_are_messages():
    row = {"prompt": '[{"role": "user", "content": "q"}]', "completion": '[{"role": "assistant", "content": "a"}]'}
    assert turns(row) == QUESTION_AND_ANSWER
    with pytest.raises(SkipRow, match="'prompt' is text"):
        read({**row, "prompt": "[{'role': 'user', 'content': 'q'}]"})
    assert turns({"prompt": "q", "completion": "[1, 2]"})[1] == ("assistant", "[1, 2]")


def test_words_for_an_empty_cell_are_no_system_text_and_are_noted_as_answers():
    assert turns({"instruction": "q", "output": "a", "system": "nan"}) == QUESTION_AND_ANSWER
    assert read({"instruction": "q", "output": "a", "system": "nan"}).notes == (INPUT_IGNORED,)
    assert read({"instruction": "q", "output": "None"}).notes == (EMPTY_WORD,)
    assert read({"instruction": "q", "output": '["good", "bad"]'}).notes == (LIST_ANSWER,)
    assert read({"instruction": "q", "output": "[1, 2]"}).notes == ()
    assert read({"instruction": "q", "output": '["one"]'}).notes == ()
    assert turns({"instruction": "nan", "input": "q", "output": "a"}) == QUESTION_AND_ANSWER
    assert turns({"instruction": "q", "output": "a", "history": '[["q", "a"]]'}) == QUESTION_AND_ANSWER * 2


def test_a_switched_off_turn_of_any_role_counts_where_every_token_is_learned():
    assert read({"messages": [{**USER, "train": False}, ANSWER]}).switched_off
    assert read({"prompt": [{**USER, "weight": 0}], "completion": "a"}).switched_off
    assert not read({"prompt": "q", "completion": "a"}).switched_off
