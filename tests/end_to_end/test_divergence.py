"""Runs that learn nothing, and runs that diverge: they go back, give up after some tries, or, if the recipe says so, stop."""

import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from workshop import Workshop, read_json, read_lines

from qlora_phi3.training.divergence import MAX_RECOVERIES, DivergenceGuard
from qlora_phi3.training.trainer import Phi3Trainer

NAN = float("nan")
WEIGHTS = "adapter/adapter_model.safetensors"
OFF = {"training": {"recover_from_divergence": False}}


def change_weight(shop, name, value):
    path = shop.copy_base() / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, path, {"format": "pt"})
    return {"model": {"name": "copy"}}


def stopped(shop, *words, **tables):
    shop.write(**tables)
    result = shop.run()
    assert result.exit_code == 2, result.output
    *notes, line = result.stderr.splitlines()
    assert all(note.startswith(("Note: Step ", "Note: Unusual, is it meant? [training] learning_rate = ")) for note in notes)
    for word in words:
        assert word in line
    (folder,) = shop.runs()
    report = read_json(folder / "report.json")
    assert report["status"] == "failed"
    assert line.removeprefix("Error: ") == report["error"]
    return folder


def records(folder, kind="divergence"):
    return [record for record in read_lines(folder / "metrics.jsonl") if record["kind"] == kind]


@pytest.fixture
def ruin():
    """Inside the block, make the loss and the gradients of these steps NaN, and press Ctrl-C in one."""

    @contextmanager
    def ruin(steps, ctrl_c=None):
        step_before = Phi3Trainer.training_step

        def training_step(self, *args, **kwargs):
            loss, step = step_before(self, *args, **kwargs), self.state.global_step + 1
            if step in steps:
                self.divergence.loss = NAN
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.fill_(NAN)
            if step == ctrl_c:
                signal.raise_signal(signal.SIGINT)
            return loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Phi3Trainer, "training_step", training_step)
            yield

    return ruin


def test_a_base_that_gives_nan_stops_before_a_step(shop):
    shop.default_tables()
    tables = change_weight(shop, "model.norm.weight", NAN)
    folder = stopped(shop, "nan", **tables)
    assert not (folder / "adapter").exists()


def test_a_gradient_of_exactly_zero_is_refused_at_the_first_step(shop):
    shop.default_tables()
    tables = change_weight(shop, "lm_head.weight", 0.0)
    stopped(shop, "step 1", "zero", **tables)


def test_a_learning_rate_that_no_recovery_lowers_enough_ends_the_run_without_an_adapter(shop):
    tables = {"training": {"learning_rate": 1e30, "warmup_steps": 0, "save_steps": 1}}
    folder = stopped(shop, f"{MAX_RECOVERIES + 1} times", "Nothing was learned", **tables)
    assert [record["good_step"] for record in records(folder)] == [0] * (MAX_RECOVERIES + 1)
    assert not (folder / "adapter").exists()


def test_without_recovery_a_loss_that_is_not_finite_stops_the_run(shop):
    tables = {"training": {"learning_rate": 1e30, "warmup_steps": 0, **OFF["training"]}}
    folder = stopped(shop, "Step 2 diverged", **tables)
    assert [record["step"] for record in records(folder, "train")] == [1]
    assert not (folder / "adapter").exists()


def test_a_learning_rate_that_is_too_high_is_lowered_until_the_run_learns(shop):
    shop.write(training={"learning_rate": 3e4, "num_train_epochs": 3, "lr_scheduler_type": "constant", "warmup_steps": 0})
    result = shop.run()
    (folder,) = shop.runs()
    report = read_json(folder / "report.json")
    assert report["divergences"] == records(folder)
    assert result.exit_code in (0, 2)
    assert all(value.isfinite().all() for value in load_file(folder / WEIGHTS).values())


