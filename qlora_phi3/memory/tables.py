"""One recipe on every card that people have: what fits, and the longest row that does.

Cards of one size are one line: 12 GB is 12 GB, give or take what the driver keeps. The line stands for the card of its group with
the least usable memory, so that what fits there fits on all of them. Cards without bfloat16 (GTX 16, RTX 20) are a group of
their own: they compute in float16 and with another attention kernel.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qlora_phi3.hardware.gpu import Gpu, smallest_of
from qlora_phi3.hardware.gpu_table import CARDS, NATIVE_BFLOAT16, GpuSpec, name_series
from qlora_phi3.memory.margin import budget_within, limit_of
from qlora_phi3.memory.report import VramReport, as_json, from_json
from qlora_phi3.memory.search import STEP, MaxLengthSearch, allocated_estimate, minimal_prediction, round_length
from qlora_phi3.memory.vram_check import VramChecker, compute_dtype_on
from qlora_phi3.units import MIB

if TYPE_CHECKING:
    from qlora_phi3.memory.plan import RowLengths
    from qlora_phi3.memory.predict import Predictor

SMALLEST_GB, LARGEST_GB = 4, 24


SMALLEST_TILE_MIB, MOST_TILES = 8, 64


GROUP_FIELDS = ("nominal_gb", "series")


#: Told the name of the card that is looked at, how many are done, and of how many.
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuGroup:
    """Cards of one size and kind."""

    nominal_gb: int
    #: Such as "RTX 30, 40, 50".
    series: str
    #: The one with the least memory, at a middling speed.
    device: Gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTableRow:
    """The plan on one group of cards."""

    nominal_gb: int
    series: str
    report: VramReport


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxLengthRow:
    """The longest row that fits, in tokens; 0 where none does."""

    name: str
    model: str
    usable_bytes: int
    max_length: int
    #: The model's own limit: a longer row may fit and would teach nothing.
    at_the_models_end: bool
    peak_on_card_bytes: int
    #: What lies in the computer's memory meanwhile.
    host_bytes: int
    compute_dtype: str


def group_gpus() -> list[GpuGroup]:
    """The consumer cards of the table from 4 to 24 GB, smallest first."""
    chosen = [card for card in CARDS if SMALLEST_GB <= card.nominal_gb <= LARGEST_GB and card.consumer]
    chosen.sort(key=_group_key)
    return [_as_group(tuple(cards)) for _, cards in groupby(chosen, key=_group_key)]


def group_of_one(device: Gpu) -> GpuGroup:
    """The card here, as a group of its own."""
    return GpuGroup(nominal_gb=math.ceil(device.total_bytes / 2**30), series=device.name, device=device)


def _group_key(card: GpuSpec) -> tuple[int, bool]:
    return card.nominal_gb, card.compute_capability >= NATIVE_BFLOAT16


def _as_group(cards: tuple[GpuSpec, ...]) -> GpuGroup:
    series = name_series(cards)
    device = smallest_of(cards, f"{cards[0].nominal_gb} GB, {series}")
    return GpuGroup(nominal_gb=cards[0].nominal_gb, series=series, device=device)


def build_gpu_table(checker: VramChecker, groups: Sequence[GpuGroup], tell: Tell) -> list[GpuTableRow]:
    """Plan for each group."""
    rows = []
    for number, group in enumerate(groups):
        tell(group.device.name, number, len(groups))
        report = checker.report(
            group.device, budget_within(checker.context.recipe, group.device), with_suggestions=False
        )
        rows.append(GpuTableRow(nominal_gb=group.nominal_gb, series=group.series, report=report))
    tell("", len(groups), len(groups))
    return rows


def find_max_lengths(checker: VramChecker, devices: Sequence[Gpu], tell: Tell) -> list[MaxLengthRow]:
    """The longest row for each card, alone in its step, with the leanest set-up that the recipe allows."""
    rows: dict[int, _MaxLengthRows] = {}
    found = []
    for number, device in enumerate(devices):
        tell(device.name, number, len(devices))
        predictor = checker.predictor(device)
        found.append(rows.setdefault(id(predictor), _MaxLengthRows(checker, predictor)).on(device))
    tell("", len(devices), len(devices))
    return found


class _MaxLengthRows:
    """The longest rows on cards that share a simulator: what was estimated for one card is known for the next."""

    def __init__(self, checker: VramChecker, predictor: "Predictor") -> None:
        self._checker, self._predictor = checker, predictor
        self._search = MaxLengthSearch(self._estimate, checker.context.architecture.max_position_embeddings)
        self._tiled: dict[int, Predictor] = {}

    def on(self, device: Gpu) -> MaxLengthRow:
        """Estimated, and simulated whole, which betters the estimate, until that asks for no length between."""
        from qlora_phi3.memory.predict import estimate_allocated, least_reserved_bytes

        limit = limit_of(device, budget_within(self._checker.context.recipe, device))
        room = limit - self._predictor.on_card(0)
        length = self._within(estimate_allocated(room)) or STEP
        fitting, too_long, prediction = 0, self._search.at_most + STEP, None
        while fitting < length < too_long:
            self._checker.info(f"simulating every layer with a row of {length:,} tokens")
            tried = minimal_prediction(self._predictor_for(length), _alone(length), limit_bytes=limit)
            if tried.fits:
                fitting, prediction = length, tried
            else:
                too_long = length
            better = self._within(int(room * tried.allocated_bytes / least_reserved_bytes(tried)))
            length = better if better < too_long else round_length(too_long - 1)
        return MaxLengthRow(
            name=device.name,
            model=self._checker.context.recipe.model.name,
            usable_bytes=device.total_bytes,
            max_length=fitting,
            at_the_models_end=fitting == self._search.at_most,
            peak_on_card_bytes=prediction.on_card_bytes if prediction else self._least(),
            host_bytes=prediction.profile.host_bytes if prediction else 0,
            compute_dtype=compute_dtype_on(self._checker.context.recipe, device),
        )

    def _within(self, room_bytes: int) -> int:
        """The longest row that seems to allocate no more than this, as lengths are reported."""
        length = self._search.within(room_bytes)
        return length if length == self._search.at_most else round_length(length)

    def _least(self) -> int:
        """On the card for the shortest row."""
        from qlora_phi3.memory.predict import estimate_reserved

        return self._predictor.on_card(estimate_reserved(self._search.least_bytes))

    def _estimate(self, length: int) -> int:
        self._checker.info(f"trying a row of {length:,} tokens")
        return allocated_estimate(self._predictor_for(length), _alone(length))

    def _predictor_for(self, length: int) -> "Predictor":
        """One whose loss goes through a long row in few tiles: each is simulated, and the peak is elsewhere by far."""
        recipe = self._predictor.recipe
        if recipe.memory.logits_tile != "auto":
            return self._predictor
        logits_bytes = 4 * length * self._checker.context.architecture.vocab_size
        tile = max(SMALLEST_TILE_MIB, -(-logits_bytes // MOST_TILES // MIB))
        if tile not in self._tiled:
            memory = recipe.memory.model_copy(update={"logits_tile": f"{tile}MiB"})
            self._tiled[tile] = self._predictor.with_recipe(recipe.model_copy(update={"memory": memory}))
        return self._tiled[tile]


def _alone(length: int) -> "RowLengths":
    """A step of one row; measuring it takes less than training on it."""
    from qlora_phi3.memory.plan import assume_lengths

    return replace(assume_lengths(length, 1), longest_evaluation=0)


def gpu_table_as_json(rows: Sequence[GpuTableRow]) -> list[dict[str, Any]]:
    """Each answer with its group beside it."""
    return [{**as_json(row.report), **{name: getattr(row, name) for name in GROUP_FIELDS}} for row in rows]


def gpu_table_from_json(saved: Sequence[Mapping[str, Any]]) -> list[GpuTableRow]:
    """What `gpu_table_as_json` wrote; ValueError where it is something else."""
    try:
        return [
            GpuTableRow(
                report=from_json({key: value for key, value in row.items() if key not in GROUP_FIELDS}),
                **{name: row[name] for name in GROUP_FIELDS},
            )
            for row in saved
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no survey: {error}") from error


def max_lengths_from_json(saved: Sequence[Mapping[str, Any]]) -> list[MaxLengthRow]:
    """Rows that `asdict` wrote; ValueError where they are something else."""
    try:
        return [MaxLengthRow(**row) for row in saved]
    except TypeError as error:
        raise ValueError(f"no rows: {error}") from error
