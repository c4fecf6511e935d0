"""Losses are the run's own, ROUGE is that of rouge_score, intervals are worked out by hand; a base differs from itself by 0."""

import json
import shutil

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from workshop import Workshop, call, read_json, write_chats

from qlora_phi3 import evaluation
from qlora_phi3.cli.eval import _show as show
from qlora_phi3.evaluation import (
    EvalRows,
    EvalSettings,
    answer_questions,
    bootstrap_interval,
    choose_questions,
    compare,
    describe_unanswered,
    evaluate_model,
    judge,
    read_other_rows,
    read_own_rows,
    score_answers,
)
from qlora_phi3.inference import GREEDY, generate_batch, load_for_inference
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.runfolder import RunFolder, write_report

CPU = torch.device("cpu")
SETTINGS = EvalSettings(rows=4, max_new_tokens=6, sampling=GREEDY, seed=1)


def no_progress(*_):
    pass


@pytest.fixture(scope="module")
def done(tmp_path_factory, base):
    """A short run with its data; read only."""
    shop = Workshop(tmp_path_factory.mktemp("evaluated"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.path)
        shop.write(training={"max_steps": 3})
        result = shop.run()
    assert result.exit_code == 0, result.stderr
    (folder,) = shop.runs()
    return folder


@pytest.fixture
def run(done, tmp_path):
    return RunFolder(shutil.copytree(done, tmp_path / "run"))


@pytest.fixture(scope="module")
def loaded(done):
    return load_for_inference(done, device=CPU)


@pytest.fixture(scope="module")
def rows(loaded, done):
    return read_own_rows(loaded, RunFolder(done), no_progress)


@pytest.fixture(scope="module")
def result(loaded, rows):
    return evaluate_model(loaded, rows, SETTINGS, progress=no_progress)


def test_loss_and_accuracy_are_those_of_the_run(result, done):
    report, metrics = read_json(done / "report.json"), result["metrics"]
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert f"{metrics['loss']['base']:.4f}" == f"{report['eval_loss_before']:.4f}"
    assert f"{metrics['loss']['tuned']:.4f}" == f"{report['eval_loss_after']:.4f}"
    assert metrics["token_accuracy"]["tuned"] == pytest.approx(last["eval_token_accuracy"])
    assert metrics["perplexity"]["tuned"] == pytest.approx(np.exp(metrics["loss"]["tuned"]))
    assert result["data"]["rows"] == 8
    assert not any("changed" in note for note in result["data"]["notes"])


def test_the_loss_of_several_rows_is_weighted_by_their_tokens(loaded, rows):
    nll, tokens = evaluation.score_rows(loaded, rows, no_progress)["loss"]
    assert [int(count) for count in tokens] == [sum(label != -100 for label in row["labels"]) for row in rows.rows]
    with torch.no_grad():
        row = rows.rows[3]
        logits = loaded.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum", ignore_index=-100)
    assert nll[3] == pytest.approx(float(losses), rel=1e-5)


def test_answers_are_those_of_each_prompt_alone_and_without_the_adapter_those_of_the_base(result, loaded, rows):
    questions = choose_questions(loaded, rows.rows, SETTINGS)
    assert len(questions) == len(result["answers"]) == 4
    for (ids, reference), shown in zip(questions, result["answers"], strict=True):
        assert shown["reference"] == reference
        assert shown["prompt"].endswith("<|assistant|>") or "<|assistant|>" in shown["prompt"][-20:]
        for side in ("base", "tuned"):
            if side == "base":
                with loaded.model.disable_adapter():
                    [alone] = generate_batch(loaded, [ids], [6])
            else:
                [alone] = generate_batch(loaded, [ids], [6])
            assert shown[side] == loaded.tokenizer.decode(alone, skip_special_tokens=True).strip()


def test_references_are_the_answers_of_the_data(loaded, rows):
    references = {reference for _, reference in choose_questions(loaded, rows.rows, SETTINGS)}
    assert references <= {"a cherry", "the grass", "the sea", "the night", "the snow"}


def test_a_row_of_raw_text_or_with_a_cut_answer_asks_nothing(loaded):
    document = {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]}
    cut = {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}
    ended = {"input_ids": [3, 4, 5, 6, 7], "labels": [-100, -100, 5, 6, -100]}
    assert [ids for ids, _ in choose_questions(loaded, [document, cut, ended], SETTINGS)] == [[3, 4]]


