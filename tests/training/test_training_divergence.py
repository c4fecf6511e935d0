"""The rule that tells divergence from noise, and the copy of the last good state."""

import math
from types import SimpleNamespace

import bitsandbytes as bnb
import numpy
import pytest
import torch

from qlora_phi3.training.divergence import (
    COPY_STEPS,
    FIRST_STEPS,
    LAST_GOOD,
    MAX_RECOVERIES,
    STREAK_STEPS,
    DivergedError,
    DivergenceGuard,
    LastGood,
    SpikeRule,
    scale_learning_rate,
)

NAN, INFINITY = math.nan, math.inf


def judged(rule, losses, norms=1.0):
    """The verdicts on these losses."""
    norms = [norms] * len(losses) if isinstance(norms, float) else norms
    return [rule.judge(loss, norm) for loss, norm in zip(losses, norms, strict=True)]


def noisy_losses(random, kind, rows, steps=500):
    """Losses of batches of so many rows: a falling mean with noise, or learned rows with some that never are."""
    mean = 0.5 + 2 * numpy.exp(-numpy.arange(steps) / 150)[:, None]
    shape = (steps, rows)
    drawn = {
        "normal": lambda: mean + random.normal(0, 1, shape),
        "lognormal": lambda: mean * random.lognormal(-0.5, 1, shape),
        "exponential": lambda: mean * random.exponential(1, shape),
        "hard rows": lambda: numpy.where(random.random(shape) < 0.1, random.normal(8, 1.5, shape), 0.001),
    }[kind]()
    return numpy.clip(drawn.mean(1), 1e-6, None)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("kind", ["normal", "lognormal", "exponential", "hard rows"])
def test_noise_of_small_batches_is_no_divergence(kind, rows):
    random = numpy.random.default_rng(0)
    for _ in range(50):
        losses = noisy_losses(random, kind, rows)
        norms = losses * random.lognormal(1, 0.7, losses.shape)
        assert set(judged(SpikeRule(), losses.tolist(), norms.tolist())) == {None}


@pytest.mark.parametrize("loss", [NAN, INFINITY, -INFINITY])
def test_a_loss_that_is_not_finite_is_divergence_from_the_first_step_on(loss):
    assert f"{loss}" in SpikeRule().judge(loss, 1.0)


@pytest.mark.parametrize("norm", [NAN, INFINITY])
def test_a_gradient_that_is_not_finite_is_divergence_unless_the_scaler_skips_the_step(norm):
    assert f"{norm}" in SpikeRule().judge(1.0, norm)
    assert SpikeRule().judge(1.0, None) is None


def test_a_loss_that_stays_high_is_divergence_at_the_fifth_step():
    rule = SpikeRule()
    assert set(judged(rule, [2.0] * FIRST_STEPS)) == {None}
    *first, last = judged(rule, [3.1] * STREAK_STEPS)
    assert set(first) == {None}
    assert "above 3.00, now 3.10" in last


def test_a_loss_that_rises_slowly_is_divergence_as_well():
    losses = [2.0] * 40 + [2.0 + 0.1 * number for number in range(60)]
    assert any(judged(SpikeRule(), losses))


@pytest.mark.parametrize("losses", [[9.0] * 4 + [2.0], [2.9] * 50, [9.0, 2.0] * 20])
def test_high_losses_that_pass_or_stay_within_a_nat_are_none(losses):
    assert set(judged(SpikeRule(), [2.0] * FIRST_STEPS + losses)) == {None}


def test_the_first_steps_set_the_measure_and_are_not_judged():
    losses = [1.0, *[9.0] * (FIRST_STEPS - 1)]
    assert set(judged(SpikeRule(), losses, [1e-3, *[1e9] * (FIRST_STEPS - 1)])) == {None}


@pytest.mark.parametrize(("usual", "norm", "diverged"), [(5.0, 5001.0, True), (5.0, 4999.0, False), (1e-6, 999.0, False)])
def test_a_norm_a_thousand_times_the_largest_is_divergence(usual, norm, diverged):
    rule = SpikeRule()
    judged(rule, [1.0] * FIRST_STEPS, usual)
    assert bool(rule.judge(1.0, norm)) == diverged


def test_steps_that_were_undone_are_no_measure():
    rule = SpikeRule()
    judged(rule, [2.0] * FIRST_STEPS)
    for _ in range(5):
        assert judged(rule, [5.0] * STREAK_STEPS)[-1]
        rule.forget_streak()
    assert (rule.num_good, rule.recent, rule.streak) == (FIRST_STEPS, [], 0)


def optimizers(weights):
    return {
        "adamw_torch": lambda: torch.optim.AdamW(weights),
        "adamw_8bit": lambda: bnb.optim.AdamW8bit(weights, min_8bit_size=16),
        "adamw_32bit": lambda: bnb.optim.AdamW32bit(weights),
    }


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "adamw_32bit"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_after_going_back_training_repeats_bit_for_bit(name, steps_before):
    def trained(gradients):
        for value in gradients:
            for weight in weights:
                weight.grad = torch.full_like(weight, value)
            optimizer.step()
        return [weight.detach().clone() for weight in weights]

    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 64), (3,))]
    optimizer, good = optimizers(weights)[name](), LastGood()
    good.copy_from(optimizer, None, 0)  # of other shapes: there is no state yet
    trained([0.1, 0.2][:steps_before])
    good.copy_from(optimizer, None, steps_before)
    pointers = [tensor.data_ptr() for tensor in good.weights]
    expected = trained([0.3, 0.4])
    trained([NAN])
    good.restore(optimizer, None)
    for now, then in zip(trained([0.3, 0.4]), expected, strict=True):
        assert torch.equal(now, then)
    good.copy_from(optimizer, None, 9)
    assert [tensor.data_ptr() for tensor in good.weights] == pointers


