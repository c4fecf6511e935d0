"""A decoder layer for training: transformers' mathematics with fewer passes over memory, and fewer tensors kept.

transformers' layer with PEFT's LoRA keeps 137 KiB a token for the backward pass (Phi-3-mini, 16 bit); this one keeps 68: the
layer's input 6, query, key and value 18, the attention's output 6, the residual after it 6, gate and up 32. What is cheap is
computed again: the norm's output from its input and one scalar a token, SwiGLU from gate and up. Dropout keeps its masks, 17 KiB;
DoRA keeps the outputs of its projections for the gradient of its magnitude, 30 KiB, as gate and up are kept anyway. Parameters,
state dict and adapters are transformers' and PEFT's. Without gradients or with a cache, and for every part that is not plain
(`read_lora`, `_is_plain_norm`), their own code runs.

Without DoRA the backward pass of SwiGLU overwrites gate and up: a second one over the same graph raises torch's error about
tensors that were modified in place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm

from qlora_phi3.model import kernels
from qlora_phi3.model.attention import BY_DOCUMENT, is_in_backward
from qlora_phi3.model.kernels import add_products, multiply, takes_onednn

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class LinearWithLora:
    """A frozen linear layer and its one active adapter: base(x) + scaling * B(A(x * mask)), times magnitude / norm with DoRA."""

    base: nn.Linear
    lora_A: Tensor  #: (r, in_features)
    lora_B: Tensor  #: (out_features, r)
    scaling: float  #: with that of dropout, 1 / (1 - dropout)
    dropout: float  #: 0 in eval mode
    magnitude: Tensor | None  #: of DoRA, (out_features,)
    row_squares: Tensor | None  #: of DoRA, (out_features,) fp32: `square_rows` of the base's weight

    def dequantize(self) -> Tensor:
        """The base's weight, (out_features, in_features)."""
        weight = self.base.weight
        state = getattr(weight, "quant_state", None)
        return weight if state is None else bnb.functional.dequantize_4bit(weight.data, state)

    def draw_masks(self, rows: int) -> list[Tensor]:
        """The mask of dropout, (rows, in_features) bool, if there is dropout."""
        shape = (rows, self.lora_A.shape[1])
        return [self.lora_A.new_empty(shape, dtype=torch.bool).bernoulli_(1 - self.dropout)] if self.dropout else []

    def forward(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(..., in_features) -> the output (..., out_features), the scaled low-rank product (tokens, r), and what the backward
        pass needs besides: dropout's mask; with DoRA the output, and the fp32 factor (out_features,) that it was multiplied by.

        `lora_A`, `lora_B`: the adapter in the dtype of `x`.
        """
        rows = x.flatten(0, -2)
        kept = self.draw_masks(rows.shape[0])
        low_rank = _scaled_product(self.scaling, self.mask(rows, kept), lora_A.t())
        if self.magnitude is None:
            output = multiply(x, self.dequantize().t()) if takes_onednn(x) else self.base(x)
            output.flatten(0, -2).addmm_(low_rank, lora_B.t())
            return output, low_rank, kept
        weight = self.dequantize()
        output = add_products(rows, weight.t(), low_rank, lora_B.t())
        factor = self.magnitude / self.row_norms(weight, lora_A, lora_B)
        output = torch.mul(output, factor, out=output).view(*x.shape[:-1], -1)
        return output, low_rank, [output, factor]

    def row_norms(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """The length of every row of W + s B A, (out_features,) fp32, without B A: |W|^2 + s (2 W A^T + s B A A^T) . B."""
        across = torch.mm(weight, lora_A.t()).addmm_(lora_B, torch.mm(lora_A, lora_A.t()), beta=2, alpha=self.scaling)
        return (across.float() * lora_B).sum(1).mul_(self.scaling).add_(cast(Tensor, self.row_squares)).sqrt_()

    def unscale(self, grad: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The gradients of the output before DoRA's factor, (tokens, out_features), and of the magnitude."""
        if self.magnitude is None:
            return grad, None
        output, factor = kept
        product = (grad.float() if grad.dtype == torch.float16 else grad) * output.flatten(0, -2)  # beyond fp16's range
        grad_magnitude = product.sum(0, dtype=torch.float32).div_(self.magnitude).to(self.magnitude.dtype)
        buffer = product if product.dtype == grad.dtype else torch.empty_like(grad)
        return torch.mul(grad, factor, out=buffer), grad_magnitude

    def backward(
        self, grad: Tensor, lora_A: Tensor, lora_B: Tensor, kept: list[Tensor], *, wants_input: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients (tokens, r) of the product with A, and (tokens, in_features) of the input; `grad` is of `unscale`."""
        low_rank = _scaled_product(self.scaling, grad, lora_B)
        if not wants_input:
            return low_rank, None
        if not self.dropout:
            return low_rank, add_products(grad, self.dequantize(), low_rank, lora_A)
        grad_x = self.mask(torch.mm(low_rank, lora_A), kept)
        by_onednn = takes_onednn(grad)
        return low_rank, grad_x.add_(multiply(grad, self.dequantize())) if by_onednn else grad_x.addmm_(grad, self.dequantize())

    def mask(self, rows: Tensor, kept: list[Tensor]) -> Tensor:
        """rows * the mask of dropout in one kernel, if there is dropout."""
        return cast(Tensor, _aten.native_dropout_backward(rows, kept[0], 1.0)) if self.dropout else rows


def read_lora(layer: Any) -> LinearWithLora | None:
    """The parts of a layer with one adapter, active and not merged; None with a bias of the adapter or DoRA with dropout."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    base, (adapter,) = layer.get_base_layer(), layer.active_adapters
    if not isinstance(base, nn.Linear) or adapter not in layer.lora_A or layer.lora_B[adapter].bias is not None:
        return None
    dropout, variant, magnitude = layer.lora_dropout[adapter], layer.lora_variant.get(adapter), None
    share = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
    if variant is not None:
        if not isinstance(dropout, nn.Identity) or not isinstance(variant, DoraLinearVariant):
            return None
        magnitude = layer.lora_magnitude_vector[adapter].weight
    weights = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return LinearWithLora(
        base, *weights, layer.scaling[adapter] / (1 - share), share, magnitude, getattr(layer, "row_squares", None)
    )


def square_rows(weight: Tensor) -> Tensor:
    """The sum of squares of every row, fp32."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    return norms.square_()


class LeanDecoderLayer(Phi3DecoderLayer):  # type: ignore[misc]
    """Phi-3's decoder layer; `mlp_tile_tokens` computes norm and MLP in tiles of so many tokens, 0 untiled; `fused_kernels` lets
    `kernels.py` compute SwiGLU and the rotary embedding.

    The MLP's inner tensors are the widest of a layer. In tiles, each recomputed in its own backward pass, they exist for one tile
    at a time.
    """

    mlp_tile_tokens, fused_kernels = 0, False

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
        if is_recomputed and is_in_backward():
            compute = torch.empty_like  # every tile is recomputed by itself, from its input: nothing reads the layer's output
        tiles = torch.split(x.flatten(0, 1), self.mlp_tile_tokens)
        return torch.cat([checkpoint(compute, tile, use_reentrant=False) for tile in tiles]).view_as(x)

    def _attend(self, x: Tensor, mask: Tensor | None, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
        """x + attention(norm(x)), (rows, length, hidden_size)."""
        attention, norm = self.self_attn, self.input_layernorm
        loras = read_loras(x, attention.qkv_proj, attention.o_proj) if _is_plain_norm(norm, x) else None
        if loras is None:
            qkv = attention.qkv_proj(_normalize(norm, x))
        else:
            qkv = _NormedProjection.apply(x, norm.weight, norm.variance_epsilon, *loras[0])  # type: ignore[no-untyped-call]
            qkv = qkv if loras[0][0].magnitude is None else qkv.clone()  # DoRA keeps it, and the rotation is in place
        heads = (self.config.num_attention_heads, self.config.num_key_value_heads, attention.head_dim)
        query, key, value = _Rotation.apply(qkv, *position_embeddings, heads, self.fused_kernels)  # type: ignore[no-untyped-call]
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
        loras = read_loras(x, mlp.gate_up_proj, mlp.down_proj) if _is_plain_norm(norm, x) else None
        if loras is None:
            product = _SwiGlu.apply(mlp.gate_up_proj(_normalize(norm, x)))  # type: ignore[no-untyped-call]
            return cast(Tensor, x + mlp.down_proj(product))
        gate_up = _NormedProjection.apply(x, norm.weight, norm.variance_epsilon, *loras[0])  # type: ignore[no-untyped-call]
        leaves_out = is_recomputed and loras[1][0].magnitude is None  # DoRA's magnitude needs the output
        return cast(Tensor, _GatedProjection.apply(gate_up, x, leaves_out, self.fused_kernels, *loras[1]))  # type: ignore[no-untyped-call]


def _is_plain_norm(norm: nn.Module, x: Tensor) -> bool:
    return type(norm) is Phi3RMSNorm and not norm.weight.requires_grad and norm.weight.dtype == x.dtype


def _normalize(norm: nn.Module, x: Tensor) -> Tensor:
    if not _is_plain_norm(norm, x):
        return cast(Tensor, norm(x))
    return cast(Tensor, _RmsNorm.apply(x, norm.weight, norm.variance_epsilon))  # type: ignore[no-untyped-call]


def read_loras(x: Tensor, *layers: nn.Module) -> list[tuple[LinearWithLora, Tensor, Tensor, Tensor | None]] | None:
    """The layers' parts, with A and B in the dtype of `x` and DoRA's magnitude, if all are read and have that dtype."""
    kind = x.device.type
    is_autocast = torch.is_autocast_enabled(kind)
    if is_autocast and torch.get_autocast_dtype(kind) != x.dtype:
        return None
    found: list[LinearWithLora] = []
    for layer in layers:
        lora = read_lora(layer)
        if lora is None or lora.base.bias is not None or lora.base.weight.requires_grad:
            return None
        if lora.magnitude is not None and (lora.row_squares is None or lora.row_squares.dtype != torch.float32):
            return None  # not attached by `attach_adapter`, or cast
        state = getattr(lora.base.weight, "quant_state", None)
        if (lora.base.weight if state is None else state).dtype != x.dtype or not (is_autocast or lora.lora_A.dtype == x.dtype):
            return None
        found.append(lora)
    weights = [weight for lora in found for weight in (lora.lora_A, lora.lora_B)]
    if any(weight.dtype != x.dtype for weight in weights):
        weights = _Cast.apply(x.dtype, *weights)  # type: ignore[no-untyped-call]
    return list(zip(found, weights[::2], weights[1::2], [lora.magnitude for lora in found], strict=True))


def _scaled_product(scale: float, first: Tensor, second: Tensor) -> Tensor:
    """scale * first @ second in one kernel."""
    if takes_onednn(first):
        return multiply(first, second).mul_(scale)
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
    """lora(norm(x)), (..., hidden_size) -> (..., out_features). Keeps x; with DoRA the output, which must not be overwritten.

    A's gradient is g^T norm(x) = (g / rms(x))^T x * weight, which does not need the norm's output.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, lora: LinearWithLora, lora_A: Tensor, lora_B: Tensor, _: Tensor | None
    ) -> Tensor:
        normed, scale = rms_norm(x, weight, eps)
        output, low_rank, kept = lora.forward(normed, lora_A, lora_B)
        ctx.lora = lora
        ctx.save_for_backward(x, weight, scale, lora_A, lora_B, low_rank, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, lora_A, lora_B, low_rank, *kept = ctx.saved_tensors
        grad, grad_magnitude = ctx.lora.unscale(grad.flatten(0, -2), kept)
        grad_low, grad_normed = ctx.lora.backward(grad, lora_A, lora_B, kept, wants_input=ctx.needs_input_grad[0])
        grad_b = torch.mm(low_rank.t(), grad).t() if takes_onednn(grad) else torch.mm(grad.t(), low_rank)
        grad_a = torch.mm(grad_low.mul_(scale.flatten(0, -2)).t(), ctx.lora.mask(x.flatten(0, -2), kept)).mul_(weight)
        grad_x = None if grad_normed is None else rms_norm_backward(grad_normed.view_as(x), x, weight, scale)
        return grad_x, None, None, None, grad_a, grad_b, grad_magnitude


class _AddedProjection(Function):
    """residual + lora(x), (..., in_features) -> (..., out_features). Keeps x; with DoRA the product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, lora: LinearWithLora, lora_A: Tensor, lora_B: Tensor, _: Tensor | None
    ) -> Tensor:
        output, low_rank, kept = lora.forward(x, lora_A, lora_B)
        ctx.lora = lora
        ctx.save_for_backward(x, lora_A, lora_B, low_rank, *kept)
        return output.add_(residual) if lora.magnitude is None else output + residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, low_rank, *kept = ctx.saved_tensors
        rows, grad_magnitude = ctx.lora.unscale(grad.flatten(0, -2), kept)
        grad_low, grad_x = ctx.lora.backward(rows, lora_A, lora_B, kept)
        grad_a, grad_b = torch.mm(grad_low.t(), ctx.lora.mask(x.flatten(0, -2), kept)), torch.mm(rows.t(), low_rank)
        return grad_x.view_as(x), grad, None, grad_a, grad_b, grad_magnitude


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate).mul_(up)


def _swiglu_backward(grad: Tensor, gate_up: Tensor, activated: Tensor, buffer: Tensor, *, overwrites: bool = True) -> Tensor:
    """The gradient of `gate_up`, which it overwrites. `activated`: silu(gate); `buffer`: of its shape, overwritten."""
    result = gate_up if overwrites else torch.empty_like(gate_up)
    (gate, up), (grad_gate, grad_up) = gate_up.chunk(2, -1), result.chunk(2, -1)
    torch.mul(grad, up, out=buffer)
    torch.mul(grad, activated, out=grad_up)
    _aten.silu_backward.grad_input(buffer, gate, grad_input=grad_gate)
    return result


class _SwiGlu(Function):
    """silu(gate) * up, (..., 2 x intermediate_size) -> (..., intermediate_size). Keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up = ctx.saved_tensors[0].detach()
        activated = silu(gate_up.chunk(2, -1)[0])
        return _swiglu_backward(grad, gate_up, activated, torch.empty_like(activated))


class _GatedProjection(Function):
    """residual + lora(silu(gate) * up), (..., 2 x intermediate_size) -> (..., hidden_size).

    Keeps gate and up; with DoRA the product.

    `leaves_out`: while it is recomputed it computes nothing but the mask of dropout. Its output is the layer's, which nothing
    reads in a backward pass. `fused`: with `kernels.py`, whose backward pass leaves the product in the memory of its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Tensor,
        residual: Tensor,
        leaves_out: bool,
        fused: bool,
        lora: LinearWithLora,
        lora_A: Tensor,
        lora_B: Tensor,
        _: Tensor | None,
    ) -> Tensor:
        ctx.lora, ctx.leaves_out, ctx.fused = lora, leaves_out, fused
        if leaves_out and is_in_backward():
            ctx.save_for_backward(gate_up, lora_A, lora_B, *lora.draw_masks(gate_up.shape[:-1].numel()))
            return torch.empty_like(residual)
        output, low_rank, kept = lora.forward(kernels.swiglu(gate_up) if fused else _swiglu(gate_up), lora_A, lora_B)
        ctx.save_for_backward(gate_up, lora_A, lora_B, *kept, *(() if leaves_out else (low_rank,)))
        return output.add_(residual) if lora.magnitude is None else output + residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, lora_A, lora_B, *kept = ctx.saved_tensors
        low_rank = None if ctx.leaves_out else kept.pop()
        rows, grad_magnitude = ctx.lora.unscale(grad.flatten(0, -2), kept)
        grad_low, grad_product = ctx.lora.backward(rows, lora_A, lora_B, kept)
        gate_up, overwrites = gate_up.detach(), grad_magnitude is None
        if ctx.fused:
            grad_gate_up, product = gate_up if overwrites else torch.empty_like(gate_up), grad_product
            kernels.swiglu_backward(grad_product, gate_up.flatten(0, -2), grad_gate_up.flatten(0, -2))
        else:
            gate, up = gate_up.chunk(2, -1)
            activated = silu(gate)
            product = activated * up
        dropped = ctx.lora.mask(product.flatten(0, -2), kept)
        if low_rank is None:
            low_rank = _scaled_product(ctx.lora.scaling, dropped, lora_A.t())
        grad_a, grad_b = torch.mm(grad_low.t(), dropped), torch.mm(rows.t(), low_rank)
        del dropped
        if not ctx.fused:
            grad_gate_up = _swiglu_backward(grad_product.view_as(product), gate_up, activated, product, overwrites=overwrites)
        return grad_gate_up, grad, None, None, None, grad_a, grad_b, grad_magnitude


class _Rotation(Function):
    """Rotary embedding, in place.

    (rows, length, (heads + 2 x key_value_heads) x head_size) -> query, key, value, each (rows, its heads, length, head_size).
    cos, sin: (rows or 1, length, rotated size), whose two halves are alike. Keeps nothing else.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int], fused: bool) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.fused = heads, fused
        num_heads, num_kv_heads, size = heads
        parts = qkv.detach().view(*qkv.shape[:2], -1, size)
        rotated = parts[:, :, : num_heads + num_kv_heads, : cos.shape[-1]]
        if fused:
            kernels.rotate(rotated, cos, sin, rotated)
        else:
            half = cos.shape[-1] // 2
            cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
            first, second = rotated.chunk(2, -1)
            shift = first * sin
            first.mul_(cos).addcmul_(second, sin, value=-1)
            second.mul_(cos).add_(shift)
        return tuple(part.transpose(1, 2) for part in torch.split(parts, [num_heads, num_kv_heads, num_kv_heads], 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (cos, sin), (num_heads, num_kv_heads, size) = ctx.saved_tensors, ctx.heads
        width, half = cos.shape[-1], cos.shape[-1] // 2
        grad_query, grad_key, grad_value = (grad.transpose(1, 2) for grad in grads)
        rows, length = grad_query.shape[:2]
        result = grad_query.new_empty((rows, length, num_heads + 2 * num_kv_heads, size))
        query, key, value = torch.split(result, [num_heads, num_kv_heads, num_kv_heads], 2)
        for grad, target in ((grad_query, query), (grad_key, key)):
            if ctx.fused:
                kernels.rotate(grad[..., :width], cos, sin, target[..., :width], inverse=True)
            else:
                half_cos, half_sin = cos[:, :, None, :half], sin[:, :, None, :half]
                first, second = grad[..., :width].chunk(2, -1)
                target_first, target_second = target[..., :width].chunk(2, -1)
                torch.mul(first, half_cos, out=target_first).addcmul_(second, half_sin)
                torch.mul(second, half_cos, out=target_second).addcmul_(first, half_sin, value=-1)
            if width < size:
                target[..., width:] = grad[..., width:]
        value.copy_(grad_value)
        return result.flatten(2), None, None, None, None
