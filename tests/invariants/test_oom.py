"""Memory that runs out in a step must not change what the step teaches (fp32, CPU).

The sweep over every operator call of a step is thinned out here; `EVERY=1` in the environment runs it completely, in an hour.
"""

import gc
import os
import random
from types import SimpleNamespace

import pytest
import torch
from out_of_memory import RunOutAt, SmallGpu
from tiny_model import load_tiny, random_rows, relative_difference, save_tiny_model

from qlora_phi3.errors import RunError
from qlora_phi3.execution import ExecutionPlan, MicroBatchPlan
from qlora_phi3.model.phi3 import set_checkpointing
from qlora_phi3.recipe.schema import Lora
from qlora_phi3.step import evaluate, forward_backward
from qlora_phi3.training.oom import MemoryGuard

STRIDE = int(os.environ.get("EVERY", "199"))
LENGTHS = [30, 25, 20, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def lay_out(packing, max_tokens=64):
    plan = MicroBatchPlan(max_tokens=max_tokens, max_rows=2, packing=packing, longrope_boundary=None)
    return ExecutionPlan(micro_batch=plan, evaluation=plan, checkpoint_every=0, activation_offloading=False, optim="adamw_torch")


@pytest.fixture(scope="module", autouse=True)
def _few_things_to_collect():
    """Each retry collects garbage; what the libraries hold need not be walked every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Trial:
    """A model that can be trained from the same beginning again and again."""

    def __init__(self, model):
        self.model = model
        self.trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.first = {name: weight.detach().clone() for name, weight in self.trained.items()}

    def train(self, execution, *modes, scaler=None):
        """The guard and its records, after an AdamW step for each mode, under which forward and backward stand."""
        torch.manual_seed(7)
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(self.first[name])
        self.model.train()
        self.model.zero_grad()
        optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-2)
        records = []
        guard = MemoryGuard(
            self.model,
            execution=execution,
            device=torch.device("cpu"),
            reporter=SimpleNamespace(oom=records.append),
            sources=("chats.jsonl",),
            apply=lambda execution: None,
        )

        def backward(loss):
            (scaler.scale(loss) if scaler else loss).backward()

        for step, mode in enumerate(modes, start=1):

            def run_pass(batch, mode=mode):
                with mode:
                    return forward_backward(self.model, batch, compute_dtype=torch.float32, backward=backward)

            rows = [dict(row, source=0, source_row=step) for row in random_rows(LENGTHS, seed=step)]
            guard.compute(rows, run_pass, phase="training", step=step)
            optimizer.step()
            optimizer.zero_grad()
        return guard, records

    def weights(self):
        return {name: weight.detach().clone() for name, weight in self.trained.items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def trials(folder):
    """Trials by (four_bit, dropout), made once."""
    made = {}

    def find(*, four_bit=True, dropout=0.0, checkpointing=False):
        key = (four_bit, dropout)
        if key not in made:
            made[key] = Trial(load_tiny(folder, four_bit=four_bit, lora=Lora(r=8, lora_dropout=dropout)))
        set_checkpointing(made[key].model, int(checkpointing))
        return made[key]

    return find


def count_calls(trial, execution):
    mode = RunOutAt()
    trial.train(execution, mode)
    return mode.calls


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_memory_that_runs_out_anywhere_in_a_step_leaves_the_weights_as_they_would_be(trials, four_bit, packing, checkpointing):
    trial, execution = trials(four_bit=four_bit, checkpointing=checkpointing), lay_out(packing)
    count_calls(trial, execution)  # what is made only once in a process is made
    calls = count_calls(trial, execution)
    expected = trial.weights()
    worst = 0.0
    for call in {*range(0, calls, STRIDE), calls - 1}:
        trial.train(execution, RunOutAt({call}))
        assert same(expected, trial.weights()), call
        guard, records = trial.train(execution, RunOutAt({call, call + 1}))
        assert [record.remedy for record in records] == ["again", "split"]
        assert guard.plans["training"].max_tokens < execution.micro_batch.max_tokens
        worst = max(worst, relative_difference(expected, trial.weights()))
    print(f"{four_bit=} {packing=} {checkpointing=}: {calls} calls, stride {STRIDE}, largest difference {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_memory_that_runs_out_at_random_through_a_run_leaves_the_weights_as_they_would_be(trials, packing, seed):
    trial, execution, draw = trials(checkpointing=True), lay_out(packing), random.Random(seed)
    calls = count_calls(trial, execution)
    at = [{draw.randrange(calls)} if draw.random() < 0.7 else set() for _ in range(12)]
    trial.train(execution, *(RunOutAt() for _ in at))
    expected = trial.weights()
    guard, records = trial.train(execution, *map(RunOutAt, at))
    assert guard.num_recovered == len(records) == sum(map(len, at)) > 3
    assert {record.remedy for record in records} >= {"again", "split"}
    assert relative_difference(expected, trial.weights()) < 1e-5


@pytest.mark.parametrize("checkpointing", [True, False])
def test_with_dropout_a_step_done_again_unsplit_is_equal_to_the_bit(trials, checkpointing):
    trial, execution = trials(dropout=0.2, checkpointing=checkpointing), lay_out(True)
    count_calls(trial, execution)
    calls = count_calls(trial, execution)
    expected, rng_state = trial.weights(), torch.get_rng_state()
    for call in range(5, calls, max(1, STRIDE // 2)):
        _, records = trial.train(execution, RunOutAt({call}))
        assert [record.remedy for record in records] == ["again"]
        assert same(expected, trial.weights()), call
        assert torch.equal(rng_state, torch.get_rng_state())
    trial.train(execution, RunOutAt({calls // 2, calls // 2 + 1}))
    assert not same(expected, trial.weights())  # other pieces, other masks: as documented


def test_the_scale_of_fp16_gradients_is_the_same_after_a_step_done_again(trials):
    trial, execution = trials(), lay_out(True)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**12) for _ in range(2)]
    for scaler in scalers:
        scaler.scale(torch.zeros(()))
    trial.train(execution, RunOutAt(), scaler=scalers[0])
    expected = trial.weights()
    trial.train(execution, RunOutAt({900}), scaler=scalers[1])
    assert same(expected, trial.weights())
    assert scalers[0].state_dict() == scalers[1].state_dict()


def live_tensors():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_twenty_retries_leave_no_tensor_and_no_storage_behind(trials, checkpointing):
    trial, execution = trials(checkpointing=checkpointing), lay_out(True)
    gpu = SmallGpu()

    def train(at):
        with gpu:
            trial.train(execution, RunOutAt(at))

    train(())
    train({700, 701})
    alive = gpu.used, live_tensors()
    for call in range(0, 1300, 130):
        train({call, call + 1})
    assert (gpu.used, live_tensors()) == alive


def test_on_a_gpu_too_small_for_the_plan_the_plan_shrinks_until_it_fits_and_the_weights_are_the_same(trials):
    trial, execution = trials(), lay_out(False, max_tokens=60)
    large = SmallGpu()
    trial.train(execution, large, large, large)
    expected = trial.weights()
    gpu = SmallGpu(int(large.peak * 0.8))
    guard, records = trial.train(execution, gpu, gpu, gpu)
    assert [(record.step, record.remedy) for record in records] == [(1, "again"), (1, "split")]
    assert guard.plans["training"].max_tokens == 30
    assert relative_difference(expected, trial.weights()) < 1e-5


def test_a_row_that_does_not_fit_alone_is_named_after_everything_was_tried(trials):
    trial, execution = trials(), lay_out(False)
    large = SmallGpu()
    trial.train(execution, large)
    with pytest.raises(RunError, match=r"chats.jsonl:1 .* max_length than 30\."):
        trial.train(execution, SmallGpu(int(large.peak * 0.1)))
    assert same(trial.first, trial.weights())
    assert all(weight.grad is None for weight in trial.trained.values())


@pytest.mark.parametrize("packing", [True, False])
def test_an_evaluation_that_ran_out_of_memory_counts_every_token_once(trials, packing):
    trial, execution = trials(), lay_out(packing)
    rows = random_rows(LENGTHS)

    def remedy(at):
        records = []
        mode = RunOutAt(at)
        guard = MemoryGuard(
            trial.model,
            execution=execution,
            device=torch.device("cpu"),
            reporter=SimpleNamespace(oom=records.append),
            sources=(),
            apply=lambda execution: None,
        )

        def run_pass(batch):
            with mode:
                [(_, result)] = evaluate(trial.model, [batch], compute_dtype=torch.float32)
            return result

        batch, result = guard.compute(rows, run_pass, phase="evaluation", step=3)
        return float(result.loss), int(result.metrics["num_correct"]), batch.num_supervised, [r.remedy for r in records]

    loss, *counts, _ = remedy(())
    for call in range(0, 200, 40):
        again, *other_counts, measures = remedy({call, call + 1})
        assert measures == ["again", "split"]
        assert again == pytest.approx(loss, rel=1e-6)
        assert other_counts == counts
