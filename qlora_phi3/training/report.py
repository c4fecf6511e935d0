"""report.json: what is known of a run before its first step, and what is added when it ends."""

import contextlib
import hashlib
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from qlora_phi3.adapters.files import adapter_record
from qlora_phi3.dataset.prepare import DataReport
from qlora_phi3.errors import Interrupted, RunError
from qlora_phi3.recipe.load import Recipe, recipe_as_toml
from qlora_phi3.runfolder import RunFolder, read_metrics, write_report
from qlora_phi3.sizes import format_count
from qlora_phi3.training.reckoning import Reckoning

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "qlora-phi3")


def first_report(
    recipe: Recipe,
    data: DataReport,
    *,
    name: str,
    device: torch.device,
    compute_dtype: torch.dtype,
    resume: RunFolder | None,
) -> dict[str, Any]:
    """The report of a run that is about to start, or to go on: then its name, start and seconds so far are kept.

    Args:
        name: what the run is filed under.

    Raises:
        RunError: the data are not those the resumed run began with.
    """
    was = resume.read_report() if resume is not None else {}
    if resume is not None and (before := was.get("data", {}).get("sha256")) != data.sha256:
        raise RunError(
            f"The data changed since {resume.path} began (sha256 {str(before)[:12]} -> {data.sha256[:12]}).",
            "Start a new run.",
        )
    return {
        "status": "running",
        "name": was.get("name", name),
        "started": was.get("started", time.strftime("%Y-%m-%dT%H:%M:%S%z")),
        "seconds": max(was.get("seconds", 0.0), 0.0 if resume is None else _measured_seconds(resume)),
        "recipe": recipe.model_dump(mode="json"),
        "recipe_sha256": hashlib.sha256(recipe_as_toml(recipe).encode()).hexdigest(),
        "data": asdict(data),
        "seed": recipe.training.seed,
        "device": describe_device(device),
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def _measured_seconds(folder: RunFolder) -> float:
    """What the steps and evaluations took that are written down: a session that was killed could not report its own."""
    seconds = (record.get("step_seconds", record.get("seconds", 0.0)) for record in read_metrics(folder))
    return float(sum(seconds))


def describe_load() -> str | None:
    """What to say where others keep the processor busy that is to train; None where there is nothing to say."""
    cores, load = psutil.cpu_count() or 1, psutil.getloadavg()[0]
    if torch.cuda.is_available() or torch.get_num_threads() == 1 or load <= cores:
        return None
    return f"This computer is busy (load {load:.1f} on {format_count(cores, 'core')}), which slows the training down as well."


def describe_device(device: torch.device) -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {format_count(torch.get_num_threads(), 'thread')}"


@contextmanager
def failure_reported(folder: RunFolder, report: Mapping[str, Any], started: float) -> Iterator[None]:
    """Write down how a run ended that does not reach its end; `started` is its time.perf_counter()."""
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        reason = str(error) or type(error).__name__
        seconds = report["seconds"] + time.perf_counter() - started
        with contextlib.suppress(RunError):  # the disk may still be full; the error itself is what to tell
            write_report(folder, {**report, "status": status, "error": reason, "seconds": seconds})
        raise


def last_report(
    folder: RunFolder, report: Mapping[str, Any], reckoning: Reckoning, *, steps: int, started: float
) -> dict[str, Any]:
    """The report of a finished run, whose adapter is written.

    What was measured is taken from metrics.jsonl, which earlier sessions wrote too.
    """
    records = read_metrics(folder)
    losses = [(record["step"], record["eval_loss"]) for record in records if record["kind"] == "eval"]
    peaks = [record["peak_memory_bytes"] for record in records if record["kind"] == "train"]
    return {
        **report,
        "status": "done",
        "steps": steps,
        "adapter": adapter_record(folder.adapter),
        "eval_loss_before": losses[0][1] if losses and losses[0][0] == 0 else None,
        "eval_loss_after": losses[-1][1] if losses else None,
        "seconds": report["seconds"] + time.perf_counter() - started,
        "peak_memory_bytes": max(peaks, default=0),
        "memory": reckoning.as_dict(),
        "out_of_memory": sum(record["kind"] == "oom" for record in records),
    }
