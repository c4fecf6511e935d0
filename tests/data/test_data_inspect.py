"""What `inspect` shows is what a run trains on; its figures against numbers worked out by hand."""

import json

import numpy as np
import pytest
from tiny import build_tokenizer, hub_template

from qlora_phi3.data import inspect
from qlora_phi3.data.prepare import prepare_datasets
from qlora_phi3.data.report import RowCount
from qlora_phi3.data.template import choose_template
from qlora_phi3.data.tokenize import UNCUT
from qlora_phi3.errors import DataError
from qlora_phi3.execution import IGNORE_INDEX
from qlora_phi3.recipe.schema import Data, Recipe
from qlora_phi3.ui.inspect import statistics_lines

TOKENIZER = build_tokenizer(hub_template("Phi-3-mini-4k-instruct"))


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def read(tmp_path):
    """Rows written to `rows.jsonl`, read as a run reads them with a `max_length`; and the [data] of their recipe."""

    def read(rows, max_length, **keys):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = Data(train="rows.jsonl", **keys)
        options = {"tokenizer": TOKENIZER, "template": choose_template(TOKENIZER, "auto"), "base_dir": tmp_path}
        return prepare_datasets(data, max_length=max_length, evaluate=False, progress=lambda *_: None, **options)

    return read


def test_the_pieces_of_a_row_are_the_ids_and_labels_that_are_trained_on(read):
    data = read([chat("hello world", "a  b\n  c €"), chat("x", "y")], 200)
    for index, view in enumerate(inspect.view_rows(data.train, [0, 1], data, TOKENIZER)):
        row = data.train[index]
        assert [token for piece in view.pieces for token in piece.ids] == row["input_ids"]
        learned = [piece.is_learned for piece in view.pieces for _ in piece.ids]
        assert learned == [label != IGNORE_INDEX for label in row["labels"]]
        assert "".join(piece.text for piece in view.pieces) == TOKENIZER.decode(row["input_ids"], skip_special_tokens=False)
        assert view.num_learned == sum(learned)
    assert [piece.text.strip() for piece in view.pieces if piece.is_learned] == ["y<|end|>"]


def test_a_row_that_is_cut_says_by_how_much_and_is_listed_with_its_content(read, tmp_path):
    rows = [chat("a", "b"), chat("a", "b" * 60)]
    data, uncut = read(rows, 32), read(rows, UNCUT)
    views = inspect.view_rows(data.train, [0, 1], data, TOKENIZER)
    length = len(uncut.train[1]["input_ids"])
    assert [view.num_cut for view in views] == [0, length - 32]
    (problem,) = inspect.find_problems(data, Data(train="rows.jsonl"), tmp_path)
    assert problem.name == "rows.jsonl:2"
    assert problem.reason == f"cut: {length} tokens, max_length is 32"
    assert json.loads(problem.content) == rows[1]


def test_a_row_that_is_skipped_or_loses_its_answer_is_a_problem(read, tmp_path):
    rows = [chat("a", "b"), {"messages": []}, chat("q" * 60, "b")]
    data = read(rows, 32)
    problems = list(inspect.find_problems(data, Data(train="rows.jsonl"), tmp_path))
    assert [problem.name for problem in problems] == ["rows.jsonl:2", "rows.jsonl:3"]
    assert problems[1].reason == "nothing left to learn after truncation"


def test_every_row_that_is_left_out_is_a_problem_and_its_number_says_why(read, tmp_path):
    rows = [chat("a", "b"), *({"messages": []} for _ in range(6))]
    data = read(rows, 64)
    problems = list(inspect.find_problems(data, Data(train="rows.jsonl"), tmp_path))
    assert [problem.name for problem in problems] == [f"rows.jsonl:{number}" for number in range(2, 8)]
    with pytest.raises(DataError, match=r"--row 7: rows\.jsonl:7 is not trained on: "):
        inspect.find_row(data, "7", TOKENIZER)
    assert len(data.report.skipped[0].where) == 3


