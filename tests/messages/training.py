"""Messages of a run: what it refuses before its first step, what stops it, and what it writes."""

import errno
import json
import os
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from message_table import Message
from transformers import TrainerState

from qlora_phi3.errors import RecipeError, RunError
from qlora_phi3.execution import ExecutionPlan, MicroBatchPlan
from qlora_phi3.files import disk_errors
from qlora_phi3.recipe.load import check_processes, load_recipe
from qlora_phi3.recipe.schema import Quantization, Training
from qlora_phi3.runfolder import LOCK_PID, RunFolder, create_run_folder, find_run, lock_run, write_report
from qlora_phi3.step import MicroBatchMemoryError
from qlora_phi3.training.artifacts import record_base
from qlora_phi3.training.divergence import DivergedError, DivergenceGuard, check_evaluation
from qlora_phi3.training.oom import MemoryGuard
from qlora_phi3.training.prepare import check_schedule
from qlora_phi3.training.processes import connected
from qlora_phi3.training.report import compare_with_former
from qlora_phi3.training.run import _optimizer_memory_errors, check_resumable
from qlora_phi3.training.trackers import Trackers, check_trackers
from qlora_phi3.training.trainer import Phi3Trainer

CPU = torch.device("cpu")


def diverge(loss=1.0, norm=1.0):
    """Show the guard the loss and the gradient norm of a first step."""
    guard = DivergenceGuard(None, recovers=True)
    guard.loss, guard.grad_norm = loss, norm
    guard.on_pre_optimizer_step(None, SimpleNamespace(global_step=0), None, optimizer=None)


def give_up():
    """End a run after its last recovery."""
    guard = DivergenceGuard(None, recovers=True)
    guard.failure, guard.last_good.step = "The run diverged 6 times, the last time in step 9: the loss is nan.", 5
    guard.raise_failure(Path("runs/mine/adapter"))


def resume(shop, status="interrupted", **changes):
    """Resume a run whose [lora] was changed."""
    recipe = load_recipe(shop.write())
    tables = recipe.model_dump(mode="json")
    tables["training" if "max_steps" in changes else "lora"].update(changes)
    write_report(RunFolder(shop.path), {"status": status, "recipe": tables})
    check_resumable(RunFolder(shop.path), recipe, SimpleNamespace(warning=print))


def resume_with_other_data(shop):
    write_report(RunFolder(shop.path), {"data": {"sha256": "a" * 64}})
    context = SimpleNamespace(data=SimpleNamespace(report=SimpleNamespace(sha256="b" * 64)))
    compare_with_former(context, RunFolder(shop.path))


def row_that_does_not_fit(phase):
    """Run out of memory with one row, whatever is tried."""
    plan = MicroBatchPlan(max_tokens=100, max_rows=8, packing=True, longrope_boundary=None)
    execution = ExecutionPlan(
        micro_batch=plan, evaluation=plan, checkpoint_every=0, activation_offloading=False, optim="adamw_torch"
    )
    guard = MemoryGuard(
        torch.nn.Linear(1, 1),
        execution=execution,
        device=CPU,
        reporter=SimpleNamespace(oom=lambda record: None),
        sources=("chats.jsonl",),
        apply=lambda execution: None,
    )

    def run_pass(batch):
        raise MicroBatchMemoryError(0, "CUDA out of memory.")

    rows = [{"input_ids": [1] * 70, "labels": [1] * 70, "source": 0, "source_row": 3}]
    guard.compute(rows, run_pass, phase=phase, step=5)


def optimizer_without_memory():
    with _optimizer_memory_errors(CPU):
        raise torch.OutOfMemoryError("CUDA out of memory")


def full_disk(shop):
    with disk_errors(shop.path / "checkpoint-6", hint="{cause}, then go on with --resume; earlier checkpoints remain."):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def file_in_place_of(shop, *names):
    path = shop.path.joinpath(*names)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine", encoding="utf-8")
    return shop.path / "runs"


def run_without_report(shop):
    (shop.path / "recipe.toml").write_text("", encoding="utf-8")
    find_run(shop.path, "mine", str(shop.path))


def report_that_holds(shop, value):
    (shop.path / "report.json").write_text(json.dumps(value), encoding="utf-8")
    find_run(shop.path, "mine", str(shop.path))


def lock_twice(shop, pid=None):
    folder = RunFolder(shop.path)
    with lock_run(folder):
        if pid is not None:
            (shop.path / LOCK_PID).write_text(pid, encoding="utf-8")
        with lock_run(folder):
            pass


def record_onto_damage(shop):
    (shop.path / "base.json").write_text("{}", encoding="utf-8")
    config = SimpleNamespace(_commit_hash=None)
    base = SimpleNamespace(config=config, device=CPU, named_parameters=lambda: [])
    model = SimpleNamespace(get_base_model=lambda: base)
    options = {"quantization": Quantization(), "compute_dtype": torch.float32}
    record_base(model, RunFolder(shop.path), name="mine", **options)


