"""From files to rows on disk: splits, truncation, what is counted, what is refused, and the cache."""

import json
import os
import pickle
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pytest
from tiny import build_tokenizer, hub_template

from qlora_phi3.data import tokenize
from qlora_phi3.data.prepare import check_files, prepare_datasets, row_lengths, split_indices
from qlora_phi3.data.report import EXAMPLES, NAMED, SourceReport
from qlora_phi3.data.sources import Source, open_file
from qlora_phi3.data.template import SYSTEM_MOVED, choose_template
from qlora_phi3.errors import DataError
from qlora_phi3.recipe.schema import Data


def row(question="question", answer="answer"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def save(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path.name


@pytest.fixture
def prepare_in(tmp_path, monkeypatch):
    """`prepare_datasets` of files in `tmp_path`: keys of [data] by name; rows are held out only where a key asks for it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def prepare(*train, model="Phi-3-mini-4k-instruct", max_length=200, progress=lambda *_: None, **keys):
        tokenizer = build_tokenizer(hub_template(model))
        return prepare_datasets(
            Data(train=list(train), **keys),
            max_length=max_length,
            evaluate=bool({"eval", "eval_size", "eval_split"} & keys.keys()),
            tokenizer=tokenizer,
            template=choose_template(tokenizer),
            base_dir=tmp_path,
            progress=progress,
        )

    return prepare


def test_rows_keep_their_source_and_line(prepare_in, tmp_path):
    first = save(tmp_path / "a.jsonl", [row(), {"messages": []}, row("other")])
    second = save(tmp_path / "b.jsonl", [{"instruction": "i", "output": "o"}])
    data = prepare_in(first, second)
    assert (data.train["source"][:], data.train["source_row"][:]) == ([0, 0, 1], [1, 3, 1])
    assert (data.report.sources, data.report.formats) == (("a.jsonl", "b.jsonl"), ("messages", "alpaca"))
    assert data.evaluation is None


def test_rows_with_a_place_that_nobody_filled_are_counted(prepare_in, tmp_path):
    data = prepare_in(save(tmp_path / "a.jsonl", [row(answer="I am {{name}}."), row(answer="{x}"), row("{{ a b }}")]))
    (note,) = data.report.notes
    assert (note.rows, note.where, "{{name}}" in note.reason) == (1, ("a.jsonl:1",), True)


def test_the_report_counts_the_tokens_of_memory_mapped_rows(prepare_in, tmp_path):
    data = prepare_in(save(tmp_path / "a.jsonl", [row(answer="word " * n) for n in range(1, 9)]))
    assert str(data.train.features["input_ids"]) == "List(Value('int32'))"
    assert data.report.tokens == sum(data.train["length"])
    assert data.report.supervised_tokens == sum(data.train["supervised"])
    assert data.report.longest_row == max(data.train["length"])
    assert data.train.cache_files


def test_row_lengths_are_those_of_the_rows_in_their_order_also_of_a_selection(prepare_in, tmp_path):
    data = prepare_in(save(tmp_path / "a.jsonl", [row(answer="word " * n) for n in range(1, 41)]), eval_size=7)
    for rows in (data.train, data.evaluation, data.train.select([5, 3])):
        lengths = row_lengths(rows)
        assert (lengths.dtype, lengths.shape) == (np.int64, (len(rows),))
        assert lengths.tolist() == [len(ids) for ids in rows["input_ids"]]


def test_ids_that_are_cut_at_the_other_end_than_the_labels_are_never_trained_on(prepare_in, tmp_path, monkeypatch):
    def cut_ids_at_the_left(rows, max_length, report):
        return ((number, ids[-max_length:], labels[:max_length], 0, 1) for number, ids, labels in rows)

    monkeypatch.setattr(tokenize, "_truncate_rows", cut_ids_at_the_left)
    with pytest.raises(RuntimeError, match="neither -100 nor the id"):
        prepare_in(save(tmp_path / "a.jsonl", [row(answer=" ".join(map(str, range(50))))]), max_length=30)


def test_every_unusable_row_is_counted_with_reason_and_line(prepare_in, tmp_path):
    rows = [row(), {"messages": []}, row(answer=""), {"messages": []}, {"other": 1}, ["no object"]]
    report = prepare_in(save(tmp_path / "a.jsonl", rows)).report
    assert (report.rows_read, report.rows_kept) == (6, 1)
    assert [(count.rows, count.where) for count in report.skipped] == [
        (2, ("a.jsonl:2", "a.jsonl:4")),
        (1, ("a.jsonl:3",)),
        (1, ("a.jsonl:5",)),
        (1, ("a.jsonl:6",)),
    ]
    assert report.warning_lines()[0] == f"2 rows skipped: {report.skipped[0].reason} (a.jsonl:2, a.jsonl:4)"
    json.dumps(asdict(report))


def test_the_counts_of_a_hundred_thousand_unusable_rows_name_only_the_first_few():
    source = Source("a.jsonl", "", lambda: ((number, {"messages": []}) for number in range(1, 100_001)))
    report = SourceReport(source.name)
    assert not list(tokenize.read_examples(source, Data(train="a.jsonl"), report))
    for number in range(1, 100_001):
        report.add(report.notes, "noted", number)
        report.fully_truncated = report.fully_truncated.plus(1, [f"{report.name}:{number}"], named=NAMED)
    (skipped,), (noted,) = report.skipped.values(), report.notes.values()
    assert [count.rows for count in (skipped, noted, report.fully_truncated)] == [100_000] * 3
    assert [len(count.where) for count in (skipped, noted, report.fully_truncated)] == [NAMED, EXAMPLES, NAMED]
    assert (noted.where[0], report.fully_truncated.where[-1]) == ("a.jsonl:1", f"a.jsonl:{NAMED}")
    assert len(pickle.dumps(report)) < 50_000


def test_long_rows_are_cut_at_the_right_and_named_where_nothing_is_left(prepare_in, tmp_path):
    rows = [row(), row(answer="long " * 50), row(question="long " * 50)]
    data = prepare_in(save(tmp_path / "a.jsonl", rows), max_length=30)
    assert data.train["source_row"][:] == [1, 2]
    assert data.train["length"][1] == 30
    assert data.report.truncated == 1
    assert (data.report.fully_truncated.rows, data.report.fully_truncated.where) == (1, ("a.jsonl:3",))
    assert [line.split()[0] for line in data.report.warning_lines()] == ["1", "1"]


@pytest.mark.parametrize(
    ("foreign", "hint"),
    [
        ({"question": "q", "answer": "a"}, 'fields = { instruction = "question", output = "answer" }'),
        ({"Prompt": "q", "response": "a"}, 'fields = { instruction = "Prompt", output = "response" }'),
        ({"prompt": "q", "response": "a"}, 'fields = { completion = "response" }'),
        ({"input": "q", "output": "a"}, 'fields = { instruction = "input" }'),
        ({"question": "q", "context": "c", "answer": "a"}, 'output = "answer", input = "context" }'),
        ({"dialog": row()["messages"]}, 'fields = { messages = "dialog" }'),
    ],
)
def test_the_hint_for_foreign_columns_gives_lines_that_make_them_readable(prepare_in, tmp_path, foreign, hint):
    name = save(tmp_path / "a.jsonl", [foreign])
    with pytest.raises(DataError) as caught:
        prepare_in(name)
    assert hint in caught.value.hint
    line = caught.value.hint.removeprefix("Write below [data]: ").replace(" and, on a line of its own, ", "\n")
    assert prepare_in(name, **tomllib.loads(line)).report.rows_kept == 1


@pytest.mark.parametrize(("name", "text"), [("a.json", "[]"), ("a.csv", "instruction,output\n")])
def test_a_file_without_rows_is_an_error_with_its_name(prepare_in, tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    for evaluate in (True, False):
        with pytest.raises(DataError, match=f"{name} holds no rows"):
            check_files(Data(train=name), tmp_path, evaluate=evaluate)
    with pytest.raises(DataError, match=f"{name} holds no rows"):
        prepare_in(name)


def test_files_are_checked_up_to_the_first_usable_row_and_those_to_measure_on_where_there_is_an_evaluation(tmp_path):
    good, bad = save(tmp_path / "a.jsonl", [{"messages": []}, row()]), save(tmp_path / "b.jsonl", [{"messages": []}])
    data = Data(train=[good, "someone/chats"], eval=bad)
    check_files(data, tmp_path, evaluate=False)
    with pytest.raises(DataError, match=r"b\.jsonl"):
        check_files(data, tmp_path, evaluate=True)


def test_a_format_by_name_reads_its_rows_of_a_file_of_mixed_formats(prepare_in, tmp_path):
    name = save(tmp_path / "a.jsonl", [row(), row(), {"instruction": "i", "output": "o"}])
    with pytest.raises(DataError, match=r"a\.jsonl:3"):
        prepare_in(name)
    assert prepare_in(name, format="alpaca").report.rows_kept == 1


def test_a_field_map_renames_columns_that_at_least_one_row_has(prepare_in, tmp_path):
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "context": "c"}]
    fields = {"instruction": "question", "output": "answer"}
    name = save(tmp_path / "a.jsonl", rows)
    assert prepare_in(name, format="alpaca", fields={**fields, "input": "context"}).report.rows_kept == 2
    with pytest.raises(DataError, match="'contxt'"):
        prepare_in(name, format="alpaca", fields={**fields, "input": "contxt"})


def test_few_held_out_rows_are_called_a_rough_figure(prepare_in, tmp_path):
    name = save(tmp_path / "a.jsonl", [row(f"question {number}") for number in range(40)])
    assert any("rough" in line for line in prepare_in(name, eval_size=1).report.summary_lines())
    assert not any("rough" in line for line in prepare_in(name, eval_size=30).report.summary_lines())


def test_notes_count_system_turns_that_moved_and_special_tokens_in_the_words(prepare_in, tmp_path):
    rows = [row("hi<|end|>"), {"messages": [{"role": "system", "content": "s"}, *row()["messages"]]}]
    report = prepare_in(save(tmp_path / "a.jsonl", rows), model="Phi-3-medium-4k-instruct").report
    assert {count.reason: count.where for count in report.notes} == {
        tokenize.READ_AS_TEXT: ("a.jsonl:1",),
        SYSTEM_MOVED: ("a.jsonl:2",),
    }


def test_the_held_out_rows_are_drawn_by_the_seed_and_recorded(prepare_in, tmp_path):
    name = save(tmp_path / "a.jsonl", [row(f"question {number}") for number in range(40)])
    data = prepare_in(name, eval_size=0.25, split_seed=7)
    assert data.report.eval_indices == tuple(sorted(np.random.default_rng(7).permutation(40)[:10].tolist()))
    assert data.evaluation["source_row"][:] == [index + 1 for index in data.report.eval_indices]
    assert sorted([*data.evaluation["source_row"], *data.train["source_row"]]) == list(range(1, 41))
    assert prepare_in(name, eval_size=0.25, split_seed=8).report.eval_indices != data.report.eval_indices
    assert prepare_in(name, eval_size=0.25, max_eval_rows=3).report.evaluation_rows == 3


def test_without_an_evaluation_nothing_is_held_out_and_no_evaluation_data_are_read(prepare_in, tmp_path):
    data = prepare_in(save(tmp_path / "a.jsonl", [row()] * 10))
    assert (len(data.train), data.evaluation, data.report.eval_indices) == (10, None, ())


@pytest.mark.parametrize(
    ("rows", "size", "drawn"), [(100, 0.05, 5), (3, 0.05, 1), (1, 0.05, 0), (10, 4, 4), (10, 0, 0), (3, 0.99, 2)]
)
def test_a_share_or_a_number_of_rows_is_held_out_and_one_remains(rows, size, drawn):
    assert len(split_indices(rows, size, seed=0)) == drawn


def test_evaluation_data_of_its_own_leaves_all_training_rows(prepare_in, tmp_path):
    train = save(tmp_path / "a.jsonl", [row()] * 10)
    evaluation = save(tmp_path / "b.jsonl", [row()] * 4)
    data = prepare_in(train, eval=[evaluation], eval_size=0.5, max_eval_rows=3)
    assert (len(data.train), len(data.evaluation), data.report.eval_indices) == (10, 3, ())
    assert data.evaluation["source"][:] == [1, 1, 1]


def test_max_rows_stops_the_reading_over_all_sources(prepare_in, tmp_path):
    names = [save(tmp_path / f"{name}.jsonl", [{"messages": []}, *[row()] * 300]) for name in "abc"]
    data = prepare_in(*names, max_rows=450)
    assert (len(data.train), data.report.rows_read) == (450, 452)


def test_the_same_data_a_second_time_are_read_from_the_cache_with_the_same_report(prepare_in, tmp_path, monkeypatch):
    name = save(tmp_path / "a.jsonl", [row(), {"messages": []}])
    first = prepare_in(name)
    monkeypatch.setattr(tokenize, "_write_rows", lambda *_: pytest.fail("built again"))
    second = prepare_in(name)
    assert second.report == first.report
    assert second.train[:] == first.train[:]


@pytest.mark.parametrize("max_length", [4, 12, 30, 200])
def test_rows_that_are_in_the_cache_uncut_are_cut_without_the_tokenizer_to_the_same_rows(
    prepare_in, tmp_path, monkeypatch, max_length
):
    rows = [{"messages": []}, *[row("ask " * (n % 3), "word " * n) for n in range(1, 41)], row("long " * 60)]
    first, second = save(tmp_path / "a.jsonl", rows), save(tmp_path / "b.jsonl", rows)
    try:
        expected = prepare_in(second, max_length=max_length)
    except DataError as error:
        expected = error
    prepare_in(first, max_length=tokenize.UNCUT)
    monkeypatch.setattr(tokenize, "tokenize_rows", lambda *_: pytest.fail("tokenized again"))
    if isinstance(expected, DataError):
        with pytest.raises(DataError, match=r"Raise \[training\] max_length"):
            prepare_in(first, max_length=max_length)
        return
    found = prepare_in(first, max_length=max_length)
    assert found.train[:] == expected.train[:]
    assert found.left_out == {name.replace("b.jsonl", "a.jsonl"): reason for name, reason in expected.left_out.items()}
    assert (found.report.truncated, found.report.rows_kept) == (expected.report.truncated, expected.report.rows_kept)
    assert found.report.fully_truncated.rows == expected.report.fully_truncated.rows


def entries_of(tmp_path):
    return [path for path in (tmp_path / "cache" / "qlora-phi3").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 100},
        {"loss_on": "all"},
        {"max_rows": 1},
        {"model": "Phi-3.5-mini-instruct"},
        {"format": "messages"},
    ],
)
def test_another_setting_is_another_cache_entry(prepare_in, tmp_path, change):
    name = save(tmp_path / "a.jsonl", [row()])
    prepare_in(name)
    prepare_in(name, **change)
    assert len(entries_of(tmp_path)) == 2


def test_changed_content_is_another_cache_entry_and_another_digest(prepare_in, tmp_path):
    first = prepare_in(save(tmp_path / "a.jsonl", [row()])).report.sha256
    assert prepare_in(save(tmp_path / "a.jsonl", [row("other")])).report.sha256 != first
    assert len(entries_of(tmp_path)) == 2


def cut(path: Path, size: int) -> None:
    content = path.read_bytes()
    path.unlink()  # the rows of the file before may still be mapped
    path.write_bytes(content[:size])


def keep_one_batch(path: Path) -> None:
    """Leave a valid Arrow stream with the first batch only."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_stream(file)
        schema, batch = reader.schema, reader.read_next_batch()
    path.unlink()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(batch)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda entry: (entry / "rows.arrow").unlink(), id="rows deleted"),
        pytest.param(lambda entry: cut(entry / "rows.arrow", 0), id="rows empty"),
        pytest.param(lambda entry: cut(entry / "rows.arrow", 100), id="rows cut in the schema"),
        pytest.param(lambda entry: cut(entry / "rows.arrow", 5000), id="rows cut in a batch"),
        pytest.param(lambda entry: keep_one_batch(entry / "rows.arrow"), id="rows cut between batches"),
        pytest.param(lambda entry: (entry / "report.json").unlink(), id="report deleted"),
        pytest.param(lambda entry: cut(entry / "report.json", 40), id="report cut"),
        pytest.param(lambda entry: (entry / "report.json").write_text('{"name": 1}'), id="report of another shape"),
        pytest.param(lambda entry: (entry / "report.json").write_bytes(b"\xff\x00"), id="report not text"),
    ],
)
def test_a_cache_entry_that_is_incomplete_or_damaged_is_built_again(prepare_in, tmp_path, damage):
    name = save(tmp_path / "a.jsonl", [row()] * 300)
    first = prepare_in(name)
    rows = first.train[:]
    (entry,) = entries_of(tmp_path)
    damage(entry)
    again = prepare_in(name)
    assert (again.train[:], again.report) == (rows, first.report)
    assert sorted(path.name for path in entry.iterdir()) == ["report.json", "rows.arrow"]


