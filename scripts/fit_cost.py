"""Hold the cost model against training speeds that other people published: `python scripts/fit_cost.py`.

Every row of benchmarks/published.csv is simulated with the shapes of its model and the decoder layers of its program, and
memory/cost.py times its step: `transformers` computes Llama's layers as transformers and PEFT do, `transformers, one qkv`
Phi-3's, and a `fused` program ours. Offloading counts nothing, as these programs do it while they compute.

Printed are, for each row, the modelled to the published speed by the constants of memory/cost.py, and by constants that were
fitted to the rows of all other sources, so that no row is in its own fit; then the constants that fit all rows best (the least
mean absolute logarithm of the ratios).
"""

import csv
import itertools
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, Phi3Config, Phi3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES, ExecutionPlan, MicroBatchPlan
from qlora_phi3.family import parse_architecture, read_config
from qlora_phi3.memory import cost
from qlora_phi3.memory.cost import StepKernels, StepWorkload, estimate_step, gpu_limits
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.simulate import StepShape
from qlora_phi3.model.phi3 import PackedPhi3ForCausalLM
from qlora_phi3.recipe.schema import Recipe

PUBLISHED = Path(__file__).resolve().parent.parent / "benchmarks" / "published.csv"
CAPABILITIES = {
    "Tesla V100S": (7, 0),
    "Tesla T4": (7, 5),
    "A100 40GB": (8, 0),
    "A100 80GB": (8, 0),
    "L4": (8, 9),
    "L40": (8, 9),
    "L40S": (8, 9),
    "H100": (9, 0),
    "RTX 5070 Laptop": (12, 0),
    "RTX 5090": (12, 0),
}
#: Adapted matrices as the sources name them -> as Phi-3's layer does, and as Llama's.
TARGETS = {"all": "all-linear", "q k v o": ["qkv_proj", "o_proj"], "q v": ["qkv_proj"]}
LLAMA_TARGETS = {"all": "all-linear", "q k v o": ["q_proj", "k_proj", "v_proj", "o_proj"], "q v": ["q_proj", "v_proj"]}
#: Values that are tried.
GRID = {
    "ARITHMETIC_SHARE": (0.75, 0.8, 0.85, 0.9, 0.95),
    "FULL_RATE_ARITHMETIC_SHARE": (0.5, 0.55, 0.6, 0.65, 0.7, 0.75),
    "elementwise": (0.6, 0.7, 0.75, 0.8, 0.85, 0.9),
    "LAUNCH_SECONDS": (1e-6, 2e-6, 3e-6, 5e-6, 7e-6),
    "HOST_SECONDS": (0.0, 15e-6, 20e-6, 22e-6, 24e-6, 26e-6, 28e-6, 30e-6, 35e-6),
}
#: A row of the table, the kernels of its step, what the step works on, and the stated rates of its GPU.
Counted = tuple[dict[str, str], StepKernels, StepWorkload, dict[str, Any]]


def main() -> None:
    """Print each row's ratios and where the time goes, then the medians, then the best constants."""
    warnings.filterwarnings("ignore")
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    counted = [count(row) for row in rows]
    seconds = [estimate_step(step, workload, gpu_limits(**gpu)) for _, step, workload, gpu in counted]
    now = np.array([ratio(each) for each in counted])
    choices = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    ratios = np.array([ratios_with(choice, counted) for choice in choices])  # (choices, rows)
    misses = np.abs(np.log(ratios))
    sources = np.array([row["source"].split(",")[0] for row in rows])
    best = {source: misses[:, sources != source].mean(axis=1).argmin() for source in sources}
    unseen = np.array([ratios[best[source], number] for number, source in enumerate(sources)])
    for row, here, kept_out, time in zip(rows, now, unseen, seconds, strict=True):
        shares = ", ".join(f"{kind} {getattr(time, kind) / time.total:.0%}" for kind in time.__slots__)
        cells = (row["source"], row["gpu"], f"{row['rows']} x {row['length']}", row["program"])
        print(f"| {' | '.join(cells)} | {here:.2f} | {kept_out:.2f} | {shares} |")
    for name, few in (("by cost.py", now), ("each source kept out of its fit", unseen)):
        within, miss = np.mean((few >= 0.75) & (few <= 1.25)), np.exp(np.abs(np.log(few)).mean()) - 1
        print(f"{name}: median {statistics.median(few):.2f}, {within:.0%} of {len(few)} within 25 %, mean miss {miss:.0%}")
    print("best for all:", choices[misses.mean(axis=1).argmin()])


