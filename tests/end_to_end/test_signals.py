"""Signals in every part of a run, and output that nobody reads any more."""

import os
import signal
import subprocess
import sys

import pytest
from workshop import Workshop, read_json, read_lines

WEIGHTS = "adapter/adapter_model.safetensors"
#: What follows the evaluation loss must not change either.
FOLLOWERS = {
    "plain": {},
    "epoch": {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 2},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0, "lr_scheduler_kwargs": {"patience": 0}},
    "best": {"load_best_model_at_end": True, "save_steps": 5, "eval_steps": 5},
}


def evaluations(folder):
    return [record["step"] for record in read_lines(folder / "metrics.jsonl") if record["kind"] == "eval"]


def interrupt_evaluation(shop, step, *words, number=signal.SIGINT):
    """Send a signal when the second of the evaluation's batches begins, after a step."""
    import qlora_phi3.training.trainer as trainer

    compute, seen = trainer.evaluate, []

    def evaluate(model, batches, **options):
        seen.append(len(batches))
        if current[0].state.global_step == step and len(seen) % 2 == 0:
            signal.raise_signal(number)
        return compute(model, batches, **options)

    current = []
    measure = trainer.Phi3Trainer._measure

    def remember(self, *args):
        current[:] = [self]
        seen.clear()
        return measure(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "evaluate", evaluate)
        patch.setattr(trainer.Phi3Trainer, "_measure", remember)
        return shop.run(*words)


def undisturbed(path, base, training):
    path.mkdir()
    shop = Workshop(path, base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        shop.write(training=training)
        assert shop.run().exit_code == 0
    (folder,) = shop.runs()
    return folder


@pytest.mark.parametrize("name", FOLLOWERS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_an_evaluation_ends_it_and_the_resumed_run_makes_up_for_it(shop, base, tmp_path, name, number):
    whole = undisturbed(tmp_path / "whole", base, FOLLOWERS[name])
    step = evaluations(whole)[1]
    shop.write(training=FOLLOWERS[name])
    result = interrupt_evaluation(shop, step, number=number)
    (folder,) = shop.runs()
    assert result.exit_code == 130, result.stderr
    assert f"step {step} of" in result.stderr.splitlines()[-1]
    assert evaluations(folder) == [0]
    assert (folder / f"checkpoints/checkpoint-{step}").is_dir()
    assert interrupt_evaluation(shop, step, "--resume").exit_code == 130  # once more, in the one that is made up for
    assert evaluations(folder) == [0]
    assert shop.run("--resume").exit_code == 0
    assert evaluations(folder) == evaluations(whole)
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_signal_in_the_evaluation_after_the_last_step_saves_what_no_checkpoint_has(shop, base, tmp_path):
    training = {"eval_strategy": "no", "save_strategy": "no"}
    whole = undisturbed(tmp_path / "whole", base, training)
    shop.write(training=training)
    assert interrupt_evaluation(shop, 10).exit_code == 130
    (folder,) = shop.runs()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-10"]
    assert not (folder / "adapter").exists()
    assert shop.run("--resume").exit_code == 0
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_signal_while_the_adapter_is_saved_lets_the_run_end(shop, monkeypatch):
    from qlora_phi3.training import artifacts

    save = artifacts.save_adapter
    monkeypatch.setattr(artifacts, "save_adapter", lambda *a, **k: (signal.raise_signal(signal.SIGTERM), save(*a, **k)))
    shop.write()
    assert shop.run().exit_code == 0
    assert read_json(shop.runs()[0] / "report.json")["status"] == "done"


@pytest.mark.parametrize("where", ["prepare", "load_model", "outline_run"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_stops_in_one_line(shop, monkeypatch, where, number):
    import qlora_phi3.training.run as run

    monkeypatch.setattr(run, where, lambda *args, **kwargs: signal.raise_signal(number))
    shop.write()
    result = shop.run()
    assert (result.exit_code, len(result.stderr.splitlines())) == (130, 1)
    assert "nothing is lost" in result.stderr


def test_time_saves_checkpoints_that_change_nothing(shop, base, tmp_path, monkeypatch):
    from qlora_phi3.training.callbacks import SaveByTime

    training = {"save_steps": 10, "save_total_limit": 2}
    whole = undisturbed(tmp_path / "whole", base, training)
    ticks = iter(range(1000))
    monkeypatch.setattr(SaveByTime.__init__, "__defaults__", (lambda: next(ticks) * 100.0,))  # each look is 100 s later
    shop.write(training={**training, "save_minutes": 4})
    result = shop.run()
    (folder,) = shop.runs()
    saved = [line.rpartition("-")[2] for line in result.stdout.splitlines() if line.startswith("Saved ")]
    assert saved == ["3", "6", "9", "10"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-9"]
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def start(shop, **options):
    """A run in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "qlora_phi3", "run", "mine.toml"], cwd=shop.path, **options)


def test_a_run_whose_reader_is_gone_ends_as_one_that_is_read(shop):
    shop.write()
    process = start(shop, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert read_json(shop.runs()[0] / "report.json")["status"] == "done"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="Windows has no pseudo-terminals")
def test_a_terminal_that_closes_saves_the_run(shop):
    shop.write(training={"num_train_epochs": 1000, "save_steps": 10**6, "eval_strategy": "no"})
    terminal, end = os.openpty()
    process = start(shop, stdin=end, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    shown = b""
    while b"tokens/s" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)  # the terminal's session leader gets it from the system
    assert process.wait(120) == 130
    (folder,) = shop.runs()
    assert read_json(folder / "report.json")["status"] == "interrupted"
    assert list((folder / "checkpoints").iterdir())
