"""Progress bars at the widths of real terminals, plain lines, and the end of a run."""

import io
import re
import time

import pytest
from rich.console import Console

from qlora_phi3.recipe.schema import Training
from qlora_phi3.reporter import RunOutline, StepRecord
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.training.run import RunResult
from qlora_phi3.ui.console import ConsoleReporter, build_progress, draw_curve, mean_ends

EVERY_STEP = Training()


def record(step, loss=2.7345, tokens_per_second=1234.0):
    return StepRecord(
        step=step, epoch=0.5, loss=loss, token_accuracy=0.5, learning_rate=1e-3, grad_norm=1.0, rows=8, tokens=1000,
        supervised_tokens=500, step_seconds=1.0, tokens_per_second=tokens_per_second, peak_memory_bytes=0,
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test advances them."""
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def reporter_on(console, clock, *, bars, training=EVERY_STEP):
    progress = build_progress(console, disable=not bars)
    progress.get_time = lambda: clock[0]
    errors = console if bars else Console(width=80, stderr=True)
    return ConsoleReporter(console, errors, training, progress)


class Terminal:
    """A terminal of `width` columns with a reporter on it."""

    def __init__(self, clock, width):
        self.console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
        self.reporter = reporter_on(self.console, clock, bars=True)

    def lines(self):
        """The progress lines as they are now, without the spinner."""
        with self.console.capture() as shown:
            self.console.print(self.reporter._bars.get_renderable())
        return [line[1:].strip() for line in shown.get().splitlines() if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_no_figure_of_the_training_line_is_cut(clock, width):
    terminal = Terminal(clock, width)
    terminal.reporter.begin(RunOutline(total_steps=1500, epochs=3))
    assert terminal.lines()[0].endswith("0/1,500 0:00:00 -:--:-- left")
    for step in (1, 2):
        clock[0] += 40
        terminal.reporter.step(record(step))
    clock[0] += 10
    (line,) = terminal.lines()
    assert line.startswith("Training ")
    assert "2/1,500  loss 2.7345" in line
    assert line.endswith(" 0:01:30 16:38:40 left")  # 1,498 steps of 40 s
    assert ("1,234 tokens/s" in line) == (width >= 80)
    assert ("█" in line or "▁" in line) == (width >= 140)


@pytest.mark.parametrize("width", [80, 140])
def test_an_evaluation_in_between_cuts_no_figure(clock, width):
    terminal = Terminal(clock, width)
    terminal.reporter.begin(RunOutline(total_steps=1500, epochs=3))
    terminal.reporter.step(record(1499))
    for done in (1, 2, 3):
        clock[0] += 5
        terminal.reporter.progress("Measuring on held-out rows", done, 200)
    lines = terminal.lines()
    assert len(lines) == (1 if width == 80 else 2)
    assert re.fullmatch(r"Measuring on held-out rows \S* +3/200 +0:00:10 0:16:25 left", lines[-1])
    terminal.reporter.progress("Measuring on held-out rows", 200, 200)
    (line,) = terminal.lines()
    assert "1,499/1,500  loss 2.7345  1,234 tokens/s" in line


def test_the_remaining_time_of_a_resumed_run_ignores_the_steps_of_earlier_sessions(clock):
    terminal = Terminal(clock, 100)
    terminal.reporter.begin(RunOutline(total_steps=200, epochs=3, first_step=100))
    for step in (110, 120):
        clock[0] += 60
        terminal.reporter.step(record(step))
    assert terminal.lines()[0].endswith(" 0:02:00 0:08:00 left")  # 80 steps, 6 s each


def test_the_remaining_time_is_known_where_a_step_takes_minutes(clock):
    terminal = Terminal(clock, 100)
    terminal.reporter.begin(RunOutline(total_steps=10, epochs=3))
    for step in (1, 2):
        clock[0] += 600
        terminal.reporter.step(record(step))
    assert terminal.lines()[0].endswith(" 0:20:00 1:20:00 left")


def test_work_of_unknown_size_shows_its_count_and_no_estimate(clock):
    terminal = Terminal(clock, 80)
    terminal.reporter.progress("Reading chats.jsonl", 1280, None)
    terminal.reporter.progress("Loading the base model", 0, None)
    clock[0] += 3
    reading, loading = terminal.lines()
    assert re.fullmatch(r"Reading chats\.jsonl +\S+ +1,280 +0:00:03", reading)
    assert re.fullmatch(r"Loading the base model \S+ +0:00:03", loading)
    terminal.reporter.progress("Reading chats.jsonl", 1300, 1300)
    terminal.reporter.progress("Loading the base model", 1, 1)
    assert terminal.lines() == []


@pytest.fixture
def printed(capsys, clock):
    """Calls a function with a reporter without a terminal; the lines on stdout and on stderr."""

    def run(act, training=EVERY_STEP):
        act(reporter_on(Console(width=80), clock, bars=False, training=training))
        out, err = capsys.readouterr()
        return out.splitlines(), err.splitlines()

    return run


@pytest.mark.parametrize(("total", "warmup_steps", "warned"), [(1, 0.03, True), (10, 20, True), (2, 0.03, False), (1, 0, False)])
def test_a_run_that_is_only_warm_up_is_reported_before_it_starts(printed, total, warmup_steps, warned):
    _, err = printed(
        lambda reporter: reporter.begin(RunOutline(total_steps=total, epochs=1)), Training(warmup_steps=warmup_steps)
    )
    assert ["warmup_steps = 0" in line for line in err] == [True] * warned


@pytest.mark.parametrize("notes", [[], ["The held-out loss rose.", "3 of 3 sample answers are empty."]])
def test_the_end_of_a_run_has_its_warnings_and_the_next_commands(printed, tmp_path, notes):
    out, err = printed(lambda reporter: reporter.finish(RunResult(RunFolder(tmp_path), 1, 2.0, 1.5, 61), notes))
    adapter = tmp_path / "adapter"
    assert out[-4] == f"Done: 1 step in 1:01, all sessions, from reading the data to saving. The adapter: {adapter}"
    assert out[-3:] == [
        f"Next: qlora-phi3 chat {tmp_path} --compare",
        f"      qlora-phi3 eval {tmp_path}",
        f"      qlora-phi3 export {tmp_path} --ollama NAME",
    ]
    assert err == [f"Note: {note}" for note in notes]


def test_the_loss_at_the_end_is_that_of_all_sessions_as_means_of_the_first_and_last_tenth(printed, tmp_path):
    losses = [4.0, 2.0, *[1.5] * 16, 1.0, 0.5]

    def act(reporter):
        earlier = [{"kind": "train", "loss": loss} for loss in losses[:19]]
        reporter.begin(RunOutline(total_steps=20, epochs=1, first_step=19, earlier=earlier))
        reporter.step(record(20, loss=losses[19]))
        reporter.finish(RunResult(RunFolder(tmp_path), 20, None, None, 1), [])

    line = printed(act)[0][-5]
    assert line == f"Training loss  {draw_curve(losses)}  2.5000 -> 1.0000 (means of the first and last 3 steps)"


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (7, 1), (8, 2), (14, 3), (39, 3), (75, 7), (5000, 10)])
def test_each_end_of_the_loss_is_a_tenth_of_the_steps_3_to_10_and_no_more_than_a_quarter(steps, count):
    losses = [float(step) for step in range(steps)]
    middle = (count - 1) / 2
    assert mean_ends(losses) == (middle, steps - 1 - middle, count)


def test_the_highest_loss_is_a_full_block_and_losses_that_are_not_finite_are_left_out():
    assert draw_curve([8.0, 4.5, float("nan"), 1.0]) == "█▅▁"
    assert draw_curve([float("inf")]) == ""


def test_a_plain_line_names_the_remaining_time_from_the_second_step_on(printed, clock):
    def act(reporter):
        reporter.begin(RunOutline(total_steps=4, epochs=1))
        for step in (1, 2):
            clock[0] += 40
            reporter.step(record(step))

    assert printed(act)[0] == [
        "step 1/4  loss 2.7345  1,234 tokens/s",
        "step 2/4  loss 2.7345  1,234 tokens/s  1:20 left",
    ]


def test_the_time_of_the_run_is_announced_by_the_cost_model_and_again_where_the_measured_one_differs(printed, clock):
    def act(reporter):
        reporter.begin(RunOutline(total_steps=100, epochs=3, step_seconds=15.0))
        for step in range(1, 5):
            clock[0] += 20 if step > 1 else 1
            reporter.step(record(step))

    lines = [line for line in printed(act, Training(logging_strategy="no"))[0] if line.startswith("About")]
    # 100 x 15 s; then 41 s passed and 97 steps of 20 s
    assert lines == ["About 25 min for 3 epochs (100 steps), estimated.", "About 33 min for 3 epochs (100 steps), measured."]


def test_the_time_of_a_resumed_run_is_that_of_its_remaining_steps(printed):
    outline = RunOutline(total_steps=1200, epochs=3, first_step=600, step_seconds=2.0)
    assert printed(lambda reporter: reporter.begin(outline))[0] == ["About 20 min for 600 steps of 1,200, estimated."]


def test_plain_lines_about_one_work_are_ten_seconds_apart(printed, clock):
    def act(reporter):
        for done in range(0, 25, 4):
            reporter.progress("Reading", done, 24)
            clock[0] += 4

    assert printed(act)[0] == ["Reading ...", "Reading: 12 of 24"]


def test_the_remaining_time_of_an_evaluation_is_known_after_its_first_batch(clock):
    terminal = Terminal(clock, 100)
    terminal.reporter.has_one_bar = True
    terminal.reporter.progress("Measuring the loss", 0, 30)
    assert re.fullmatch(r"Measuring the loss \S* +0/30 +0:00:00 -:--:-- left", terminal.lines()[0])
    clock[0] += 83
    terminal.reporter.progress("Measuring the loss", 16, 30)
    assert re.fullmatch(r"Measuring the loss \S* +16/30 +0:01:23 0:01:13 left", terminal.lines()[0])


def test_an_export_has_one_bar_which_counts_the_time_of_all_its_parts(clock):
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system=None)
    bars = build_progress(console)
    bars.get_time = lambda: clock[0]
    reporter = ConsoleReporter(console, console, EVERY_STEP, bars)
    reporter.has_one_bar = True
    for what, done, total in (("Reading", 0, None), ("Merging, MB", 1, 4), ("Merging, MB", 4, 4), ("Scoring", 2, 8)):
        reporter.progress(what, done, total)
        clock[0] += 5
        (task,) = bars.tasks
        assert (task.description, task.completed, task.total) == (what, done, total)
    assert task.elapsed == 20


def test_stopping_at_once_names_the_newest_checkpoint_and_the_command_that_goes_on(tmp_path):
    reporter = ConsoleReporter(Console(), Console(), EVERY_STEP, build_progress(Console(), disable=True))
    resumed = RunFolder(tmp_path / "runs" / "mine" / "now")
    go_on = f"Go on with: qlora-phi3 run --resume {resumed.path}"
    assert reporter.interruption(None).hint == "Start again with the same command."
    assert reporter.interruption(resumed).hint == go_on
    reporter.begin(RunOutline(total_steps=9, epochs=1, first_step=4))
    reporter.step(record(5))
    assert str(reporter.interruption(resumed)) == f"Stopped at once after step 5 of 9. {go_on}"
    reporter.checkpoint_saved(resumed.checkpoints / "checkpoint-5")
    reporter.step(record(6))
    stopped = reporter.interruption(None)
    assert (stopped.exit_code, stopped.hint) == (130, go_on)
    assert "after step 6 of 9" in stopped.message
    assert "of step 5" in stopped.message
