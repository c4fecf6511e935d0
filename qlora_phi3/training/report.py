"""Predicted and measured memory of a run, and report.json: what is known before the first step, and what is added at the end."""

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from qlora_phi3.adapters.peft_io import adapter_record
from qlora_phi3.errors import Interrupted, RunError
from qlora_phi3.files import sha256_file
from qlora_phi3.hardware.gpu import read_load
from qlora_phi3.memory.cuda_path import context_bytes
from qlora_phi3.memory.report import OPTIMIZER_STATE, QUANTIZATION_STATE, MemoryReport, read_versions
from qlora_phi3.memory.tracker import parameter_category, quantization_tensors
from qlora_phi3.model.quantized import checksum_of, describe_device
from qlora_phi3.recipe.load import recipe_as_toml
from qlora_phi3.reporter import DivergenceRecord, EvalRecord, OomRecord, StepRecord
from qlora_phi3.runfolder import RunFolder, read_metrics, write_report
from qlora_phi3.training.prepare import RunContext
from qlora_phi3.training.processes import count_processes
from qlora_phi3.units import format_count, format_gib, format_percent


def peak_memory_bytes(device: torch.device) -> int:
    """Peak allocated on a CUDA device, or the process's resident high-water mark on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionCheck:
    """A prediction and what came of it."""

    predicted: MemoryReport
    measured: MemoryReport

    @property
    def error(self) -> float | None:
        """Signed share by which the prediction of what is allocated was too high; None on a CPU, where that is not measured."""
        measured_bytes = self.measured.allocated_bytes
        return self.predicted.allocated_bytes / measured_bytes - 1 if measured_bytes else None

    def line(self) -> str:
        """For people."""
        parts = [f"predicted {format_gib(self.predicted.allocated_bytes)} of tensors"]
        if self.measured.allocated_bytes:
            parts.append(f"measured {format_gib(self.measured.allocated_bytes)}")
            parts.append(f"reserved {format_gib(self.measured.reserved_bytes)}")
        if self.measured.process_bytes:
            parts.append(f"the process took {format_gib(self.measured.process_bytes)}, libraries included")
        if self.error is not None:
            parts.append(f"the prediction was {format_percent(abs(self.error), 1)} too {'high' if self.error >= 0 else 'low'}")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        return {"predicted": self.predicted.as_dict(), "measured": self.measured.as_dict(), "error": self.error}


def measure_memory(model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device) -> MemoryReport:
    """What this process took at most until now, and what its model and optimizer hold, by category."""
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        sizes[parameter_category(name, parameter)] += parameter.nbytes
        sizes[QUANTIZATION_STATE] += sum(tensor.nbytes for tensor in quantization_tensors(parameter))
    states = [] if optimizer is None else [state for held in optimizer.state.values() for state in held.values()]
    tensors = {state.data_ptr(): state for state in states if isinstance(state, torch.Tensor)}
    paged_bytes = sum(state.nbytes for state in tensors.values() if getattr(state, "is_paged", False))
    sizes[OPTIMIZER_STATE] += sum(state.nbytes for state in tensors.values()) - paged_bytes
    on_cuda = device.type == "cuda"
    return MemoryReport(
        allocated_bytes=torch.cuda.max_memory_allocated(device) if on_cuda else 0,
        reserved_bytes=torch.cuda.max_memory_reserved(device) if on_cuda else 0,
        on_gpu_bytes=_own_gpu_bytes(device) if on_cuda else 0,
        cache_flushes=torch.cuda.memory_stats(device).get("num_alloc_retries", 0) if on_cuda else 0,
        by_category={name: size for name, size in sizes.most_common() if size},
        by_phase={},
        resident_bytes=sizes.total(),
        paged_bytes=paged_bytes,
        process_bytes=0 if on_cuda else peak_memory_bytes(device),
    )


def _own_gpu_bytes(device: torch.device) -> int:
    """The peak of this process alone, as NVML shows it: other programs take and free memory meanwhile.

    The driver counts the segments and the context; where it shows no process (Windows, containers), the context is computed.
    """
    properties, reserved = torch.cuda.get_device_properties(device), torch.cuda.memory_reserved(device)
    load = read_load()
    used = load and load.own_bytes
    if used is None or used <= reserved:
        used = reserved + context_bytes(properties.multi_processor_count)
    return torch.cuda.max_memory_reserved(device) + used - reserved


def _computed_on(context: RunContext) -> dict[str, str]:
    """The device, with the number of processes, and the dtype of the matmuls, as report.json has them."""
    several = f" in {count_processes()} processes" if count_processes() > 1 else ""
    dtype = str(context.compute_dtype).removeprefix("torch.")
    return {"device": describe_device(context.device) + several, "compute_dtype": dtype}


def compare_with_former(context: RunContext, resume: RunFolder) -> None:
    """Warn where a resumed run began on another device or in another dtype; RunError where it began with other data."""
    was = resume.read_report()
    before, now = was.get("data", {}).get("sha256"), context.data.report.sha256
    if before != now:
        raise RunError(
            f"The data changed since {resume.path} began (sha256 {str(before)[:12]} -> {now[:12]}).", "Start a new run."
        )
    for key, value in _computed_on(context).items():
        if was.get(key, value) != value:
            line = f"The run began with {was[key]} and goes on with {value}: the result is not equal bit for bit."
            context.reporter.warning(line)


def first_report(context: RunContext, folder: RunFolder) -> dict[str, Any]:
    """The report of a run that starts; of one that is resumed, with its name, start and seconds until now."""
    was = folder.read_report() if folder.report.is_file() else {}
    started = was.get("started", folder.started.isoformat())
    # A session that was killed could not report its seconds; its steps and evaluations are in metrics.jsonl.
    lasted = [record.get("step_seconds", record.get("seconds")) for record in read_metrics(folder.metrics)]
    measured = float(sum(value for value in lasted if isinstance(value, float)))
    return {
        "status": "running",
        "name": was.get("name", folder.path.parent.name),
        "started": started,
        "training_began": was.get("training_began", started),
        "seconds": max(was.get("seconds", 0.0), measured),
        "trained_sha256_before": was.get("trained_sha256_before"),
        "recipe": context.recipe.model_dump(mode="json"),
        "recipe_sha256": hashlib.sha256(recipe_as_toml(context.recipe).encode()).hexdigest(),
        "data": asdict(context.data.report),
        "seed": context.recipe.training.seed,
        **_computed_on(context),
        "versions": run_versions(),
    }


def run_versions() -> dict[str, str]:
    """The versions of Python and of the libraries that a run depends on."""
    return {**read_versions(), "trl": version("trl")}


def describe_load() -> str | None:
    """A warning where other programs keep the processor busy that is to train; None where there is nothing to warn of."""
    cores, load = psutil.cpu_count() or 1, psutil.getloadavg()[0]
    if torch.cuda.is_available() or torch.get_num_threads() == 1 or load <= cores:
        return None
    return f"This computer is busy (load {load:.1f} on {format_count(cores, 'core')}), so that the training is slower too."


def row_name(row: Mapping[str, Any], sources: Sequence[str]) -> str:
    """The data file and the number of a row in it; "A row" where that is not known."""
    is_named = "source" in row and row["source"] < len(sources)
    return f"{sources[row['source']]}:{row['source_row']}" if is_named else "A row"


def damaged_files(folder: RunFolder, report: Mapping[str, Any]) -> list[str]:
    """The files of a finished run that are missing or have not the checksum in its report; older runs recorded two."""
    recorded = report.get("files") or {f"adapter/{name}": value for name, value in report.get("adapter", {}).items()}
    return [
        name
        for name, checksum in recorded.items()
        if not (folder.path / name).is_file() or sha256_file(folder.path / name) != checksum
    ]


@contextmanager
def failure_reported(folder: RunFolder, report: Mapping[str, Any], started: float) -> Iterator[None]:
    """Write into report.json how a run ended if it fails or is interrupted; `started` is of time.perf_counter()."""
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        reason = str(error) or type(error).__name__
        seconds = report["seconds"] + time.perf_counter() - started
        with suppress(RunError):  # the disk may still be full, and the first error is the one to report
            divergences = [record for record in read_metrics(folder.metrics) if record["kind"] == DivergenceRecord.kind]
            ended = {"status": status, "error": reason, "seconds": seconds, "divergences": divergences}
            write_report(folder, {**report, **ended})
        raise


def trained_digest(model: nn.Module) -> str:
    """SHA-256 over the bytes of every trained parameter."""
    return checksum_of(parameter for parameter in model.parameters() if parameter.requires_grad)


def describe_unlearned(model: nn.Module, report: Mapping[str, Any]) -> str | None:
    """In one sentence, why the adapter of a finished run learned nothing or less than it should; None where it learned.

    `report` has the digest from before the first step, and the losses on the held-out rows.
    """
    before, after = report["eval_loss_before"], report["eval_loss_after"]
    if report["trained_sha256_before"] == trained_digest(model):
        return "The adapter learned nothing: no trained parameter changed in any step."
    matrices = {name: parameter for name, parameter in model.named_parameters() if ".lora_B." in name}
    zero = [name.partition(".lora_B.")[0] for name, parameter in matrices.items() if not parameter.any()]
    if zero:
        return f"The adapter learned nothing in {len(zero)} of {len(matrices)} layers: lora_B is zero, first in {zero[0]}."
    if before is not None and before == after:
        return f"The adapter learned nothing that is measured: the held-out loss is {after:.4f}, bit for bit as before."
    return None


def last_report(
    folder: RunFolder, report: Mapping[str, Any], prediction_check: PredictionCheck, *, steps: int, started: float
) -> dict[str, Any]:
    """The report of a finished run; its figures come from metrics.jsonl, which earlier sessions wrote too."""
    records = read_metrics(folder.metrics)
    losses = [(record["step"], record["eval_loss"]) for record in records if record["kind"] == EvalRecord.kind]
    peaks = [record["peak_memory_bytes"] for record in records if record["kind"] == StepRecord.kind]
    results = (*sorted(folder.adapter.iterdir()), folder.base, folder.held_out, folder.metrics)
    return {
        **report,
        "status": "done",
        "steps": steps,
        "adapter": adapter_record(folder.adapter),
        "files": {path.relative_to(folder.path).as_posix(): sha256_file(path) for path in results},
        "eval_loss_before": losses[0][1] if losses and losses[0][0] == 0 else None,
        "eval_loss_after": losses[-1][1] if losses else None,
        "seconds": report["seconds"] + time.perf_counter() - started,
        "peak_memory_bytes": max(peaks, default=0),
        "memory": prediction_check.as_dict(),
        "divergences": [record for record in records if record["kind"] == DivergenceRecord.kind],
        "out_of_memory": sum(record["kind"] == OomRecord.kind for record in records),
    }
