"""What `vram-check` answers: whether a recipe fits a card, how, and what lives there at the peak; in bytes.

The answer is plain data that goes to JSON and back, so that one that was worked out before is shown without torch. Working one
out imports torch and the libraries, inside the functions that do.

How long the rows of a recipe are: read from its data where they lie on this computer, else assumed as long as they may be.

Nothing is fetched: the tokenizer and the data count as unreadable unless they are here, in a folder or in the caches of the
hub's libraries. What was looked at is named, so that an answer that is kept can be held against it.
"""

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_phi3.errors import CannotTellError, DataError, ModelError, UserError
from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.hardware.gpu_table import CARDS, NATIVE_BFLOAT16, GpuSpec
from qlora_phi3.memory.margin import Margin, read_margin
from qlora_phi3.memory.plan import RowLengths, assume_lengths, read_lengths
from qlora_phi3.memory.report import RowSummary, VramReport, merge_categories, read_versions
from qlora_phi3.recipe.load import is_local_data
from qlora_phi3.reporter import Progress

if TYPE_CHECKING:
    from qlora_phi3.data.prepare import PreparedData
    from qlora_phi3.family import Architecture
    from qlora_phi3.memory.plan import Plan, RowLengths
    from qlora_phi3.memory.predict import Predictor
    from qlora_phi3.recipe.schema import Recipe


def compute_dtype_on(recipe: "Recipe", device: Gpu) -> str:
    """The type of the arithmetic, as a run on that card would choose it."""
    wanted = recipe.compute_dtype
    if wanted != "auto":
        return wanted
    return "bfloat16" if device.compute_capability >= NATIVE_BFLOAT16 else "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeContext:
    """What is asked about: all of it but the card."""

    #: Its local paths are absolute.
    recipe: "Recipe"
    config: Mapping[str, Any]
    architecture: "Architecture"
    rows: "LengthsReport"


def read_recipe_context(recipe: "Recipe", base_folder: Path, progress: "Progress") -> RecipeContext:
    """Read the model's shapes and the rows' lengths, from this computer alone.

    Raises:
        CannotTellError: the config.json of a model on the hub is not here.
        UserError: there is no such folder, the model is no phi3, or it has less than the recipe asks of it.
    """
    from qlora_phi3.family import parse_architecture
    from qlora_phi3.recipe.load import check_model_limits, resolve_paths

    found = resolve_paths(recipe, base_folder)
    with hub_offline():
        config = _read_config(found)
        architecture = parse_architecture(dict(config), recipe.model.name)
        check_model_limits(recipe, architecture)
        if found.model.adapter is not None:
            from qlora_phi3.adapters.start import check_start

            check_start(Path(found.model.adapter), recipe.lora)
        rows = read_rows(found, base_folder, progress)
    return RecipeContext(recipe=found, config=config, architecture=architecture, rows=rows)


def _read_config(recipe: "Recipe") -> dict[str, Any]:
    from qlora_phi3.family import OtherModelError, is_hub_id, nearest_known, read_config

    name = recipe.model.name
    try:
        return read_config(name, recipe.model.revision, prefer_shipped=True)
    except OtherModelError:
        raise
    except ModelError as error:
        if Path(name).is_dir() or not is_hub_id(name):
            raise
        nearest = nearest_known(name)
        meant = f"Did you mean {nearest}, whose shapes are known? " if nearest else ""
        raise CannotTellError(
            f"The shapes of {name} are not known: its config.json is not on this computer, and vram-check fetches nothing.",
            f"{meant}Fetch it: hf download {name} config.json",
        ) from error


