"""TRL's SFTTrainer with complete optimizer batches: `step.py` splits them into micro-batches and computes our own loss.

A batch travels as rows. It is collated at its step, by the execution plan of that moment, which `oom.py` may have lowered.
"""

import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from qlora_phi3.data.prepare import row_lengths
from qlora_phi3.errors import RunError
from qlora_phi3.execution import ExecutionPlan
from qlora_phi3.files import disk_errors, remove
from qlora_phi3.model.optimizer import build_optimizer
from qlora_phi3.model.phi3 import apply_execution_plan
from qlora_phi3.objectives import Objective, ObjectiveOutput, sft
from qlora_phi3.recipe.schema import Training
from qlora_phi3.reporter import EvalRecord, Phase, StepRecord
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.step import Batch, evaluate, forward_backward
from qlora_phi3.training.artifacts import damage, write_manifest
from qlora_phi3.training.callbacks import EarlyStopping, MetricsWriter, SaveByTime, SpillWatch, StopOnRequest
from qlora_phi3.training.divergence import DivergenceGuard, check_evaluation
from qlora_phi3.training.oom import MemoryGuard
from qlora_phi3.training.prepare import RunContext
from qlora_phi3.training.processes import add_up_gradients, count_processes, gather, own_rank
from qlora_phi3.training.report import peak_memory_bytes, row_name
from qlora_phi3.training.trackers import Trackers


def build_trainer(context: RunContext, execution: ExecutionPlan, model: PeftModel, folder: RunFolder) -> "Phi3Trainer":
    """Apply an execution plan to the model, and build the Trainer of a run, which writes into `folder`."""
    training = context.recipe.training
    apply_execution_plan(model, execution)
    fp16, evaluates = context.compute_dtype == torch.float16, context.data.evaluation is not None
    arguments = build_arguments(
        training, folder.checkpoints, device=context.device, fp16=fp16, optim=execution.optim, evaluates=evaluates
    )
    shared = f", shared by {count_processes()} processes" if count_processes() > 1 else ""
    context.reporter.info(f"Optimizer: {execution.optim}, {training.batch_size} rows a step{shared}")
    trainer = Phi3Trainer(model, arguments, context, execution, folder)
    trainer.trackers.start(arguments, trainer.state, model)
    return trainer


#: Keys of [training] that TrainingArguments has under the same name and with the same meaning.
SAME_ARGUMENTS = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "adam_beta1", "adam_beta2",
    "adam_epsilon", "weight_decay", "max_grad_norm", "seed", "data_seed", "eval_steps", "save_strategy", "save_steps",
    "log_level",
)  # fmt: skip


def build_arguments(
    training: Training, checkpoints: Path, *, device: torch.device, fp16: bool, optim: str, evaluates: bool
) -> SFTConfig:
    """Translate [training] into TRL's SFTConfig; what `step.py` and the model do themselves is off.

    `optim` is transformers' name of the optimizer; `evaluates`: there are held-out rows.
    """
    for name in ("trainer_utils", "training_args"):
        logging.getLogger(f"transformers.{name}").addFilter(is_not_mistaken_warning)
    eval_rows = training.per_device_eval_batch_size
    arguments = SFTConfig(
        **{name: getattr(training, name) for name in SAME_ARGUMENTS},
        report_to="none",  # `Trackers`
        output_dir=str(checkpoints),
        # One batch of the Trainer is one optimizer step; step.py splits it into micro-batches.
        per_device_train_batch_size=training.batch_size,
        # Enough held-out rows for the micro-batches that the recipe asks for.
        per_device_eval_batch_size=max(training.batch_size, 0 if eval_rows == "auto" else eval_rows),
        gradient_accumulation_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        gradient_checkpointing=False,  # model.set_checkpointing: the Trainer's way makes the embedding need gradients
        use_cpu=device.type == "cpu",
        bf16=False,  # step.py runs autocast; fp16 stays with the Trainer for its GradScaler
        fp16=fp16,
        lr_scheduler_kwargs=training.lr_scheduler_kwargs or None,
        optim=optim,
        eval_strategy=training.eval_strategy if evaluates else "no",
        logging_steps=1,  # every step is measured; [training] logging_steps decides which are shown
        logging_nan_inf_filter=False,  # it replaces a loss that is not finite by an average
        disable_tqdm=True,
    )
    # The model is on one GPU: with more visible the Trainer would wrap it in DataParallel, and TRL 1.16 raises.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def is_not_mistaken_warning(record: logging.LogRecord) -> bool:
    """Log filter: False for the warning that the intervals of a resumed run differ from those of its checkpoint.

    `_init_training_state` applies the recipe's. transformers 5.23 logs it at every run whose eval_steps or save_steps is a share,
    as it compares 0.2 of all steps with the 5 steps that it became. And False for the one that `processes.py` does not use DDP.
    """
    return not any(text in record.getMessage() for text in ("`trainer_state.json`", "ParallelMode.DISTRIBUTED"))