def test_fewer_answers_than_rows_are_explained():
    settings = EvalSettings(rows=8, max_new_tokens=1, sampling=GREEDY, seed=0)
    line = "3 of 8 rows can be answered: the answer of the others is cut at max_length, or they have no prompt."
    assert describe_unanswered(3, 8, settings) == line
    assert describe_unanswered(8, 100, settings) is None


def test_rouge_is_that_of_rouge_score(loaded):
    pairs = [("the cats sat on a mat", "a cat sits on the mat"), ("a cherry", "a cherry"), ("night\nand day", "day\nnight")]
    stop = loaded.stop_ids[-1]
    answers = [loaded.tokenizer(text, add_special_tokens=False).input_ids for _, text in pairs]
    answers = [answers[0], [*answers[1], stop], answers[2]]
    scores = score_answers(loaded, [([3], reference) for reference, _ in pairs], answers)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        expected = [100 * scorer.score(reference, text)[name].fmeasure for reference, text in pairs]
        assert scores[name][0].tolist() == expected
    assert scores["exact_match"][0].tolist() == [0, 1, 0]
    assert scores["ended_by_itself"][0].tolist() == [0, 1, 0]
    assert scores["answer_tokens"][0][1] == len(answers[1]) - 1


def test_the_interval_of_equal_differences_is_that_difference():
    assert bootstrap_interval(np.full(5, -2.0), np.ones(5), 0) == (-2.0, -2.0)


def test_the_interval_of_two_rows_is_from_the_one_to_the_other():
    # drawn twice from (0, 1): the mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4
    assert bootstrap_interval(np.array([0.0, 1.0]), np.ones(2), 0) == (0.0, 1.0)


def test_the_interval_weighs_rows_by_their_tokens():
    # a row of 30 tokens and one of 10: the mean is 3/30, (3 + 9)/40 or 9/10
    assert bootstrap_interval(np.array([3.0, 9.0]), np.array([30.0, 10.0]), 0) == pytest.approx((0.1, 0.9))


def test_the_interval_of_many_rows_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(1.0, 2.0, size=400)
    low, high = bootstrap_interval(values, np.ones(400), 0)
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.03)


def metric(base, tuned, low, high):
    return {"base": base, "tuned": tuned, "difference": tuned - base, "low": low, "high": high}


@pytest.mark.parametrize(
    ("loss", "rouge", "word"),
    [
        (metric(4.38, 2.40, -2.1, -1.9), metric(10.0, 22.3, 10.1, 14.4), "Better"),
        (metric(2.0, 2.1, -0.1, 0.3), metric(10.0, 22.3, 10.1, 14.4), "Better"),
        (metric(2.0, 2.6, 0.5, 0.7), metric(10.0, 10.5, -1.0, 2.0), "Worse"),
        (metric(2.6, 2.0, -0.7, -0.5), metric(10.0, 5.0, -6.0, -4.0), "Mixed"),
        (metric(2.0, 2.1, -0.1, 0.3), None, "No clear difference"),
    ],
)
def test_the_verdict_counts_differences_without_a_zero_in_their_interval(loss, rouge, word):
    metrics = {"loss": loss} | ({"rougeL": rouge} if rouge else {})
    assert judge(metrics, has_adapter=True).startswith(f"{word}: held-out loss ")


def test_fewer_than_20_answers_get_no_interval_and_no_verdict(loaded, capsys):
    few = {"loss": (np.arange(19.0), np.ones(19))}
    assert compare(few, few, 0)["loss"] == metric(9.0, 9.0, None, None)
    enough = {"loss": (np.arange(20.0), np.ones(20))}
    assert compare(enough, enough, 0)["loss"]["low"] == 0.0
    metrics = {"loss": metric(4.38, 2.40, -2.1, -1.9), "rougeL": metric(10.0, 22.3, None, None)}
    line = judge(metrics, has_adapter=True)
    assert line == "Too few answers for a verdict (20 are needed): held-out loss 2.40 against 4.38; ROUGE-L +12.3."
    only_loss = judge({"loss": metric(4.38, 2.40, None, None)}, has_adapter=True)
    assert only_loss == "Too few rows for a verdict (20 are needed): held-out loss 2.40 against 4.38."
    metrics["loss"] = metric(4.38, 2.40, None, None)
    data = {"rows": 3, "name": "held-out rows", "questions": 3, "notes": []}
    show({"model": "runs/a/1", "verdict": line, "has_adapter": True, "data": data, "metrics": metrics}, None)
    assert "more than chance" not in capsys.readouterr().err


