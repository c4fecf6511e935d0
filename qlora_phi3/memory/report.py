"""What a simulated step needs, as plain numbers; no torch.

The plan of an answer as keys of a recipe, as a person would write them.
"""

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from qlora_phi3.hardware.gpu import Gpu, GpuProcess
from qlora_phi3.units import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """The memory of one optimizer step with everything around it, in bytes."""

    #: Most bytes alive at once, and in which phase.
    peak_bytes: int
    peak_phase: str
    #: What lived at the peak, largest first.
    categories: Mapping[str, int]
    #: The peak of each phase: load, update, forward, backward, save, evaluation.
    phases: Mapping[str, int]
    #: Alive between two steps.
    resident_bytes: int
    #: Optimizer state in managed memory, which the driver moves between card and computer; not in the figures above.
    paged_bytes: int
    #: Most bytes of the computer's memory that stand in for the card's: paged state and offloaded activations.
    host_bytes: int
    #: (storage id, bytes) for an allocation, (storage id, 0) for its end, in order.
    trace: tuple[tuple[int, int], ...]


Verdict = Literal["fits", "does_not_fit", "cannot_tell"]


#: The meter's names for what belongs to a phase and to nobody else, in the words of the field.
CATEGORY_NAMES = {
    "load": "unquantized weights",
    "other weights": "unquantized weights",
    "update": "optimizer's temporaries",
    "forward": "activations",
    "backward": "layer in the backward pass",
    "evaluation": "activations",
    "save": "other",
    "end": "other",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A change that lets the recipe take less, made after all those listed before it."""

    text: str
    #: What the recipe takes less; or where `widens`, what it may take more.
    saved_bytes: int
    #: Whether the recipe fits with this change and those before it.
    fits: bool
    widens: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSummary:
    """What was planned for."""

    #: Every row counts as `max_length` tokens, as the data could not be read.
    assumed: bool
    count: int
    longest: int
    longest_evaluation: int
    #: Where the lengths come from, in one line.
    origin: str
    #: Why a run would stop at its data, in one line; empty where nothing is known against them.
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VramReport:
    """One recipe on one card."""

    verdict: Verdict
    model: str
    device: Gpu
    budget_bytes: int
    margin_bytes: int
    margin_share: float
    #: The margin is wider than usual, as this many runs on the card were held against their prediction; else 0.
    margin_runs: int
    #: Bytes in tensors; what PyTorch's allocator holds for them; that and the CUDA context, as NVML shows this process.
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_on_card_bytes: int
    peak_phase: str
    #: What lives at the peak, largest first; they add up to the allocated bytes.
    categories: Mapping[str, int]
    phases: Mapping[str, int]
    #: Optimizer state in managed memory, and all that lies in the computer's memory instead of the card's.
    paged_bytes: int
    host_bytes: int
    compute_dtype: str
    batch_size: int
    #: Rows of `max_length` tokens in one forward pass, and such passes in an optimizer step.
    micro_batch_size: int
    gradient_accumulation_steps: int
    micro_batch_tokens: int
    #: Forward passes of a usual step with its real rows.
    num_micro_batches: int
    max_length: int
    packing: bool
    checkpoint_every_n_layers: int
    activation_offloading: bool
    optim: str
    logits_tile_bytes: int
    mlp_tile_tokens: int
    #: Key of the recipe -> why the plan gives it this value.
    reasons: Mapping[str, str]
    suggestions: tuple[Suggestion, ...]
    #: Why no cure helps, where none does.
    no_fix_reason: str
    rows: RowSummary
    #: By the cost model: an estimate to compare set-ups with, never measured.
    seconds_per_step: float
    tokens_per_second: float
    #: On the slowest and the fastest of the cards that the device stands for; on a single card the same three times.
    slowest_tokens_per_second: float
    fastest_tokens_per_second: float
    versions: Mapping[str, str]
    created: str

    @property
    def fits(self) -> bool:
        """Whether prediction and margin are within the budget."""
        return self.verdict == "fits"


def as_json(report: VramReport) -> dict[str, Any]:
    """The answer as JSON takes it; `processes` and `other_processes_bytes` stand beside `device`."""
    saved = asdict(report)
    processes = saved["device"].pop("processes")
    return {**saved, "processes": processes, "other_processes_bytes": report.device.other_processes_bytes}


def from_json(saved: Mapping[str, Any]) -> VramReport:
    """The answer that `as_json` wrote; ValueError where it is none."""
    try:
        fields = {key: value for key, value in saved.items() if key not in ("processes", "other_processes_bytes")}
        facts = dict(fields.pop("device"))
        facts.update({key: tuple(facts[key]) for key in ("compute_capability", "represents")})
        device = Gpu(**facts, processes=tuple(GpuProcess(**process) for process in saved["processes"]))
        suggestions, rows = (
            tuple(Suggestion(**hint) for hint in fields.pop("suggestions")),
            RowSummary(**fields.pop("rows")),
        )
        return VramReport(**fields, device=device, suggestions=suggestions, rows=rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no answer: {error}") from error


def merge_categories(categories: Mapping[str, int]) -> dict[str, int]:
    """Largest first, in the words of the field."""
    named: dict[str, int] = {}
    for name, num_bytes in categories.items():
        word = CATEGORY_NAMES.get(name, name)
        named[word] = named.get(word, 0) + num_bytes
    return dict(sorted(named.items(), key=lambda item: -item[1]))


@dataclass(frozen=True, slots=True)
class PlannedKey:
    """A key, its value, and why it has it."""

    table: str
    key: str
    value: int | bool | str
    reason: str


def planned_keys(report: VramReport) -> Iterator[PlannedKey]:
    """All that the plan decides."""
    every, tile = report.checkpoint_every_n_layers, report.logits_tile_bytes
    chosen: list[tuple[str, str, int | bool | str]] = [
        ("memory", "micro_batch_tokens", report.micro_batch_tokens),
        ("training", "gradient_checkpointing", every > 0),
        *([("memory", "checkpoint_every_n_layers", every)] if every else []),
        ("training", "activation_offloading", report.activation_offloading),
        ("training", "optim", report.optim),
        ("memory", "mlp_tile_tokens", report.mlp_tile_tokens),
        ("memory", "logits_tile", f"{tile // 1024}KiB" if tile % MIB else f"{tile // MIB}MiB"),
    ]
    for table, key, value in chosen:
        yield PlannedKey(table, key, value, report.reasons[key])


LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")


def read_versions() -> dict[str, str]:
    """The versions that an answer depends on, our own among them, read without importing anything."""
    found = {"qlora-phi3": _installed_version("qlora-phi3")} | {name: _installed_version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **found}


def _installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