def resume_with_fewer_steps(shop):
    """Four steps, and then two are asked for."""
    checkpoint = shop.path / "checkpoint-4"
    checkpoint.mkdir()
    TrainerState(global_step=4).save_to_json(str(checkpoint / "trainer_state.json"))
    trainer = SimpleNamespace(args=None, get_train_dataloader=lambda: None, set_initial_training_values=lambda *arguments: (2,))
    Phi3Trainer.load_finished(trainer, checkpoint)


def connect_to_nobody():
    """As one of two processes, without the address of the other."""
    with connected(0, 2):
        pass


TRACKERS = "qlora_phi3.training.trackers."


def without_trackers(name):
    with mock.patch(f"{TRACKERS}get_available_reporting_integrations", list):
        check_trackers(Training(report_to=name))


def wandb_without_a_key():
    wandb = SimpleNamespace(api=SimpleNamespace(api_key=None))
    with (
        mock.patch(f"{TRACKERS}get_available_reporting_integrations", return_value=["wandb"]),
        mock.patch.dict("sys.modules", wandb=wandb),
        mock.patch.dict("os.environ", WANDB_MODE="online"),
    ):
        check_trackers(Training(report_to="wandb"))


def start_broken_tracker(shop):
    def fail(name):
        raise ValueError("no server")

    trackers = Trackers(Training(report_to="tensorboard"), SimpleNamespace(), RunFolder(shop.path), None)
    with mock.patch(f"{TRACKERS}get_reporting_integration_callbacks", fail):
        trackers.start(SimpleNamespace(run_name="mine"), None, None)


