"""Follows every storage from its allocation to its end while code runs on tensors without storage (`FakeTensorMode`)."""

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import bitsandbytes  # noqa: F401  # registers torch.ops.bitsandbytes
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_phi3.memory import report
from qlora_phi3.memory.cost import Kernel, Kind
from qlora_phi3.memory.trace import Trace, in_order
from qlora_phi3.model.kernels import ONEDNN_LINEAR

#: c10::cuda::CUDACachingAllocator rounds requests up to multiples of this.
ROUNDING = 512
#: bitsandbytes pages no smaller state than this (`Optimizer8bit.get_state_buffer`, 0.50).
SMALLEST_PAGED_ELEMENTS = 100_000
#: As categories: what is allocated is in host memory, not on the GPU; pinned, torch rounds it up to a power of two.
HOST, PINNED = "host memory", "pinned host memory"
#: As a category: what is allocated is on the CPU and counts nowhere, unless it is computed from what is on the GPU.
ON_CPU = "on the CPU"

#: References to the storage and to the tensor that autograd's buffer alone holds, as a dispatch mode sees it (torch 2.13, 2.14).
UNSHARED = (2, 4)

#: Of the heaviest micro-batch, and of a later one of its step.
FORWARD_PHASES, BACKWARD_PHASES = ("forward", "later forward"), ("backward", "later backward")

_aten, _bnb = torch.ops.aten, torch.ops.bitsandbytes
_device_of = torch.ops.prim.device.default
_PRODUCTS = tuple(getattr(_aten, name).default for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear"))
#: Operators by what the GPU does for them. The second kind starts no kernel; of the next two the first operand is not read, or
#: only in the places that the result has; the last write so few values that their kernel alone counts.
_ADDED_PRODUCTS = {_aten.addmm, _aten.addmm_, _aten.baddbmm}
_MATMULS = {_aten.mm, _aten.linear, _aten.addmm, _aten.addmm_, _bnb.gemm_4bit, ONEDNN_LINEAR}
_NO_KERNEL = {
    _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided, _aten._unsafe_view, _aten.alias,
    _aten.lift_fresh, _aten._reshape_alias,
}  # fmt: skip
_OVERWRITES = {_aten.copy_, _aten.zero_, _aten.fill_, _aten.bernoulli_}
_SELECTIONS = {_aten.embedding, _aten.gather, _aten.index}
_FEW_VALUES = {_aten.scatter_add_, _aten.scatter_}
#: A CPU's kernels of attention, and their operations for each element of the query and each token, half of which are masked.
_CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: 2, _aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,
}  # fmt: skip
#: Categories of what has the same size for any number of tokens.
_WEIGHTS = {
    report.QUANTIZED_WEIGHTS, report.QUANTIZATION_STATE, report.UNQUANTIZED_WEIGHTS, report.EMBEDDING_AND_HEAD, report.ADAPTER,
    report.GRADIENTS, report.OPTIMIZER_STATE, report.DEQUANTIZED_WEIGHT,
}  # fmt: skip


class NullTracker:
    """The interface by which a step reports its phases and whose tensor is whose; this one ignores it all."""

    num_supervised = 0

    def enter(self, phase: str) -> None:
        """From here on peaks belong to `phase`."""

    def attribute_to(self, category: str) -> AbstractContextManager[None]:
        """What is allocated inside belongs to `category`."""
        return nullcontext()

    def tag(self, tensor: Tensor | None, category: str) -> None:
        """The storage of `tensor` belongs to `category`, whatever it was allocated as."""

    def page(self, optimizer: Any) -> None:
        """Allocate the paged state of `optimizer` in host memory."""


