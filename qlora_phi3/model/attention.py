"""Attention over documents laid end to end, one document at a time.

transformers' own SDPA path computes the whole square of a packed sequence under a [1, 1, S, S] mask: 64 MB at 8,192 tokens,
and no flash kernel on CUDA. Here each document is causal by itself: the same logits, no mask, the sum of the squares instead of
the square of the sum. On CPU (SmolLM2-135M, 800 tokens of 5 documents, torch 2.13) the masked square was a third of the step.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: Scores of one document up to which a CPU computes them at once in 16 bit: 32 MiB, 724 tokens of Phi-3-mini's 32 heads.
#: PyTorch 2.13's CPU flash kernel takes 5.7 ms forward and backward for 190 tokens (9 heads of 64, bf16, one Zen 5 core),
#: its math path 4.4, plain matmuls 1.5; at 800 tokens 34, 83 and 18.
CPU_SCORES_BYTES = 32 * 2**20


CPU_LENGTH_MULTIPLE = 32


#: The name under which transformers finds `attend_by_document`.
BY_DOCUMENT = "sdpa_by_document"


def register_attention() -> None:
    """Make `BY_DOCUMENT` known to transformers; without documents it is its plain "sdpa"."""
    AttentionInterface.register(BY_DOCUMENT, attend_by_document)
    AttentionMaskInterface.register(BY_DOCUMENT, sdpa_mask)


def attend_by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    document_lengths: tuple[int, ...] | None = None,
    window_masks: Mapping[int, Tensor] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA, document by document where `document_lengths` is given.

    Args:
        query, key, value: (1, heads, length, head_size); key and value may have fewer heads.
        attention_mask: used only where there are no documents (padded rows, generation).
        document_lengths: tokens of each document, in order, summing to length.
        window_masks: what `build_window_masks` made of them.
        sliding_window: known by the masks.

    Returns:
        (1, length, heads, head_size), and None for the attention weights.
    """
    if document_lengths is None:
        return _attend(module, query, key, value, attention_mask, **kwargs), None
    lengths = list(document_lengths)
    outputs = []
    split = (torch.split(tensor, lengths, 2) for tensor in (query, key, value))
    for one_query, one_key, one_value in zip(*split, strict=True):
        mask = (window_masks or {}).get(one_query.shape[2])
        if mask is None and _suits_matmul(one_query):
            outputs.append(_attend_by_matmul(one_query, one_key, one_value, scaling=kwargs["scaling"]))
        else:
            outputs.append(_attend(module, one_query, one_key, one_value, mask, **kwargs))
    return torch.cat(outputs, dim=1), None


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """transformers' SDPA; below compute capability 8.0 with the key and value heads repeated.

    There transformers 5.23 passes grouped queries on to torch 2.13, whose memory-efficient kernel takes none: the math path would
    build all scores in fp32. To be removed when it does (pytorch pull request 191085).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask is None and not _takes_groups(query.device):
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        output = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=kwargs.get("dropout", 0.0), is_causal=True, scale=kwargs["scaling"]
        )
        return output.transpose(1, 2).contiguous()
    attended: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    return attended


def _takes_groups(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _suits_matmul(query: Tensor) -> bool:
    scores_bytes = query.shape[1] * query.shape[2] ** 2 * query.element_size()
    return query.device.type == "cpu" and query.element_size() == 2 and scores_bytes <= CPU_SCORES_BYTES


def _attend_by_matmul(query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
    """Causal attention of one document as two batched matmuls; the queries that share a key head are stacked under it."""
    real_length = query.shape[2]
    # oneDNN keeps a compiled kernel for every shape it meets; causality hides the padding from the real queries.
    query, key, value = (pad(tensor, (0, 0, 0, -real_length % CPU_LENGTH_MULTIPLE)) for tensor in (query, key, value))
    heads, length, size = query.shape[1:]
    groups = heads // key.shape[1]
    future = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1).repeat(groups, 1)
    stacked = query[0].reshape(-1, groups * length, size)
    scores = torch.baddbmm(future.expand(len(stacked), -1, -1), stacked, key[0].transpose(1, 2), alpha=scaling)
    output = torch.softmax(scores, dim=-1, dtype=query.dtype) @ value[0]
    return output.reshape(1, heads, length, size)[:, :, :real_length].transpose(1, 2)


def build_window_masks(
    document_lengths: Iterable[int], window: int | None, *, device: torch.device, dtype: torch.dtype
) -> dict[int, Tensor]:
    """Length -> (1, 1, length, length) for the documents longer than the window: 0 where a position looks, else -inf.

    One for all layers, in the type of the scores: a boolean one would be turned into such a one, and kept, by every layer.
    """
    masks: dict[int, Tensor] = {}
    if window is None:
        return masks
    for length in {length for length in document_lengths if length > window}:
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        unseen = (distance < 0) | (distance >= window)
        masks[length] = torch.zeros(unseen.shape, device=device, dtype=dtype).masked_fill_(unseen, float("-inf"))[
            None, None
        ]
    return masks


def without_mask(device: torch.device) -> Tensor:
    """A 4-dimensional stand-in that transformers passes on as it is, so that it builds no mask of its own."""
    return torch.empty((1, 1, 1, 1), device=device)
