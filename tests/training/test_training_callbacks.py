"""The time since the last checkpoint, signals, the cap where the driver spills, and the watch on the time of a step."""

import platform
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from qlora_phi3.training import callbacks
from qlora_phi3.training.callbacks import (
    SaveByTime,
    SpillWatch,
    StopOnRequest,
    cap_to_free_memory,
    driver_spills,
    stop_on_interrupt,
)

GIB = 2**30


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


def test_a_step_many_times_slower_gives_one_warning():
    watch = SpillWatch()
    assert [watch.observe(1000, 1.0) for _ in range(10)] == [None] * 10
    assert watch.observe(1000, 4.9) is None
    line = watch.observe(1000, 12.0)
    assert "12 times" in line
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


def test_a_checkpoint_is_due_so_many_minutes_after_the_last_one():
    now = [0.0]
    callback = SaveByTime(10, clock=lambda: now[0])

    def saves_at(minutes):
        now[0] = minutes * 60
        control = SimpleNamespace(should_save=False)
        callback.on_step_end(None, None, control)
        if control.should_save:
            callback.on_save(None, None, control)
        return control.should_save

    now[0] = 300.0
    callback.on_train_begin(None, None, None)  # what came before the first step does not count
    assert [minute for minute in range(6, 45) if saves_at(minute)] == [15, 25, 35]
    callback.on_save(None, None, None)  # a checkpoint of save_steps counts as well
    assert [minute for minute in range(45, 60) if saves_at(minute)] == [54]


def test_without_minutes_no_time_saves():
    callback, control = SaveByTime(0, clock=lambda: 1e9), SimpleNamespace(should_save=False)
    callback.on_step_end(None, None, control)
    assert not control.should_save


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_requests_a_stop_and_the_next_one_stops_at_once(name):
    stop, lines = StopOnRequest(), []
    with stop_on_interrupt(SimpleNamespace(warning=lines.append), stop):
        signal.raise_signal(signal.Signals[name])
        assert stop.requested
        signal.raise_signal(signal.SIGHUP)  # a terminal that closes sends several
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert len(lines) == 1
    assert lines[0].startswith("Ctrl-C" if name == "SIGINT" else name)


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before, stop = signal.signal(signal.SIGHUP, signal.SIG_IGN), StopOnRequest()
    try:
        with stop_on_interrupt(SimpleNamespace(warning=print), stop):
            signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)