def test_builders_of_one_cache_entry_at_the_same_time_all_succeed_and_one_of_them_writes(tmp_path, monkeypatch):
    source = open_file(save(tmp_path / "a.jsonl", [{"text": "some words"}] * 300), tmp_path)
    tokenizer = build_tokenizer(hub_template("Phi-3-mini-4k-instruct"))
    template = choose_template(tokenizer)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = tokenize.TokenizeConfig(Data(train="a.jsonl"), 20, template, tokenizer, lambda *_: None)
    writes, write_rows = [], tokenize._write_rows
    monkeypatch.setattr(tokenize, "_write_rows", lambda *args: writes.append(1) or write_rows(*args))
    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: tokenize.tokenize_source(source, config, None), range(4)))
        assert [len(rows) for rows, _ in results] == [300] * 4
        (entry,) = entries_of(tmp_path)
        cut(entry / "rows.arrow", 5000)
    assert len(writes) == 2


TOKENIZE_ROWS = tokenize.tokenize_rows


def interrupt_after(monkeypatch, batches):
    """Ctrl-C while that many batches are tokenized; returns the numbers of the rows that were tokenized before it."""
    tokenized, tokenize_rows = [], TOKENIZE_ROWS

    def work(rendered, *arguments):
        if len(tokenized) == batches:
            raise KeyboardInterrupt
        tokenized.append([row.number for row in rendered])
        return tokenize_rows(rendered, *arguments)

    monkeypatch.setattr(tokenize, "tokenize_rows", work)
    monkeypatch.setattr(tokenize, "THREADS", 1)  # else one thread counts while another does
    return tokenized


