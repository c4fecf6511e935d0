"""The progress line at the widths of real terminals, and what is said at the end."""

import io
import re
import time

import pytest
from rich.console import Console

from qlora_phi3.reporter import StepRecord
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.ui.console import ConsoleReporter, LogInterval, draw_curve, mean_ends, open_bars

EVERY_STEP = LogInterval("steps", 1)


def record(step, loss=2.7345, tokens_per_second=1234.0):
    return StepRecord(
        step=step, epoch=0.5, loss=loss, token_accuracy=0.5, learning_rate=1e-3, grad_norm=1.0, rows=8, tokens=1000,
        supervised_tokens=500, step_seconds=1.0, tokens_per_second=tokens_per_second, peak_memory_bytes=0,
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


class Screen:
    """A terminal of so many columns, with a view on it."""

    def __init__(self, clock, width):
        self.console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
        self.bars = open_bars(self.console)
        self.bars.get_time = lambda: clock[0]
        self.view = ConsoleReporter(self.console, self.console, EVERY_STEP, self.bars)

    def lines(self):
        """What stands there now, without the spinner."""
        with self.console.capture() as seen:
            self.console.print(self.bars.get_renderable())
        return [line[1:].strip() for line in seen.get().splitlines() if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_no_figure_of_the_training_line_is_cut(clock, width):
    screen = Screen(clock, width)
    screen.view.begin(0, 1500)
    assert screen.lines()[0].endswith("0/1,500  0:00")
    clock[0] += 40
    screen.view.step(record(1))
    clock[0] += 10
    (line,) = screen.lines()
    assert line.startswith("Training ")
    assert "1/1,500" in line
    assert "loss 2.7345" in line
    assert line.endswith("0:50, 16:39:10 left")  # 1,499 steps of 40 s, less 10 s
    assert ("1,234 tokens/s" in line) == (width >= 80)
    assert ("█" in line or "▁" in line) == (width >= 140)


@pytest.mark.parametrize("width", [80, 140])
def test_a_measurement_meanwhile_cuts_no_figure_either(clock, width):
    screen = Screen(clock, width)
    screen.view.begin(0, 1500)
    screen.view.step(record(1499))
    screen.view.progress("Measuring on held-out rows", 1, 200)
    clock[0] += 5
    screen.view.progress("Measuring on held-out rows", 2, 200)
    lines = screen.lines()
    assert len(lines) == (1 if width == 80 else 2)
    assert re.fullmatch(r"Measuring on held-out rows \S* +2/200 +0:05, 16:30 left", lines[-1])
    screen.view.progress("Measuring on held-out rows", 200, 200)
    (line,) = screen.lines()
    assert "1,499/1,500 loss 2.7345  1,234 tokens/s" in line


def test_the_time_left_of_a_resumed_run_counts_the_steps_of_this_session(clock):
    screen = Screen(clock, 100)
    screen.view.begin(100, 200, [3.0] * 100)
    clock[0] += 60
    screen.view.step(record(110))
    assert screen.lines()[0].endswith("1:00, 9:00 left")


def test_reading_shows_rows_without_an_end_and_goes_away_at_its_end(clock):
    screen = Screen(clock, 80)
    screen.view.progress("Reading chats.jsonl", 1280, None)
    clock[0] += 3
    assert re.fullmatch(r"Reading chats\.jsonl \S+ +1,280 +0:03", screen.lines()[0])
    screen.view.progress("Reading chats.jsonl", 1300, 1300)
    assert screen.lines() == []


def test_a_part_that_tells_nothing_until_its_end_has_neither_count_nor_estimate(clock):
    screen = Screen(clock, 80)
    screen.view.progress("Loading the base model", 0, None)
    assert re.fullmatch(r"Loading the base model \S+ +0:00", screen.lines()[0])


def told(capsys, act, log_interval=EVERY_STEP):
    """Lines on stdout and stderr of a view without a terminal."""
    act(ConsoleReporter(Console(width=80), Console(width=80, stderr=True), log_interval, None))
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


def test_a_run_that_is_all_warm_up_is_named_before_it_starts(capsys):
    note = "Note: The whole run, 1 step, is warm-up: the learning rate is never reached. Write [training] warmup_steps = 0."
    assert told(capsys, lambda view: view.begin(0, 1), LogInterval("steps", 1, 0.03))[1] == [note]
    assert told(capsys, lambda view: view.begin(0, 10), LogInterval("steps", 1, 20))[1] != []
    assert told(capsys, lambda view: view.begin(0, 2), LogInterval("steps", 1, 0.03))[1] == []
    assert told(capsys, lambda view: view.begin(0, 1), LogInterval("steps", 1, 0))[1] == []


@pytest.mark.parametrize(("after", "noted"), [(2.5, True), (1.5, False), (None, False)])
def test_a_held_out_loss_that_rose_is_named_at_the_end(capsys, tmp_path, after, noted):
    out, err = told(capsys, lambda view: view.finish(1, 2.0, after, 61, tmp_path))
    assert out[-1] == f"Done: 1 step in 1:01. The adapter: {tmp_path}"
    assert err == (
        ["Note: On the held-out rows it is worse than before training. Try a smaller [training] learning_rate."]
        if noted
        else []
    )


def test_the_loss_at_the_end_is_that_of_the_whole_run_in_means_of_its_first_and_last_tenth(capsys, tmp_path):
    losses = [4.0, 2.0, *[1.5] * 16, 1.0, 0.5]

    def act(view):
        view.begin(19, 20, losses[:19])
        view.step(record(20, loss=losses[19]))
        view.finish(20, None, None, 1, tmp_path)

    line = told(capsys, act)[0][-2]
    assert line == f"Training loss  {draw_curve(losses)}  3.0000 -> 0.7500 (first and last 2 steps)"


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (19, 1), (20, 2), (75, 7), (5000, 10)])
def test_the_ends_of_the_loss_are_a_tenth_of_it_each(steps, count):
    losses = [float(step) for step in range(steps)]
    middle = (count - 1) / 2
    assert mean_ends(losses) == (middle, steps - 1 - middle, count)


def test_the_plain_lines_say_how_long_it_still_takes(capsys, clock):
    def act(view):
        view.begin(0, 3)
        clock[0] += 40
        view.step(record(1))

    assert told(capsys, act)[0] == ["step 1/3  loss 2.7345  1,234 tokens/s  1:20 left"]


def test_stopping_at_once_names_what_is_kept(tmp_path):
    view = ConsoleReporter(Console(), Console(), EVERY_STEP, None)
    resumed = RunFolder(tmp_path / "runs" / "mine" / "now")
    assert str(view.interruption(None)).startswith("Stopped before the first step: nothing is lost.")
    go_on = f"Go on with: qlora-phi3 run {resumed.recipe} --resume {resumed.path}"
    assert str(view.interruption(resumed)) == f"Stopped at once before the first step. {go_on}"
    view.begin(4, 9)
    view.step(record(5))
    assert str(view.interruption(resumed)) == f"Stopped at once after step 5 of 9. {go_on}"
    view.checkpoint_saved(resumed.checkpoints / "checkpoint-5")
    view.step(record(6))
    assert (
        str(view.interruption(None))
        == f"Stopped at once after step 6 of 9; the newest checkpoint is of step 5. {go_on}"
    )
