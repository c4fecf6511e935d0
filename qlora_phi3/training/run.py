"""A whole run: recipe -> data -> model -> training -> run folder."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from qlora_phi3.errors import Interrupted, RunError
from qlora_phi3.execution import ExecutionPlan
from qlora_phi3.files import atomic_write
from qlora_phi3.model.phi3 import apply_execution_plan
from qlora_phi3.model.quantized import save_quantized
from qlora_phi3.recipe.load import recipe_as_toml, resolve_paths
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.reporter import Reporter
from qlora_phi3.runfolder import RunFolder, create_run_folder, cut_metrics, kept_if_loaded, read_metrics, write_report
from qlora_phi3.step import is_out_of_memory
from qlora_phi3.training.artifacts import record_base, save_adapter, save_held_out, save_template
from qlora_phi3.training.callbacks import MetricsWriter, StopOnInterrupt
from qlora_phi3.training.checkpoint import find_checkpoint, step_of
from qlora_phi3.training.dry_run import dry_run_heaviest_step
from qlora_phi3.training.oom import restore_execution_plan
from qlora_phi3.training.prepare import PlannedRun, RunContext, load_model, plan_run, prepare, wants_rehearsal
from qlora_phi3.training.report import (
    PredictionCheck,
    describe_device,
    failure_reported,
    first_report,
    last_report,
    measure_memory,
)
from qlora_phi3.training.trainer import Phi3Trainer, build_arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a finished run ended."""

    folder: RunFolder
    steps: int
    loss_before: float | None
    loss_after: float | None
    seconds: float


