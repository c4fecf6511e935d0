"""What to change in a recipe that does not fit, the least harmful change first, with the bytes that each saves.

Each change comes on top of those before it, so that the list leads to a recipe that fits and ends there. Sizes are estimated from
a few layers of the plan with least memory; the last change is simulated in full before it counts.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from qlora_phi3.execution import SMALLEST_MLP_TILE_TOKENS
from qlora_phi3.hardware.gpu_table import GPU_TABLE
from qlora_phi3.memory.margin import Margin
from qlora_phi3.memory.plan import RowLengths
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.report import Suggestion, VramReport
from qlora_phi3.memory.search import STEP, MaxLengthSearch, estimate_minimal_allocated, predict_minimal
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.units import MIB, format_gib

#: A change that saves less is not worth a line.
WORTH_BYTES = 16 * MIB
#: Changes that are simulated at most.
MOST_TRIED = 6
#: Reserved over allocated at the very least, with expandable segments: below it a change is not simulated in full.
LEAST_RATIO = 1.01
SMALLEST_RANK = 4


class _Change(NamedTuple):
    """A change of keys in one table of the recipe."""

    text: str
    table: str
    keys: dict[str, Any]


def find_suggestions(
    predictor: Predictor, rows: RowLengths, report: VramReport, *, info: Callable[[str], None]
) -> tuple[tuple[Suggestion, ...], str]:
    """The changes that lead to a recipe that fits, and where none do, why.

    Args:
        report: of the recipe as it is, which does not fit.
        info: called with what is being done.
    """
    path = _Path(predictor, rows, report, info)
    path.widen_budget()
    for tried, change in enumerate(_changes(predictor.recipe)):
        if tried == MOST_TRIED or path.fits:
            break
        path.apply(change)
    path.shorten_rows()
    path.lower_rank()
    path.shorten_rows()
    return tuple(path.suggestions), "" if path.fits else path.no_fix_reason()


def _changes(recipe: Recipe) -> Iterator[_Change]:
    """The keys that decide memory alone, left to the plan; then what is learned in a slightly different way."""
    training, memory, quantization = recipe.training, recipe.memory, recipe.quantization
    if training.gradient_checkpointing is False:
        text = 'Write [training] gradient_checkpointing = "auto": activations may be computed twice instead of saved'
        yield _Change(text, "training", {"gradient_checkpointing": "auto"})
    if memory.checkpoint_every_n_layers not in ("auto", 1):
        text = 'Write [memory] checkpoint_every_n_layers = "auto": every layer may be computed twice'
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
        text = 'Write [training] activation_offloading = "auto": layer inputs may be in host memory'
        yield _Change(text, "training", {"activation_offloading": "auto"})
    if memory.mlp_tile_tokens != "auto" and not 0 < memory.mlp_tile_tokens <= SMALLEST_MLP_TILE_TOKENS:
        text = 'Write [memory] mlp_tile_tokens = "auto": the MLPs may be computed in tiles'
        yield _Change(text, "memory", {"mlp_tile_tokens": "auto"})
    if memory.logits_tile != "auto":
        yield _Change('Write [memory] logits_tile = "auto"', "memory", {"logits_tile": "auto"})
    if training.optim not in ("auto", "paged_adamw_8bit"):
        text = 'Write [training] optim = "auto": Adam with 8-bit state, which can leave the GPU'
        yield _Change(text, "training", {"optim": "auto"})
    if not quantization.load_in_4bit:
        text = "Write [quantization] load_in_4bit = true: the frozen base in 4 bit (QLoRA)"
        yield _Change(text, "quantization", {"load_in_4bit": True})
    elif not quantization.bnb_4bit_use_double_quant:
        text = "Write [quantization] bnb_4bit_use_double_quant = true: 4.127 instead of 4.5 bit a weight"
        yield _Change(text, "quantization", {"bnb_4bit_use_double_quant": True})
    if recipe.lora.use_dora:
        yield _Change("Write [lora] use_dora = false: plain LoRA", "lora", {"use_dora": False})
    if recipe.lora.modules_to_save:
        names = ", ".join(recipe.lora.modules_to_save)
        text = f"Delete [lora] modules_to_save: {names} stays as it is instead of being trained in full"
        yield _Change(text, "lora", {"modules_to_save": None})


class _Path:
    """The changes so far, and what the recipe needs with them."""

    def __init__(self, predictor: Predictor, rows: RowLengths, report: VramReport, info: Callable[[str], None]) -> None:
        self.predictor, self.rows, self.info = predictor, rows, info
        self.device, self.budget_bytes, self.margin = report.device, report.budget_bytes, Margin(report.margin_share)
        self.needed = self.needed_unchanged = report.memory.on_gpu_bytes
        #: What the allocator reserves over what is allocated, assumed to stay the same.
        self.slack_bytes = report.memory.reserved_bytes - report.memory.allocated_bytes
        self.suggestions: list[Suggestion] = []
        self.fits = False

    def widen_budget(self) -> None:
        """Give the run all that is free, then what other programs hold."""
        names = ", ".join(dict.fromkeys(process.name for process in self.device.processes[:4]))
        close = f"Close other programs on the GPU ({names})" if names else "Close other programs on the GPU"
        held = self.device.other_processes_bytes if self.device.is_local else 0
        widenings = (
            ('Write [memory] budget = "auto": all that is free on the GPU', self.device.free_bytes - self.budget_bytes),
            (close, held),
        )
        for text, more_bytes in widenings:
            if more_bytes >= WORTH_BYTES and not self.fits:
                self.budget_bytes += more_bytes
                self.fits = self.needed <= self.margin.limit(self.budget_bytes)
                self.suggestions.append(Suggestion(text=text, saved_bytes=more_bytes, fits=self.fits, widens=True))

    def apply(self, change: _Change, rows: RowLengths | None = None, *, only_if_it_fits: bool = False) -> None:
        """Make a change, if it is worth a line.

        Args:
            rows: the rows after the change; None: as they are.
        """
        self.info("Looking for what would help")
        recipe, rows = self.predictor.recipe, rows or self.rows
        table = getattr(recipe, change.table).model_copy(update=change.keys)
        predictor = self.predictor.with_recipe(recipe.model_copy(update={change.table: table}))
        allocated, limit_bytes = estimate_minimal_allocated(predictor, rows), self.margin.limit(self.budget_bytes)
        needed, fits, slack_bytes = predictor.on_gpu_bytes(allocated + self.slack_bytes), False, self.slack_bytes
        if predictor.on_gpu_bytes(int(allocated * LEAST_RATIO)) <= limit_bytes:
            prediction = predict_minimal(predictor, rows, limit_bytes=limit_bytes)
            memory, fits = prediction.memory, prediction.fits
            needed, slack_bytes = memory.on_gpu_bytes, memory.reserved_bytes - memory.allocated_bytes
        self.slack_bytes = slack_bytes
        saved_bytes = self.needed - needed
        if fits or (saved_bytes >= WORTH_BYTES and not only_if_it_fits):
            self.predictor, self.rows, self.needed, self.fits = predictor, rows, needed, fits
            self.suggestions.append(Suggestion(text=change.text, saved_bytes=saved_bytes, fits=fits))

    def shorten_rows(self) -> None:
        """Cut the rows to the longest that fits."""
        if self.fits or self.rows.longest <= STEP:
            return
        predictor, all_rows, limit_bytes = self.predictor, self.rows, self.margin.limit(self.budget_bytes)

        def cut(length: int) -> RowLengths:
            training = tuple(min(row, length) for row in all_rows.training)
            return replace(all_rows, training=training, longest_evaluation=min(all_rows.longest_evaluation, length))

        def needed_bytes(length: int) -> int:
            self.info(f"Looking for what would help: rows of {length:,} tokens")
            return predictor.on_gpu_bytes(estimate_minimal_allocated(predictor, cut(length)) + self.slack_bytes)

        search = MaxLengthSearch(needed_bytes, all_rows.longest - STEP)
        for _ in range(3):  # the full simulation may need a little more than the estimate
            length = search.within(limit_bytes)
            if not length:
                return
            text = f"Write [training] max_length = {length}, the longest that fits: longer rows are cut there"
            self.apply(_Change(text, "training", {"max_length": length}), cut(length), only_if_it_fits=True)
            if self.fits:
                return
            limit_bytes -= limit_bytes // 50

    def lower_rank(self) -> None:
        """Make the adapter smaller, with the rows as they are: a quarter, a sixteenth and so on, until it fits."""
        given = rank = self.predictor.recipe.lora.r
        while rank > SMALLEST_RANK and not self.fits:
            rank = max(SMALLEST_RANK, rank // 4)
            text = f"Write [lora] r = {rank} instead of {given}: a smaller adapter, which learns less"
            self.apply(_Change(text, "lora", {"r": rank}), only_if_it_fits=rank > SMALLEST_RANK)

    def no_fix_reason(self) -> str:
        """Why no change helps, and which GPU would be large enough."""
        needed = format_gib(self.needed + self.margin.bytes_for(self.needed))
        length = self.rows.longest
        unchanged = self.needed_unchanged + self.margin.bytes_for(self.needed_unchanged)
        sizes = [
            gpu.nominal_gb
            for gpu in sorted(GPU_TABLE, key=lambda gpu: gpu.usable_bytes)
            if gpu.usable_bytes >= unchanged
        ]
        reason = f"One row of {length:,} tokens needs {needed}, whatever the plan."
        if self.suggestions:
            reason = f"With all of these changes, one row of {length:,} tokens needs {needed}."
        if not sizes:
            return f"{reason} No GPU of the table has that much: take a smaller model or shorter rows."
        return f"{reason} A GPU with {sizes[0]} GB fits the recipe as it is; or take a smaller model."
