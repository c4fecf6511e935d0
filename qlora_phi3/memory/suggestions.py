"""Changes to a recipe: what would make it fit, and the plan of `vram-check --fit` written into a copy.

Suggestions come the least harmful first, each on top of those before it, until the recipe fits. Sizes are estimated from a few
layers of the plan with least memory; a change that seems to fit is simulated in full.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from qlora_phi3.execution import SMALLEST_MLP_TILE_TOKENS
from qlora_phi3.hardware.gpu_table import GPU_TABLE
from qlora_phi3.memory.margin import Margin
from qlora_phi3.memory.plan import RowLengths
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.report import Suggestion, VramReport, planned_keys
from qlora_phi3.memory.search import STEP, MaxLengthSearch, minimal_memory_plan
from qlora_phi3.recipe.edit import Choice, fit_recipe
from qlora_phi3.recipe.load import as_list, candidate_paths
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
    for change in islice(_changes(predictor.recipe), MOST_TRIED):
        if not path.fits:
            path.apply(change)
    path.shorten_rows()
    path.lower_rank()
    path.shorten_rows()
    return tuple(path.suggestions), "" if path.fits else path.no_fix_reason()


def _changes(recipe: Recipe) -> Iterator[_Change]:
    """The keys that decide memory alone, left to the plan; then what is learned in a slightly different way."""
    training, memory, quantization, lora = recipe.training, recipe.memory, recipe.quantization, recipe.lora

    def left(table: str, key: str, effect: str) -> _Change:
        return _Change(f'Write [{table}] {key} = "auto": {effect}', table, {key: "auto"})

    if training.gradient_checkpointing is False:
        yield left("training", "gradient_checkpointing", "activations may be computed twice instead of saved")
    if memory.checkpoint_every_n_layers not in ("auto", 1):
        yield left("memory", "checkpoint_every_n_layers", "every layer may be computed twice")
    if memory.keep_attention is True:
        yield left("memory", "keep_attention", "attention may be computed twice")
    if (training.micro_batch_size or 1) > 1:
        text = (
            f'Write [training] per_device_train_batch_size = "auto" and batch_size = {training.batch_size} '
            "(no gradient_accumulation_steps): the same update from fewer rows at a time"
        )
        keys = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": None}
        yield _Change(text, "training", keys)
    if memory.micro_batch_tokens != "auto":
        yield left("memory", "micro_batch_tokens", "the same update from fewer tokens at a time")
    if training.activation_offloading is False:
        yield left("training", "activation_offloading", "layer inputs may be in host memory")
    if memory.mlp_tile_tokens != "auto" and not 0 < memory.mlp_tile_tokens <= SMALLEST_MLP_TILE_TOKENS:
        yield left("memory", "mlp_tile_tokens", "the MLPs may be computed in tiles")
    if memory.logits_tile != "auto":
        yield left("memory", "logits_tile", "the loss in smaller tiles")
    if training.optim not in ("auto", "paged_adamw_8bit"):
        yield left("training", "optim", "Adam with 8-bit state, which can leave the GPU")
    if not quantization.load_in_4bit:
        text = "Write [quantization] load_in_4bit = true: the frozen base in 4 bit (QLoRA)"
        yield _Change(text, "quantization", {"load_in_4bit": True})
    elif not quantization.bnb_4bit_use_double_quant:
        text = "Write [quantization] bnb_4bit_use_double_quant = true: 4.127 instead of 4.5 bit a weight"
        yield _Change(text, "quantization", {"bnb_4bit_use_double_quant": True})
    if lora.use_dora:
        yield _Change("Write [lora] use_dora = false: plain LoRA", "lora", {"use_dora": False})
    if lora.modules_to_save:
        names = ", ".join(lora.modules_to_save)
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
        device = self.device
        names = ", ".join(dict.fromkeys(process.name for process in device.processes[:4]))
        held = device.other_processes_bytes if device.is_local else 0
        widenings = {
            'Write [memory] budget = "auto": all that is free on the GPU': device.free_bytes - self.budget_bytes,
            f"Close other programs on the GPU{f' ({names})' if names else ''}": held,
        }
        if device.is_cpu:  # of which a run gets its share
            widenings = {"Close other programs": held * self.budget_bytes // max(1, device.free_bytes)}
        for text, more_bytes in widenings.items():
            if more_bytes >= WORTH_BYTES and not self.fits:
                self.budget_bytes += more_bytes
                self.fits = self.needed <= self.margin.limit(self.budget_bytes)
                self.suggestions.append(Suggestion(text=text, saved_bytes=more_bytes, fits=self.fits, widens=True))

    def apply(self, change: _Change, rows: RowLengths | None = None, *, only_if_it_fits: bool = False) -> None:
        """Make a change, if it is worth a line; `rows` are those after the change, None where they are the same."""
        self.info("Looking for what would help")
        recipe, rows = self.predictor.recipe, rows or self.rows
        table = getattr(recipe, change.table).model_copy(update=change.keys)
        predictor = replace(self.predictor, recipe=recipe.model_copy(update={change.table: table}))
        minimal, limit_bytes = minimal_memory_plan(predictor, rows), self.margin.limit(self.budget_bytes)
        allocated = max(predictor.estimate(*minimal).values())
        needed, fits = predictor.on_gpu_bytes(allocated + self.slack_bytes), False
        if predictor.on_gpu_bytes(int(allocated * LEAST_RATIO)) <= limit_bytes:
            memory, fits = predictor.predict(*minimal, limit_bytes=limit_bytes)
            needed, self.slack_bytes = memory.on_gpu_bytes, memory.reserved_bytes - memory.allocated_bytes
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
            phases = predictor.estimate(*minimal_memory_plan(predictor, cut(length)))
            return predictor.on_gpu_bytes(max(phases.values()) + self.slack_bytes)

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
        needed, length = format_gib(self.needed + self.margin.bytes_for(self.needed)), self.rows.longest
        unchanged = self.needed_unchanged + self.margin.bytes_for(self.needed_unchanged)
        enough = [gpu for gpu in GPU_TABLE if gpu.usable_bytes >= unchanged]
        reason = f"One row of {length:,} tokens needs {needed}, whatever the plan."
        if self.suggestions:
            reason = f"With all of these changes, one row of {length:,} tokens needs {needed}."
        if self.device.is_cpu:
            return f"{reason} Take a smaller model or shorter rows; --all shows which GPUs are large enough."
        if not enough:
            return f"{reason} No GPU of the table has that much: take a smaller model or shorter rows."
        smallest = min(enough, key=lambda gpu: gpu.usable_bytes)
        return f"{reason} A GPU with {smallest.nominal_gb} GB fits the recipe as it is; or take a smaller model."


def write_fitted(
    recipe: Recipe, text: str, overrides: Sequence[str], report: VramReport, *, source: Path, target: Path
) -> Recipe:
    """Write the recipe with its plan to a file that does not exist yet, so that a run makes the same plan again.

    Args:
        recipe: as `text` and `overrides` (`table.key=value`) say it.
        source: where the text is from; its relative paths are looked for there.

    Returns:
        The recipe that was written.

    Raises:
        FileExistsError: there is such a file; it stays as it is.
    """
    choices = _moved_paths(recipe, source.absolute().parent, target.absolute().parent)
    for override in overrides:
        table, key = override.partition("=")[0].strip().split(".")[:2]
        value = getattr(recipe, table).model_dump(exclude_none=True).get(key)
        if value is not None:
            choices.append(Choice(table, key, value, "from --set"))
    for table, key, value, reason in planned_keys(report):
        fixed = key == "micro_batch_tokens" and recipe.training.micro_batch_size is not None
        if getattr(getattr(recipe, table), key) == "auto" and not fixed:
            choices.append(Choice(table, key, value, reason))
    heading = (
        f"Fitted to {report.device.name} by qlora-phi3 {report.versions['qlora-phi3']} on {report.created[:10]}: predicted "
        f"{format_gib(report.memory.on_gpu_bytes)} and a margin of {format_gib(report.margin_bytes)}, of "
        f"{format_gib(report.budget_bytes)} {report.device.where}. What is learned is the same on every GPU; the keys with a "
        "reason decide memory and speed."
    )
    fitted, written = fit_recipe(recipe, text, choices, heading)
    with target.open("x", encoding="utf-8", newline="\n") as file:
        file.write(written)
    return fitted


def _moved_paths(recipe: Recipe, old: Path, new: Path) -> list[Choice]:
    """Local paths as they are written from another directory."""

    def move(name: str) -> str:
        path = candidate_paths(name, old)[0]
        if old == new or Path(name).is_absolute() or not path.exists():
            return name
        try:
            return Path(os.path.relpath(path, new)).as_posix()
        except ValueError:  # another drive, on Windows
            return path.as_posix()

    choices = []
    for table, key in (("model", "name"), ("model", "adapter"), ("data", "train"), ("data", "eval")):
        value = getattr(getattr(recipe, table), key)
        moved = list(map(move, as_list(value)))
        if moved != list(as_list(value)):
            choices.append(Choice(table, key, moved[0] if isinstance(value, str) else moved, ""))
    return choices