def ratios_with(choice: dict[str, float], counted: list[Counted]) -> list[float]:
    """Modelled to published speed of each row with these constants of the cost model."""
    for name, value in choice.items():
        if name.isupper():
            setattr(cost, name, value)
    cost.BANDWIDTH_SHARE = {**cost.BANDWIDTH_SHARE, "elementwise": choice["elementwise"]}
    return [ratio(each) for each in counted]


def ratio(counted: Counted) -> float:
    """Modelled to published speed."""
    row, step, workload, gpu = counted
    return workload.tokens / estimate_step(step, workload, gpu_limits(**gpu)).total / float(row["tokens_per_second"])


@contextmanager
def layers_of(build: Callable[[Phi3Config, int], torch.nn.Module] | None) -> Iterator[None]:
    """Let simulated models have these decoder layers, given a config and a layer's number; None: ours."""

    def init(model: Any, config: Phi3Config) -> None:
        Phi3ForCausalLM.__init__(model, config)
        for number in range(config.num_hidden_layers):
            model.model.layers[number] = build(config, number)

    ours = PackedPhi3ForCausalLM.__init__
    PackedPhi3ForCausalLM.__init__ = init if build else ours
    try:
        yield
    finally:
        PackedPhi3ForCausalLM.__init__ = ours


def llama_layer(config: Phi3Config, number: int) -> torch.nn.Module:
    """Llama's decoder layer of the same sizes: query, key and value are separate matrices, and so are gate and up."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    llama = LlamaConfig(**{name: getattr(config, name) for name in names})
    llama._attn_implementation = config._attn_implementation
    return LlamaDecoderLayer(llama, number)


#: Program of a row -> the layers that it computes.
LAYERS = {"fused": None, "transformers": llama_layer, "transformers, one qkv": Phi3DecoderLayer}


def count(row: dict[str, str]) -> Counted:
    """The kernels of one micro-batch of a row of the table."""
    number = {name: int(value) for name, value in row.items() if value.isdigit()}
    config = read_config("microsoft/Phi-3-mini-4k-instruct", None, prefer_shipped=True) | {
        "hidden_size": number["hidden_size"],
        "intermediate_size": number["intermediate_size"],
        "num_hidden_layers": number["num_layers"],
        "num_attention_heads": number["num_heads"],
        "num_key_value_heads": number["num_kv_heads"],
        "vocab_size": number["vocab_size"],
        "sliding_window": None,
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    capability = CAPABILITIES.get(row["gpu"], (8, 6))
    targets = LLAMA_TARGETS if row["program"] == "transformers" else TARGETS
    recipe = Recipe.model_validate(
        {
            "model": {"name": "published"},
            "data": {"train": "published.jsonl"},
            "lora": {"r": number["rank"], "target_modules": targets[row["targets"]]},
            "quantization": {"load_in_4bit": row["quantized"] == "yes"},
        }
    )
    layout = MicroBatchPlan(max_tokens=2**20, max_rows=number["rows"], packing=True, longrope_boundary=None)
    plan = ExecutionPlan(
        micro_batch=layout,
        evaluation=layout,
        checkpoint_every=int(row["checkpointing"] == "yes"),
        activation_offloading=row["offloading"] == "yes",
        optim="adamw_8bit",
        logits_tile_bytes=DEFAULT_LOGITS_TILE_BYTES,
        mlp_tile_tokens=0,
    )
    predictor = Predictor(
        recipe,
        config,
        parse_architecture(config, "published"),
        compute_dtype=torch.float16 if capability < (8, 0) else torch.bfloat16,
        capability=capability,
        multiprocessors=number["multiprocessors"],
    )
    lengths = (number["length"],) * number["rows"]
    with layers_of(LAYERS[row["program"]]):
        step = predictor.step_kernels(plan, StepShape(lengths=lengths))
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    workload = StepWorkload(lengths=lengths, num_micro_batches=1, tokens=tokens, squares=squares)
    gpu = {
        "tflops_16bit": float(row["tflops_16bit"]),
        "bandwidth_bytes_per_second": float(row["bandwidth_gb"]) * 1e9,
        "multiprocessors": number["multiprocessors"],
    }
    return row, replace(step, update={}), workload, gpu


if __name__ == "__main__":
    main()
