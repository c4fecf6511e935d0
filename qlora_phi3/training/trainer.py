"""TRL's SFTTrainer, given whole optimizer batches: `step.py` splits them, and the loss is our own.

A batch travels as its rows and is laid out in tensors only at its step, by the plan of that moment: `oom.py` may lower it.

The recipe's [training] as TRL's SFTConfig reads it.
"""

import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from qlora_phi3.errors import RunError
from qlora_phi3.execution import ExecutionPlan
from qlora_phi3.model.phi3 import apply_execution_plan
from qlora_phi3.objectives import Objective, sft
from qlora_phi3.recipe.schema import Training
from qlora_phi3.reporter import EvalRecord, Reporter, StepRecord
from qlora_phi3.step import Batch, StepResult, evaluate, forward_backward
from qlora_phi3.training.callbacks import GradientGuard, SpillWatch, check_loss
from qlora_phi3.training.checkpoint import is_complete, removed_on_error, write_manifest
from qlora_phi3.training.oom import MemoryGuard, Phase
from qlora_phi3.training.report import peak_memory_bytes


@dataclass(frozen=True, slots=True)
class RowBatch:
    """The rows of one optimizer batch, as the data set holds them; a class of our own, which nobody moves to a device."""

    rows: tuple[Mapping[str, Any], ...]

    def __len__(self) -> int:
        return len(self.rows)


def gather_rows(rows: Sequence[Mapping[str, Any]]) -> RowBatch:
    """What the DataLoader makes of a batch."""
    return RowBatch(tuple(rows))


