"""From a recipe and a set-up to what the card will show: simulated, then served by a model of the allocator.

Three figures are told apart. Allocated: bytes that tensors hold. Reserved: what PyTorch's allocator holds for them. On the card:
that and the CUDA context, as NVML shows it.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora_phi3.execution import Setup
from qlora_phi3.family import Architecture
from qlora_phi3.memory.allocator import expandable_segments_work, replay
from qlora_phi3.memory.cuda_path import context_bytes
from qlora_phi3.memory.report import Profile
from qlora_phi3.memory.simulate import Load, simulate
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.units import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a set-up will take."""

    setup: Setup
    profile: Profile
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
USUAL_RATIO, USUAL_SLACK_BYTES, SLACK_SHARE = 1.025, 140 * MIB, 0.05


def reserved_guess(allocated_bytes: int) -> int:
    """What the allocator must be allowed to hold for a peak, about."""
    return int(allocated_bytes * USUAL_RATIO + min(USUAL_SLACK_BYTES, allocated_bytes * SLACK_SHARE))


def allocated_guess(reserved_bytes: int) -> int:
    """The peak that finds room in what the allocator may hold, about: `reserved_guess` the other way round."""
    return int(max((reserved_bytes - USUAL_SLACK_BYTES) / USUAL_RATIO, reserved_bytes / (USUAL_RATIO + SLACK_SHARE)))


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
        self._profiles: dict[tuple[Setup, Load, int], Profile] = {}

    def with_recipe(self, recipe: Recipe) -> "Predictor":
        """The same for a changed recipe."""
        return Predictor(
            recipe, self.config, self.architecture, compute_dtype=self.compute_dtype, capability=self.capability
        )

    def forecast(self, setup: Setup, load: Load, *, limit_bytes: int) -> Forecast:
        """Simulate every layer.

        Args:
            limit_bytes: what the process may take on the card, its CUDA context counted.
        """
        profile = self.profile(setup, load, self.architecture.num_hidden_layers)
        context = context_bytes(self.capability)
        expandable = expandable_segments_work(platform.system(), platform.release())
        held = replay(profile.trace, expandable_segments=expandable, limit_bytes=limit_bytes - context)
        if held.fits:
            return _forecast(setup, profile, held.peak_reserved_bytes, context, fits=True)
        free = replay(profile.trace, expandable_segments=expandable)
        return _forecast(setup, profile, free.peak_reserved_bytes, context, fits=False)

    def on_card(self, reserved_bytes: int) -> int:
        """What NVML shows where the allocator holds so much."""
        return reserved_bytes + context_bytes(self.capability)

    def phases(self, setup: Setup, load: Load) -> Mapping[str, int]:
        """Phase -> allocated at its peak, from two models of few layers where all are alike: each phase grows by the layer."""
        layers, every = self.architecture.num_hidden_layers, max(1, setup.checkpoint_every)
        if layers % every or not self._few_layers_tell(every):
            return self.profile(setup, load, layers).phases
        start, growth = self._line(setup, load)
        return {phase: start[phase] + growth[phase] * layers // every for phase in start}

    def estimate(self, setup: Setup, load: Load) -> Mapping[str, int]:
        """The same, sooner, where one layer in several is recomputed: between all and none of them.

        On Phi-3-mini (2,048 tokens, one layer in 2 to 16) 0.2 to 0.3 % below `phases`; with
        the MLPs in tiles up to 0.7 % above.
        """
        every, layers = setup.checkpoint_every, self.architecture.num_hidden_layers
        if every <= 1 or not self._few_layers_tell(1):
            return self.phases(setup, load)
        plain = replace(setup, mlp_tile_tokens=0) if self.recipe.memory.mlp_tile_tokens == "auto" else setup
        start, kept = self._line(replace(setup, checkpoint_every=0), load)
        (none, _), (all_, again) = (self._line(replace(plain, checkpoint_every=each), load) for each in (0, 1))
        recomputed, above = (
            -(-layers // every),
            (layers - 1) % every,
        )  # layers that are kept above the last recomputed one
        loss, first_again = {}, {}  # the backward pass begins; it comes to that layer, and those above are gone
        for phase in start:
            loss[phase] = start[phase] + recomputed * again[phase] + (layers - recomputed) * kept[phase]
            first_again[phase] = loss[phase] + all_[phase] - none[phase] - above * kept[phase]
        return {phase: max(loss[phase], first_again[phase]) for phase in start}

    def _line(self, setup: Setup, load: Load) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Phase -> bytes without any layer, and with each group of as many as recomputation goes by."""
        every = max(1, setup.checkpoint_every)
        few = max(2, every)
        small, larger = (self.profile(setup, load, number).phases for number in (few, few + every))
        growth = {phase: larger[phase] - small[phase] for phase in small}
        return {phase: small[phase] - growth[phase] * few // every for phase in small}, growth

    def _few_layers_tell(self, every: int) -> bool:
        return self._layers_are_alike() and self.architecture.num_hidden_layers > max(2, every) + every

    def profile(self, setup: Setup, load: Load, num_layers: int) -> Profile:
        """Simulate a model of so many layers."""
        key = (setup, load, num_layers)
        if key not in self._profiles:
            self._profiles[key] = simulate(
                self.recipe,
                {**self.config, "num_hidden_layers": num_layers},
                replace(self.architecture, num_hidden_layers=num_layers),
                setup,
                load,
                compute_dtype=self.compute_dtype,
                capability=self.capability,
            )
        return self._profiles[key]

    def _layers_are_alike(self) -> bool:
        lora = self.recipe.lora
        by_number = lora.layers_to_transform is not None or lora.rank_pattern or lora.alpha_pattern
        names = [*([lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules)]
        return not by_number and not lora.exclude_modules and not any("layers" in name for name in names)


def least_reserved_bytes(forecast: Forecast) -> int:
    """The least that the allocator must be allowed to hold, to half a percent: short of room it gives back and regroups."""
    expandable = expandable_segments_work(platform.system(), platform.release())
    least, enough = forecast.allocated_bytes, max(forecast.allocated_bytes, forecast.reserved_bytes)
    while enough - least > least // 200:
        middle = (least + enough) // 2
        if replay(forecast.profile.trace, expandable_segments=expandable, limit_bytes=middle).fits:
            enough = middle
        else:
            least = middle
    return enough


def _forecast(setup: Setup, profile: Profile, reserved: int, context: int, *, fits: bool) -> Forecast:
    return Forecast(
        setup=setup,
        profile=profile,
        allocated_bytes=profile.peak_bytes,
        reserved_bytes=reserved,
        context_bytes=context,
        fits=fits,
    )
