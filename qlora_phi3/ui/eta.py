"""How long a run still takes: by the cost model before its first step, as measured after its third, and between them by both."""

from collections import deque
from collections.abc import Callable

from qlora_phi3.reporter import EvalRecord, RunOutline, StepRecord

#: Steps after which the measured time replaces that of the cost model.
BLENDED_STEPS = 3
#: The latest steps, whose mean time counts: enough for rows of many lengths, few enough to follow a GPU that becomes slower.
MEAN_STEPS = 200


class EtaEstimator:
    """Estimates the seconds that a run needs from `begin` on, with its evaluations and checkpoints.

    A step lasts from the end of the step before it, so that data and checkpoints count; evaluations between them do not, and
    count as long as the last one took. The first step of a session, which starts kernels and fills caches, counts only until
    there is a second one.

    Args:
        clock: seconds, from any start.
    """

    def __init__(self, outline: RunOutline, clock: Callable[[], float]) -> None:
        self.outline, self._clock, self._step = outline, clock, outline.first_step
        self.num_measured = 0  #: Steps.
        self._evaluations_left, self._evaluation_seconds = outline.evaluations, outline.evaluation_seconds
        self.evaluated_share = 0.0  #: Of the evaluation that runs, from 0 to 1.
        self._seconds: deque[float] = deque(maxlen=MEAN_STEPS)
        self._began = self._last = clock()

    def step(self, record: StepRecord) -> None:
        """A step is done; those that diverged before it have no record."""
        seconds = (self._clock() - self._last) / max(1, record.step - self._step)
        if self.num_measured == 1:
            self._seconds.clear()
        self._seconds.append(seconds if self.num_measured else record.step_seconds)
        self.num_measured += 1
        self._step, self._last = record.step, self._clock()

    def evaluation(self, record: EvalRecord) -> None:
        """An evaluation is done."""
        self._evaluations_left = max(0, self._evaluations_left - 1)
        self._evaluation_seconds, self.evaluated_share = record.seconds, 0.0
        self._last += record.seconds  # they are no part of the next step

    def left(self) -> float | None:
        """Seconds that the run still needs; None where nothing tells."""
        modelled, steps = self.outline.step_seconds, max(0, self.outline.total_steps - self._step)
        if modelled is None and self.num_measured < 2:
            return None
        weight = 1.0 if modelled is None else min(1.0, self.num_measured / BLENDED_STEPS)
        measured = sum(self._seconds) / max(1, len(self._seconds))
        seconds = weight * measured + (1 - weight) * (modelled or 0.0)
        begun = min(self._clock() - self._last, seconds) if steps and not self.evaluated_share else 0.0
        evaluations = max(0.0, self._evaluations_left - self.evaluated_share)
        return steps * seconds - begun + evaluations * self._evaluation_seconds

    def passed(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._began
