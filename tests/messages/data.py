"""Messages about data files, data sets of the hub, formats, chat templates, and the rows made of them."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from message_table import Message
from tiny import build_tokenizer, hub_template
from workshop import Workshop

from qlora_phi3.data.formats import Chat, check_fields
from qlora_phi3.data.inspect import find_row
from qlora_phi3.data.messages import Turn
from qlora_phi3.data.prepare import prepare_datasets, split_indices
from qlora_phi3.data.report import SourceReport
from qlora_phi3.data.sources import open_file, open_hub, open_local
from qlora_phi3.data.template import choose_template, render_chat
from qlora_phi3.data.tokenize import read_examples
from qlora_phi3.errors import DataError
from qlora_phi3.recipe.schema import Data

CHAT = {"messages": [{"role": "user", "content": "q " * 50}, {"role": "assistant", "content": "a"}]}
OWN = hub_template("Phi-3-mini-4k-instruct")
MARKED = "{% for m in messages %}<|user|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}{% endfor %}"


def save(shop: Workshop, name: str, content: str | bytes) -> str:
    (shop.path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def read(shop: Workshop, name: str, content: str | bytes) -> object:
    source = open_file(save(shop, name, content), shop.path)
    return list(read_examples(source, Data(train=name), SourceReport(name)))


def empty_folder(shop: Workshop) -> object:
    (shop.path / "empty").mkdir()
    return open_local("empty", shop.path)


def prepare(shop: Workshop, rows: Any, *, max_length: int = 200, **keys: Any) -> Any:
    tokenizer = build_tokenizer(OWN)
    return prepare_datasets(
        Data(train=save(shop, "a.json", json.dumps(rows)), **keys),
        max_length=max_length,
        evaluate=False,
        tokenizer=tokenizer,
        template=choose_template(tokenizer),
        base_dir=shop.path,
        progress=lambda *_: None,
    )


def cache_is_a_file(shop: Workshop) -> object:
    with patch.dict(os.environ, HF_DATASETS_CACHE=str(shop.path / save(shop, "cache", "a file where the cache should be"))):
        return prepare(shop, [CHAT])


def row_left_out(shop: Workshop) -> object:
    data = replace(prepare(shop, [CHAT]), left_out={"a.json:2": "the conversation is empty"})
    return find_row(data, "2", build_tokenizer(OWN))


def choose(template: str | None, name: str = "auto") -> object:
    return choose_template(build_tokenizer(template), name)


def choose_file(shop: Workshop, content: str) -> object:
    return choose(OWN, str(shop.path / save(shop, "mine.jinja", content)))


def render_with_one_turn_left_out(shop: Workshop) -> object:
    """A template that marks each answer of a conversation that the user begins, and one span of any other."""
    tokenizer = build_tokenizer(
        "{% if messages[0]['role'] == 'assistant' %}{% generation %}x{% endgeneration %}{% else %}"
        "{% for m in messages if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
        "{% endfor %}{% endif %}"
    )
    chat = Chat((Turn("assistant", "a", supervised=False), Turn("assistant", "b")))
    return render_chat(chat, choose_template(tokenizer))


def message(name: str, trigger: Any, says: tuple[str, ...], hint: str) -> Message:
    return Message(name=name, trigger=trigger, error=DataError, exit_code=2, says=says, hint=hint)


MESSAGES = [
    message(
        "inspect-row-left-out",
        row_left_out,
        ("--row 2", "a.json:2"),
        "--problems",
    ),
    message(
        "inspect-no-such-row",
        lambda shop: find_row(prepare(shop, [CHAT]), "7", build_tokenizer(OWN)),
        ("--row 7", "a.json"),
        "--problems",
    ),
    message(
        "data-file-missing",
        lambda shop: open_file("gone.jsonl", shop.path),
        ("'gone.jsonl'",),
        "Check the path.",
    ),
    message("data-folder-without-files", empty_folder, ("empty has no data file",), ".jsonl"),
    message(
        "data-file-of-unsupported-type",
        lambda shop: read(shop, "a.txt", "x"),
        ("'.txt'",),
        ".json, .jsonl, .ndjson, .csv",
    ),
    message("data-file-empty", lambda shop: read(shop, "a.jsonl", "\n \n"), ("a.jsonl is empty",), "at least one row"),
    message("data-file-without-rows", lambda shop: prepare(shop, []), ("a.json holds no rows",), "at least one"),
    message("data-file-not-utf-8", lambda shop: read(shop, "a.csv", b"a\ncaf\xe9\n"), ("a.csv", "UTF-8"), "as UTF-8"),
    message("data-line-not-utf-8", lambda shop: read(shop, "a.jsonl", b'{"a": "\xe9"}'), ("a.jsonl:1",), "as UTF-8"),
    message(
        "data-line-not-json",
        lambda shop: read(shop, "a.jsonl", '{"a": 1}\n{"a": }\n'),
        ("a.jsonl:2: not valid JSON (Expecting value at column 7)",),
        "Correct that line",
    ),
    message(
        "data-array-not-json",
        lambda shop: read(shop, "a.json", '[{"a": 1},\n'),
        ("a.json:2: not valid JSON (the array is cut short)",),
        "Correct the file",
    ),
    message("data-record-not-csv", lambda shop: read(shop, "a.csv", 'a,b\n"1,2\n'), ("a.csv:2",), "Correct that record"),
    message("data-file-not-parquet", lambda shop: read(shop, "a.parquet", "x"), ("a.parquet",), "Copy the file again."),
    message(
        "hub-data-unreachable",
        lambda shop: open_hub("someone/chats", split="train", subset=None, revision=None),
        ("'someone/chats' (split 'train')",),
        "Check the id",
    ),
    message(
        "data-role-unknown",
        lambda shop: prepare(shop, [{"messages": [{"role": "narrator", "content": "Once."}]}]),
        ("a.json:1", "'narrator'"),
        "system, developer, user",
    ),
    message(
        "data-field-of-no-format",
        lambda shop: check_fields({"question": "instruction"}, "alpaca"),
        ("'question'", "'alpaca'"),
        "instruction",
    ),
    message(
        "data-field-of-no-column",
        lambda shop: prepare(shop, [{"q": "q", "output": "a"}], format="alpaca", fields={"instruction": "q", "input": "contxt"}),
        ("'contxt'", "1 row of a.json"),
        "output, q",
    ),
    message(
        "data-formats-mixed",
        lambda shop: prepare(shop, [CHAT, {"instruction": "i", "output": "o"}]),
        ("a.json:2 is of format 'alpaca', while a.json:1 is of format 'messages'",),
        "Use one format in a file",
    ),
    message(
        "data-rows-too-long",
        lambda shop: prepare(shop, [CHAT], max_length=20),
        ("None of the 1 row of a.json", "nothing left to learn"),
        "Raise [training] max_length, now 20.",
    ),
    message(
        "data-columns-unknown",
        lambda shop: prepare(shop, [{"left": "q", "right": "a"}]),
        ("its columns (left, right) fit no format",),
        "The formats are messages, sharegpt",
    ),
    message(
        "data-columns-of-other-names",
        lambda shop: prepare(shop, [{"question": "q", "answer": "a"}]),
        ("a.json",),
        'format = "alpaca" and, on a line of its own, fields = { instruction = "question", output = "answer" }',
    ),
    message(
        "data-rows-inside-one-object",
        lambda shop: prepare(shop, {"version": 1, "data": [{"question": "q", "answer": "a"}] * 3}),
        ("None of the 1 row",),
        "Its rows lie in the list 'data': save that list alone.",
    ),
    message(
        "evaluation-takes-every-row",
        lambda shop: split_indices(10, 10, seed=0),
        ("eval_size = 10 holds out 10 of 10 usable rows",),
        "Lower eval_size",
    ),
    message(
        "data-cache-not-writable",
        cache_is_a_file,
        ("qlora-phi3 cannot be written",),
        "HF_DATASETS_CACHE",
    ),
    message(
        "template-of-no-family",
        lambda shop: choose("{% for m in messages %}<|im_start|>{{ m['role'] }}{{ m['content'] }}{% endfor %}"),
        ("none of the Phi-3 family",),
        "chat_template to one of phi3, phi35, phi3-medium",
    ),
    message(
        "tokenizer-of-no-family",
        lambda shop: choose_template(SimpleNamespace(chat_template=None, get_vocab=dict)),
        ("neither a chat template",),
        "chat_template to one of",
    ),
    message("template-name-unknown", lambda shop: choose(OWN, "llama"), ("'llama'",), "The names: phi3, phi35"),
    message(
        "template-without-marks",
        lambda shop: choose_file(shop, OWN),
        ("mine.jinja", "{% generation %}"),
        "{% endgeneration %}",
    ),
    message(
        "template-not-rendered",
        lambda shop: choose_file(shop, "{% for m in messages %}{% generation %}"),
        ("cannot be rendered",),
        "chat_template to one of",
    ),
    message(
        "template-marks-other-words",
        lambda shop: choose_file(shop, MARKED),
        ("the assistant's words",),
        "{% generation %}",
    ),
    message("template-with-unknown-token", lambda shop: choose(OWN, "phi4"), ("'phi4'", "<|im_start|>"), "'auto'"),
    message("template-marks-do-not-separate-turns", render_with_one_turn_left_out, ("1 span ", "2 assistant turns"), "once"),
]
