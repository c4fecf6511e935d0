"""The cap on systems whose driver spills, and the watch on the time of a step."""

import platform
import sys

import pytest
import torch

from qlora_phi3.training import callbacks as spill
from qlora_phi3.training.callbacks import SpillWatch, cap_to_free_memory, driver_spills

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


def fake_card(monkeypatch, *, spills, free, total, reserved):
    fractions = []
    monkeypatch.setattr(spill, "driver_spills", lambda: spills)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: fractions.append(part))
    return fractions


def test_a_run_may_take_what_is_free_and_what_it_holds_already(monkeypatch):
    fractions = fake_card(monkeypatch, spills=True, free=6 * GIB, total=8 * GIB, reserved=GIB)
    assert cap_to_free_memory(torch.device("cuda", 0)) == 7 * GIB - 128 * 2**20
    assert fractions == [pytest.approx((7 - 0.125) / 8)]


@pytest.mark.parametrize(("spills", "device"), [(False, "cuda"), (True, "cpu")])
def test_where_nothing_spills_nothing_is_capped(monkeypatch, spills, device):
    fractions = fake_card(monkeypatch, spills=spills, free=6 * GIB, total=8 * GIB, reserved=0)
    assert cap_to_free_memory(torch.device(device)) is None
    assert fractions == []


def test_a_step_many_times_slower_is_told_once(monkeypatch):
    monkeypatch.setattr(spill, "driver_spills", lambda: True)
    watch = SpillWatch()
    assert [watch.look(1000, 1.0) for _ in range(10)] == [None] * 10
    assert watch.look(1000, 4.9) is None
    assert watch.look(1000, 12.0) == (
        "This step took 12 times as long as those before it: the driver has probably moved memory of the card into the "
        "computer's, because another program took it. Close what else uses the card."
    )
    assert watch.look(1000, 50.0) is None


def test_elsewhere_a_slow_step_has_another_cause(monkeypatch):
    monkeypatch.setattr(spill, "driver_spills", lambda: False)
    watch = SpillWatch()
    assert [watch.look(1000, 1.0) for _ in range(5)] == [None] * 5
    assert "another program is probably computing on the card" in watch.look(1000, 8.0)


@pytest.mark.parametrize(("tokens", "seconds"), [(20_000, 20.0), (50, 0.5), (1000, 1.5)])
def test_a_long_batch_or_a_short_one_is_not_suspicious(tokens, seconds):
    watch = SpillWatch()
    for _ in range(20):
        watch.look(1000, 1.0)
    assert watch.look(tokens, seconds) is None


def test_the_first_steps_are_no_measure():
    watch = SpillWatch()
    assert [watch.look(1000, seconds) for seconds in (9.0, 1.0, 1.0, 1.0, 99.0)] == [None] * 5
