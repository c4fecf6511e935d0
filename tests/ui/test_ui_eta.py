"""The time that a run has left, by hand, with a clock that stands still between steps."""

import time
from types import SimpleNamespace

import pytest

from qlora_phi3.reporter import EvalRecord, RunOutline
from qlora_phi3.ui.console import EtaEstimator


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def begin(**outline):
    return EtaEstimator(RunOutline(**{"total_steps": 10, "epochs": 1, **outline}))


def step(eta, clock, number, seconds, pause=0.0):
    clock[0] += pause + seconds
    eta.step(SimpleNamespace(step=number, step_seconds=seconds))


def evaluate(eta, clock, seconds):
    clock[0] += seconds
    eta.evaluation(EvalRecord(step=0, eval_loss=1.0, eval_token_accuracy=0.5, supervised_tokens=1, seconds=seconds))


def test_before_the_first_step_the_cost_model_tells_the_time_of_steps_and_evaluations(clock):
    # evaluations before the first step and after steps 2, 4, 6, 8 and 10
    eta = begin(step_seconds=30.0, evaluations=6, evaluation_seconds=20.0)
    assert eta.left() == 10 * 30 + 6 * 20


def test_without_a_cost_model_nothing_is_told_until_two_steps_are_measured(clock):
    eta = begin(evaluations=6)
    evaluate(eta, clock, 5.0)
    assert eta.left() is None
    step(eta, clock, 1, 9.0)
    assert eta.left() is None
    step(eta, clock, 2, 4.0)
    assert eta.left() == 8 * 4 + 5 * 5  # the first step, which was slow, does not count


def test_in_the_first_three_steps_the_measured_time_replaces_the_model_by_thirds(clock):
    eta = begin(step_seconds=30.0)
    left = []
    for number in (1, 2, 3):
        step(eta, clock, number, 12.0)
        left.append(eta.left())
    assert left == pytest.approx([9 * (12 + 2 * 30) / 3, 8 * (2 * 12 + 30) / 3, 7 * 12])


def test_an_evaluation_counts_as_long_as_the_last_one_took_and_not_as_part_of_a_step(clock):
    eta = begin(step_seconds=30.0, evaluations=6, evaluation_seconds=1.0)
    evaluate(eta, clock, 50.0)
    for number in (1, 2):
        step(eta, clock, number, 10.0)
    evaluate(eta, clock, 40.0)
    for number in (3, 4):
        step(eta, clock, number, 10.0)
    assert eta.left() == 6 * 10 + 4 * 40
    eta.evaluated_share = 0.25
    assert eta.left() == 6 * 10 + 3.75 * 40


def test_checkpoints_and_data_between_the_steps_count(clock):
    eta = begin()
    for number in range(1, 6):
        step(eta, clock, number, 10.0, pause=20.0 if number == 3 else 0.0)
    assert eta.left() == 5 * (10 + 30 + 10 + 10) / 4


def test_the_time_left_falls_within_a_step_but_not_below_the_steps_after_it(clock):
    eta = begin()
    for number in (1, 2, 3):
        step(eta, clock, number, 10.0)
    clock[0] += 4
    assert eta.left() == 66
    clock[0] += 100
    assert eta.left() == 60


def test_a_diverged_step_without_a_record_is_not_measured_as_one_step_of_twice_the_time(clock):
    eta = begin()
    for number in (1, 2):
        step(eta, clock, number, 10.0)
    step(eta, clock, 4, 20.0)
    assert eta.left() == 6 * 10


def test_a_resumed_run_has_its_remaining_steps_and_the_evaluation_time_of_the_session_before(clock):
    eta = begin(first_step=6, evaluations=2, evaluation_seconds=7.0)
    for number in (7, 8):
        step(eta, clock, number, 3.0)
    assert eta.left() == 2 * 3 + 2 * 7