@pytest.mark.parametrize("schedule", ["lambda", "plateau"])
def test_a_lowered_learning_rate_is_that_of_all_later_steps_and_of_the_checkpoint(schedule):
    def build():
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        if schedule == "plateau":
            return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    optimizer, scheduler = build()
    scale_learning_rate(optimizer, scheduler, 0.5)
    assert scheduler.get_last_lr() == [0.5]
    resumed, resumed_scheduler = build()
    resumed.load_state_dict(optimizer.state_dict())
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    for one, its_scheduler in ((optimizer, scheduler), (resumed, resumed_scheduler)):
        one.step()
        its_scheduler.step(*([1.0] if schedule == "plateau" else []))
        assert one.param_groups[0]["lr"] == (0.5 if schedule == "plateau" else 0.25)


class Loop:
    """A guard called as the Trainer calls it, on one weight that each good step raises by 1."""

    def __init__(self, scaler=None):
        self.records, self.weight = [], torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        self.guard = DivergenceGuard(SimpleNamespace(divergence=self.records.append), recovers=True)
        self.guard.scaler = scaler

    def run(self, losses, first=1, norm=1.0):
        """Steps with these losses; NaN ruins the weight."""
        controls = []
        for step, loss in enumerate(losses, start=first):
            self.guard.loss, self.guard.grad_norm, self.guard.rows = loss, norm, [f"chats.jsonl:{step}"]
            around = {"optimizer": self.optimizer, "lr_scheduler": self.scheduler}
            state, control = (
                SimpleNamespace(global_step=step - 1, max_steps=99),
                SimpleNamespace(should_training_stop=False),
            )
            self.guard.on_pre_optimizer_step(None, state, control, **around)
            self.weight.data += loss if math.isnan(loss) else 1
            self.guard.on_optimizer_step(None, state, control, **around)
            self.guard.on_step_end(None, state, control, **around)
            controls.append(control.should_training_stop)
        return controls


def test_a_diverged_step_goes_back_to_weights_that_gave_a_good_step_and_skips_its_rows():
    loop = Loop()
    loop.run([1.0] * 9 + [NAN])
    (record,) = loop.records
    assert (record.step, record.good_step, record.rows) == (10, COPY_STEPS, ("chats.jsonl:10",))
    assert loop.weight.item() == record.good_step
    assert loop.optimizer.param_groups[0]["lr"] == record.learning_rate_factor == 0.5
    loop.run([1.0], first=11)
    assert loop.weight.item() == record.good_step + 1


def test_a_streak_goes_back_before_its_first_step_and_skips_the_rows_of_all():
    loop = Loop()
    loop.run([1.0] * 30 + [5.0] * STREAK_STEPS)
    (record,) = loop.records
    assert record.step == 30 + STREAK_STEPS
    assert record.good_step < 30
    assert record.rows == tuple(f"chats.jsonl:{step}" for step in range(31, 31 + STREAK_STEPS))


def test_after_the_last_recovery_the_run_ends_with_the_good_weights():
    loop = Loop()
    assert loop.run([1.0, *[NAN] * MAX_RECOVERIES]) == [False] * (MAX_RECOVERIES + 1)
    assert loop.run([NAN], first=MAX_RECOVERIES + 2) == [True]
    assert loop.records[-1].learning_rate_factor is None
    assert loop.weight.item() == 0
    assert f"{MAX_RECOVERIES + 1} times" in loop.guard.failure


def test_a_guard_that_was_saved_goes_on_as_one_that_was_not(tmp_path):
    losses = [1.0] * 25 + [NAN] + [5.0] * 3
    whole, first, second = Loop(), Loop(), Loop()
    whole.run([*losses, 5.0, 5.0])
    first.run(losses)
    first.guard.save(tmp_path)
    second.guard.load(tmp_path)
    second.weight.data.copy_(first.weight.data)
    second.records += first.records
    second.run([5.0, 5.0], first=len(losses) + 1)
    assert second.records == whole.records
    assert len(whole.records) == 2
    assert torch.equal(second.weight, whole.weight)
    (tmp_path / LAST_GOOD).unlink()
    second.guard.load(tmp_path)  # a checkpoint of a version before


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")])
def test_a_first_gradient_of_exactly_zero_stops_the_run_in_fp16_too(scaler):
    with pytest.raises(DivergedError, match="step 1"):
        Loop(scaler).run([1.0], norm=0.0)
    loop = Loop(scaler)
    loop.run([1.0])
    loop.run([1.0], first=2, norm=0.0)  # a later batch may be learned already


def test_a_gradient_that_the_scaler_skips_is_no_divergence_and_proves_nothing():
    loop = Loop(torch.amp.GradScaler("cpu"))
    loop.run([1.0], norm=INFINITY)
    assert loop.records == []
    with pytest.raises(DivergedError, match="step 2"):
        loop.run([1.0], first=2, norm=0.0)
    with pytest.raises(DivergedError, match="Step 1 diverged: the gradient norm is inf"):
        Loop().run([1.0], norm=INFINITY)


def test_going_back_restores_the_scale_of_fp16():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    loop = Loop(scaler)
    loop.run([1.0])
    scaler.update(2.0)
    loop.run([NAN], first=2)
    assert scaler.get_scale() == 1024.0
