"""Training ends where the held-out loss no longer falls, and the best adapter is saved, also after a kill."""

import json
import shutil
import signal

import pytest
import torch
from several import run_processes
from transformers import TrainerControl, TrainerState
from workshop import Workshop, call, read_json, read_lines

from qlora_phi3.runfolder import RunFolder, write_report
from qlora_phi3.training.callbacks import BEST, EarlyStopping
from qlora_phi3.training.trainer import Phi3Trainer

#: Held-out loss by step: lowest after step 4.
LOSSES = {0: 0.1, 2: 3.0, 4: 2.0, 6: 2.5, 8: 2.2, 10: 2.1}
TRAINING = {"early_stopping_patience": 2, "eval_steps": 2, "save_steps": 2, "save_total_limit": 20}
WEIGHTS = "adapter/adapter_model.safetensors"
NAN = float("nan")


def watch(losses, patience):
    """Show losses to a watch over one weight that is the step; the watch, and after which loss it ended the run."""
    layer, control = torch.nn.Linear(1, 1, bias=False), TrainerControl()
    watch = EarlyStopping(layer, patience)
    for step, loss in enumerate(losses, start=1):
        layer.weight.data.fill_(step)
        state = TrainerState(global_step=step, max_steps=100)
        if watch.on_evaluate(None, state, control, metrics={"eval_loss": loss}).should_training_stop:
            break
    return watch.restore_best(state), step, layer.weight.item()


@pytest.mark.parametrize(
    ("losses", "patience", "ended", "best"),
    [
        ([3, 2, 2.5, 2.2, 1], 2, 4, 2),
        ([3, 2, 2.5, 1.9, 2, 2], 2, 6, 4),
        ([2, 2, 1], 1, 2, 1),  # equal is not lower
        ([3, 2, 1], 1, 3, 3),
    ],
)
def test_by_hand(losses, patience, ended, best):
    report, step, weight = watch(losses, patience)
    assert (step, report["early_stopping"]["best_step"], weight) == (ended, best, best)
    assert report["eval_loss_after"] == losses[best - 1]


def given(monkeypatch, losses=LOSSES):
    """Held-out losses by step in place of the measured ones."""
    monkeypatch.setattr(Phi3Trainer, "_measure", lambda self, loader, step: (losses[step], 0.5, 10))


def run_of(folder):
    """What a run of the given losses left: its report, its steps, and the weights of its adapter."""
    steps = [record["step"] for record in read_lines(folder / "metrics.jsonl") if record["kind"] == "train"]
    return read_json(folder / "report.json"), steps, (folder / WEIGHTS).read_bytes()