@pytest.mark.parametrize("damage", [None, "state.json", "rows.arrow"])
def test_an_interrupted_preparation_goes_on_where_it_was_saved(prepare_in, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(tokenize, "PART_ROWS", 2 * tokenize.BATCH_ROWS)
    rows = [{"messages": []} if n % 50 == 7 else {"mine": row(f"ask {n}")["messages"], "more": n} for n in range(2000)]
    name, same = save(tmp_path / "a.jsonl", rows), save(tmp_path / "b.jsonl", rows)
    options = {"fields": {"messages": "mine"}, "format": "messages", "ignore_columns": ["more"]}
    expected = prepare_in(same, **options)
    for batches in (5, 3):  # the second session ends in its second part
        before = interrupt_after(monkeypatch, batches)
        with pytest.raises(KeyboardInterrupt):
            prepare_in(name, **options)
    assert before[0][0] == expected.train["source_row"][4 * 256]  # four batches of the first session were saved
    (partial,) = (path for path in entries_of(tmp_path) if path.suffix == ".partial")
    if damage:
        cut(partial / damage, 100)
    last = interrupt_after(monkeypatch, 99)
    found = prepare_in(name, **options)
    assert len(last) == (8 if damage else 2)
    assert found.train[:] == expected.train[:]
    assert str(found.report).replace("a.jsonl", "b.jsonl") == str(expected.report)
    first, second = entries_of(tmp_path)
    assert (first / "rows.arrow").read_bytes() == (second / "rows.arrow").read_bytes()
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir()) == [
        "report.json", "rows.arrow",
    ]  # fmt: skip


