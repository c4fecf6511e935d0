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
from qlora_phi3.memory.cost import StepSeconds, StepWorkload, describe_step
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.simulate import StepShape
from qlora_phi3.recipe.schema import Recipe

TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "step.csv"
MODEL, TOKENS = "microsoft/Phi-3-mini-128k-instruct", 2048
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
    """One row of the table."""
    plan, tables = CASES[name]
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
    step = predictor.step_kernels(replace(PLAN, **plan), StepShape(lengths=(TOKENS,)))
    workload = StepWorkload(lengths=(TOKENS,), num_micro_batches=1, tokens=TOKENS, squares=TOKENS**2)
    described = describe_step(step, workload, StepSeconds())
    kernels = [*step.layers.items()]
    by_kind = {
        f"{kind}_per_layer": round(sum(times for kernel, times in kernels if kernel.kind == kind) / step.num_layers, 2)
        for kind in ("matmul", "attention", "dequantize", "elementwise")
    }
    outside = sum(sum(part.values()) for part in (step.forward, step.backward)) - sum(step.layers.values())
    return {
        "configuration": name,
        **{key: value for key, value in described.items() if key not in ("seconds", "flops")},
        **by_kind,
        "launches_outside_layers": round(outside),
        "tflop": round(described["flops"] / 1e12, 3),
    }


if __name__ == "__main__":
    main()
