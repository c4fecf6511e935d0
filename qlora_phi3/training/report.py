"""Predicted and measured memory of a run, and report.json: what is known before the first step, and what is added at the end."""

import contextlib
import hashlib
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from qlora_phi3.adapters.peft_io import adapter_record
from qlora_phi3.data.report import DataReport
from qlora_phi3.errors import DeviceError, Interrupted, RunError
from qlora_phi3.hardware.gpu import Gpu, read_gpu
from qlora_phi3.memory.margin import record_error
from qlora_phi3.memory.report import read_versions
from qlora_phi3.recipe.load import recipe_as_toml
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.reporter import EvalRecord, OomRecord, StepRecord
from qlora_phi3.runfolder import RunFolder, read_metrics, write_report
from qlora_phi3.units import format_count, format_gib


def peak_memory_bytes(device: torch.device) -> int:
    """Peak allocated on a CUDA device, or the process's resident high-water mark on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What the run should need at its peak, in bytes; None where it was not asked."""

    allocated_bytes: int
    reserved_bytes: int | None
    on_card_bytes: int | None
    categories: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was taken at most so far, in bytes; None where the device cannot tell."""

    allocated_bytes: int | None
    reserved_bytes: int | None
    #: What this process took of the card, other programs as they were.
    on_card_bytes: int | None
    #: Resident memory of the process, where there is no card.
    process_bytes: int | None
    #: Tenant -> bytes, of what lasts from step to step.
    categories: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionCheck:
    """A prediction and what came of it."""

    predicted: Predicted | None
    measured: Measured

    @property
    def error(self) -> float | None:
        """Signed share by which the prediction of what is allocated was too high; None where one of the two is not known."""
        if self.predicted is None or not self.measured.allocated_bytes:
            return None
        return self.predicted.allocated_bytes / self.measured.allocated_bytes - 1

    def line(self) -> str:
        """For people."""
        parts = [] if self.predicted is None else [f"predicted {format_gib(self.predicted.allocated_bytes)} of tensors"]
        if self.measured.allocated_bytes:
            parts.append(f"measured {format_gib(self.measured.allocated_bytes)}")
            parts.append(f"reserved {format_gib(self.measured.reserved_bytes or 0)}")
        if self.measured.process_bytes:
            parts.append(f"the process took {format_gib(self.measured.process_bytes)}, libraries included")
        if self.error is not None:
            parts.append(f"the prediction was {abs(self.error):.1%} too {'high' if self.error >= 0 else 'low'}")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        predicted = None if self.predicted is None else asdict(self.predicted)
        return {"predicted": predicted, "measured": asdict(self.measured), "error": self.error}

    def remember(self, card: Gpu | None) -> None:
        """Keep the error of this card; it widens the margin of later plans there."""
        predicted = self.predicted and self.predicted.on_card_bytes
        if card is not None and predicted and self.measured.on_card_bytes:
            record_error(card.name, predicted, self.measured.on_card_bytes)


def measure_memory(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device, card: Gpu | None
) -> Measured:
    """What this process took at most until now.

    Args:
        card: as it was before; None on a CPU.
    """
    on_cuda = device.type == "cuda"
    return Measured(
        allocated_bytes=torch.cuda.max_memory_allocated(device) if on_cuda else None,
        reserved_bytes=torch.cuda.max_memory_reserved(device) if on_cuda else None,
        on_card_bytes=_taken_since(card),
        process_bytes=None if on_cuda else peak_memory_bytes(device),
        categories=_lasting(model, optimizer),
    )


def _taken_since(card: Gpu | None) -> int | None:
    if card is None:
        return None
    try:
        return card.free_bytes - read_gpu().free_bytes
    except DeviceError:
        return None


def _lasting(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """As the simulation names them."""
    categories = {"4-bit weights": 0, "quantization state": 0, "adapter": 0, "other weights": 0}
    for parameter in {parameter.data_ptr(): parameter for parameter in model.parameters()}.values():
        packed = parameter.dtype == torch.uint8
        name = "adapter" if parameter.requires_grad else "4-bit weights" if packed else "other weights"
        categories[name] += parameter.nbytes
        categories["quantization state"] += _scales_bytes(getattr(parameter, "quant_state", None))
    held = (value for state in optimizer.state.values() for value in state.values()) if optimizer is not None else ()
    state = {value.data_ptr(): value.nbytes for value in held if isinstance(value, torch.Tensor)}
    return {
        name: num_bytes
        for name, num_bytes in {**categories, "optimizer state": sum(state.values())}.items()
        if num_bytes
    }


def _scales_bytes(state: Any) -> int:
    if state is None:
        return 0
    own: int = sum(value.nbytes for value in (state.absmax, state.code, state.offset) if value is not None)
    return own + _scales_bytes(state.state2)


def first_report(
    recipe: Recipe,
    data: DataReport,
    *,
    name: str,
    device: torch.device,
    compute_dtype: torch.dtype,
    resume: RunFolder | None,
) -> dict[str, Any]:
    """The report of a run that starts; of one that is resumed, with its name, start and seconds until now.

    Args:
        name: of the recipe, as the run's directory has it.
        resume: the run that is resumed.

    Raises:
        RunError: the data are not those the resumed run started with.
    """
    was: dict[str, Any] = {}
    seconds = 0.0
    if resume is not None:
        was = resume.read_report()
        before = was.get("data", {}).get("sha256")
        if before != data.sha256:
            raise RunError(
                f"The data changed since {resume.path} began (sha256 {str(before)[:12]} -> {data.sha256[:12]}).",
                "Start a new run.",
            )
        # A session that was killed could not report its seconds; its steps and evaluations are in metrics.jsonl.
        records = read_metrics(resume)
        measured = float(sum(record.get("step_seconds", record.get("seconds", 0.0)) for record in records))
        seconds = max(was.get("seconds", 0.0), measured)
    return {
        "status": "running",
        "name": was.get("name", name),
        "started": was.get("started", time.strftime("%Y-%m-%dT%H:%M:%S%z")),
        "seconds": seconds,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_sha256": hashlib.sha256(recipe_as_toml(recipe).encode()).hexdigest(),
        "data": asdict(data),
        "seed": recipe.training.seed,
        "device": describe_device(device),
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
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
    return f"This computer is busy (load {load:.1f} on {format_count(cores, 'core')}), which slows the training down as well."


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {format_count(torch.get_num_threads(), 'thread')}"


@contextmanager
def failure_reported(folder: RunFolder, report: Mapping[str, Any], started: float) -> Iterator[None]:
    """Write into report.json how a run ended if it fails or is interrupted.

    Args:
        started: time.perf_counter() at the start of this session.
    """
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        reason = str(error) or type(error).__name__
        seconds = report["seconds"] + time.perf_counter() - started
        with contextlib.suppress(RunError):  # the disk may still be full, and the first error is the one to report
            write_report(folder, {**report, "status": status, "error": reason, "seconds": seconds})
        raise


def last_report(
    folder: RunFolder, report: Mapping[str, Any], prediction_check: PredictionCheck, *, steps: int, started: float
) -> dict[str, Any]:
    """The report of a finished run, whose adapter is written.

    Measurements come from metrics.jsonl, which earlier sessions of the run wrote too.
    """
    records = read_metrics(folder)
    losses = [(record["step"], record["eval_loss"]) for record in records if record["kind"] == EvalRecord.kind]
    peaks = [record["peak_memory_bytes"] for record in records if record["kind"] == StepRecord.kind]
    return {
        **report,
        "status": "done",
        "steps": steps,
        "adapter": adapter_record(folder.adapter),
        "eval_loss_before": losses[0][1] if losses and losses[0][0] == 0 else None,
        "eval_loss_after": losses[-1][1] if losses else None,
        "seconds": report["seconds"] + time.perf_counter() - started,
        "peak_memory_bytes": max(peaks, default=0),
        "memory": prediction_check.as_dict(),
        "out_of_memory": sum(record["kind"] == OomRecord.kind for record in records),
    }