def run(
    recipe: Recipe, name: str, base_folder: Path, *, reporter: Reporter, resume: RunFolder | None = None
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
    recipe = resolve_paths(recipe, base_folder)
    if resume is not None:
        check_resumable(resume, recipe)
    context = prepare(recipe, base_folder, reporter)
    report = first_report(
        recipe,
        context.data.report,
        name=name,
        device=context.device,
        compute_dtype=context.precision.compute_dtype,
        resume=resume,
    )
    chosen = plan_run(recipe, context, reporter)
    folder = resume or create_run_folder(Path(recipe.training.output_dir), name)
    with kept_if_loaded(folder, is_new=resume is None):
        is_first_session = resume is None or find_checkpoint(resume.checkpoints)[0] is None
        model = load_model(recipe, context, reporter, is_first_session=is_first_session)
    with failure_reported(folder, report, started):
        atomic_write(folder.recipe, recipe_as_toml(recipe))
        write_report(folder, report)
        reporter.info(f"Run folder: {folder.path}")
        _record(recipe, context, model, folder, reporter)
        steps, prediction_check = _train(recipe, context, chosen, model, folder, reporter, resuming=resume is not None)
        report = last_report(folder, report, prediction_check, steps=steps, started=started)
        write_report(folder, report)
    return RunResult(
        folder=folder,
        steps=steps,
        loss_before=report["eval_loss_before"],
        loss_after=report["eval_loss_after"],
        seconds=report["seconds"],
    )


def _record(recipe: Recipe, context: RunContext, model: PeftModel, folder: RunFolder, reporter: Reporter) -> None:
    """Keep what an export will need to prove itself."""
    reporter.progress("Noting down the base's checksums", 0, None)
    record_base(
        model,
        folder,
        name=recipe.model.name,
        quantization=recipe.quantization,
        compute_dtype=context.precision.compute_dtype,
    )
    save_held_out(context.data, folder)
    save_template(context.template, folder)
    if recipe.model.save_quantized and recipe.quantization.load_in_4bit and not folder.quantized_base.is_dir():
        save_quantized(model, folder.quantized_base)
    reporter.progress("Noting down the base's checksums", 1, 1)


def build_trainer(
    recipe: Recipe,
    context: RunContext,
    execution: ExecutionPlan,
    model: PeftModel,
    folder: RunFolder,
    reporter: Reporter,
) -> Phi3Trainer:
    """The Trainer of a recipe, ready to train."""
    training = recipe.training
    apply_execution_plan(model, execution)
    evaluation = context.data.evaluation
    arguments = build_arguments(
        training,
        folder.checkpoints,
        device=context.device,
        compute_dtype=context.precision.compute_dtype,
        optim=execution.optim,
        evaluates=evaluation is not None,
    )
    reporter.info(f"Optimizer: {execution.optim}, {training.batch_size} rows a step")
    return Phi3Trainer(
        model,
        arguments,
        train_dataset=context.data.train,
        eval_dataset=evaluation,
        tokenizer=context.tokenizer,
        execution=execution,
        compute_dtype=context.precision.compute_dtype,
        reporter=reporter,
        sources=context.data.report.sources,
    )


def _train(
    recipe: Recipe,
    context: RunContext,
    chosen: PlannedRun,
    model: PeftModel,
    folder: RunFolder,
    reporter: Reporter,
    *,
    resuming: bool,
) -> tuple[int, PredictionCheck]:
    """Train to the end and write the adapter; returns the number of steps, and the memory predicted and measured."""
    checkpoint = _find_and_tell(folder, reporter) if resuming else None
    cut_metrics(folder, step_of(checkpoint) if checkpoint else -1)
    execution = restore_execution_plan(chosen.execution, read_metrics(folder), context.device)
    trainer = build_trainer(recipe, context, execution, model, folder, MetricsWriter(reporter, folder))
    if wants_rehearsal(recipe, context.device):
        reporter.progress("Rehearsing the heaviest step", 0, None)
        with _update_in_memory(context.device, lambda: 0):
            measured = dry_run_heaviest_step(trainer, context.card, max_grad_norm=recipe.training.max_grad_norm)
        reporter.progress("Rehearsing the heaviest step", 1, 1)
        reporter.info(f"Rehearsal: {PredictionCheck(predicted=chosen.predicted, measured=measured).line()}")
    if context.data.evaluation is not None and checkpoint is None:
        trainer.evaluate()
    with StopOnInterrupt(reporter) as stop:
        trainer.add_callback(stop)
        with _update_in_memory(context.device, lambda: trainer.state.global_step):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.asked:
        raise Interrupted(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; everything is saved.",
            f"Go on with: qlora-phi3 run {folder.recipe} --resume {folder.path}",
        )
    _measure_the_end(trainer, folder, best=recipe.training.load_best_model_at_end)
    save_adapter(model, context.tokenizer, recipe, folder.adapter, sample=context.data.train)
    measured = measure_memory(model, trainer.optimizer, context.device, context.card)
    prediction_check = PredictionCheck(predicted=chosen.predicted, measured=measured)
    if prediction_check.predicted is not None:
        reporter.info(f"Memory: {prediction_check.line()}")
        prediction_check.remember(context.card)
    return int(trainer.state.global_step), prediction_check


@contextmanager
def _update_in_memory(device: torch.device, step: Callable[[], int]) -> Iterator[None]:
    """Say in one line that memory ran out where nothing can be retried: in the optimizer's update."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"The memory of {describe_device(device)} ran out in the optimizer's update after step {step()}.",
            "Close other programs that use it and go on with --resume; or start a new run with a smaller [lora] r.",
        ) from error


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
        f"[{table}] {key}"
        for table in now
        for key in now[table]
        if table != "memory"
        and now[table][key] != was.get(table, {}).get(key)  # memory changes nothing that is learned
    ]
    if differing:
        raise RunError(
            f"The recipe differs from the one {folder.path} began with in {', '.join(differing)}.",
            f"Go on with its own: qlora-phi3 run {folder.recipe} --resume {folder.path}",
        )


def _find_and_tell(folder: RunFolder, reporter: Reporter) -> Path | None:
    checkpoint, broken = find_checkpoint(folder.checkpoints)
    for path in broken:
        reporter.warning(f"{path} is not whole and is passed over.")
    reporter.info(
        f"Going on from {checkpoint}" if checkpoint else "No whole checkpoint yet: starting from the first step."
    )
    return checkpoint
