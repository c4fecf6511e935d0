"""Rows of every format, and every way a row can be unusable."""

import pytest

from qlora_phi3.data.formats import Chat, Document, check_fields, detect_format, read_row
from qlora_phi3.data.messages import ROLES, SkipRow, Turn
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
    assert read({"messages": answers}) == Chat(
        (Turn("assistant", "a", False), Turn("assistant", "b", True)), switched_off=True
    )
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
