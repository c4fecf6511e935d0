"""How long an optimizer step and a run take, in seconds: a model to compare execution plans with, not a promise.

The simulation of a step records every kernel that is started (`tracker.py`). Each takes as long as its bytes or its operations,
whichever takes longer at the share of a GPU's stated rate that such kernels reach, or at a CPU's measured rate; and its launch.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qlora_phi3.family import Architecture, linear_shapes

if TYPE_CHECKING:
    from qlora_phi3.recipe.schema import Training

Kind = Literal["matmul", "attention", "dequantize", "elementwise", "offload"]

#: Share of the GPU's stated 16-bit rate that matrix products reach: of GPUs that halve the rate of their tensor cores when they
#: sum in fp32, as GeForce does (up to HALVED_TFLOPS for each multiprocessor), and of those that do not. These two, element-wise
#: kernels, launches and the host's time were fitted to 41 published speeds, after each source had been predicted by a fit to the
#: others (scripts/fit_cost.py, docs/performance.md).
ARITHMETIC_SHARE, FULL_RATE_ARITHMETIC_SHARE = 0.9, 0.6
HALVED_TFLOPS = 1.5
#: And of its bandwidth. Dequantization had 0.44, 0.38 and 0.32 on an RTX 3050 Laptop, an RTX 5070 Laptop and an A100; those of
#: matrix products and attention are assumptions.
BANDWIDTH_SHARE: Mapping[str, float] = {"matmul": 0.7, "attention": 0.7, "dequantize": 0.4, "elementwise": 0.9}
#: From the end of one kernel to the begin of the next, and what the host needs to start one: the longer of both sums counts.
LAUNCH_SECONDS, HOST_SECONDS = 3e-6, 24e-6
#: An operator on a CPU, started from Python, with what autograd does for it (one Zen 5 core, torch 2.13).
CPU_LAUNCH_SECONDS = 8e-6
#: Bytes a second between host and GPU, pinned memory, PCIe 4.0 x8 (16 GB/s stated): one published run on a laptop had 9.4.
OFFLOAD_BYTES_PER_SECOND = 9e9
#: When the allocator empties its cache to stay below its limit: the host waits for the GPU, returns its segments and maps others.
FLUSH_SECONDS = 10e-3  # an assumption too


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the plan needs to know of a device; a CPU's speed is measured (`device.measure_cpu`)."""

    #: Most that may be predicted for the process.
    limit_bytes: int
    #: What matrix products reach.
    flops_per_second: float
    #: Kind of kernel -> bytes that it reads and writes a second.
    bytes_per_second: Mapping[str, float]
    #: Between two kernels, and what the host needs to start one.
    launch_seconds: tuple[float, float]


def gpu_limits(*, limit_bytes: int = 0, tflops_16bit: float, bandwidth_bytes_per_second: float, multiprocessors: int) -> Limits:
    """The limits of a GPU with these stated rates."""
    is_halved = tflops_16bit <= HALVED_TFLOPS * multiprocessors
    return Limits(
        limit_bytes=limit_bytes,
        flops_per_second=tflops_16bit * 1e12 * (ARITHMETIC_SHARE if is_halved else FULL_RATE_ARITHMETIC_SHARE),
        bytes_per_second={kind: bandwidth_bytes_per_second * share for kind, share in BANDWIDTH_SHARE.items()},
        launch_seconds=(LAUNCH_SECONDS, HOST_SECONDS),
    )


class Kernel(NamedTuple):
    """One kernel on a GPU, or one copy between host and GPU."""

    kind: Kind
    #: Floating-point operations of a matrix product; 0 for others.
    flops: float
    #: Bytes read and written of what grows with the tokens of a micro-batch.
    activation_bytes: int
    #: And of weights, their gradients and the optimizer's state.
    weight_bytes: int


