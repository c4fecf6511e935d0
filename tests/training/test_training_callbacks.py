"""Losses and gradients that are not finite, the cap where the driver spills, and the watch on the time of a step."""

import platform
import sys
from types import SimpleNamespace

import pytest
import torch

from qlora_phi3.training import callbacks
from qlora_phi3.training.callbacks import (
    DivergedError,
    GradientGuard,
    SpillWatch,
    cap_to_free_memory,
    check_loss,
    driver_spills,
)

GIB = 2**30


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(loss):
    with pytest.raises(DivergedError, match=f"step 7 is {loss}"):
        check_loss(loss, 7)


def check_gradient(guard, gradient, step=1):
    """Call the guard as the Trainer does, before the update of a step; the gradient is unscaled."""
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.full_like(layer.weight, gradient)
    guard.on_pre_optimizer_step(None, SimpleNamespace(global_step=step - 1), None, model=layer)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_first_gradient_of_exactly_zero_stops_the_run_in_fp16_too(scaled):
    with pytest.raises(DivergedError, match="step 1"):
        check_gradient(GradientGuard(scaled=scaled), 0.0)
    guard = GradientGuard(scaled=scaled)
    check_gradient(guard, 1.0)
    check_gradient(guard, 0.0, step=2)  # a later batch may be learned already


@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run_unless_the_scaler_skips_the_step(gradient):
    with pytest.raises(DivergedError, match=f"step 1 is {gradient}"):
        check_gradient(GradientGuard(scaled=False), gradient)
    guard = GradientGuard(scaled=True)
    check_gradient(guard, gradient)
    with pytest.raises(DivergedError, match="step 2"):  # a skipped step proves nothing
        check_gradient(guard, 0.0, step=2)


def test_the_guard_sees_unscaled_gradients_of_a_real_scaler_before_it_skips_a_step():
    layer = torch.nn.Linear(2, 1, bias=False)
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    guard, before = GradientGuard(scaled=True), layer.weight.detach().clone()
    for step, inputs in enumerate((torch.full((1, 2), float("inf")), torch.zeros(1, 2)), start=1):
        scaler.scale(layer(inputs).sum()).backward()
        scaler.unscale_(optimizer)
        if step == 1:
            guard.on_pre_optimizer_step(None, SimpleNamespace(global_step=0), None, model=layer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert torch.equal(layer.weight, before)
            assert scaler.get_scale() == 2.0**9
        else:
            with pytest.raises(DivergedError):
                guard.on_pre_optimizer_step(None, SimpleNamespace(global_step=1), None, model=layer)


@pytest.mark.parametrize(
    ("system", "release", "spills"),
    [
        ("win32", "11", True),
        ("linux", "6.6.87.2-microsoft-standard-WSL2", True),
        ("linux", "6.8.0-45-generic", False),
        ("darwin", "24.1.0", False),
    ],
)
def test_the_driver_spills_on_windows_and_under_wsl(monkeypatch, system, release, spills):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert driver_spills() == spills


def fake_gpu(monkeypatch, *, spills, free, total, reserved):
    fractions = []
    monkeypatch.setattr(callbacks, "driver_spills", lambda: spills)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: fractions.append(part))
    return fractions


def test_a_run_may_allocate_what_is_free_and_what_it_has_already(monkeypatch):
    fractions = fake_gpu(monkeypatch, spills=True, free=6 * GIB, total=8 * GIB, reserved=GIB)
    assert cap_to_free_memory(torch.device("cuda", 0)) == 7 * GIB - 128 * 2**20
    assert fractions == [pytest.approx((7 - 0.125) / 8)]


@pytest.mark.parametrize(("spills", "device"), [(False, "cuda"), (True, "cpu")])
def test_where_nothing_spills_nothing_is_capped(monkeypatch, spills, device):
    fractions = fake_gpu(monkeypatch, spills=spills, free=6 * GIB, total=8 * GIB, reserved=0)
    assert cap_to_free_memory(torch.device(device)) is None
    assert fractions == []


@pytest.mark.parametrize(("spills", "cause"), [(True, "the driver"), (False, "another program")])
def test_a_step_many_times_slower_gives_one_warning_with_its_probable_cause(monkeypatch, spills, cause):
    monkeypatch.setattr(callbacks, "driver_spills", lambda: spills)
    watch = SpillWatch()
    assert [watch.observe(1000, 1.0) for _ in range(10)] == [None] * 10
    assert watch.observe(1000, 4.9) is None
    line = watch.observe(1000, 12.0)
    assert "12 times" in line
    assert f": {cause}" in line
    assert watch.observe(1000, 50.0) is None


@pytest.mark.parametrize(("tokens", "seconds"), [(20_000, 20.0), (50, 0.5), (1000, 1.5)])
def test_a_long_batch_or_a_short_one_is_not_suspicious(tokens, seconds):
    watch = SpillWatch()
    for _ in range(20):
        watch.observe(1000, 1.0)
    assert watch.observe(tokens, seconds) is None


def test_the_first_steps_are_no_measure():
    watch = SpillWatch()
    assert [watch.observe(1000, seconds) for seconds in (9.0, 1.0, 1.0, 1.0, 99.0)] == [None] * 5
