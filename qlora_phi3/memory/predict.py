"""From a recipe and a set-up to what the card will show: simulated, then served by a model of the allocator.

Three figures are told apart. Allocated: bytes that tensors hold. Reserved: what PyTorch's allocator holds for them. On the card:
that and the CUDA context, as NVML shows it.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_phi3.execution import ExecutionPlan
from qlora_phi3.family import Architecture
from qlora_phi3.memory.allocator import expandable_segments_work, replay
from qlora_phi3.memory.cuda_path import context_bytes
from qlora_phi3.memory.report import MemoryReport
from qlora_phi3.memory.simulate import StepShape, simulate
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.units import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a set-up will take."""

    execution: ExecutionPlan
    profile: MemoryReport
    allocated_bytes: int
    reserved_bytes: int
    context_bytes: int
    #: Whether the allocator, held to the limit it was asked about, serves every request.
    fits: bool

    @property
    def on_card_bytes(self) -> int:
        """As NVML shows this process at its peak."""
        return self.reserved_bytes + self.context_bytes


#: What the allocator must be allowed to hold is about this many times what is allocated, and so much beside it (a share of what
#: is allocated where that is little). On Phi-3-mini, offloaded and in tiles, 3,408 MiB for 3,185 (7 thousand tokens) and
#: 11,212 for 10,859 (83 thousand).
DEFAULT_RATIO, DEFAULT_SLACK_BYTES, SLACK_SHARE = 1.025, 140 * MIB, 0.05


def estimate_reserved(allocated_bytes: int) -> int:
    """What the allocator must be allowed to hold for a peak, about."""
    return int(allocated_bytes * DEFAULT_RATIO + min(DEFAULT_SLACK_BYTES, allocated_bytes * SLACK_SHARE))


def estimate_allocated(reserved_bytes: int) -> int:
    """The peak that finds room in what the allocator may hold, about: `estimate_reserved` the other way round."""
    return int(
        max((reserved_bytes - DEFAULT_SLACK_BYTES) / DEFAULT_RATIO, reserved_bytes / (DEFAULT_RATIO + SLACK_SHARE))
    )


