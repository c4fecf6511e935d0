"""Two processes with gloo on the CPU train what one process trains, and end well whatever ends one of them."""

import os
import signal
import shutil

import pytest
import torch
from several import run_processes
from safetensors.torch import load_file
from tiny_model import relative_difference
from workshop import Workshop, read_json, read_lines

#: 35 rows in steps of 8: the last step of an epoch has 3.
TRAINING = {"batch_size": 8, "save_steps": 2, "eval_steps": 3, "num_train_epochs": 1.4, "max_length": 48}
LAST = 7


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


@pytest.mark.parametrize("packing", [True, False])
def test_two_processes_train_what_one_does_and_only_one_writes(shop, alone, packing):
    shop.write(training={**TRAINING, "packing": packing}, data={"eval_size": 13}, memory={"micro_batch_tokens": 64})
    first, second = run_processes(shop)
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert (second.stdout, second.stderr, first.stderr) == ("", "", "")
    (folder,) = shop.runs()
    assert_equal_runs(folder, alone)
    assert "8 rows a step, shared by 2 processes" in first.stdout
    assert read_json(folder / "report.json")["device"].endswith("in 2 processes")


def test_memory_that_runs_out_in_one_process_lowers_the_plan_of_all(shop, alone):
    def in_each(rank):
        from qlora_phi3.training import trainer

        compute, calls = trainer.forward_backward, []
        plans = []

        def run_out(model, batch, **options):
            calls.append(batch)
            plans.append(len(batch.micro_batches))
            result = compute(model, batch, **options)
            if rank == 1 and len(calls) in (3, 4):  # the third step, twice
                raise trainer_step.MicroBatchMemoryError(0, "CUDA out of memory")
            return result

        import qlora_phi3.step as trainer_step

        trainer.forward_backward = run_out

    shop.write(training=TRAINING, data={"eval_size": 13})
    first, second = run_processes(shop, in_each=in_each)
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    (folder,) = shop.runs()
    records = [record for record in read_lines(folder / "metrics.jsonl") if record["kind"] == "oom"]
    assert [record["remedy"] for record in records] == ["again", "split"]
    assert "memory ran out" in first.stdout + first.stderr
    assert relative_difference(weights(alone), weights(folder)) < 1e-5


def kill_at(rank_killed, step, number=signal.SIGKILL):
    def in_each(rank):
        from qlora_phi3.training.trainer import Phi3Trainer

        compute = Phi3Trainer._compute_share

        def killed(self, *arguments):
            if rank == rank_killed and self.state.global_step == step:
                os.kill(os.getpid(), number)
            return compute(self, *arguments)

        Phi3Trainer._compute_share = killed

    return in_each


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_costs_no_completed_step(shop, alone, killed):
    shop.write(training={**TRAINING, "save_steps": 100}, data={"eval_size": 13})
    ended = run_processes(shop, in_each=kill_at(killed, 5))
    left = ended[1 - killed]
    assert (ended[killed].code, left.code) == (-signal.SIGKILL, 2), left.stderr
    assert len(left.stderr.splitlines()) == 1
    assert "--resume" in left.stderr
    (folder,) = shop.runs()
    assert read_json(folder / "report.json")["status"] == "failed"
    assert [path.name for path in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-5"]
    # another number of processes goes on
    if killed:
        result = shop.run("--resume")
        assert result.exit_code == 0, result.stderr
    else:
        assert [process.code for process in run_processes(shop, "--resume")] == [0, 0]
    assert_equal_runs(folder, alone)


def test_a_signal_to_one_process_stops_all_after_the_same_step(shop, alone):
    shop.write(training={**TRAINING, "save_steps": 100}, data={"eval_size": 13})
    first, second = run_processes(shop, in_each=kill_at(1, 4, signal.SIGTERM))
    assert (first.code, second.code, second.stderr) == (130, 130, ""), first.stderr
    (folder,) = shop.runs()
    assert [process.code for process in run_processes(shop, "--resume")] == [0, 0]
    assert_equal_runs(folder, alone)
