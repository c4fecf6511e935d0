"""Configurations on emulated GPUs (tests/emulated_cuda/card.py), for `bench_memory.py emulated`."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import card
import torch
import transformers.masking_utils
from memory_bench.cases import Case
from memory_bench.gpu import CudaGpu, GpuTruth, measure_on_gpu
from memory_bench.grid import CUDA_GRID

from qlora_phi3.family import known_config, parse_architecture
from qlora_phi3.hardware.gpu import find_gpu
from qlora_phi3.memory.cuda_path import MOST_FUSED_ROWS

MIB = 2**20
#: Names of runtime.cpp's cards -> those of the product's table.
CARDS = {
    "gtx1660": "GTX 1660",
    "rtx2060": "RTX 2060 6GB",
    "rtx3060": "RTX 3060 12GB",
    "rtx3090": "RTX 3090",
    "rtx4070l": "RTX 4070 Laptop",
    "rtx4090": "RTX 4090",
    "rtx5070": "RTX 5070",
}
#: Every emulated card has this much, so that the size of a configuration is seen and not only that it does not fit.
LARGE_MIB = 400_000


class EmulatedGpu(CudaGpu):
    """The emulated card of this process. It computes nothing, so it has to know how many positions are supervised."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        # transformers looks at the values of a padding mask, and leaves the mask out where nothing is padded; and at positions,
        # for those of a pack. Ours has a mask of its own.
        transformers.masking_utils.fast_all = lambda mask: False
        transformers.masking_utils.find_packed_sequence_indices = lambda positions: None

    def enter(self, phase: str) -> None:
        """As the protocol says: every token but each row's first is supervised."""
        others = {"evaluation": self.case.held_out, "later forward": self.case.later_lengths}
        lengths = others.get(phase, self.case.lengths)
        card.tell_supervised(sum(length - 1 for length in lengths))


def measure(name: str, case: Case, caps: Sequence[int] = (), *, expandable: bool = True) -> dict[str, Any]:
    """In a process that has not used a card yet: what a configuration takes on one, and the most pinned host memory."""
    card.choose(name, LARGE_MIB)
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{expandable}")
    truth: GpuTruth = measure_on_gpu(case, EmulatedGpu(case), caps, idle_bytes=None)
    return {**asdict(truth), "pinned": card.pinned_peak_bytes()}


def runnable(name: str, case: Case) -> Case:
    """In float16 where the card has no bfloat16."""
    old = find_gpu(CARDS[name]).compute_capability < (8, 0)
    return replace(case, compute="float16") if old and case.compute == "bfloat16" else case


def random_cases(seed: int, count: int) -> Iterator[tuple[str, Case]]:
    """Cards and configurations, drawn at random: one model in five is complete. The n-th does not depend on `count`."""
    for index in range(count):
        draw = random.Random(f"{seed} {index}")
        model = draw.choice(MODELS)
        name = draw.choice(list(CARDS))
        checkpoint_every = draw.choice((1, 1, 1, 1, 0, 2, 4, 8))
        packing = draw.random() < 0.6
        config = known_config(model) or {}
        boundary = parse_architecture(dict(config), model).longrope_boundary or 10**9
        lengths = _lengths(draw, 16384 if checkpoint_every == 1 else 4096, packing=packing, boundary=boundary)
        others = _lengths(draw, 4096, packing=packing, boundary=boundary)
        lora: dict[str, Any] = {
            "r": draw.choice((4, 8, 16, 16, 32, 64, 128, 256)),
            "lora_dropout": draw.choice((0.0, 0.0, 0.05)),
            "use_dora": draw.random() < 0.15,
        }
        if targets := draw.choice((None, None, None, ["qkv_proj", "o_proj"], ["down_proj"], ["qkv_proj", "gate_up_proj"])):
            lora["target_modules"] = targets
        if draw.random() < 0.05:
            lora["modules_to_save"] = ["lm_head"]
        eager = draw.random() < 0.15 and max(lengths) <= 2048
        case = Case(
            name=f"random {seed}.{index}",
            config=config,
            lengths=lengths,
            evaluation_lengths=draw.choice((None, None, (), others)),
            packing=packing,
            accumulates=draw.random() < 0.7,
            compute="float32" if draw.random() < 0.06 else "bfloat16",
            attention="eager" if eager else "sdpa",
            lora=lora,
            quantization={
                "load_in_4bit": draw.random() < 0.96,
                "bnb_4bit_use_double_quant": draw.random() < 0.8,
                "bnb_4bit_quant_type": draw.choice(("nf4", "nf4", "nf4", "fp4")),
            },
            checkpoint_every=checkpoint_every,
            offloading=checkpoint_every == 1 and draw.random() < 0.3,
            optim=draw.choice(OPTIMIZERS),
            tile_mib=draw.choice((32, 32, 32, 8, 128)),
            mlp_tile_tokens=draw.choice((0, 0, 0, 1024, 2048)) if sum(lengths) > 2048 else 0,
        )
        if draw.random() < 0.8:  # four of the layers take a tenth of the time, and what is wrong by a constant counts for more
            case = replace(case, config={**case.config, "num_hidden_layers": 4})
        yield name, runnable(name, case)


MODELS = (
    "microsoft/Phi-3-mini-128k-instruct", "microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-medium-128k-instruct",
    "microsoft/Phi-3-medium-4k-instruct", "microsoft/Phi-3.5-mini-instruct", "microsoft/phi-4", "microsoft/Phi-4-mini-instruct",
)  # fmt: skip
OPTIMIZERS = ("paged_adamw_8bit", "paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch", "adamw_torch_fused")


def _lengths(draw: random.Random, most: int, *, packing: bool, boundary: int) -> tuple[int, ...]:
    """One to eight rows whose lengths are spread over the orders of magnitude; at most `most` tokens with the padding.

    Rows that are longer than longrope's boundary share no micro-batch with shorter ones: only those of the longest's side remain.
    """
    lengths = [int(32 * 2 ** draw.uniform(0, 9)) for _ in range(draw.choice((1, 1, 1, 2, 3, 4, 8)))]
    while (sum(lengths) if packing else len(lengths) * max(lengths)) > most:
        lengths = [max(16, length // 2) for length in lengths]
    return tuple(length for length in lengths if (length > boundary) == (max(lengths) > boundary))


def grid_cases(cards: Iterable[str]) -> Iterator[tuple[str, Case]]:
    """Every configuration of the GPU's grid on each of these cards."""
    for case in CUDA_GRID:
        for name in cards:
            yield name, runnable(name, case)


def by_prediction(cases: Iterable[tuple[str, Case]]) -> list[tuple[Case, list[str]]]:
    """Configurations with the cards that share a prediction: those of one capability, and of one size for few rows."""
    groups: dict[tuple[Any, ...], tuple[Case, list[str]]] = {}
    for name, case in cases:
        gpu, is_short = find_gpu(CARDS[name]), sum(case.lengths) <= MOST_FUSED_ROWS
        key = case.name, gpu.compute_capability, is_short and gpu.multiprocessors
        groups.setdefault(key, (case, []))[1].append(name)
    return list(groups.values())
