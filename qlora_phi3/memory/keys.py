"""The plan of an answer as keys of a recipe, as a person would write them."""

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_phi3.memory.answer import Answer
from qlora_phi3.sizes import MIB


@dataclass(frozen=True, slots=True)
class PlannedKey:
    """A key, its value, and why it has it."""

    table: str
    key: str
    value: int | bool | str
    reason: str


def planned_keys(answer: Answer) -> Iterator[PlannedKey]:
    """All that the plan decides."""
    every, tile = answer.checkpoint_every_n_layers, answer.logits_tile_bytes
    chosen: list[tuple[str, str, int | bool | str]] = [
        ("memory", "micro_batch_tokens", answer.micro_batch_tokens),
        ("training", "gradient_checkpointing", every > 0),
        *([("memory", "checkpoint_every_n_layers", every)] if every else []),
        ("training", "activation_offloading", answer.activation_offloading),
        ("training", "optim", answer.optim),
        ("memory", "mlp_tile_tokens", answer.mlp_tile_tokens),
        ("memory", "logits_tile", f"{tile // 1024}KiB" if tile % MIB else f"{tile // MIB}MiB"),
    ]
    for table, key, value in chosen:
        yield PlannedKey(table, key, value, answer.reasons[key])
