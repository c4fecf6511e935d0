"""Training that has gone wrong without an error: a loss that is no number, or gradients that are all zero."""

import math
from typing import Any

from torch import nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_phi3.errors import UserError


class DivergedError(UserError):
    """The run cannot go on learning; the adapter of the last checkpoint is sound."""


def check_loss(loss: float, step: int) -> None:
    """Refuse a loss that is not finite, before the optimizer makes the weights the same."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"The loss of step {step} is {loss}.",
            "Lower [training] learning_rate or max_grad_norm and go on from the last checkpoint in a new run.",
        )


class GradientGuard(TrainerCallback):  # type: ignore[misc]
    """Looks at the gradients right before the optimizer uses them.

    Args:
        scaled: fp16's GradScaler is in use; it skips a step whose gradients overflow, so that they are not looked at here.
    """

    def __init__(self, *, scaled: bool) -> None:
        self.scaled = scaled
        self.checked = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Stop before a step that would poison the weights, and at the first one that would teach nothing."""
        if self.scaled:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = float(get_total_norm(gradients)) if gradients else 0.0
        step = state.global_step + 1
        if not math.isfinite(norm):
            raise DivergedError(
                f"The gradient of step {step} is {norm}.", "Lower [training] learning_rate and start a new run."
            )
        if norm == 0 and not self.checked:
            raise DivergedError(
                f"The gradient of step {step} is exactly zero: nothing would be learned.",
                "Check that the rows hold answers to learn and that [lora] reaches the model.",
            )
        self.checked = True
