"""Kernels that PyTorch would not choose: fused element-wise ones of the decoder layer on a GPU, SwiGLU and the rotary embedding,
each in one pass over memory; and oneDNN's products in fp32 on a CPU.

A plan decides whether a run uses the fused ones (`ExecutionPlan.fused_kernels`), so that the memory simulation runs the same
path; without them `layer.py` computes the same in plain PyTorch, with more passes and two more buffers in SwiGLU's backward pass.
"""

import subprocess
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from qlora_phi3.errors import first_line

#: Compute capability from which on they are used: tests/model/test_model_kernels.py compiles them for it and for newer ones.
LEAST_CAPABILITY = (7, 5)
#: x (rows, in), weight (out, in) -> x @ weight^T by oneDNN, without a gradient of its own; None where torch was built without.
#: torch sends 16-bit products on a CPU there, but fp32 ones to MKL. The memory simulation of CUDA replaces it.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def why_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot be used on a device, None if they can. They are built, which takes Triton and a C compiler,
    and what they compute of a few values is compared with PyTorch.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"they are for GPUs of compute capability {'.'.join(map(str, LEAST_CAPABILITY))} and newer"
    try:
        from triton.errors import TritonError
    except ImportError:
        return "Triton is not installed"
    try:
        is_right = _compare(device, dtype)
    except subprocess.SubprocessError:
        return "Triton's call of the C compiler failed; it needs Python's headers (python3-dev)"
    except (TritonError, ImportError, OSError, RuntimeError, AssertionError) as error:
        return f"Triton cannot build them ({first_line(error)})"
    finally:
        torch.cuda.empty_cache()
    return None if is_right else "their results differ from PyTorch's"


def _compare(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compute what PyTorch computes, to the precision of 16 bit."""
    values = torch.linspace(-4, 4, 2 * 96, device=device).view(2, 96)
    gate, up = values.chunk(2, -1)
    share = gate.sigmoid()
    product, slope = gate * share * up, share * (1 + gate * (1 - share))
    gate_up, grad = values.to(dtype, copy=True), torch.ones((2, 48), dtype=dtype, device=device)
    found = [swiglu(gate_up)]
    swiglu_backward(grad, gate_up, gate_up)
    heads = values.view(1, 2, 3, 32)
    cos, sin = (part.to(dtype) for part in (heads[:, :, 0].cos(), heads[:, :, 0].sin()))
    cos, sin = (part[..., :16].repeat(1, 1, 2) for part in (cos, sin))
    first, second = heads.chunk(2, -1)
    turned = heads * cos[:, :, None] + torch.cat([-second, first], -1) * sin[:, :, None]
    source, rotated, back = heads.to(dtype), torch.empty_like(heads, dtype=dtype), torch.empty_like(heads, dtype=dtype)
    rotate(source, cos, sin, rotated)
    rotate(rotated, cos, sin, back, inverse=True)
    found += [grad, gate_up, rotated, back]
    expected = [product, product, torch.cat([up * slope, gate * share], -1), turned, heads]
    errors = [(one - other).abs().max() for one, other in zip(found, expected, strict=True)]
    return bool(torch.stack(errors).max() < 0.1)


def launch(kernel: str, reads: Sequence[Tensor], writes: Sequence[Tensor], **settings: Any) -> None:
    """Start a kernel of `triton_kernels`. The memory simulation replaces this function."""
    from qlora_phi3.model import triton_kernels

    getattr(triton_kernels, kernel)(*reads, *writes, **settings)
    torch.autograd.graph.increment_version(writes)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, (..., 2 x size) contiguous -> (..., size)."""
    product = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    launch("swiglu", [gate_up.flatten(0, -2)], [product.flatten(0, -2)])
    return product


def swiglu_backward(grad: Tensor, gate_up: Tensor, grad_gate_up: Tensor) -> None:
    """Overwrite `grad`, (rows, size), with silu(gate) * up, and `grad_gate_up`, which may be `gate_up`, with the gradient of
    `gate_up`, (rows, 2 x size); all contiguous.
    """
    launch("swiglu_backward", [grad, gate_up], [grad_gate_up, grad])


def rotate(source: Tensor, cos: Tensor, sin: Tensor, target: Tensor, *, inverse: bool = False) -> None:
    """Rotate each pair (first, second) of the two halves of the last dimension: first * cos - second * sin, second * cos +
    first * sin; with `inverse` back.

    Args:
        source, target: (rows, length, heads, size), which may be one tensor, with any strides.
        cos, sin: (rows or 1, length, size), whose two halves are alike.
    """
    launch("rotate", [source, cos.contiguous(), sin.contiguous()], [target], inverse=inverse)


def takes_onednn(x: Tensor) -> bool:
    """Whether products of `x` with weights are computed by `ONEDNN_LINEAR`."""
    return ONEDNN_LINEAR is not None and x.dtype == torch.float32 and x.device.type == "cpu"


def multiply(first: Tensor, second: Tensor) -> Tensor:
    """first @ second, (..., k) and (k, n) -> (..., n), without a gradient of its own."""
    if not takes_onednn(first):
        return torch.matmul(first, second)
    product = ONEDNN_LINEAR(first.flatten(0, -2), second.t(), None, "none", [], "")  # type: ignore[misc]
    return cast(Tensor, torch.ops.aten._unsafe_view(product, [*first.shape[:-1], -1]))  # no view, so that it may be overwritten


def add_products(rows: Tensor, weight: Tensor, low_rank: Tensor, factor: Tensor) -> Tensor:
    """rows @ weight + low_rank @ factor, (m, k), (k, n), (m, r) and (r, n) -> (m, n), without a gradient of its own."""
    if takes_onednn(rows):
        return multiply(rows, weight).addmm_(low_rank, factor)
    return torch.mm(low_rank, factor).addmm_(rows, weight)