def assert_stopped_with_the_best(folder, last=8, best=4):
    report, steps, weights = run_of(folder)
    assert report["early_stopping"]["reason"] == f"stopped early after step {last}; best step {best}"
    assert (report["status"], report["steps"], steps) == ("done", last, list(range(1, last + 1)))
    assert report["eval_loss_after"] == LOSSES[best] == report["early_stopping"]["best_loss"]
    assert weights == (folder / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()
    return weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    """The run of the given losses."""
    shop = Workshop(tmp_path_factory.mktemp("whole"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.path)
        given(patch)
        shop.write(training=TRAINING)
        result = shop.run()
    assert result.exit_code == 0, result.stderr
    return shop, result


def test_the_run_stops_and_the_adapter_of_its_best_step_is_saved(whole):
    shop, result = whole
    (folder,) = shop.runs()
    assert_stopped_with_the_best(folder)
    assert "The run stopped early after step 8; best step 4, whose adapter is saved; its held-out loss is 2.0000" in result.stdout
    assert (folder / "checkpoints" / "checkpoint-8" / BEST).is_file()


@pytest.mark.parametrize("kept", [2, 4, 6, 8])
def test_from_every_checkpoint_of_a_killed_run_it_ends_in_the_same_adapter(whole, tmp_path, monkeypatch, kept):
    shop = Workshop(tmp_path / "shop", whole[0].base)
    shutil.copytree(whole[0].path, shop.path)
    monkeypatch.chdir(shop.path)
    given(monkeypatch)
    (folder,) = shop.runs()
    text = (folder / "report.json").read_text(encoding="utf-8").replace(str(whole[0].path), str(shop.path))
    write_report(RunFolder(folder), {**json.loads(text), "status": "running"})
    shutil.rmtree(folder / "adapter")
    for path in (folder / "checkpoints").glob("checkpoint-*"):
        if int(path.name[11:]) > kept:
            shutil.rmtree(path)
    result = call("run", "mine.toml", "--resume")
    assert result.exit_code == 0, result.stderr
    report, steps, weights = run_of(folder)
    assert (report["early_stopping"]["reason"], steps) == ("stopped early after step 8; best step 4", list(range(1, 9)))
    assert weights == (whole[0].runs()[0] / WEIGHTS).read_bytes()


def test_an_evaluation_that_ctrl_c_ended_is_made_up_for_and_may_end_the_run(whole, shop, monkeypatch):
    measure = Phi3Trainer._measure

    def press(self, loader, step):
        if step == 8:
            signal.raise_signal(signal.SIGINT)
            return measure(self, loader, step)
        return LOSSES[step], 0.5, 10

    shop.write(training=TRAINING)
    with monkeypatch.context() as patch:
        patch.setattr(Phi3Trainer, "_measure", press)
        assert shop.run().exit_code == 130
    given(monkeypatch)
    assert shop.run("--resume").exit_code == 0
    assert assert_stopped_with_the_best(shop.runs()[0]) == (whole[0].runs()[0] / WEIGHTS).read_bytes()


def test_a_run_to_its_end_without_checkpoints_saves_its_best_step_too(shop, monkeypatch):
    given(monkeypatch, {**LOSSES, 9: 1.0})
    settings = {**TRAINING, "early_stopping_patience": 5, "save_strategy": "no", "save_minutes": 0.0, "max_steps": 9}
    shop.write(training=settings)
    assert shop.run().exit_code == 0
    report, steps, _ = run_of(shop.runs()[0])
    assert (report["early_stopping"]["reason"], steps[-1]) == ("ended with step 9; best step 9", 9)
    given(monkeypatch, {**LOSSES, 9: 2.3})
    result = shop.run()
    assert result.exit_code == 0, result.stderr
    report, _, weights = run_of(shop.runs()[-1])
    assert (report["early_stopping"]["reason"], report["eval_loss_after"]) == ("ended with step 9; best step 4", 2.0)
    assert weights != (shop.runs()[0] / WEIGHTS).read_bytes()


def test_with_load_best_model_at_end_it_is_the_same_adapter(whole, shop, monkeypatch):
    given(monkeypatch)
    shop.write(training={**TRAINING, "load_best_model_at_end": True})
    result = shop.run()
    assert result.exit_code == 0, result.stderr
    assert run_of(shop.runs()[0])[2] == (whole[0].runs()[0] / WEIGHTS).read_bytes()


def test_after_a_return_from_divergence_the_best_weights_are_those_that_were_measured(shop, monkeypatch):
    """The loss after step 4 is NaN: the run goes back to its last good state, whose loss counts."""
    losses = {**LOSSES}

    def measure(self, loader, step):
        is_first = step == 4 and not self.divergence._num_recoveries
        return (NAN if is_first else losses[step]), 0.5, 10

    monkeypatch.setattr(Phi3Trainer, "_measure", measure)
    shop.write(training=TRAINING)
    assert shop.run().exit_code == 0
    (folder,) = shop.runs()
    assert_stopped_with_the_best(folder)
    assert read_json(folder / "report.json")["divergences"][0]["good_step"] < 4


def test_losses_that_are_measured_end_a_run_that_learns_too_fast_and_the_saved_adapter_has_the_lowest(shop):
    shop.write(training={"early_stopping_patience": 1, "eval_steps": 1, "learning_rate": 0.3, "num_train_epochs": 3})
    result = shop.run()
    assert result.exit_code == 0, result.stderr
    (folder,) = shop.runs()
    report, steps, _ = run_of(folder)
    losses = {record["step"]: record["eval_loss"] for record in read_lines(folder / "metrics.jsonl") if record["kind"] == "eval"}
    best = min((step for step in losses if step), key=losses.get)
    assert (report["early_stopping"]["best_step"], report["eval_loss_after"]) == (best, losses[best])
    assert steps[-1] == best + 1 < 30
    # Measured once more, as the loss before the first step of a run that starts from it.
    shop.write(model={"adapter": str(folder / "adapter")}, training={"max_steps": 1, "save_strategy": "no", "save_minutes": 0.0})
    assert shop.run().exit_code == 0
    assert read_json(shop.runs()[-1] / "report.json")["eval_loss_before"] == pytest.approx(losses[best], rel=1e-6)


def test_several_processes_stop_after_the_same_step(whole, shop):
    def in_each(rank):
        Phi3Trainer._measure = lambda self, loader, step: (LOSSES[step], 0.5, 10)

    shop.write(training=TRAINING)
    first, second = run_processes(shop, in_each=in_each)
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert_stopped_with_the_best(shop.runs()[0])
