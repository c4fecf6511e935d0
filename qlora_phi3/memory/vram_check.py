"""Whether a recipe fits a GPU or a CPU: reads its model's shapes and its rows' lengths, makes the plan, builds the report.

Nothing is fetched: tokenizer and data must be in a directory or in the hub's caches. Importing this module imports no torch.
"""

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_phi3.errors import CannotTellError, DataError, ModelError, UserError
from qlora_phi3.files import datasets_dir
from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.hardware.gpu_table import GPU_TABLE
from qlora_phi3.memory.margin import DEFAULT_SHARE, read_margin
from qlora_phi3.memory.report import RowSummary, VramReport, read_versions
from qlora_phi3.reporter import Progress

if TYPE_CHECKING:
    from qlora_phi3.data.prepare import PreparedData
    from qlora_phi3.family import Architecture
    from qlora_phi3.memory.plan import Plan, RowLengths
    from qlora_phi3.memory.predict import Predictor
    from qlora_phi3.recipe.schema import Recipe

MODEL_FILES = (
    "config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "model.safetensors",
    "model.safetensors.index.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeContext:
    """All that a prediction depends on, apart from the GPU."""

    #: Its local paths are absolute.
    recipe: "Recipe"
    config: Mapping[str, Any]
    architecture: "Architecture"
    lengths: "RowLengths"


def read_recipe_context(recipe: "Recipe", base_folder: Path, progress: Progress, processes: int = 1) -> RecipeContext:
    """Read the model's shapes and the rows' lengths, from this computer alone.

    Of several processes, each with a GPU, every one has ceil(batch_size / processes) rows of a step at most.

    Raises:
        CannotTellError: the config.json of a model on the hub is not here.
        UserError: there is no such directory, the model is no phi3, or it has less than the recipe asks of it.
    """
    from qlora_phi3.family import OtherModelError, is_hub_id, nearest_known, parse_architecture, read_config
    from qlora_phi3.recipe.load import check_model_limits, check_processes, resolve_paths, use_stored_quantization

    check_processes(recipe.training, processes)
    found, name = resolve_paths(recipe, base_folder), recipe.model.name
    with hub_offline():
        try:
            config = read_config(found.model.name, recipe.model.revision, prefer_shipped=True)
        except ModelError as error:
            is_here = Path(found.model.name).is_dir() or not is_hub_id(found.model.name)
            if is_here or isinstance(error, OtherModelError):
                raise
            nearest = nearest_known(name)
            hint = f"Did you mean {nearest}, whose shapes are known? " if nearest else ""
            raise CannotTellError(
                f"The shapes of {name} are not known: its config.json is not on this computer, and vram-check fetches nothing.",
                f"{hint}Fetch it: hf download {name} config.json",
            ) from error
        architecture = parse_architecture(dict(config), name)
        check_model_limits(recipe, architecture)
        found = use_stored_quantization(found, architecture)
        if Path(found.model.name).is_dir():
            from qlora_phi3.model.checkpoint import check_checkpoint

            check_checkpoint(found.model.name, architecture)
        if found.model.adapter is not None:
            from qlora_phi3.adapters.start import check_start

            check_start(Path(found.model.adapter), recipe.lora, architecture)
        lengths = read_rows(found, architecture, base_folder, progress)
        batch_size, tokens = math.ceil(lengths.batch_size / processes), lengths.evaluation_tokens // processes
        lengths = replace(lengths, batch_size=batch_size, evaluation_tokens=tokens)
    return RecipeContext(recipe=found, config=config, architecture=architecture, lengths=lengths)


@contextmanager
def hub_offline() -> Iterator[None]:
    """Let the hub's libraries use what is on this computer and fetch nothing, wherever they are imported first.

    huggingface_hub and datasets read HF_HUB_OFFLINE once, when they are imported; at the end both are as they were before.
    """
    from huggingface_hub import constants

    def set_offline(offline: bool) -> None:
        constants.HF_HUB_OFFLINE = offline
        config: Any = sys.modules.get("datasets.config")
        if config is not None and "HF_DATASETS_OFFLINE" not in os.environ:
            config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = offline

    before, was_offline = os.environ.get("HF_HUB_OFFLINE"), constants.HF_HUB_OFFLINE
    os.environ["HF_HUB_OFFLINE"] = "1"
    set_offline(True)
    try:
        yield
    finally:
        set_offline(was_offline)
        del os.environ["HF_HUB_OFFLINE"]
        if before is not None:
            os.environ["HF_HUB_OFFLINE"] = before


def read_rows(recipe: "Recipe", architecture: "Architecture", base_folder: Path, progress: Progress) -> "RowLengths":
    """The lengths of the rows, tokenized as a run does it; of `max_length` tokens each where they cannot be read. ModelError
    where a row has a token that the model's embedding lacks.
    """
    gc.disable()  # Python's collector takes a tenth of the time of these imports, which start torch
    _import_bitsandbytes()
    from qlora_phi3.data.prepare import check_files, row_lengths
    from qlora_phi3.memory.plan import assume_lengths, read_lengths
    from qlora_phi3.recipe.load import as_list, is_local_data

    gc.enable()
    training, problem, checked = recipe.training, "", False
    sources = [*as_list(recipe.data.train), *(as_list(recipe.data.eval) if training.do_eval else ())]
    try:
        check_files(recipe.data, base_folder, evaluate=training.do_eval)
        checked = True
        data, tokenizer = _tokenize(recipe, base_folder, progress)
    except UserError as error:
        reason = error.message  # a run may fetch what is not here, but it cannot use local files that are wrong
        is_local = not checked or all(is_local_data(name, base_folder) for name in sources)
        if isinstance(error, DataError) and is_local:
            reason, problem = "The data cannot be used.", str(error)
        lengths = assume_lengths(training.max_length, training.batch_size)
        if not training.do_eval:
            lengths = replace(lengths, longest_evaluation=0)
        origin = f"assumed to be max_length = {training.max_length:,} tokens each. {reason.splitlines()[0]}"
    else:
        from qlora_phi3.data.tokenizer import check_token_ids

        check_token_ids(filter(None, (data.train, data.evaluation)), tokenizer, architecture, recipe.model.name)
        evaluation = [] if data.evaluation is None else row_lengths(data.evaluation).tolist()
        lengths = read_lengths(row_lengths(data.train).tolist(), evaluation, training.batch_size)
        held_out = f" and {len(evaluation):,} to evaluate on" if evaluation else ""
        origin = f"{len(lengths.training):,} to train on{held_out}, the longest {lengths.longest:,} tokens"
    return replace(lengths, origin=origin, problem=problem)


def _tokenize(recipe: "Recipe", base_folder: Path, progress: Progress) -> tuple["PreparedData", Any]:
    """The rows of a recipe, and the tokenizer. Importing transformers, only to find that none is here, would take a second."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name, cached = recipe.model.name, None
    if not Path(name).is_dir():
        with suppress(HFValidationError):
            cached = try_to_load_from_cache(name, "tokenizer.json", revision=recipe.model.revision)
        if not isinstance(cached, str):
            raise UserError("The model's tokenizer, which counts them, is not on this computer.")
    from qlora_phi3.data.prepare import prepare_recipe_data

    return prepare_recipe_data(recipe, base_folder, progress)[:2]


@dataclass(eq=False, slots=True)
class VramChecker:
    """Makes the reports of one recipe; what GPUs have in common is simulated once."""

    context: RecipeContext
    #: Called with what is being done.
    info: Callable[[str], None]
    _predictors: "dict[tuple[Any, ...], Predictor]" = field(default_factory=dict, init=False)

    def kind(self, device: Gpu) -> tuple[Any, tuple[int, int]]:
        """Compute dtype and capability; no operator of a step differs between GPUs of one kind, such as Ampere and Ada."""
        from qlora_phi3.model.phi3 import choose_precision

        capability = device.compute_capability
        dtype, _ = choose_precision(self.context.recipe.compute_dtype, None if device.is_cpu else capability)
        return dtype, (8, 6) if capability == (8, 9) else capability

    def predictor(self, device: Gpu) -> "Predictor":
        """The simulator for a GPU; those of one kind share what was simulated."""
        from qlora_phi3.memory.device import build_predictor

        dtype, capability = kind = self.kind(device)
        if kind not in self._predictors:
            gc.freeze()  # the collector need not look through the libraries again
            model = (self.context.recipe, dict(self.context.config), self.context.architecture)
            of_kind = replace(device, compute_capability=capability)
            self._predictors[kind] = build_predictor(of_kind, *model, compute_dtype=dtype)
        return self._predictors[kind].on_gpu(device.compute_capability, device.multiprocessors)

    def report(self, device: Gpu, budget_bytes: int, *, with_suggestions: bool = True) -> VramReport:
        """Plan for a GPU, and where nothing fits suggest what to change; `budget_bytes` are what the run may take there, its
        margin included. ModelError where the recipe's adapter does not fit the model.
        """
        from qlora_phi3.memory.device import limits_of
        from qlora_phi3.memory.search import find_plan
        from qlora_phi3.memory.suggestions import find_suggestions

        predictor, lengths = self.predictor(device), self.context.lengths
        limits = limits_of(device, read_margin(device.name).limit(budget_bytes), predictor.compute_dtype)
        plan = find_plan(predictor, lengths, limits, progress=self.info)
        report = self._build_report(device, plan, budget_bytes)
        if plan.fits or not with_suggestions:
            return report
        suggestions, no_fix_reason = find_suggestions(predictor, lengths, report, info=self.info)
        return replace(report, suggestions=suggestions, no_fix_reason=no_fix_reason)

    def _build_report(self, device: Gpu, plan: "Plan", budget_bytes: int) -> VramReport:
        from qlora_phi3.memory.cost import describe_step

        memory, execution, training = plan.memory, plan.execution, self.context.recipe.training
        rows, rows_per_gpu = self.context.lengths, self.context.lengths.batch_size
        margin, (speed, slowest, fastest) = read_margin(device.name), self._speeds(device, plan)
        together = max(1, min(execution.micro_batch.max_tokens // training.max_length, rows_per_gpu))
        return VramReport(
            verdict="fits" if plan.fits else "does_not_fit",
            model=self.context.recipe.model.name,
            device=device,
            budget_bytes=budget_bytes,
            margin_bytes=margin.bytes_for(memory.on_gpu_bytes),
            margin_share=margin.share,
            margin_runs=margin.runs if margin.share > DEFAULT_SHARE else 0,
            memory=replace(memory, trace=()),
            compute_dtype=str(self.kind(device)[0]).removeprefix("torch."),
            stored=None if (stored := self.context.architecture.stored) is None else stored.label,
            batch_size=training.batch_size,
            rows_per_gpu=rows_per_gpu,
            micro_batch_size=together,
            gradient_accumulation_steps=math.ceil(rows_per_gpu / together),
            micro_batch_tokens=execution.micro_batch.max_tokens,
            num_micro_batches=plan.workload.num_micro_batches,
            max_length=training.max_length,
            packing=training.packing,
            checkpoint_every_n_layers=execution.checkpoint_every,
            keep_attention=execution.keep_attention,
            activation_offloading=execution.activation_offloading,
            optim=execution.optim,
            logits_tile_bytes=execution.logits_tile_bytes,
            mlp_tile_tokens=execution.mlp_tile_tokens,
            reasons=plan.reasons,
            rows=RowSummary(
                assumed=rows.assumed,
                count=len(rows.training),
                longest=rows.longest,
                longest_evaluation=rows.longest_evaluation,
                origin=rows.origin,
                problem=rows.problem,
            ),
            seconds_per_step=plan.step_seconds,
            step=describe_step(plan.kernels, plan.workload, plan.seconds),
            **self._estimate_run(plan),
            tokens_per_second=speed,
            slowest_tokens_per_second=slowest,
            fastest_tokens_per_second=fastest,
            versions=read_versions(),
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )

    def _estimate_run(self, plan: "Plan") -> dict[str, Any]:
        """The fields of a report that say how long the recipe's run takes, without what comes before its first step."""
        from qlora_phi3.memory.cost import count_steps

        training, lengths = self.context.recipe.training, self.context.lengths
        fields: dict[str, Any] = {"seconds_per_1000_rows": plan.step_seconds * 1000 / training.batch_size}
        if not lengths.assumed:
            steps, epochs, evaluations = count_steps(training, len(lengths.training), evaluates=lengths.evaluation_tokens > 0)
            seconds = steps * plan.step_seconds + evaluations * plan.evaluation_seconds
            fields |= {"epochs": epochs, "total_steps": steps, "run_seconds": seconds}
        return fields

    def _speeds(self, device: Gpu, plan: "Plan") -> tuple[float, float, float]:
        """Tokens a second by the cost model: on the device, on the slowest and on the fastest of the GPUs that it represents."""
        from qlora_phi3.memory.cost import estimate_step, gpu_limits

        rates = [
            gpu_limits(
                tflops_16bit=gpu.tflops_16bit,
                bandwidth_bytes_per_second=gpu.bandwidth_gb * 1e9,
                multiprocessors=gpu.multiprocessors,
            )
            for gpu in GPU_TABLE
            if gpu.label in device.represents
        ]
        seconds = [estimate_step(plan.kernels, plan.workload, gpu).total for gpu in rates] or [plan.step_seconds]
        tokens = sum(plan.workload.lengths)
        return tokens / plan.step_seconds, tokens / max(seconds), tokens / min(seconds)


def _import_bitsandbytes() -> None:
    """Without `torch.compile`, whose first use takes a second; bitsandbytes 0.50 decorates operators that no prediction runs."""
    from unittest.mock import patch

    import torch

    with patch.object(torch, "compile", lambda function, **_: function):
        import bitsandbytes  # noqa: F401


def files_of(recipe: "Recipe", base_folder: Path) -> list[Path]:
    """Every file and directory that the model's shapes and the rows' lengths are read from, whether it exists or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from qlora_phi3.recipe.load import as_list, candidate_paths, local_files

    names = [recipe.model.name, *as_list(recipe.data.train), *as_list(recipe.data.eval)]
    paths = [path for name in names for path in candidate_paths(name, base_folder)]
    listed = [file for name in names[1:] for path in candidate_paths(name, base_folder) for file in local_files(path)]
    paths += [directory / name for directory in paths[:2] for name in MODEL_FILES]
    if recipe.model.adapter is not None:
        adapter_files = ("adapter_config.json", "adapter_model.safetensors")
        places = [path / part for path in candidate_paths(recipe.model.adapter, base_folder) for part in (".", "adapter")]
        paths += [path / name for path in places for name in adapter_files]
    for name in names:
        flat = name.replace("/", "--")
        paths += [Path(HF_HUB_CACHE, f"{kind}--{flat}", "snapshots") for kind in ("models", "datasets")]
        paths.append(datasets_dir() / name.replace("/", "___"))
    return [path.absolute() for path in (*paths, *listed)]
