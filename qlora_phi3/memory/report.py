"""The memory of a training step, predicted or measured, and the result of `vram-check`, as plain data for JSON; no torch."""

import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from qlora_phi3.hardware.gpu import Gpu, GpuProcess
from qlora_phi3.units import MIB

#: Categories of memory. Those of the first group exist from step to step, so that they can be measured as well as predicted.
QUANTIZED_WEIGHTS = "4-bit weights"
QUANTIZATION_STATE = "quantization state"
UNQUANTIZED_WEIGHTS = "unquantized weights"
EMBEDDING_AND_HEAD = "embedding and head"
ADAPTER = "adapter"
OPTIMIZER_STATE = "optimizer state"

GRADIENTS = "gradients"
ACTIVATIONS = "activations"
CHECKPOINTED_INPUTS = "checkpointed layer inputs"
RECOMPUTED_LAYER = "layer being recomputed"
ACTIVATION_GRADIENTS = "gradients of activations"
DEQUANTIZED_WEIGHT = "dequantized weight"
LOGITS_TILE = "logits tile"
ATTENTION_MASK = "attention mask"
ATTENTION_WORKSPACE = "attention workspace"
CUBLAS_WORKSPACE = "cuBLAS workspace"
OTHER = "other"

#: Versions of these decide what is predicted.
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """The memory of one optimizer step with loading, saving and evaluation, in bytes.

    A size of 0 among the first three and the last is not known, and null in JSON.
    """

    #: Most bytes that tensors hold at once.
    allocated_bytes: int = 0
    #: Most bytes that PyTorch's allocator holds for them.
    reserved_bytes: int = 0
    #: The same with the CUDA context and what the kernels load: the process as NVML shows it.
    on_gpu_bytes: int = 0
    #: Times that the allocator must empty its cache, and wait for the GPU, to stay below its limit.
    cache_flushes: int = 0
    #: Category -> bytes at the peak, largest first; of a measurement, the categories that exist from step to step.
    by_category: Mapping[str, int]
    #: Phase (load, update, forward, backward, save, evaluation) -> most bytes allocated; empty for a measurement.
    by_phase: Mapping[str, int]
    peak_phase: str = ""
    #: Allocated between two steps.
    resident_bytes: int
    #: Optimizer state in managed memory, which the driver moves between GPU and host; in none of the figures above.
    paged_bytes: int = 0
    #: Most bytes of host memory that replace GPU memory: paged state and offloaded activations.
    host_bytes: int = 0
    #: Most resident bytes of the process, measured on a CPU.
    process_bytes: int = 0
    #: (storage id, bytes) for an allocation, (storage id, 0) for its end, in order; not in JSON.
    trace: tuple[tuple[int, int], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All but the trace, for JSON."""
        saved = asdict(replace(self, trace=()))
        del saved["trace"]
        unknown = ("allocated_bytes", "reserved_bytes", "on_gpu_bytes", "process_bytes")
        return saved | {name: saved[name] or None for name in unknown}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A change that makes the recipe need less, on top of all those listed before it."""

    text: str
    #: What the recipe needs less; or where `widens`, what it may take more.
    saved_bytes: int
    #: Whether the recipe fits with this change and those before it.
    fits: bool
    widens: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSummary:
    """The rows that a plan was made for."""

    #: Every row counts as `max_length` tokens, as the data could not be read.
    assumed: bool
    count: int
    longest: int
    longest_evaluation: int
    #: Where the lengths come from, in one line.
    origin: str
    #: Why a run would stop at its data, in one line; empty where no reason is known.
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VramReport:
    """The result of `vram-check` for one recipe on one GPU."""

    verdict: Literal["fits", "does_not_fit"]
    model: str
    device: Gpu
    budget_bytes: int
    margin_bytes: int
    margin_share: float
    #: Runs on this GPU that the margin was computed from, where it is wider than the default; else 0.
    margin_runs: int
    #: Without its trace.
    memory: MemoryReport
    compute_dtype: str
    #: The 4-bit format of a base whose files are quantized; None where the run quantizes it.
    stored: str | None
    batch_size: int
    #: The most of them that one of several processes has on its GPU; for a single process all.
    rows_per_gpu: int
    #: Rows of `max_length` tokens in one forward pass, and such passes in an optimizer step.
    micro_batch_size: int
    gradient_accumulation_steps: int
    micro_batch_tokens: int
    #: Forward passes of a typical step with its real rows.
    num_micro_batches: int
    max_length: int
    packing: bool
    checkpoint_every_n_layers: int
    keep_attention: bool
    activation_offloading: bool
    optim: str
    logits_tile_bytes: int
    mlp_tile_tokens: int
    #: Key of the recipe -> why the plan gives it this value.
    reasons: Mapping[str, str]
    suggestions: tuple[Suggestion, ...] = ()
    #: Why no suggestion makes it fit, where none does.
    no_fix_reason: str = ""
    rows: RowSummary
    #: By the cost model: an estimate to compare plans with, never measured. `step` is of `cost.describe_step`.
    seconds_per_step: float
    step: Mapping[str, Any]
    seconds_per_1000_rows: float
    #: Of the recipe's run with its evaluations, without what comes before the first step; None where the data could not be read.
    epochs: float | None = None
    total_steps: int | None = None
    run_seconds: float | None = None
    tokens_per_second: float
    #: On the slowest and the fastest of the GPUs that `device` represents; for a single GPU the same three times.
    slowest_tokens_per_second: float
    fastest_tokens_per_second: float
    versions: Mapping[str, str]
    created: str

    @property
    def step_rows(self) -> str:
        """The rows of an optimizer step, in words."""
        shared = "" if self.rows_per_gpu == self.batch_size else f" ({self.rows_per_gpu} of them at most on each GPU)"
        return f"{self.batch_size} rows an optimizer step{shared}"

    @property
    def fits(self) -> bool:
        """Whether prediction and margin are within the budget."""
        return self.verdict == "fits"


def as_json(report: VramReport) -> dict[str, Any]:
    """A report for JSON; `processes` and `other_processes_bytes` are next to `device`."""
    saved = asdict(report)
    processes = saved["device"].pop("processes")
    del saved["device"]["visible_devices"]
    saved["memory"] = report.memory.as_dict()
    return {**saved, "processes": processes, "other_processes_bytes": report.device.other_processes_bytes}


def from_json(saved: Mapping[str, Any]) -> VramReport:
    """The report that `as_json` of the same version wrote."""
    fields = {key: value for key, value in saved.items() if key not in ("processes", "other_processes_bytes")}
    device = fields["device"] | {key: tuple(fields["device"][key]) for key in ("compute_capability", "represents")}
    processes = tuple(GpuProcess(**process) for process in saved["processes"])
    fields["device"] = Gpu(**device, processes=processes)
    known: dict[str, Any] = {name: value for name, value in fields["memory"].items() if value is not None}
    fields["memory"] = MemoryReport(**known)
    fields["suggestions"] = tuple(Suggestion(**suggestion) for suggestion in fields["suggestions"])
    fields["rows"] = RowSummary(**fields["rows"])
    return VramReport(**fields)


def planned_keys(report: VramReport) -> list[tuple[str, str, int | bool | str, str]]:
    """Table, key, value and reason of all keys that the plan decides, as a person would write them into a recipe."""
    every, tile = report.checkpoint_every_n_layers, report.logits_tile_bytes
    chosen: list[tuple[str, str, int | bool | str]] = [
        ("memory", "micro_batch_tokens", report.micro_batch_tokens),
        ("training", "gradient_checkpointing", every > 0),
        *([("memory", "checkpoint_every_n_layers", every), ("memory", "keep_attention", report.keep_attention)] if every else []),
        ("training", "activation_offloading", report.activation_offloading),
        ("training", "optim", report.optim),
        ("memory", "mlp_tile_tokens", report.mlp_tile_tokens),
        ("memory", "logits_tile", f"{tile // 1024}KiB" if tile % MIB else f"{tile // MIB}MiB"),
    ]
    return [(table, key, value, report.reasons[key]) for table, key, value in chosen]


def read_versions() -> dict[str, str]:
    """The versions that a prediction depends on, our own among them, read without importing a library."""
    versions = {"python": platform.python_version(), **dict.fromkeys(("qlora-phi3", *LIBRARIES), "unknown")}
    for name in ("qlora-phi3", *LIBRARIES):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