def test_rows_that_start_on_one_line_are_told_apart_by_their_ids(tmp_path):
    rows = [chat("a", "b"), chat("a", "c" * 60), {"messages": []}]
    (tmp_path / "rows.json").write_text("[\n" + json.dumps(rows)[1:], encoding="utf-8")
    recipe, options = Data(train="rows.json"), {"tokenizer": TOKENIZER, "template": choose_template(TOKENIZER, "auto")}
    data, uncut = (
        prepare_datasets(recipe, max_length=length, evaluate=False, base_dir=tmp_path, progress=lambda *_: None, **options)
        for length in (32, UNCUT)
    )
    views = inspect.view_rows(data.train, [0, 1], data, TOKENIZER)
    assert [view.name for view in views] == ["rows.json:2"] * 2
    assert [view.num_cut for view in views] == [0, len(uncut.train[1]["input_ids"]) - 32]
    (problem,) = inspect.find_problems(data, recipe, tmp_path)
    assert problem.content.startswith("One of 3 rows that start on this line")


def test_a_suggestion_is_no_longer_than_the_model(read):
    rows = [chat("a", "b" * 300)]
    recipe = Recipe.model_validate({"model": {"name": "x"}, "data": {"train": "rows.jsonl"}, "training": {"max_length": 64}})
    figures = inspect.measure(read(rows, 64), read(rows, UNCUT), recipe, 128)
    assert figures.suggested_max_length == 128
    (cut,) = (cut for cut in figures.cuts if cut.max_length == 128)
    line = statistics_lines(figures)[-1]
    assert line.startswith("Suggestion: max_length = 128, all that the model has: 100.0 % of the rows are cut, ")
    assert f" {100 * cut.learned_share:.1f} % of the learned tokens lost" in line


def test_a_row_is_found_by_its_number_or_its_file(read):
    data = read([chat("a", "b"), chat("c", "d")], 64)
    for wanted in ("2", "rows.jsonl:2"):
        assert inspect.find_row(data, wanted, TOKENIZER).name == "rows.jsonl:2"
    for wanted in ("3", "other.jsonl:2", "x", ""):
        with pytest.raises(DataError, match=r"no such row of rows\.jsonl"):
            inspect.find_row(data, wanted, TOKENIZER)


def test_the_figures_of_rows_of_known_lengths(read):
    rows = [chat("a", "b"), chat("a", "b"), chat("a", "b" * 40), chat("a", "b" * 90)]
    recipe = Recipe.model_validate({"model": {"name": "x"}, "data": {"train": "rows.jsonl"}, "training": {"max_length": 64}})
    data, uncut = read(rows, 64), read(rows, UNCUT)
    figures = inspect.measure(data, uncut, recipe, 4096)
    lengths = [len(row["input_ids"]) for row in uncut.train]
    learned = [sum(label != IGNORE_INDEX for label in row["labels"]) for row in uncut.train]
    assert figures.percentiles[0] == min(lengths)
    assert figures.percentiles[50] == sorted(lengths)[2]
    assert figures.percentiles[100] == max(lengths)
    assert sum(count for _, count in figures.histogram) == 4
    for largest, count in figures.histogram:
        assert count == sum(largest / 2 < length <= largest for length in lengths)
    (cut,) = (cut for cut in figures.cuts if cut.max_length == 64)
    kept = [sum(label != IGNORE_INDEX for label in row["labels"][:64]) for row in uncut.train]
    assert cut.rows_share == sum(length > 64 for length in lengths) / 4
    assert cut.learned_share == pytest.approx(1 - sum(kept) / sum(learned))
    assert cut.rows_dropped == kept.count(0)
    short = [min(length, 64) for length in lengths]
    assert figures.padding_share == pytest.approx(1 - sum(short) / (4 * max(short)))
    assert figures.report.notes == (RowCount("the same tokens as an earlier row", 1, ("rows.jsonl:2",)),)
    assert figures.suggested_max_length == -(-max(lengths) // 64) * 64


def test_the_suggested_length_cuts_at_most_one_percent_of_rows_and_of_learned_tokens():
    lengths = np.array([100] * 98 + [700, 1000])

    def learned_before(length):
        return np.minimum(lengths, length)

    assert inspect.suggest_max_length(lengths, learned_before) == 896  # 104 of 11,500 tokens are lost, at 832 168
    assert inspect.suggest_max_length(np.array([5, 9]), lambda length: np.minimum([5, 9], length)) == 64
