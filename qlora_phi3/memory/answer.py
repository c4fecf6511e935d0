"""What `vram-check` answers: whether a recipe fits a card, how, and what lives there at the peak; in bytes.

The answer is plain data that goes to JSON and back, so that one that was worked out before is shown without torch. Working one
out imports torch and the libraries, inside the functions that do.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_phi3.cards import CARDS, NATIVE_BFLOAT16, Card
from qlora_phi3.device import Device, Holder
from qlora_phi3.errors import CannotTellError, ModelError
from qlora_phi3.memory.cache import read_versions
from qlora_phi3.memory.margin import Margin, read_margin

if TYPE_CHECKING:
    from qlora_phi3.architecture import Architecture
    from qlora_phi3.memory.lengths import Progress, RowsRead
    from qlora_phi3.memory.plan import Plan
    from qlora_phi3.memory.predict import Predictor
    from qlora_phi3.memory.rows import RowLengths
    from qlora_phi3.recipe.load import Recipe

Verdict = Literal["fits", "does_not_fit", "cannot_tell"]
#: The meter's names for what belongs to a phase and to nobody else, in the words of the field.
TENANTS = {
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
class Cure:
    """A change that lets the recipe take less, made after all those listed before it."""

    text: str
    #: What the recipe takes less; or where `widens`, what it may take more.
    saved_bytes: int
    #: Whether the recipe fits with this change and those before it.
    fits: bool
    widens: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
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
class Answer:
    """One recipe on one card."""

    verdict: Verdict
    model: str
    device: Device
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
    tenants: Mapping[str, int]
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
    cures: tuple[Cure, ...]
    #: Why no cure helps, where none does.
    hopeless: str
    rows: Rows
    #: By the cost model: an estimate to compare set-ups with, never measured.
    seconds_per_step: float
    tokens_per_second: float
    #: On the slowest and the fastest of the cards that the device stands for; on a single card the same three times.
    slowest_tokens_per_second: float
    fastest_tokens_per_second: float
    versions: Mapping[str, str]
    answered: str

    @property
    def fits(self) -> bool:
        """Whether prediction and margin are within the budget."""
        return self.verdict == "fits"


def as_json(answer: Answer) -> dict[str, Any]:
    """The answer as JSON takes it; `others` and `others_bytes` stand beside `device`."""
    saved = asdict(answer)
    others = saved["device"].pop("others")
    return {**saved, "others": others, "others_bytes": answer.device.others_bytes}


def from_json(saved: Mapping[str, Any]) -> Answer:
    """The answer that `as_json` wrote; ValueError where it is none."""
    try:
        fields = {key: value for key, value in saved.items() if key not in ("others", "others_bytes")}
        facts = dict(fields.pop("device"))
        facts.update({key: tuple(facts[key]) for key in ("compute_capability", "stands_for")})
        device = Device(**facts, others=tuple(Holder(**holder) for holder in saved["others"]))
        cures, rows = tuple(Cure(**cure) for cure in fields.pop("cures")), Rows(**fields.pop("rows"))
        return Answer(**fields, device=device, cures=cures, rows=rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no answer: {error}") from error


def compute_dtype_on(recipe: "Recipe", device: Device) -> str:
    """The type of the arithmetic, as a run on that card would choose it."""
    wanted = recipe.compute_dtype
    if wanted != "auto":
        return wanted
    return "bfloat16" if device.compute_capability >= NATIVE_BFLOAT16 else "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is asked about: all of it but the card."""

    #: Its local paths are absolute.
    recipe: "Recipe"
    config: Mapping[str, Any]
    architecture: "Architecture"
    rows: "RowsRead"


def read_subject(recipe: "Recipe", base_folder: Path, progress: "Progress") -> Subject:
    """Read the model's shapes and the rows' lengths, from this computer alone.

    Raises:
        CannotTellError: the config.json of a model on the hub is not here.
        UserError: there is no such folder, the model is no phi3, or it has less than the recipe asks of it.
    """
    from qlora_phi3.architecture import parse_architecture
    from qlora_phi3.memory.lengths import read_rows, without_network
    from qlora_phi3.memory.limits import check_limits
    from qlora_phi3.recipe.places import with_found_paths

    found = with_found_paths(recipe, base_folder)
    with without_network():
        config = _read_config(found)
        architecture = parse_architecture(dict(config), recipe.model.name)
        check_limits(recipe, architecture)
        if found.model.adapter is not None:
            from qlora_phi3.adapters.start import check_start

            check_start(Path(found.model.adapter), recipe.lora)
        rows = read_rows(found, base_folder, progress)
    return Subject(recipe=found, config=config, architecture=architecture, rows=rows)


def _read_config(recipe: "Recipe") -> dict[str, Any]:
    from qlora_phi3.architecture import OtherModelError, is_hub_id, nearest_known, read_config

    name = recipe.model.name
    try:
        return read_config(name, recipe.model.revision, prefer_shipped=True)
    except OtherModelError:
        raise
    except ModelError as error:
        if Path(name).is_dir() or not is_hub_id(name):
            raise
        nearest = nearest_known(name)
        meant = f"Did you mean {nearest}, whose shapes are known? " if nearest else ""
        raise CannotTellError(
            f"The shapes of {name} are not known: its config.json is not on this computer, and vram-check fetches nothing.",
            f"{meant}Fetch it: hf download {name} config.json",
        ) from error