def test_batches_are_tokenized_in_threads_as_in_one_without_the_tokenizers_own_padding(prepare_in, tmp_path, monkeypatch):
    build_plain = build_tokenizer

    def build(template):
        tokenizer = build_plain(template)
        tokenizer.backend_tokenizer.enable_padding(length=64)
        tokenizer.backend_tokenizer.enable_truncation(8)
        return tokenizer

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    rows = [row(f"ask {n} " * (n % 7 + 1)) for n in range(3000)]
    monkeypatch.setattr(tokenize, "THREADS", 1)
    expected = prepare_in(save(tmp_path / "a.jsonl", rows))
    monkeypatch.setattr(tokenize, "THREADS", 4)
    monkeypatch.setattr(sys.modules[__name__], "build_tokenizer", build)
    assert prepare_in(save(tmp_path / "b.jsonl", rows)).train[:] == expected.train[:]
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_a_failed_reading_leaves_no_entry_in_the_cache(prepare_in, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row()) + "\n{", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        prepare_in("a.jsonl")
    assert entries_of(tmp_path) == []


def test_every_token_of_raw_text_but_the_first_is_supervised(prepare_in, tmp_path):
    data = prepare_in(save(tmp_path / "a.jsonl", [{"text": "some words"}]))
    assert data.train["supervised"][0] == data.train["length"][0] - 1


