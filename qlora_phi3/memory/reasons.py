"""Why a plan is as it is, in the words that `vram-check` shows and `--fit` writes beside each key."""

from collections.abc import Mapping

from qlora_phi3.recipe.load import Recipe
from qlora_phi3.setup import USUAL_LOGITS_TILE_BYTES, Setup
from qlora_phi3.sizes import format_gib

ASKED = "the recipe asks for it"


def give_reasons(
    recipe: Recipe,
    setup: Setup,
    *,
    num_passes: int,
    longest: int,
    refused: Mapping[Setup, int],
    limit_bytes: int,
) -> dict[str, str]:
    """Key of the recipe -> why the plan gives it this value.

    Args:
        num_passes: forward passes of a usual step.
        longest: tokens of the longest row.
        refused: kinds of set-up that would be faster and do not fit, and what each would take on the card, in bytes.
        limit_bytes: what may be predicted on the card.
    """
    pinned = _pinned(recipe)
    reasons = {
        "micro_batch_tokens": _of_micro_batch(setup, num_passes, longest),
        "gradient_checkpointing": _of_recomputing(setup),
        "checkpoint_every_n_layers": _of_every(setup) + _next_faster(refused, limit_bytes),
        "activation_offloading": "recomputation alone does not make enough room"
        if setup.activation_offloading
        else "there is room on the card",
        "optim": "its state may leave the card where that is full; where it is not, this is as fast as adamw_8bit"
        if setup.optim.startswith("paged")
        else "its state fits beside everything else",
        "logits_tile": "the fastest size" if setup.logits_tile_bytes >= USUAL_LOGITS_TILE_BYTES else "less memory",
        "mlp_tile_tokens": _of_mlp_tiles(setup),
    }
    return {key: ASKED if pinned[key] else reason for key, reason in reasons.items()}


def in_words(setup: Setup) -> str:
    """What is kept of a step, and where."""
    every = setup.checkpoint_every
    kept = {0: "keeping all activations", 1: "recomputing all layers"}.get(every, f"recomputing one layer in {every}")
    tiled = ", the MLPs in tiles" if setup.mlp_tile_tokens else ""
    return kept + (", offloaded" if setup.activation_offloading else "") + tiled


def _pinned(recipe: Recipe) -> dict[str, bool]:
    training, memory = recipe.training, recipe.memory
    return {
        "micro_batch_tokens": bool(training.micro_batch_size or memory.micro_batch_tokens != "auto"),
        "gradient_checkpointing": training.gradient_checkpointing != "auto",
        "checkpoint_every_n_layers": memory.checkpoint_every_n_layers != "auto",
        "activation_offloading": training.activation_offloading != "auto",
        "optim": training.optim != "auto",
        "logits_tile": memory.logits_tile != "auto",
        "mlp_tile_tokens": memory.mlp_tile_tokens != "auto",
    }


def _of_micro_batch(setup: Setup, num_passes: int, longest: int) -> str:
    if num_passes == 1:
        return "a whole step at once"
    if setup.micro_batch.max_tokens <= longest:
        return "the longest row alone; more at once would gain under 2%, not fit, or ask for more recomputation"
    return f"{num_passes} forward passes a step; more tokens at once would gain under 2% or not fit"


def _of_recomputing(setup: Setup) -> str:
    if setup.checkpoint_every:
        return "makes room"
    if setup.mlp_tile_tokens:
        return "no whole layer is computed twice; the MLPs alone are (mlp_tile_tokens)"
    return "there is room to keep every activation"


def _of_every(setup: Setup) -> str:
    every = setup.checkpoint_every
    return {0: "none", 1: "all of them, the leanest"}.get(every, f"recomputing one layer in {every} makes enough room")


def _of_mlp_tiles(setup: Setup) -> str:
    if not setup.mlp_tile_tokens:
        return "0: not needed"
    if setup.checkpoint_every == 1:
        return "the last resort: without it the longest row does not fit"
    return "the MLPs of all layers are computed twice; nothing as fast fits without"


def _next_faster(refused: Mapping[Setup, int], limit_bytes: int) -> str:
    """The leanest kind that would be faster and does not fit."""
    if not refused:
        return ""
    kind, needed = min(refused.items(), key=lambda item: item[1])
    room = format_gib(limit_bytes)
    return f"; {in_words(kind)} would take about {format_gib(needed)} for the longest row alone, of {room} beside the margin"
