"""What to change in a recipe that does not fit, in order of least harm, with the bytes each change saves.

Each change comes on top of those before it, so that the list is a way to a recipe that fits and ends there. Sizes are simulated
on a few layers of the leanest set-up that the changed recipe allows; the last step is planned whole before it counts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_phi3.execution import SMALLEST_MLP_TILE_TOKENS
from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.hardware.gpu_table import CARDS
from qlora_phi3.memory.margin import Margin
from qlora_phi3.memory.search import STEP, MaxLengthSearch, allocated_estimate, minimal_prediction
from qlora_phi3.units import format_gib

if TYPE_CHECKING:
    from qlora_phi3.memory.plan import Plan, RowLengths
    from qlora_phi3.memory.predict import Predictor
    from qlora_phi3.memory.report import Suggestion
    from qlora_phi3.recipe.schema import Recipe

#: A change that saves less is not worth a line.
WORTH_BYTES = 16 * 2**20


#: Changes that are simulated at most.
MOST_TRIED = 6


#: Reserved over allocated at the very least, with expandable segments: below it a change is not simulated whole.
LEAST_RATIO = 1.01


SMALLEST_RANK = 4


@dataclass(frozen=True, slots=True)
class _Change:
    """A change of the recipe, and how to make it."""

    text: str
    table: str
    keys: dict[str, Any]


def find_suggestions(
    predictor: "Predictor",
    rows: "RowLengths",
    device: Gpu,
    plan: "Plan",
    margin: Margin,
    budget_bytes: int,
    *,
    info: Callable[[str], None],
) -> tuple[tuple["Suggestion", ...], str]:
    """The way to a recipe that fits, and where none leads there, why."""
    way = _Way(predictor, rows, device, plan, margin, budget_bytes, info=info)
    for widen in (way.raise_budget, way.close_programs):
        if widen():
            return tuple(way.suggestions), ""
    for tried, change in enumerate(_changes(predictor.recipe)):
        if tried == MOST_TRIED or way.make(change):
            break
    if not way.arrived:
        way.shorten()
    if not way.arrived:
        way.lower_rank()
    if not way.arrived:
        way.shorten()
    return tuple(way.suggestions), "" if way.arrived else way.no_fix_reason()


def _changes(recipe: "Recipe") -> Iterator[_Change]:
    """What may be given back to the plan, or learned in a slightly other way; the harmless first."""
    yield from _unpinned(recipe)
    if not recipe.quantization.load_in_4bit:
        yield _Change(
            "Write [quantization] load_in_4bit = true: the frozen base in 4 bit (QLoRA)",
            "quantization",
            {"load_in_4bit": True},
        )
    elif not recipe.quantization.bnb_4bit_use_double_quant:
        text = "Write [quantization] bnb_4bit_use_double_quant = true: 4.127 instead of 4.5 bit a weight"
        yield _Change(text, "quantization", {"bnb_4bit_use_double_quant": True})
    if recipe.lora.use_dora:
        yield _Change("Write [lora] use_dora = false: plain LoRA", "lora", {"use_dora": False})
    if recipe.lora.modules_to_save:
        names = ", ".join(recipe.lora.modules_to_save)
        text = f"Delete [lora] modules_to_save: {names} stays as it is instead of being trained in full"
        yield _Change(text, "lora", {"modules_to_save": None})


def _unpinned(recipe: "Recipe") -> Iterator[_Change]:
    """The keys that decide memory alone, left to the plan."""
    training, memory = recipe.training, recipe.memory
    if training.gradient_checkpointing is False:
        text = 'Write [training] gradient_checkpointing = "auto": activations are computed twice instead of kept'
        yield _Change(text, "training", {"gradient_checkpointing": "auto"})
    if memory.checkpoint_every_n_layers not in ("auto", 1):
        text = 'Write [memory] checkpoint_every_n_layers = "auto": every layer is computed twice if need be'
        yield _Change(text, "memory", {"checkpoint_every_n_layers": "auto"})
    if (training.micro_batch_size or 1) > 1:
        text = (
            f'Write [training] per_device_train_batch_size = "auto" and batch_size = {training.batch_size} '
            "(no gradient_accumulation_steps): the same update from fewer rows at a time"
        )
        keys = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": None}
        yield _Change(text, "training", keys)
    if memory.micro_batch_tokens != "auto":
        text = 'Write [memory] micro_batch_tokens = "auto": the same update from fewer tokens at a time'
        yield _Change(text, "memory", {"micro_batch_tokens": "auto"})
    if training.activation_offloading is False:
        text = 'Write [training] activation_offloading = "auto": what is kept of the layers may lie in the computer\'s memory'
        yield _Change(text, "training", {"activation_offloading": "auto"})
    if memory.mlp_tile_tokens != "auto" and not 0 < memory.mlp_tile_tokens <= SMALLEST_MLP_TILE_TOKENS:
        text = 'Write [memory] mlp_tile_tokens = "auto": the MLPs may be computed in tiles'
        yield _Change(text, "memory", {"mlp_tile_tokens": "auto"})
    if memory.logits_tile != "auto":
        yield _Change('Write [memory] logits_tile = "auto"', "memory", {"logits_tile": "auto"})
    if training.optim not in ("auto", "paged_adamw_8bit"):
        text = 'Write [training] optim = "auto": Adam keeps 8-bit notes, which may leave the card'
        yield _Change(text, "training", {"optim": "auto"})


class _Way:
    """The changes so far, and what the recipe takes with them."""

    def __init__(
        self,
        predictor: "Predictor",
        rows: "RowLengths",
        device: Gpu,
        plan: "Plan",
        margin: Margin,
        budget_bytes: int,
        *,
        info: Callable[[str], None],
    ) -> None:
        self.predictor, self.rows = predictor, rows
        self.device, self.margin, self.budget_bytes, self.info = device, margin, budget_bytes, info
        prediction = plan.prediction
        self.needed = self.needed_unchanged = prediction.on_card_bytes
        #: What the allocator reserves over what is allocated, taken to stay the same.
        self.slack_bytes = prediction.reserved_bytes - prediction.allocated_bytes
        self.suggestions: list[Suggestion] = []

    @property
    def room(self) -> int:
        return self.margin.limit(self.budget_bytes)

    @property
    def arrived(self) -> bool:
        return bool(self.suggestions) and self.suggestions[-1].fits

    def raise_budget(self) -> bool:
        """Give the run all that is free."""
        more = self.device.free_bytes - self.budget_bytes
        return more >= WORTH_BYTES and self._widen('Write [memory] budget = "auto": all that is free on the card', more)

    def close_programs(self) -> bool:
        """Take back what other programs hold."""
        more = self.device.other_processes_bytes
        if not self.device.is_local or more < WORTH_BYTES:
            return False
        names = ", ".join(dict.fromkeys(process.name for process in self.device.processes[:4]))
        return self._widen(f"Close other programs on the card{f' ({names})' if names else ''}", more)

    def _widen(self, text: str, more_bytes: int) -> bool:
        self.budget_bytes += more_bytes
        return self._note(text, more_bytes, fits=self.needed <= self.room, widens=True)

    def make(self, change: _Change) -> bool:
        """Make a change, if it is worth a line; whether the recipe fits now."""
        recipe = _changed(self.predictor.recipe, change.table, change.keys)
        return self._take(change.text, self.predictor.with_recipe(recipe), self.rows)

    def shorten(self) -> None:
        """Cut the rows to the longest that fits."""
        if self.rows.longest <= STEP:
            return
        predictor, room = self.predictor, self.room

        def needs(length: int) -> int:
            self.info(f"Looking for what would help: rows of {length:,} tokens")
            return predictor.on_card(allocated_estimate(predictor, _cut(self.rows, length)) + self.slack_bytes)

        search = MaxLengthSearch(needs, self.rows.longest - STEP)
        for _ in range(3):  # the whole simulation may find a little less room than the estimate
            length = search.within(room)
            if not length:
                return
            rows = _cut(self.rows, length)
            recipe = _changed(self.predictor.recipe, "training", {"max_length": length})
            text = f"Write [training] max_length = {length}, the longest that fits: longer rows are cut there"
            if self._take(text, self.predictor.with_recipe(recipe), rows, only_if_it_fits=True):
                return
            room -= room // 50

    def lower_rank(self) -> None:
        """Make the adapter smaller, on rows as they are: a quarter, a sixteenth and so on, until it fits."""
        given = rank = self.predictor.recipe.lora.r
        while rank > SMALLEST_RANK and not self.arrived:
            rank = max(SMALLEST_RANK, rank // 4)
            recipe = _changed(self.predictor.recipe, "lora", {"r": rank})
            text = f"Write [lora] r = {rank} instead of {given}: a smaller adapter, which learns less"
            last = rank == SMALLEST_RANK
            self._take(text, self.predictor.with_recipe(recipe), self.rows, only_if_it_fits=not last)

    def no_fix_reason(self) -> str:
        """Why no change helps, and which card would do."""
        wanted = self.needed + self.margin.bytes_for(self.needed)
        length = self.rows.longest
        unchanged = self.needed_unchanged + self.margin.bytes_for(self.needed_unchanged)
        enough = min(
            (card for card in CARDS if card.usable_bytes >= unchanged), key=lambda card: card.usable_bytes, default=None
        )
        told = f"With all of that, one row of {length:,} tokens needs {format_gib(wanted)}"
        if not self.suggestions:
            told = f"One row of {length:,} tokens needs {format_gib(wanted)} however it is computed"
        if enough is None:
            return f"{told}: no card of the table holds it. Take a smaller model or shorter rows."
        return f"{told}. A card of {enough.nominal_gb} GB would do for the recipe as it is; or take a smaller model."

    def _take(self, text: str, predictor: "Predictor", rows: "RowLengths", *, only_if_it_fits: bool = False) -> bool:
        self.info("Looking for what would help")
        allocated = allocated_estimate(predictor, rows)
        needed, fits = predictor.on_card(allocated + self.slack_bytes), False
        if predictor.on_card(int(allocated * LEAST_RATIO)) <= self.room:
            prediction = minimal_prediction(predictor, rows, limit_bytes=self.room)
            fits, needed = prediction.fits, prediction.on_card_bytes
            self.slack_bytes = prediction.reserved_bytes - prediction.allocated_bytes
        saved = self.needed - needed
        if not fits and (only_if_it_fits or saved < WORTH_BYTES):
            return False
        self.predictor, self.rows, self.needed = predictor, rows, needed
        return self._note(text, saved, fits=fits)

    def _note(self, text: str, saved_bytes: int, *, fits: bool, widens: bool = False) -> bool:
        from qlora_phi3.memory.report import Suggestion

        self.suggestions.append(Suggestion(text=text, saved_bytes=saved_bytes, fits=fits, widens=widens))
        return fits


def _changed(recipe: "Recipe", table: str, keys: dict[str, Any]) -> "Recipe":
    return recipe.model_copy(update={table: getattr(recipe, table).model_copy(update=keys)})


def _cut(rows: "RowLengths", length: int) -> "RowLengths":
    cut = tuple(min(row, length) for row in rows.training)
    return replace(rows, training=cut, longest_evaluation=min(rows.longest_evaluation, length))
