"""The Trainer: its arguments, its one GPU, the model it is handed, and what it writes when saving fails."""

import inspect
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import trainer_utils, training_args
from workshop import read_lines

from qlora_phi3.recipe.schema import Training
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.training import trainer as trainer_module
from qlora_phi3.training.prepare import load_model, plan_run, prepare
from qlora_phi3.training.trainer import build_arguments, build_trainer, is_not_mistaken_warning

HEAD = "Warning: The following arguments do not match the ones in the `trainer_state.json` within the checkpoint directory: "


class Silent:
    """A reporter that shows nothing."""

    def __getattr__(self, name):
        return lambda *args: None


@pytest.fixture
def trainer(shop):
    """The trainer of the workshop's recipe, before its first step."""
    from qlora_phi3.recipe.load import load_recipe

    context = prepare(load_recipe(shop.write()), shop.path, Silent())
    (shop.path / "run").mkdir()
    return build_trainer(context, plan_run(context).execution, load_model(context), RunFolder(shop.path / "run"))


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (HEAD + "\n\teval_steps: 0.2 (from args) != 5 (from trainer_state.json)", False),
        (
            HEAD
            + "\n\teval_steps: 0.2 (from args) != 5 (from trainer_state.json)"
            + "\n\tsave_steps: 0.2 (from args) != 5 (from trainer_state.json)",
            False,
        ),
        (HEAD + "\n\teval_steps: 5 (from args) != 4 (from trainer_state.json)", False),
        ("Something else: 0.2 (from args)", True),
    ],
)
def test_intervals_that_differ_at_resuming_are_those_of_the_recipe_and_no_warning(text, passes):
    record = logging.LogRecord("transformers.trainer_utils", logging.WARNING, "", 0, text, (), None)
    assert is_not_mistaken_warning(record) is passes


def test_the_words_are_those_of_transformers():
    """Else the warning is back, or hidden with something else."""
    source = inspect.getsource(trainer_utils.compare_trainer_and_checkpoint_args)
    assert "`trainer_state.json`" in source
    assert "parallel_mode != ParallelMode.DISTRIBUTED" in inspect.getsource(training_args)
    assert "(from args) != " in source


@pytest.mark.parametrize("num_gpus", [0, 1, 2])
def test_with_several_visible_gpus_the_trainer_uses_one(monkeypatch, tmp_path, num_gpus):
    """With more, the Trainer would wrap the model in DataParallel, and TRL raises."""
    monkeypatch.setattr(trainer_module.SFTConfig, "_setup_devices", torch.device("cpu"))
    monkeypatch.setattr(trainer_module.SFTConfig, "_n_gpu", num_gpus, raising=False)
    arguments = build_arguments(
        Training(batch_size=4),
        tmp_path,
        device=torch.device("cpu"),
        fp16=False,
        optim="adamw_torch",
        evaluates=False,
    )
    assert arguments.n_gpu == min(1, num_gpus)
    assert arguments.train_batch_size == 4


def test_a_step_runs_the_model_that_the_trainer_hands_over(trainer):
    class Wrapped(torch.nn.Module):
        """Stands for a wrapper of accelerate, such as DistributedDataParallel."""

        def __init__(self, model):
            super().__init__()
            self.model, self.calls = model, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.model(*args, **kwargs)

    wrapped = Wrapped(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.training_step(wrapped, batch)
    assert wrapped.calls >= 1
    assert torch.isfinite(loss)


def test_the_optimizer_is_built_by_the_function_that_the_simulation_calls(trainer, monkeypatch):
    from qlora_phi3.memory import simulate
    from qlora_phi3.model import optimizer

    assert trainer_module.build_optimizer is simulate.build_optimizer is optimizer.build_optimizer
    monkeypatch.setattr(trainer_module, "build_optimizer", lambda name, *args, **kwargs: SimpleNamespace(name=name))
    assert trainer.create_optimizer().name == "adamw_torch"


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access was encountered"), ZeroDivisionError(), KeyError("x")]
)
def test_an_error_of_the_program_while_saving_is_not_called_a_full_disk(trainer, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "save", fail)
    trainer.create_optimizer_and_scheduler(10)
    with pytest.raises(type(error)) as raised:
        trainer._save_checkpoint(trainer.model, None)
    assert raised.value is error


def test_the_shown_steps_are_written_before_they_are_shown(trainer):
    trainer.reporter.evaluation(
        trainer_module.EvalRecord(step=0, eval_loss=1.0, eval_token_accuracy=0.5, supervised_tokens=3, seconds=0.1)
    )
    (line,) = read_lines(trainer.reporter._folder.metrics)
    assert line == {
        "kind": "eval", "step": 0, "eval_loss": 1.0, "eval_token_accuracy": 0.5, "supervised_tokens": 3, "seconds": 0.1,
    }  # fmt: skip
