"""Two processes with gloo on the CPU train what one process trains, and end well whatever ends one of them."""

import os
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from several import run_processes
from tiny_model import relative_difference
from workshop import Workshop, read_json, read_lines

from qlora_phi3.errors import DataError
from qlora_phi3.step import MicroBatchMemoryError

#: 35 rows in steps of 8: the last step of an epoch has 3.
TRAINING = {"batch_size": 8, "save_steps": 2, "eval_steps": 3, "num_train_epochs": 1.4, "max_length": 48}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base):
    """The shop and the folder of a run with one process."""
    shop = Workshop(tmp_path_factory.mktemp("alone"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.path)
        shop.write(training=TRAINING, data={"eval_size": 13})
        result = shop.run()
    assert result.exit_code == 0, result.stderr
    return shop.runs()[0]


def weights(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def losses(folder):
    return [(record["step"], record.get("loss", record.get("eval_loss"))) for record in read_lines(folder / "metrics.jsonl")]


def assert_equal_runs(folder, alone):
    assert relative_difference(weights(alone), weights(folder)) < 1e-5
    assert [step for step, _ in losses(folder)] == [step for step, _ in losses(alone)]
    for (_, one), (_, other) in zip(losses(alone), losses(folder), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_two_processes_train_what_one_does_and_only_one_writes(shop, alone):
    """The two pad their rows, in small micro-batches and after a dry run; the one packs them."""
    memory = {"micro_batch_tokens": 64, "rehearsal": True}
    shop.write(training={**TRAINING, "packing": False}, data={"eval_size": 13}, memory=memory)
    first, second = run_processes(shop)
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert (second.stdout, second.stderr, first.stderr) == ("", "", "")
    (folder,) = shop.runs()
    assert_equal_runs(folder, alone)
    assert "8 rows a step, shared by 2 processes" in first.stdout
    assert read_json(folder / "report.json")["device"].endswith("in 2 processes")


def before_each_pass(act):
    """For `in_each`: call `act(rank, the step, the pass's number)` before each forward and backward pass."""

    def in_each(rank):
        from qlora_phi3.training.oom import MemoryGuard

        compute = MemoryGuard.compute

        def watched(self, rows, run_pass, *, phase, step):
            numbers = iter(range(100))
            act_first = lambda batch: (act(rank, phase, step, next(numbers)), run_pass(batch))[1]  # noqa: E731
            return compute(self, rows, act_first, phase=phase, step=step)

        MemoryGuard.compute = watched

    return in_each


def test_memory_that_runs_out_in_one_process_lowers_the_plan_of_all(shop, alone):
    def run_out(rank, phase, step, number):
        if rank == 1 and phase == "training" and step == 3 and number < 2:
            raise MicroBatchMemoryError(0, "CUDA out of memory")

    shop.write(training=TRAINING, data={"eval_size": 13})
    first, second = run_processes(shop, in_each=before_each_pass(run_out))
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    (folder,) = shop.runs()
    records = [record for record in read_lines(folder / "metrics.jsonl") if record["kind"] == "oom"]
    assert [(record["step"], record["remedy"]) for record in records] == [(3, "again"), (3, "split")]
    assert first.stdout.count("memory ran out") + first.stderr.count("memory ran out") == 2
    assert relative_difference(weights(alone), weights(folder)) < 1e-5


def test_a_row_that_fits_in_no_process_ends_all_with_one_line_and_a_checkpoint(shop):
    def run_out(rank, phase, step, number):
        if rank == 1 and phase == "training" and step == 4:
            raise MicroBatchMemoryError(0, "CUDA out of memory")

    shop.write(training={**TRAINING, "save_steps": 100}, data={"eval_size": 13})
    first, second = run_processes(shop, in_each=before_each_pass(run_out))
    assert (first.code, second.code, second.stderr) == (2, 2, "")
    assert "does not fit in the memory" in first.stderr.splitlines()[-1]
    (folder,) = shop.runs()
    assert [path.name for path in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    assert read_json(folder / "report.json")["status"] == "failed"


def signal_in(number, signalled, at, phase="training"):
    sent = []

    def send(rank, phase_now, step, _):
        if (rank, phase_now, step) == (signalled, phase, at) and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    return before_each_pass(send)


def killed_in_the_sum(rank):
    """For `in_each`: process 1 dies when the results of step 6 are known to all, and its gradients to none."""
    from qlora_phi3.training import trainer

    def die(model):
        steps.append(model)
        if rank == 1 and len(steps) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return add_up(model)

    add_up, steps, trainer.add_up_gradients = trainer.add_up_gradients, [], die


@pytest.mark.parametrize("case", ["process 0", "process 1", "process 1 in the sum"])
def test_a_process_that_is_killed_costs_no_completed_step(shop, alone, case):
    shop.write(training={**TRAINING, "save_steps": 100}, data={"eval_size": 13})
    killed = int("1" in case)
    in_each = killed_in_the_sum if "sum" in case else signal_in(signal.SIGKILL, killed, 6)
    ended = run_processes(shop, in_each=in_each)
    left = ended[1 - killed]
    assert (ended[killed].code, left.code) == (-signal.SIGKILL, 2), left.stderr
    assert [line.startswith("Error: Another process of this run has ended") for line in left.stderr.splitlines()] == [True]
    (folder,) = shop.runs()
    assert read_json(folder / "report.json")["status"] == "failed"
    assert [path.name for path in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-5"]
    if case == "process 1":
        result = shop.run("--resume")  # with one process
        assert result.exit_code == 0, result.stderr
        assert_equal_runs(folder, alone)
    elif case == "process 0":
        assert [process.code for process in run_processes(shop, "--resume")] == [0, 0]
        assert_equal_runs(folder, alone)


def test_a_signal_to_one_process_in_an_evaluation_stops_all_after_the_same_step(shop, alone):
    shop.write(training={**TRAINING, "save_steps": 100}, data={"eval_size": 13})
    first, second = run_processes(shop, in_each=signal_in(signal.SIGTERM, 1, 3, "evaluation"))
    assert (first.code, second.code, second.stderr) == (130, 130, ""), first.stderr
    assert len(first.stderr.splitlines()) == 1
    (folder,) = shop.runs()
    assert [path.name for path in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    assert [process.code for process in run_processes(shop, "--resume")] == [0, 0]
    assert_equal_runs(folder, alone)


def test_dropout_differs_between_processes_and_a_resumed_run_repeats_it(shop):
    """And a run ends with its best checkpoint, which process 0 wrote."""
    training = {**TRAINING, "save_steps": 3, "load_best_model_at_end": True, "num_train_epochs": 0.8}
    shop.write(lora={"lora_dropout": 0.3}, training=training, data={"eval_size": 13})
    assert [process.code for process in run_processes(shop)] == [0, 0]
    assert [process.code for process in run_processes(shop, in_each=signal_in(signal.SIGKILL, 0, 4))] == [-9, 2]
    assert [process.code for process in run_processes(shop, "--resume")] == [0, 0]
    whole, resumed = shop.runs()
    assert {name: tensor.tolist() for name, tensor in weights(whole).items()} == {
        name: tensor.tolist() for name, tensor in weights(resumed).items()
    }
    assert read_json(resumed / "report.json")["eval_loss_after"] == read_json(whole / "report.json")["eval_loss_after"]


def raise_in(name, failing, error):
    """For `in_each`: a function of run.py raises in one process."""

    def in_each(rank):
        from qlora_phi3.training import run

        function = getattr(run, name)

        def fail(*arguments, **options):
            if rank == failing:
                raise error
            return function(*arguments, **options)

        setattr(run, name, fail)

    return in_each


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("name", ["prepare", "load_model"])
def test_an_error_of_one_process_ends_all_with_its_line(shop, name, failing):
    shop.write(training=TRAINING)
    first, second = run_processes(shop, in_each=raise_in(name, failing, DataError("mine.jsonl is gone.", "Look for it.")))
    assert (first.code, second.code, second.stderr) == (2, 2, "")
    assert first.stderr == "Error: mine.jsonl is gone. Look for it.\n"


def test_a_process_that_dies_before_the_first_step_ends_the_others_in_one_line(shop):
    shop.write(training=TRAINING)
    first, second = run_processes(shop, in_each=raise_in("load_model", 1, SystemExit(9)))
    assert (first.code, second.code) == (2, 9)
    assert first.stderr == "Error: Another process of this run has ended. Its own output says why.\n"
    assert not shop.runs()


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "4-bit weights cannot be split"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "4-bit weights cannot be split"),
        ({"LOCAL_WORLD_SIZE": 1}, "on one computer"),
        ({}, "2 processes cannot share a step of 1 row."),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(shop, environ, says):
    shop.write(training={"batch_size": 1})
    first, second = run_processes(shop, environ=environ)
    assert (first.code, second.code, second.stderr) == (2, 2, "")
    assert len(first.stderr.splitlines()) == 1
    assert says in first.stderr
    assert not shop.runs()


def test_a_launcher_s_configuration_does_not_replace_the_recipe(shop, alone):
    shop.write(training=TRAINING, data={"eval_size": 13})
    (only,) = run_processes(shop, count=1, environ={"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"})
    assert only.code == 0, only.stderr
    (folder,) = shop.runs()
    assert losses(folder) == losses(alone)


def test_the_processes_of_torchrun_connect_and_end_with_one_line(shop):
    """Not a complete run: each process of a launcher imports everything, 20 s on one core."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "qlora_phi3", "run", "none.toml"]
    ended = subprocess.run(words, cwd=shop.path, capture_output=True, text=True, check=False, timeout=120)
    assert ended.stderr.count("Error: none.toml: there is no such recipe") == 1
    assert "exitcode  : 2" in ended.stderr


def test_accelerate_starts_as_many_processes_as_the_documentation_says(shop):
    shop.write(training={"batch_size": 8, "max_length": 48, "max_steps": 1, "eval_strategy": "no"})
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2"]
    words = [*launcher, "--main_process_port=0", "-m", "qlora_phi3", "run", "mine.toml"]
    ended = subprocess.run(words, cwd=shop.path, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "8 rows a step, shared by 2 processes" in ended.stdout
    assert len(shop.runs()) == 1
