"""Hold the cost model against training speeds that other people published: `python scripts/fit_cost.py [--fit]`.

Every row of benchmarks/published.csv is simulated as a phi3 model of the same shapes, and memory/cost.py times its step. Programs
whose layers are transformers' do more element-wise work than ours: as much more as was counted on an emulated GPU. Offloading
counts nothing, as these programs do it while they compute. `--fit` chooses the shares anew: those with the least mean log of
the miss over the rows marked `fitted`. The others, of other sources, are in no fit.
"""

import argparse
import csv
import itertools
import math
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES, ExecutionPlan, MicroBatchPlan
from qlora_phi3.family import parse_architecture, read_config
from qlora_phi3.memory import cost
from qlora_phi3.memory.cost import Kernels, StepKernels, StepWorkload, estimate_step, gpu_limits
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.simulate import StepShape
from qlora_phi3.recipe.schema import Recipe

PUBLISHED = Path(__file__).resolve().parent.parent / "benchmarks" / "published.csv"
#: transformers' layer against ours, Phi-3-mini at 2,048 tokens, recomputed: 2,345 for 707 KiB, 264 for 135 kernels.
MORE_BYTES, MORE_KERNELS = 2345 / 707, 264 / 135
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
#: Adapted matrices as the sources name them -> as phi3 does, whose query, key and value are one.
TARGETS = {"all": "all-linear", "q k v o": ["qkv_proj", "o_proj"], "q v": ["qkv_proj"]}


#: Values that are tried.
GRID = {
    "ARITHMETIC_SHARE": (0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
    "FULL_RATE_ARITHMETIC_SHARE": (0.55, 0.6, 0.65, 0.7, 0.75, 0.8),
    "elementwise": (0.6, 0.7, 0.8, 0.9),
    "LAUNCH_SECONDS": (1e-6, 2e-6, 3e-6, 5e-6),
    "HOST_SECONDS": (0.0, 15e-6, 20e-6, 25e-6, 30e-6, 40e-6),
}
#: A row of the table, the kernels of its step, what the step works on, and the stated rates of its GPU.
Counted = tuple[dict[str, str], StepKernels, StepWorkload, dict[str, Any]]


def main() -> None:
    """Print each row's ratio and where the time goes, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    warnings.filterwarnings("ignore")
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        counted = [count(row) for row in csv.DictReader(file)]
    fitted, others = ([each for each in counted if each[0]["fitted"] == kind] for kind in ("yes", "no"))
    if parser.parse_args().fit:
        set_shares(min(choices(), key=lambda choice: set_shares(choice) or mean_miss(fitted)))
    for row, step, workload, gpu in counted:
        seconds = estimate_step(step, workload, gpu_limits(**gpu))
        speed, published = workload.tokens / seconds.total, float(row["tokens_per_second"])
        shares = ", ".join(f"{kind} {getattr(seconds, kind) / seconds.total:.0%}" for kind in seconds.__slots__)
        cells = (row["gpu"], row["source"], f"{row['rows']} x {row['length']}", f"{published:,.0f}", f"{speed:,.0f}")
        print(f"| {' | '.join(cells)} | {speed / published:.2f} | {row['fitted']} | {shares} |")
    for name, few in (("fitted", fitted), ("not fitted", others), ("all", counted)):
        ratios = [ratio(each) for each in few]
        within = sum(0.75 <= each <= 1.25 for each in ratios)
        miss = math.exp(mean_miss(few)) - 1
        print(f"{name}: median {statistics.median(ratios):.2f}, {within} of {len(few)} within 25 %, mean miss {miss:.0%}")


def choices() -> Iterator[dict[str, float]]:
    """All combinations of the grid."""
    return (dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values()))


def set_shares(choice: dict[str, float]) -> None:
    """Let the cost model use these shares."""
    for name, value in choice.items():
        if name.isupper():
            setattr(cost, name, value)
    cost.BANDWIDTH_SHARE = {**cost.BANDWIDTH_SHARE, "elementwise": choice["elementwise"]}


def ratio(counted: Counted) -> float:
    """Modelled to published speed."""
    row, step, workload, gpu = counted
    return workload.tokens / estimate_step(step, workload, gpu_limits(**gpu)).total / float(row["tokens_per_second"])


def mean_miss(few: list[Counted]) -> float:
    """Mean absolute logarithm of the ratios."""
    return statistics.mean(abs(math.log(ratio(each))) for each in few)


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
    recipe = Recipe.model_validate(
        {
            "model": {"name": "published"},
            "data": {"train": "published.jsonl"},
            "lora": {"r": number["rank"], "target_modules": TARGETS[row["targets"]]},
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
    step = predictor.step_kernels(plan, StepShape(lengths=lengths))
    if row["program"] == "transformers":
        step = replace(step, forward=as_transformers(step.forward), backward=as_transformers(step.backward))
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    workload = StepWorkload(lengths=lengths, num_micro_batches=1, tokens=tokens, squares=squares)
    gpu = {
        "tflops_16bit": float(row["tflops_16bit"]),
        "bandwidth_bytes_per_second": float(row["bandwidth_gb"]) * 1e9,
        "multiprocessors": number["multiprocessors"],
    }
    return row, replace(step, update={}), workload, gpu


def as_transformers(kernels: Kernels) -> Kernels:
    """With transformers' element-wise bytes and numbers of kernels."""
    return {
        kernel._replace(activation_bytes=int(kernel.activation_bytes * MORE_BYTES / MORE_KERNELS))
        if kernel.kind == "elementwise"
        else kernel: count * (MORE_KERNELS if kernel.kind == "elementwise" else 1)
        for kernel, count in kernels.items()
    }


if __name__ == "__main__":
    main()
