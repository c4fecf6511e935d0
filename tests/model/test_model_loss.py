"""Losses in tiles are the losses on the full logits, and the full logits never exist."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from qlora_phi3.model.loss import select_supervised, tiled_cross_entropy


def sample(dtype=torch.float64, positions=37, hidden=16, vocab=50):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(positions, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (positions,), generator=generator)
    return states, weight, targets


@pytest.mark.parametrize("tile_rows", [1, 5, 37, 1000])
def test_loss_and_gradients_equal_full_cross_entropy_for_every_tile_size(tile_rows):
    states, weight, targets = sample(torch.float32)
    loss, correct = tiled_cross_entropy(states, weight, targets, normalizer=37, tile_bytes=tile_rows * 4 * len(weight))
    loss.backward()
    ours = states.grad.clone(), weight.grad.clone()
    states.grad = weight.grad = None
    logits = states @ weight.T
    expected = cross_entropy(logits, targets)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(ours[0], states.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours[1], weight.grad, rtol=1e-5, atol=1e-7)
    assert int(correct) == int((logits.argmax(-1) == targets).sum())


def test_loss_of_two_tokens_worked_out_by_hand():
    # logits (0, 0) and (ln 3, 0): probabilities 1/2 and 3/4 for token 0
    weight = torch.tensor([[1.0], [0.0]])
    states = torch.tensor([[0.0], [1.0986123]])
    loss, correct = tiled_cross_entropy(states, weight, torch.tensor([0, 0]), normalizer=2)
    assert float(loss) == pytest.approx((0.6931472 + 0.2876821) / 2, abs=1e-6)
    assert int(correct) == 2


def test_the_normalizer_divides_loss_and_gradient():
    states, weight, targets = sample(torch.float32)
    undivided, _ = tiled_cross_entropy(states, weight, targets, normalizer=1)
    (gradient,) = torch.autograd.grad(undivided, states)
    tenth, _ = tiled_cross_entropy(states, weight, targets, normalizer=10)
    (smaller,) = torch.autograd.grad(tenth, states)
    assert float(undivided) == pytest.approx(10 * float(tenth), rel=1e-6)
    torch.testing.assert_close(gradient, 10 * smaller)


def test_a_loss_scale_as_for_fp16_reaches_the_gradient_before_it_is_rounded():
    # 1e5 tokens in the normalizer: most gradients are below fp16's smallest number until the scale is applied
    states, weight, targets = sample(torch.float16)
    loss, _ = tiled_cross_entropy(states, weight, targets, normalizer=1e5)
    (scaled,) = torch.autograd.grad(loss * 65536, states)
    reference = states.detach().float().requires_grad_()
    expected, _ = tiled_cross_entropy(reference, weight.float(), targets, normalizer=1e5)
    (true,) = torch.autograd.grad(expected * 65536, reference)
    assert float((scaled.float() - true).norm() / true.norm()) < 5e-3


def test_no_gradient_is_computed_under_no_grad():
    states, weight, targets = sample(torch.float32)
    with torch.no_grad():
        loss, _ = tiled_cross_entropy(states, weight, targets, normalizer=37)
    assert not loss.requires_grad


def test_no_tensor_of_all_logits_is_ever_alive():
    states, weight, targets = sample(torch.float32, positions=4096, hidden=8, vocab=512)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss, _ = tiled_cross_entropy(states, weight, targets, normalizer=1, tile_bytes=64 * 4 * 512)
        loss.backward()
    largest = max(event.cpu_memory_usage / event.count for event in profile.key_averages())
    assert largest < 4096 * 512 * 4 / 8


def test_the_state_before_a_supervised_token_predicts_it():
    hidden = torch.arange(5.0).reshape(1, 5, 1)
    labels = torch.tensor([[-100, 11, -100, -100, 14]])
    states, targets = select_supervised(hidden, labels)
    assert states.flatten().tolist() == [0.0, 3.0]
    assert targets.tolist() == [11, 14]
