"""What a configuration takes on a GPU, by torch's allocator and by the driver; every measurement in a process of its own."""

import gc
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from memory_bench.cases import Case
from memory_bench.truth import build_random, go_once
from torch import nn
from torch.optim import Optimizer

from qlora_phi3.errors import DeviceError, is_out_of_memory
from qlora_phi3.hardware.gpu import read_gpu
from qlora_phi3.memory.tracker import NullTracker
from qlora_phi3.step import MicroBatchMemoryError

#: Left by the libraries in a process that has no tensor of ours any more (bitsandbytes' code books); more than this is a leak.
REST_BYTES = 2**20


class BenchGpu(Protocol):
    """Where a configuration runs: the only access to the allocator and the driver."""

    device: torch.device

    def enter(self, phase: str) -> None:
        """A phase of a step begins."""

    def forget_peaks(self) -> None:
        """Let the peaks begin anew, once all work is done."""

    def peaks(self) -> tuple[int, int]:
        """Most bytes allocated and most reserved since then, once all work is done."""

    def cap(self, num_bytes: int | None) -> None:
        """Let torch reserve no more than this; None: no limit."""

    def clear(self) -> int:
        """Return everything that nothing uses to the driver; returns the bytes still allocated."""

    def reserved_bytes(self) -> int:
        """Reserved now."""

    def used_bytes(self) -> int | None:
        """Used on the GPU by all processes; None where the driver does not show it."""

    def expandable(self) -> bool:
        """Whether the segments in use can grow."""

    def multiprocessors(self) -> int | None:
        """How many the GPU has."""


class CudaGpu:
    """The first GPU that torch sees."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        # cuDNN's attention exists on data centre GPUs alone (compute capability 9 and 10); the simulation follows the others'.
        torch.backends.cuda.enable_cudnn_sdp(False)

    def enter(self, phase: str) -> None:
        """As the protocol says: nothing to do."""

    def forget_peaks(self) -> None:
        """As the protocol says."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> tuple[int, int]:
        """As the protocol says."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

    def cap(self, num_bytes: int | None) -> None:
        """As the protocol says; torch multiplies the share by the same total."""
        total = torch.cuda.mem_get_info(self.device)[1]
        share = 1.0 if num_bytes is None else num_bytes / total
        torch.cuda.set_per_process_memory_fraction(share, self.device)

    def clear(self) -> int:
        """As the protocol says; cuBLAS' workspaces are returned as well."""
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(self.device)

    def reserved_bytes(self) -> int:
        """As the protocol says."""
        return torch.cuda.memory_reserved(self.device)

    def used_bytes(self) -> int | None:
        """As the protocol says, by NVML."""
        with suppress(DeviceError):
            return read_gpu().other_processes_bytes
        return None

    def expandable(self) -> bool:
        """As the protocol says."""
        return any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())

    def multiprocessors(self) -> int | None:
        """As the protocol says."""
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)


