"""The kernels that `kernels.py` starts, in Triton, which CUDA builds of torch bring along on Linux; imported by it alone.

They compute in fp32 and round once. Each element is read and written by one program, so that they may work in place.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton would look up the annotations of a kernel's arguments in the kernel's own language.

import triton
import triton.language as tl
from torch import Tensor

#: Elements of a program: eight for each thread of its four warps, which are 16 bytes of a 16-bit dtype.
BLOCK = 1024


def swiglu(gate_up: Tensor, product: Tensor) -> None:
    """(rows, 2 x size) -> (rows, size), both contiguous."""
    rows, size = product.shape
    _swiglu[rows, triton.cdiv(size, BLOCK)](gate_up, product, size, BLOCK)


def swiglu_backward(grad: Tensor, gate_up: Tensor, grad_gate_up: Tensor, product: Tensor) -> None:
    """(rows, size) and (rows, 2 x size) -> (rows, 2 x size) and (rows, size), all contiguous."""
    rows, size = grad.shape
    _swiglu_backward[rows, triton.cdiv(size, BLOCK)](grad, gate_up, grad_gate_up, product, size, BLOCK)


def rotate(source: Tensor, cos: Tensor, sin: Tensor, target: Tensor, *, inverse: bool) -> None:
    """(rows, length, heads, size) -> same shape, both with any strides; cos, sin contiguous."""
    rows, length, heads, size = source.shape
    half = size // 2
    width = triton.next_power_of_2(half)
    block = min(max(1, BLOCK // width), triton.next_power_of_2(heads))
    strides, distance = (*source.stride(), *target.stride()), cos.numel() // size
    _rotate[rows * length, triton.cdiv(heads, block)](
        source, cos, sin, target, length, distance, heads, *strides, half, width, block, inverse
    )


@triton.jit
def _swiglu(gate_up, product, size: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(product + row * size + column, gate / (1 + tl.exp(-gate)) * up, mask=inside)


@triton.jit
def _swiglu_backward(grad, gate_up, grad_gate_up, product, size: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < size
    at_gate, at_up, at_product = row * 2 * size + column, row * 2 * size + size + column, row * size + column
    gate = tl.load(gate_up + at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at_up, mask=inside, other=0.0).to(tl.float32)
    wide_grad = tl.load(grad + at_product, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    activated = gate * sigmoid
    tl.store(grad_gate_up + at_gate, wide_grad * up * sigmoid * (1 + gate - activated), mask=inside)
    tl.store(grad_gate_up + at_up, wide_grad * activated, mask=inside)
    tl.store(product + at_product, activated * up, mask=inside)


@triton.jit
def _rotate(
    source,
    cos,
    sin,
    target,
    length,
    distance,
    heads,
    source_row,
    source_token,
    source_head,
    source_place,
    target_row,
    target_token,
    target_head,
    target_place,
    half: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    inverse: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row, position = token // length, token % length
    head = (tl.program_id(1) * block + tl.arange(0, block))[:, None]
    place = tl.arange(0, width)[None, :]
    inside = (head < heads) & (place < half)
    angle = token % distance * 2 * half + place
    cosine = tl.load(cos + angle, mask=place < half, other=0.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=place < half, other=0.0).to(tl.float32)
    if inverse:
        sine = -sine
    origin = source + row * source_row + position * source_token + head * source_head + place * source_place
    first = tl.load(origin, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(origin + half * source_place, mask=inside, other=0.0).to(tl.float32)
    goal = target + row * target_row + position * target_token + head * target_head + place * target_place
    tl.store(goal, first * cosine - second * sine, mask=inside)
    tl.store(goal + half * target_place, second * cosine + first * sine, mask=inside)