def test_the_verdict_is_one_line_with_its_figures():
    metrics = {"loss": metric(4.38, 2.40, -2.1, -1.9), "rougeL": metric(10.0, 22.3, 10.1, 14.4)}
    line = judge(metrics | {"ended_by_itself": metric(0.1, 0.98, 0.8, 0.9)}, has_adapter=True)
    assert line == (
        "Better: held-out loss 2.40 against 4.38; ROUGE-L +12.3 (+10.1 to +14.4); 98 % of the answers end by themselves."
    )


def test_figures_that_are_equal_in_every_row_have_no_interval_of_zeros(capsys):
    metrics = {"loss": metric(4.38, 2.40, -2.1, -1.9), "rougeL": metric(10.0, 10.0, 0.0, 0.0)}
    line = judge(metrics, has_adapter=True)
    assert line == "Better: held-out loss 2.40 against 4.38; ROUGE-L the same in every row."
    data = {"rows": 5, "name": "held-out rows", "questions": 5, "notes": []}
    show({"model": "runs/a/1", "verdict": line, "has_adapter": True, "data": data, "metrics": metrics}, None)
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert ["ROUGE-L", "10.0", "10.0", "+0.0", "no", "difference"] in rows
    assert ["Loss", "4.3800", "2.4000", "-1.9800", "-2.1000", "to", "-1.9000"] in rows


def test_a_lower_loss_is_not_better_where_all_answers_are_the_base_s(loaded, rows, monkeypatch):
    monkeypatch.setattr(evaluation, "answer_questions", lambda _, questions, *__: [[5, 6] for _ in questions])
    result = evaluate_model(loaded, rows, SETTINGS, progress=no_progress)
    assert result["verdict"].startswith("The same answers as the base's: held-out loss ")
    assert any(note.startswith("4 of 4 answers are the base's, word for word") for note in result["data"]["notes"])


def test_answers_are_counted_in_part_by_their_tokens(loaded, rows, monkeypatch):
    questions, calls = choose_questions(loaded, rows.rows, SETTINGS), []
    monkeypatch.setattr(evaluation, "BATCH_PROMPTS", 2)

    def generate(inference, prompts, limits, *, sampling, after_token):
        after_token(torch.zeros(2, 3))
        return [[5] * 3, [6] * 2]

    monkeypatch.setattr(evaluation, "generate_batch", generate)
    answer_questions(loaded, questions, SETTINGS, lambda done, total: calls.append((done, total)))
    # Half of the limit of 6; then the answers before had at most 3 tokens.
    assert calls == [(1.0, 4), (2, 4), (2 + 2 * 0.99, 4), (4, 4)]


def test_memory_that_runs_out_halves_the_batch_and_changes_no_answer(loaded, rows, monkeypatch):
    questions, sizes = choose_questions(loaded, rows.rows, SETTINGS), []
    expected = answer_questions(loaded, questions, SETTINGS, no_progress)

    def too_many(inference, prompts, *arguments, **options):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate_batch(inference, prompts, *arguments, **options)

    monkeypatch.setattr(evaluation, "generate_batch", too_many)
    assert answer_questions(loaded, questions, SETTINGS, no_progress) == expected
    assert sizes == [4, 2, 1, 1, 1, 1]


def test_no_more_prompts_share_a_batch_than_have_room(loaded, rows, monkeypatch):
    questions, sizes = choose_questions(loaded, rows.rows, SETTINGS), []
    longest = max(len(ids) for ids, _ in questions) + SETTINGS.max_new_tokens
    monkeypatch.setattr(evaluation, "_cache_tokens", lambda _: 2 * longest)
    monkeypatch.setattr(
        evaluation, "generate_batch", lambda _, prompts, limits, **__: sizes.append(len(prompts)) or [[2] for _ in prompts]
    )
    answer_questions(loaded, questions, SETTINGS, no_progress)
    assert sizes == [2, 2]


def test_a_change_of_the_data_is_noted(loaded, run):
    report = read_json(run.report)
    write_report(run, {**report, "data": {**report["data"], "sha256": "0" * 64}})
    (note,) = read_own_rows(loaded, run, no_progress).notes
    assert "changed" in note
    assert "000000000000" in note


def test_where_the_data_are_gone_the_rows_kept_for_exports_are_evaluated(loaded, run):
    text = run.recipe.read_text(encoding="utf-8").replace("chats.jsonl", "gone.jsonl")
    run.recipe.write_text(text, encoding="utf-8")
    found = read_own_rows(loaded, run, no_progress)
    assert len(found.rows) == 8
    assert "gone.jsonl" in found.notes[0]


