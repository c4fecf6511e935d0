"""A decoder layer for training: transformers' mathematics with fewer passes over memory, and fewer tensors kept.

transformers' layer with PEFT's LoRA keeps 137 KiB a token for the backward pass (Phi-3-mini, 16 bit); this one keeps 68: the
layer's input 6, query, key and value 18, the attention's output 6, the residual after it 6, gate and up 32. What is cheap is
computed again: the norm's output from its input and one scalar a token, SwiGLU from gate and up. Parameters, state dict and
adapters are transformers' and PEFT's. Without gradients or with a cache, and for every part that is not plain (`read_lora`,
`_is_plain_norm`), their own code runs.

The backward pass of SwiGLU overwrites gate and up: a second one over the same graph raises torch's error about tensors that were
modified in place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm

from qlora_phi3.model.attention import BY_DOCUMENT

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class LinearWithLora:
    """A frozen linear layer and its one active adapter: base(x) + scaling * B(A(x))."""

    base: nn.Linear
    lora_A: Tensor  #: (r, in_features)
    lora_B: Tensor  #: (out_features, r)
    scaling: float

    def dequantize(self) -> Tensor:
        """The base's weight, (out_features, in_features)."""
        weight = self.base.weight
        state = getattr(weight, "quant_state", None)
        return weight if state is None else bnb.functional.dequantize_4bit(weight.data, state)

    def forward(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """(..., in_features) -> the output (..., out_features), and the scaled low-rank product (tokens, r).

        `lora_A`, `lora_B`: the adapter in the dtype of `x`.
        """
        low_rank = _scaled_product(self.scaling, x.flatten(0, -2), lora_A.t())
        output = self.base(x)
        output.flatten(0, -2).addmm_(low_rank, lora_B.t())
        return output, low_rank

    def backward(self, grad: Tensor, lora_A: Tensor, lora_B: Tensor, *, wants_input: bool = True) -> tuple[Tensor, Tensor | None]:
        """The gradients (tokens, r) of the product with A, and (tokens, in_features) of the input; `grad` is 2-dimensional."""
        low_rank = _scaled_product(self.scaling, grad, lora_B)
        return low_rank, torch.mm(grad, self.dequantize()).addmm_(low_rank, lora_A) if wants_input else None


def read_lora(layer: Any) -> LinearWithLora | None:
    """The parts of a layer with one plain adapter, active and not merged; None with dropout, DoRA, or a bias of the adapter."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    base, (adapter,) = layer.get_base_layer(), layer.active_adapters
    if (
        not isinstance(base, nn.Linear)
        or adapter not in layer.lora_A
        or adapter in layer.lora_variant
        or not isinstance(layer.lora_dropout[adapter], nn.Identity)
        or layer.lora_B[adapter].bias is not None
    ):
        return None
    return LinearWithLora(base, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])


class LeanDecoderLayer(Phi3DecoderLayer):  # type: ignore[misc]
    """Phi-3's decoder layer; `mlp_tile_tokens` computes norm and MLP in tiles of so many tokens, 0 untiled.

    The MLP's inner tensors are the widest of a layer. In tiles, each recomputed in its own backward pass, they exist for one tile
    at a time.
    """

    mlp_tile_tokens = 0

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(rows, length, hidden_size) -> same shape and dtype; arguments as transformers'."""
        x = hidden_states
        is_lean = torch.is_grad_enabled() and past_key_values is None and self.config.resid_pdrop == 0
        if is_lean and self.config._attn_implementation == BY_DOCUMENT and position_embeddings is not None:
            x = self._attend(x, attention_mask, position_embeddings, **kwargs)
        else:
            attended = self.self_attn(
                hidden_states=self.input_layernorm(x),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            x = x + self.resid_attn_dropout(attended[0])
        is_recomputed = self.gradient_checkpointing and self.training
        if not self.mlp_tile_tokens:
            return self._transform(x, is_lean=is_lean, is_recomputed=is_recomputed)
        compute: Callable[[Tensor], Tensor] = partial(self._transform, is_lean=is_lean, is_recomputed=True)
        if is_recomputed and _is_in_backward():
            compute = torch.empty_like  # every tile is recomputed by itself, from its input: nothing reads the layer's output
        tiles = torch.split(x.flatten(0, 1), self.mlp_tile_tokens)
        return torch.cat([checkpoint(compute, tile, use_reentrant=False) for tile in tiles]).view_as(x)

    def _attend(self, x: Tensor, mask: Tensor | None, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
        """x + attention(norm(x)), (rows, length, hidden_size)."""
        attention, norm = self.self_attn, self.input_layernorm
        loras = _read_loras(x, attention.qkv_proj, attention.o_proj) if _is_plain_norm(norm, x) else None
        if loras is None:
            qkv = attention.qkv_proj(_normalize(norm, x))
        else:
            qkv = _NormedProjection.apply(x, norm.weight, norm.variance_epsilon, *loras[0])  # type: ignore[no-untyped-call]
        heads = (self.config.num_attention_heads, self.config.num_key_value_heads, attention.head_dim)
        query, key, value = _Rotation.apply(qkv, *position_embeddings, heads)  # type: ignore[no-untyped-call]
        attended, _ = ALL_ATTENTION_FUNCTIONS[BY_DOCUMENT](
            attention,
            query,
            key,
            value,
            mask,
            dropout=attention.attention_dropout if self.training else 0.0,
            scaling=attention.scaling,
            sliding_window=getattr(self.config, "sliding_window", None),
            **kwargs,
        )
        attended = attended.reshape(*x.shape[:-1], -1)
        if loras is None:
            return cast(Tensor, x + attention.o_proj(attended))
        return cast(Tensor, _AddedProjection.apply(attended, x, *loras[1]))  # type: ignore[no-untyped-call]

    def _transform(self, x: Tensor, *, is_lean: bool, is_recomputed: bool) -> Tensor:
        """x + mlp(norm(x)), (..., hidden_size). `is_recomputed`: in the backward pass, from x."""
        mlp, norm = self.mlp, self.post_attention_layernorm
        if not is_lean or self.config.hidden_act != "silu":
            return cast(Tensor, x + self.resid_mlp_dropout(mlp(norm(x))))
        loras = _read_loras(x, mlp.gate_up_proj, mlp.down_proj) if _is_plain_norm(norm, x) else None
        if loras is None:
            product = _SwiGlu.apply(mlp.gate_up_proj(_normalize(norm, x)))  # type: ignore[no-untyped-call]
            return cast(Tensor, x + mlp.down_proj(product))
        gate_up = _NormedProjection.apply(x, norm.weight, norm.variance_epsilon, *loras[0])  # type: ignore[no-untyped-call]
        return cast(Tensor, _GatedProjection.apply(gate_up, x, is_recomputed, *loras[1]))  # type: ignore[no-untyped-call]


def _is_plain_norm(norm: nn.Module, x: Tensor) -> bool:
    return type(norm) is Phi3RMSNorm and not norm.weight.requires_grad and norm.weight.dtype == x.dtype


def _normalize(norm: nn.Module, x: Tensor) -> Tensor:
    if not _is_plain_norm(norm, x):
        return cast(Tensor, norm(x))
    return cast(Tensor, _RmsNorm.apply(x, norm.weight, norm.variance_epsilon))  # type: ignore[no-untyped-call]


def _read_loras(x: Tensor, *layers: nn.Module) -> list[tuple[LinearWithLora, Tensor, Tensor]] | None:
    """The layers' parts, with A and B in the dtype of `x`, if all have a plain adapter and compute in that dtype."""
    kind = x.device.type
    is_autocast = torch.is_autocast_enabled(kind)
    if is_autocast and torch.get_autocast_dtype(kind) != x.dtype:
        return None
    found: list[LinearWithLora] = []
    for layer in layers:
        lora = read_lora(layer)
        if lora is None or lora.base.bias is not None or lora.base.weight.requires_grad:
            return None
        state = getattr(lora.base.weight, "quant_state", None)
        if (lora.base.weight if state is None else state).dtype != x.dtype or not (is_autocast or lora.lora_A.dtype == x.dtype):
            return None
        found.append(lora)
    weights = [weight for lora in found for weight in (lora.lora_A, lora.lora_B)]
    if any(weight.dtype != x.dtype for weight in weights):
        weights = _Cast.apply(x.dtype, *weights)  # type: ignore[no-untyped-call]
    return list(zip(found, weights[::2], weights[1::2], strict=True))


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks


def _scaled_product(scale: float, first: Tensor, second: Tensor) -> Tensor:
    """scale * first @ second in one kernel."""
    return first.new_empty((first.shape[0], second.shape[1])).addmm_(first, second, beta=0, alpha=scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight, (..., size) in the dtype of `x`, and 1 / rms(x), (..., 1) fp32.

    The memory simulation replaces this function and the next.
    """
    if x.is_cuda:
        normed, scale = _aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
        return normed, scale
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale if wide is x else wide.mul_(scale)).mul_(weight).to(x.dtype), scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x, in the dtype of `grad`; `scale` as `rms_norm` returns it."""
    if x.is_cuda:
        return cast(Tensor, _aten._fused_rms_norm_backward(grad, x, [x.shape[-1]], scale, weight, [True, False])[0])
    wide, wide_grad = x.float(), grad.float()
    wide_grad = wide_grad * weight if wide_grad is grad else wide_grad.mul_(weight)
    along = (wide_grad * wide).sum(-1, keepdim=True).mul_(scale**3).div_(x.shape[-1])
    return wide_grad.mul_(scale).addcmul_(wide, along, value=-1).to(grad.dtype)


class _Cast(Function):
    """Tensors in another dtype, and their gradients back, in one kernel each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [weight.dtype for weight in weights]
        copies = tuple(torch.empty_like(weight, dtype=dtype) for weight in weights)
        torch._foreach_copy_(copies, weights)
        return copies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        copies = tuple(torch.empty_like(grad, dtype=dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
        torch._foreach_copy_(copies, grads)
        return None, *copies


class _RmsNorm(Function):
    """`rms_norm` that keeps its input, and one scalar a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        return rms_norm_backward(grad, x, weight, scale), None, None


class _NormedProjection(Function):
    """lora(norm(x)), (..., hidden_size) -> (..., out_features). Keeps x.

    A's gradient is g^T norm(x) = (g / rms(x))^T x * weight, which does not need the norm's output.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, lora: LinearWithLora, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        normed, scale = rms_norm(x, weight, eps)
        output, low_rank = lora.forward(normed, lora_A, lora_B)
        ctx.lora = lora
        ctx.save_for_backward(x, weight, scale, lora_A, lora_B, low_rank)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, lora_A, lora_B, low_rank = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_low, grad_normed = ctx.lora.backward(grad, lora_A, lora_B, wants_input=ctx.needs_input_grad[0])
        grad_b = torch.mm(grad.t(), low_rank)
        grad_a = torch.mm(grad_low.mul_(scale.flatten(0, -2)).t(), x.flatten(0, -2)).mul_(weight)
        grad_x = None if grad_normed is None else rms_norm_backward(grad_normed.view_as(x), x, weight, scale)
        return grad_x, None, None, None, grad_a, grad_b


class _AddedProjection(Function):
    """residual + lora(x), (..., in_features) -> (..., out_features). Keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, lora: LinearWithLora, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        output, low_rank = lora.forward(x, lora_A, lora_B)
        ctx.lora = lora
        ctx.save_for_backward(x, lora_A, lora_B, low_rank)
        return output.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, low_rank = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_low, grad_x = ctx.lora.backward(rows, lora_A, lora_B)
        grad_a, grad_b = torch.mm(grad_low.t(), x.flatten(0, -2)), torch.mm(rows.t(), low_rank)
        return grad_x.view_as(x), grad, None, grad_a, grad_b


def _swiglu_backward(grad: Tensor, gate_up: Tensor, activated: Tensor, buffer: Tensor) -> Tensor:
    """Overwrite `gate_up` with its gradient. `activated`: silu(gate); `buffer`: of its shape, overwritten."""
    gate, up = gate_up.chunk(2, -1)
    torch.mul(grad, up, out=buffer)
    torch.mul(grad, activated, out=up)
    _aten.silu_backward.grad_input(buffer, gate, grad_input=gate)
    return gate_up


class _SwiGlu(Function):
    """silu(gate) * up, (..., 2 x intermediate_size) -> (..., intermediate_size). Keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up = ctx.saved_tensors[0].detach()
        activated = silu(gate_up.chunk(2, -1)[0])
        return _swiglu_backward(grad, gate_up, activated, torch.empty_like(activated))


class _GatedProjection(Function):
    """residual + lora(silu(gate) * up), (..., 2 x intermediate_size) -> (..., hidden_size). Keeps gate and up.

    While it is recomputed it computes nothing: its output is the layer's, which nothing reads in a backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, residual: Tensor, is_recomputed: bool, lora: LinearWithLora, lora_A: Tensor, lora_B: Tensor
    ) -> Tensor:
        ctx.lora = lora
        if is_recomputed and _is_in_backward():
            ctx.save_for_backward(gate_up, lora_A, lora_B)
            return torch.empty_like(residual)
        gate, up = gate_up.chunk(2, -1)
        output, low_rank = lora.forward(silu(gate).mul_(up), lora_A, lora_B)
        ctx.save_for_backward(gate_up, lora_A, lora_B, *(() if is_recomputed else (low_rank,)))
        return output.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, lora_A, lora_B, *low_ranks = ctx.saved_tensors
        gate_up, rows = gate_up.detach(), grad.flatten(0, -2)
        grad_low, grad_product = ctx.lora.backward(rows, lora_A, lora_B)
        gate, up = gate_up.chunk(2, -1)
        activated = silu(gate)
        product = activated * up
        (low_rank,) = low_ranks or (_scaled_product(ctx.lora.scaling, product.flatten(0, -2), lora_A.t()),)
        grad_a, grad_b = torch.mm(grad_low.t(), product.flatten(0, -2)), torch.mm(rows.t(), low_rank)
        grad_gate_up = _swiglu_backward(grad_product.view_as(product), gate_up, activated, product)
        return grad_gate_up, grad, None, None, grad_a, grad_b


class _Rotation(Function):
    """Rotary embedding, in place.

    (rows, length, (heads + 2 x key_value_heads) x head_size) -> query, key, value, each (rows, its heads, length, head_size).
    cos, sin: (rows or 1, length, rotated size), whose two halves are alike. Keeps nothing else.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.heads = (num_heads, num_kv_heads, size) = heads
        parts = qkv.detach().view(*qkv.shape[:2], -1, size)
        half = cos.shape[-1] // 2
        cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
        first, second = parts[:, :, : num_heads + num_kv_heads, : 2 * half].chunk(2, -1)
        shift = first * sin
        first.mul_(cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).add_(shift)
        return tuple(part.transpose(1, 2) for part in torch.split(parts, [num_heads, num_kv_heads, num_kv_heads], 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (cos, sin), (num_heads, num_kv_heads, size) = ctx.saved_tensors, ctx.heads
        half = cos.shape[-1] // 2
        cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
        grad_query, grad_key, grad_value = (grad.transpose(1, 2) for grad in grads)
        rows, length = grad_query.shape[:2]
        result = grad_query.new_empty((rows, length, num_heads + 2 * num_kv_heads, size))
        query, key, value = torch.split(result, [num_heads, num_kv_heads, num_kv_heads], 2)
        for grad, target in ((grad_query, query), (grad_key, key)):
            first, second = grad[..., : 2 * half].chunk(2, -1)
            target_first, target_second = target[..., : 2 * half].chunk(2, -1)
            torch.mul(first, cos, out=target_first).addcmul_(second, sin)
            torch.mul(second, cos, out=target_second).addcmul_(first, sin, value=-1)
            target[..., 2 * half :] = grad[..., 2 * half :]
        value.copy_(grad_value)
        return result.flatten(2), None, None, None
