"""Files of every type, valid and damaged."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from qlora_phi3.data.messages import SkipRow
from qlora_phi3.data.sources import open_file, open_local
from qlora_phi3.errors import DataError


def rows_of(path: Path) -> list[tuple[int, object]]:
    rows = list(open_file(str(path), path.parent).rows())
    for _, row in rows:
        if isinstance(row, DataError):  # as `read_examples` does
            raise row
    return rows


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_json_lines_are_numbered_by_line_and_blank_lines_are_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": "two"}\r\n')
    assert rows_of(path) == [(1, {"text": "one"}), (3, {"text": "two"})]


def test_a_json_array_is_numbered_by_the_line_each_object_starts_on(tmp_path):
    path = write(tmp_path / "a.json", '[\n  {\n    "text": "one"\n  },\n  {"text": "two"}, {"text": "three"}\n]\n')
    assert rows_of(path) == [(2, {"text": "one"}), (5, {"text": "two"}), (5, {"text": "three"})]


def test_a_json_array_in_one_line_is_numbered_by_row(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": "one"}, {"text": "two"}]\n')
    assert rows_of(path) == [(1, {"text": "one"}), (2, {"text": "two"})]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_arrays_and_json_lines_are_read_under_either_name(tmp_path, name):
    assert rows_of(write(tmp_path / name, '{"a": 1}\n{"a": 2}\n')) == [(1, {"a": 1}), (2, {"a": 2})]
    assert rows_of(write(tmp_path / name, '[{"a": 1},\n{"a": 2}]')) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", '{"a": "é"}\n'), ("a.json", '[{"a": "é"}]'), ("a.csv", "a\né\n")])
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
    *skipped, kept = rows_of(write(tmp_path / "a.csv", "a,b\n1\n1,2,3\n1,2\n"))
    assert [(number, type(row), str(row)) for number, row in skipped] == [(2, SkipRow, CELLS), (3, SkipRow, CELLS)]
    assert kept == (4, {"a": "1", "b": "2"})


def test_parquet_rows_are_numbered_from_one(tmp_path):
    messages = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]]
    parquet.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [(1, {"messages": messages[0]}), (2, {"messages": messages[1]})]


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', r"a\.jsonl:2: .*column 7"),
        ("a.json", '[{"a": 1},\n{"a": }]', r"a\.json:2: "),
        ("a.json", '[{"a": 1}\n{"a": 2}]', r"a\.json:1: "),
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


ROW = {"instruction": "Größe?", "output": "1 m², “ok”"}
CSV = 'instruction,output\n"Größe?","1 m², “ok”"\n'
LINES = json.dumps(ROW, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", CSV.replace(",", "\t", 1).replace('","', '"\t"').encode()),
        ("a.csv", CSV.replace('","', '", "').replace(",output", ", output").encode()),
        ("a.csv", CSV.replace(",output", ";output").replace('","', '";"').encode("utf-16")),
        ("a.csv", CSV.replace(",output", "|output").replace('","', '"|"').encode()),
        ("a.csv", CSV.replace("\n", "\r").encode()),
        ("A.NDJSON", LINES.encode()),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("a.json", f"[{LINES}]".encode("utf-16")),
    ],
)
def test_files_as_people_save_them_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [row for _, row in rows_of(tmp_path / name)] == [ROW]


def test_a_separator_in_a_quoted_column_name_is_not_the_separator(tmp_path):
    path = write(tmp_path / "a.csv", '"instruction";"output";"notes, all, of, them"\nq;a, b;c\n')
    assert rows_of(path) == [(2, {"instruction": "q", "output": "a, b", "notes, all, of, them": "c"})]


def test_the_index_that_pandas_writes_keeps_its_place_without_a_name(tmp_path):
    assert rows_of(write(tmp_path / "a.csv", ",a,\n7,b,\n")) == [(2, {"(no name)": "7", "a": "b"})]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.csv", "a,b,a\n1,2,3\n", "'a' more than once"),
        ("a.csv", "a,a ,b\n1,2,3\n", "'a' more than once"),
        ("a.jsonl", '{"a": 1}\n{"b": {"c": 1, "c": 2}}\n', "a.jsonl:2: not valid JSON (the key 'c' stands twice"),
        ("a.json", '[{"a": 1, "a": 2}]', "the key 'a' stands twice"),
    ],
)
def test_a_name_that_stands_twice_is_refused_as_one_value_would_be_lost(tmp_path, name, text, named):
    with pytest.raises(DataError) as caught:
        rows_of(write(tmp_path / name, text))
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.json", '[\n {\n  "a": 1\n  "b": 2\n }\n]\n', "a.json:3: not valid JSON (Expecting ',' delimiter at column 9)"),
        ("a.json", '[\n {"a": 1}\n\n {"b": 2}\n]\n', "a.json:2: not valid JSON (no ',' or ']' after an object)"),
        ("a.jsonl", '{"a": 1}\n{"b": 1 "c": 2}\n', "a.jsonl:2: not valid JSON (Expecting ',' delimiter at column 8)"),
    ],
)
def test_a_lost_comma_is_reported_in_the_line_that_lacks_it(tmp_path, name, text, where):
    with pytest.raises(DataError) as caught:
        rows_of(write(tmp_path / name, text))
    assert caught.value.message.endswith(f"{where}.")


@pytest.mark.parametrize("content", [b"\x1f\x8bnothing", gzip.compress(LINES.encode(), mtime=0)[:-9], b"no gz"])
def test_a_damaged_gz_file_is_refused(tmp_path, content):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        rows_of(tmp_path / "a.jsonl.gz")


def test_a_folder_and_a_pattern_are_their_files_by_name(tmp_path):
    (tmp_path / "chats" / "more").mkdir(parents=True)
    for name in ("b.jsonl", "a.csv", "more/c.json"):
        write(tmp_path / "chats" / name, CSV if name == "a.csv" else LINES)
    write(tmp_path / "chats" / "README.md", "about")
    assert [Path(source.name).name for source in open_local("chats", tmp_path)] == ["a.csv", "b.jsonl", "c.json"]
    assert [Path(source.name).name for source in open_local("chats/*.jsonl", tmp_path)] == ["b.jsonl"]
    assert [Path(source.name).name for source in open_local("chats/**/*.json", tmp_path)] == ["c.json"]
    for name in ("chats/*.tsv", "more"):
        (tmp_path / "more").mkdir(exist_ok=True)
        with pytest.raises(DataError, match="has no data file"):
            open_local(name, tmp_path)


def test_a_saved_data_set_is_read_by_its_split(tmp_path):
    datasets.Dataset.from_list([ROW]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": datasets.Dataset.from_list([ROW])}).save_to_disk(tmp_path / "several")
    for name, split in (("one", "train"), ("several", "test")):
        (source,) = open_local(name, tmp_path, split)
        assert list(source.rows()) == [(1, ROW)]
    with pytest.raises(DataError, match=r"several \(split 'train'\)"):
        open_local("several", tmp_path)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is not a file"):
        open_file("a.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"There is no data file 'xxx.*\.jsonl' in "):
        open_file("x" * 300 + ".jsonl", tmp_path)


def test_the_nulls_that_arrow_adds_are_no_values(tmp_path):
    calls = [[{"function": {"name": "f", "arguments": {"x": 1}}}], [{"function": {"name": "g", "arguments": {"y": 2}}}]]
    parquet.write_table(pa.table({"calls": calls}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [(1, {"calls": calls[0]}), (2, {"calls": calls[1]})]
