"""What one training step of the product asks of the card: launches, waits of the host, memory of the driver.

The numbers are exact, so that a change shows; a change that is meant writes the new ones here.
"""

import json
import re
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import card
import count_step
import pytest
import torch

from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.family import read_architecture, read_config
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.simulate import StepShape
from qlora_phi3.recipe.load import load_recipe

LAYERS = 2
#: Four rows of 1,000 tokens in one micro-batch, all layers recomputed: kernels by the name of their template, without fused ones.
PLAIN_KERNELS = {
    "vectorized_elementwise_kernel": 220,
    "elementwise_kernel": 121,
    "reduce_kernel": 71,
    "unrolled_elementwise_kernel": 60,
    "kDequantizeBlockwise": 42,
    "_scatter_gather_elementwise_kernel": 32,
    "kOptimizerStatic8bit2StateBlockwise": 16,
    "multi_tensor_apply_kernel": 14,
    "vectorized_layer_norm_kernel": 8,
    "flash_fwd_kernel": 4,
    "layer_norm_grad_input_kernel_vectorized": 3,
    "flash_bwd_dot_do_o_kernel": 2,
    "flash_bwd_convert_dq_kernel": 2,
    "DeviceRadixSortOnesweepKernel": 2,
    "index_elementwise_kernel": 2,
    "flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": 2,
    "write_indices": 1,
    "CatArrayBatchedCopy_alignedK_contig": 1,
    "CatArrayBatchedCopy_vectorized": 1,
    "DeviceRadixSortExclusiveSumKernel": 1,
    "DeviceReduceSingleTileKernel": 1,
    "lpnorm_cleanup": 1,
    "vectorized_gather_kernel": 1,
    "indexing_backward_kernel": 1,
    "DeviceCompactInitKernel": 1,
    "DeviceSelectSweepKernel": 1,
    "DeviceRadixSortHistogramKernel": 1,
    "elementwise_kernel_with_index": 1,
}
#: By `[memory] kernels`; Triton's kernels are started, as all others, and compute nothing.
KERNELS = {
    "plain": PLAIN_KERNELS,
    "auto": {**PLAIN_KERNELS, "elementwise_kernel": 71, "_rotate": 8, "_swiglu": 2, "_swiglu_backward": 2},
}
#: Products of cuBLAS; none of cublasLt.
PRODUCTS = {"product cublasGemmEx": 114}
#: What makes the host wait for a number of the card, each once in a step.
WAITS = [
    "model/loss.py select_supervised",  # how many positions are supervised
    "training/trainer.py _compute",  # the loss
    "training/trainer.py _compute",  # how many tokens were predicted correctly
    "training/trainer.py _get_grad_norm",
    "transformers/trainer.py _maybe_log_save_evaluate",  # the loss again, which it has summed up
    "transformers/trainer.py _maybe_log_save_evaluate",  # the norm again
]
#: Files of the harness, and of the warning itself.
NOT_WAITING = (Path(__file__).name, "card.py", "warnings.py")


def family(kernel: str) -> str:
    """The name of a kernel's template."""
    plain = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split("[<(]", plain)[0].rsplit("::", 1)[-1]


def watch_waits(waits: list[str]) -> None:
    """Note from now on which function makes the host wait for the card."""

    def note(*_: object, **__: object) -> None:
        frame = [frame for frame in traceback.extract_stack() if Path(frame.filename).name not in NOT_WAITING][-1]
        if frame.name != "set_sync_debug_mode":  # which warns that it is a prototype
            waits.append("/".join(Path(frame.filename).parts[-2:]) + f" {frame.name}")

    warnings.simplefilter("always")
    warnings.showwarning = note
    torch.cuda.set_sync_debug_mode("warn")


def take_census(workplace, layers, **memory):
    """Kernels, calls, and waits of one step with every layer recomputed."""
    shop = workplace(layers, [1000] * 4 + [100] * 4)
    memory |= {"rehearsal": False, "checkpoint_every_n_layers": 1, "micro_batch_tokens": 4096}
    shop.write(memory=memory, training={"eval_strategy": "no", "max_steps": 4})
    waits = []

    def begin():
        watch_waits(waits)
        card.forget_census()

    def end():
        kernels, calls = card.census()
        (shop.path / "census.json").write_text(json.dumps([kernels, calls, waits]), encoding="utf-8")

    ended = shop.on_card("run", "mine.toml", before_step={3: begin, 4: end})
    assert ended.exit_code == 0, ended.stderr
    return json.loads((shop.path / "census.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_simulation_counts_the_kernels_that_a_layer_starts(workplace, kernels):
    numbers = []
    for layers in (LAYERS, LAYERS + 1):
        started, calls, _ = take_census(workplace, layers, kernels=kernels, keep_attention=False)
        numbers.append(sum(started.values()) + sum(count for name, count in calls.items() if name.startswith("product")))
    shop = workplace(LAYERS, [1000] * 4 + [100] * 4)
    shop.write()
    recipe = load_recipe(shop.path / "mine.toml")
    layout = MicroBatchPlan(max_tokens=4096, max_rows=4, packing=True, longrope_boundary=4096)
    plan = {"micro_batch": layout, "evaluation": layout, "checkpoint_every": 1, "fused_kernels": kernels == "auto"}
    predictor = Predictor(
        recipe,
        read_config(recipe.model.name, None),
        read_architecture(recipe.model.name),
        compute_dtype=torch.bfloat16,
        capability=(8, 6),
        multiprocessors=28,
    )

    def count(layers):
        trace = predictor._trace(replace(count_step.PLAN, **plan), StepShape(lengths=(1000,) * 4, accumulates=False), layers)
        return sum(sum(counts.values()) for counts in trace.kernels.values())

    simulated = [card.in_child(partial(count, layers)) for layers in (LAYERS, LAYERS + 1)]
    assert simulated[1] - simulated[0] == numbers[1] - numbers[0]


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_census_of_a_step(workplace, kernels):
    started, calls, waits = take_census(workplace, LAYERS, kernels=kernels, keep_attention=False)
    families = Counter()
    for name, count in started.items():
        families[family(name)] += count
    assert families == KERNELS[kernels]
    assert {name: count for name, count in calls.items() if name.startswith("product")} == PRODUCTS
    assert "cudaDeviceSynchronize" not in calls  # bitsandbytes' own would wait after the update of each matrix (`sync_gpu`)
    assert waits == WAITS
    assert calls["cudaStreamSynchronize"] == len(waits)
    for name in ("cudaMalloc", "cudaFree", "cuMemCreate", "cuMemRelease", "cudaHostAlloc", "cudaMallocManaged"):
        assert name not in calls


def test_attention_that_is_kept_starts_its_kernel_once_in_each_layer_and_nothing_else(workplace):
    started, calls, waits = take_census(workplace, LAYERS, kernels="plain", keep_attention=True)
    families = Counter()
    for name, count in started.items():
        families[family(name)] += count
    assert families == {**KERNELS["plain"], "flash_fwd_kernel": LAYERS}
    assert {name: count for name, count in calls.items() if name.startswith("product")} == PRODUCTS
    assert waits == WAITS
