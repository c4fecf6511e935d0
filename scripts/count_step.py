"""Count what a training step asks of a GPU, without one: `python scripts/count_step.py` writes benchmarks/step.csv.

Phi-3-mini (128k), one row of 2,048 tokens, 32 layers, r = 16 on all linear layers. The simulation counts the kernels that each
operator starts; tests/memory/test_step_counts.py holds the table against the code, and tests/emulated_cuda the code against a
CUDA build of torch. A change that is meant writes the table again.
"""

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES, ExecutionPlan, MicroBatchPlan
from qlora_phi3.family import parse_architecture, read_config
from qlora_phi3.memory.cost import add_kernels
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.simulate import StepShape
from qlora_phi3.memory.trace import Trace
from qlora_phi3.recipe.schema import Recipe

TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "step.csv"
MODEL, TOKENS, LAYERS = "microsoft/Phi-3-mini-128k-instruct", 2048, 32
LAYOUT = MicroBatchPlan(max_tokens=TOKENS, max_rows=1, packing=True, longrope_boundary=None)
PLAN = ExecutionPlan(
    micro_batch=LAYOUT,
    evaluation=LAYOUT,
    checkpoint_every=0,
    activation_offloading=False,
    optim="adamw_8bit",
    logits_tile_bytes=DEFAULT_LOGITS_TILE_BYTES,
    mlp_tile_tokens=0,
)
#: Name -> what differs from the usual plan, and from the recipe.
CASES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "not recomputed": ({}, {}),
    "recomputed": ({"checkpoint_every": 1}, {}),
    "recomputed, offloaded": ({"checkpoint_every": 1, "activation_offloading": True}, {}),
    "recomputed but attention": ({"checkpoint_every": 1, "keep_attention": True}, {}),
    "one layer in 8 recomputed but attention, offloaded": (
        {"checkpoint_every": 8, "activation_offloading": True, "keep_attention": True},
        {},
    ),
    "one layer in 8 recomputed": ({"checkpoint_every": 8}, {}),
    "recomputed, MLPs in tiles of 512": ({"checkpoint_every": 1, "mlp_tile_tokens": 512}, {}),
    "MLPs in tiles of 512": ({"mlp_tile_tokens": 512}, {}),
    "dropout": ({}, {"lora": {"lora_dropout": 0.05}}),
    "DoRA": ({}, {"lora": {"use_dora": True}}),
    "not quantized": ({}, {"quantization": {"load_in_4bit": False}}),
    "compute capability 7.5, fp16": ({}, {}),
    "fused": ({"fused_kernels": True}, {}),
    "fused, recomputed": ({"fused_kernels": True, "checkpoint_every": 1}, {}),
    "fused, recomputed, MLPs in tiles of 512": ({"fused_kernels": True, "checkpoint_every": 1, "mlp_tile_tokens": 512}, {}),
    "fused, dropout": ({"fused_kernels": True}, {"lora": {"lora_dropout": 0.05}}),
    "fused, DoRA": ({"fused_kernels": True}, {"lora": {"use_dora": True}}),
    "fused, compute capability 7.5, fp16": ({"fused_kernels": True}, {}),
}


def main() -> None:
    """Write the table."""
    rows = [count(name) for name in CASES]
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(TABLE.read_text(encoding="utf-8"), end="")


def count(name: str) -> dict[str, Any]:
    """One row of the table: what the complete model starts, and each layer, by which two models of few layers differ."""
    changes, tables = CASES[name]
    plan, shape = replace(PLAN, **changes), StepShape(lengths=(TOKENS,))
    recipe = Recipe.model_validate({"model": {"name": MODEL}, "data": {"train": "rows.jsonl"}, **tables})
    config, is_turing = read_config(MODEL, None, prefer_shipped=True), "7.5" in name
    predictor = Predictor(
        recipe,
        config,
        parse_architecture(config, MODEL),
        compute_dtype=torch.float16 if is_turing else torch.bfloat16,
        capability=(7, 5) if is_turing else (8, 6),
        multiprocessors=28,
    )
    group = max(1, plan.checkpoint_every)
    few = max(2, group)
    small, large = (predictor._trace(plan, shape, number) for number in (few, few + group))
    layer = add_kernels(
        *((sign / group, trace.kernels[phase]) for sign, trace in ((1, large), (-1, small)) for phase in ("forward", "backward"))
    )
    launches = {
        kind: sum(count for kernel, count in layer.items() if kernel.kind == kind)
        for kind in ("matmul", "attention", "dequantize", "elementwise", "offload")
    }
    moved = sum(
        count * (kernel.activation_bytes + kernel.weight_bytes) for kernel, count in layer.items() if kernel.kind == "elementwise"
    )
    kept = (kept_bytes(large) - kept_bytes(small)) / group
    step = predictor.step_kernels(plan, shape)
    started = add_kernels((1, step.forward), (1, step.backward))
    return {
        "configuration": name,
        "launches_per_layer": round(sum(launches.values()) - launches["offload"], 2),
        "elementwise_bytes_per_token_and_layer": round(moved / TOKENS),
        "kept_bytes_per_token_and_layer": round(kept / TOKENS),
        **{f"{kind}_per_layer": round(float(number), 2) for kind, number in launches.items() if kind != "offload"},
        "launches_outside_layers": round(sum(started.values()) - LAYERS * sum(launches.values())),
        "tflop": round(sum(count * kernel.flops for kernel, count in started.items()) / 1e12, 3),
    }


def kept_bytes(trace: Trace) -> int:
    """What a forward pass leaves for the backward pass."""
    begin, end = trace.phases["forward"], trace.phases["backward"]
    return sum(trace._live_at(end).values()) - sum(trace._live_at(begin).values())


if __name__ == "__main__":
    main()
