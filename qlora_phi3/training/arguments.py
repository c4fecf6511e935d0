"""The recipe's [training] as TRL's SFTConfig reads it."""

import logging
import re
from pathlib import Path

import torch
from transformers import get_scheduler
from transformers.integrations import get_available_reporting_integrations, is_flytekit_available
from trl import SFTConfig

from qlora_phi3.errors import RecipeError
from qlora_phi3.recipe.tables import Training


def check_trackers(training: Training) -> None:
    """Refuse a tracker whose library is not installed, before a model is loaded for it.

    Raises:
        RecipeError: with its name.
    """
    asked = [training.report_to] if isinstance(training.report_to, str) else training.report_to
    installed = {*get_available_reporting_integrations(), *(["flyte"] if is_flytekit_available() else [])}
    for name in asked:
        if name not in ("all", "none") and name not in installed:
            raise RecipeError(
                f"[training] report_to names {name}, which is not installed.",
                "Install it beside qlora-phi3, or delete it: metrics.jsonl holds every figure.",
            )


def check_schedule(training: Training) -> None:
    """Refuse settings the learning rate's schedule does not know, by making one for an optimizer of nothing.

    Raises:
        RecipeError: with what transformers says of them.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=10**6,
            scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f'[training] lr_scheduler_kwargs does not fit lr_scheduler_type = "{training.lr_scheduler_type}": {error}.',
            "Mend or delete it.",
        ) from error


def choose_optimizer(training: Training, device: torch.device) -> str:
    """The optimizer's name in transformers: the recipe's, or 8-bit paged AdamW on CUDA and plain AdamW on a CPU."""
    if training.optim != "auto":
        return training.optim
    return "paged_adamw_8bit" if device.type == "cuda" else "adamw_torch"


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
