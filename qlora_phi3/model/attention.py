"""Causal attention over packed documents: in one kernel where a GPU has one for it, else one document at a time.

transformers' SDPA attention computes the complete square of a packed sequence under a [1, 1, S, S] mask: 64 MB at 8,192 tokens,
and no flash kernel on CUDA. Attention for each document alone gives the same logits without a mask and without the blocks between
documents. On CPU (SmolLM2-135M, 800 tokens of 5 documents, torch 2.13) the masked square took a third of the step.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: The name under which `register_attention` registers `attend_by_document`.
BY_DOCUMENT = "sdpa_by_document"
#: Largest size of one document's scores for which a CPU uses plain matmuls in 16 bit: 32 MiB, 724 tokens of Phi-3-mini's 32
#: heads. PyTorch 2.13's CPU flash kernel takes 5.7 ms forward and backward for 190 tokens (9 heads of 64, bf16, one Zen 5 core),
#: its math path 4.4, plain matmuls 1.5; at 800 tokens 34, 83 and 18.
CPU_SCORES_BYTES = 32 * 2**20
#: Lengths are padded to a multiple of this for the plain matmuls: oneDNN caches a compiled kernel for every shape.
CPU_LENGTH_MULTIPLE = 32
#: Attention's fused kernels, whose time grows with the square of a document's length.
FUSED_KERNELS = {
    torch.ops.aten._flash_attention_forward.default, torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}  # fmt: skip


def register_attention() -> None:
    """Register `BY_DOCUMENT` with transformers. Without document lengths it behaves as transformers' "sdpa"."""
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
    document_starts: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute SDPA, separately for each document if `document_lengths` is given; with `document_starts` in one kernel.

    Args:
        query: (1, heads, length, head_size), in the dtype of the forward pass.
        key, value: (1, key_value_heads, length, head_size), same dtype; key_value_heads divides heads.
        attention_mask: used only without documents (padded rows, generation).
        document_lengths: tokens of each document, in order; they sum to length.
        window_masks: the result of `build_window_masks`.
        document_starts: (documents + 1,) int32, where `takes_packs` says so; `sliding_window` then decides, and no mask.
        kwargs: `scaling`, `dropout`, and what transformers' SDPA ignores, such as `sliding_window`.

    Returns:
        The attention output (1, length, heads, head_size) in the dtype of `query`, and None for the attention weights.
    """
    if document_lengths is None:
        return _attend(module, query, key, value, attention_mask, **kwargs), None
    if document_starts is not None:
        window = kwargs.get("sliding_window")
        return _attend_pack(query, key, value, document_starts, document_lengths, kwargs["scaling"], window), None
    outputs = []
    is_whole = len(document_lengths) == 1  # no split, whose backward pass copies three gradients, and no concatenation
    parts = [(tensor,) if is_whole else torch.split(tensor, list(document_lengths), 2) for tensor in (query, key, value)]
    for one_query, one_key, one_value in zip(*parts, strict=True):
        heads, length = one_query.shape[1:3]
        mask = (window_masks or {}).get(length)
        is_16_bit_on_cpu = one_query.device.type == "cpu" and one_query.element_size() == 2
        if mask is None and is_16_bit_on_cpu and heads * length**2 * 2 <= CPU_SCORES_BYTES:
            outputs.append(_attend_by_matmul(one_query, one_key, one_value, scaling=kwargs["scaling"]))
        else:
            outputs.append(_attend(module, one_query, one_key, one_value, mask, **kwargs))
    return outputs[0] if is_whole else torch.cat(outputs, dim=1), None


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """transformers' SDPA; with repeated key and value heads where the flash kernel cannot run: in fp32, and on older GPUs.

    There transformers 5.23 passes grouped queries to torch 2.13, whose memory-efficient kernel does not support them, so that the
    math path builds all scores in fp32. torch 2.14 supports them (pytorch pull request 191085): remove this with torch 2.13.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask is None and not _takes_groups(query):
        key, value = (tensor[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for tensor in (key, value))
        is_causal = query.shape[2] > 1  # one query with a cache attends to every key
        dropout, scaling = kwargs.get("dropout", 0.0), kwargs["scaling"]
        output = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=is_causal, scale=scaling)
        return output.transpose(1, 2).contiguous()
    attended: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    return attended


def _takes_groups(query: Tensor) -> bool:
    """Whether SDPA has a kernel other than math for grouped queries. The memory simulation replaces this function."""
    is_16_bit = query.element_size() == 2 or torch.is_autocast_enabled("cuda")
    return query.device.type != "cuda" or (is_16_bit and torch.cuda.get_device_capability(query.device) >= (8, 0))


