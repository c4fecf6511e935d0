"""A step normalizes by the tokens it is given, and a wrapped model synchronizes its gradients once."""

from contextlib import contextmanager

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
    """Wraps a model as DistributedDataParallel does, and records in which passes it would synchronize."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.synchronizes = True
        self.events = []

    def forward(self, **kwargs):
        self.events.append(("forward", self.synchronizes))
        return self.module(**kwargs)

    @contextmanager
    def no_sync(self):
        self.synchronizes = False
        try:
            yield
        finally:
            self.synchronizes = True


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_tiny(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def run_step(model, **options):
    model.zero_grad()
    batch = collate(random_rows(LENGTHS), PLAN)
    options = {"backward": torch.Tensor.backward, **options}
    return batch, forward_backward(model, batch, compute_dtype=torch.float32, **options)


def test_a_wrapped_model_synchronizes_only_in_the_last_micro_batch(model):
    _, expected = run_step(model)
    expected_gradients = gradients(model)
    wrapper = Wrapper(model)

    def backward(loss):
        wrapper.events.append(("backward", wrapper.synchronizes))
        loss.backward()

    batch, result = run_step(wrapper, backward=backward)
    assert len(batch.micro_batches) == 3
    assert wrapper.events == [("forward", False), ("backward", False)] * 2 + [("forward", True), ("backward", True)]
    assert torch.equal(result.loss, expected.loss)
    assert relative_difference(expected_gradients, gradients(model)) == 0.0
    assert find_base(wrapper) is model.get_base_model()


def test_a_wrapped_model_is_evaluated_like_the_model(model):
    batch = collate(random_rows(LENGTHS), PLAN)
    ((_, expected),) = evaluate(model, [batch], compute_dtype=torch.float32)
    ((_, result),) = evaluate(Wrapper(model), [batch], compute_dtype=torch.float32)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.metrics["num_correct"], expected.metrics["num_correct"])


def test_the_normalizer_is_the_batchs_supervised_tokens_or_the_number_given(model):
    batch, own = run_step(model)
    own_gradients = gradients(model)
    _, given = run_step(model, normalizer=batch.num_supervised)
    assert torch.equal(own.loss, given.loss)
    _, doubled = run_step(model, normalizer=2 * batch.num_supervised)
    assert float(own.loss) == pytest.approx(2 * float(doubled.loss), rel=1e-6)
    halves = {name: 2 * gradient for name, gradient in gradients(model).items()}
    assert relative_difference(own_gradients, halves) < 1e-6
    assert torch.equal(own.metrics["num_correct"], doubled.metrics["num_correct"])


@pytest.mark.parametrize("packing", [True, False])
def test_every_label_of_a_collated_row_is_its_token_or_not_supervised(packing):
    plan = MicroBatchPlan(max_tokens=64, max_rows=2, packing=packing, longrope_boundary=None)
    for micro in collate(random_rows([5, 17, 30, 8], supervised_from=0), plan).micro_batches:
        labels = micro["labels"]
        assert ((labels == micro["input_ids"]) | (labels == -100)).all()
        assert (labels[micro["position_ids"] == 0] == -100).all()  # nothing predicts a document's first token
