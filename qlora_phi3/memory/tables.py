"""One recipe on every consumer GPU: what fits, and the longest row that does.

GPUs of one size are one line, for the one with the least usable memory: what fits there fits on all of them. Those without
bfloat16 (GTX 16, RTX 20) are a group of their own: they compute in float16 and with another attention kernel.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_phi3.hardware.gpu import Gpu, smallest_of
from qlora_phi3.hardware.gpu_table import GPU_TABLE, NATIVE_BFLOAT16, GpuSpec, name_series
from qlora_phi3.memory.margin import budget_of, read_margin
from qlora_phi3.memory.report import VramReport, as_json
from qlora_phi3.memory.vram_check import VramChecker
from qlora_phi3.units import GIB, MIB

if TYPE_CHECKING:
    from qlora_phi3.execution import ExecutionPlan
    from qlora_phi3.memory.predict import Predictor
    from qlora_phi3.memory.simulate import StepShape

SMALLEST_GB, LARGEST_GB = 4, 24
#: A long row's loss goes through at most so many tiles, of at least this size.
SMALLEST_TILE_MIB, MOST_TILES = 8, 64

#: Called with the name of the GPU that is computed, how many are done, and of how many.
GpuProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxLengthRow:
    """The longest row that fits, in tokens; 0 where none does."""

    name: str
    model: str
    usable_bytes: int
    max_length: int
    #: It is the model's own limit; a longer row may fit, but the model has no positions for it.
    is_model_limit: bool
    on_gpu_bytes: int
    #: In host memory meanwhile.
    host_bytes: int
    compute_dtype: str


def group_gpus() -> list[Gpu]:
    """The consumer GPUs of the table from 4 to 24 GB: one of each size and kind, with the least memory, at a typical speed."""
    members: dict[tuple[int, bool], list[GpuSpec]] = {}
    for gpu in GPU_TABLE:
        if SMALLEST_GB <= gpu.nominal_gb <= LARGEST_GB and gpu.consumer:
            members.setdefault((gpu.nominal_gb, gpu.compute_capability >= NATIVE_BFLOAT16), []).append(gpu)
    return [smallest_of(gpus, f"{size} GB, {name_series(gpus)}") for (size, _), gpus in sorted(members.items())]


def build_gpu_table(checker: VramChecker, devices: Sequence[Gpu], progress: GpuProgress) -> list[VramReport]:
    """Plan for each GPU; a budget of the recipe that a GPU does not have is cut to what it has. Raises as `report`."""

    def plan(device: Gpu) -> VramReport:
        budget_bytes = budget_of(checker.context.recipe.memory, device, strict=False)
        return checker.report(device, budget_bytes, with_suggestions=False)

    return [plan(device) for device in _counted(devices, progress)]


def find_max_lengths(checker: VramChecker, devices: Sequence[Gpu], progress: GpuProgress) -> list[MaxLengthRow]:
    """The longest row for each GPU, alone in its step, with the plan that needs least memory. Raises as `build_gpu_table`."""
    searches: dict[tuple[Any, ...], _MaxLengths] = {}
    counted = _counted(devices, progress)
    return [searches.setdefault(checker.kind(device), _MaxLengths(checker)).on(device) for device in counted]


def _counted(devices: Sequence[Gpu], progress: GpuProgress) -> Iterator[Gpu]:
    for number, device in enumerate(devices):
        progress(device.name, number, len(devices))
        yield device
    progress("", len(devices), len(devices))


class _MaxLengths:
    """The longest rows on GPUs of one kind: what was estimated for one is known for the next."""

    def __init__(self, checker: VramChecker) -> None:
        from qlora_phi3.memory.search import MaxLengthSearch

        def estimate(length: int) -> int:
            checker.info(f"trying a row of {length:,} tokens")
            predictor, minimal = self._minimal(length)
            return max(predictor.estimate(*minimal).values())

        self._checker = checker
        self._search = MaxLengthSearch(estimate, checker.context.architecture.max_position_embeddings)
        self._tiled: dict[int, Predictor] = {}

    def on(self, device: Gpu) -> MaxLengthRow:
        """Estimate the longest row, simulate it in full, and improve the estimate by it, until no length is left between."""
        from qlora_phi3.memory.predict import least_reserved_bytes
        from qlora_phi3.memory.search import STEP, round_length

        def longest_within(allocated_bytes: int) -> int:
            length = self._search.within(allocated_bytes)
            return length if length == self._search.at_most else round_length(length)

        recipe = self._checker.context.recipe
        self._predictor = predictor = self._checker.predictor(device)
        limit_bytes = read_margin(device.name).limit(budget_of(recipe.memory, device, strict=False))
        reservable = limit_bytes - predictor.on_gpu_bytes(0)
        length = longest_within(predictor.most_allocated(limit_bytes)) or STEP
        fitting, too_long, memory = 0, self._search.at_most + STEP, None
        while fitting < length < too_long:
            self._checker.info(f"simulating every layer with a row of {length:,} tokens")
            simulator, minimal = self._minimal(length)
            tried, fits = simulator.predict(*minimal, limit_bytes=limit_bytes)
            if fits:
                fitting, memory = length, tried
            else:
                too_long = length
            better = longest_within(int(reservable * tried.allocated_bytes / least_reserved_bytes(tried)))
            length = better if better < too_long else round_length(too_long - 1)
        shortest_bytes = predictor.estimate_on_gpu(self._search.bytes_for(STEP))
        return MaxLengthRow(
            name=device.name,
            model=recipe.model.name,
            usable_bytes=device.total_bytes,
            max_length=fitting,
            is_model_limit=fitting == self._search.at_most,
            on_gpu_bytes=memory.on_gpu_bytes if memory else shortest_bytes,
            host_bytes=memory.host_bytes if memory else 0,
            compute_dtype=str(predictor.compute_dtype).removeprefix("torch."),
        )

    def _minimal(self, length: int) -> "tuple[Predictor, tuple[ExecutionPlan, StepShape]]":
        """The plan for a step of one row; evaluating it needs less. A long row's loss goes through few tiles, all simulated."""
        from qlora_phi3.memory.plan import assume_lengths
        from qlora_phi3.memory.search import minimal_memory_plan

        predictor, row = self._predictor, replace(assume_lengths(length, 1), longest_evaluation=0)
        recipe = predictor.recipe
        if recipe.memory.logits_tile == "auto":
            logits_bytes = 4 * length * self._checker.context.architecture.vocab_size
            tile = max(SMALLEST_TILE_MIB, -(-logits_bytes // MOST_TILES // MIB))
            memory = recipe.memory.model_copy(update={"logits_tile": f"{tile}MiB"})
            changed = replace(predictor, recipe=recipe.model_copy(update={"memory": memory}))
            predictor = self._tiled.setdefault(tile, changed).on_gpu(predictor.capability, predictor.multiprocessors)
        return predictor, minimal_memory_plan(predictor, row)


def table_row_as_json(report: VramReport) -> dict[str, Any]:
    """The report, with the size and the series of its GPUs."""
    gpus = [gpu for gpu in GPU_TABLE if gpu.label in report.device.represents]
    series = name_series(gpus) if gpus else report.device.name
    return {**as_json(report), "nominal_gb": math.ceil(report.device.total_bytes / GIB), "series": series}
