"""What scripts/bench_memory.py measures: models, rows, adapters and execution plans, each configuration with a name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES, ExecutionPlan, MicroBatchPlan
from qlora_phi3.family import Architecture, parse_architecture
from qlora_phi3.recipe.schema import Recipe

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration; fields that are not given have the defaults of a recipe, or typical values."""

    name: str
    config: Mapping[str, Any]
    #: Tokens of each row of the micro-batch.
    lengths: tuple[int, ...] = (512,)
    #: Tokens of each row of a second micro-batch of the step; empty: there is none.
    later_lengths: tuple[int, ...] = ()
    #: Tokens of each held-out row; None: as in training.
    evaluation_lengths: tuple[int, ...] | None = None
    packing: bool = True
    #: Gradients of earlier micro-batches are there already.
    accumulates: bool = True
    compute: str = "bfloat16"
    attention: str = "sdpa"
    #: Tables of the recipe.
    lora: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_every: int = 1
    keep_attention: bool = False
    offloading: bool = False
    optim: str = "adamw_torch"
    tile_mib: int = DEFAULT_LOGITS_TILE_BYTES // MIB
    mlp_tile_tokens: int = 0
    fused_kernels: bool = False
    #: The simulation was written, or corrected, by this one's figures.
    tuned: bool = False

    @property
    def held_out(self) -> tuple[int, ...]:
        """Tokens of each held-out row; empty without evaluation."""
        return self.lengths if self.evaluation_lengths is None else self.evaluation_lengths

    @property
    def architecture(self) -> Architecture:
        """The shapes of the model."""
        return parse_architecture(dict(self.config), self.name)

    @property
    def recipe(self) -> Recipe:
        """As far as a step follows it."""
        return Recipe.model_validate(
            {
                "model": {"name": self.name, "attn_implementation": self.attention},
                "data": {"train": "rows"},
                "lora": dict(self.lora),
                "quantization": dict(self.quantization),
                "training": dict(self.training),
            }
        )

    @property
    def execution(self) -> ExecutionPlan:
        """One micro-batch holds all rows."""
        plan = MicroBatchPlan(
            max_tokens=10**9,
            max_rows=max(map(len, (self.lengths, self.later_lengths, self.held_out))),
            packing=self.packing,
            longrope_boundary=self.architecture.longrope_boundary,
        )
        return ExecutionPlan(
            micro_batch=plan,
            evaluation=plan,
            checkpoint_every=self.checkpoint_every,
            keep_attention=self.keep_attention,
            activation_offloading=self.offloading,
            optim=self.optim,
            logits_tile_bytes=self.tile_mib * MIB,
            mlp_tile_tokens=self.mlp_tile_tokens,
            fused_kernels=self.fused_kernels,
        )

    def describe(self) -> dict[str, str]:
        """The configuration as columns of the table, for people."""
        kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        kind |= self.quantization
        code = kind["bnb_4bit_quant_type"] + ("" if kind["bnb_4bit_use_double_quant"] else " without double quant")
        return {
            "configuration": self.name,
            "model": describe_model(self.config),
            "weights": code if kind["load_in_4bit"] else "unquantized",
            "compute": self.compute,
            "rank": str(self.lora.get("r", 16)),
            "lora": " ".join(f"{key}={_plain(value)}" for key, value in self.lora.items() if key != "r"),
            "rows": " then ".join(map(_rows, filter(None, (self.lengths, self.later_lengths))))
            + (" packed" if self.packing else " padded"),
            "evaluation": "same" if self.held_out == self.lengths else _rows(self.held_out),
            "accumulates": _plain(self.accumulates),
            "checkpoint_every": f"{self.checkpoint_every}{' but attention' if self.keep_attention else ''}",
            "offloading": _plain(self.offloading),
            "optim": self.optim,
            "tile_mib": str(self.tile_mib),
            "mlp_tile_tokens": str(self.mlp_tile_tokens),
            "attention": self.attention,
        }


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _rows(lengths: tuple[int, ...]) -> str:
    if len(lengths) > 1 and len(set(lengths)) == 1:
        return f"{len(lengths)} x {lengths[0]}"
    return "+".join(map(str, lengths)) or "none"


def describe_model(config: Mapping[str, Any]) -> str:
    """The shapes of a model in a few words."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    scaling = config.get("rope_scaling") or {}
    words = [
        f"{config['num_hidden_layers']} layers of {config['hidden_size']} / {config['intermediate_size']}",
        f"heads {heads} / {groups}",
        f"vocabulary {config['vocab_size']}" + (" tied" if config.get("tie_word_embeddings") else ""),
    ]
    if config.get("sliding_window"):
        words.append(f"window {config['sliding_window']}")
    if scaling:
        words.append(scaling["type"])
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        words.append(f"rotary {config['partial_rotary_factor']}")
    return ", ".join(words)


def count_parameters(case: Case) -> int:
    """Of the base: matrices only."""
    shape = case.architecture
    head_size = shape.hidden_size // shape.num_attention_heads
    heads = 2 * shape.num_attention_heads + 2 * shape.num_key_value_heads
    layer = shape.hidden_size * (heads * head_size + 3 * shape.intermediate_size)
    return layer * shape.num_hidden_layers + shape.vocab_size * shape.hidden_size * (2 - shape.tie_word_embeddings)


def mid_size(
    layers: int = 6,
    hidden: int = 768,
    intermediate: int = 2048,
    *,
    heads: int = 8,
    groups: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A config.json of 20 to 150 million parameters; `groups` are the heads of key and value."""
    usual = {
        "model_type": "phi3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups or heads,
        "vocab_size": 32064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    return {**usual, **more}


def longrope(head_size: int, boundary: int, rotary: float = 1.0) -> dict[str, Any]:
    """What a config.json says of longrope; rows longer than `boundary` take the long factors."""
    factors = [1.0] * int(head_size * rotary / 2)
    return {
        "rope_scaling": {"type": "longrope", "short_factor": factors, "long_factor": [2.0] * len(factors)},
        "original_max_position_embeddings": boundary,
        "partial_rotary_factor": rotary,
    }
