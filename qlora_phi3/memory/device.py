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

from qlora_phi3.execution import DEFAULT_MICRO_BATCH_TOKENS, ExecutionPlan
from qlora_phi3.family import Architecture
from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.memory.cost import CpuLimits, GpuLimits, Limits
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.report import MemoryReport
from qlora_phi3.memory.simulate import StepShape
from qlora_phi3.model.optimizer import default_optimizer
from qlora_phi3.recipe.schema import Recipe


def build_predictor(
    device: Gpu,
    recipe: Recipe,
    config: dict[str, Any],
    architecture: Architecture,
    *,
    compute_dtype: torch.dtype,
    fused_kernels: bool = False,
) -> Predictor:
    """The predictor of a recipe on a device; `config` is the contents of the model's config.json."""
    if device.is_cpu:
        return CpuPredictor(recipe, config, architecture, compute_dtype=compute_dtype)
    return Predictor(
        recipe,
        config,
        architecture,
        compute_dtype=compute_dtype,
        capability=device.compute_capability,
        multiprocessors=device.multiprocessors,
        fused_kernels=fused_kernels,
    )


def limits_of(device: Gpu, limit_bytes: int, compute_dtype: torch.dtype) -> Limits:
    """What a plan may take there, in bytes, and how fast the device is: a CPU is measured."""
    if device.is_cpu:
        return replace(_measure_cpu(compute_dtype), limit_bytes=limit_bytes)
    return GpuLimits(
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
    offloads: ClassVar[bool] = False
    counts_longest_row: ClassVar[bool] = False  # documents attend one after the other, and a complete simulation is there

    def _reserve(self, memory: MemoryReport, limit_bytes: int) -> tuple[MemoryReport, bool]:
        return replace(memory, reserved_bytes=memory.allocated_bytes), memory.allocated_bytes <= limit_bytes

    def _simulation_options(self, execution: ExecutionPlan, shape: StepShape) -> dict[str, Any]:
        return {"path": "cpu"}

    def on_gpu_bytes(self, reserved_bytes: int) -> int:
        """The same: there is no context."""
        return reserved_bytes

    def estimate_on_gpu(self, allocated_bytes: int) -> int:
        """The same."""
        return allocated_bytes

    def most_allocated(self, limit_bytes: int) -> int:
        """The same."""
        return limit_bytes

    @property
    def optimizers(self) -> tuple[str, ...]:
        """One: nothing is paged."""
        return (default_optimizer(self.recipe.training, is_cuda=False),)

    @property
    def may_keep_attention(self) -> bool:
        """Only where the recipe says so."""
        return False

    @property
    def usual_tokens(self) -> int:
        """Enough to keep the matmuls busy, or a row of the longest kind."""
        return max(DEFAULT_MICRO_BATCH_TOKENS, self.recipe.training.max_length)

    def explain(self, execution: ExecutionPlan) -> dict[str, str]:
        """Why micro-batches are not larger."""
        if self.recipe.memory.micro_batch_tokens != "auto" or self.recipe.training.micro_batch_size:
            return {}
        if execution.micro_batch.max_tokens < self.usual_tokens:
            return {"micro_batch_tokens": f"fewer than {self.usual_tokens:,}, which do not fit"}
        return {"micro_batch_tokens": "more at once gain 5 to 12 % on a CPU, and take memory that other programs need"}


@cache
def _measure_cpu(compute_dtype: torch.dtype) -> CpuLimits:
    """What this computer's processor does with the threads of this process, in some hundredths of a second; without a limit."""
    x, weight = torch.ones(256, 1024, dtype=compute_dtype), torch.ones(1024, 1024, dtype=compute_dtype)
    heads = torch.ones(8, 256, 64, dtype=compute_dtype)
    wide = torch.ones(512, 4096, dtype=compute_dtype)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    return CpuLimits(
        limit_bytes=0,
        flops_per_second=2 * x.numel() * len(weight) / _seconds(lambda: x @ weight),
        attention_flops_per_second=2 * heads.numel() * 256 / _seconds(lambda: heads @ heads.mT),
        bytes_per_second=5 * wide.nbytes / _seconds(lambda: silu(wide) * wide),
        dequantized_bytes_per_second=(weight.nbytes + packed.nbytes)
        / _seconds(lambda: bnb.functional.dequantize_4bit(packed, state)),
    )


def _seconds(compute: Callable[[], object]) -> float:
    """The median of three times, after a first one that loads the kernel."""
    times = []
    for _ in range(4):
        started = time.perf_counter()
        compute()
        times.append(time.perf_counter() - started)
    return median(times[1:])