def test_a_step_that_diverges_is_undone_and_its_rows_are_named(shop, ruin):
    shop.write()
    with ruin({7}):
        result = shop.run()
    assert result.exit_code == 0, result.stderr
    (folder,) = shop.runs()
    (record,) = records(folder)
    assert (record["step"], record["good_step"], record["learning_rate_factor"]) == (7, 5, 0.5)
    assert len(record["rows"]) == 4
    assert all("/chats.jsonl:" in name for name in record["rows"])
    note, end = result.stderr.splitlines()
    assert end == "Note: 1 event of memory that ran out or of a step that diverged: see report.html."
    assert "Step 7 diverged" in note
    assert Path(record["rows"][0]).name in note
    trained = {record["step"]: record["learning_rate"] for record in records(folder, "train")}
    assert list(trained) == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert trained[8] < 0.6 * trained[6]
    assert read_json(folder / "report.json")["divergences"] == [record]


@pytest.mark.parametrize("ctrl_c", [6, 7, 8])
def test_a_run_that_diverged_and_was_resumed_ends_in_the_same_adapter(shop, base, tmp_path, ruin, monkeypatch, ctrl_c):
    tables = {"lora": {"r": 4, "lora_dropout": 0.1}}
    other = Workshop(tmp_path / "other", base)
    other.path.mkdir()
    monkeypatch.chdir(other.path)
    other.write(**tables)
    with ruin({7, 9}):
        assert other.run().exit_code == 0
    monkeypatch.chdir(shop.path)
    shop.write(**tables)
    with ruin({7, 9}, ctrl_c=ctrl_c):
        assert shop.run().exit_code == 130
    (folder,), (whole,) = shop.runs(), other.runs()
    assert (folder / f"checkpoints/checkpoint-{ctrl_c}").is_dir()
    with ruin({7, 9}):
        assert shop.run("--resume").exit_code == 0
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    for key in ("step", "good_step", "learning_rate_factor"):
        assert [record[key] for record in records(folder)] == [record[key] for record in records(whole)]
    assert len(records(folder)) == 2


def test_where_nothing_diverges_recovery_changes_no_bit(shop):
    adapters = []
    for tables in ({}, OFF):
        shop.write(**tables)
        assert shop.run().exit_code == 0
        adapters.append((shop.runs()[-1] / WEIGHTS).read_bytes())
    assert adapters[0] == adapters[1]


def test_a_run_that_gives_up_saves_its_last_good_state(shop, ruin):
    with ruin(set(range(7, 15))):
        folder = stopped(shop, "6 times", "step 12", "adapter of step 5,", training={"max_steps": 14})
    weights = load_file(folder / WEIGHTS)
    assert all(value.isfinite().all() for value in weights.values())
    saved = load_file(folder / "checkpoints/checkpoint-12/adapter_model.safetensors")
    assert all(torch.equal(weights[name], saved[name]) for name in weights)


def ruin_weights_after(monkeypatch, step):
    """Make every trained weight NaN once, after the update of a step."""
    before = DivergenceGuard.on_optimizer_step

    def on_optimizer_step(self, args, state, control, **kwargs):
        before(self, args, state, control, **kwargs)
        if state.global_step + 1 == step:
            for group in kwargs["optimizer"].param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(NAN)

    monkeypatch.setattr(DivergenceGuard, "on_optimizer_step", on_optimizer_step)


@pytest.mark.parametrize(("step", "evaluates"), [(5, True), (10, True), (10, False)])
def test_weights_that_are_not_finite_are_found_by_the_evaluation_or_at_the_end(shop, monkeypatch, step, evaluates):
    ruin_weights_after(monkeypatch, step)
    shop.write(training={"do_eval": evaluates, "max_steps": 10})
    result = shop.run()
    assert result.exit_code == 0, result.stderr
    (folder,) = shop.runs()
    (record,) = records(folder)
    assert (record["step"], record["rows"]) == (step, [])
    assert all(value.isfinite().all() for value in load_file(folder / WEIGHTS).values())
    assert all(record["eval_loss"] < 100 for record in records(folder, "eval"))


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"learning_rate": 1e-30}, "bit for bit as before"),
        ({"max_steps": 1, "warmup_steps": 1}, "no trained parameter changed"),  # the first rate of a warm-up is zero
        ({}, None),
    ],
)
def test_an_adapter_that_learned_nothing_is_reported(shop, training, said):
    shop.write(training=training)
    result = shop.run()
    assert result.exit_code == 0, result.stderr
    line = read_json(shop.runs()[0] / "report.json")["unlearned"]
    assert line is None if said is None else said in line
    assert ("learned nothing" in result.stderr) == (said is not None)
