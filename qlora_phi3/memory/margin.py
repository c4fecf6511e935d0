"""How much of a budget a prediction leaves free, and how the errors of earlier runs on a GPU widen it; no torch.

The margin is 3 % of the prediction and at least 128 MiB. Every run records what it took and what was predicted. Where one and a
half times the median of the errors is more than 3 %, that is the share. In the median a run counts 0.9 times as much as the run
after it: the seven newest runs outweigh any number of older ones, and one odd run among several changes nothing.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_phi3.errors import DeviceError, RunError
from qlora_phi3.files import read_json_object, save_for_later, user_state_dir
from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.units import MIB, format_gib, parse_size

if TYPE_CHECKING:
    from qlora_phi3.recipe.schema import Memory

#: The share of the prediction, and the least. Chosen, not measured: on CPUs, predictions were never too low by more than 0.5 %.
DEFAULT_SHARE, LEAST_BYTES = 0.03, 128 * MIB
#: Share of the computer's free memory that a plan for a CPU may take: other programs need the rest, and the process more than
#: its tensors.
CPU_MEMORY_SHARE = 0.5
#: Runs that take 4 % more than predicted ask for 6 %: the next one may miss by a little more.
SAFETY_FACTOR = 1.5
#: How much a run counts in the median, relative to the run after it.
DECAY = 0.9
#: Runs that are recorded for each GPU, the latest ones.
MAX_RECORDS = 50
RECORDS_NAME = "prediction-errors.json"
#: No prediction was ever off by a factor of two, so a record that is off by more than this is damaged.
LARGEST_FACTOR = 10


@dataclass(frozen=True, slots=True)
class Margin:
    """What a prediction leaves free."""

    #: Of the prediction.
    share: float
    #: Runs on this GPU whose prediction was compared with what they took.
    runs: int = 0

    def bytes_for(self, predicted_bytes: int) -> int:
        """The margin of a prediction, in bytes."""
        return max(LEAST_BYTES, int(predicted_bytes * self.share))

    def limit(self, budget_bytes: int) -> int:
        """The largest prediction that leaves its margin within a budget, in bytes."""
        return max(0, min(budget_bytes - LEAST_BYTES, int(budget_bytes / (1 + self.share))))


def budget_of(memory: "Memory", device: Gpu, *, processes: int = 1, strict: bool = True) -> int:
    """Bytes a run may take on a GPU, its margin included: what is free there, or less where [memory] budget says so. DeviceError
    where the recipe's budget is more than the GPU has; without `strict` such a GPU gives what it has.
    On a CPU the tensors of all `processes` may take CPU_MEMORY_SHARE of what is free, whatever the recipe says of GPUs.
    """
    if device.is_cpu:
        return int(CPU_MEMORY_SHARE * device.free_bytes) // processes
    wanted = memory.budget
    if wanted == "auto":
        return device.free_bytes
    if strict and parse_size(wanted) > device.total_bytes:
        raise DeviceError(
            f'[memory] budget = "{wanted}", and {device.name} has {format_gib(device.total_bytes)} that programs can use.',
            'Write a smaller one, or budget = "auto".',
        )
    return min(parse_size(wanted), device.free_bytes)


def read_margin(gpu_name: str) -> Margin:
    """The margin on a GPU, by NVML's name or the table's."""
    records = _read_records().get(gpu_name, ())
    errors = [record["measured_bytes"] / record["predicted_bytes"] - 1 for record in records]
    weights = [DECAY**age for age in reversed(range(len(errors)))]
    median, counted = 0.0, 0.0
    for error, weight in sorted(zip(errors, weights, strict=True)):
        counted += weight
        if counted >= sum(weights) / 2:
            median = error
            break
    return Margin(max(DEFAULT_SHARE, SAFETY_FACTOR * median), len(errors))


def record_error(gpu_name: str, predicted_bytes: int, measured_bytes: int) -> None:
    """Record what a run took on a GPU and what was predicted; a directory that cannot be written is ignored."""
    sizes = {"predicted_bytes": predicted_bytes, "measured_bytes": measured_bytes}
    record, records = {**sizes, "date": time.strftime("%Y-%m-%d")}, _read_records()
    records = {**records, gpu_name: [*records.get(gpu_name, ()), record][-MAX_RECORDS:]}
    save_for_later(user_state_dir() / RECORDS_NAME, json.dumps(records, indent=1) + "\n")


def _read_records() -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """GPU -> records, the oldest first; entries that are no records are ignored, and are gone when the file is written again."""
    try:
        saved = read_json_object(user_state_dir() / RECORDS_NAME, RunError, "")
    except RunError:
        return {}
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name, records in saved.items():
        for record in records if isinstance(records, list) else ():
            with suppress(TypeError, KeyError, ArithmeticError):
                if 1 / LARGEST_FACTOR < record["measured_bytes"] / record["predicted_bytes"] < LARGEST_FACTOR:
                    found.setdefault(name, []).append(record)
    return found
