"""Recovery from divergence: back to the last good adapter and optimizer state, at a lower learning rate, without the rows.

A step diverges if
1. its loss or its gradient is not finite (in fp16 the gradient scaler skips such a gradient itself);
2. or its gradient norm, before clipping, is more than NORM_FACTOR times the largest of all earlier steps (and than NORM_FACTOR);
3. or it is the STREAK_STEPS-th step in a row whose loss is more than LOSS_MARGIN above the largest loss of the run's first
   FIRST_STEPS steps and of every step that is more than FIRST_STEPS steps old.
2 and 3 begin after FIRST_STEPS steps. Noise does not trigger them: a hard row among easy ones raises the loss by several nats and
the norm a thousandfold, but not in five batches in a row, and not above 1,000. None of 15,000 simulated runs of 500 steps was
stopped (batches of 1, 4 and 16 rows; normal, lognormal and exponential losses, and learned rows with 1 to 30 % of rows of 8 nats;
November 2026, the generator of `tests/training/test_training_divergence.py`).

Then the adapter and the optimizer go back to the copy of the last good step, the learning rate becomes LEARNING_RATE_FACTOR of
what it was, the step counter and the schedule go on, and the next step takes the next rows. The rows of the offending steps are
skipped until the next epoch. After MAX_RECOVERIES recoveries the next divergence ends the run, with the last good state saved.

The copy is taken every COPY_STEPS steps from weights that have just given a good loss and a good gradient. It lies in the
computer's memory: trained parameters x (4 bytes + the optimizer's state: 8 of adamw_torch, 2 of 8-bit AdamW). A checkpoint holds
it in LAST_GOOD, so that a resumed run goes back to the same state as one that was not interrupted.
"""

import math
from dataclasses import asdict, dataclass, field
from itertools import repeat, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_phi3.errors import UserError
from qlora_phi3.reporter import DivergenceRecord, Reporter

FIRST_STEPS, STREAK_STEPS, LOSS_MARGIN, NORM_FACTOR = 20, 5, 1.0, 1000.0
COPY_STEPS, LEARNING_RATE_FACTOR, MAX_RECOVERIES = 5, 0.5, 5
#: The file of a checkpoint with the copy and what the rule has seen.
LAST_GOOD = "last_good.pt"
HINT = "Lower [training] learning_rate or max_grad_norm and start a new run."


class DivergedError(UserError):
    """The run cannot learn any more."""


def check_evaluation(loss: float, step: int) -> None:
    """Raise DivergedError where the loss on the held-out rows is not finite."""
    if not math.isfinite(loss):
        raise DivergedError(f"The loss on the held-out rows after step {step} is {loss}.", HINT)