class VramChecker:
    """Works answers about one subject out; what cards have in common is simulated once."""

    def __init__(self, context: RecipeContext, say: Callable[[str], None]) -> None:
        self.context, self.info = context, say
        self._predictors: dict[tuple[Any, ...], Predictor] = {}

    def predictor(self, device: Gpu) -> "Predictor":
        """The simulator for a card; cards between which no operator differs share one."""
        import torch

        from qlora_phi3.memory.predict import Predictor

        dtype, capability = compute_dtype_on(self.context.recipe, device), alike(device.compute_capability)
        key = (dtype, capability)
        if key not in self._predictors:
            gc.freeze()  # the collector need not look through the libraries again: a tenth of a simulation's time
            self._predictors[key] = Predictor(
                self.context.recipe,
                dict(self.context.config),
                self.context.architecture,
                compute_dtype=getattr(torch, dtype),
                capability=capability,
            )
        return self._predictors[key]

    def plan(self, predictor: "Predictor", rows: "RowLengths", device: Gpu, limit_bytes: int) -> "Plan":
        """The fastest set-up within a limit."""
        from qlora_phi3.memory.plan import GpuLimits
        from qlora_phi3.memory.search import find_plan

        card = GpuLimits(
            limit_bytes=limit_bytes,
            tflops_16bit=device.tflops_16bit,
            bandwidth_bytes_per_second=device.bandwidth_bytes_per_second,
        )
        return find_plan(predictor, rows, card, progress=self.info)

    def report(self, device: Gpu, budget_bytes: int, *, with_suggestions: bool = True) -> VramReport:
        """Plan for a card, and where nothing fits say what would.

        Args:
            budget_bytes: what the run may take there, its margin counted.

        Raises:
            ModelError: the recipe's adapter does not fit the model.
        """
        from qlora_phi3.memory.suggestions import find_suggestions

        margin = read_margin(device.name)
        predictor, rows = self.predictor(device), self.context.rows.lengths
        plan = self.plan(predictor, rows, device, margin.limit(budget_bytes))
        report = self._put(device, plan, budget_bytes, margin)
        if plan.fits or not with_suggestions:
            return report
        suggestions, no_fix_reason = find_suggestions(
            predictor, rows, device, plan, margin, budget_bytes, info=self.info
        )
        return replace(report, suggestions=suggestions, no_fix_reason=no_fix_reason)

    def _put(self, device: Gpu, plan: "Plan", budget_bytes: int, margin: Margin) -> VramReport:
        prediction, execution, profile = plan.prediction, plan.execution, plan.prediction.profile
        training, read = self.context.recipe.training, self.context.rows
        together = max(1, min(execution.micro_batch.max_tokens // training.max_length, training.batch_size))
        seconds = plan.step_time.seconds
        tokens = sum(read.lengths.usual_step())
        cards = [card for card in CARDS if card.label in device.represents]
        speeds = [tokens / each for each in _seconds_on(cards, self.context, plan)] or [tokens / seconds]
        return VramReport(
            verdict="fits" if plan.fits else "does_not_fit",
            model=self.context.recipe.model.name,
            device=device,
            budget_bytes=budget_bytes,
            margin_bytes=margin.bytes_for(prediction.on_card_bytes),
            margin_share=margin.share,
            margin_runs=margin.runs if margin.widened else 0,
            peak_allocated_bytes=prediction.allocated_bytes,
            peak_reserved_bytes=prediction.reserved_bytes,
            peak_on_card_bytes=prediction.on_card_bytes,
            peak_phase=profile.peak_phase,
            categories=merge_categories(profile.categories),
            phases=dict(profile.phases),
            paged_bytes=profile.paged_bytes,
            host_bytes=profile.host_bytes,
            compute_dtype=compute_dtype_on(self.context.recipe, device),
            batch_size=training.batch_size,
            micro_batch_size=together,
            gradient_accumulation_steps=math.ceil(training.batch_size / together),
            micro_batch_tokens=execution.micro_batch.max_tokens,
            num_micro_batches=plan.workload.num_micro_batches,
            max_length=training.max_length,
            packing=training.packing,
            checkpoint_every_n_layers=execution.checkpoint_every,
            activation_offloading=execution.activation_offloading,
            optim=execution.optim,
            logits_tile_bytes=execution.logits_tile_bytes,
            mlp_tile_tokens=execution.mlp_tile_tokens,
            reasons=dict(plan.reasons),
            suggestions=(),
            no_fix_reason="",
            rows=RowSummary(
                assumed=read.lengths.assumed,
                count=len(read.lengths.training),
                longest=read.lengths.longest,
                longest_evaluation=read.lengths.longest_evaluation,
                origin=read.origin,
                problem=read.problem,
            ),
            seconds_per_step=seconds,
            tokens_per_second=tokens / seconds,
            slowest_tokens_per_second=min(speeds),
            fastest_tokens_per_second=max(speeds),
            versions=read_versions(),
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )


def _seconds_on(cards: Sequence[GpuSpec], context: RecipeContext, plan: "Plan") -> Iterator[float]:
    """How long an optimizer step of a plan takes on each card, by the cost model."""
    from qlora_phi3.memory.cost import estimate_step_time

    for card in cards:
        rates = {"tflops_16bit": card.tflops_16bit, "bandwidth_bytes_per_second": card.bandwidth_gb * 1e9}
        yield estimate_step_time(context.architecture, plan.execution, plan.workload, **rates).seconds


def alike(compute_capability: tuple[int, int]) -> tuple[int, int]:
    """One capability for all that allocate the same: Ada and Ampere differ in no operator of a step."""
    return (8, 6) if compute_capability == (8, 9) else compute_capability


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class LengthsReport:
    """The lengths, one line that says where they come from, and one why a run would stop at them, if it would."""

    lengths: RowLengths
    origin: str
    problem: str = ""


@contextmanager
def hub_offline() -> Iterator[None]:
    """Let the hub's libraries, if they are first imported inside, use what is on this computer and wait for nothing."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def read_rows(recipe: "Recipe", base_folder: Path, progress: Progress) -> LengthsReport:
    """Tokenise the data as the run does, or take every row for `max_length` tokens."""
    from qlora_phi3.data.prepare import row_lengths

    training, problem = recipe.training, _find_problem(recipe, base_folder)
    if problem:
        return _assume(recipe, "The data cannot be used.", problem)
    try:
        _find_tokenizer(recipe)
        data = _prepare(recipe, base_folder, progress)
    except DataError as error:
        if all(is_local_data(name, base_folder) for name in _sources(recipe)):
            return _assume(recipe, "The data cannot be used.", str(error))
        return _assume(recipe, error.message)  # a run may fetch what is not here
    except UserError as error:
        return _assume(recipe, error.message)
    evaluation = [] if data.evaluation is None else row_lengths(data.evaluation).tolist()
    lengths = read_lengths(row_lengths(data.train).tolist(), evaluation, training.batch_size)
    measured = f" and {len(evaluation):,} to measure on" if evaluation else ""
    return LengthsReport(
        lengths, f"{len(lengths.training):,} to train on{measured}, the longest {lengths.longest:,} tokens"
    )


def _assume(recipe: "Recipe", reason: str, problem: str = "") -> LengthsReport:
    training = recipe.training
    assumed = assume_lengths(training.max_length, training.batch_size)
    if not training.do_eval:
        assumed = replace(assumed, longest_evaluation=0)
    origin = f"assumed to be max_length = {training.max_length:,} tokens each. {reason.splitlines()[0]}"
    return LengthsReport(assumed, origin, problem)


def _sources(recipe: "Recipe") -> list[str]:
    from qlora_phi3.recipe.load import as_list

    return [*as_list(recipe.data.train), *(as_list(recipe.data.eval) if recipe.training.do_eval else ())]


def _find_problem(recipe: "Recipe", base_folder: Path) -> str:
    """Why no run can use the recipe's files, as far as that shows without a tokenizer; else nothing."""
    from qlora_phi3.data.prepare import check_files

    try:
        check_files(recipe.data, base_folder, evaluate=recipe.training.do_eval)
    except DataError as error:
        return str(error)
    return ""


def _find_tokenizer(recipe: "Recipe") -> None:
    """Say at once that the tokenizer is not here: importing transformers to find out takes a second."""
    name = recipe.model.name
    if Path(name).is_dir():
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer.json", revision=recipe.model.revision)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise UserError("The model's tokenizer, which counts them, is not on this computer.")


def _prepare(recipe: "Recipe", base_folder: Path, progress: Progress) -> "PreparedData":
    from qlora_phi3.data.prepare import prepare_datasets
    from qlora_phi3.data.template import choose_template
    from qlora_phi3.model.phi3 import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)
    template = choose_template(tokenizer, recipe.data.chat_template)
    return prepare_datasets(
        recipe.data,
        max_length=recipe.training.max_length,
        evaluate=recipe.training.do_eval,
        tokenizer=tokenizer,
        template=template,
        base_dir=base_folder,
        progress=progress,
    )


def files_of(recipe: "Recipe", base_folder: Path) -> list[Path]:
    """All that the model's shapes and the rows' lengths are read from, found or not."""
    from qlora_phi3.recipe.load import as_list, candidate_paths

    names = [recipe.model.name, *as_list(recipe.data.train), *as_list(recipe.data.eval)]
    paths = [place.absolute() for name in names for place in candidate_paths(name, base_folder)]
    for folder in paths[:2]:
        paths += [folder / name for name in ("config.json", *TOKENIZER_FILES)]
    if recipe.model.adapter is not None:
        for folder in candidate_paths(recipe.model.adapter, base_folder):
            paths += [folder.absolute() / name for name in ("adapter_config.json", "adapter/adapter_config.json")]
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    for name in names:
        flat = name.replace("/", "--")
        paths += [Path(HF_HUB_CACHE, f"{kind}--{flat}", "snapshots") for kind in ("models", "datasets")]
        datasets = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets"))
        paths.append(datasets / name.replace("/", "___"))
    return paths