#: Kernel -> how often it is started. Not a whole number where layers were interpolated.
Kernels = Mapping[Kernel, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepKernels:
    """What the complete model starts for one micro-batch, and once in a step."""

    forward: Kernels
    backward: Kernels
    #: Clipping, and the optimizer.
    update: Kernels
    #: Of all layers alone, in both passes.
    layers: Kernels
    num_layers: int
    #: Bytes that a forward pass keeps of all layers for the backward pass.
    kept_bytes: float
    #: Of the micro-batch, and the sum of the squares of its rows' tokens, which attention grows with.
    tokens: int
    squares: int
    #: Tokens of a tile of the MLP, 0 where it is in one piece; and all kernels with every MLP in one piece.
    mlp_tile_tokens: int = 0
    untiled: "StepKernels | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWorkload:
    """What one optimizer step of a recipe works on."""

    #: Tokens of each row of a typical step.
    lengths: Sequence[int]
    num_micro_batches: int
    #: Times that the allocator empties its cache in each.
    cache_flushes: int = 0
    #: With padding.
    tokens: int
    #: Sum of the squares of its rows' tokens, with padding.
    squares: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Where time goes, by kind of kernel; `launch` is what lies between kernels, when the GPU waits for the host too."""

    matmul: float = 0.0
    attention: float = 0.0
    dequantize: float = 0.0
    elementwise: float = 0.0
    offload: float = 0.0
    launch: float = 0.0

    @property
    def total(self) -> float:
        """The sum."""
        return self.matmul + self.attention + self.dequantize + self.elementwise + self.offload + self.launch


def add_kernels(*parts: tuple[float, Kernels]) -> Kernels:
    """The sum of kernels, each taken so many times, which may be less than none."""
    total: defaultdict[Kernel, float] = defaultdict(float)
    for times, kernels in parts:
        for kernel, count in kernels.items():
            total[kernel] += times * count
    return total


def keep_attention(step: StepKernels, share: float, kept_bytes: Sequence[int], offloads: bool) -> StepKernels:
    """The same step where layers that are recomputed, a share of all, keep their attention: tensors of `kept_bytes` each."""
    again = {kernel: count for kernel, count in step.forward.items() if kernel.kind == "attention" and kernel.flops}
    copies = {Kernel("offload", 0, size, 0): step.num_layers * share for size in kept_bytes if offloads}
    return replace(
        step,
        forward=add_kernels((1, step.forward), (1, copies)),
        backward=add_kernels((1, step.backward), (-share, again), (1, copies)),
        layers=add_kernels((1, step.layers), (-share, again), (2, copies)),
        kept_bytes=step.kept_bytes + (0 if offloads else step.num_layers * share * sum(kept_bytes)),
        untiled=step.untiled and keep_attention(step.untiled, share, kept_bytes, offloads),
    )


def estimate_step(step: StepKernels, workload: StepWorkload, device: Limits, *, trains: bool = True) -> StepSeconds:
    """The time of one optimizer step; or of an evaluation of these tokens, forward alone."""
    number = workload.num_micro_batches
    seconds = _estimate_pass(step, workload.tokens / number, workload.squares / number, device, trains=trains)
    passes = _wait_for_host(seconds, device)
    update = _wait_for_host(_estimate(step.update, device), device) if trains else {}
    passes["launch"] += workload.cache_flushes * FLUSH_SECONDS
    kinds = passes.keys() | update.keys()
    return StepSeconds(**{kind: number * passes.get(kind, 0.0) + update.get(kind, 0.0) for kind in kinds})


def _estimate_pass(step: StepKernels, tokens: float, squares: float, device: Limits, *, trains: bool) -> dict[str, float]:
    """Of one micro-batch. Tiles of an MLP dequantize its weights and start its kernels once each."""
    kernels = add_kernels((1, step.forward), (1, step.backward)) if trains else step.forward
    seconds = _estimate(kernels, device, tokens / step.tokens, squares / step.squares)
    if step.untiled is not None:
        once = _estimate_pass(step.untiled, tokens, squares, device, trains=trains)
        tiles, simulated = (math.ceil(number / step.mlp_tile_tokens) for number in (tokens, step.tokens))
        for kind in ("dequantize", "launch") if simulated > 1 else ():
            seconds[kind] = once[kind] + (seconds[kind] - once[kind]) * (tiles - 1) / (simulated - 1)
    return seconds


def _wait_for_host(seconds: dict[str, float], device: Limits) -> dict[str, float]:
    """With what the GPU waits for the host, which starts all of these kernels."""
    launches, (between, on_host) = seconds.get("launch", 0.0), device.launch_seconds
    waits = launches / between * on_host - sum(seconds.values())
    return seconds | {"launch": launches + max(0.0, waits)}


def _estimate(kernels: Kernels, device: Limits, tokens_ratio: float = 1.0, squares_ratio: float = 1.0) -> dict[str, float]:
    """Seconds by kind. The kernels were counted for another number of tokens: what grows with it grows by these ratios."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for (kind, flops, activations, weights), count in kernels.items():
        num_bytes = activations * tokens_ratio + weights
        if kind == "offload":
            seconds[kind] += count * num_bytes / OFFLOAD_BYTES_PER_SECOND
            continue
        computing = flops * (squares_ratio if kind == "attention" else tokens_ratio) / device.flops_per_second
        seconds[kind] += count * max(computing, num_bytes / device.bytes_per_second[kind])
        seconds["launch"] += count * device.launch_seconds[0]
    return seconds


def count_flops(step: StepKernels, workload: StepWorkload) -> float:
    """Floating-point operations of the matrix products of one optimizer step, recomputation included."""
    ratios = {"attention": workload.squares / step.squares}
    kernels = add_kernels((1, step.forward), (1, step.backward))
    return sum(count * kernel.flops * ratios.get(kernel.kind, workload.tokens / step.tokens) for kernel, count in kernels.items())


def describe_step(step: StepKernels, workload: StepWorkload, seconds: StepSeconds) -> dict[str, Any]:
    """The `step` of a report: where the time of an optimizer step goes, and what each decoder layer asks of the GPU."""
    each = step.tokens * step.num_layers
    traffic = sum(
        count * (kernel.activation_bytes + kernel.weight_bytes)
        for kernel, count in step.layers.items()
        if kernel.kind == "elementwise"
    )
    launches = sum(count for kernel, count in step.layers.items() if kernel.kind != "offload")
    return {
        "seconds": {kind: round(value, 6) for kind, value in asdict(seconds).items()},
        "flops": count_flops(step, workload),
        "launches_per_layer": round(launches / step.num_layers, 2),
        "elementwise_bytes_per_token_and_layer": round(traffic / each),
        "kept_bytes_per_token_and_layer": round(step.kept_bytes / each),
    }


def count_weights(architecture: Architecture) -> int:
    """Number of weights in all linear layers of the decoder."""
    return architecture.num_hidden_layers * sum(math.prod(shape) for shape in linear_shapes(architecture).values())


def count_steps(training: "Training", num_rows: int, *, evaluates: bool, first_step: int = 0) -> tuple[int, float, int]:
    """Count a run's steps and epochs as transformers does, and the evaluations after `first_step` or before and in a new run.

    `evaluates`: rows are held out.
    """
    steps_per_epoch, interval = math.ceil(num_rows / training.batch_size), 0
    total = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps_per_epoch)
    if training.eval_strategy == "steps":
        interval = math.ceil(training.eval_steps * total) if training.eval_steps < 1 else int(training.eval_steps)
    elif training.eval_strategy == "epoch":
        interval = steps_per_epoch
    between = total // interval - first_step // interval if interval else 0
    last = not interval or total % interval > 0
    return total, total / steps_per_epoch, evaluates * ((first_step == 0) + between + last)
