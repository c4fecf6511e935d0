"""Attention where the kernel takes no grouped queries, and where one kernel takes a pack."""

import pytest
import torch
from tiny_model import gradients, load_tiny, random_rows, relative_difference, save_tiny_model
from torch import nn

import qlora_phi3.model.attention as attention
import qlora_phi3.model.phi3 as phi3
from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.step import collate, forward_backward


def test_repeated_heads_attend_like_grouped_ones(monkeypatch):
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 20, 16, generator=generator) for heads in (6, 2, 2))
    lengths = (7, 13)
    grouped, _ = attention.attend_by_document(module, query, key, value, None, lengths, scaling=0.25)
    monkeypatch.setattr(attention, "_takes_groups", lambda device: False)
    repeated, _ = attention.attend_by_document(module, query, key, value, None, lengths, scaling=0.25)
    torch.testing.assert_close(repeated, grouped)


def test_one_query_with_a_cache_attends_to_every_key_where_heads_are_repeated(monkeypatch):
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 6, 1, 16, generator=generator)
    key, value = (torch.randn(1, 2, 20, 16, generator=generator) for _ in range(2))
    grouped, _ = attention.attend_by_document(module, query, key, value, None, scaling=0.25)
    monkeypatch.setattr(attention, "_takes_groups", lambda device: False)
    repeated, _ = attention.attend_by_document(module, query, key, value, None, scaling=0.25)
    torch.testing.assert_close(repeated, grouped)


def attend_to_pack(query, key, value, starts, lengths, scale, left):
    """What the flash kernel computes, by its documentation: query i of a document attends to its keys from i - left to i."""
    outputs = []
    groups = query.shape[1] // key.shape[1]
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        one_query, one_key, one_value = (tensor[begin:end].transpose(0, 1) for tensor in (query, key, value))
        one_key, one_value = (tensor.repeat_interleave(groups, 0) for tensor in (one_key, one_value))
        position = torch.arange(end - begin)
        distance = position[:, None] - position[None, :]
        hidden = (distance < 0) | ((distance > left) if left >= 0 else False)
        scores = (one_query @ one_key.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
        outputs.append((scores.softmax(-1) @ one_value).transpose(0, 1))
    assert [len(output) for output in outputs] == list(lengths)
    return torch.cat(outputs)


def forward(*inputs):
    return attend_to_pack(*inputs), torch.zeros(()), torch.zeros(()), torch.zeros(())


def backward(grad, saved, *settings):
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in saved[:3]]
        return torch.autograd.grad(attend_to_pack(*inputs, saved[3], *settings), inputs, grad)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("lengths", [[7, 61, 23, 40], [64]])
def test_one_kernel_for_a_pack_gives_the_gradients_of_one_document_at_a_time(tmp_path, monkeypatch, window, lengths):
    model = load_tiny(save_tiny_model(tmp_path, sliding_window=window)).train()
    plan = MicroBatchPlan(max_tokens=1024, max_rows=8, packing=True, longrope_boundary=None)
    calls = []

    def run():
        model.zero_grad()
        batch = collate(random_rows(lengths), plan)
        result = forward_backward(model, batch, compute_dtype=torch.float32, backward=torch.Tensor.backward)
        return float(result.loss), gradients(model)

    loss, expected = run()
    monkeypatch.setattr(phi3, "takes_packs", lambda *_: True)
    monkeypatch.setattr(attention, "attend_pack_forward", lambda *inputs: calls.append(inputs) or forward(*inputs))
    monkeypatch.setattr(attention, "attend_pack_backward", backward)
    pack_loss, found = run()
    # one kernel a layer, but for a single document without a window, which needs none of its own
    assert len(calls) == (0 if lengths == [64] and window is None else model.config.num_hidden_layers)
    assert pack_loss == pytest.approx(loss, rel=1e-6)
    assert relative_difference(expected, found) < 1e-5


def test_the_kernel_for_packs_is_taken_on_a_gpu_in_16_bit_alone(monkeypatch):
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert not attention.takes_packs(gpu, torch.bfloat16, 96)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert attention.takes_packs(gpu, torch.bfloat16, 96)
    assert not attention.takes_packs(cpu, torch.bfloat16, 96)
    assert not attention.takes_packs(gpu, torch.float32, 96)
    assert not attention.takes_packs(gpu, torch.bfloat16, 256)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not attention.takes_packs(gpu, torch.float16, 96)