MESSAGES = [
    Message(
        name="processes-cannot-connect",
        trigger=lambda shop: connect_to_nobody(),
        error=RunError,
        exit_code=2,
        says=("cannot connect", "MASTER_ADDR"),
        hint="Start all of them again",
    ),
    Message(
        name="more-processes-than-rows",
        trigger=lambda shop: check_processes(Training(batch_size=4), 5),
        error=RecipeError,
        exit_code=2,
        says=("5 processes", "a step of 4 rows"),
        hint="[training] batch_size",
    ),
    Message(
        name="tracker-not-installed",
        trigger=lambda shop: check_trackers(Training(report_to="neptune")),
        error=RecipeError,
        exit_code=2,
        says=("[training] report_to", "neptune"),
        hint="metrics.jsonl",
    ),
    Message(
        name="tracker-extra-not-installed",
        trigger=lambda shop: without_trackers("wandb"),
        error=RecipeError,
        exit_code=2,
        says=("[training] report_to", "wandb"),
        hint="pip install 'qlora-phi3[wandb]'",
    ),
    Message(
        name="tracker-without-a-key",
        trigger=lambda shop: wandb_without_a_key(),
        error=RecipeError,
        exit_code=2,
        says=("[training] report_to", "wandb", "no API key"),
        hint="WANDB_MODE=offline",
    ),
    Message(
        name="tracker-cannot-start",
        trigger=start_broken_tracker,
        error=RecipeError,
        exit_code=2,
        says=("[training] report_to", "tensorboard", "no server"),
        hint="metrics.jsonl",
    ),
    Message(
        name="schedule-settings-do-not-fit",
        trigger=lambda shop: check_schedule(Training(lr_scheduler_kwargs={"nose": 1})),
        error=RecipeError,
        exit_code=2,
        says=("[training] lr_scheduler_kwargs", "cosine", "nose"),
        hint="Correct or delete it",
    ),
    Message(
        name="held-out-loss-not-finite",
        trigger=lambda shop: check_evaluation(float("nan"), 7),
        error=DivergedError,
        exit_code=2,
        says=("step 7", "nan"),
        hint="[training] learning_rate",
    ),
    Message(
        name="loss-not-finite",
        trigger=lambda shop: diverge(loss=float("nan")),
        error=DivergedError,
        exit_code=2,
        says=("Step 1", "nan"),
        hint="[training] learning_rate",
    ),
    Message(
        name="diverged-too-often",
        trigger=lambda shop: give_up(),
        error=DivergedError,
        exit_code=2,
        says=("6 times", "step 9", "step 5", "runs/mine/adapter"),
        hint="[training] learning_rate",
    ),
    Message(
        name="gradient-not-finite",
        trigger=lambda shop: diverge(norm=float("inf")),
        error=DivergedError,
        exit_code=2,
        says=("Step 1", "inf"),
        hint="[training] learning_rate",
    ),
    Message(
        name="gradient-zero",
        trigger=lambda shop: diverge(norm=0.0),
        error=DivergedError,
        exit_code=2,
        says=("step 1", "zero"),
        hint="answers",
    ),
    Message(
        name="row-does-not-fit",
        trigger=lambda shop: row_that_does_not_fit("training"),
        error=RunError,
        exit_code=2,
        says=("chats.jsonl:3", "70 tokens", "step 5", "CUDA out of memory"),
        hint="smaller [training] max_length than 70",
    ),
    Message(
        name="evaluation-row-does-not-fit",
        trigger=lambda shop: row_that_does_not_fit("evaluation"),
        error=RunError,
        exit_code=2,
        says=("chats.jsonl:3", "the evaluation after step 5"),
        hint="--resume",
    ),
    Message(
        name="optimizer-out-of-memory",
        trigger=lambda shop: optimizer_without_memory(),
        error=RunError,
        exit_code=2,
        says=("optimizer's update: CUDA out of memory",),
        hint="[lora] r",
    ),
    Message(
        name="checkpoint-disk-full",
        trigger=full_disk,
        error=RunError,
        exit_code=2,
        says=("checkpoint-6", "No space left on device"),
        hint="Free disk space, then go on with --resume",
    ),
    Message(
        name="run-done",
        trigger=lambda shop: resume(shop, status="done"),
        error=RunError,
        exit_code=2,
        says=("is done",),
        hint="--resume",
    ),
    Message(
        name="resume-other-steps",
        trigger=lambda shop: resume(shop, max_steps=3),
        error=RunError,
        exit_code=2,
        says=("max_steps 3 -> -1",),
        hint="--set training.max_steps=-1",
    ),
    Message(
        name="resume-other-recipe",
        trigger=lambda shop: resume(shop, r=9, lora_alpha=3),
        error=RunError,
        exit_code=2,
        says=("[lora] r, [lora] lora_alpha",),
        hint="qlora-phi3 run",
    ),
    Message(
        name="resume-unreadable-recipe",
        trigger=lambda shop: resume(shop, r="many"),
        error=RunError,
        exit_code=2,
        says=("report.json", "lora.r"),
        hint="Start a new run",
    ),
    Message(
        name="resume-other-data",
        trigger=resume_with_other_data,
        error=RunError,
        exit_code=2,
        says=("aaaaaaaaaaaa -> bbbbbbbbbbbb",),
        hint="Start a new run",
    ),
    Message(
        name="no-run-to-resume",
        trigger=lambda shop: find_run(shop.path / "runs", "mine", None),
        error=RunError,
        exit_code=2,
        says=("mine", "runs"),
        hint="--resume",
    ),
    Message(
        name="no-such-run",
        trigger=lambda shop: find_run(shop.path / "runs", "mine", "nowhere"),
        error=RunError,
        exit_code=2,
        says=("nowhere", "runs"),
        hint="train one",
    ),
    Message(
        name="run-without-report",
        trigger=run_without_report,
        error=RunError,
        exit_code=2,
        says=("report.json",),
        hint="qlora-phi3 run",
    ),
    Message(
        name="report-no-object",
        trigger=lambda shop: report_that_holds(shop, [1]),
        error=RunError,
        exit_code=2,
        says=("report.json",),
        hint="runs/<recipe>/<time>",
    ),
    Message(
        name="report-flipped",
        trigger=lambda shop: report_that_holds(shop, {"seconds": 2, "sha256": "0" * 64}),
        error=RunError,
        exit_code=2,
        says=("report.json", "not what the run wrote"),
        hint="Copy it again",
    ),
    Message(
        name="report-damaged",
        trigger=lambda shop: report_that_holds(shop, {"seconds": "soon"}),
        error=RunError,
        exit_code=2,
        says=("report.json", "seconds", "soon"),
        hint="Start a new run",
    ),
    Message(
        name="run-locked",
        trigger=lock_twice,
        error=RunError,
        exit_code=2,
        says=(str(os.getpid()),),
        hint="--resume",
    ),
    Message(
        name="run-locked-by-an-unknown-process",
        trigger=lambda shop: lock_twice(shop, pid=""),
        error=RunError,
        exit_code=2,
        says=("Another process",),
        hint="Wait for it",
    ),
    Message(
        name="base-record-damaged",
        trigger=record_onto_damage,
        error=RunError,
        exit_code=2,
        says=("base.json", "tensors"),
        hint="Start a new run",
    ),
    Message(
        name="resume-beyond-the-last-step",
        trigger=resume_with_fewer_steps,
        error=RunError,
        exit_code=2,
        says=("checkpoint-4", "2"),
        hint="[training] max_steps",
    ),
    Message(
        name="recipe-directory-is-a-file",
        trigger=lambda shop: create_run_folder(file_in_place_of(shop, "runs", "mine"), "mine", datetime.now()),
        error=RunError,
        exit_code=2,
        says=("mine",),
        hint="[training] output_dir",
    ),
    Message(
        name="output-directory-is-a-file",
        trigger=lambda shop: create_run_folder(file_in_place_of(shop, "runs"), "mine", datetime.now()),
        error=RunError,
        exit_code=2,
        says=("runs",),
        hint="Check that the directory exists and that you may write to it, or choose another [training] output_dir",
    ),
]