def test_progress_is_called_with_the_rows_read(prepare_in, tmp_path):
    calls = []
    prepare_in(save(tmp_path / "a.jsonl", [row()] * 300), progress=lambda *what: calls.append(what))
    assert calls == [("Reading a.jsonl", 256, None), ("Reading a.jsonl", 300, None), ("Reading a.jsonl", 300, 300)]


def test_a_data_set_of_the_hub_is_read_and_its_evaluation_split_measured_on(prepare_in, monkeypatch):
    loaded = []

    def load(name, subset, *, split, revision):
        loaded.append((name, subset, split, revision))
        return datasets.Dataset.from_list([row(split)] * (3 if split == "train_sft" else 2))

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = prepare_in("someone/chats", split="train_sft", eval_split="test_sft", subset="en", revision="abc")
    assert loaded == [("someone/chats", "en", "train_sft", "abc"), ("someone/chats", "en", "test_sft", "abc")]
    assert (len(data.train), len(data.evaluation)) == (3, 2)
    assert data.report.sources == ("someone/chats[train_sft]", "someone/chats[test_sft]")


def test_the_package_is_imported_without_heavy_libraries():
    heavy = ("torch", "transformers", "datasets", "pyarrow")
    code = f"import sys, qlora_phi3.data.prepare; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_columns_that_were_not_read_are_named_in_one_line(prepare_in, tmp_path):
    rows = [{**row(), "topic": "x"}, {**row(), "topic": "y", "id": 7}, row()]
    report = prepare_in(save(tmp_path / "a.jsonl", rows)).report
    assert report.warning_lines()[-1] == "Columns not read: topic (2 rows), id (1 row)"
    assert not prepare_in("a.jsonl", ignore_columns=["topic", "id"]).report.unread


