"""What CUDA allocates that a CPU does not, as torch 2.13 does it for the operators of our step; in bytes.

The first part computes what a dispatch mode does not see: the workspaces of cuBLAS and of scaled dot product attention, and the
CUDA context. The second part replaces operators whose CUDA kernels allocate in another way than the CPU's.

Left out, as too small or never at the peak: softmax, norms, sums and maxima (under 1 MiB); choosing the supervised positions (16
bytes a position, 64 in the backward pass); the flash kernel's forward pass where it divides the keys of sequences under about 500
tokens among several blocks (at most 25 MiB).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar
from unittest.mock import patch

import torch
import transformers.modeling_utils
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import qlora_phi3.model.attention
import qlora_phi3.model.kernels
import qlora_phi3.model.layer
import qlora_phi3.model.phi3
from qlora_phi3.memory.report import ATTENTION_MASK, ATTENTION_WORKSPACE
from qlora_phi3.memory.tracker import PINNED, MemoryTracker
from qlora_phi3.model.attention import KeptKernels
from qlora_phi3.units import MIB

Kernel = Literal["flash", "efficient", "math"]
_Results = TypeVar("_Results")

#: No GPU of those whose rule is below fuses the product of more rows with a 4-bit weight.
MOST_FUSED_ROWS = 256
#: Rows of a mask are copied to multiples of this many elements: `preprocess_mask` in transformers/attention.cpp.
MASK_ALIGNMENT = 8


def matmul_workspace_bytes(compute_capability: tuple[int, int]) -> int:
    """What cuBLAS holds for each thread that multiplies, from its first matrix product to the end of a training process.

    The forward pass runs in one thread, the backward pass and its recomputation in another. The workspaces come from the caching
    allocator, and cublasLt shares them. ATen/cuda/CublasHandlePool.cpp: `:4096:2:16:8`, and 32 MiB from Hopper on (Blackwell:
    pytorch pull request 175344). `torch.backends.cuda.cublas_workspace_size` can set less.
    """
    return 32 * MIB if compute_capability[0] >= 9 else (2 * 4096 + 8 * 16) * 1024


def attention_kernel(
    compute_capability: tuple[int, int], *, has_mask: bool, head_size: int, grouped: bool, dtype: torch.dtype
) -> Kernel:
    """Which kernel `scaled_dot_product_attention` takes in training (native/transformers/cuda/sdp_utils.cpp, torch 2.13).

    cuDNN's kernel, which torch prefers on compute capability 9.x and 10.x, is switched off in a run. The memory-efficient one
    takes no grouped queries before pytorch pull request 191085: below 8.0, where there is no flash kernel, they go to the math
    kernel, which builds the scores in fp32, unless key and value are repeated first (seen on a T4, transformers issue 48633).

    Args:
        has_mask: an explicit mask is given, not `is_causal`.
        grouped: key and value are passed with fewer heads than the query (`enable_gqa`).
    """
    major, minor = compute_capability
    half, known = dtype != torch.float32, compute_capability <= (12, 1)
    no_backward = 192 < head_size <= 224 and (major == 12 or (major == 8 and minor >= 6))
    if known and major >= 8 and half and not has_mask and head_size <= 256 and not no_backward:
        return "flash"
    emulated = dtype == torch.bfloat16 and major < 8
    alignment = 8 if half and major >= 7 else 4 if major >= 8 else 1
    if known and not emulated and not grouped and head_size % alignment == 0:
        return "efficient"
    return "math"


def attention_flops(query_shape: Sequence[int], *, has_mask: bool) -> float:
    """Of the forward pass: causal kernels leave out what lies above the diagonal, a mask's kernel computes all. The backward pass
    has 2.5 times as many (FlashAttention-2, section 3).

    Args:
        query_shape: (batch, heads, length, head_size).
    """
    batch, heads, length, head_size = query_shape
    return 4 * batch * heads * length**2 * head_size * (1 if has_mask else 0.5)


def flash_backward_bytes(query_shape: Sequence[int], *, kv_heads: int, num_documents: int = 0) -> tuple[int, ...]:
    """What the flash kernel's backward pass allocates in addition to the gradients it returns, until it returns, in its order.

    `mha_bwd` in flash_attn/flash_api.cpp, of packed documents `mha_varlen_bwd`: softmax_d and dq_accum in fp32; of grouped
    queries, dk and dv of every head in 16 bit.

    Args:
        query_shape: (batch, heads, length, head_size).
        kv_heads: heads of key and value as they are passed.
        num_documents: of a pack, whose batch is 1.
    """
    batch, heads, length, head_size = query_shape
    rows = batch * heads * (length + 128 * num_documents if num_documents else _round_up(length, 128))
    padded = _round_up(head_size, 8)
    accumulator = rows * _round_up(padded, 32 if padded <= 128 else 64) * 4
    expanded = batch * length * heads * padded * 2
    return rows * 4, accumulator, *((expanded, expanded) if kv_heads != heads else ())


def efficient_backward_bytes(query_shape: Sequence[int], compute_capability: tuple[int, int], itemsize: int) -> tuple[int, int]:
    """The same for the memory-efficient kernel, and a query whose elements have `itemsize` bytes.

    `_efficient_attention_backward` in cuda/attention_backward.cu: delta, and the workspace of its kernel (kernel_backward.h),
    which holds dq in fp32, and dk and dv where the kernel cannot hold them in registers. Compared with torch 2.14.1 on emulated
    GPUs of compute capability 7.5, 8.0, 8.6, 8.9 and 12.0.
    """
    batch, heads, length, head_size = query_shape
    sequences = batch * heads
    queries, keys, in_registers = _efficient_blocks(head_size, compute_capability, half=itemsize == 2)
    workspace = -(-length // queries) * -(-head_size // keys) * (queries * keys * 4 + 16)
    if not in_registers:
        splits = max(1, min(-(-length // keys), 200 // sequences))
        workspace += 2 * splits * keys * _round_up(head_size, 128) * 4
    return sequences * length * 4, sequences * workspace


def _efficient_blocks(head_size: int, compute_capability: tuple[int, int], *, half: bool) -> tuple[int, int, bool]:
    """Queries and keys of a block of the memory-efficient backward kernel, and whether dk and dv stay in registers.

    mem_eff_attention/kernels/cutlassB.h: the first kernel whose blocks fit into the GPU's shared memory.
    """
    if head_size <= 64:
        return 64, 64, True
    if compute_capability in ((8, 0), (9, 0), (10, 0)):
        return 128, 128 if half else 64, True
    if half and (compute_capability < (8, 0) or (head_size <= 96 and compute_capability in ((8, 6), (8, 9)))):
        return 128, 64, True
    return 64, 64, not half


def fused_rows(capability: tuple[int, int], multiprocessors: int, weight: tuple[int, int], dtype: torch.dtype) -> int:
    """Most rows that bitsandbytes multiplies with a 4-bit weight without dequantizing it first; a backward pass always does it.

    `_gemm_4bit_use_custom_cuda` in bitsandbytes/backends/cuda/ops.py, 0.50.2, which a CPU build cannot import: for weights of at
    least 4 Mi elements on GPUs of compute capability 7.5, 8.6, 8.9 and 12.0. On others, and for smaller weights, the 4 rows that
    every GPU fuses, which predicts a little too much.

    Args:
        weight: (out_features, in_features).
        dtype: of the rows.
    """
    width, depth = weight
    if width * depth < 4 * 2**20 or capability not in ((7, 5), (8, 6), (8, 9), (12, 0)):
        return 4
    if dtype == torch.float32 or (capability == (7, 5) and dtype != torch.float16):
        return 7
    blocks = -(-width // 64)
    waves, half_a_wave, is_deep = blocks / multiprocessors, blocks >= multiprocessors // 2, depth > 2 * width
    if capability == (7, 5):
        most = (128 if depth < width else 64) if waves >= 3 else 64 if half_a_wave else 32
    elif capability == (8, 6):
        most = 128 if waves >= 1 else 64 if half_a_wave else 16
    elif waves >= 2:
        most = 256 if waves >= 3 else 128
    elif capability == (12, 0):
        if waves >= 0.8:
            most = 96 if depth >= width else 64
        elif half_a_wave:
            most = 64 if 2 * depth >= width and blocks >= 128 else 8
        else:
            most = 16 if is_deep and blocks > 64 else 8
    elif waves >= 0.8:
        is_square = depth >= width and multiprocessors < 60
        most = 128 if is_deep or blocks >= 200 else 32 if is_square else 128 if depth >= width else 64
    elif half_a_wave:
        most = 64 if is_deep else 8 if blocks >= 64 else 32
    elif depth > width and blocks <= 48:
        most = 12 if depth >= 3 * width else 10
    else:
        most = 16 if is_deep or blocks < 48 else 8
    return most


def context_bytes(multiprocessors: int) -> int:
    """What a training process holds on the GPU in addition to the allocator's segments: the CUDA context and loaded kernels.

    The bare context follows the number of multiprocessors, whatever the generation: 8 MiB and 2.92 MiB for each is within 4 % of
    107 MiB on an RTX 4060 Ti (34 multiprocessors), 256 on an RTX 3090 (82), 426 on an RTX 6000 Ada (142) and 555 on an RTX PRO
    6000 (188): llama.cpp pull request 23604, InvokeAI issue 9413, unsloth-zoo pull request 1053; CUDA 12.8 to 13, drivers of
    2026, modules loaded lazily. A T4 (40) that trained held 143 MiB: 18 MiB above that line, taken as 24 for the kernels.
    """
    return int((8 + 24 + 2.92 * multiprocessors) * MIB)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@contextmanager
def following_cuda(tracker: MemoryTracker, *, capability: tuple[int, int]) -> Iterator[None]:
    """Run CUDA's path on fake CPU tensors: its kernels for attention and dropout, autocast, offloading, its workspace."""
    autocasts = torch.is_autocast_enabled

    def takes_groups(query: Tensor) -> bool:
        return capability >= (8, 0) and (query.element_size() == 2 or autocasts("cpu"))

    def offload(tensor: Tensor) -> Tensor:
        tracker.count_kernel("offload", tensor)
        with tracker.attribute_to(PINNED):
            return torch.empty_like(tensor)

    def load(tensor: Tensor) -> Tensor:
        tracker.count_kernel("offload", tensor)
        return torch.empty_like(tensor)

    def dropout(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        # CUDA's saves one byte an element for the backward pass; the CPU's saves the scaled mask.
        return torch.native_dropout(values, p, True)[0] if training and p else values

    def rms_norm(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        normed = torch.empty_like(x)
        tracker.count_kernel("elementwise", x, normed)
        return normed, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)

    def rms_norm_backward(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
        tracker.count_kernel("elementwise", grad, x, grad)
        return torch.empty_like(grad)

    def launch(_: str, reads: Sequence[Tensor], writes: Sequence[Tensor], **__: Any) -> None:
        tracker.count_kernel("elementwise", *reads, *writes)

    usual_softmax = functional.softmax

    def softmax(values: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        if values.dtype == torch.float16 and dtype == torch.float32:  # one kernel; bfloat16 is converted first
            return torch._softmax(values, dim, True)
        return usual_softmax(values, dim, dtype=dtype)

    def takes_packs(_: torch.device, dtype: torch.dtype, head_size: int) -> bool:
        is_built = torch.version.cuda is None or torch.backends.cuda.is_flash_attention_available()  # a CPU build does not know
        return is_built and dtype.itemsize == 2 and head_size <= 192 and capability >= (8, 0)

    with (
        patch.object(qlora_phi3.model.attention, "CPU_SCORES_BYTES", 0),
        patch.object(qlora_phi3.model.phi3, "takes_packs", takes_packs),
        patch.object(qlora_phi3.model.attention, "attend_pack_forward", partial(_run_or_keep, _attend_pack_forward, tracker)),
        patch.object(qlora_phi3.model.attention, "attend_pack_backward", partial(_attend_pack_backward, tracker)),
        patch.object(qlora_phi3.model.attention, "_takes_groups", takes_groups),
        patch.object(qlora_phi3.model.kernels, "launch", launch),
        patch.object(qlora_phi3.model.kernels, "ONEDNN_LINEAR", None),
        patch.object(qlora_phi3.model.layer, "rms_norm", rms_norm),
        patch.object(qlora_phi3.model.layer, "rms_norm_backward", rms_norm_backward),
        patch.object(transformers.modeling_utils, "save_on_cpu", lambda **_: saved_tensors_hooks(offload, load)),
        patch.object(functional, "scaled_dot_product_attention", _attention_on(tracker, capability)),
        patch.object(functional, "dropout", dropout),
        patch.object(functional, "softmax", softmax),
        # Without a device it is CUDA's; PEFT 0.21 asks so, and casts the input of dropout and DoRA to fp32 where there is none.
        patch.object(torch, "is_autocast_enabled", lambda *device: autocasts(*(device or ("cpu",)))),
    ):
        yield


def _attend_pack_forward(
    tracker: MemoryTracker, query: Tensor, key: Tensor, value: Tensor, _: Tensor, lengths: Sequence[int], scale: float, left: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`attention.attend_pack_forward` without storage."""
    output = torch.empty_like(query)  # in the order of the query in memory, so that transformers copies it
    log_sums = torch.empty((query.shape[1], query.shape[0]))
    seed, offset = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
    tracker.count_kernel("attention", query, key, value, output, flops=_pack_flops(query, lengths, left))
    return output, log_sums, seed, offset


def _run_or_keep(kernel: Callable[..., _Results], *args: Any) -> _Results:
    """The results of a kernel that is replaced; in a layer that keeps its attention, those of its forward pass."""
    keeping = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, KeptKernels)]
    results: _Results = keeping[-1].run(partial(kernel, *args)) if keeping else kernel(*args)
    return results


def _attend_pack_backward(
    tracker: MemoryTracker, grad: Tensor, saved: Sequence[Tensor], lengths: Sequence[int], scale: float, left: int
) -> tuple[Tensor, ...]:
    """`attention.attend_pack_backward` without storage."""
    query, key, value, _, output = saved[:5]
    copies = [tensor.contiguous() for tensor in (grad, output)]  # noqa: F841  # until it returns
    gradients = tuple(map(torch.empty_like, (query, key, value)))
    tokens, heads, head_size = query.shape
    sizes = flash_backward_bytes((1, heads, tokens, head_size), kv_heads=key.shape[1], num_documents=len(lengths))
    releases = [tracker.track_bytes(size, ATTENTION_WORKSPACE) for size in sizes]
    for release in releases:
        release()
    flops = 2.5 * _pack_flops(query, lengths, left)
    tracker.count_kernel("attention", query, key, value, output, grad, *gradients, flops=flops)
    tracker.count_kernel("elementwise", output, grad)  # the sum of their products
    tracker.count_kernel("elementwise", gradients[0])  # from fp32
    return gradients


def _pack_flops(query: Tensor, lengths: Sequence[int], left: int) -> float:
    """As `attention_flops`, of documents whose tokens attend to `left` before them, or to all."""
    squares = sum(length**2 - (max(0, length - left - 1) ** 2 if left >= 0 else 0) for length in lengths)
    return 2 * query.shape[1] * query.shape[2] * squares


def _attention_on(tracker: MemoryTracker, capability: tuple[int, int]) -> Callable[..., Tensor]:
    """`scaled_dot_product_attention` as CUDA's kernels allocate it."""
    original = functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):  # here it is the operator that casts, and these kernels replace it
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        kernel = attention_kernel(
            capability,
            has_mask=attn_mask is not None,
            head_size=query.shape[-1],
            grouped=key.shape[1] != query.shape[1],
            dtype=query.dtype,
        )
        if kernel == "math":
            with sdpa_kernel(SDPBackend.MATH):
                return original(query, key, value, attn_mask, **settings)
        with tracker.attribute_to(ATTENTION_MASK):
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype)  # added to the scores, in their dtype
            if attn_mask is not None and attn_mask.shape[-1] % MASK_ALIGNMENT:
                attn_mask = functional.pad(attn_mask, (0, -attn_mask.shape[-1] % MASK_ALIGNMENT))  # the kernel gets a view of it
        tracker.tag(attn_mask, ATTENTION_MASK)
        result: Tensor = _FusedAttention.apply(query, key, value, attn_mask, kernel, capability, tracker)  # type: ignore[no-untyped-call]
        return result

    return attend


class _FusedAttention(torch.autograd.Function):
    """What a flash or memory-efficient kernel saves for its backward pass, and what that allocates until it returns."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *settings: Any) -> Tensor:
        ctx.kernel, ctx.capability, ctx.tracker = settings
        batch, heads, length, size = query.shape

        def attend() -> tuple[Tensor, Tensor]:
            if ctx.kernel == "flash":  # in the order of the query in memory, so that transformers copies it
                output = torch.empty_like(query)
            else:
                output = torch.empty((batch, length, heads, size), dtype=query.dtype).transpose(1, 2)
            flops = attention_flops(query.shape, has_mask=mask is not None)
            ctx.tracker.count_kernel("attention", query, key, value, output, flops=flops)
            return output, torch.empty((batch, heads, length))

        output, log_sum = _run_or_keep(attend)
        ctx.save_for_backward(query, key, value, output, log_sum, mask)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # recomputed tensors live no longer than this reference, as in torch's own function
        query, key, value, output, _, mask = saved
        is_flash = ctx.kernel == "flash"
        if is_flash:
            copies = [tensor.transpose(1, 2).contiguous() for tensor in (grads[0], output)]  # noqa: F841  # until it returns
        gradients = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        if is_flash:
            sizes = flash_backward_bytes(query.shape, kv_heads=key.shape[1])
        else:
            if query.element_size() == 4:
                ctx.tracker.track_bytes(query.numel() * 4, ATTENTION_WORKSPACE)()  # the product that delta is the sum of
            sizes = efficient_backward_bytes(query.shape, ctx.capability, query.element_size())
        releases = [ctx.tracker.track_bytes(size, ATTENTION_WORKSPACE) for size in sizes]
        for release in releases:
            release()
        flops = 2.5 * attention_flops(query.shape, has_mask=mask is not None)
        ctx.tracker.count_kernel("attention", query, key, value, output, grads[0], *gradients, flops=flops)
        ctx.tracker.count_kernel("elementwise", output, grads[0])  # the sum of their products
        if is_flash:
            ctx.tracker.count_kernel("elementwise", gradients[0])  # from fp32
        return *gradients, None, None, None, None
