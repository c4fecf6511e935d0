"""How long an optimizer step and a run take on a GPU, in seconds: a model to compare execution plans with, not a promise.

A step is arithmetic (recomputation included), the dequantization of every 4-bit weight once in each pass of each micro-batch, and
what offloading moves. Arithmetic and memory traffic are added, as the dequantization runs by itself before each matmul.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qlora_phi3.execution import ExecutionPlan
from qlora_phi3.family import Architecture, linear_shapes

if TYPE_CHECKING:
    from qlora_phi3.recipe.schema import Training

#: Shares of the GPU's stated rates that such a step reaches. Fitted to QLoRA runs that other people published for an RTX 3050
#: Laptop, an RTX 3090 and an RTX 5070 Laptop, from which this model differs by 12 % in the mean; none of them is ours.
ARITHMETIC_SHARE, BANDWIDTH_SHARE = 0.65, 0.4
#: Bytes a second between host and GPU, pinned memory, PCIe 4.0 x8 (16 GB/s stated): one published run on a laptop had 9.4.
OFFLOAD_BYTES_PER_SECOND = 9e9
#: Starting the kernels of one decoder layer in one of its passes: 38 forward, 67 backward, 30 recomputed (counted on an emulated
#: GPU, Phi-3-mini, one document, torch 2.14.1), at 5 microseconds, which is an assumption.
LAYER_LAUNCH_SECONDS = 45 * 5e-6
#: Bytes read and written when one weight is dequantized to 16 bit: NF4 with double quantization is 4.127 bit (QLoRA, section 3).
DEQUANTIZED_BYTES_PER_WEIGHT = 4.127 / 8 + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLimits:
    """What the plan needs to know of a GPU."""

    #: Most that may be predicted for the process.
    limit_bytes: int
    tflops_16bit: float
    bandwidth_bytes_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWorkload:
    """What one optimizer step of a recipe works on."""

    #: Tokens of each row of a typical step.
    lengths: Sequence[int]
    num_micro_batches: int
    rank: int
    quantized: bool


class Recomputation(NamedTuple):
    """What is computed more often than once forward and once backward."""

    #: Share of the layers that are computed twice.
    layers: float
    #: Share of the layers whose gate_up projection is computed twice.
    gate_up: float = 0.0
    #: Tiles of the MLP in a typical micro-batch.
    mlp_tiles: int = 1


def recomputation_of(architecture: Architecture, execution: ExecutionPlan, workload: StepWorkload) -> Recomputation:
    """What an execution plan computes again.

    A recomputed layer leaves out its down projection, whose result nothing reads (`model/layer.py`; with DoRA or dropout PEFT
    computes it, which is not counted). In tiles the MLP is recomputed tile by tile, and not with its layer.
    """
    every, number = execution.checkpoint_every, architecture.num_hidden_layers
    layers = math.ceil(number / every) / number if every else 0.0
    if not execution.mlp_tile_tokens:
        return Recomputation(layers, layers)
    tiles = math.ceil(sum(workload.lengths) / workload.num_micro_batches / execution.mlp_tile_tokens)
    return Recomputation(layers, 1.0, tiles)


def count_weights(architecture: Architecture) -> tuple[int, int, int]:
    """Number of weights in all linear layers of the decoder: around the attention, in gate_up_proj, in down_proj."""
    numbers = {name: math.prod(shape) * architecture.num_hidden_layers for name, shape in linear_shapes(architecture).items()}
    return numbers["qkv_proj"] + numbers["o_proj"], numbers["gate_up_proj"], numbers["down_proj"]


def step_flops(architecture: Architecture, workload: StepWorkload, again: Recomputation) -> float:
    """Floating-point operations of one step.

    A frozen weight costs 2 a token forward, 2 backward (the gradient of its input alone) and 2 recomputed; causal attention
    half of 4 n^2 x hidden forward and 2.5 times that backward (FlashAttention-2, section 3).
    """
    tokens, squares = sum(workload.lengths), sum(length**2 for length in workload.lengths)
    hidden, layers = architecture.hidden_size, architecture.num_hidden_layers
    attention_weights, gate_up, down = count_weights(architecture)
    weights = 2 * (attention_weights * (2 + again.layers) + gate_up * (2 + again.gate_up) + down * 2)
    widths = 9 * hidden + 3 * architecture.intermediate_size  # inputs and outputs of a layer's four matmuls, about
    adapter = layers * workload.rank * widths * 2 * (3 + again.layers)
    attention = 2 * layers * hidden * squares * (3.5 + again.layers)
    head = 4 * architecture.vocab_size * hidden
    return tokens * (weights + adapter + head) + attention


def estimate_step_seconds(architecture: Architecture, execution: ExecutionPlan, workload: StepWorkload, gpu: GpuLimits) -> float:
    """The time of one optimizer step; the MLP's weights are dequantized for every tile in each of its passes."""
    again = recomputation_of(architecture, execution, workload)
    layers, passes = architecture.num_hidden_layers, 2 + again.layers
    attention_weights, gate_up, down = count_weights(architecture)
    dequantized = attention_weights * passes + again.mlp_tiles * (gate_up * (2 + again.gate_up) + down * 2)
    moved = dequantized * DEQUANTIZED_BYTES_PER_WEIGHT if workload.quantized else 0.0
    offloaded = 2 * sum(workload.lengths) * architecture.hidden_size * 2 * layers * again.layers
    return (
        step_flops(architecture, workload, again) / (gpu.tflops_16bit * 1e12 * ARITHMETIC_SHARE)
        + workload.num_micro_batches * moved / (gpu.bandwidth_bytes_per_second * BANDWIDTH_SHARE)
        + (offloaded / OFFLOAD_BYTES_PER_SECOND if execution.activation_offloading else 0.0)
        + workload.num_micro_batches * layers * passes * LAYER_LAUNCH_SECONDS
    )


def estimate_evaluation_seconds(step_seconds: float, step_tokens: int, tokens: int, again: Recomputation) -> float:
    """The time of an evaluation of so many tokens: forward alone, one of the 2 or 3 equal passes that a step has."""
    return step_seconds * tokens / step_tokens / (2 + again.layers)


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
    last = (not interval or total % interval > 0) + training.load_best_model_at_end
    return total, total / steps_per_epoch, evaluates * ((first_step == 0) + between + last)