def test_an_ignored_column_is_not_read_and_no_preference(prepare_in, tmp_path):
    name = save(tmp_path / "a.jsonl", [{**row(), "label": True, "system": "s"}])
    with pytest.raises(DataError, match="'label'"):
        prepare_in(name)
    with_system = prepare_in(name, ignore_columns=["label"]).report.tokens
    assert prepare_in(name, ignore_columns=["label", "system"]).report.tokens < with_system


def test_fields_hide_no_column_and_read_none_twice(prepare_in, tmp_path):
    name = save(tmp_path / "a.jsonl", [{"input": "q", "output": "a", "instruction": "other"}])
    data = prepare_in(name, format="alpaca", fields={"instruction": "input"})
    assert data.report.tokens == prepare_in(save(tmp_path / "b.jsonl", [row("q", "a")])).report.tokens
    assert [count.reason for count in data.report.unread] == ["instruction (hidden by fields)"]


def test_held_out_rows_that_are_training_rows_are_counted(prepare_in, tmp_path):
    save(tmp_path / "b.jsonl", [row(answer="1"), row(answer="new")])
    report = prepare_in(save(tmp_path / "a.jsonl", [row(answer=str(n)) for n in range(5)]), eval="b.jsonl").report
    assert report.repeated == 1
    assert "1 of 2 held-out rows are training rows too: the held-out loss is too good by them" in report.warning_lines()


