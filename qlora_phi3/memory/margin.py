"""How much of a budget a prediction leaves alone, and how runs that took more than predicted widen it.

The margin is stated, not felt: 3 % of the prediction and at least 128 MiB; on a card where a run once took more than was
predicted, half as much again as the worst such miss where that is more. No torch.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_phi3.errors import DeviceError, RunError
from qlora_phi3.files import atomic_write, user_state_dir
from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.units import format_gib, parse_size

if TYPE_CHECKING:
    from qlora_phi3.recipe.schema import Recipe

#: The share of the prediction, and the least. Chosen, not measured: on CPUs, predictions were never too low by more than 0.5 %.
DEFAULT_SHARE, LEAST_BYTES = 0.03, 128 * 2**20


#: A run that took 4 % more than predicted asks for 6 %: the next one may miss by a little more.
SAFETY_FACTOR = 1.5


#: Runs that are remembered of each card, the latest ones.
MAX_RECORDS = 50


@dataclass(frozen=True, slots=True)
class Margin:
    """What stays free beside a prediction."""

    #: Of the prediction.
    share: float
    #: Runs on this card whose prediction was held against what they took.
    runs: int = 0

    @property
    def widened(self) -> bool:
        """Whether a run on this card asked for more than the usual."""
        return self.share > DEFAULT_SHARE

    def bytes_for(self, predicted_bytes: int) -> int:
        """The margin in bytes."""
        return max(LEAST_BYTES, int(predicted_bytes * self.share))

    def limit(self, budget_bytes: int) -> int:
        """The largest prediction that leaves its margin within a budget."""
        return max(0, min(budget_bytes - LEAST_BYTES, int(budget_bytes / (1 + self.share))))


def budget_of(recipe: "Recipe", device: Gpu) -> int:
    """Bytes the run may take on a card, its margin counted: what is free there, or less where [memory] budget says so.

    Raises:
        DeviceError: the recipe's budget is more than the card has.
    """
    wanted = recipe.memory.budget
    if wanted != "auto" and parse_size(wanted) > device.total_bytes:
        raise DeviceError(
            f'[memory] budget = "{wanted}", and {device.name} has {format_gib(device.total_bytes)} that programs can use.',
            'Write a smaller one, or budget = "auto".',
        )
    return budget_within(recipe, device)


def budget_within(recipe: "Recipe", device: Gpu) -> int:
    """The same, where a card that has less than the budget gives what it has."""
    wanted = recipe.memory.budget
    return device.free_bytes if wanted == "auto" else min(parse_size(wanted), device.free_bytes)


def limit_of(device: Gpu, budget_bytes: int) -> int:
    """The most that may be predicted on a card for a run to count as fitting a budget."""
    return read_margin(device.name).limit(budget_bytes)


def read_margin(card_name: str) -> Margin:
    """The margin on a card, by NVML's name or the table's."""
    errors = [(record["measured_bytes"] / record["predicted_bytes"]) - 1 for record in _read().get(card_name, ())]
    return Margin(max(DEFAULT_SHARE, SAFETY_FACTOR * max(errors, default=0.0)), len(errors))


def margin_share(card_name: str) -> float:
    """The share of a prediction that is left free on a card."""
    return read_margin(card_name).share


def record_error(card_name: str, predicted_bytes: int, measured_bytes: int) -> None:
    """Remember what a run took on a card beside what was predicted; where the folder cannot be written, nothing is."""
    record = {
        "predicted_bytes": predicted_bytes,
        "measured_bytes": measured_bytes,
        "date": time.strftime("%Y-%m-%d"),
    }
    records = _read()
    records = {**records, card_name: [*records.get(card_name, ()), record][-MAX_RECORDS:]}
    with suppress(OSError, RunError):
        _path().parent.mkdir(parents=True, exist_ok=True)
        atomic_write(_path(), json.dumps(records, indent=1) + "\n")


def _path() -> Path:
    return user_state_dir() / "prediction-errors.json"


def _read() -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Card -> records; whatever is no record is passed over, as somebody may have edited the file."""
    try:
        saved = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(saved, dict):
        return {}
    return {
        card: [record for record in records if _is_record(record)]
        for card, records in saved.items()
        if isinstance(records, list)
    }


def _is_record(record: Any) -> bool:
    figures = [record.get(key) for key in ("predicted_bytes", "measured_bytes")] if isinstance(record, dict) else []
    return len(figures) == 2 and all(isinstance(figure, int) and figure > 0 for figure in figures)
