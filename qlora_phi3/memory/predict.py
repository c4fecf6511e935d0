"""Predicts the memory of a recipe under an execution plan: simulates the step, then replays it in a model of the allocator."""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar

import torch

from qlora_phi3.execution import ExecutionPlan
from qlora_phi3.family import Architecture, linear_shapes
from qlora_phi3.memory.allocator import Footprint, replay, uses_expandable_segments
from qlora_phi3.memory.cost import Kernels, StepKernels, add_kernels, keep_attention
from qlora_phi3.memory.cuda_path import MOST_FUSED_ROWS, context_bytes, fused_rows
from qlora_phi3.memory.report import MemoryReport
from qlora_phi3.memory.simulate import StepShape, simulate
from qlora_phi3.memory.trace import Trace, add_layers
from qlora_phi3.memory.tracker import BACKWARD_PHASES, FORWARD_PHASES
from qlora_phi3.model.optimizer import default_optimizer
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.units import MIB

#: What the allocator must be allowed to hold is about this many times what is allocated, and so much more (a share of what is
#: allocated where that is little). On Phi-3-mini, offloaded and in tiles, 3,408 MiB for 3,185 (7 thousand tokens) and 11,212
#: for 10,859 (83 thousand).
DEFAULT_RATIO, DEFAULT_SLACK_BYTES, SLACK_SHARE = 1.025, 140 * MIB, 0.05

#: Layers (or groups of layers with one recomputed, or layers in each) of the smaller of two models that a larger one
#: is continued from. The first and the last differ from the others: of 3 one in five could not be continued, of 4 all could.
FEW = 4
#: Tokens of the longest micro-batch whose kernels are counted: those of longer ones do more of the same.
LONGEST_COUNTED = 4096
#: Two models of fewer layers than this share of the complete model's are worth it.
WORTH = 0.75