class Phi3Trainer(SFTTrainer):  # type: ignore[misc]
    """Trains on `RowBatch`: one training step of the Trainer is one optimizer step, whatever the micro-batches.

    Args:
        args: with the rows of an optimizer step as per_device_train_batch_size and no accumulation.
        setup: how batches are laid out in tensors, until memory runs out.
        compute_dtype: of the matmuls; the adapter stays in fp32.
        sources: names of the data's sources, for messages on a row.
    """

    def __init__(
        self,
        model: PeftModel,
        args: SFTConfig,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        execution: ExecutionPlan,
        compute_dtype: torch.dtype,
        reporter: Reporter,
        sources: Sequence[str],
        objective: Objective = sft,
    ) -> None:
        self.objective = objective
        self.control: TrainerControl
        self.compute_dtype = compute_dtype
        self.reporter = reporter
        self.guard = MemoryGuard(
            model,
            execution=execution,
            device=args.device,
            reporter=reporter,
            sources=sources,
            apply=partial(apply_execution_plan, model),
        )
        self._spill = SpillWatch()
        self._num_recovered = 0  # out-of-memory errors, up to the last step
        self._last: tuple[Batch, float, float] | None = None  # batch, its loss, its token accuracy
        self._step_started = time.perf_counter()
        base = model.get_base_model()
        with _undo_trl_changes(model, base):
            super().__init__(
                model=model,
                args=args,
                data_collator=gather_rows,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                callbacks=[_Announce(reporter), GradientGuard(scaled=args.fp16)],
            )
        # A tokenizer re-saved beside an adapter gives other ids in transformers 5; the run copies the base's own files.
        self.processing_class = None
        self.remove_callback(PrinterCallback)
        if self.accelerator.scaler is not None:
            # It makes its two tensors at its first use; memory that ran out between them would leave it broken.
            self.accelerator.scaler.scale(torch.zeros((), device=args.device))

    def get_batch_samples(
        self, epoch_iterator: Iterator[RowBatch], num_batches: int, device: torch.device
    ) -> tuple[list[RowBatch], None]:
        """The rows of the next optimizer batch."""
        return list(islice(epoch_iterator, num_batches)), None

    def training_step(self, model: nn.Module, inputs: RowBatch, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of all micro-batches, until memory suffices; returns the loss of the batch.

        Raises:
            RunError: one row alone does not fit; everything up to the step before is saved.
        """
        self._step_started = time.perf_counter()
        step = self.state.global_step + 1
        with self._saved_if_stopped():
            batch, result = self._train_on(inputs.rows, step)
        loss = float(result.loss)
        check_loss(loss, step)
        self._last = batch, loss, _num_correct(result) / max(1, batch.num_supervised)
        return result.loss

    def run_heaviest(self, phase: Phase) -> None:
        """Pass over the longest rows that can meet in one batch; gradients stay, nothing is recorded.

        Raises:
            RunError: one row alone does not fit.
        """
        dataset: Any = self.train_dataset if phase == "training" else self.eval_dataset
        lengths = numpy.asarray(dataset.with_format("numpy")["length"])
        longest = numpy.argsort(-lengths, kind="stable")[: self.args.per_device_train_batch_size]
        rows = [dataset[int(number)] for number in longest]
        _ = self._train_on(rows, 0) if phase == "training" else self._measure_on(rows, 0)

    def _train_on(self, rows: Sequence[Mapping[str, Any]], step: int) -> tuple[Batch, StepResult]:
        self.model.train()

        def run_pass(batch: Batch) -> StepResult:
            return forward_backward(
                self.model,
                batch,
                objective=self.objective,
                compute_dtype=self.compute_dtype,
                backward=self.accelerator.backward,
            )

        return self.guard.compute(rows, run_pass, phase="training", step=step)

    def _measure_on(self, rows: Sequence[Mapping[str, Any]], step: int) -> tuple[Batch, StepResult]:
        def run_pass(batch: Batch) -> StepResult:
            [(_, result)] = evaluate(self.model, [batch], objective=self.objective, compute_dtype=self.compute_dtype)
            return result

        return self.guard.compute(rows, run_pass, phase="evaluation", step=step)

    @contextmanager
    def _saved_if_stopped(self) -> Iterator[None]:
        """Write a checkpoint of the last whole step, unless there is one, when a row is too long for the memory."""
        try:
            yield
        except RunError:
            if self.state.global_step > 0 and not is_complete(self._checkpoint_path()):
                self._save_checkpoint(self.model, None)
            raise

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Pass an optimizer step on to the listener, with what only the Trainer knows of it."""
        if self._last is not None and "grad_norm" in logs:
            batch, loss, accuracy = self._last
            self._last = None
            seconds = time.perf_counter() - self._step_started
            logs["loss"] = loss
            record = StepRecord(
                step=self.state.global_step,
                epoch=round(self.state.epoch or 0.0, 4),
                loss=loss,
                token_accuracy=accuracy,
                learning_rate=logs["learning_rate"],
                grad_norm=logs["grad_norm"],
                rows=batch.num_rows,
                tokens=batch.num_tokens,
                supervised_tokens=batch.num_supervised,
                step_seconds=seconds,
                tokens_per_second=batch.num_tokens / seconds,
                peak_memory_bytes=peak_memory_bytes(self.args.device),
            )
            self.reporter.step(record)
            self._watch(record)
        super().log(logs, start_time)

    def _watch(self, record: StepRecord) -> None:
        """Warn of a card that spills; steps that were computed several times are no measure."""
        if self.args.device.type == "cuda" and self._num_recovered == self.guard.num_recovered:
            line = self._spill.look(record.tokens, record.step_seconds)
            if line is not None:
                self.reporter.warning(line)
        self._num_recovered = self.guard.num_recovered

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss over the supervised tokens of all held-out rows, each token counting the same."""
        started = time.perf_counter()
        step = self.state.global_step
        loader = self.get_eval_dataloader(eval_dataset)
        total_loss = correct = tokens = 0.0
        for done, inputs in enumerate(loader, start=1):
            with self._saved_if_stopped():
                batch, result = self._measure_on(inputs.rows, step)
            total_loss += float(result.loss) * batch.num_supervised
            correct += _num_correct(result)
            tokens += batch.num_supervised
            self.reporter.progress("Measuring on held-out rows", done, len(loader))
        check_loss(total_loss, step)
        metrics = {"eval_loss": total_loss / max(1.0, tokens), "eval_token_accuracy": correct / max(1.0, tokens)}
        seconds = time.perf_counter() - started
        self.log(dict(metrics))
        self.reporter.evaluation(EvalRecord(step=step, supervised_tokens=int(tokens), seconds=seconds, **metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader[RowBatch]:
        """The held-out rows in their own order, as many at a time as an optimizer step takes."""
        rows: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        return DataLoader(
            rows,
            batch_size=self.args.per_device_eval_batch_size,
            sampler=SequentialSampler(rows),
            collate_fn=gather_rows,
            generator=torch.Generator(),  # else it draws from the generator that dropout draws from
        )

    def floating_point_ops(self, inputs: RowBatch) -> int:
        """Not counted: the Trainer would look for tensors in the batch."""
        return 0

    def _checkpoint_path(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint, seal it, and only then let older ones go."""
        target = self._checkpoint_path()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with removed_on_error(target):
                super()._save_checkpoint(model, trial)
                write_manifest(target)
        finally:
            self.args.save_total_limit = limit
        rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint)
        self.reporter.checkpoint_saved(target)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Left to the export: a checkpoint is no model to publish."""


def _num_correct(result: StepResult) -> float:
    """How many supervised tokens were predicted correctly; NaN if the objective does not count them."""
    return float(result.metrics.get("num_correct", math.nan))


class _Announce(TrainerCallback):  # type: ignore[misc]
    """Tells the listener where training begins and ends, which the Trainer knows first."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.reporter.begin(state.global_step, state.max_steps)


