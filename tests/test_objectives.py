"""`sft` is the cross-entropy of transformers; any objective survives an out-of-memory error and runs through the dry run."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from out_of_memory import RunOutAt
from tiny_model import gradients, load_tiny, random_rows, relative_difference, save_tiny_model
from torch.nn.functional import cross_entropy, log_softmax
from weighted_objective import weighted_logprobs
from workshop import read_lines

import qlora_phi3.training.run as training_run
from qlora_phi3.execution import ExecutionPlan, MicroBatchPlan
from qlora_phi3.objectives import sft
from qlora_phi3.recipe.schema import Lora
from qlora_phi3.step import collate, evaluate, forward_backward
from qlora_phi3.training.oom import MemoryGuard
from qlora_phi3.training.trainer import Phi3Trainer

PLAN = MicroBatchPlan(max_tokens=64, max_rows=2, packing=True, longrope_boundary=None)
LENGTHS = [30, 25, 20, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return load_tiny(folder)


def test_sft_is_the_cross_entropy_of_the_supervised_tokens(model):
    ids = torch.randint(3, 512, (1, 30))
    labels = ids.clone()
    labels[:, :10] = -100
    logits = model(input_ids=ids).logits[0, 9:-1]
    output = sft(model, {"input_ids": ids, "labels": labels}, 20)
    assert float(output.loss) == pytest.approx(float(cross_entropy(logits, ids[0, 10:])), rel=1e-5)
    assert int(output.metrics["num_correct"]) == int((logits.argmax(-1) == ids[0, 10:]).sum())


def test_a_trained_head_gets_the_gradient_of_the_full_cross_entropy(folder):
    model = load_tiny(folder, four_bit=False, lora=Lora(r=4, modules_to_save=["lm_head"]))
    ids = torch.randint(3, 512, (1, 20))
    sft(model, {"input_ids": ids, "labels": ids}, 19).loss.backward()
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    ours, head.grad = head.grad.clone(), None
    logits = model(input_ids=ids).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.testing.assert_close(ours, head.grad, rtol=1e-4, atol=1e-6)


def test_the_logits_of_packed_documents_are_those_of_each_document_alone(model):
    ids = [torch.randint(3, 512, (1, length)) for length in (20, 12)]
    with torch.no_grad():
        packed = model(input_ids=torch.cat(ids, 1), position_ids=torch.cat([torch.arange(20), torch.arange(12)])[None],
                       document_lengths=(20, 12)).logits  # fmt: skip
        alone = torch.cat([model(input_ids=each).logits for each in ids], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_another_objective_gives_its_own_loss_gradients_and_metrics(model):
    row = random_rows([40])[0]
    batch = collate([row], PLAN)
    model.zero_grad()
    result = forward_backward(
        model, batch, objective=weighted_logprobs, compute_dtype=torch.float32, backward=torch.Tensor.backward
    )
    ours = gradients(model)
    model.zero_grad()
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    logprobs = log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
    logprobs = logprobs[labels[1:] != -100]
    targets = labels[1:][labels[1:] != -100]
    expected = -(logprobs * (1 + targets % 3)).sum() / len(targets)
    expected.backward()
    assert float(result.loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert result.metrics.keys() == {"sum_logprobs"}
    assert float(result.metrics["sum_logprobs"]) == pytest.approx(float(logprobs.detach().sum()), rel=1e-5)
    assert relative_difference(gradients(model), ours) < 1e-5


@pytest.mark.parametrize("phase", ["training", "evaluation"])
def test_a_batch_of_any_objective_is_the_same_after_memory_ran_out(model, phase):
    execution = ExecutionPlan(
        micro_batch=PLAN, evaluation=PLAN, checkpoint_every=0, activation_offloading=False, optim="adamw_torch"
    )
    options = {"objective": weighted_logprobs, "compute_dtype": torch.float32}

    def compute(*at):
        records = []
        guard = MemoryGuard(
            model.train(),
            execution=execution,
            device=torch.device("cpu"),
            reporter=SimpleNamespace(oom=records.append),
            sources=(),
            apply=lambda execution: None,
        )
        mode = RunOutAt(at)

        def run_pass(batch):
            with mode:
                if phase == "training":
                    return forward_backward(model, batch, backward=torch.Tensor.backward, **options)
                return next(evaluate(model, [batch], **options))[1]

        model.zero_grad()
        _, result = guard.compute(random_rows(LENGTHS), run_pass, phase=phase, step=1)
        return result, gradients(model), [record.remedy for record in records]

    expected, expected_gradients, _ = compute()
    for call in (30, 150):
        result, found, remedies = compute(call, call + 1)
        assert remedies == ["again", "split"]
        assert float(result.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert float(result.metrics["sum_logprobs"]) == pytest.approx(float(expected.metrics["sum_logprobs"]), rel=1e-5)
        if phase == "training":
            assert relative_difference(expected_gradients, found) < 1e-5


def test_the_dry_run_and_the_run_take_any_objective(shop, monkeypatch):
    calls = []

    def counted(model, micro_batch, normalizer):
        calls.append(model.training)
        return weighted_logprobs(model, micro_batch, normalizer)

    monkeypatch.setattr("qlora_phi3.training.trainer.Phi3Trainer", partial(Phi3Trainer, objective=counted))
    dry_run = training_run.dry_run_heaviest_step

    def watch(*args, **kwargs):
        measured = dry_run(*args, **kwargs)
        assert set(calls) == {True, False}  # training and evaluation
        return measured

    monkeypatch.setattr(training_run, "dry_run_heaviest_step", watch)
    shop.write(training={"batch_size": 4, "max_steps": 3, "save_strategy": "no"}, memory={"rehearsal": True})
    result = shop.run()
    assert result.exit_code == 0, result.stderr
    losses = [record["loss"] for record in read_lines(shop.runs()[-1] / "metrics.jsonl") if record["kind"] == "train"]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
