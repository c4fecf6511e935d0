"""The set-up a run takes, and what it should need: planned for the card, or the usual one of a CPU."""

from dataclasses import dataclass
from typing import Any

import torch

from qlora_phi3.architecture import Architecture
from qlora_phi3.dataset.pack import MicroBatchPlan
from qlora_phi3.dataset.prepare import PreparedData
from qlora_phi3.device import Device
from qlora_phi3.memory.margin import budget_of, limit_of
from qlora_phi3.memory.plan import Card, Plan, find_plan, load_of
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.rows import RowLengths, read_lengths
from qlora_phi3.memory.simulate import simulate
from qlora_phi3.recipe.load import Recipe
from qlora_phi3.setup import USUAL_LOGITS_TILE_BYTES, Setup
from qlora_phi3.sizes import format_gib, parse_size
from qlora_phi3.training.arguments import choose_optimizer
from qlora_phi3.training.listener import Listener

#: Tokens of a micro-batch where there is no plan and neither the recipe nor a longer row asks for more: enough to keep the
#: matmuls busy beside the dequantization, which costs the same whatever the micro-batch holds. On CPU (SmolLM2-135M, bf16,
#: Zen 5) 512 is as fast as 1,024, at a peak of 1.06-1.10 GiB instead of 1.11-1.35.
USUAL_MICRO_BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What the run should need at its peak, in bytes; None where it was not asked."""

    allocated_bytes: int
    reserved_bytes: int | None
    on_card_bytes: int | None
    tenants: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """How a run is laid out, and what that should need; `predicted` is None where nobody asked."""

    setup: Setup
    predicted: Predicted | None


def choose_setup(
    recipe: Recipe,
    config: dict[str, Any],
    architecture: Architecture,
    data: PreparedData,
    card: Device | None,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    listener: Listener,
) -> Chosen:
    """The plan for a card; where there is none the usual set-up, simulated if the recipe wants a rehearsal.

    Args:
        card: as it was before this process took anything of it.
    """
    if card is not None:
        plan = plan_for_card(recipe, config, architecture, data, card, compute_dtype=compute_dtype, listener=listener)
        return Chosen(setup=plan.setup, predicted=predicted_by(plan))
    if device.type == "cpu" and recipe.memory.budget != "auto":
        listener.warn("[memory] budget is for graphics cards: a run on a CPU does not heed it.")
    setup = usual_setup(recipe, architecture, device)
    if not wants_rehearsal(recipe, device) or device.type != "cpu":
        return Chosen(setup=setup, predicted=None)
    predicted = predict_on_cpu(recipe, config, architecture, data, setup, compute_dtype=compute_dtype)
    return Chosen(setup=setup, predicted=predicted)


def wants_rehearsal(recipe: Recipe, device: torch.device) -> bool:
    """As the recipe says; "auto": on a GPU."""
    wanted = recipe.memory.rehearsal
    return device.type == "cuda" if wanted == "auto" else wanted


def measured_lengths(data: PreparedData, batch_size: int) -> RowLengths:
    """The lengths of the rows a run trains and measures on."""
    held_out = [] if data.evaluation is None else data.evaluation["length"]
    return read_lengths(list(data.train["length"]), list(held_out), batch_size)


def plan_for_card(
    recipe: Recipe,
    config: dict[str, Any],
    architecture: Architecture,
    data: PreparedData,
    device: Device,
    *,
    compute_dtype: torch.dtype,
    listener: Listener,
) -> Plan:
    """The fastest set-up that fits; told as one line, and as a warning where nothing does."""
    predictor = Predictor(
        recipe, config, architecture, compute_dtype=compute_dtype, capability=device.compute_capability
    )
    card = Card(
        limit_bytes=limit_of(device, budget_of(recipe, device)),
        tflops_16bit=device.tflops_16bit,
        bandwidth_bytes_per_second=device.bandwidth_bytes_per_second,
    )
    lengths = measured_lengths(data, recipe.training.batch_size)
    listener.progress("Planning the memory", 0, None)
    plan = find_plan(predictor, lengths, card, progress=lambda _: None)
    listener.progress("Planning the memory", 1, 1)
    needed = format_gib(plan.forecast.on_card_bytes)
    listener.say(f"Plan: {in_words(plan.setup)}; {needed} of {format_gib(card.limit_bytes)} on the card")
    if not plan.fits:
        listener.warn(
            "That should not fit; qlora-phi3 vram-check says what to change. The run tries it nevertheless: nothing is lost."
        )
    return plan


def in_words(setup: Setup) -> str:
    """A set-up as a person reads it."""
    every = setup.checkpoint_every
    recomputed = {0: "nothing recomputed", 1: "every layer recomputed"}.get(every, f"one layer in {every} recomputed")
    offloaded = ", activations offloaded" if setup.activation_offloading else ""
    tiled = f", MLPs in tiles of {setup.mlp_tile_tokens:,} tokens" if setup.mlp_tile_tokens else ""
    return f"{setup.micro_batch.max_tokens:,} tokens at once, {recomputed}{offloaded}{tiled}, {setup.optim}"


def usual_setup(recipe: Recipe, architecture: Architecture, device: torch.device) -> Setup:
    """The set-up of a CPU, and of a card nothing is known of: all layers recomputed, no more tokens than keep it busy."""
    training, memory = recipe.training, recipe.memory
    every = 1 if memory.checkpoint_every_n_layers == "auto" else memory.checkpoint_every_n_layers
    tile = memory.logits_tile
    return Setup(
        micro_batch=_layout(recipe, architecture, training.micro_batch_size),
        evaluation=_layout(recipe, architecture, training.per_device_eval_batch_size),
        checkpoint_every=every if training.gradient_checkpointing else 0,
        activation_offloading=training.activation_offloading is True and device.type != "cpu",  # it is there already
        optim=choose_optimizer(training, device),
        logits_tile_bytes=USUAL_LOGITS_TILE_BYTES if tile == "auto" else parse_size(tile),
        mlp_tile_tokens=0 if memory.mlp_tile_tokens == "auto" else memory.mlp_tile_tokens,
    )


def _layout(recipe: Recipe, architecture: Architecture, rows: int | str | None) -> MicroBatchPlan:
    """`rows` a micro-batch where the recipe fixes them, else as many as fit the wanted or usual tokens."""
    training, wanted = recipe.training, recipe.memory.micro_batch_tokens
    usual = max(USUAL_MICRO_BATCH_TOKENS, training.max_length) if wanted == "auto" else wanted
    fixed = rows if isinstance(rows, int) else None
    return MicroBatchPlan(
        max_tokens=fixed * training.max_length if fixed else usual,
        max_rows=fixed or training.batch_size,
        packing=training.packing,
        longrope_boundary=architecture.longrope_boundary,
    )


def predict_on_cpu(
    recipe: Recipe,
    config: dict[str, Any],
    architecture: Architecture,
    data: PreparedData,
    setup: Setup,
    *,
    compute_dtype: torch.dtype,
) -> Predicted:
    """What the tensors of a run on a CPU should hold."""
    load = load_of(measured_lengths(data, recipe.training.batch_size), setup)
    profile = simulate(recipe, config, architecture, setup, load, compute_dtype=compute_dtype, path="cpu")
    return Predicted(
        allocated_bytes=profile.peak_bytes, reserved_bytes=None, on_card_bytes=None, tenants=dict(profile.tenants)
    )


def predicted_by(plan: Plan) -> Predicted:
    """The figures of a plan."""
    forecast = plan.forecast
    return Predicted(
        allocated_bytes=forecast.allocated_bytes,
        reserved_bytes=forecast.reserved_bytes,
        on_card_bytes=forecast.on_card_bytes,
        tenants=dict(forecast.profile.tenants),
    )