class Bench:
    """Works answers about one subject out; what cards have in common is simulated once."""

    def __init__(self, subject: Subject, say: Callable[[str], None]) -> None:
        self.subject, self.say = subject, say
        self._predictors: dict[tuple[Any, ...], Predictor] = {}

    def predictor(self, device: Device) -> "Predictor":
        """The simulator for a card; cards between which no operator differs share one."""
        import torch

        from qlora_phi3.memory.predict import Predictor

        dtype, capability = compute_dtype_on(self.subject.recipe, device), alike(device.compute_capability)
        key = (dtype, capability)
        if key not in self._predictors:
            gc.freeze()  # the collector need not look through the libraries again: a tenth of a simulation's time
            self._predictors[key] = Predictor(
                self.subject.recipe,
                dict(self.subject.config),
                self.subject.architecture,
                compute_dtype=getattr(torch, dtype),
                capability=capability,
            )
        return self._predictors[key]

    def plan(self, predictor: "Predictor", rows: "RowLengths", device: Device, limit_bytes: int) -> "Plan":
        """The fastest set-up within a limit."""
        from qlora_phi3.memory.plan import Card, find_plan

        card = Card(
            limit_bytes=limit_bytes,
            tflops_16bit=device.tflops_16bit,
            bandwidth_bytes_per_second=device.bandwidth_bytes_per_second,
        )
        return find_plan(predictor, rows, card, progress=self.say)

    def answer(self, device: Device, budget_bytes: int, *, with_cures: bool = True) -> Answer:
        """Plan for a card, and where nothing fits say what would.

        Args:
            budget_bytes: what the run may take there, its margin counted.

        Raises:
            ModelError: the recipe's adapter does not fit the model.
        """
        from qlora_phi3.memory.cures import find_cures

        margin = read_margin(device.name)
        predictor, rows = self.predictor(device), self.subject.rows.lengths
        plan = self.plan(predictor, rows, device, margin.limit(budget_bytes))
        answer = self._put(device, plan, budget_bytes, margin)
        if plan.fits or not with_cures:
            return answer
        cures, hopeless = find_cures(self, device, plan, margin, budget_bytes)
        return replace(answer, cures=cures, hopeless=hopeless)

    def _put(self, device: Device, plan: "Plan", budget_bytes: int, margin: Margin) -> Answer:
        forecast, setup, profile = plan.forecast, plan.setup, plan.forecast.profile
        training, read = self.subject.recipe.training, self.subject.rows
        together = max(1, min(setup.micro_batch.max_tokens // training.max_length, training.batch_size))
        seconds = plan.cost.seconds
        tokens = sum(read.lengths.usual_step())
        cards = [card for card in CARDS if card.label in device.stands_for]
        speeds = [tokens / each for each in _seconds_on(cards, self.subject, plan)] or [tokens / seconds]
        return Answer(
            verdict="fits" if plan.fits else "does_not_fit",
            model=self.subject.recipe.model.name,
            device=device,
            budget_bytes=budget_bytes,
            margin_bytes=margin.beside(forecast.on_card_bytes),
            margin_share=margin.share,
            margin_runs=margin.runs if margin.widened else 0,
            peak_allocated_bytes=forecast.allocated_bytes,
            peak_reserved_bytes=forecast.reserved_bytes,
            peak_on_card_bytes=forecast.on_card_bytes,
            peak_phase=profile.peak_phase,
            tenants=name_tenants(profile.tenants),
            phases=dict(profile.phases),
            paged_bytes=profile.paged_bytes,
            host_bytes=profile.host_bytes,
            compute_dtype=compute_dtype_on(self.subject.recipe, device),
            batch_size=training.batch_size,
            micro_batch_size=together,
            gradient_accumulation_steps=math.ceil(training.batch_size / together),
            micro_batch_tokens=setup.micro_batch.max_tokens,
            num_micro_batches=plan.work.num_micro_batches,
            max_length=training.max_length,
            packing=training.packing,
            checkpoint_every_n_layers=setup.checkpoint_every,
            activation_offloading=setup.activation_offloading,
            optim=setup.optim,
            logits_tile_bytes=setup.logits_tile_bytes,
            mlp_tile_tokens=setup.mlp_tile_tokens,
            reasons=dict(plan.reasons),
            cures=(),
            hopeless="",
            rows=Rows(
                assumed=read.lengths.assumed,
                count=len(read.lengths.training),
                longest=read.lengths.longest,
                longest_evaluation=read.lengths.longest_evaluation,
                origin=read.origin,
                problem=read.problem,
            ),
            seconds_per_step=seconds,
            tokens_per_second=tokens / seconds,
            slowest_tokens_per_second=min(speeds),
            fastest_tokens_per_second=max(speeds),
            versions=read_versions(),
            answered=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )


def _seconds_on(cards: Sequence[Card], subject: Subject, plan: "Plan") -> Iterator[float]:
    """How long an optimizer step of a plan takes on each card, by the cost model."""
    from qlora_phi3.memory.cost import step_cost

    for card in cards:
        rates = {"tflops_16bit": card.tflops_16bit, "bandwidth_bytes_per_second": card.bandwidth_gb * 1e9}
        yield step_cost(subject.architecture, plan.setup, plan.work, **rates).seconds


def alike(compute_capability: tuple[int, int]) -> tuple[int, int]:
    """One capability for all that allocate the same: Ada and Ampere differ in no operator of a step."""
    return (8, 6) if compute_capability == (8, 9) else compute_capability


def name_tenants(tenants: Mapping[str, int]) -> dict[str, int]:
    """Largest first, in the words of the field."""
    named: dict[str, int] = {}
    for name, num_bytes in tenants.items():
        word = TENANTS.get(name, name)
        named[word] = named.get(word, 0) + num_bytes
    return dict(sorted(named.items(), key=lambda item: -item[1]))
