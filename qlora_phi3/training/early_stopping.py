"""Early stopping with the best weights: training ends where the held-out loss no longer falls, and the best adapter is saved.

The adapter with the lowest loss so far lies in the computer's memory (4 bytes a trained parameter), copied as `divergence.py`
copies its last good state. A checkpoint holds it in BEST with all that decides, so that a resumed run ends as one that was not
interrupted. All processes of a run measure the same loss and decide alike. The evaluation before the first step does not count:
an adapter that has learned nothing is never the best.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_phi3.training.divergence import copy_to_memory

#: The file of a checkpoint with the best weights.
BEST = "best.pt"


class EarlyStopping(TrainerCallback):  # type: ignore[misc]
    """Keeps the best adapter of a run and ends the run; does nothing without a `patience`, in evaluations."""

    def __init__(self, model: nn.Module, patience: int | None) -> None:
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._patience, self._weights = patience, list[Tensor]()
        #: Lowest held-out loss in nats per token, its step, and the evaluations since then.
        self._best_loss, self._best_step, self._num_since = math.inf, 0, 0

    @property
    def is_over(self) -> bool:
        """Whether training has to end."""
        return self._patience is not None and self._num_since >= self._patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Copy the weights where they are the best so far; end training after too many evaluations without a lower loss."""
        if self._patience is None or not state.global_step:
            return control
        loss, self._num_since = kwargs["metrics"]["eval_loss"], self._num_since + 1
        if loss < self._best_loss:
            before: list[Any] = self._weights or [None] * len(self._trained)
            self._weights = [copy_to_memory(weight, old) for weight, old in zip(self._trained, before, strict=True)]
            self._best_loss, self._best_step, self._num_since = loss, state.global_step, 0
        control.should_training_stop |= self.is_over
        return control

    @torch.no_grad()
    def restore_best(self, state: TrainerState) -> dict[str, Any]:
        """Write the best weights into the model, at the end of a run.

        Returns why the run ended where it did and the loss of the adapter that it saves, for report.json; {} without evaluations.
        """
        if not self._weights:
            return {}
        for parameter, weight in zip(self._trained, self._weights, strict=True):
            parameter.copy_(weight)
        is_early = self.is_over and state.global_step < state.max_steps
        ended = f"{'stopped early after' if is_early else 'ended with'} step {state.global_step}; best step {self._best_step}"
        best = {"reason": ended, "best_step": self._best_step, "best_loss": self._best_loss}
        return {"early_stopping": best, "eval_loss_after": self._best_loss}

    def save(self, checkpoint: Path) -> None:
        """Write the best weights, and what decides, into a checkpoint."""
        if self._patience is not None:
            counters = (self._best_loss, self._best_step, self._num_since)
            torch.save({"counters": counters, "weights": self._weights}, checkpoint / BEST)

    def load(self, checkpoint: Path) -> None:
        """Read what `save` wrote."""
        if self._patience is not None:
            saved = torch.load(checkpoint / BEST, map_location="cpu", weights_only=True)
            (self._best_loss, self._best_step, self._num_since), self._weights = saved["counters"], saved["weights"]
