"""A whole run: recipe -> data -> model -> training -> run folder."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from qlora_phi3.architecture import Architecture, read_architecture
from qlora_phi3.dataset.pack import MicroBatchPlan
from qlora_phi3.dataset.prepare import PreparedData, prepare_datasets
from qlora_phi3.dataset.template import choose_template
from qlora_phi3.errors import Interrupted, RunError, UserError
from qlora_phi3.model import (
    Precision,
    apply_setup,
    attach_adapter,
    choose_precision,
    load_base,
    load_tokenizer,
    measure_coverage,
)
from qlora_phi3.recipe.load import Recipe, recipe_as_toml
from qlora_phi3.recipe.tables import Training
from qlora_phi3.runfolder import (
    RunFolder,
    create_run_folder,
    cut_metrics,
    kept_if_loaded,
    read_metrics,
    write_atomically,
    write_report,
)
from qlora_phi3.setup import Setup
from qlora_phi3.sizes import format_gib
from qlora_phi3.step import is_out_of_memory
from qlora_phi3.training.adapter import save_adapter
from qlora_phi3.training.arguments import build_arguments, check_schedule, check_trackers, choose_optimizer
from qlora_phi3.training.checkpoint import find_checkpoint, step_of
from qlora_phi3.training.interrupt import StopOnInterrupt
from qlora_phi3.training.listener import Listener, Recorder
from qlora_phi3.training.oom import recall_setup
from qlora_phi3.training.report import describe_device, failure_reported, first_report, last_report
from qlora_phi3.training.spill import cap_to_free_memory
from qlora_phi3.training.trainer import Phi3Trainer

#: Tokens of a micro-batch where neither the recipe nor a longer row asks for more: enough to keep the matmuls busy
#: beside the dequantization, which costs the same whatever the micro-batch holds. On CPU (SmolLM2-135M, bf16, Zen 5) 512 is as
#: fast as 1,024, at a peak of 1.06-1.10 GiB instead of 1.11-1.35.
USUAL_MICRO_BATCH_TOKENS = {"cuda": 1024, "cpu": 512}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a finished run ended."""

    folder: RunFolder
    steps: int
    loss_before: float | None
    loss_after: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """Everything that stands before the first step."""

    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    device: torch.device
    precision: Precision


def run(
    recipe: Recipe, name: str, base_folder: Path, *, listener: Listener, resume: RunFolder | None = None
) -> RunResult:
    """Train what the recipe says.

    Args:
        name: of the recipe; its runs lie under `<output_dir>/<name>/`.
        base_folder: the recipe's; its relative paths are looked for there, then in the working folder.
        resume: the folder of an unfinished run of the same recipe and data to go on with.

    Raises:
        UserError: anything a person can mend; the run folder's report says the same.
    """
    started = time.perf_counter()
    recipe = _with_found_paths(recipe, base_folder)
    if resume is not None:
        check_resumable(resume, recipe)
    ready = _prepare(recipe, base_folder, listener)
    report = first_report(
        recipe,
        ready.data.report,
        device=ready.device,
        compute_dtype=ready.precision.compute_dtype,
        resume=resume,
    )
    folder = resume or create_run_folder(Path(recipe.training.output_dir), name)
    with kept_if_loaded(folder, is_new=resume is None):
        model = _load(recipe, ready, listener)
    with failure_reported(folder, report, started):
        write_atomically(folder.recipe, recipe_as_toml(recipe))
        write_report(folder, report)
        listener.say(f"Run folder: {folder.path}")
        steps = _train(recipe, ready, model, folder, listener, resuming=resume is not None)
        report = last_report(folder, report, steps=steps, started=started)
        write_report(folder, report)
    return RunResult(
        folder=folder,
        steps=steps,
        loss_before=report["eval_loss_before"],
        loss_after=report["eval_loss_after"],
        seconds=report["seconds"],
    )