def test_training_rows_that_repeat_an_earlier_one_are_counted(prepare_in, tmp_path):
    save(tmp_path / "b.jsonl", [row(answer="new"), row(answer="1")])
    report = prepare_in(save(tmp_path / "a.jsonl", [row(answer=answer) for answer in "0121"]), "b.jsonl").report
    assert report.warning_lines() == ["2 rows, the same tokens as an earlier row (a.jsonl:4, b.jsonl:2)"]


@pytest.mark.parametrize(
    ("systems", "common"), [(["Be brief."] * 3, "Be brief."), (["Be brief.", "", "Be brief."], ""), (["a", "b"], "")]
)
def test_the_system_turn_that_all_rows_have_is_recorded(prepare_in, tmp_path, systems, common):
    rows = [row(answer=str(number)) | ({"system": text} if text else {}) for number, text in enumerate(systems)]
    for _ in range(2):  # read, and from the cache
        assert prepare_in(save(tmp_path / "a.jsonl", rows)).report.system == common


def test_a_switched_off_turn_is_not_learned_where_every_token_is(prepare_in, tmp_path):
    messages = row()["messages"]
    rows = [row(), {"messages": [*messages, {**messages[1], "train": False}]}]
    report = prepare_in(save(tmp_path / "a.jsonl", rows), loss_on="all").report
    assert (report.rows_kept, [count.where for count in report.skipped]) == (1, [("a.jsonl:2",)])


def test_unicode_white_space_after_a_special_token_is_counted(prepare_in, tmp_path):
    report = prepare_in(save(tmp_path / "a.jsonl", [row("\u3000q"), row("q\u3000")])).report
    assert [(count.reason, count.where) for count in report.notes] == [(tokenize.UNICODE_SPACE, ("a.jsonl:1",))]


