"""A step normalizes by the tokens of the complete batch, and a wrapped model computes what the model does."""

import pytest
import torch
from tiny_model import gradients, load_tiny, random_rows, relative_difference, save_tiny_model
from torch import nn

from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.model.phi3 import find_base
from qlora_phi3.step import collate, evaluate, forward_backward

PLAN = MicroBatchPlan(max_tokens=64, max_rows=8, packing=True, longrope_boundary=None)
LENGTHS = [60, 50, 40]


class Wrapper(nn.Module):
    """Wraps a model, as PEFT and others do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **kwargs):
        return self.module(**kwargs)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_tiny(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def run_step(model, **options):
    model.zero_grad()
    batch = collate(random_rows(LENGTHS), PLAN)
    options = {"backward": torch.Tensor.backward, **options}
    return batch, forward_backward(model, batch, compute_dtype=torch.float32, **options)


def test_a_wrapped_model_is_trained_like_the_model(model):
    _, expected = run_step(model)
    expected_gradients = gradients(model)
    wrapper = Wrapper(model)
    batch, result = run_step(wrapper)
    assert len(batch.micro_batches) == 3
    assert torch.equal(result.loss, expected.loss)
    assert relative_difference(expected_gradients, gradients(model)) == 0.0
    assert find_base(wrapper) is model.get_base_model()


def test_a_wrapped_model_is_evaluated_like_the_model(model):
    batch = collate(random_rows(LENGTHS), PLAN)
    ((_, expected),) = evaluate(model, [batch], compute_dtype=torch.float32)
    ((_, result),) = evaluate(Wrapper(model), [batch], compute_dtype=torch.float32)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.metrics["num_correct"], expected.metrics["num_correct"])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_shares_of_several_processes_add_up_to_the_batch(model, count):
    complete, expected = run_step(model)
    expected_gradients = gradients(model)
    model.zero_grad()
    losses, correct, rows = [], [], []
    for rank in range(count):
        share = collate(random_rows(LENGTHS), PLAN, rank=rank, count=count)
        assert (share.num_rows, share.num_tokens, share.num_supervised) == (3, 150, complete.num_supervised)
        result = forward_backward(model, share, compute_dtype=torch.float32, backward=torch.Tensor.backward)
        rows += [row for group in share.row_indices for row in group]
        losses.append(result.loss)
        correct.append(result.metrics.get("num_correct", torch.zeros(())))
        assert bool(share.micro_batches) == (rank < 3)  # the last of five have no row
    assert sorted(rows) == [0, 1, 2]
    assert float(sum(losses)) == pytest.approx(float(expected.loss), rel=1e-6)
    assert int(sum(correct)) == int(expected.metrics["num_correct"])
    assert relative_difference(expected_gradients, gradients(model)) < 1e-5


@pytest.mark.parametrize("packing", [True, False])
def test_every_label_of_a_collated_row_is_its_token_or_not_supervised(packing):
    plan = MicroBatchPlan(max_tokens=64, max_rows=2, packing=packing, longrope_boundary=None)
    for micro in collate(random_rows([5, 17, 30, 8], supervised_from=0), plan).micro_batches:
        labels = micro["labels"]
        assert ((labels == micro["input_ids"]) | (labels == -100)).all()
        assert (labels[micro["position_ids"] == 0] == -100).all()  # nothing predicts a document's first token