@dataclass(eq=False, slots=True)
class Predictor:
    """Simulates execution plans of one recipe on one kind of GPU, each only once; `device.CpuPredictor` does so on a CPU."""

    recipe: Recipe
    #: The contents of the model's config.json.
    config: dict[str, Any]
    architecture: Architecture
    _: KW_ONLY
    compute_dtype: torch.dtype
    #: The GPU's compute capability, and its multiprocessors.
    capability: tuple[int, int]
    multiprocessors: int
    #: Of the plans that are searched. Without them a plan needs no less memory.
    fused_kernels: bool = False
    #: Layers' inputs can be moved to host memory, and micro-batches of any size start the same kernels.
    is_gpu: ClassVar[bool] = True
    _simulated: dict[Any, Trace] = field(default_factory=dict, init=False)

    def predict(self, execution: ExecutionPlan, shape: StepShape, *, limit_bytes: int) -> tuple[MemoryReport, bool]:
        """Simulate every layer; and whether the allocator serves every request within a limit.

        Args:
            limit_bytes: what the process may take on the GPU, its CUDA context included.
        """
        memory, fits = self._reserve(self.simulate_all_layers(execution, shape), limit_bytes - self.on_gpu_bytes(0))
        return replace(memory, on_gpu_bytes=self.on_gpu_bytes(memory.reserved_bytes)), fits

    def _reserve(self, memory: MemoryReport, limit_bytes: int) -> tuple[MemoryReport, bool]:
        """With what the allocator reserves, and whether that is within a limit."""
        footprint = _replay(memory, limit_bytes)
        served = footprint if footprint.fits else _replay(memory)
        return replace(memory, reserved_bytes=served.peak_reserved_bytes, cache_flushes=served.cache_flushes), footprint.fits

    @property
    def optimizers(self) -> tuple[str, ...]:
        """Optimizers that the plan may take, the one that needs least memory last."""
        optim = default_optimizer(self.recipe.training, is_cuda=True)
        return (optim, f"paged_{optim}") if self.recipe.training.optim == "auto" else (optim,)

    @property
    def may_keep_attention(self) -> bool:
        """Whether the attention of recomputed layers may be kept: a fused kernel computes it, and draws no random numbers."""
        is_fused = self.is_gpu and (self.capability >= (8, 0) or self.compute_dtype != torch.bfloat16)
        return is_fused and self.recipe.model.attn_implementation == "sdpa" and not self.config.get("attention_dropout")

    @property
    def usual_tokens(self) -> int | None:
        """Tokens of a micro-batch, where fewer are tried only if nothing fits with them, and more never; None: the fastest."""
        return None

    def explain(self, execution: ExecutionPlan) -> dict[str, str]:
        """Key of the recipe -> why the plan gives it this value, where the reason is one of this kind of device alone."""
        return {}

    def simulate_all_layers(self, execution: ExecutionPlan, shape: StepShape) -> MemoryReport:
        """The complete model. Where all layers are alike, two models of few layers say the same in less time (`add_layers`)."""
        layers, every = self.architecture.num_hidden_layers, execution.checkpoint_every
        group = max(1, every)
        groups, trace = layers // group, None
        if every <= FEW:
            models, times = [(execution, number * group) for number in (FEW, FEW + 1)], groups - FEW - 1
        else:
            shorter = (replace(execution, checkpoint_every=number) for number in (FEW, FEW + 1))
            models, times = [(each, groups * each.checkpoint_every) for each in shorter], every - FEW - 1
        if layers % group == 0 and sum(number for _, number in models) < WORTH * layers and self._layers_are_alike():
            small, large = (self._trace(each, shape, number) for each, number in models)
            trace = add_layers(small, large, times)
        return (trace or self._trace(execution, shape, layers)).report()

    def simulate(self, execution: ExecutionPlan, shape: StepShape, num_layers: int) -> MemoryReport:
        """A model of so many layers."""
        return self._trace(execution, shape, num_layers).report()

    def _trace(self, execution: ExecutionPlan, shape: StepShape, num_layers: int) -> Trace:
        options = self._simulation_options(execution, shape)
        key = (execution, shape, num_layers, tuple(options.get("fused_rows", {}).items()))
        if key not in self._simulated:
            self._simulated[key] = simulate(
                self.recipe,
                {**self.config, "num_hidden_layers": num_layers},
                replace(self.architecture, num_hidden_layers=num_layers),
                execution,
                shape,
                compute_dtype=self.compute_dtype,
                **options,
            )
        return self._simulated[key]

    def _simulation_options(self, execution: ExecutionPlan, shape: StepShape) -> dict[str, Any]:
        """What `simulate` is told of the device."""
        options: dict[str, Any] = {"capability": self.capability}
        if _padded_tokens(execution, shape.lengths) <= MOST_FUSED_ROWS:  # differs between GPUs of one capability
            shapes = linear_shapes(self.architecture).values()
            kind = self.capability, self.multiprocessors
            options["fused_rows"] = {each: fused_rows(*kind, each, self.compute_dtype) for each in shapes}
        return options

    def on_gpu(self, capability: tuple[int, int], multiprocessors: int) -> "Predictor":
        """For another GPU on which the same operators run; it shares what was simulated."""
        other = copy(self)
        other.capability, other.multiprocessors = capability, multiprocessors
        return other

    def on_gpu_bytes(self, reserved_bytes: int, /) -> int:
        """What NVML shows for a process whose allocator holds so much."""
        return reserved_bytes + context_bytes(self.multiprocessors)

    def estimate_on_gpu(self, allocated_bytes: int, /) -> int:
        """What NVML shows for a process whose tensors have such a peak, about."""
        slack_bytes = min(DEFAULT_SLACK_BYTES, allocated_bytes * SLACK_SHARE)
        return self.on_gpu_bytes(int(allocated_bytes * DEFAULT_RATIO + slack_bytes))

    def most_allocated(self, limit_bytes: int, /) -> int:
        """The peak that fits into so much on the GPU, about: the inverse of `estimate_on_gpu`."""
        reserved_bytes = limit_bytes - self.on_gpu_bytes(0)
        without_slack = (reserved_bytes - DEFAULT_SLACK_BYTES) / DEFAULT_RATIO
        return int(max(without_slack, reserved_bytes / (DEFAULT_RATIO + SLACK_SHARE)))

    def estimate(self, execution: ExecutionPlan, shape: StepShape) -> Mapping[str, int]:
        """Phase -> most bytes allocated, from models of two and three layers where all layers are alike: growth is linear.

        Without evaluation, which takes less than training does on rows of equal length, unless all layers are simulated.
        Where one layer in several is recomputed, interpolated between all and none of them: on Phi-3-mini (2,048 tokens, one
        layer in 2 to 16) 0.2 to 0.3 % too low; with the MLPs in tiles up to 0.7 % too high. Attention that is kept is added, of
        one layer too much: the one that is recomputed has it in any case.
        """
        every, layers = execution.checkpoint_every, self.architecture.num_hidden_layers
        if not self._can_extrapolate:
            return self.simulate_all_layers(execution, shape).by_phase
        if execution.keep_attention:
            peaks, kept_bytes = self.estimate(replace(execution, keep_attention=False), shape), 0
            if not execution.activation_offloading:
                kept_bytes = -(-layers // every) * sum(self.kept_attention_bytes(shape.lengths, execution))
            return {phase: size + kept_bytes * (phase in (*FORWARD_PHASES, *BACKWARD_PHASES)) for phase, size in peaks.items()}
        shape = replace(shape, evaluation_lengths=())
        if every <= 1:
            start, growth = self._per_layer_fit(execution, shape)
            return {phase: start[phase] + growth[phase] * layers for phase in start}
        plain = replace(execution, mlp_tile_tokens=0) if self.recipe.memory.mlp_tile_tokens == "auto" else execution
        start, saved = self._per_layer_fit(replace(execution, checkpoint_every=0), shape)
        none, _ = self._per_layer_fit(replace(plain, checkpoint_every=0), shape)
        all_layers, recomputed = self._per_layer_fit(replace(plain, checkpoint_every=1), shape)
        num_recomputed = -(-layers // every)
        above = (layers - 1) % every  # layers that are not recomputed above the last one that is
        peaks = {}
        for phase in start:
            # The backward pass begins; later it reaches the last recomputed layer, and those above are freed.
            loss = start[phase] + num_recomputed * recomputed[phase] + (layers - num_recomputed) * saved[phase]
            peaks[phase] = max(loss, loss + all_layers[phase] - none[phase] - above * saved[phase])
        return peaks

    def step_kernels(self, execution: ExecutionPlan, shape: StepShape) -> StepKernels:
        """The kernels of the complete model; from models of few layers, where all layers are alike.

        Of rows that are longer than `LONGEST_COUNTED` one of that length is counted.
        """
        if sum(shape.lengths) > LONGEST_COUNTED:
            shape = StepShape(lengths=(LONGEST_COUNTED,))
        lengths = shape.lengths
        if execution.keep_attention:
            step = self.step_kernels(replace(execution, keep_attention=False), shape)
            share = -(-step.num_layers // execution.checkpoint_every) / step.num_layers
            return keep_attention(step, share, self.kept_attention_bytes(lengths, execution), execution.activation_offloading)
        every, layers, tile = execution.checkpoint_every, self.architecture.num_hidden_layers, execution.mlp_tile_tokens
        recomputed = math.ceil(layers / every) if every else 0
        outside: list[tuple[int, Trace]] = []
        of_layers: list[tuple[int, Trace]] = []
        if self._can_extrapolate:
            shape = replace(shape, evaluation_lengths=())
            for number, kind in ((layers - recomputed, 0), (recomputed, 1)):
                if number:
                    small, large = (self._trace(replace(execution, checkpoint_every=kind), shape, few) for few in (2, 3))
                    of_layers += [(number, large), (-number, small)]
                    outside = [(3, small), (-2, large)]
        else:
            of_layers = [(1, self._trace(execution, shape, layers))]
        widths = lengths if execution.micro_batch.packing else [max(lengths)] * len(lengths)

        def add(*phases: str, parts: Sequence[tuple[int, Trace]] = (*of_layers, *outside)) -> Kernels:
            return add_kernels(*((times, trace.kernels[phase]) for times, trace in parts for phase in phases))

        return StepKernels(
            forward=add("forward"),
            backward=add("backward"),
            update=add("update"),
            layers=add("forward", "backward", parts=of_layers),
            num_layers=layers,
            kept_bytes=sum(times * trace.kept_bytes() for times, trace in of_layers),
            tokens=sum(widths),
            squares=sum(width**2 for width in widths),
            mlp_tile_tokens=tile,
            untiled=self.step_kernels(replace(execution, mlp_tile_tokens=0), shape) if tile else None,
        )

    def kept_attention_bytes(self, lengths: Sequence[int], execution: ExecutionPlan) -> tuple[int, int]:
        """What one layer keeps of the attention of rows of so many tokens: the output, and the logarithms of the sums."""
        tokens = _padded_tokens(execution, lengths)
        hidden_size, heads = self.architecture.hidden_size, self.architecture.num_attention_heads
        return tokens * hidden_size * self.compute_dtype.itemsize, tokens * heads * 4

    def _per_layer_fit(self, execution: ExecutionPlan, shape: StepShape) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Phase -> bytes without any layer, and with each one."""
        small, larger = (self.simulate(execution, shape, number).by_phase for number in (2, 3))
        growth = {phase: larger[phase] - small[phase] for phase in small}
        return {phase: small[phase] - 2 * growth[phase] for phase in small}, growth

    @property
    def _can_extrapolate(self) -> bool:
        """Whether all layers are alike, and more than the two small models have."""
        return self.architecture.num_hidden_layers > 3 and self._layers_are_alike()

    def _layers_are_alike(self) -> bool:
        """Whether the recipe treats every layer as the others."""
        lora = self.recipe.lora
        patterns = lora.rank_pattern or lora.alpha_pattern or lora.exclude_modules
        names = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
        return lora.layers_to_transform is None and not patterns and not any("layers" in name for name in names)


def _padded_tokens(execution: ExecutionPlan, lengths: Sequence[int]) -> int:
    """Tokens of the micro-batch of rows of these lengths."""
    return sum(lengths) if execution.micro_batch.packing else max(lengths, default=0) * len(lengths)


def least_reserved_bytes(memory: MemoryReport) -> int:
    """The least that the allocator must be allowed to hold, to half a percent: near a limit it returns and regroups segments.

    Args:
        memory: with its trace.
    """
    least, enough = memory.allocated_bytes, max(memory.allocated_bytes, memory.reserved_bytes)
    while enough - least > least // 200:
        middle = (least + enough) // 2
        if _replay(memory, middle).fits:
            enough = middle
        else:
            least = middle
    return enough


def _replay(memory: MemoryReport, limit_bytes: int | None = None) -> Footprint:
    return replay(memory.trace, expandable_segments=uses_expandable_segments(), limit_bytes=limit_bytes)