class DryGpu:
    """A CPU in place of a GPU: no figures, and less than `needs_bytes` is too little. It shows that the script runs."""

    def __init__(self, needs_bytes: int = 5 * 2**30) -> None:
        self.device = torch.device("cpu")
        self.needs_bytes, self._cap = needs_bytes, None

    def enter(self, phase: str) -> None:
        """As the protocol says: nothing to do."""

    def forget_peaks(self) -> None:
        """Where a phase begins, memory can run out."""
        if self._cap is not None and self._cap < self.needs_bytes:
            raise torch.OutOfMemoryError("A dry run: CUDA out of memory.")

    def peaks(self) -> tuple[int, int]:
        """Nothing is known."""
        return 0, 0

    def cap(self, num_bytes: int | None) -> None:
        """Compared with `needs_bytes` where a phase begins."""
        self._cap = num_bytes

    def clear(self) -> int:
        """Nothing is left."""
        gc.collect()
        return 0

    def reserved_bytes(self) -> int:
        """Nothing is known."""
        return 0

    def used_bytes(self) -> int | None:
        """Nothing is known."""
        return None

    def expandable(self) -> bool:
        """As on Linux."""
        return True

    def multiprocessors(self) -> int | None:
        """It has none."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTruth:
    """What was measured, in bytes. Without a phase the configuration did not fit the GPU without a limit."""

    #: Phase -> most allocated.
    phases: dict[str, int] = field(default_factory=dict)
    reserved_bytes: int = 0
    #: What the GPU had less free after a step than before this process used it: segments, context, paged state.
    on_gpu_bytes: int | None = None
    #: Reserved at that moment.
    reserved_then_bytes: int = 0
    forward_backward_seconds: float | None = None
    expandable: bool = False
    multiprocessors: int | None = None
    #: Limit -> whether loading, a step, a save and an evaluation got through.
    fits: dict[int, bool] = field(default_factory=dict)


class _Phases(NullTracker):
    """Reads the peaks where a phase ends, and the clock."""

    def __init__(self, gpu: BenchGpu) -> None:
        self.gpu = gpu
        self.allocated: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.reserved = 0
        self._phase, self._since = "", 0.0

    def enter(self, phase: str) -> None:
        """Called by the step as it goes."""
        if self._phase:
            allocated, reserved = self.gpu.peaks()
            self.seconds[self._phase] = time.perf_counter() - self._since
            self.allocated[self._phase] = max(allocated, self.allocated.get(self._phase, 0))
            self.reserved = max(reserved, self.reserved)
        self.gpu.forget_peaks()
        self.gpu.enter(phase)
        self._phase, self._since = phase, time.perf_counter()


def measure_on_gpu(case: Case, gpu: BenchGpu, caps: Sequence[int], *, idle_bytes: int | None) -> GpuTruth:
    """Load and go through a step without a limit, once more for its time, and once from the start under each limit.

    Args:
        idle_bytes: `used_bytes` before this process made its CUDA context; importing bitsandbytes makes it.
    """
    truth = _measure_freely(case, gpu, idle_bytes)
    fits = {}
    for cap in sorted(caps, reverse=True):
        rest = gpu.clear()
        if rest > REST_BYTES:
            print(f"{case.name}: {rest} bytes of an earlier pass are still allocated; no limit is tried.", file=sys.stderr)
            break
        fits[cap] = _fits(case, gpu, cap)
    return replace(truth, fits=fits)


def _measure_freely(case: Case, gpu: BenchGpu, idle_bytes: int | None) -> GpuTruth:
    """All figures but the verdicts; none where even the GPU without a limit is too small.

    The peaks are those of two steps: cuBLAS' workspace for the backward pass exists from the first one's on.
    """
    phases, clock = _Phases(gpu), _Phases(gpu)
    try:
        model, optimizer = _load_and_go(case, gpu, phases)
        after, expandable, reserved_then = gpu.used_bytes(), gpu.expandable(), gpu.reserved_bytes()
        go_once(model, case, clock, optimizer)
    except (RuntimeError, MemoryError, MicroBatchMemoryError) as error:
        if not _ran_out(error):
            raise
        return GpuTruth()
    return GpuTruth(
        phases={phase: max(size, clock.allocated.get(phase, 0)) for phase, size in phases.allocated.items()},
        reserved_bytes=max(phases.reserved, clock.reserved),
        on_gpu_bytes=None if idle_bytes is None or after is None else after - idle_bytes,
        reserved_then_bytes=reserved_then,
        forward_backward_seconds=clock.seconds["forward"] + clock.seconds["backward"],
        expandable=expandable,
        multiprocessors=gpu.multiprocessors(),
    )


def _fits(case: Case, gpu: BenchGpu, cap: int) -> bool:
    """Whether everything gets through under this limit, and a second step, which finds a cache that is fragmented."""
    gpu.cap(cap)
    try:
        model, optimizer = _load_and_go(case, gpu, _Phases(gpu))
        go_once(model, case, _Phases(gpu), optimizer)
    except (RuntimeError, MemoryError, MicroBatchMemoryError) as error:
        if not _ran_out(error):
            raise
        return False
    finally:
        gpu.cap(None)
    return True


def _load_and_go(case: Case, gpu: BenchGpu, phases: _Phases) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    phases.enter("load")
    model = build_random(case, gpu.device)
    return model, go_once(model, case, phases)


def _ran_out(error: BaseException) -> bool:
    return isinstance(error, MicroBatchMemoryError) or is_out_of_memory(error)