@contextmanager
def _undo_trl_changes(model: PeftModel, base: nn.Module) -> Iterator[None]:
    """Undo what TRL 1.16's constructor does to a 4-bit model.

    It casts every trainable tensor to bf16, whose step is coarser than most updates, and replaces the forward by its own
    fused head. To be removed when TRL has options for both.
    """
    tensors = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    base.__dict__.pop("forward", None)
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.data = tensors[name]


def build_arguments(
    training: Training,
    checkpoints: Path,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    optim: str,
    evaluates: bool,
) -> SFTConfig:
    """Translate; what `step.py` and `model.py` do themselves is switched off here.

    Args:
        evaluates: whether there are held-out rows to measure on.
    """
    logging.getLogger("transformers.trainer_utils").addFilter(_tells_more_than_shares)
    return SFTConfig(
        output_dir=str(checkpoints),
        # One batch of the Trainer is one optimizer step; step.py splits it into micro-batches.
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        gradient_checkpointing=False,  # model.set_checkpointing: the Trainer's way makes the embedding need gradients
        use_cpu=device.type == "cpu",
        bf16=False,  # step.py runs autocast; fp16 stays with the Trainer for its GradScaler
        fp16=compute_dtype == torch.float16,
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        lr_scheduler_kwargs=training.lr_scheduler_kwargs or None,
        warmup_steps=training.warmup_steps,
        optim=optim,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        data_seed=training.data_seed,
        eval_strategy=training.eval_strategy if evaluates else "no",
        eval_steps=training.eval_steps,
        save_strategy=training.save_strategy,
        save_steps=training.save_steps,
        save_total_limit=training.save_total_limit,
        load_best_model_at_end=training.load_best_model_at_end,
        metric_for_best_model="eval_loss",
        logging_steps=1,  # every step is measured; [training] logging_steps decides which are shown
        logging_nan_inf_filter=False,  # it hides a loss that is no number behind an average
        log_level=training.log_level,
        disable_tqdm=True,
        report_to=training.report_to,
    )


def _tells_more_than_shares(record: logging.LogRecord) -> bool:
    """Whether a log line is other than the warning that 0.2 of all steps is not the 5 steps which that came to.

    transformers 5.23 says so at every resumed run whose eval_steps or save_steps is a share. To be removed when it compares
    them after `compute_steps`.
    """
    told = record.getMessage()
    values = re.findall(r"\n\t\w+: (\S+) \(from args\)", told) if "`trainer_state.json`" in told else []
    return not values or any(float(value) >= 1 for value in values)
