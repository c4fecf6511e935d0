"""From files to rows on disk: splits, truncation, what is counted, what is refused, what a second run reads."""

import json
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pytest
from tiny import build_tokenizer, hub_template

from qlora_phi3.data import tokenize as tokenized
from qlora_phi3.data.prepare import prepare_datasets, split_indices
from qlora_phi3.data.template import choose_template
from qlora_phi3.data.tokenize import SYSTEM_MOVED
from qlora_phi3.errors import DataError


def row(question="question", answer="answer"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def save(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path.name


@pytest.fixture
def prepare_in(tmp_path):
    def run(*train, model="Phi-3-mini-4k-instruct", **settings):
        tokenizer = build_tokenizer(hub_template(model))
        settings = {
            "max_length": 200,
            "eval_size": 0,
            "base_folder": tmp_path,
            "cache_folder": tmp_path / "cache",
        } | settings
        return prepare_datasets(train=train, tokenizer=tokenizer, template=choose_template(tokenizer), **settings)

    return run


def test_rows_keep_their_source_and_line(prepare_in, tmp_path):
    first = save(tmp_path / "a.jsonl", [row(), {"messages": []}, row("other")])
    second = save(tmp_path / "b.jsonl", [{"instruction": "i", "output": "o"}])
    data = prepare_in(first, second)
    assert (data.train["source"][:], data.train["source_row"][:]) == ([0, 0, 1], [1, 3, 1])
    assert (data.report.sources, data.report.formats) == (("a.jsonl", "b.jsonl"), ("messages", "alpaca"))
    assert data.evaluation is None


def test_columns_agree_with_each_other(prepare_in, tmp_path):
    data = prepare_in(save(tmp_path / "a.jsonl", [row(answer="word " * n) for n in range(1, 9)]))
    assert str(data.train.features["input_ids"]) == "List(Value('int32'))"
    for one in data.train:
        labels = np.array(one["labels"])
        assert one["length"] == len(one["input_ids"]) == len(labels)
        assert one["supervised"] == (labels != -100).sum() > 0
    assert data.report.tokens == sum(data.train["length"])
    assert data.report.supervised_tokens == sum(data.train["supervised"])
    assert data.report.longest_row == max(data.train["length"])
    assert data.train.cache_files


def test_every_unusable_row_is_counted_with_reason_and_line(prepare_in, tmp_path):
    rows = [row(), {"messages": []}, row(answer=""), {"messages": []}, {"other": 1}, ["no object"]]
    report = prepare_in(save(tmp_path / "a.jsonl", rows)).report
    assert (report.rows_read, report.rows_kept) == (6, 1)
    assert [(count.reason, count.rows, count.where) for count in report.skipped] == [
        ("the conversation is empty", 2, ("a.jsonl:2", "a.jsonl:4")),
        ("an assistant turn is empty", 1, ("a.jsonl:3",)),
        ("its columns (other) fit no format", 1, ("a.jsonl:5",)),
        ("the row is no object with columns", 1, ("a.jsonl:6",)),
    ]
    assert report.warning_lines()[0] == "2 rows skipped: the conversation is empty (a.jsonl:2, a.jsonl:4)"
    json.dumps(asdict(report))


def test_long_rows_are_cut_at_the_right_and_named_where_nothing_is_left(prepare_in, tmp_path):
    rows = [row(), row(answer="long " * 50), row(question="long " * 50)]
    data = prepare_in(save(tmp_path / "a.jsonl", rows), max_length=30)
    assert data.train["source_row"][:] == [1, 2]
    assert data.train["length"][1] == 30
    assert data.report.truncated == 1
    assert (data.report.fully_truncated.rows, data.report.fully_truncated.where) == (1, ("a.jsonl:3",))
    assert data.report.warning_lines() == [
        "1 of 2 rows cut at max_length = 30",
        "1 row dropped, nothing left to learn after truncation (a.jsonl:3)",
    ]


def test_data_with_nothing_to_learn_is_refused_with_the_reasons(prepare_in, tmp_path):
    name = save(tmp_path / "a.jsonl", [row(question="long " * 50)] * 3 + [{"messages": []}])
    with pytest.raises(
        DataError,
        match=r"None of the 4 rows of a.jsonl .*3 x nothing left.*a.jsonl:1.*1 x the conv.*max_length, now 30",
    ):
        prepare_in(name, max_length=30)
    name = save(tmp_path / "b.jsonl", [{"left": "q", "right": "a"}])
    with pytest.raises(
        DataError, match=r"its columns \(left, right\) fit no format.*The formats are messages, sharegpt"
    ):
        prepare_in(name)
    (tmp_path / "c.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"c\.json holds no rows"):
        prepare_in("c.json")


@pytest.mark.parametrize(
    ("foreign", "hint"),
    [
        (
            {"question": "q", "answer": "a"},
            'Write below [data]: format = "alpaca" and, on a line of its own, '
            'fields = { instruction = "question", output = "answer" }',
        ),
        ({"Prompt": "q", "response": "a"}, 'fields = { instruction = "Prompt", output = "response" }'),
        (
            {"prompt": "q", "response": "a"},
            'format = "prompt_completion" and, on a line of its own, fields = { completion =',
        ),
        (
            {"input": "q", "output": "a"},
            'format = "alpaca" and, on a line of its own, fields = { instruction = "input" }',
        ),
        ({"question": "q", "context": "c", "answer": "a"}, 'output = "answer", input = "context" }'),
        (
            {"dialog": row()["messages"]},
            'format = "messages" and, on a line of its own, fields = { messages = "dialog" }',
        ),
    ],
)
def test_foreign_columns_are_answered_with_lines_that_make_them_readable(prepare_in, tmp_path, foreign, hint):
    name = save(tmp_path / "a.jsonl", [foreign])
    with pytest.raises(DataError, match="can be trained on") as caught:
        prepare_in(name)
    assert hint in str(caught.value)
    line = caught.value.hint.removeprefix("Write below [data]: ").replace(" and, on a line of its own, ", "\n")
    assert prepare_in(name, **tomllib.loads(line)).report.rows_kept == 1


def test_rows_inside_of_one_object_are_named(prepare_in, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": [{"left": "q"}] * 3}), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"None of the 1 row of .* Its rows lie in the list 'data': save that list alone\."
    ):
        prepare_in("a.json")


def test_rows_of_mixed_shape_are_refused_with_both_lines(prepare_in, tmp_path):
    name = save(tmp_path / "a.jsonl", [row(), row(), {"instruction": "i", "output": "o"}])
    with pytest.raises(DataError, match=r"a\.jsonl:3 is of format 'alpaca', while a\.jsonl:1 is of format 'messages'"):
        prepare_in(name)
    assert prepare_in(name, format="alpaca").report.rows_kept == 1


def test_a_field_map_renames_columns(prepare_in, tmp_path):
    name = save(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    data = prepare_in(name, format="alpaca", fields={"instruction": "question", "output": "answer"})
    assert data.report.rows_kept == 1


def test_a_field_map_to_a_column_that_no_row_has_is_refused_with_the_columns_there_are(prepare_in, tmp_path):
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "context": "c"}]
    fields = {"instruction": "question", "output": "answer"}
    name = save(tmp_path / "a.jsonl", rows)
    assert prepare_in(name, format="alpaca", fields={**fields, "input": "context"}).report.rows_kept == 2
    with pytest.raises(
        DataError,
        match=r"'contxt', which is a column of none of the 2 rows of a\.jsonl\. .*: answer, context, question\.",
    ):
        prepare_in(name, format="alpaca", fields={**fields, "input": "contxt"})


def test_few_held_out_rows_are_called_a_rough_figure(prepare_in, tmp_path):
    name = save(tmp_path / "a.jsonl", [row(f"question {number}") for number in range(40)])
    assert "Held-out loss: from 1 row only, so a rough figure" in prepare_in(name, eval_size=1).report.summary_lines()
    assert not any("rough" in line for line in prepare_in(name, eval_size=30).report.summary_lines())


def test_notes_count_system_turns_that_moved_and_special_tokens_in_the_words(prepare_in, tmp_path):
    rows = [row("hi<|end|>"), {"messages": [{"role": "system", "content": "s"}, *row()["messages"]]}]
    report = prepare_in(save(tmp_path / "a.jsonl", rows), model="Phi-3-medium-4k-instruct").report
    assert {count.reason: count.where for count in report.notes} == {
        tokenized.INJECTION: ("a.jsonl:1",),
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


@pytest.mark.parametrize(
    ("rows", "size", "drawn"), [(100, 0.05, 5), (3, 0.05, 1), (1, 0.05, 0), (10, 4, 4), (10, 0, 0), (3, 0.99, 2)]
)
def test_a_share_or_a_number_of_rows_is_held_out_and_one_remains(rows, size, drawn):
    assert len(split_indices(rows, size, seed=0)) == drawn


def test_holding_out_every_row_is_refused():
    with pytest.raises(DataError, match="eval_size = 10 holds out 10 of 10 usable rows"):
        split_indices(10, 10, seed=0)


def test_evaluation_data_of_its_own_leaves_the_training_rows_whole(prepare_in, tmp_path):
    train = save(tmp_path / "a.jsonl", [row()] * 10)
    evaluation = save(tmp_path / "b.jsonl", [row()] * 4)
    data = prepare_in(train, evaluation=[evaluation], eval_size=0.5, max_eval_rows=3)
    assert (len(data.train), len(data.evaluation), data.report.eval_indices) == (10, 3, ())
    assert data.evaluation["source"][:] == [1, 1, 1]


def test_max_rows_stops_the_reading_over_all_sources(prepare_in, tmp_path):
    names = [save(tmp_path / f"{name}.jsonl", [{"messages": []}, *[row()] * 300]) for name in "abc"]
    data = prepare_in(*names, max_rows=450)
    assert (len(data.train), data.report.rows_read) == (450, 452)


def test_the_same_data_a_second_time_is_read_from_disk_with_the_same_report(prepare_in, tmp_path, monkeypatch):
    name = save(tmp_path / "a.jsonl", [row(), {"messages": []}])
    first = prepare_in(name)
    monkeypatch.setattr(tokenized, "_build", lambda *_: pytest.fail("built again"))
    second = prepare_in(name)
    assert second.report == first.report
    assert second.train[:] == first.train[:]


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
def test_another_setting_is_another_cache(prepare_in, tmp_path, change):
    name = save(tmp_path / "a.jsonl", [row()])
    prepare_in(name)
    prepare_in(name, **change)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_changed_content_is_another_cache_and_another_digest(prepare_in, tmp_path):
    first = prepare_in(save(tmp_path / "a.jsonl", [row()])).report.sha256
    assert prepare_in(save(tmp_path / "a.jsonl", [row("other")])).report.sha256 != first


def test_a_failed_reading_leaves_nothing_in_the_cache(prepare_in, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row()) + "\n{", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
        prepare_in("a.jsonl")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_one_clear_line(prepare_in, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenized, "_write_rows", full)
    with pytest.raises(DataError, match=r"cannot be written to .*No space left on device\. Make room"):
        prepare_in(save(tmp_path / "a.jsonl", [row()]))


def test_raw_text_is_learned_whole(prepare_in, tmp_path):
    data = prepare_in(save(tmp_path / "a.jsonl", [{"text": "some words"}]))
    assert data.train["supervised"][0] == data.train["length"][0] - 1


def test_progress_is_told_of_the_rows_read(prepare_in, tmp_path):
    told = []
    prepare_in(save(tmp_path / "a.jsonl", [row()] * 300), progress=lambda *what: told.append(what))
    assert told == [("Reading a.jsonl", 256, None), ("Reading a.jsonl", 300, None), ("Reading a.jsonl", 300, 300)]


def test_a_data_set_of_the_hub_that_cannot_be_reached_is_one_clear_line(prepare_in, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'someone/chats' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"'someone/chats' \(split 'train'\) cannot be loaded: Couldn't reach .*Hub\. Check the id"
    ):
        prepare_in("someone/chats")


def test_a_data_set_of_the_hub_is_read_and_its_evaluation_split_measured_on(prepare_in, monkeypatch):
    asked = []

    def load(name, subset, *, split, revision):
        asked.append((name, subset, split, revision))
        return datasets.Dataset.from_list([row(split)] * (3 if split == "train_sft" else 2))

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = prepare_in("someone/chats", split="train_sft", eval_split="test_sft", subset="en", revision="abc")
    assert asked == [("someone/chats", "en", "train_sft", "abc"), ("someone/chats", "en", "test_sft", "abc")]
    assert (len(data.train), len(data.evaluation)) == (3, 2)
    assert data.report.sources == ("someone/chats[train_sft]", "someone/chats[test_sft]")


def test_the_room_starts_without_heavy_libraries():
    heavy = ("torch", "transformers", "datasets", "pyarrow", "pydantic")
    code = f"import sys, qlora_phi3.data.prepare; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