class MemoryTracker(NullTracker, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live storages under `FakeTensorMode`.

    Args:
        num_supervised: what `nonzero` finds; the only shape of a step that depends on the data.
        vocabulary: a storage whose last dimension is this long belongs to the logits tile.
        rounding: bytes that a storage is rounded up to; 1 follows the CPU's allocator and kernels.
        fused_rows: shape of a 4-bit weight -> most rows whose product with it needs no dequantized copy; 0 unless given.
    """

    def __init__(self, *, num_supervised: int, vocabulary: int, rounding: int, fused_rows: Mapping[tuple[int, int], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_supervised, self.vocabulary, self.rounding = num_supervised, vocabulary, rounding
        self.fused_rows = fused_rows
        #: (storage id, bytes) for an allocation, (storage id, 0) for its end.
        self.events: list[tuple[int, int]] = []
        self.categories: dict[int, str] = {}
        #: As in `Trace`.
        self.first_events: dict[str, int] = {}
        self.first_products: dict[str, int] = {}
        self.phase, self.host_bytes, self.peak_host_bytes, self.paged_bytes = "load", 0, 0, 0
        #: Phase -> kernel -> how often it is started; and how often the one that is started now stands for another.
        self.kernels: dict[str, Counter[Kernel]] = defaultdict(Counter)
        self.repeats = 1
        self._category: str | None = None
        #: By the storage's address: its id, and the reference whose callback sees it end.
        self._ids: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._count = 0

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.first_events.setdefault(phase, len(self.events))

    @contextmanager
    def attribute_to(self, category: str) -> Iterator[None]:
        """What is allocated inside belongs to `category`; with `HOST` or `PINNED`, to host memory."""
        before, self._category = self._category, category
        try:
            yield
        finally:
            self._category = before

    def tag(self, tensor: Tensor | None, category: str) -> None:
        number = None if tensor is None else self._ids.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self.categories[number] = category

    def page(self, optimizer: Any) -> None:
        """Allocate paged state in host memory: `cudaMallocManaged` counts in none of the allocator's figures."""

        def buffer(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            if parameter.numel() < SMALLEST_PAGED_ELEMENTS:
                return torch.zeros_like(parameter, dtype=dtype)
            self.paged_bytes += parameter.numel() * dtype.itemsize
            with self.attribute_to(HOST):
                return torch.zeros_like(parameter, dtype=dtype)

        if getattr(optimizer, "is_paged", False) and self.rounding != 1:
            optimizer.get_state_buffer = buffer

    def is_followed(self, value: Any) -> bool:
        """Whether this is a tensor whose storage is counted."""
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._watched

    def track_bytes(self, num_bytes: int, category: str) -> Callable[[], None]:
        """Count bytes as allocated, also where no tensor has them, such as a kernel's workspace.

        Returns:
            A function that ends the allocation.
        """
        self._count = number = self._count + 1
        self.events.append((number, num_bytes))
        self.categories[number] = category
        return lambda: self.events.append((number, 0))

    def trace(self) -> Trace:
        """What was recorded up to the end."""
        return Trace(
            events=in_order(self.events[: self.first_events["end"]], self.first_events.values()),
            categories=dict(self.categories),
            phases=dict(self.first_events),
            first_products=dict(self.first_products),
            paged_bytes=self.paged_bytes,
            host_bytes=self.peak_host_bytes,
            rounding=self.rounding,
            kernels={phase: dict(kernels) for phase, kernels in self.kernels.items()},
        )

    def count_kernel(self, kind: Kind, *tensors: Tensor, flops: float = 0) -> None:
        """Count a kernel that reads or writes these tensors."""
        sizes = [0, 0]
        for tensor in tensors:
            numel = 1
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                numel *= size if stride else 1  # what is expanded is read once
            number = self._ids.get(tensor.untyped_storage()._cdata)
            is_weight = number is not None and self.categories[number] in _WEIGHTS
            sizes[is_weight] += numel * tensor.element_size()
        self.kernels[self.phase][Kernel(kind, flops, *sizes)] += self.repeats

    def _count_operator(self, func: Any, args: Sequence[Any], results: Sequence[Any]) -> None:
        """Count the kernel of an operator, if it starts one."""
        packet = func.overloadpacket
        if self.phase == "load" or packet in _NO_KERNEL or func.is_view or func.namespace == "profiler":
            return
        inputs, outputs = _tensors(args), _tensors(results)
        if self.phase == "update" and (not inputs or packet is _aten.zeros_like):
            return  # state and gradients, which only the first step makes
        if packet in _MATMULS or packet in (_aten.bmm, _aten.baddbmm):
            kind: Kind = "matmul" if packet in _MATMULS else "attention"
            depth = args[packet in _ADDED_PRODUCTS].shape[-1]
            self.count_kernel(kind, *inputs, *outputs, flops=2 * outputs[0].numel() * depth)
            return
        if packet in _CPU_ATTENTION:
            self.count_kernel(
                "attention", *inputs, *outputs, flops=_CPU_ATTENTION[packet] * inputs[0].numel() * inputs[0].shape[-2]
            )
            return
        if packet in _SELECTIONS:
            inputs = outputs
        elif packet in _FEW_VALUES:
            inputs, outputs = inputs[1:], inputs[1:]
        elif packet in _OVERWRITES:
            inputs = inputs[1:]
        elif not outputs:
            outputs = inputs
        kind = "dequantize" if packet is _bnb.dequantize_4bit or packet is _bnb.dequantize_blockwise else "elementwise"
        shape = outputs[0].shape if outputs else ()
        if len(shape) > 3 and shape[-1] == shape[-2]:
            kind = "attention"
        self.count_kernel(kind, *inputs, *outputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and follow the tensors that it returns."""
        if func is _device_of:  # three in five calls, and the way through FakeTensorMode is long
            return args[0].fake_device
        kwargs = kwargs or {}
        if func is _bnb.gemm_4bit.default:
            x, weight_shape = args[0], args[2]
            if x.numel() // x.shape[-1] > self.fused_rows.get(tuple(weight_shape), 0):
                with self:
                    return _dequantize_then_multiply(*args, **kwargs)
        if self.rounding == 1 and func in _cpu_updates():
            with self:
                return _cpu_updates()[func](*args, **kwargs)
        if self.rounding == 1 and func is _aten.mul.out and args[0].element_size() < args[1].element_size():
            self.track_bytes(2 * args[0].numel() * args[1].element_size(), report.ACTIVATIONS)()  # a CPU copies input and output
        if func is _aten._local_scalar_dense.default:
            return 1  # longrope reads whether a row is long; the memory is the same
        if func is _aten._softmax_backward_data.default and self.rounding != 1:
            with self:  # CUDA's kernel takes the product of gradient and output
                args = (args[0] * args[1], *args[1:])
        if func in (_aten.add.Tensor, _aten.index_put.default) and _is_in_place_on_real_tensors(*args[:2]):
            self._count_operator(func, args, args[:1])
            return args[0]
        if func is _bnb.dequantize_4bit.default:  # as bitsandbytes registers the shapes of both, in a tenth of the time
            result = args[0].new_empty(args[4], dtype=args[5])
        elif func is _bnb.dequantize_blockwise.default:
            result = args[0].new_empty(args[0].shape, dtype=args[4])
        elif func is _aten.nonzero.default:
            result = args[0].new_empty((self.num_supervised, args[0].dim()), dtype=torch.int64)
        else:
            result = func(*args, **kwargs)
        if self._category == ON_CPU and not any(map(self.is_followed, args)):
            return result
        category = report.DEQUANTIZED_WEIGHT if func is _bnb.dequantize_4bit.default else None
        results = result if isinstance(result, tuple | list) else (result,)
        for tensor in reversed(results) if func is _aten.native_dropout.default else results:  # the mask is allocated first
            if isinstance(tensor, Tensor):
                self._follow(tensor, category)
        self._count_operator(func, args, results)
        if func in _PRODUCTS:
            self.first_products.setdefault(self.phase, len(self.events))
        return result

    def _follow(self, tensor: Tensor, category: str | None) -> None:
        """Count a storage that is new, until it ends."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._watched or not num_bytes:
            return
        if self._category in (HOST, PINNED):
            num_bytes = num_bytes if self._category == HOST else 1 << (num_bytes - 1).bit_length()
            self.host_bytes += num_bytes
            self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)

            def release() -> None:
                self.host_bytes -= num_bytes
        else:
            release = self.track_bytes(num_bytes, category or self._category or self._guess_category(tensor))
            self._ids[key] = self._count

        def ended(_: object) -> None:
            del self._watched[key]
            self._ids.pop(key, None)
            release()

        self._watched[key] = weakref.ref(storage, ended)

    def _guess_category(self, tensor: Tensor) -> str:
        shape = tensor.shape
        if self.phase != "load" and len(shape) == 2 and shape[1] == self.vocabulary:
            return report.LOGITS_TILE
        if tensor.dtype == torch.bool and len(shape) > 1 and shape[-1] == shape[-2]:
            return report.ATTENTION_MASK
        if self.phase in BACKWARD_PHASES:
            return report.RECOMPUTED_LAYER if torch.is_grad_enabled() else report.ACTIVATION_GRADIENTS
        return report.ACTIVATIONS if self.phase in (*FORWARD_PHASES, "evaluation") else report.OTHER


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among an operator's arguments or results, and in lists among them."""
    parts = [part for value in values for part in (value if isinstance(value, list | tuple) else (value,))]
    return [part for part in parts if isinstance(part, Tensor)]


def parameter_category(name: str, parameter: Tensor) -> str:
    """The category of a model's parameter, simulated or real, with its name of `named_parameters`."""
    if parameter.requires_grad:
        return report.ADAPTER
    if parameter.dtype == torch.uint8:
        return report.QUANTIZED_WEIGHTS
    is_outer = "embed_tokens" in name or "lm_head" in name
    return report.EMBEDDING_AND_HEAD if is_outer else report.UNQUANTIZED_WEIGHTS


def quantization_tensors(parameter: Tensor) -> Iterator[Tensor]:
    """The tensors of a 4-bit parameter's quantization state, nested states included; none of another parameter."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (tensor for tensor in (state.absmax, state.code, state.offset) if tensor is not None)
        state = state.state2


def _is_in_place_on_real_tensors(total: Tensor, other: Any) -> bool:
    """Whether autograd runs an operator that it would run in place if tensors were real: the sum of two gradients of one tensor
    (autograd/input_buffer.cpp), where nothing else refers to the first, which is dense; the gradient of an indexing.
    """
    if sys._getframe(4).f_code.co_name != "_engine_run_backward":
        return False
    storage = total.untyped_storage()
    references = torch._C._storage_Use_Count(storage._cdata), total._use_count()  # type: ignore[attr-defined]
    return not isinstance(other, Tensor) or (references == UNSHARED and storage.nbytes() == total.numel() * total.element_size())


@cache
def _cpu_updates() -> dict[Any, Callable[..., Any]]:
    """On a CPU bitsandbytes' updates are Python code with tensors of its own; on a GPU they are kernels without."""
    from bitsandbytes.backends.cpu import ops

    return {
        _bnb.optimizer_update_8bit_blockwise.default: ops._optimizer_update_8bit_blockwise_cpu,
        _bnb.optimizer_update_32bit.default: ops._optimizer_update_32bit_cpu,
    }


def _dequantize_then_multiply(
    x: Tensor,
    packed: Tensor,
    shape: Any,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """What `gemm_4bit` does inside on a CPU, and on CUDA for more rows than `cuda_path.fused_rows` (bitsandbytes 0.50)."""
    if absmax_8bit is not None:
        nested = _bnb.dequantize_blockwise.default(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax = nested + absmax_offset
    weight = _bnb.dequantize_4bit.default(packed, absmax, blocksize, quant_type, shape, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)
