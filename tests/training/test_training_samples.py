"""Answers to held-out prompts at the end of a run: those of both models, and nothing that goes wrong with them ends the run."""

import json
from dataclasses import replace

import pytest
import torch
from workshop import Workshop

from qlora_phi3.errors import RunError
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.training import samples
from qlora_phi3.training.prepare import load_model, prepare
from qlora_phi3.training.samples import limit_seconds, save_samples


class Heard:
    """A reporter that keeps warnings."""

    def __init__(self):
        self.warnings = []

    def __getattr__(self, name):
        return lambda *arguments: self.warnings.append(arguments[0]) if name == "warning" else None


@pytest.fixture(scope="module")
def lab(tmp_path_factory, base):
    """A model whose adapter changes it, and the run it belongs to."""
    shop = Workshop(tmp_path_factory.mktemp("samples"), base)
    recipe = load_recipe(shop.write(training={"report_samples": 3}))
    context = prepare(recipe, shop.path, Heard())
    model = load_model(context)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model, context


@pytest.fixture
def answer(lab, tmp_path, monkeypatch):
    """Save samples after changing the module; returns what samples.json holds, and the warnings."""
    model, context = lab
    context.reporter.warnings.clear()
    monkeypatch.setattr(samples, "MAX_NEW_TOKENS", 12)

    def answer(**changes):
        for name, value in changes.items():
            monkeypatch.setattr(samples, name, value)
        save_samples(model, context, RunFolder(tmp_path), run_seconds=0.0)
        return json.loads((tmp_path / "samples.json").read_text(encoding="utf-8")), context.reporter.warnings

    return answer


def test_the_base_answers_as_the_model_without_its_adapter_and_the_tuned_model_as_with_it(answer, lab):
    model, context = lab
    saved, warnings = answer()
    assert (len(saved["samples"]), warnings, "reason" in saved) == (3, [], False)
    assert all(each["prompt"].startswith("What is ") for each in saved["samples"])
    assert any(each["base"]["text"] != each["tuned"]["text"] for each in saved["samples"])
    ids = [row["input_ids"] for row in context.data.evaluation]
    labels = [row["labels"] for row in context.data.evaluation]
    prompts = [row[: next(at for at, label in enumerate(marks) if label != -100)] for row, marks in zip(ids, labels, strict=True)]
    texts = [context.tokenizer.decode(prompt, skip_special_tokens=True).strip() for prompt in prompts]
    prompt = prompts[texts.index(saved["samples"][0]["prompt"])]
    with model.disable_adapter(), torch.no_grad():
        new = model.eval().generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    text = context.tokenizer.decode(new[0, len(prompt) :], skip_special_tokens=True).strip()
    assert text.startswith(saved["samples"][0]["base"]["text"])


def test_rows_whose_answer_was_cut_are_not_answered_and_the_reason_is_saved_and_shown(lab, tmp_path):
    model, context = lab
    rows = list(context.data.evaluation.select(range(4)))
    cut = [{**row, "input_ids": row["input_ids"][:-2], "labels": row["labels"][:-2]} for row in rows[:2]]
    context = replace(context, data=replace(context.data, evaluation=[*cut, *rows[2:]]), reporter=Heard())
    save_samples(model, context, RunFolder(tmp_path), run_seconds=0.0)
    saved = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    assert (len(saved["samples"]), context.reporter.warnings) == (2, [])
    assert saved["reason"].startswith("Held-out prompts: 2 of 4 rows can be answered: the answer of the others is cut")


def test_tokens_are_counted_without_the_stop_id_as_in_chat(answer, lab):
    stop = int(lab[1].tokenizer.convert_tokens_to_ids(lab[1].template.end_of_turn))
    saved, _ = answer(answer_questions=lambda inference, questions, *_: [[5, stop], [stop], [5, 6]][: len(questions)])
    assert [(each["tuned"]["tokens"], each["tuned"]["ended"]) for each in saved["samples"]] == [(1, True), (0, True), (2, False)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a fault of a library"), ValueError("another")])
def test_whatever_happens_the_run_goes_on_with_one_warning_which_the_report_has(answer, error):
    def fail(*arguments):
        raise error

    saved, warnings = answer(answer_questions=fail)
    assert saved["samples"] == []
    assert [saved["reason"]] == warnings
    assert "The run itself is complete" in warnings[0]


def test_answers_that_would_take_too_long_are_left_out(answer):
    saved, warnings = answer(ALLOWED_SECONDS=0.0)
    assert saved["samples"] == []
    assert "as it would take" in warnings[0]


def test_the_time_is_estimated_from_the_answers_done(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(samples.time, "perf_counter", lambda: now[0])
    report = limit_seconds(60.0, lambda *arguments: None)
    now[0] = 100.0
    report(1, 16)  # one answer tells too little
    now[0] = 7.0
    report(2, 16)  # 16 / 2 * 7 s = 56 s
    now[0] = 8.0
    with pytest.raises(RunError, match="1:04"):
        report(2, 16)


def test_nothing_is_written_where_the_recipe_wants_no_samples(lab, tmp_path):
    model, context = lab
    training = context.recipe.training.model_copy(update={"report_samples": 0})
    without = context.recipe.model_copy(update={"training": training})
    save_samples(model, replace(context, recipe=without), RunFolder(tmp_path), run_seconds=0.0)
    assert not (tmp_path / "samples.json").exists()