@dataclass(frozen=True, slots=True)
class RowBatch:
    """The rows of one optimizer batch, as the data set holds them. The Trainer moves no such object to a device."""

    rows: Sequence[Mapping[str, Any]]


class EvaluationStopped(Exception):  # noqa: N818 - no error: a signal requested it
    """The evaluation ended before its last row."""


def evaluation_is_due(state: TrainerState) -> bool:
    """Whether the checkpoint of this state was saved before the evaluation after its step; the Trainer restores no control."""
    saved: Any = state.stateful_callbacks.get(TrainerControl.__name__, {})
    return state.global_step > 0 and bool(saved.get("args", {}).get("should_evaluate"))


class FinishEvaluation(TrainerCallback):  # type: ignore[misc]
    """Begins a resumed run with the evaluation that a signal, or memory that ran out, ended before its last row."""

    def __init__(self, trainer: "Phi3Trainer") -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate if the checkpoint says that it is due; raises EvaluationStopped, also where training ends with it, and the
        checkpoint stays as it is.
        """
        if evaluation_is_due(state):
            trainer, control.should_evaluate = self._trainer, True
            SFTTrainer._maybe_log_save_evaluate(  # not ours, which would go on with the next step
                trainer, trainer._tr_loss, None, trainer.model, None, state.epoch, None, time.time()
            )
            if trainer.early_stopping.is_over:
                raise EvaluationStopped  # the Trainer would train one step more


class Phi3Trainer(SFTTrainer):  # type: ignore[misc]
    """Trains on `RowBatch`: one training step of the Trainer is one optimizer step, with any number of micro-batches. They are
    collated by the plan `execution` until memory runs out; `args` are of `build_arguments`.
    """

    def __init__(
        self,
        model: PeftModel,
        args: SFTConfig,
        context: RunContext,
        execution: ExecutionPlan,
        folder: RunFolder,
        *,
        objective: Objective = sft,
    ) -> None:
        self.objective = objective
        self.control: TrainerControl
        self.optimizer: torch.optim.Optimizer | None
        self.training = context.recipe.training
        self.compute_dtype = context.compute_dtype
        self.reporter = MetricsWriter(context.reporter, folder)
        self.trackers = Trackers(self.training, args, folder, context.reporter)
        self._sources, apply = context.data.report.sources, partial(apply_execution_plan, model)
        options = {"device": args.device, "reporter": self.reporter, "sources": self._sources, "apply": apply}
        self.guard = MemoryGuard(model, execution=execution, **options)
        self.divergence = DivergenceGuard(self.reporter, recovers=self.training.recover_from_divergence)
        patience = self.training.early_stopping_patience or (math.inf if self.training.load_best_model_at_end else None)
        self.early_stopping = EarlyStopping(model, patience)
        #: Set by a signal; the evaluation stops at its next micro-batch then.
        self.stop = StopOnRequest()
        self._spill_watch = SpillWatch()
        self._num_recovered = 0  # out-of-memory errors, up to the last step
        self._last: tuple[Batch, float, float] | None = None  # batch, its loss, its token accuracy
        self._step_started = time.perf_counter()
        watching = (self.divergence, self.early_stopping, self.trackers)
        with _undo_trl_changes(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=RowBatch,
                train_dataset=context.data.train,
                eval_dataset=context.data.evaluation,
                processing_class=context.tokenizer,
                callbacks=[*watching, SaveByTime(self.training.save_minutes), FinishEvaluation(self)],
            )
        # A tokenizer re-saved with an adapter gives other ids in transformers 5; the run copies the base's own files.
        self.processing_class = None
        self.remove_callback(PrinterCallback)
        self.divergence.scaler = self.accelerator.scaler
        if self.accelerator.scaler is not None:
            # The scaler creates its two tensors at its first use; an out-of-memory error between them would break it.
            self.accelerator.scaler.scale(torch.zeros((), device=args.device))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer, by the function that the memory simulation calls too."""
        if self.optimizer is None:
            is_cuda = self.args.device.type == "cuda"
            self.optimizer = build_optimizer(self.args.optim, model or self.model, self.training, is_cuda=is_cuda)
        return self.optimizer

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The state of a checkpoint with the recipe's intervals."""
        trained: tuple[int, int] = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return trained

    def load_finished(self, checkpoint: Path) -> bool:
        """Load the adapter and the state of a checkpoint after which nothing is left to train; False where something is.

        transformers 5.23 trains one more step after a checkpoint of the last one, where max_steps is set. RunError where the
        recipe ends before the step of the checkpoint.
        """
        max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step > max_steps:
            hint = "Raise [training] max_steps or num_train_epochs, or start a new run."
            raise RunError(f"{checkpoint} has more steps than the {max_steps} that the recipe asks for.", hint)
        self.early_stopping.load(checkpoint)
        if state.global_step < max_steps and not self.early_stopping.is_over:
            if state.max_steps != max_steps:
                note = "the learning rate follows its schedule over the new number."
                self.reporter.warning(f"The run now ends after step {max_steps}, not {state.max_steps}: {note}")
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        if evaluation_is_due(state):
            self.evaluate()
        return True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers does; then set the learning rate of this step, which another number of steps changes. RunError where
        the checkpoint is of an optimizer with another state, as auto chooses on a GPU and on a CPU.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.optimizer is None:
            return
        is_8bit = isinstance(getattr(self.optimizer, "optimizer", self.optimizer), Optimizer8bit)  # accelerate wraps it
        states = [state.keys() for state in self.optimizer.state.values()]
        if any(("state1" in keys) != is_8bit for keys in states if {"state1", "exp_avg"} & keys):
            raise RunError(
                f"{checkpoint} is of another optimizer than {self.args.optim.value}, which this device uses.",
                "Go on where the run began, or start a new run.",
            )
        if isinstance(schedule := self.lr_scheduler, LambdaLR):
            schedule._last_lr = schedule.get_lr()
            for group, rate in zip(self.optimizer.param_groups, schedule.get_last_lr(), strict=True):
                group["lr"] = rate
        self.divergence.load(Path(checkpoint))
        self.early_stopping.load(Path(checkpoint))

    def get_batch_samples(
        self, epoch_iterator: Iterator[RowBatch], num_batches: int, device: torch.device
    ) -> tuple[list[RowBatch], None]:
        """The rows of the next optimizer batch."""
        return list(islice(epoch_iterator, num_batches)), None

    def training_step(self, model: nn.Module, inputs: RowBatch, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of all micro-batches of an optimizer batch, until memory suffices. Returns the mean loss over its
        supervised tokens, fp32 scalar. RunError where one row alone does not fit; a checkpoint of the step before is saved.
        """
        self._step_started = time.perf_counter()
        step = self.state.global_step + 1
        if count_processes() > 1:  # each draws its own dropout, the same in a resumed run
            torch.manual_seed(int.from_bytes(sha256(f"{self.args.seed} {step} {own_rank()}".encode()).digest()[:7]))
        batch, loss, num_correct = self._compute(model, inputs.rows, "training", step)
        add_up_gradients(self.model)
        self.divergence.loss, self.divergence.rows = loss, [row_name(row, self._sources) for row in inputs.rows]
        self._last = batch, loss, num_correct / max(1, batch.num_supervised)
        # The Trainer adds the losses up. Filled in on the device: a copy of a number would wait for the GPU.
        return torch.full((), loss if math.isfinite(loss) else 0.0, device=self.args.device)

    def run_heaviest(self, phase: Phase) -> None:
        """Run a pass over the longest rows that can meet in one batch; gradients stay, nothing is recorded."""
        dataset: Any = self.train_dataset if phase == "training" else self.eval_dataset
        longest = numpy.argsort(-row_lengths(dataset), kind="stable")
        size = self.args.per_device_train_batch_size if phase == "training" else self.args.per_device_eval_batch_size
        rows = [dataset[int(number)] for number in longest[:size]]
        self._compute(self.model, rows, phase, 0)

    def _compute(
        self, model: nn.Module, rows: Sequence[Mapping[str, Any]], phase: Phase, step: int
    ) -> tuple[Batch, float, float]:
        """Forward, and in training backward, of all micro-batches; several processes compute a share of them each. Returns the
        batch, the mean loss over its supervised tokens, and how many of these were predicted correctly. RunError where one row
        does not fit, or another process has died; the checkpoint of the last step is saved.
        """
        options: dict[str, Any] = {"objective": self.objective, "compute_dtype": self.compute_dtype}

        def stoppable(*inputs: Any) -> ObjectiveOutput:
            if self.stop.requested:
                raise EvaluationStopped
            return self.objective(*inputs)

        def run_pass(batch: Batch) -> ObjectiveOutput:
            if phase == "training":
                return forward_backward(model, batch, backward=self.accelerator.backward, **options)
            options["objective"] = stoppable
            [(_, result)] = evaluate(model, [batch], **options)
            return result

        if phase == "training":
            model.train()
        own: tuple[float, float] | None = None
        try:
            with suppress(EvaluationStopped):
                batch, result = self.guard.compute(rows, run_pass, phase=phase, step=step)
                own = float(result.loss), float(result.metrics.get("num_correct", float("nan")))
            unshared, self.guard.unshared = self.guard.unshared, []
            results, signalled, recoveries = zip(*gather((own, self.stop.is_signalled, unshared)), strict=True)
            for records in (records for rank, records in enumerate(recoveries) if records and rank != own_rank()):
                self.guard.adopt(records)
            self.stop.requested |= any(signalled)
            if None in results:
                raise EvaluationStopped
            losses, num_correct = zip(*results, strict=True)
            return batch, sum(losses), sum(num_correct)
        except RunError:
            if self.state.global_step > 0:
                self._save_checkpoint(self.model, None)
            raise

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report an optimizer step, with the learning rate and the gradient norm that only the Trainer knows."""
        if "grad_norm" in logs and self.divergence.undone_step == self.state.global_step:
            self._last = None
            return
        if self._last is not None and "grad_norm" in logs:
            batch, loss, accuracy = self._last
            self._last = None
            seconds = time.perf_counter() - self._step_started
            logs["loss"], logs["tokens_per_second"] = loss, batch.num_tokens / seconds
            self.reporter.step(
                StepRecord(
                    step=self.state.global_step,
                    epoch=round(self.state.epoch or 0.0, 4),
                    loss=loss,
                    token_accuracy=accuracy,
                    learning_rate=logs["learning_rate"],
                    grad_norm=logs["grad_norm"] if math.isfinite(logs["grad_norm"]) else None,  # JSON has no infinity
                    rows=batch.num_rows,
                    tokens=batch.num_tokens,
                    supervised_tokens=batch.num_supervised,
                    step_seconds=seconds,
                    tokens_per_second=batch.num_tokens / seconds,
                    peak_memory_bytes=peak_memory_bytes(self.args.device),
                )
            )
            # A step that was computed several times is no measure of the GPU's speed.
            is_measure = self.args.device.type == "cuda" and self._num_recovered == self.guard.num_recovered
            if is_measure and (line := self._spill_watch.observe(batch.num_tokens, seconds)):
                self.reporter.warning(line)
            self._num_recovered = self.guard.num_recovered
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Dataset | None = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss over the supervised tokens of all held-out rows, with equal weight for each token.

        Where it is not finite, the adapter goes back to its last good state, which is evaluated instead; DivergedError where
        there is none. EvaluationStopped where a signal requested it.
        """
        started = time.perf_counter()
        step = self.state.global_step
        loader = self.get_eval_dataloader(eval_dataset)
        loss, accuracy, tokens = self._measure(loader, step)
        if not math.isfinite(loss) and self.divergence.can_go_back and self.optimizer is not None:
            self.divergence.go_back(step, f"the held-out loss is {loss}", self.optimizer, self.lr_scheduler)
            if self.divergence.failure:
                self.control.should_save = self.control.should_training_stop = True
            loss, accuracy, tokens = self._measure(loader, step)
        check_evaluation(loss, step)
        metrics = {"eval_loss": loss, "eval_token_accuracy": accuracy}
        seconds = time.perf_counter() - started
        self.log(dict(metrics))
        self.reporter.evaluation(EvalRecord(step=step, supervised_tokens=tokens, seconds=seconds, **metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, loader: DataLoader[RowBatch], step: int) -> tuple[float, float, int]:
        """Mean loss, token accuracy and number of the supervised tokens of all rows."""
        total_loss = correct = tokens = 0.0
        for done, inputs in enumerate(loader, start=1):
            batch, loss, num_correct = self._compute(self.model, inputs.rows, "evaluation", step)
            total_loss += loss * batch.num_supervised
            correct += num_correct
            tokens += batch.num_supervised
            self.reporter.progress("Measuring on held-out rows", done, len(loader))
        return total_loss / max(1.0, tokens), correct / max(1.0, tokens), int(tokens)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save what is due, or what a signal asks for; where it stops the evaluation, save without it.

        The checkpoint says that the evaluation is still due, and the resumed run begins with it (`FinishEvaluation`). One of the
        last step of an epoch is saved after the evaluation at the end of the epoch, for which transformers calls this once more.
        """
        if self.stop.requested:
            self.control.should_save = self.control.should_training_stop = True
        ends_epoch = float(self.state.epoch or 0.0).is_integer() or self.state.global_step >= self.state.max_steps
        is_early = ends_epoch and self.args.eval_strategy == "epoch" and not self.control.should_evaluate
        is_due, self.control.should_save = is_early and self.control.should_save, self.control.should_save and not is_early
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
            self.control.should_save |= is_due
        except EvaluationStopped:
            self._save_checkpoint(self.model, None)
            self.control.should_training_stop = True
            self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader[RowBatch]:
        """The held-out rows in their own order."""
        rows: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        return DataLoader(
            rows,
            batch_size=self.args.per_device_eval_batch_size,
            sampler=SequentialSampler(rows),
            collate_fn=RowBatch,
            generator=torch.Generator(),  # else it draws from the generator that dropout draws from
        )

    def floating_point_ops(self, inputs: RowBatch) -> int:
        """Not counted: the Trainer would look for tensors in the batch."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint of this step and its manifest unless it is there, and only then remove older checkpoints.

        RunError where the disk is full or refuses; the new checkpoint is removed then.
        """
        target = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if not self.reporter.is_writer or damage(target) is None:
            return
        remove(target)
        try:
            with disk_errors(target, hint="{cause}, then go on with --resume; earlier checkpoints remain."):
                super()._save_checkpoint(model, trial)
                folder = RunFolder(target.parents[1])
                for path in (folder.metrics, folder.base):
                    if path.is_file():
                        shutil.copyfile(path, target / path.name)
                write_manifest(target)
        except RunError:
            remove(target)
            raise
        with disk_errors(target.parent, hint="{cause}, then go on with --resume."):
            rotate_checkpoints(self.args.output_dir, self.training.save_total_limit)
        self.reporter.checkpoint_saved(target)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm before clipping; shown to the guard, since no callback receives it."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.divergence.grad_norm = float(norm)
        return norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.divergence.save(Path(output_dir))
        self.early_stopping.save(Path(output_dir))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the export writes a model card, a checkpoint needs none."""


@contextmanager
def _undo_trl_changes(model: PeftModel) -> Iterator[None]:
    """Undo what TRL 1.16's constructor does to a 4-bit model.

    It casts every trainable tensor to bf16, whose step is coarser than most updates, and replaces the forward by its own
    fused head. To be removed when TRL has options for both.
    """
    tensors = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    model.get_base_model().__dict__.pop("forward", None)
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.data = tensors[name]
