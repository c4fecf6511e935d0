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

from qlora_phi3.recipe.schema import Training
from qlora_phi3.training.divergence import copy_to_memory

#: The file of a checkpoint with the best weights.
BEST = "best.pt"


class EarlyStopping(TrainerCallback):  # type: ignore[misc]
    """Keeps the best adapter of a run and ends the run; does nothing without `early_stopping_patience`."""

    def __init__(self, model: nn.Module, training: Training) -> None:
        self._model, self._patience, self._threshold = model, training.early_stopping_patience, training.early_stopping_threshold
        #: Lowest held-out loss in nats per token, and its step (0: no evaluation yet).
        self.best_loss, self.best_step = math.inf, 0
        #: The loss that the next one must be lower than, by the threshold; evaluations in a row that were not.
        self._reference, self._num_without = math.inf, 0
        self._weights = list[Tensor]()

    @property
    def is_over(self) -> bool:
        """Whether training has to end."""
        return self._patience is not None and self._num_without >= self._patience

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> TrainerControl:
        """Copy the weights where they are the best so far; end training after too many evaluations without a lower loss."""
        if self._patience is None or not state.global_step:
            return control
        loss = metrics["eval_loss"]
        if loss < self.best_loss:
            before = self._weights or [None] * len(self._trained())
            self._weights = [copy_to_memory(weight, old) for weight, old in zip(self._trained(), before, strict=True)]
            self.best_loss, self.best_step = loss, state.global_step
        if loss < self._reference - self._threshold:
            self._reference, self._num_without = loss, 0
        else:
            self._num_without += 1
        control.should_training_stop |= self.is_over
        return control

    @torch.no_grad()
    def restore_best(self, state: TrainerState) -> str | None:
        """Write the best weights into the model at the end of a run; returns what to report, None where the last are the best."""
        if not self._weights or self.best_step == state.global_step:
            return None
        for parameter, weight in zip(self._trained(), self._weights, strict=True):
            parameter.copy_(weight)
        return self._reason(state)

    def _reason(self, state: TrainerState) -> str:
        is_early = self.is_over and state.global_step < state.max_steps
        return f"{'stopped early after' if is_early else 'ended with'} step {state.global_step}; best step {self.best_step}"

    def as_dict(self, state: TrainerState) -> dict[str, Any]:
        """For report.json: why the run ended where it did, and the loss of the adapter that is saved."""
        if not self._weights:
            return {}
        best = {"reason": self._reason(state), "best_step": self.best_step, "best_loss": self.best_loss}
        return {"early_stopping": best, "eval_loss_after": self.best_loss}

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def save(self, checkpoint: Path) -> None:
        """Write the best weights and the counters into a checkpoint."""
        if self._patience is not None:
            counters = (self.best_loss, self.best_step, self._reference, self._num_without)
            torch.save({"counters": counters, "weights": self._weights}, checkpoint / BEST)

    def load(self, checkpoint: Path) -> None:
        """Read what `save` wrote."""
        if self._patience is not None:
            saved = torch.load(checkpoint / BEST, map_location="cpu", weights_only=True)
            self.best_loss, self.best_step, self._reference, self._num_without = saved["counters"]
            self._weights = saved["weights"]