def takes_packs(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether the flash kernel can attend to packed documents (flash_attn/flash_api.cpp; of larger heads some GPUs have no
    backward pass), and this torch has it. The memory simulation replaces this function and the next two.
    """
    is_built = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    fits = dtype.itemsize == 2 and head_size <= 192
    return is_built and fits and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_pack_forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, lengths: tuple[int, ...], scale: float, left: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator below `torch.nn.attention.varlen_attn`, which would take cuDNN's kernel on some GPUs.

    Args:
        query: (tokens, heads, head_size), 16 bit.
        key, value: (tokens, key_value_heads, head_size), same dtype.
        starts: (documents + 1,) int32, the first token of each document, and the number of tokens.
        lengths: tokens of each document.
        left: most positions before its own that a token attends to; -1 for all.

    Returns:
        The output, as `query`; the logarithms of the sums (heads, tokens) fp32; and the state of a dropout that is not used.
    """
    inputs, longest = (query, key, value, starts, starts), max(lengths)
    output, log_sums, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        *inputs, longest, longest, 0.0, True, False, scale=scale, window_size_left=left, window_size_right=0
    )
    return output, log_sums, seed, offset


def attend_pack_backward(
    grad: Tensor, saved: tuple[Tensor, ...], lengths: tuple[int, ...], scale: float, left: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; `saved`: query, key, value, starts, and what the forward pass returns."""
    query, key, value, starts, output, log_sums, seed, offset = saved
    inputs, longest = (grad, query, key, value, output, log_sums, starts, starts), max(lengths)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        *inputs, longest, longest, 0.0, True, seed, offset, scale=scale, window_size_left=left, window_size_right=0
    )
    return grads


class _PackAttention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *settings: Any) -> Tensor:
        results = attend_pack_forward(query, key, value, starts, *settings)
        ctx.save_for_backward(query, key, value, starts, *results)
        ctx.settings = settings
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *attend_pack_backward(grad, ctx.saved_tensors, *ctx.settings), None, None, None, None


def _attend_pack(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, lengths: tuple[int, ...], scale: float, window: int | None
) -> Tensor:
    """As `attend_by_document`; the sliding window is the kernel's own."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))
    left = -1 if window is None or window >= max(lengths) else window - 1
    packs = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]  # an index would fill and copy its gradient
    output: Tensor = _PackAttention.apply(*packs, starts, lengths, scale, left)  # type: ignore[no-untyped-call]
    return output[None]


class KeptKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what the fused kernels return in a layer's forward pass for its recomputation; they must draw no random numbers.

    torch's `create_selective_checkpoint_contexts` does the same, but cannot offload: `hooks`, of `save_on_cpu`, do.
    """

    def __init__(self, hooks: Any = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._hooks = hooks
        #: Of each kernel, in their order, a function for each result that returns it.
        self._kept: list[list[Callable[[], Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, unless its results are kept."""
        kernel = partial(func, *args, **kwargs or {})
        return self.run(kernel) if func in FUSED_KERNELS else kernel()

    def run(self, kernel: Callable[[], Any]) -> Any:
        """The results of a kernel. The memory simulation calls it for those that it replaces."""
        if is_in_backward():
            return tuple(result() for result in self._kept.pop(0))
        results = kernel()
        self._kept.append([self._keep(result) for result in results])
        return results

    def _keep(self, result: Any) -> Callable[[], Any]:
        kept = result.detach() if isinstance(result, Tensor) else result  # without the history that autograd gives to the result
        if self._hooks is None or not isinstance(kept, Tensor) or kept.dim() < 2:
            return lambda: kept
        order = sorted(range(kept.dim()), key=kept.stride, reverse=True)  # as in memory: no copy on the GPU
        packed, unpack = self._hooks.pack_hook(kept.permute(order)), self._hooks.unpack_hook
        return lambda: unpack(packed).permute(sorted(range(len(order)), key=order.__getitem__))


def is_in_backward() -> bool:
    """Whether a backward pass runs in this thread, as torch.utils.checkpoint asks."""
    return torch._C._current_graph_task_id() != -1


def _attend_by_matmul(query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
    """Causal attention of one document as two batched matmuls; queries that share a key head are stacked."""
    real_length = query.shape[2]
    # The causal mask hides the padding from the real queries.
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
    """Build the sliding-window masks of the documents longer than the window, one for each length, shared by all layers.

    Args:
        window: tokens that a position can attend to; None for full attention.
        dtype: the dtype of the scores. Every layer would convert a boolean mask to it and store the result for the backward pass.

    Returns:
        length -> (1, 1, length, length) in `dtype`: 0 where a position attends, else -inf.
    """
    if window is None:
        return {}
    masks = {}
    for length in {length for length in document_lengths if length > window}:
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        mask = torch.zeros((1, 1, length, length), device=device, dtype=dtype)
        masks[length] = mask.masked_fill_((distance < 0) | (distance >= window), float("-inf"))
    return masks


def without_mask(device: torch.device) -> Tensor:
    """Build an empty fp32 (1, 1, 1, 1) mask: transformers passes a 4-dimensional mask on and builds none of its own."""
    return torch.empty((1, 1, 1, 1), device=device)
