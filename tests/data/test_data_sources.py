"""Files of every type, valid and damaged."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from qlora_phi3.data.sources import open_file
from qlora_phi3.errors import DataError


def rows_of(path: Path) -> list[tuple[int, object]]:
    return list(open_file(str(path), path.parent).rows())


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_json_lines_are_numbered_by_line_and_blank_lines_are_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": "two"}\r\n')
    assert rows_of(path) == [(1, {"text": "one"}), (3, {"text": "two"})]


def test_a_json_array_is_numbered_by_the_line_each_object_starts_on(tmp_path):
    path = write(tmp_path / "a.json", '[\n  {\n    "text": "one"\n  },\n  {"text": "two"}, {"text": "three"}\n]\n')
    assert rows_of(path) == [(2, {"text": "one"}), (5, {"text": "two"}), (5, {"text": "three"})]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_arrays_and_json_lines_are_read_under_either_name(tmp_path, name):
    assert rows_of(write(tmp_path / name, '{"a": 1}\n{"a": 2}\n')) == [(1, {"a": 1}), (2, {"a": 2})]
    assert rows_of(write(tmp_path / name, '[{"a": 1},\n{"a": 2}]')) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", '{"a": "é"}\n'), ("a.json", '[{"a": "é"}]'), ("a.csv", "a\né\n")]
)
def test_a_byte_order_mark_is_not_part_of_the_data(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8-sig")
    assert [row for _, row in rows_of(path)] == [{"a": "é"}]


def test_csv_records_over_several_lines_keep_their_line_and_long_cells_are_read(tmp_path):
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", f'instruction,output\n"one\ntwo",{long}\nthree,four\n')
    assert rows_of(path) == [
        (2, {"instruction": "one\ntwo", "output": long}),
        (4, {"instruction": "three", "output": "four"}),
    ]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_csv_as_spreadsheets_write_it_is_read(tmp_path, mark):
    path = write(tmp_path / "a.csv", f'instruction{mark}output\n"one{mark} two"{mark}three, four\n')
    assert rows_of(path) == [(2, {"instruction": f"one{mark} two", "output": "three, four"})]


CELLS = "the record has more or fewer cells than the first line has columns"


def test_csv_records_with_missing_or_surplus_cells_are_no_rows(tmp_path):
    assert rows_of(write(tmp_path / "a.csv", "a,b\n1\n1,2,3\n1,2\n")) == [
        (2, CELLS),
        (3, CELLS),
        (4, {"a": "1", "b": "2"}),
    ]


def test_parquet_rows_are_numbered_from_one(tmp_path):
    messages = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]]
    parquet.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [(1, {"messages": messages[0]}), (2, {"messages": messages[1]})]


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', r"a\.jsonl:2: .*column 7"),
        ("a.json", '[{"a": 1},\n{"a": }]', r"a\.json:2: "),
        ("a.json", '[{"a": 1}\n{"a": 2}]', r"a\.json:2: "),
        ("a.json", '[{"a": 1},\n', r"a\.json:2: "),
        ("a.json", '[{"a": 1}]\n]', r"a\.json:2: "),
        ("a.json", '{"a": 1}\n{"a"', r"a\.json:2: "),
        ("a.jsonl", "[" * 100_000 + "\n", r"a\.jsonl:1: "),
        ("a.csv", 'a,b\n"1,2\n', r"a\.csv:2: "),
        ("a.parquet", "no parquet at all", r"a\.parquet "),
    ],
)
def test_content_that_does_not_parse_is_named_by_line(tmp_path, name, text, where):
    with pytest.raises(DataError, match=where):
        rows_of(write(tmp_path / name, text))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_text_that_is_not_utf_8_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"a": "caf\xe9"}\n')
    with pytest.raises(DataError, match="UTF-8"):
        rows_of(tmp_path / name)


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff\n"])
def test_an_empty_file_is_refused(tmp_path, text):
    with pytest.raises(DataError, match=r"a\.jsonl"):
        open_file(str(write(tmp_path / "a.jsonl", text)), tmp_path)


def test_a_relative_path_is_found_beside_the_recipe_first_then_in_the_working_directory(tmp_path, monkeypatch):
    here, recipes = tmp_path / "here", tmp_path / "recipes"
    for directory in (here, recipes):
        directory.mkdir()
        write(directory / "both.jsonl", json.dumps({"text": directory.name}))
    write(here / "one.jsonl", json.dumps({"text": "here"}))
    monkeypatch.chdir(here)
    assert list(open_file("both.jsonl", recipes).rows()) == [(1, {"text": "recipes"})]
    assert list(open_file("one.jsonl", recipes).rows()) == [(1, {"text": "here"})]


def test_the_digest_follows_the_content(tmp_path):
    first = open_file(str(write(tmp_path / "a.jsonl", '{"a": 1}')), tmp_path).digest
    assert first == open_file(str(write(tmp_path / "b.jsonl", '{"a": 1}')), tmp_path).digest
    assert first != open_file(str(write(tmp_path / "b.jsonl", '{"a": 2}')), tmp_path).digest