def _with_found_paths(recipe: Recipe, base_folder: Path) -> Recipe:
    """The recipe with local files and folders as absolute paths, so that the run folder's copy repeats the run."""

    def find(place: str) -> str:
        for candidate in (base_folder / place, Path(place).expanduser()):
            if candidate.exists():
                return str(candidate.resolve())
        return place

    def find_all(places: Any) -> Any:
        return [find(place) for place in places] if isinstance(places, list) else places and find(places)

    data = recipe.data.model_copy(update={"train": find_all(recipe.data.train), "eval": find_all(recipe.data.eval)})
    model = recipe.model.model_copy(update={"name": find(recipe.model.name)})
    return recipe.model_copy(update={"data": data, "model": model})


def _prepare(recipe: Recipe, base_folder: Path, listener: Listener) -> _Ready:
    """Everything that can fail cheaply, before any weight is read."""
    check_trackers(recipe.training)
    check_schedule(recipe.training)
    architecture = read_architecture(recipe.model.name, recipe.model.revision)
    if recipe.training.max_length > architecture.max_position_embeddings:
        raise UserError(
            f"[training] max_length = {recipe.training.max_length}, and {recipe.model.name} has "
            f"{architecture.max_position_embeddings} positions.",
            f"Write max_length = {architecture.max_position_embeddings} or less.",
        )
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    precision = choose_precision(recipe.compute_dtype, device)
    tokenizer = load_tokenizer(recipe.model)
    table, measures = recipe.data, recipe.training.do_eval
    data = prepare_datasets(
        train=_listed(table.train),
        evaluation=_listed(table.eval) if measures else (),
        eval_size=table.eval_size if measures else 0,
        split_seed=table.split_seed,
        split=table.split,
        eval_split=table.eval_split if measures else None,
        subset=table.subset,
        revision=table.revision,
        format=table.format,
        fields=table.fields,
        loss_on=table.loss_on,
        max_length=recipe.training.max_length,
        max_rows=table.max_rows,
        max_eval_rows=table.max_eval_rows,
        tokenizer=tokenizer,
        template=choose_template(tokenizer, table.chat_template),
        base_folder=base_folder,
        progress=listener.progress,
    )
    for line in data.report.summary_lines():
        listener.say(line)
    for line in data.report.warning_lines():
        listener.warn(line)
    return _Ready(architecture=architecture, tokenizer=tokenizer, data=data, device=device, precision=precision)


def _listed(places: str | list[str] | None) -> Sequence[str]:
    return [places] if isinstance(places, str) else places or []


def _load(recipe: Recipe, ready: _Ready, listener: Listener) -> PeftModel:
    room = cap_to_free_memory(ready.device)
    if room is not None:
        listener.say(f"Memory: at most {format_gib(room)}, what is free on the card; more would spill and crawl")
    listener.progress("Loading the base model", 0, None)
    base = load_base(
        recipe.model,
        recipe.quantization,
        ready.architecture,
        precision=ready.precision,
        device=ready.device,
        longest_row=ready.data.report.longest_row,
    )
    set_seed(recipe.training.seed)
    model = attach_adapter(base, recipe.lora)
    coverage = measure_coverage(model)
    listener.progress("Loading the base model", 1, 1)
    kind = recipe.quantization.bnb_4bit_quant_type.upper() if recipe.quantization.load_in_4bit else "unquantized"
    dtype = str(ready.precision.compute_dtype).removeprefix("torch.")
    listener.say(
        f"Model: {recipe.model.name}, {kind}, computing in {dtype} on {describe_device(ready.device)} ({ready.precision.reason})"
    )
    listener.say(
        f"Adapter: {coverage.trainable_parameters:,} parameters in fp32 on {', '.join(coverage.targets)}; "
        f"covers {coverage.share:.0%} of the linear weights"
    )
    return model


def plan_micro_batches_of(training: Training, ready: _Ready, *, rows: int | str | None) -> MicroBatchPlan:
    """The layout of a batch: `rows` a micro-batch where the recipe fixes them, else as many as fit the usual tokens."""
    usual = max(USUAL_MICRO_BATCH_TOKENS[ready.device.type], training.max_length)
    fixed = rows if isinstance(rows, int) else None
    return MicroBatchPlan(
        max_tokens=fixed * training.max_length if fixed else usual,
        max_rows=fixed or training.batch_size,
        packing=training.packing,
        longrope_boundary=ready.architecture.longrope_boundary,
    )


