"""Run directories as training leaves them, written without training."""

import json
from dataclasses import asdict
from pathlib import Path

from qlora_phi3.data.report import DataReport, RowCount
from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.memory.report import MemoryReport
from qlora_phi3.reporter import DivergenceRecord, EvalRecord, OomRecord, StepRecord, record_as_json
from qlora_phi3.runfolder import RunFolder

PLAN = MicroBatchPlan(max_tokens=100, max_rows=8, packing=True, longrope_boundary=None)


def step_record(step, loss=2.0, **changes):
    return StepRecord(
        **{
            "step": step, "epoch": step / 10, "loss": loss, "token_accuracy": 0.5, "learning_rate": 1e-3 / step, "grad_norm": 1.5,
            "rows": 4, "tokens": 100, "supervised_tokens": 40, "step_seconds": 0.5, "tokens_per_second": 200.0,
            "peak_memory_bytes": 3 * 2**30,
        } | changes
    )  # fmt: skip


def evaluation_record(step, loss):
    return EvalRecord(step=step, eval_loss=loss, eval_token_accuracy=0.4, supervised_tokens=50, seconds=1.0)


def memory_record():
    return OomRecord(
        step=3, phase="training", remedy="split", rows=4, tokens=400, before=PLAN, after=PLAN, allocated_bytes=2**30,
        free_bytes=0, reason="CUDA out of memory",
    )  # fmt: skip


def divergence_record(rows=("chats.jsonl:7", "chats.jsonl:9")):
    return DivergenceRecord(step=5, reason="the loss is nan", good_step=4, rows=rows, learning_rate_factor=0.5)


def data_report(**changes):
    skipped = (RowCount("no answer", 2, ("chats.jsonl:3", "chats.jsonl:8")),)
    return DataReport(
        **{
            "sources": ("chats.jsonl",), "formats": ("messages",), "chat_template": "phi3", "max_length": 128, "rows_read": 50,
            "rows_kept": 48, "train_rows": 40, "evaluation_rows": 8, "skipped": skipped, "notes": (), "unread": (), "repeated": 0,
            "truncated": 5, "fully_truncated": RowCount("nothing left to learn after truncation"), "tokens": 1000,
            "supervised_tokens": 400, "longest_row": 128, "sha256": "d" * 64, "split_seed": 42, "eval_indices": (1, 2),
        } | changes
    )  # fmt: skip


def sample(**changes):
    answers = {
        "base": {"text": "a stone", "tokens": 128, "ended": False},
        "tuned": {"text": "the sea", "tokens": 4, "ended": True},
    }
    return {"row": "chats.jsonl:11", "prompt": "What is blue?", "expected": "the sea"} | answers | changes


def write_run(path, *, records=None, samples=(), recipe=None, **report):
    """A run of ten steps whose loss falls by 0.1 a step, from 4.0 to 2.5 on the held-out rows."""
    folder = RunFolder(Path(path))
    folder.checkpoints.mkdir(parents=True)
    folder.adapter.mkdir()
    (folder.adapter / "adapter_model.safetensors").write_bytes(bytes(3 * 2**20))
    folder.recipe.write_text('[model]\nname = "phi"\n', encoding="utf-8")
    if records is None:
        records = [evaluation_record(0, 4.0), *(step_record(n, 4 - n / 10) for n in range(1, 11)), evaluation_record(10, 2.5)]
    lines = [json.dumps(record_as_json(record)) for record in records]
    folder.metrics.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if samples:
        folder.samples.write_text(json.dumps({"samples": list(samples)}), encoding="utf-8")
    predicted = MemoryReport(
        allocated_bytes=2**31, reserved_bytes=5 * 2**29, by_category={"4-bit weights": 2**30, "activations": 2**29},
        by_phase={"load": 2**30, "forward": 2**31}, peak_phase="forward", resident_bytes=2**30,
    )  # fmt: skip
    measured = MemoryReport(allocated_bytes=2**31, by_category={"4-bit weights": 2**30}, by_phase={}, resident_bytes=2**30)
    whole = {
        "status": "done", "name": "mine", "started": "2026-11-29T07:00:00+00:00", "seconds": 83.0, "steps": 10,
        "recipe": recipe or {"model": {"name": "phi"}, "lora": {"r": 8}}, "recipe_sha256": "e" * 64,
        "data": asdict(data_report()),
        "device": "NVIDIA Test", "compute_dtype": "bfloat16", "versions": {"torch": "2.13.0"}, "eval_loss_before": 4.0,
        "eval_loss_after": 2.5, "files": {"adapter/adapter_model.safetensors": "f" * 64},
        "memory": {"predicted": predicted.as_dict(), "measured": measured.as_dict(), "error": 0.0}, "unlearned": None,
    }  # fmt: skip
    folder.report.write_text(json.dumps(whole | report), encoding="utf-8")
    return folder
