"""The screen of a run at the sizes of real terminals, with and without a GPU."""

import io
import os
import time

import pytest
from fake_nvml import FakeNVML, laptop, process
from rich.console import Console

from qlora_phi3.recipe.schema import Training
from qlora_phi3.reporter import DivergenceRecord, EvalRecord, RunOutline, StepRecord
from qlora_phi3.ui import live
from qlora_phi3.ui.console import ConsoleReporter, build_progress
from qlora_phi3.ui.live import RunProgress
from qlora_phi3.units import GIB

ON_GPU = RunOutline(
    total_steps=1200, epochs=3, evaluations=6, device="NVIDIA GeForce RTX 4070 Laptop GPU",
    plan="2,048 tokens at once, adamw_8bit", predicted_bytes=6 * GIB, budget_bytes=7 * GIB, step_seconds=2.0,
    evaluation_seconds=60.0,
)  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def open_screen(columns, lines, outline=ON_GPU, **options):
    console = Console(width=columns, height=lines, file=io.StringIO(), force_terminal=True, **{"color_system": None, **options})
    bars = build_progress(console, kind=RunProgress)
    bars.reporter = reporter = ConsoleReporter(console, console, Training(), bars)
    reporter.begin(outline)
    return bars, reporter


def shown(bars):
    """The lines below the scrolled ones."""
    with bars.console.capture() as captured:
        bars.console.print(bars.get_renderable())
    return captured.get().splitlines()


def run_400_steps(reporter, clock):
    reporter.evaluation(EvalRecord(step=0, eval_loss=2.5, eval_token_accuracy=0.5, supervised_tokens=9, seconds=60.0))
    for step in range(1, 401):
        clock[0] += 1
        reporter.step(
            StepRecord(
                step=step, epoch=step / 400, loss=3 - step / 200, token_accuracy=0.5, learning_rate=1.5e-4, grad_norm=0.523,
                rows=8, tokens=1000, supervised_tokens=500, step_seconds=1.0, tokens_per_second=1234.0, peak_memory_bytes=5 * GIB,
            )
        )  # fmt: skip


@pytest.mark.parametrize(("columns", "lines"), [(60, 15), (80, 24), (120, 40), (200, 50)])
def test_the_screen_fits_and_shows_every_figure(clock, columns, lines):
    bars, reporter = open_screen(columns, lines)
    run_400_steps(reporter, clock)
    screen = shown(bars)
    text = "\n".join(screen)
    assert len(screen) == 11
    assert max(map(len, screen)) <= columns
    for figure in (
        "RTX 4070 Laptop",
        "2,048 tokens",
        "400 of 1,200 steps",
        "2.9725 -> 1.0225  █",  # of steps 1 to 10 and 391 to 400, whose losses are 3 - step / 200
        "means of 10 steps",
        "2.5000",
        "1.50e-04",
        "0.523",
        "5.00 GiB",
    ):
        assert figure in text
    assert "measured" in text
    assert "7 min since step 0, about" in text
    assert "18 min left" in text  # 800 steps of 1 s, and 5 evaluations of 60 s
    if columns >= 80:
        assert "1,234 tokens/s" in text
        assert "plan 6.00 GiB, budget 7.00 GiB" in text


@pytest.mark.parametrize(("columns", "lines"), [(59, 40), (100, 14)])
def test_a_terminal_that_is_too_small_has_one_bar_and_the_screen_comes_back_with_its_size(clock, columns, lines):
    bars, _ = open_screen(columns, lines)
    assert len(shown(bars)) == 1
    bars.console.size = (80, 24)
    assert len(shown(bars)) == 11


def test_before_the_first_step_the_time_is_the_cost_models_and_a_cpu_says_nothing(clock):
    bars, _ = open_screen(80, 24)
    assert any("about 46 min left, estimated" in line for line in shown(bars))  # 1,200 x 2 s and 6 x 60 s
    bars, _ = open_screen(80, 24, RunOutline(total_steps=9, epochs=1, device="x86_64 CPU"))
    assert any("the time left is known after two steps" in line for line in shown(bars))


def test_what_is_done_now_and_the_last_events_are_named_without_moving_the_lines(clock):
    bars, reporter = open_screen(80, 24)
    reporter.progress("Measuring on held-out rows", 3, 40)
    reporter.divergence(
        DivergenceRecord(step=7, reason="[red]loss", good_step=5, rows=("a[b].jsonl:3",), learning_rate_factor=0.5)
    )
    screen = shown(bars)
    assert len(screen) == 11
    assert "Measuring on held-out rows  3/40" in screen[3]
    assert screen[-1].strip().split(maxsplit=1) == ["events", "step 7: diverged, back to step 5"]
    reporter.progress("Measuring on held-out rows", 40, 40)
    assert "Training" in shown(bars)[3]


@pytest.mark.parametrize(("broken", "figures"), [
    ((), ["  78 W  64 °C", "5.50 GiB now"]),
    (("nvmlDeviceGetPowerUsage",), ["GPU  64 °C", "5.50 GiB now"]),
    (("nvmlDeviceGetComputeRunningProcesses",), ["  78 W", "5.00 GiB of tensors"]),
    (("nvmlInit",), ["5.00 GiB of tensors"]),
])  # fmt: skip
def test_a_thread_of_its_own_reads_the_gpu_and_survives_its_driver(clock, monkeypatch, broken, figures):
    monkeypatch.setattr(live, "SENSOR_SECONDS", 0.05)
    bars, reporter = open_screen(100, 30)
    bars.nvml = FakeNVML(laptop(computing=[process(os.getpid(), int(5.5 * GIB))]), broken=broken)
    run_400_steps(reporter, clock)
    assert "°C" not in "\n".join(shown(bars))
    bars._reader.join()
    text = "\n".join(shown(bars))
    assert [figure in text for figure in figures] == [True] * len(figures)


def test_without_colour_no_line_has_any(clock, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    bars, reporter = open_screen(80, 24, color_system="256")
    run_400_steps(reporter, clock)
    assert "38;5" not in "\n".join(shown(bars))


def test_on_a_cpu_the_plan_is_named_as_one_of_tensors_beside_the_resident_memory():
    """No bar compares them: the process takes its libraries too."""
    fields = [name for name in StepRecord.__dataclass_fields__ if name != "kind"]
    record = StepRecord(**dict.fromkeys(fields, 0) | {"peak_memory_bytes": 2 * GIB})
    outline = RunOutline(total_steps=4, epochs=1, predicted_bytes=GIB)
    assert live._describe_memory(outline, record, None).plain == "2.00 GiB resident at most, plan 1.00 GiB of tensors"
    assert live._describe_memory(outline, None, None).plain == "not known yet"
