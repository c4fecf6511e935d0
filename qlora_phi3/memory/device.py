"""What plans need of the device: its predictor and its limits. All in which a CPU differs from a GPU is here.

The figures of a plan for a CPU are those of tensors. The process takes Python, its libraries and their buffers in addition, and
while it loads the tables by which bitsandbytes quantizes: the half of the free memory that no plan takes has room for them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any, ClassVar

import bitsandbytes as bnb
import torch
from torch.nn.functional import silu

from qlora_phi3.execution import ExecutionPlan
from qlora_phi3.hardware.gpu import Gpu, similar_gpu
from qlora_phi3.memory.cost import BANDWIDTH_SHARE, CPU_LAUNCH_SECONDS, Limits, gpu_limits
from qlora_phi3.memory.cuda_path import context_bytes
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.report import MemoryReport
from qlora_phi3.memory.simulate import StepShape
from qlora_phi3.model.kernels import multiply
from qlora_phi3.model.optimizer import default_optimizer

#: Tokens of a micro-batch on a CPU, if neither the recipe nor a longer row requires more: enough to keep the matmuls busy next to
#: the dequantization, which costs the same whatever the micro-batch holds. 1,024 are 5 to 12 % faster (SmolLM2-135M, bf16, not
#: recomputed), at a peak that is 0.2 to 0.5 GB higher.
CPU_MICRO_BATCH_TOKENS = 512
#: Speed of kernels in a step, as a share of that of one kernel again and again (docs/performance.md).
REPEATED_SHARE = 0.85


def read_gpu_by_torch(device: torch.device) -> Gpu:
    """The GPU of this process where NVML cannot be read. Its CUDA context is there by now and counts as free: a plan adds it."""
    properties = torch.cuda.get_device_properties(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return replace(
        similar_gpu(properties.name, total_bytes),
        total_bytes=total_bytes,
        free_bytes=min(total_bytes, free_bytes + context_bytes(properties.multi_processor_count)),
        compute_capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        is_local=True,
        estimated=False,
        represents=(),
    )


def build_predictor(device: Gpu, *model: Any, compute_dtype: torch.dtype, fused_kernels: bool = False) -> Predictor:
    """The predictor of a model on a device: its recipe, the contents of its config.json, its architecture."""
    if device.is_cpu:
        return CpuPredictor(*model, compute_dtype=compute_dtype)
    kind: dict[str, Any] = {"capability": device.compute_capability, "multiprocessors": device.multiprocessors}
    return Predictor(*model, compute_dtype=compute_dtype, fused_kernels=fused_kernels, **kind)


def limits_of(device: Gpu, limit_bytes: int, compute_dtype: torch.dtype) -> Limits:
    """What a plan may take there, in bytes, and how fast the device is: a CPU is measured."""
    if device.is_cpu:
        return replace(measure_cpu(compute_dtype), limit_bytes=limit_bytes)
    return gpu_limits(
        limit_bytes=limit_bytes,
        tflops_16bit=device.tflops_16bit,
        bandwidth_bytes_per_second=device.bandwidth_bytes_per_second,
        multiprocessors=device.multiprocessors,
    )


@dataclass(eq=False, slots=True)
class CpuPredictor(Predictor):
    """Simulates execution plans of one recipe on a CPU, which has neither an allocator with segments nor a context."""

    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 0
    is_gpu: ClassVar[bool] = False

    def _reserve(self, memory: MemoryReport, limit_bytes: int) -> tuple[MemoryReport, bool]:
        return replace(memory, reserved_bytes=memory.allocated_bytes), memory.allocated_bytes <= limit_bytes

    def _simulation_options(self, execution: ExecutionPlan, shape: StepShape) -> dict[str, Any]:
        return {"capability": None}

    def on_gpu_bytes(self, num_bytes: int, /) -> int:
        """The same: there is no context, and nothing that only an allocator holds."""
        return num_bytes

    estimate_on_gpu = most_allocated = on_gpu_bytes

    @property
    def optimizers(self) -> tuple[str, ...]:
        """One: nothing is paged."""
        return (default_optimizer(self.recipe.training, is_cuda=False),)

    @property
    def usual_tokens(self) -> int:
        """Enough to keep the matmuls busy, or a row of the longest kind."""
        return max(CPU_MICRO_BATCH_TOKENS, self.recipe.training.max_length)

    def explain(self, execution: ExecutionPlan) -> dict[str, str]:
        """Why micro-batches are not larger."""
        if self.recipe.memory.micro_batch_tokens != "auto" or self.recipe.training.micro_batch_size:
            return {}
        if execution.micro_batch.max_tokens < self.usual_tokens:
            return {"micro_batch_tokens": f"fewer than {self.usual_tokens:,}, which do not fit"}
        return {"micro_batch_tokens": "more at once gain 5 to 12 % on a CPU, and take memory that other programs need"}


@cache
def measure_cpu(compute_dtype: torch.dtype) -> Limits:
    """What this computer's processor does with the threads of this process, in some hundredths of a second; without a limit."""
    x, weight, wide = (torch.ones(shape, dtype=compute_dtype) for shape in ((256, 1024), (1024, 1024), (512, 4096)))
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    flops_per_second = 2 * x.numel() * len(weight) / _seconds(lambda: multiply(x, weight))
    moved = dict.fromkeys(BANDWIDTH_SHARE, 5 * wide.nbytes / _seconds(lambda: silu(wide) * wide))
    moved["dequantize"] = (weight.nbytes + packed.nbytes) / _seconds(lambda: bnb.functional.dequantize_4bit(packed, state))
    launches = CPU_LAUNCH_SECONDS, 0.0
    return Limits(limit_bytes=0, flops_per_second=flops_per_second, bytes_per_second=moved, launch_seconds=launches)


def _seconds(compute: Callable[[], object]) -> float:
    """What it takes between other kernels: the median of three times, after a first one that loads the kernel."""
    times = []
    for _ in range(4):
        started = time.perf_counter()
        compute()
        times.append(time.perf_counter() - started)
    return median(times[1:]) / REPEATED_SHARE
