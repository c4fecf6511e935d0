"""The remedies for memory that runs out, and their order; and complete runs that recover."""

import gc
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from out_of_memory import MESSAGE, RunOutAt
from safetensors.torch import load_file
from tiny_model import relative_difference
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from workshop import Workshop, read_json, read_lines

from qlora_phi3.errors import RunError, is_out_of_memory
from qlora_phi3.execution import SMALLEST_MLP_TILE_TOKENS, ExecutionPlan, MicroBatchPlan
from qlora_phi3.objectives import ObjectiveOutput
from qlora_phi3.reporter import record_as_json
from qlora_phi3.step import MicroBatchMemoryError
from qlora_phi3.training.oom import MemoryGuard, restore_execution_plan

PLAN = MicroBatchPlan(max_tokens=100, max_rows=8, packing=True, longrope_boundary=None)
SETUP = ExecutionPlan(micro_batch=PLAN, evaluation=PLAN, checkpoint_every=0, activation_offloading=False, optim="adamw_torch")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_collect():
    """Each retry collects garbage; the objects of the libraries are left out, which takes most of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(MESSAGE),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("bad allocation"),
        MemoryError(),
    ],
)
def test_memory_that_ran_out_is_known_by_whatever_name(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        torch.linalg.LinAlgError("singular"),
    ],
)
def test_another_error_is_not_taken_for_it(error):
    assert not is_out_of_memory(error)


class Bench:
    """A guard over a model of one weight, whose pass fails where the test says."""

    def __init__(self, execution=SETUP):
        self.records, self.applied, self.passes = [], [], []
        self.guard = MemoryGuard(
            nn.Linear(1, 1),
            execution=execution,
            device=CPU,
            reporter=SimpleNamespace(oom=self.records.append),
            sources=("chats.jsonl", "more.jsonl"),
            apply=lambda plan: self.applied.append(
                replace(plan, micro_batch=execution.micro_batch, evaluation=execution.evaluation)
            ),
        )

    def compute(self, lengths, fails, *, step=1, phase="training"):
        """`fails(groups, passes so far)` gives the micro-batch that fails, or None."""

        self.passes.clear()

        def run_pass(batch):
            micro = fails(batch.row_indices, len(self.passes))
            self.passes.append(batch.row_indices)
            if micro is not None:
                raise MicroBatchMemoryError(micro, MESSAGE)
            return ObjectiveOutput(loss=torch.zeros(()), metrics={})

        rows = [
            {"input_ids": [1] * length, "labels": [1] * length, "source": 1, "source_row": 10 + row}
            for row, length in enumerate(lengths)
        ]
        return self.guard.compute(rows, run_pass, phase=phase, step=step)

    def measures(self):
        return [record.remedy for record in self.records]


def fail_times(times):
    return lambda groups, passes: 0 if passes < times else None


def fail_always(groups, passes):
    return 0


def test_first_the_same_again_then_smaller_pieces_then_offloading():
    bench = Bench()
    batch, _ = bench.compute([40, 30, 20, 10], fail_times(4))
    assert bench.measures() == ["again", "split", "split", "offload"]
    assert bench.passes[0] == bench.passes[1] == ((0, 1, 2, 3),)
    assert [max(map(len, groups)) for groups in bench.passes] == [4, 4, 2, 2, 2]
    assert batch.row_indices[0] == (0,)
    assert bench.applied == [replace(SETUP, checkpoint_every=1)]
    assert [record.after.max_tokens for record in bench.records] == [100, 50, 40, 40]
    assert [record.before.max_tokens for record in bench.records] == [100, 100, 50, 40]
    assert bench.guard.plans == {"training": replace(PLAN, max_tokens=40), "evaluation": PLAN}
    assert bench.guard.num_recovered == 4


def test_a_split_is_by_the_micro_batch_that_failed_and_not_by_the_largest():
    bench = Bench()
    fails = lambda groups, passes: groups.index((2, 3)) if (2, 3) in groups else None  # noqa: E731
    bench.compute([60, 50, 30, 12], fails)
    assert bench.passes[0] == ((0, 2), (1, 3))
    bench = Bench(replace(SETUP, micro_batch=replace(PLAN, max_tokens=60)))
    bench.compute([60, 50, 30, 12], fails)
    assert bench.passes[0] == ((0,), (1,), (2, 3))
    assert bench.guard.plans["training"].max_tokens == 30


def test_a_lowered_plan_stays_and_a_second_accident_shortly_after_the_first_is_none():
    bench = Bench()
    bench.compute([50, 50], fail_times(1), step=1)
    bench.compute([50, 50], fail_times(1), step=21)
    assert bench.measures() == ["again", "split"]
    bench.compute([50, 50], fail_times(0), step=22)
    assert bench.passes[-1] == ((0,), (1,))
    other = Bench()
    other.compute([50, 50], fail_times(1), step=1)
    other.compute([50, 50], fail_times(1), step=22)
    assert other.measures() == ["again", "again"]


def test_a_row_that_fails_alone_with_everything_tried_stops_the_run_by_its_name():
    bench = Bench()
    with pytest.raises(RunError) as caught:
        bench.compute([70, 20], fail_always, step=5)
    assert bench.measures() == ["again", "split", "offload"]
    for part in ("more.jsonl:10", "70 tokens", "step 5 ran out of memory 4 times", "Tried to allocate 20.00 MiB"):
        assert part in caught.value.message
    assert "max_length than 70" in caught.value.hint


def test_what_is_kept_of_attention_is_given_up_with_the_first_remedy_for_a_row_alone():
    bench = Bench(replace(SETUP, checkpoint_every=1, keep_attention=True))
    bench.compute([70], fail_times(2), step=5)
    assert bench.measures() == ["again", "offload"]
    assert bench.applied == [replace(SETUP, checkpoint_every=1)]


def test_where_offloading_is_on_already_a_row_alone_gets_one_more_try():
    bench = Bench(replace(SETUP, checkpoint_every=1, activation_offloading=True))
    bench.compute([70], fail_times(1), step=5)
    bench.compute([70], fail_times(1), step=6)
    assert bench.measures() == ["again", "again"]
    with pytest.raises(RunError, match="memory 2 times"):
        bench.compute([70], fail_always, step=7)
    assert bench.applied == []


def test_a_row_of_many_tokens_gets_its_mlps_in_tiles_before_the_run_stops():
    bench, length = Bench(), SMALLEST_MLP_TILE_TOKENS + 1
    with pytest.raises(RunError, match="step 5 ran out of memory 4 times"):
        bench.compute([length], fail_always, step=5)
    assert bench.measures() == ["again", "offload", "tile"]
    leanest = replace(SETUP, checkpoint_every=1, mlp_tile_tokens=SMALLEST_MLP_TILE_TOKENS)
    assert bench.applied == [replace(SETUP, checkpoint_every=1), leanest]
    assert restore_execution_plan(SETUP, [record_as_json(record) for record in bench.records], CPU) == leanest
    short = Bench()
    with pytest.raises(RunError):
        short.compute([length - 1], fail_always)
    assert short.measures() == ["again", "offload"]
    pinned = Bench(replace(leanest, mlp_tile_tokens=256))
    with pytest.raises(RunError):
        pinned.compute([length], fail_always)
    assert pinned.measures() == ["again"]


def test_an_evaluation_of_a_row_of_many_tokens_may_take_tiles_as_well():
    bench = Bench()
    bench.compute([SMALLEST_MLP_TILE_TOKENS + 1], fail_times(2), phase="evaluation", step=3)
    assert bench.measures() == ["again", "tile"]
    assert bench.applied == [replace(SETUP, mlp_tile_tokens=SMALLEST_MLP_TILE_TOKENS)]


def test_an_evaluation_lowers_its_own_plan_and_offloads_nothing():
    bench = Bench()
    bench.compute([50, 50], fail_times(2), phase="evaluation", step=3)
    assert bench.guard.plans == {"training": PLAN, "evaluation": replace(PLAN, max_tokens=50)}
    with pytest.raises(RunError, match="the evaluation after step 3 ran out"):
        bench.compute([50, 50], fail_always, phase="evaluation", step=3)
    assert bench.applied == []


def test_another_error_passes_through_and_is_not_tried_again():
    bench = Bench()

    def fails(groups, passes):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        bench.compute([50], fails)
    assert bench.records == []


def test_a_resumed_run_begins_with_what_earlier_sessions_had_come_to():
    bench = Bench()
    bench.compute([40, 30, 20, 10], fail_times(3))
    records = [{"kind": "train", "step": 1}, *(record_as_json(record) for record in bench.records)]
    lowered = replace(SETUP, micro_batch=replace(PLAN, max_tokens=40))
    assert restore_execution_plan(SETUP, records, CPU) == lowered
    assert (
        restore_execution_plan(replace(SETUP, micro_batch=replace(PLAN, max_tokens=7)), records, CPU).micro_batch.max_tokens == 7
    )
    bench.compute([40], fail_times(1), step=2)
    records += [record_as_json(bench.records[-1])]
    assert bench.records[-1].remedy == "offload"
    assert restore_execution_plan(SETUP, records, CPU) == replace(lowered, checkpoint_every=1)
    assert restore_execution_plan(SETUP, records, torch.device("cuda")).activation_offloading
    assert restore_execution_plan(SETUP, [], CPU) == SETUP


def test_a_record_says_in_one_line_where_memory_ran_out_and_what_is_done():
    bench = Bench()
    bench.compute([40, 30, 20, 10], fail_times(4))
    bench.compute([40], fail_times(1), phase="evaluation", step=0)
    lines = [record.as_line() for record in bench.records]
    assert [line.split(":")[0] for line in lines] == ["Step 1"] * 4 + ["Evaluation after step 0"]
    assert "4 rows of 100 tokens. " in lines[0]
    assert "at most 50 tokens" in lines[1]
    assert "2 rows of 50 tokens. " in lines[2]
    assert "every layer" in lines[3]
    assert len(set(lines)) == 5
    on_gpu = replace(bench.records[0], allocated_bytes=4 * 2**30)
    assert "4 rows of 100 tokens, with 4.00 GiB allocated. " in on_gpu.as_line()
    assert record_as_json(on_gpu)["before"] == asdict(PLAN)


def run_out_in_training(monkeypatch, mode):
    """Every forward and backward of a run stands under `mode`."""
    from qlora_phi3.training import trainer

    run = trainer.forward_backward

    def under_mode(*args, **kwargs):
        with mode:
            return run(*args, **kwargs)

    monkeypatch.setattr(trainer, "forward_backward", under_mode)
    return mode


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


TABLES = {"training": {"save_steps": 100, "batch_size": 4}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, base):
    """The folder of a finished run, and the operator calls of a step of it."""
    shop = Workshop(tmp_path_factory.mktemp("undisturbed"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.path)
        mode = run_out_in_training(patch, RunOutAt())
        shop.write(**TABLES)
        result = shop.run()
    assert result.exit_code == 0, result.stderr
    return shop.runs()[-1], mode.calls // 10


def test_a_run_that_ran_out_of_memory_now_and_then_ends_in_the_same_adapter(shop, undisturbed, monkeypatch):
    folder, calls = undisturbed
    run_out_in_training(monkeypatch, RunOutAt({calls // 2, 4 * calls, 4 * calls + 900, 9 * calls}))
    shop.write(**TABLES)
    result = shop.run()
    assert result.exit_code == 0, result.stderr
    other = shop.runs()[-1]
    assert relative_difference(adapter(folder), adapter(other)) < 1e-5
    lines, expected = read_lines(other / "metrics.jsonl"), read_lines(folder / "metrics.jsonl")
    events = [line for line in lines if line["kind"] == "oom"]
    assert [event["remedy"] for event in events][:2] == ["again", "split"]
    assert [event["reason"] for event in events] == [MESSAGE] * 4
    measured = [line for line in lines if line["kind"] != "oom"]
    for line, other_line in zip(measured, expected, strict=True):
        for key in line.keys() & {"step", "loss", "eval_loss", "grad_norm", "tokens", "supervised_tokens", "rows"}:
            assert line[key] == pytest.approx(other_line[key], rel=1e-5)
    assert read_json(other / "report.json")["out_of_memory"] == 4
    assert read_json(folder / "report.json")["out_of_memory"] == 0
    notes = [line for line in result.stderr.splitlines() if "memory ran out" in line]
    assert len(notes) == 4
    assert notes[0].startswith("Note: Step 1: ")


def test_a_run_stopped_by_a_row_has_saved_everything_and_goes_on_with_the_lowered_plan(shop, undisturbed, monkeypatch):
    folder, calls = undisturbed
    shop.write(**TABLES)
    with monkeypatch.context() as patch:
        run_out_in_training(patch, RunOutAt(range(6 * calls + calls // 2, 10**9)))
        result = shop.run()
    assert result.exit_code == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "chats.jsonl:" in error
    assert "step 7" in error
    (stopped,) = shop.runs()
    assert read_json(stopped / "report.json")["status"] == "failed"
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["checkpoint-6"]
    events = [line for line in read_lines(stopped / "metrics.jsonl") if line["kind"] == "oom"]
    mode = run_out_in_training(monkeypatch, RunOutAt())
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    assert [line for line in read_lines(stopped / "metrics.jsonl") if line["kind"] == "oom"] == events
    assert mode.calls > 4 * calls * 2  # of four steps, in single rows
    assert read_json(stopped / "report.json")["out_of_memory"] == len(events)
    assert relative_difference(adapter(folder), adapter(stopped)) < 1e-5


def test_an_evaluation_that_ran_out_of_memory_gives_the_same_loss(shop, undisturbed, monkeypatch):
    from qlora_phi3.training import trainer

    mode, evaluate = RunOutAt({100, 200}), trainer.evaluate

    def under_mode(*args, **kwargs):
        with mode:
            return list(evaluate(*args, **kwargs))

    monkeypatch.setattr(trainer, "evaluate", under_mode)
    shop.write(**TABLES)
    result = shop.run()
    assert result.exit_code == 0, result.stderr
    losses, expected = (
        [line["eval_loss"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "eval"]
        for folder in (shop.runs()[-1], undisturbed[0])
    )
    assert losses == pytest.approx(expected, rel=1e-6)
    assert "Note: Evaluation after step 0: " in result.stderr


def test_memory_that_runs_out_in_the_optimizer_is_one_line(shop, monkeypatch):
    usual = torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        if isinstance(optimizer.param_groups[0]["params"][0].grad, FakeTensor):
            return usual(optimizer, *args, **kwargs)  # the plan's simulation
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    shop.write(**TABLES)
    result = shop.run()
    assert result.exit_code == 2
    assert "optimizer's update: " in result.stderr.splitlines()[-1]
