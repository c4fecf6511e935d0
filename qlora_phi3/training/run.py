"""A complete run: recipe -> data -> execution plan -> model -> dry run -> training -> run directory."""

import gc
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import ValidationError
from torch.nn.utils import clip_grad_norm_

from qlora_phi3 import runfolder
from qlora_phi3.errors import Interrupted, RunError, memory_errors
from qlora_phi3.family import read_architecture
from qlora_phi3.files import atomic_write, disk_errors, flush_to_disk, read_json_object, remove, remove_leftovers
from qlora_phi3.memory.margin import record_error
from qlora_phi3.memory.plan import Plan
from qlora_phi3.memory.report import MemoryReport
from qlora_phi3.model.quantized import describe_device, save_quantized
from qlora_phi3.recipe.load import recipe_as_toml, resolve_paths, use_stored_quantization
from qlora_phi3.recipe.schema import NEEDS_EVALUATION, Recipe
from qlora_phi3.reporter import Reporter
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.training import artifacts, processes
from qlora_phi3.training import report as reports
from qlora_phi3.training.callbacks import stop_on_interrupt
from qlora_phi3.training.oom import read_rng_state, restore_execution_plan
from qlora_phi3.training.prepare import RunContext, load_model, outline_run, plan_run, prepare, wants_dry_run
from qlora_phi3.training.report import PredictionCheck
from qlora_phi3.training.samples import save_samples
from qlora_phi3.training.trainer import EvaluationStopped, Phi3Trainer, build_trainer


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a finished run ended; losses are in nats per token, None where nothing is held out."""

    folder: RunFolder
    steps: int
    loss_before: float | None
    loss_after: float | None
    seconds: float


def run(
    recipe: Recipe,
    name: str,
    recipe_dir: Path,
    *,
    reporter: Reporter,
    resume: RunFolder | None = None,
    asked: Collection[str] = (),
    at_end: Callable[[RunFolder], object] = lambda folder: None,
) -> RunResult:
    """Train what a recipe describes, into `<output_dir>/<name>/`. UserError for what a person can correct, as in report.json.

    Args:
        recipe_dir: directory of the recipe file; relative paths are looked for there, then in the working directory.
        resume: a run of the same recipe and data, to continue: an unfinished one, or a copy of one that is done.
        asked: keys (`training.max_steps`) that a resumed run may have other values of, and more steps with them.
        at_end: called with the run's directory, while it is locked, when the run is done, fails or is interrupted.
    """
    started = time.perf_counter()
    if line := reports.describe_load():
        reporter.warning(line)
    recipe = resolve_paths(recipe, recipe_dir)
    recipe = use_stored_quantization(recipe, read_architecture(recipe.model.name, recipe.model.revision))
    is_more = False
    with ExitStack() as at_exit:
        if resume is not None and not processes.own_rank():
            is_more = check_resumable(resume, recipe, reporter, asked)
            at_exit.enter_context(runfolder.lock_run(resume))
        context = processes.first_then_others(lambda: prepare(recipe, recipe_dir, reporter))
        if resume is not None:
            reports.compare_with_former(context, resume)
        plan = plan_run(context)
        folder, checkpoint = _open_folder(context, name, resume, is_more, at_exit)
        report = reports.first_report(context, folder)
        if not processes.own_rank():
            at_exit.callback(lambda: at_end(folder) if folder.report.is_file() else None)
        with runfolder.removed_on_failure(folder) if resume is None and not processes.own_rank() else nullcontext():
            model = load_model(context, is_first_session=checkpoint is None)
            processes.gather(None)
        with reports.failure_reported(folder, report, started) if not processes.own_rank() else nullcontext():
            trainer = _start(context, plan, model, folder, checkpoint, report)
            with stop_on_interrupt(reporter, trainer.stop), _lost_process_reported(trainer, folder, started):
                _train(trainer, context, folder, checkpoint)
                report |= _finish(trainer, context, plan, folder, report, started)
        if not processes.own_rank():
            save_samples(model, context, folder, report["seconds"])
    losses = report.get("eval_loss_before"), report.get("eval_loss_after")
    return RunResult(folder, int(trainer.state.global_step), *losses, report["seconds"])


def _open_folder(
    context: RunContext, name: str, resume: RunFolder | None, is_more: bool, at_exit: ExitStack
) -> tuple[RunFolder, Path | None]:
    """The directory of a run, which process 0 locks: a new one, that of a resumed run, or where `is_more` a copy of it; and the
    checkpoint to go on from.
    """
    output_dir, reporter, checkpoint = Path(context.recipe.training.output_dir), context.reporter, None
    if resume is None:
        folder = processes.from_first(lambda: runfolder.create_run_folder(output_dir, name, datetime.now(UTC)))
    else:
        folder = processes.from_first(lambda: runfolder.copy_run_folder(resume, output_dir, name) if is_more else resume)
        if is_more:
            reporter.info(f"{resume.path} is done and stays as it is; a copy of it is trained on: {folder.path}")
        checkpoint = processes.from_first(lambda: _checkpoint_to_resume(folder, reporter))
    if not processes.own_rank() and folder != resume:
        at_exit.enter_context(runfolder.lock_run(folder))
    return folder, checkpoint


def _start(
    context: RunContext,
    plan: Plan,
    model: PeftModel,
    folder: RunFolder,
    checkpoint: Path | None,
    report: dict[str, Any],
) -> Phi3Trainer:
    """Write the first files of a run and build its trainer; try the heaviest step, and evaluate the adapter of a new run."""
    recipe, reporter = context.recipe, context.reporter
    if not processes.own_rank():
        if checkpoint is None:
            report["trained_sha256_before"] = reports.trained_digest(model)
        atomic_write(folder.recipe, recipe_as_toml(recipe))
        runfolder.write_report(folder, report)
        reporter.info(f"Run folder: {folder.path}")
        _save_export_inputs(context, model, folder)
        runfolder.restore_metrics(folder, checkpoint)
        folder.samples.unlink(missing_ok=True)  # of an earlier end of this run
    metrics = processes.from_first(lambda: runfolder.read_metrics(folder.metrics))
    execution = restore_execution_plan(plan.execution, metrics, context.device)
    trainer = build_trainer(context, execution, model, folder)
    reporter.begin(outline_run(context, plan, execution, metrics, checkpoint))
    if wants_dry_run(recipe.memory, context.device):
        reporter.progress("Rehearsing the heaviest step", 0, None)
        with _optimizer_memory_errors(context.device):
            measured = dry_run_heaviest_step(trainer)
        reporter.progress("Rehearsing the heaviest step", 1, 1)
        reporter.info(f"Rehearsal: {PredictionCheck(predicted=plan.memory, measured=measured).line()}")
    if context.data.evaluation is not None and checkpoint is None:
        trainer.evaluate()
    return trainer


def _finish(
    trainer: Phi3Trainer,
    context: RunContext,
    plan: Plan,
    folder: RunFolder,
    report: Mapping[str, Any],
    started: float,
) -> dict[str, Any]:
    """Save the adapter of a run that was trained, compare its memory with the prediction, and write its last report, which is
    returned (none by other processes than the first). DivergedError where it diverged once too often.
    """
    best = {} if trainer.divergence.failure else trainer.early_stopping.restore_best(trainer.state)
    if processes.own_rank():
        trainer.divergence.raise_failure(folder.adapter)
        return {}
    if trainer.divergence.last_good.step != 0 or not trainer.divergence.failure:
        artifacts.save_adapter(trainer.model, context, folder)
    trainer.divergence.raise_failure(folder.adapter)
    measured = reports.measure_memory(trainer.model, trainer.optimizer, context.device)
    check = PredictionCheck(predicted=plan.memory, measured=measured)
    context.reporter.info(f"Memory: {check.line()}")
    if context.gpu is not None:
        record_error(context.gpu.name, check.predicted.on_gpu_bytes, measured.on_gpu_bytes)
    with disk_errors(folder.metrics, hint="{cause}, then go on with --resume."):
        flush_to_disk(folder.metrics)
    last = reports.last_report(folder, report, check, steps=int(trainer.state.global_step), started=started) | best
    last["unlearned"] = reports.describe_unlearned(trainer.model, last)
    runfolder.write_report(folder, last)
    if best:
        ended, loss = best["early_stopping"]["reason"], best["eval_loss_after"]
        context.reporter.info(f"The run {ended}, whose adapter is saved; its held-out loss is {loss:.4f}")
    return last


#: Keys of [training] that a resumed run may have other values of: they change neither the rows of a step nor what is learned.
FREE_KEYS = frozenset((
        "per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size", "packing",
        "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading", "num_train_epochs", "max_steps",
        "logging_strategy", "logging_steps", "log_level", "disable_tqdm", "report_to", "output_dir", "save_total_limit",
        "report_samples",
))  # fmt: skip
#: Those of them that ask for another number of steps, which has to be asked for by name: it is mostly a --set left out.
STEP_KEYS = frozenset(("num_train_epochs", "max_steps"))
#: Free as well, unless an evaluation decides the learning rate or which checkpoint is the best.
INTERVAL_KEYS = frozenset(("eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_minutes"))


def check_resumable(folder: RunFolder, recipe: Recipe, reporter: Reporter, asked: Collection[str] = ()) -> bool:
    """Refuse to resume a run that is done or that started with another recipe; report libraries and settings that changed since.

    Keys of [memory] and FREE_KEYS may differ: they change nothing that is learned. So may keys that one of two versions of this
    program does not know: a key that the run's report lacks counts as its default, and one that this version lacks is ignored.
    RunError names the keys that differ, or says that the run is done, all its files are intact, and no more steps are asked for.

    Returns whether the run is done and more steps are `asked` for: a copy of it is to be trained on.
    """
    report = folder.read_report()
    now = recipe.model_dump(mode="json", exclude={"memory"})
    was = _former_recipe(folder, report.get("recipe", {}), now)
    changed = [(table, key) for table in now for key in now[table] if now[table][key] != was[table][key]]
    keeps_best = recipe.training.load_best_model_at_end or recipe.training.early_stopping_patience
    decides = keeps_best or recipe.training.lr_scheduler_type in NEEDS_EVALUATION
    free = FREE_KEYS if decides else FREE_KEYS | INTERVAL_KEYS
    differing = [f"[{table}] {key}" for table, key in changed if table != "training" or key not in free]
    if differing:
        hint = f"Go on with its own: {folder.resume_command}"
        raise RunError(f"The recipe differs from the one {folder.path} began with in {', '.join(differing)}.", hint)
    is_done, steps = report.get("status") == "done", [key for _, key in changed if key in STEP_KEYS]
    is_more = is_done and any(f"training.{key}" in asked and now["training"][key] > was["training"][key] for key in steps)
    damaged = reports.damaged_files(folder, report) if is_done and not is_more else []
    if is_done and not is_more and not damaged:
        more = "to train on in a copy of it, add --set training.num_train_epochs=N (or max_steps=N)."
        hint = f"Leave --resume out to start a new run; {more}"
        raise RunError(f"{folder.path} is done; there is nothing to resume.", hint)
    unasked = {
        key: f"[{table}] {key} {was[table][key]} -> {now[table][key]}" for table, key in changed if f"{table}.{key}" not in asked
    }
    if forgotten := [key for key in steps if key in unasked]:
        wanted = " ".join(f"--set training.{key}={now['training'][key]}" for key in forgotten)
        began = f"The recipe asks for another number of steps than {folder.path} began with: "
        hint = f"Go on as it began: {folder.resume_command}, or add {wanted}."
        raise RunError(f"{began}{', '.join(unasked[key] for key in forgotten)}.", hint)
    if unasked:
        reporter.warning(f"Changed since the run began: {', '.join(unasked.values())}. Unchanged: {folder.resume_command}")
    if damaged:
        reporter.warning(f"{folder.path} is done, but damaged: {', '.join(damaged)}. It is made again from the last checkpoint.")
    old, new = report.get("versions", {}), reports.run_versions()
    updated = [f"{key} {old[key]} -> {new[key]}" for key in new if old.get(key, new[key]) != new[key]]
    if updated:
        reporter.warning(f"Versions changed since the run began: {', '.join(updated)}.")
    return is_more


def _former_recipe(folder: RunFolder, saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that a run began with, with the keys that the recipe has now; RunError where this version refuses a value."""
    try:
        known = {table: {key: saved[table][key] for key in now[table] if key in saved[table]} for table in now if table in saved}
        return Recipe.model_validate(known).model_dump(mode="json")
    except (ValidationError, TypeError, KeyError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            problem = error.errors()[0]
            reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        raise RunError(f"{folder.report} holds a recipe that this version cannot read: {reason}.", "Start a new run.") from error


def _checkpoint_to_resume(folder: RunFolder, reporter: Reporter) -> Path | None:
    """The newest complete checkpoint of a locked run; what killed processes left is removed, and what is damaged set aside."""
    remove_leftovers(folder.path)
    for path in folder.checkpoints.glob("rehearsal-*"):
        remove(path)
    checkpoint, refused = artifacts.find_checkpoint(folder.checkpoints)
    for path, reason in refused.items():
        kept = artifacts.set_aside(path)
        reporter.warning(f"{path} is incomplete and is {f'kept as {kept.name}' if kept else 'removed'}: {reason}.")
    if checkpoint is None:
        reporter.info("No complete checkpoint yet: starting from the first step.")
        return None
    base = checkpoint / folder.base.name
    if base.is_file() and not (folder.base.is_file() and folder.base.read_bytes() == base.read_bytes()):
        atomic_write(folder.base, base.read_text(encoding="utf-8"))
        reporter.warning(f"{folder.base} was damaged or missing and is restored from {checkpoint.name}.")
    with suppress(RunError):
        own, other = folder.training_began.isoformat(), read_json_object(base, RunError, "").get("run_started")
        if other and other != own:
            reporter.warning(f"{checkpoint} is of a run that started at {other}, and this one started at {own}.")
    reporter.info(f"Going on from {checkpoint}")
    return checkpoint


def _save_export_inputs(context: RunContext, model: PeftModel, folder: RunFolder) -> None:
    """Write what an export needs to prove itself: checksums of the base, held-out rows, the chat template."""
    recipe, progress = context.recipe, context.reporter.progress
    progress("Computing the base's checksums", 0, None)
    artifacts.record_base(
        model,
        folder,
        name=recipe.model.name,
        quantization=recipe.quantization,
        compute_dtype=context.compute_dtype,
        inputs=artifacts.input_checksums(context, getattr(model.get_base_model().config, "_commit_hash", None)),
    )
    artifacts.save_held_out(context.data, folder)
    if context.template.name.endswith(".jinja"):  # a file, which may be changed or gone when the run is exported
        atomic_write(folder.chat_template, context.template.source)
    if recipe.model.save_quantized and recipe.quantization.load_in_4bit and not folder.quantized_base.is_dir():
        save_quantized(model, folder.quantized_base)
    progress("Computing the base's checksums", 1, 1)


def _train(trainer: Phi3Trainer, context: RunContext, folder: RunFolder, checkpoint: Path | None) -> None:
    """Train to the last step, and evaluate the adapter that is saved. Ctrl-C, SIGTERM and SIGHUP raise Interrupted; a checkpoint
    is saved.
    """
    with suppress(EvaluationStopped), _optimizer_memory_errors(context.device):
        if checkpoint is None or not trainer.load_finished(checkpoint):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    evaluated = [record["step"] for record in runfolder.read_metrics(folder.metrics) if record["kind"] == "eval"]
    # The other processes may have read the metrics before the last line.
    is_evaluated = processes.gather(evaluated[-1:] == [state.global_step])[0]
    if context.data.evaluation is not None and not is_evaluated and not trainer.stop.requested:
        with suppress(EvaluationStopped):
            trainer.evaluate()
    trainer.trackers.finish(trainer.args, state, trainer.control, trainer.model)
    if trainer.stop.requested:
        trainer._save_checkpoint(trainer.model, None)  # it is there already, but for save_strategy = "no"
        hint = f"Go on with: {folder.resume_command}"
        raise Interrupted(f"Stopped after step {state.global_step} of {state.max_steps}; everything is saved.", hint)


@contextmanager
def _lost_process_reported(trainer: Phi3Trainer, folder: RunFolder, started: float) -> Iterator[None]:
    """Save the last completed step where another process died, and report it; another one does so in place of process 0."""
    try:
        yield
    except processes.ProcessLost as lost:
        step, hint = trainer.state.global_step, f"Go on with: {folder.resume_command}"
        error = processes.ProcessLost(f"Another process of this run has ended; the last completed step is {step}.", hint)
        with runfolder.lock_run(folder, wait_seconds=processes.TAKE_OVER_SECONDS) if processes.own_rank() else nullcontext():
            if (report := folder.read_report()).get("status") != "running":
                raise  # process 0 lives, and reports it
            error.is_shown = trainer.reporter.is_writer = True
            with reports.failure_reported(folder, report, started):
                if step:
                    trainer._save_checkpoint(trainer.model, None)
                raise error from lost


def dry_run_heaviest_step(trainer: Phi3Trainer) -> MemoryReport:
    """Run the heaviest step, evaluation and checkpoint of a trainer that has not started, and undo them bit for bit.

    The order of the data does not change, since the rows are selected by length. Where memory runs out, `oom.py` lowers the
    execution plan, and the run starts with the lowered one.

    Returns the peak of the memory. Raises RunError where a single row does not fit.
    """
    device = trainer.args.device
    with _undone(trainer):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        trainer.run_heaviest("training")
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        optimizer = trainer.create_optimizer()
        if trainer.args.max_grad_norm:
            clip_grad_norm_(trained, trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        trainer.run_heaviest("training")  # now with the optimizer's state in memory
        for parameter in trained:
            parameter.grad = None
        if trainer.eval_dataset is not None:
            trainer.run_heaviest("evaluation")
        if trainer.reporter.is_writer:
            checkpoints = Path(trainer.args.output_dir)
            with disk_errors(checkpoints):
                checkpoints.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=checkpoints, ignore_cleanup_errors=True) as target:
                    trainer.model.save_pretrained(target)
                    torch.save(optimizer.state_dict(), Path(target) / "optimizer.pt")
        return reports.measure_memory(trainer.model, optimizer, device)


@contextmanager
def _undone(trainer: Phi3Trainer) -> Iterator[None]:
    """Restore weights, random numbers and the training mode at the end, and drop the optimizer."""
    device, model = trainer.args.device, trainer.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = [parameter.detach().to("cpu", copy=True) for parameter in trained]
    restore_rng_state, was_training = read_rng_state(device), model.training
    try:
        yield
    finally:
        trainer.optimizer = trainer.lr_scheduler = None
        model.train(was_training)
        with torch.no_grad():
            for parameter, weight in zip(trained, weights, strict=True):
                parameter.copy_(weight)
                parameter.grad = None
        gc.collect()
        restore_rng_state()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _optimizer_memory_errors(device: torch.device) -> AbstractContextManager[None]:
    """Report in one line that memory ran out in the optimizer's update, the only place where nothing is tried again."""
    problem = f"The memory of {describe_device(device)} ran out in the optimizer's update: {{reason}}."
    hint = "Close other programs that use it and go on with --resume; or start a new run with a smaller [lora] r."
    return memory_errors(RunError, problem, hint)
