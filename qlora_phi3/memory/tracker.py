"""Follows every storage from birth to death while code runs on tensors that hold nothing."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from bitsandbytes.backends.cpu import ops as cpu_ops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: c10::cuda::CUDACachingAllocator hands out multiples of this.
ROUNDING = 512


#: bitsandbytes pages no smaller state than this (`Optimizer8bit.get_state_buffer`, 0.50).
SMALLEST_PAGED_ELEMENTS = 100_000


#: Phase -> whose a storage is that nothing else tells of.
LEFT_OVER = {"forward": "activations", "backward": "gradients of activations", "evaluation": "activations"}


#: How the operators of 4-bit weights are taken apart: bitsandbytes runs them as one, and what they hold inside is seen by nobody.
_aten, _bnb = torch.ops.aten, torch.ops.bitsandbytes


_device_of = torch.ops.prim.device.default


#: On a CPU its updates are Python code, with tensors of its own; on a card they are kernels without.
_CPU_UPDATES = {
    _bnb.optimizer_update_8bit_blockwise.default: cpu_ops._optimizer_update_8bit_blockwise_cpu,
    _bnb.optimizer_update_32bit.default: cpu_ops._optimizer_update_32bit_cpu,
}


class NullTracker:
    """Told where a step is and whose tensor is whose; this one takes no notice."""

    num_supervised = 0

    def enter(self, phase: str) -> None:
        """From here on peaks belong to `phase`."""

    def attribute_to(self, category: str) -> AbstractContextManager[None]:
        """What is born inside belongs to `category`."""
        return nullcontext()

    def tag(self, tensor: Tensor | None, category: str) -> None:
        """Say whose storage this is."""

    def page(self, optimizer: Any) -> None:
        """Look after an optimizer that keeps its state in managed memory."""


class MemoryTracker(NullTracker, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live storages under `FakeTensorMode`.

    Args:
        num_supervised: what `nonzero` finds; the one shape of a step that depends on the data.
        vocabulary: a storage whose last dimension is this long belongs to the logits' tile.
        rounding: bytes a storage is rounded up to.
    """

    def __init__(self, *, num_supervised: int, vocabulary: int, rounding: int = ROUNDING) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_supervised, self.vocabulary, self.rounding = num_supervised, vocabulary, rounding
        #: (storage id, bytes) for a birth, (storage id, 0) for a death.
        self.events: list[tuple[int, int]] = []
        self.categories: dict[int, str] = {}
        #: Phase -> (live bytes, number of events) when it held most.
        self.peaks: dict[str, tuple[int, int]] = {}
        self.phase, self.live_bytes, self.host_bytes, self.peak_host_bytes, self.paged_bytes = "load", 0, 0, 0, 0
        self._tenant: str | None = None
        self._ids: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._count = 0
        self._on_host = False

    def enter(self, phase: str) -> None:
        """From here on peaks belong to `phase`."""
        self.phase = phase
        self._note_peak()

    @contextmanager
    def attribute_to(self, category: str) -> Iterator[None]:
        """What is born inside belongs to `category`."""
        before, self._tenant = self._tenant, category
        try:
            yield
        finally:
            self._tenant = before

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """What is born inside lies in the computer's memory, not on the card."""
        self._on_host, before = True, self._on_host
        try:
            yield
        finally:
            self._on_host = before

    def tag(self, tensor: Tensor | None, category: str) -> None:
        """Say whose storage this is."""
        number = None if tensor is None else self._ids.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self.categories[number] = category

    def page(self, optimizer: Any) -> None:
        """Let paged state be made on the host: `cudaMallocManaged` counts in none of the allocator's figures."""
        if not getattr(optimizer, "is_paged", False) or self.rounding == 1:
            return

        def buffer(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            if parameter.numel() < SMALLEST_PAGED_ELEMENTS:
                return torch.zeros_like(parameter, dtype=dtype)
            self.paged_bytes += parameter.numel() * dtype.itemsize
            with self.on_host():
                return torch.zeros_like(parameter, dtype=dtype)

        optimizer.get_state_buffer = buffer

    def track_bytes(self, num_bytes: int, category: str) -> Callable[[], None]:
        """Bytes that no tensor stands for, such as a kernel's workspace; returns what frees them."""
        self._count += 1
        number = self._count
        self._born(number, num_bytes, category)
        return lambda: self._died(number, num_bytes)

    def live_at(self, num_events: int) -> Counter[str]:
        """Tenant -> bytes alive after so many events."""
        alive: dict[int, int] = {}
        for number, num_bytes in self.events[:num_events]:
            if num_bytes:
                alive[number] = num_bytes
            else:
                del alive[number]
        held: Counter[str] = Counter()
        for number, num_bytes in alive.items():
            held[self.categories[number]] += num_bytes
        return held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and look at what it gives."""
        if func is _device_of:
            return args[0].fake_device  # asked thousands of times; the way through FakeTensorMode is long
        if func is torch.ops.prim.device.default:  # three in five calls: a fake tensor is asked where it is
            return args[0].fake_device
        kwargs = kwargs or {}
        if func is _bnb.gemm_4bit.default:
            with self:
                return _dequantize_then_multiply(*args, **kwargs)
        if self.rounding == 1 and func in _CPU_UPDATES:
            with self:
                return _CPU_UPDATES[func](*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return 1  # longrope asks whether a row is long; the memory is the same
        if func is _aten.nonzero.default:
            result = args[0].new_empty((self.num_supervised, args[0].dim()), dtype=torch.int64)
        else:
            result = func(*args, **kwargs)
        category = "dequantized weight" if func is _bnb.dequantize_4bit.default else None
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._look_at(tensor, category)
        return result

    def _look_at(self, tensor: Tensor, category: str | None) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._ids or not num_bytes:
            return
        self._count += 1
        number = self._ids[key] = self._count
        if self._on_host:
            self.host_bytes += num_bytes
            self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)
        else:
            num_bytes = -(-num_bytes // self.rounding) * self.rounding
            self._born(number, num_bytes, category or self._tenant or self._guess(tensor))
        on_host = self._on_host

        def gone(_: object) -> None:
            del self._ids[key], self._watched[number]
            if on_host:
                self.host_bytes -= num_bytes
            else:
                self._died(number, num_bytes)

        self._watched[number] = weakref.ref(storage, gone)

    def _guess(self, tensor: Tensor) -> str:
        shape = tensor.shape
        if self.phase != "load" and len(shape) == 2 and shape[1] == self.vocabulary:
            return "logits tile"
        if tensor.dtype == torch.bool and len(shape) > 1 and shape[-1] == shape[-2]:
            return "attention mask"
        if self.phase == "backward" and torch.is_grad_enabled():
            return "layer being recomputed"
        return LEFT_OVER.get(self.phase, "other")

    def _born(self, number: int, num_bytes: int, category: str) -> None:
        self.events.append((number, num_bytes))
        self.categories[number] = category
        self.live_bytes += num_bytes
        self._note_peak()

    def _died(self, number: int, num_bytes: int) -> None:
        self.events.append((number, 0))
        self.live_bytes -= num_bytes

    def _note_peak(self) -> None:
        if self.live_bytes > self.peaks.get(self.phase, (-1, 0))[0]:
            self.peaks[self.phase] = self.live_bytes, len(self.events)


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
    """What `gemm_4bit` does inside, on CUDA above 1,536 rows and on a CPU always (bitsandbytes 0.50)."""
    if absmax_8bit is not None:
        nested = _bnb.dequantize_blockwise.default(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax = nested + absmax_offset
    weight = _bnb.dequantize_4bit.default(packed, absmax, blocksize, quant_type, shape, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)