class Predictor:
    """Simulates set-ups of one recipe on one kind of card, each only once.

    Args:
        config: the contents of the model's config.json.
        capability: the card's compute capability.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: dict[str, Any],
        architecture: Architecture,
        *,
        compute_dtype: torch.dtype,
        capability: tuple[int, int],
    ) -> None:
        self.recipe, self.config, self.architecture = recipe, config, architecture
        self.compute_dtype, self.capability = compute_dtype, capability
        self._profiles: dict[tuple[ExecutionPlan, StepShape, int], MemoryReport] = {}

    def with_recipe(self, recipe: Recipe) -> "Predictor":
        """The same for a changed recipe."""
        return Predictor(
            recipe, self.config, self.architecture, compute_dtype=self.compute_dtype, capability=self.capability
        )

    def prediction(self, execution: ExecutionPlan, shape: StepShape, *, limit_bytes: int) -> Prediction:
        """Simulate every layer.

        Args:
            limit_bytes: what the process may take on the card, its CUDA context counted.
        """
        profile = self.profile(execution, shape, self.architecture.num_hidden_layers)
        context = context_bytes(self.capability)
        expandable = expandable_segments_work(platform.system(), platform.release())
        held = replay(profile.trace, expandable_segments=expandable, limit_bytes=limit_bytes - context)
        if held.fits:
            return _predict(execution, profile, held.peak_reserved_bytes, context, fits=True)
        free = replay(profile.trace, expandable_segments=expandable)
        return _predict(execution, profile, free.peak_reserved_bytes, context, fits=False)

    def on_card(self, reserved_bytes: int) -> int:
        """What NVML shows where the allocator holds so much."""
        return reserved_bytes + context_bytes(self.capability)

    def phases(self, execution: ExecutionPlan, shape: StepShape) -> Mapping[str, int]:
        """Phase -> allocated at its peak, from two models of few layers where all are alike: each phase grows by the layer."""
        layers, every = self.architecture.num_hidden_layers, max(1, execution.checkpoint_every)
        if layers % every or not self._can_extrapolate(every):
            return self.profile(execution, shape, layers).phases
        start, growth = self._per_layer_fit(execution, shape)
        return {phase: start[phase] + growth[phase] * layers // every for phase in start}

    def estimate(self, execution: ExecutionPlan, shape: StepShape) -> Mapping[str, int]:
        """The same, sooner, where one layer in several is recomputed: between all and none of them.

        On Phi-3-mini (2,048 tokens, one layer in 2 to 16) 0.2 to 0.3 % below `phases`; with
        the MLPs in tiles up to 0.7 % above.
        """
        every, layers = execution.checkpoint_every, self.architecture.num_hidden_layers
        if every <= 1 or not self._can_extrapolate(1):
            return self.phases(execution, shape)
        plain = replace(execution, mlp_tile_tokens=0) if self.recipe.memory.mlp_tile_tokens == "auto" else execution
        start, kept = self._per_layer_fit(replace(execution, checkpoint_every=0), shape)
        (none, _), (all_, again) = (
            self._per_layer_fit(replace(plain, checkpoint_every=each), shape) for each in (0, 1)
        )
        recomputed, above = (
            -(-layers // every),
            (layers - 1) % every,
        )  # layers that are kept above the last recomputed one
        loss, first_again = {}, {}  # the backward pass begins; it comes to that layer, and those above are gone
        for phase in start:
            loss[phase] = start[phase] + recomputed * again[phase] + (layers - recomputed) * kept[phase]
            first_again[phase] = loss[phase] + all_[phase] - none[phase] - above * kept[phase]
        return {phase: max(loss[phase], first_again[phase]) for phase in start}

    def _per_layer_fit(self, execution: ExecutionPlan, shape: StepShape) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Phase -> bytes without any layer, and with each group of as many as recomputation goes by."""
        every = max(1, execution.checkpoint_every)
        few = max(2, every)
        small, larger = (self.profile(execution, shape, number).phases for number in (few, few + every))
        growth = {phase: larger[phase] - small[phase] for phase in small}
        return {phase: small[phase] - growth[phase] * few // every for phase in small}, growth

    def _can_extrapolate(self, every: int) -> bool:
        return self._layers_are_alike() and self.architecture.num_hidden_layers > max(2, every) + every

    def profile(self, execution: ExecutionPlan, shape: StepShape, num_layers: int) -> MemoryReport:
        """Simulate a model of so many layers."""
        key = (execution, shape, num_layers)
        if key not in self._profiles:
            self._profiles[key] = simulate(
                self.recipe,
                {**self.config, "num_hidden_layers": num_layers},
                replace(self.architecture, num_hidden_layers=num_layers),
                execution,
                shape,
                compute_dtype=self.compute_dtype,
                capability=self.capability,
            )
        return self._profiles[key]

    def _layers_are_alike(self) -> bool:
        lora = self.recipe.lora
        by_number = lora.layers_to_transform is not None or lora.rank_pattern or lora.alpha_pattern
        names = [*([lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules)]
        return not by_number and not lora.exclude_modules and not any("layers" in name for name in names)


def least_reserved_bytes(prediction: Prediction) -> int:
    """The least that the allocator must be allowed to hold, to half a percent: short of room it gives back and regroups."""
    expandable = expandable_segments_work(platform.system(), platform.release())
    least, enough = prediction.allocated_bytes, max(prediction.allocated_bytes, prediction.reserved_bytes)
    while enough - least > least // 200:
        middle = (least + enough) // 2
        if replay(prediction.profile.trace, expandable_segments=expandable, limit_bytes=middle).fits:
            enough = middle
        else:
            least = middle
    return enough


def _predict(execution: ExecutionPlan, profile: MemoryReport, reserved: int, context: int, *, fits: bool) -> Prediction:
    return Prediction(
        execution=execution,
        profile=profile,
        allocated_bytes=profile.peak_bytes,
        reserved_bytes=reserved,
        context_bytes=context,
        fits=fits,
    )