def test_rows_of_another_file_are_read_in_their_own_format(loaded, run, tmp_path):
    lines = [{"instruction": "What is red?", "output": "a cherry"}, {"instruction": "?", "output": ""}]
    path = tmp_path / "other.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = read_other_rows(loaded, run, str(path), no_progress)
    assert len(found.rows) == 1
    assert found.notes == ("1 of 2 rows are left out.",)
    lines.append({"instruction": "?", "output": "word " * 600})
    path.write_text("\n".join(map(json.dumps, lines[::2])), encoding="utf-8")
    length = load_recipe(run.recipe).training.max_length
    assert read_other_rows(loaded, run, str(path), no_progress).notes == (f"1 of 2 rows are cut at {length} tokens.",)
    assert choose_questions(loaded, found.rows, SETTINGS)[0][1] == "a cherry"


def test_rows_of_another_file_have_the_columns_of_the_recipe_only_where_these_are_there(loaded, run, tmp_path):
    fields = 'fields = { instruction = "Frage", output = "Antwort" }'
    text = run.recipe.read_text(encoding="utf-8").replace("fields = {}", fields).replace('format = "auto"', 'format = "alpaca"')
    run.recipe.write_text(text, encoding="utf-8")
    rows = {
        "same.jsonl": {"Frage": "What is red?", "Antwort": "a cherry"},
        "other.jsonl": {"messages": [{"role": "user", "content": "What is red?"}, {"role": "assistant", "content": "a cherry"}]},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row), encoding="utf-8")
        found = read_other_rows(loaded, run, str(tmp_path / name), no_progress)
        assert choose_questions(loaded, found.rows, SETTINGS)[0][1] == "a cherry"


def test_a_base_is_the_tuned_model_and_differs_by_zero(base, tmp_path):
    inference = load_for_inference(base, device=CPU)
    path = write_chats(tmp_path / "chats.jsonl", rows=6)
    found = read_other_rows(inference, None, str(path), no_progress)
    result = evaluate_model(inference, found, SETTINGS, progress=no_progress)
    assert {(each["difference"], each["low"]) for each in result["metrics"].values()} == {(0.0, None)}
    assert result["verdict"].startswith("No adapter, so base = tuned: loss ")


def test_without_answers_only_losses_are_measured(loaded, rows):
    settings = EvalSettings(rows=0, max_new_tokens=6, sampling=GREEDY, seed=1)
    result = evaluate_model(loaded, EvalRows(rows.rows.select(range(2)), "two"), settings, progress=no_progress)
    assert list(result["metrics"]) == ["loss", "perplexity", "token_accuracy"]
    assert result["answers"] == []


def test_the_command_prints_a_table_and_writes_its_figures_into_the_run(run, result):
    shown = call("eval", str(run.path), "--rows", "4", "--max-new-tokens", "6", "--seed", "1")
    assert shown.exit_code == 0, shown.stderr
    assert "95 % interval" in shown.output
    written = read_json(run.path / "eval.json")
    assert written["verdict"] in shown.output
    assert written["metrics"] == result["metrics"]
    assert written["answers"] == result["answers"]


def test_the_command_prints_json_alone_and_writes_other_data_under_their_name(run, tmp_path):
    path = write_chats(tmp_path / "other.jsonl", rows=4)
    shown = call("eval", str(run.path), "--data", str(path), "--no-generate", "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout) == read_json(run.path / "eval-other.json")


def test_the_command_writes_nothing_about_a_base_without_a_name(base, tmp_path):
    path = write_chats(tmp_path / "other.jsonl", rows=4)
    before = sorted(base.iterdir())
    shown = call("eval", str(base), "--data", str(path), "--no-generate", "--out", str(tmp_path / "figures.json"))
    assert shown.exit_code == 0, shown.stderr
    assert sorted(base.iterdir()) == before
    assert read_json(tmp_path / "figures.json")["has_adapter"] is False


def test_answers_of_which_most_are_empty_are_not_called_better():
    metrics = {"loss": metric(4.38, 2.40, -2.1, -1.9), "ended_by_itself": metric(0.1, 0.98, 0.8, 0.9)}
    assert judge(metrics, has_adapter=True).startswith("Better: ")
    assert judge(metrics, has_adapter=True, mostly_empty=True).startswith("Most answers are empty: held-out loss ")