def not_finite(loss: float, norm: float | None) -> str | None:
    """Which of the two is not finite, as a reason; None where both are."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    return None if norm is None or math.isfinite(norm) else f"the gradient norm is {norm}"


@dataclass(slots=True)
class SpikeRule:
    """Judges the loss and the gradient norm of each step by those of the steps before; losses in nats per token."""

    num_good: int = 0  #: Steps accepted so far.
    largest_norm: float = 0.0
    reference: float = -math.inf  #: The largest loss of the first FIRST_STEPS steps and of those that left `recent`.
    recent: list[float] = field(default_factory=list)  #: Losses of the last FIRST_STEPS accepted steps after the first ones.
    streak: int = 0  #: How many of the last steps had a suspicious loss.

    def judge(self, loss: float, norm: float | None) -> str | None:
        """Why this step diverged, or None; `norm` is None where the gradient scaler skips the step."""
        if reason := not_finite(loss, norm):
            return reason
        is_first = self.num_good < FIRST_STEPS
        if not is_first and norm is not None and norm > NORM_FACTOR * max(1.0, self.largest_norm):
            return f"the gradient norm is {norm:.3g}, and the largest so far was {self.largest_norm:.3g}"
        self.streak = self.streak + 1 if not is_first and loss > self.reference + LOSS_MARGIN else 0
        if self.streak == STREAK_STEPS:
            return f"the loss of {STREAK_STEPS} steps in a row is above {self.reference + LOSS_MARGIN:.2f}, now {loss:.2f}"
        self.num_good += 1
        self.largest_norm = max(self.largest_norm, norm or 0.0)
        if is_first:
            self.reference = max(self.reference, loss)
        else:
            self.recent.append(loss)
            if len(self.recent) > FIRST_STEPS:
                self.reference = max(self.reference, self.recent.pop(0))
        return None

    def forget_streak(self) -> None:
        """Drop the suspicious steps, whose updates were undone."""
        accepted = min(self.streak, STREAK_STEPS - 1)
        self.num_good -= accepted
        del self.recent[len(self.recent) - accepted :]
        self.streak = 0


@dataclass(slots=True)
class LastGood:
    """The weights and the optimizer's state after `step`, and the gradient scaler's of fp16, in the computer's memory."""

    step: int | None = None  #: None: no copy was taken yet.
    weights: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)

    def copy_from(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, step: int) -> None:
        """Copy the present state, into the tensors of the copy before."""
        parameters = _parameters(optimizer)
        self.weights = [copy_to_memory(parameter, weight) for parameter, weight in zip_longest(parameters, self.weights)]
        self.states = [
            {key: copy_to_memory(value, state.get(key)) for key, value in optimizer.state.get(parameter, {}).items()}
            for parameter, state in zip(parameters, self.states or repeat({}), strict=False)
        ]
        self.scaler, self.step = {} if scaler is None else scaler.state_dict(), step

    @torch.no_grad()
    def restore(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        """Write the copy back in place, so that no memory of the GPU is allocated."""
        for parameter, weight, state in zip(_parameters(optimizer), self.weights, self.states, strict=True):
            parameter.copy_(weight)
            if not state:  # before the optimizer's first update
                optimizer.state.pop(parameter, None)
                continue
            now = optimizer.state[parameter]
            for key, value in state.items():
                if isinstance(value, Tensor):
                    now[key].copy_(value)
                else:
                    now[key] = value
        if scaler is not None and self.scaler:
            scaler.load_state_dict(self.scaler)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def copy_to_memory(value: Any, before: Any) -> Any:
    """The value in the computer's memory: in `before`, its earlier copy, unless that is None."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to("cpu", copy=True) if before is None else before.copy_(value)


class DivergenceGuard(TrainerCallback):  # type: ignore[misc]
    """Judges each step before the optimizer uses its gradients, and goes back after a step that diverged.

    The Trainer sets `loss`, `rows` (their names) and `grad_norm` (unscaled, before clipping) of the step, and `scaler` in fp16.
    Where it does not recover, a loss or gradient that is not finite ends the run, and nothing is copied.
    """

    def __init__(self, reporter: Reporter, *, recovers: bool) -> None:
        self.loss, self.grad_norm, self.rows = 0.0, 0.0, list[str]()
        self.scaler: torch.amp.GradScaler | None = None
        self.last_good = LastGood()
        #: The last step that was undone, and why the run ends after MAX_RECOVERIES.
        self.undone_step, self.failure = -1, ""
        self._reporter, self._recovers = reporter, recovers
        self._rule, self._reason, self._num_recoveries = SpikeRule(), "", 0
        self._found_gradient = False
        self._suspicious_rows = list[str]()  # of the steps of the rule's streak

    @property
    def can_go_back(self) -> bool:
        """Whether there is a good state, and the recipe wants to return to it."""
        return self._recovers and self.last_good.step is not None

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Judge the step, and copy the weights that gave it where it is good. DivergedError where the first gradient is zero, or
        the step diverged and there is nothing to go back to.
        """
        step, norm = state.global_step + 1, self.grad_norm
        if norm == 0 and not self._found_gradient:
            hint = "Check that the rows hold answers to learn and that [lora] reaches the model."
            raise DivergedError(f"The gradient of step {step} is exactly zero: nothing would be learned.", hint)
        is_skipped = self.scaler is not None and not math.isfinite(norm)
        self._found_gradient = self._found_gradient or not is_skipped
        judge = self._rule.judge if self._recovers else not_finite
        self._reason = judge(self.loss, None if is_skipped else norm) or ""
        if self._reason and not self.can_go_back:
            raise DivergedError(f"Step {step} diverged: {self._reason}.", HINT)
        self._suspicious_rows += self.rows
        if self._reason or self._rule.streak:
            return
        self._suspicious_rows.clear()
        is_due = self.last_good.step is None or step > self.last_good.step + COPY_STEPS
        if self._recovers and is_due and self.undone_step != step - 1:  # just restored: these weights are the copy
            self.last_good.copy_from(optimizer, self.scaler, step - 1)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Undo the update that a diverged step has just made."""
        if self._reason:
            self.go_back(state.global_step + 1, self._reason, kwargs["optimizer"], kwargs["lr_scheduler"])
            self._reason = ""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Check the weights after the run's last update, which no later step does; save and end it after its last recovery."""
        if state.global_step >= state.max_steps:
            optimizer = kwargs["optimizer"]
            if not all(bool(weight.isfinite().all()) for weight in _parameters(optimizer)):
                if not self.can_go_back:
                    raise DivergedError(f"Step {state.global_step} diverged: the adapter is not finite.", HINT)
                self.go_back(state.global_step, "the adapter is not finite", optimizer, kwargs["lr_scheduler"])
        if self.failure:
            control.should_save = control.should_training_stop = True
        return control

    def go_back(self, step: int, reason: str, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Restore the last good state at a lower learning rate, and report it; after MAX_RECOVERIES, set `failure`."""
        good = self.last_good.step
        assert good is not None  # can_go_back
        self.last_good.restore(optimizer, self.scaler)
        if self._num_recoveries < MAX_RECOVERIES:
            self._num_recoveries += 1
            scale_learning_rate(optimizer, scheduler, LEARNING_RATE_FACTOR)
            factor = LEARNING_RATE_FACTOR**self._num_recoveries
        else:
            factor = None
            self.failure = f"The run diverged {MAX_RECOVERIES + 1} times, the last time in step {step}: {reason}."
        self._reporter.divergence(
            DivergenceRecord(
                step=step, reason=reason, good_step=good, rows=tuple(self._suspicious_rows), learning_rate_factor=factor
            )
        )
        self._rule.forget_streak()
        self._suspicious_rows.clear()
        self.undone_step = step

    def raise_failure(self, adapter: Path) -> None:
        """Raise DivergedError where the last recovery did not help; `adapter` is where its last good state was saved."""
        if self.failure:
            good = self.last_good.step
            kept = f"The adapter of step {good}, the last good one, is {adapter}." if good else "Nothing was learned."
            raise DivergedError(f"{self.failure} {kept}", HINT)

    def save(self, checkpoint: Path) -> None:
        """Write the copy, and what the rule has seen, into a checkpoint."""
        if self._recovers:
            state = {
                "num_recoveries": self._num_recoveries,
                "undone_step": self.undone_step,
                "suspicious_rows": self._suspicious_rows,
                "rule": asdict(self._rule),
            }
            copy = {name: getattr(self.last_good, name) for name in ("step", "weights", "states", "scaler")}
            torch.save({**state, "last_good": copy}, checkpoint / LAST_GOOD)

    def load(self, checkpoint: Path) -> None:
        """Read what `save` wrote; checkpoints of versions before this one have no such file."""
        if not self._recovers or not (checkpoint / LAST_GOOD).is_file():
            return
        state = torch.load(checkpoint / LAST_GOOD, map_location="cpu", weights_only=True)
        self._num_recoveries, self.undone_step = state["num_recoveries"], state["undone_step"]
        self._suspicious_rows = state["suspicious_rows"]
        self._rule, self.last_good = SpikeRule(**state["rule"]), LastGood(**state["last_good"])
        self._found_gradient = self._rule.largest_norm > 0


def scale_learning_rate(optimizer: torch.optim.Optimizer, scheduler: Any, factor: float) -> None:
    """Multiply the present learning rate and all later ones of the schedule, which a checkpoint then holds."""
    for group in optimizer.param_groups:
        for key in ("lr", "initial_lr"):
            if key in group:
                group[key] *= factor
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
