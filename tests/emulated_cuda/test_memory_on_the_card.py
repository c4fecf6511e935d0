"""Predicted memory against what torch's CUDA code and allocator take on an emulated card: `python3 scripts/test_cuda.py`."""

import card
import pytest

if not card.IS_HERE:
    pytest.skip("no emulated GPU: scripts/test_cuda.py", allow_module_level=True)

import bench_memory
import torch
from memory_bench.cases import Case
from memory_bench.gpu import CudaGpu, _Phases
from memory_bench.truth import build_random, go_once

from qlora_phi3.family import known_config
from qlora_phi3.memory.allocator import replay

MIB = 2**20
#: cuBLAS' second workspace: in a first step only from the backward pass on, afterwards always.
SECOND_WORKSPACE = {(7, 5): 8.125, (8, 6): 8.125, (8, 9): 8.125, (12, 0): 32.0}
CARDS = {"rtx2060": (7, 5), "rtx3060": (8, 6), "rtx4070l": (8, 9), "rtx4090": (8, 9), "rtx5070": (12, 0)}
MODELS = {
    "mini": "microsoft/Phi-3-mini-128k-instruct",
    "mini-4k": "microsoft/Phi-3-mini-4k-instruct",
    "medium": "microsoft/Phi-3-medium-128k-instruct",
    "Phi-4": "microsoft/phi-4",
    "Phi-4-mini": "microsoft/Phi-4-mini-instruct",
}
PLAIN = {"checkpoint_every": 0}
OFFLOADED = {"offloading": True}
DORA, DROPOUT = {"lora": {"use_dora": True}}, {"lora": {"lora_dropout": 0.05}}
CONFIGURATIONS = [
    *[("rtx3060", model, (2048,), {}) for model in MODELS],
    *[(name, "mini", (2048,), {}) for name in ("rtx2060", "rtx4070l", "rtx4090", "rtx5070")],
    ("rtx2060", "Phi-4-mini", (2048,), PLAIN),
    ("rtx3060", "mini", (2048,), PLAIN),
    ("rtx3060", "mini", (2048,), {"checkpoint_every": 2}),
    ("rtx3060", "mini", (64,), {}),
    ("rtx3060", "mini", (1000, 700, 400, 100), {}),
    ("rtx3060", "mini", (1000, 700, 400, 100), {"packing": False}),
    ("rtx2060", "medium", (1000, 700, 400, 100), {"packing": False}),
    ("rtx3060", "mini-4k", (4096,), {}),
    ("rtx3060", "mini", (8192,), OFFLOADED),
    ("rtx3060", "mini", (4096,), {**OFFLOADED, "mlp_tile_tokens": 1024}),
    ("rtx3060", "mini", (2048,), {**PLAIN, "mlp_tile_tokens": 1024}),
    ("rtx3060", "mini", (2048,), DROPOUT),
    ("rtx3060", "mini", (2048,), {**DROPOUT, **PLAIN}),
    ("rtx3060", "mini", (2048,), DORA),
    ("rtx4090", "mini", (2048,), {**DORA, **PLAIN}),
    ("rtx3060", "mini", (64,), DORA),
    ("rtx2060", "Phi-4-mini", (1024,), {"lora": {"use_dora": True, "lora_dropout": 0.05}}),
    ("rtx3060", "mini", (1024,), {"attention": "eager"}),
    ("rtx3060", "Phi-4-mini", (1024,), {"attention": "eager", **PLAIN}),
    ("rtx3060", "mini", (1024,), {"compute": "float32"}),
    ("rtx3060", "mini", (1024,), {"quantization": {"load_in_4bit": False}}),
    ("rtx3060", "mini", (2048,), {"quantization": {"bnb_4bit_use_double_quant": False}}),
    ("rtx3060", "mini", (1024,), {"lora": {"modules_to_save": ["lm_head"]}}),
    ("rtx3060", "mini", (512,), {"lora": {"r": 256}, "optim": "adamw_8bit"}),
    ("rtx3060", "mini", (512,), {"lora": {"r": 256}, "optim": "paged_adamw_32bit"}),
    ("rtx3060", "mini", (2048,), {"accumulates": False}),
    ("rtx3060", "mini", (512,), {"evaluation_lengths": (4096,)}),
]


def make_case(name: str, model: str, lengths: tuple[int, ...], more: dict, layers: int) -> Case:
    more = {"optim": "paged_adamw_8bit", **more}
    if CARDS[name] < (8, 0):
        more.setdefault("compute", "float16")
    config = {**known_config(MODELS[model]), "num_hidden_layers": layers}
    return Case(name=f"{model} on {name}", config=config, lengths=lengths, **more)


def measure(name: str, case: Case) -> dict:
    """A first step on the card: the peaks of its phases, reserved, and pinned."""
    card.choose(name, 200_000)
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    torch.manual_seed(0)

    class Phases(_Phases):
        def enter(self, phase):
            super().enter(phase)
            lengths = case.held_out if phase == "evaluation" else case.lengths
            card.tell_supervised(sum(length - 1 for length in lengths))

    phases = Phases(CudaGpu())
    phases.enter("load")
    go_once(build_random(case, torch.device("cuda", 0)), case, phases)
    return {"phases": phases.allocated, "reserved": phases.reserved, "pinned": card.pinned_peak_bytes()}


def predict(name: str, case: Case) -> dict:
    memory, _ = bench_memory.predict(case, capability=CARDS[name])
    served = replay(memory.trace, expandable_segments=True)
    pinned = memory.host_bytes - memory.paged_bytes
    return {"phases": memory.by_phase, "reserved": served.peak_reserved_bytes, "pinned": pinned}


@pytest.mark.parametrize(("name", "model", "lengths", "more"), CONFIGURATIONS)
def test_a_step_takes_what_is_predicted(name, model, lengths, more):
    case = make_case(name, model, lengths, more, layers=4)
    measured = card.in_child(lambda: measure(name, case))
    predicted = card.in_child(lambda: predict(name, case))
    peak, real = (max(each["phases"].values()) / MIB for each in (predicted, measured))
    above = min(peak - real, peak - real - SECOND_WORKSPACE[CARDS[name]], key=abs)
    print(f"allocated {peak:.1f} MiB predicted, {real:.1f} taken")
    print(f"reserved {predicted['reserved'] / MIB:.0f} MiB predicted, {measured['reserved'] / MIB:.0f} taken")
    # Seen: 0.0 to 0.3 MiB, and 3.4 for 64 tokens, whose fused product needs no dequantized weight.
    assert -0.1 < above < 0.2 + 0.005 * real
    for phase, size in measured["phases"].items():
        assert predicted["phases"][phase] / MIB - size / MIB > -0.03 * real, phase
    # Seen: -5.6 % (eager attention), -5.0 %, and all others from -2.5 to +3.6 %. The aim is -3 to +4 %.
    assert -0.06 < predicted["reserved"] / measured["reserved"] - 1 < 0.04
    assert abs(predicted["pinned"] - measured["pinned"]) <= 64 * 1024  # small buffers of torch's own


def test_memory_that_runs_out_is_refused_as_by_a_card():
    def work():
        card.choose("rtx3060", 800)
        held = [torch.empty(300 * MIB, dtype=torch.uint8, device="cuda") for _ in range(2)]
        try:
            torch.empty(300 * MIB, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            return [len(held), "CUDA out of memory" in str(error)]
        return None

    assert card.in_child(work) == [2, True]
