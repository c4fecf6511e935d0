"""Attention where the kernel takes no grouped queries."""

import torch
from torch import nn

import qlora_phi3.model.attention as attention


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