def _usual_setup(training: Training, ready: _Ready) -> Setup:
    return Setup(
        micro_batch=plan_micro_batches_of(training, ready, rows=training.micro_batch_size),
        evaluation=plan_micro_batches_of(training, ready, rows=training.per_device_eval_batch_size),
        checkpoint_every=1 if training.gradient_checkpointing else 0,
        activation_offloading=training.activation_offloading is True,
        optim=choose_optimizer(training, ready.device),
    )


def build_trainer(
    recipe: Recipe, ready: _Ready, model: PeftModel, folder: RunFolder, listener: Listener
) -> Phi3Trainer:
    """The Trainer of a recipe, ready to train."""
    training = recipe.training
    setup = recall_setup(_usual_setup(training, ready), read_metrics(folder), ready.device)
    apply_setup(model, setup)
    evaluation = ready.data.evaluation
    arguments = build_arguments(
        training,
        folder.checkpoints,
        device=ready.device,
        compute_dtype=ready.precision.compute_dtype,
        evaluates=evaluation is not None,
    )
    listener.say(f"Optimizer: {choose_optimizer(training, ready.device)}, {training.batch_size} rows a step")
    return Phi3Trainer(
        model,
        arguments,
        train_dataset=ready.data.train,
        eval_dataset=evaluation,
        tokenizer=ready.tokenizer,
        setup=setup,
        compute_dtype=ready.precision.compute_dtype,
        listener=listener,
        sources=ready.data.report.sources,
    )


def _train(
    recipe: Recipe, ready: _Ready, model: PeftModel, folder: RunFolder, listener: Listener, *, resuming: bool
) -> int:
    """Train to the end and write the adapter; returns the number of steps."""
    checkpoint = _find_and_tell(folder, listener) if resuming else None
    cut_metrics(folder, step_of(checkpoint) if checkpoint else -1)
    trainer = build_trainer(recipe, ready, model, folder, Recorder(listener, folder))
    if ready.data.evaluation is not None and checkpoint is None:
        trainer.evaluate()
    with StopOnInterrupt(listener) as stop:
        trainer.add_callback(stop)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"The memory of {describe_device(ready.device)} ran out in the optimizer's update after step "
                f"{trainer.state.global_step}.",
                "Close other programs that use it and go on with --resume; or start a new run with a smaller [lora] r.",
            ) from error
    if stop.asked:
        raise Interrupted(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; everything is saved.",
            f"Go on with: qlora-phi3 run {folder.recipe} --resume {folder.path}",
        )
    _measure_the_end(trainer, folder, best=recipe.training.load_best_model_at_end)
    save_adapter(model, ready.tokenizer, recipe, folder.adapter, sample=ready.data.train)
    return int(trainer.state.global_step)


def _measure_the_end(trainer: Phi3Trainer, folder: RunFolder, *, best: bool) -> None:
    """Score the adapter that is handed out, unless the last evaluation did."""
    measured = [record["step"] for record in read_metrics(folder) if record["kind"] == "eval"]
    if trainer.eval_dataset is not None and (best or measured[-1:] != [trainer.state.global_step]):
        trainer.evaluate()


def check_resumable(folder: RunFolder, recipe: Recipe) -> None:
    """Refuse to go on with a run that is done, or with another recipe than it began with.

    Raises:
        RunError: with the tables that differ.
    """
    report = folder.read_report()
    if report.get("status") == "done":
        raise RunError(f"{folder.path} is done; there is nothing to resume.", "Leave --resume out to start a new run.")
    was: Mapping[str, Any] = report.get("recipe", {})
    now = recipe.model_dump(mode="json")
    differing = [
        f"[{table}] {key}" for table in now for key in now[table] if now[table][key] != was.get(table, {}).get(key)
    ]
    if differing:
        raise RunError(
            f"The recipe differs from the one {folder.path} began with in {', '.join(differing)}.",
            f"Go on with its own: qlora-phi3 run {folder.recipe} --resume {folder.path}",
        )


def _find_and_tell(folder: RunFolder, listener: Listener) -> Path | None:
    checkpoint, broken = find_checkpoint(folder.checkpoints)
    for path in broken:
        listener.warn(f"{path} is not whole and is passed over.")
    listener.say(
        f"Going on from {checkpoint}" if checkpoint else "No whole checkpoint yet: starting from the first step."
    )
    return checkpoint