@pytest.mark.parametrize("column", ["label", "role", "answer", "summary", "Category"])
def test_text_beside_a_column_that_says_what_it_is_is_no_document(prepare_in, tmp_path, column):
    name = save(tmp_path / "a.jsonl", [{"text": "words", column: "x"}])
    with pytest.raises(DataError, match="'text' beside"):
        prepare_in(name)
    assert prepare_in(name, format="text").report.unread[0].reason == column
    assert prepare_in(save(tmp_path / "b.jsonl", [{"text": "words", "url": "x"}])).report.rows_kept == 1


def test_one_flipped_bit_in_the_cached_rows_makes_them_again(prepare_in, tmp_path):
    name = save(tmp_path / "a.jsonl", [row(answer=str(n)) for n in range(50)])
    before = prepare_in(name).train["input_ids"][:]
    (entry,) = (tmp_path / "cache" / "qlora-phi3").glob("*/rows.arrow")
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    assert prepare_in(name).train["input_ids"][:] == before


def test_objects_that_are_nested_too_deep_are_counted(prepare_in, tmp_path, monkeypatch):
    read_row = tokenize.read_row

    def recursing(row, *arguments):
        return read_row(row, *arguments) if "deep" not in row else recursing(row, *arguments)

    monkeypatch.setattr(tokenize, "read_row", recursing)
    report = prepare_in(save(tmp_path / "a.jsonl", [row(), {**row(), "deep": 1}])).report
    assert [(count.reason, count.where) for count in report.skipped] == [("its objects are nested too deep", ("a.jsonl:2",))]


def test_ignored_keys_stay_in_tool_calls_and_definitions(prepare_in, tmp_path):
    call = {"name": "f", "arguments": {"id": 7}}
    messages = [row()["messages"][0], {"role": "assistant", "content": "", "tool_calls": [call], "id": "x"}]
    rows = [{"messages": messages, "tools": [{"name": "f", "parameters": {"properties": {"id": {}}}}], "id": 1}]
    assert (
        prepare_in(save(tmp_path / "a.jsonl", rows)).report.tokens == prepare_in("a.jsonl", ignore_columns=["id"]).report.tokens
    )


def test_a_folder_with_files_of_other_types_is_refused_by_their_names(prepare_in, tmp_path):
    (tmp_path / "chats").mkdir()
    for name in ("a.jsonl", ".hidden.jsonl", "README.md", "dataset_info.json"):
        save(tmp_path / "chats" / name, [row()])
    assert prepare_in("chats").report.rows_kept == 1
    (tmp_path / "chats" / "b.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"chats has b\.xlsx of a type"):
        prepare_in("chats")
    assert prepare_in("chats/*.jsonl").report.rows_kept == 1


def test_a_name_that_controls_a_terminal_or_is_no_unicode_is_shown_escaped(prepare_in, tmp_path):
    report = prepare_in(save(tmp_path / "a.jsonl", [{**row(), "\x1b[31mred\nline": 1, "\ud800": 2}])).report
    assert report.warning_lines() == [r"Columns not read: \x1b[31mred line (1 row), ? (1 row)"]


def test_a_suggestion_that_was_followed_is_not_made_again(prepare_in, tmp_path):
    name = save(tmp_path / "a.jsonl", [{"question": "q", "answer": 0}])
    with pytest.raises(DataError, match="fit no format") as caught:
        prepare_in(name)
    assert 'format = "alpaca"' in caught.value.hint
    with pytest.raises(DataError, match="'output' is a number") as caught:
        prepare_in(name, format="alpaca", fields={"instruction": "question", "output": "answer"})
    assert 'format = "alpaca"' not in caught.value.hint


def test_pictures_of_a_saved_data_set_are_not_decoded(prepare_in, tmp_path):
    image = {"bytes": b"x", "path": "x.png"}
    rows = {"instruction": ["q", "q"], "output": ["a", "b"], "image": [None, image]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    report = prepare_in("saved").report
    assert (report.rows_kept, [count.reason for count in report.skipped]) == (
        1,
        ["its 'image' cannot be read by a text model"],
    )
