"""How long a run still takes: by the cost model before its first step, as measured after its third, and between them by both."""

import time
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

    def __init__(self, outline: RunOutline, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._total_steps = clock, outline.schedule.total_steps
        self._model_seconds, self._evaluation_seconds = outline.step_seconds, outline.evaluation_seconds or 0.0
        self._evaluations_left = outline.schedule.count_evaluations(outline.first_step) + outline.evaluates_first
        self._step = self._first_step = outline.first_step
        self._began = self._last = clock()
        self._first_seconds: float | None = None
        self._seconds: deque[float] = deque(maxlen=MEAN_STEPS)
        self._evaluated_share = 0.0

    @property
    def is_measured(self) -> bool:
        """Whether the cost model has no part in the estimate any more."""
        return self._step - self._first_step >= BLENDED_STEPS

    def step(self, record: StepRecord) -> None:
        """A step is done; steps that diverged in between have no record."""
        seconds, count = self._clock() - self._last, max(1, record.step - self._step)
        if self._first_seconds is None:
            self._first_seconds = record.step_seconds
        else:
            self._seconds.append(seconds / count)
        self._step, self._last = record.step, self._clock()

    def evaluating(self, share: float) -> None:
        """So much of an evaluation is done, from 0 to 1."""
        self._evaluated_share = share

    def evaluation(self, record: EvalRecord) -> None:
        """An evaluation is done."""
        self._evaluations_left = max(0, self._evaluations_left - 1)
        self._evaluation_seconds, self._evaluated_share = record.seconds, 0.0
        self._last = min(self._clock(), self._last + record.seconds)

    def step_seconds(self) -> float | None:
        """The time of a step; None where nothing tells."""
        measured = sum(self._seconds) / len(self._seconds) if self._seconds else self._first_seconds
        if self._model_seconds is None:
            return measured if self._seconds else None
        if measured is None:
            return self._model_seconds
        weight = min(1.0, (len(self._seconds) + 1) / BLENDED_STEPS)
        return weight * measured + (1 - weight) * self._model_seconds

    def left(self) -> float | None:
        """Seconds that the run still needs; None where nothing tells."""
        seconds, steps = self.step_seconds(), max(0, self._total_steps - self._step)
        if seconds is None:
            return None
        begun = min(self._clock() - self._last, seconds) if steps and not self._evaluated_share else 0.0
        evaluations = max(0.0, self._evaluations_left - self._evaluated_share)
        return steps * seconds - begun + evaluations * self._evaluation_seconds

    def passed(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._began
