"""Answers to held-out prompts at the end of a run: the same in any batch, and nothing that goes wrong with them ends the run."""

import json
from types import SimpleNamespace

import pytest
import torch
from workshop import Workshop

from qlora_phi3.errors import RunError
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.training import samples
from qlora_phi3.training.prepare import load_model, prepare
from qlora_phi3.training.samples import MAX_NEW_TOKENS, choose_prompts, limit_seconds, save_samples


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
    """Save samples after changing the module; returns them (None: no file) and the warnings."""
    model, context = lab
    context.reporter.warnings.clear()
    monkeypatch.setattr(samples, "MAX_NEW_TOKENS", 12)

    def answer(**changes):
        for name, value in changes.items():
            monkeypatch.setattr(samples, name, value)
        folder = RunFolder(tmp_path)
        folder.samples.unlink(missing_ok=True)
        save_samples(model, context, folder, run_seconds=0.0)
        saved = json.loads(folder.samples.read_text(encoding="utf-8"))["samples"] if folder.samples.exists() else None
        return saved, context.reporter.warnings

    return answer


def test_a_batch_gives_the_answers_that_each_prompt_gets_alone(answer):
    together, _ = answer()
    alone, warnings = answer(CACHED_TOKENS=1)
    assert together == alone
    assert warnings == []
    assert [each["row"] for each in together] == ["chats.jsonl:" + each["row"].partition(":")[2] for each in together]
    assert all(each["prompt"].startswith("What is ") for each in together)
    assert any(each["base"]["text"] != each["tuned"]["text"] for each in together)


def test_the_base_answers_as_the_model_without_its_adapter(answer, lab):
    model, context = lab
    saved, _ = answer()
    prompt = choose_prompts(context, 1)[0]
    with model.disable_adapter(), torch.no_grad():
        ids = model.eval().generate(
            input_ids=torch.tensor([prompt.ids]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    text = context.tokenizer.decode(ids[0, len(prompt.ids) :], skip_special_tokens=True).strip()
    assert text.startswith(saved[0]["base"]["text"])


def test_memory_that_runs_out_halves_the_batch_and_one_row_that_does_not_fit_is_a_warning(answer, monkeypatch):
    generate, sizes = samples._answer, []

    def limited(most):
        def run(model, context, batch, *arguments):
            sizes.append(len(batch))
            if len(batch) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return generate(model, context, batch, *arguments)

        return run

    expected, _ = answer()
    found, warnings = answer(_answer=limited(1))
    assert found == expected
    assert warnings == []
    assert max(sizes) > 1
    nothing, warnings = answer(_answer=limited(0))
    assert nothing is None
    assert "memory ran out" in warnings[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a fault of a library"), ValueError("another")])
def test_whatever_happens_the_run_goes_on_with_one_warning(answer, error):
    def fail(*arguments):
        raise error

    saved, warnings = answer(_answer=fail)
    assert saved is None
    assert len(warnings) == 1
    assert "The run itself is complete" in warnings[0]


def test_answers_that_would_take_too_long_are_left_out(answer):
    saved, warnings = answer(ALLOWED_SECONDS=0.0)
    assert saved is None
    assert "as it would take" in warnings[0]


def test_the_estimate_leaves_out_the_time_of_the_first_token(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(samples.time, "perf_counter", lambda: now[0])
    count = limit_seconds(60.0, 101, lambda *arguments: None)
    for done in range(1, 9):  # 20 s for the prompts, then 0.35 s a token: 20 + 100 * 0.35 = 55 s
        now[0] = 20 + 0.35 * (done - 1)
        count(done)
    now[0] = 20 + 0.45 * 8  # 20 + 100 * 0.45 = 65 s
    with pytest.raises(RunError, match="1:05"):
        count(9)


def test_an_answer_ends_at_its_first_stop_id(lab):
    context = lab[1]
    prompts, stop = choose_prompts(context, 2), 5
    start = max(len(prompt.ids) for prompt in prompts)
    new = torch.tensor([[7, stop, 8, stop], [7, 7, 7, 7]])
    fake = SimpleNamespace(generate=lambda **options: torch.cat([torch.zeros(2, start, dtype=torch.int64), new], dim=1))
    assert samples._answer(fake, context, prompts, [stop], lambda done: None, 0) == [[7, stop], [7, 7, 7, 7]]


def row(prompt, answer):
    ids = list(range(1, prompt + answer + 1))
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "source": 0, "source_row": 1}


def test_prompts_end_before_the_first_learned_token_and_long_ones_are_passed_over():
    rows = [row(600, 5), row(10, 300), row(1, 19)]
    data = SimpleNamespace(evaluation=rows, report=SimpleNamespace(sources=("a.jsonl",)))
    chosen = choose_prompts(SimpleNamespace(data=data), 8)
    assert [len(prompt.ids) for prompt in chosen] == [10, 10]  # raw text is continued from its half
    assert [len(prompt.expected) for prompt in chosen] == [MAX_NEW_TOKENS, 10]
    assert choose_prompts(SimpleNamespace(data=data), 1) == chosen[:1]
    assert choose_prompts(SimpleNamespace(data=data), 0) == []
