"""Where the CUDA path parts from the CPU path: stand-ins that allocate what the CUDA kernels do, on any machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers.modeling_utils
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import qlora_phi3.attention
from qlora_phi3.memory.meter import Meter
from qlora_phi3.memory.workspaces import attention_backward_bytes, attention_kernel, matmul_workspace_bytes


@contextmanager
def following_cuda(meter: Meter, *, compute_dtype: torch.dtype, capability: tuple[int, int]) -> Iterator[None]:
    """Run the CUDA path on fake CPU tensors: its kernels for attention and dropout, its offloading, its workspaces."""
    meter.hold(matmul_workspace_bytes(capability), "cuBLAS workspace")
    with (
        _replaced(qlora_phi3.attention, "CPU_SCORES_BYTES", 0),
        _replaced(qlora_phi3.attention, "_takes_groups", lambda _: capability >= (8, 0)),
        _replaced(transformers.modeling_utils, "save_on_cpu", _offloading_to(meter)),
        _replaced(functional, "scaled_dot_product_attention", _attention_on(meter, capability)),
        _replaced(functional, "dropout", _dropout),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    usual = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, usual)


def _offloading_to(meter: Meter) -> Any:
    """`save_on_cpu` whose copies lie on the meter's host side."""

    def pack(tensor: Tensor) -> Tensor:
        with meter.on_host():
            return torch.empty_like(tensor)

    return lambda **_: saved_tensors_hooks(pack, torch.empty_like)


def _attention_on(meter: Meter, capability: tuple[int, int]) -> Callable[..., Tensor]:
    """`scaled_dot_product_attention` as CUDA's kernels allocate it."""
    usual = functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
        kernel = attention_kernel(
            capability,
            has_mask=attn_mask is not None,
            head_size=query.shape[-1],
            grouped=key.shape[1] != query.shape[1],
            dtype=str(query.dtype).removeprefix("torch."),
        )
        if kernel == "math":
            with sdpa_kernel(SDPBackend.MATH):
                return usual(query, key, value, attn_mask, **settings)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            with meter.belonging_to("attention mask"):
                attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype)  # added to the scores, in their type
        meter.tag(attn_mask, "attention mask")
        result: Tensor = _FusedAttention.apply(query, key, value, attn_mask, kernel, meter)  # type: ignore[no-untyped-call]
        return result

    return attend


def _dropout(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA's keeps one byte an element for the backward pass; the CPU's keeps the scaled mask."""
    return torch.native_dropout(values, p, True)[0] if training and p else values


class _FusedAttention(torch.autograd.Function):
    """What a flash or memory-efficient kernel leaves behind, and what its backward takes for a moment."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kernel: str, meter: Meter
    ) -> Tensor:
        batch, heads, length, size = query.shape
        output = torch.empty((batch, length, heads, size), dtype=query.dtype).transpose(1, 2)
        log_sum = torch.empty((batch, heads, length))
        ctx.save_for_backward(query, key, value, output, log_sum, mask)
        ctx.kernel, ctx.meter = kernel, meter
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        workspace = attention_backward_bytes(
            ctx.kernel, tuple(query.shape), kv_heads=key.shape[1], itemsize=query.element_size()
        )
        release = ctx.meter.hold(workspace, "attention workspace")
        gradients = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        release()
        return *gradients, None, None, None
