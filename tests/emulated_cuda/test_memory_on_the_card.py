"""Predicted memory against what torch's CUDA code and allocator take on an emulated card: `python3 scripts/test_cuda.py`."""

from itertools import product

import card
import pytest

if not card.IS_HERE:
    pytest.skip("no emulated GPU: scripts/test_cuda.py", allow_module_level=True)

import bench_memory
import torch
from memory_bench.cases import Case
from memory_bench.emulated import CARDS, measure, random_cases, runnable
from memory_bench.truth import build_random, go_once

from qlora_phi3.execution import smaller_mlp_tile
from qlora_phi3.family import known_config, linear_shapes, parse_architecture, read_architecture
from qlora_phi3.hardware.gpu import find_gpu
from qlora_phi3.hardware.gpu_table import GPU_TABLE
from qlora_phi3.memory.allocator import replay
from qlora_phi3.memory.cuda_path import MOST_FUSED_ROWS, context_bytes, fused_rows
from qlora_phi3.memory.tracker import NullTracker
from qlora_phi3.model.phi3 import choose_precision, load_base
from qlora_phi3.recipe.schema import Model, Quantization
from qlora_phi3.training.prepare import prepare_cuda

MIB = 2**20
#: Compute capabilities whose rule for fused products `fused_rows` has.
FUSING = ((7, 5), (8, 6), (8, 9), (12, 0))
MODELS = {
    "mini": "microsoft/Phi-3-mini-128k-instruct",
    "mini-4k": "microsoft/Phi-3-mini-4k-instruct",
    "medium": "microsoft/Phi-3-medium-128k-instruct",
    "Phi-4": "microsoft/phi-4",
    "Phi-4-mini": "microsoft/Phi-4-mini-instruct",
}
PLAIN = {"checkpoint_every": 0}
OFFLOADED, FUSED, KEPT = {"offloading": True}, {"fused_kernels": True}, {"keep_attention": True}
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
    ("rtx3060", "mini", (2048,), KEPT),
    ("rtx3060", "mini", (1000, 700, 400, 100), {**KEPT, **OFFLOADED}),
    ("rtx3060", "mini", (8192,), {**KEPT, **OFFLOADED}),
    ("rtx4090", "Phi-4-mini", (3000, 1000), {**KEPT, "checkpoint_every": 2}),
    ("rtx2060", "mini", (2048,), {**KEPT, **OFFLOADED}),
    ("rtx2060", "medium", (1000, 700, 400, 100), {**KEPT, "packing": False}),
    ("rtx3060", "mini-4k", (4096,), {**KEPT, "mlp_tile_tokens": 1024}),
    ("rtx3060", "mini", (2048,), {"accumulates": False}),
    ("rtx3060", "mini", (512,), {"evaluation_lengths": (4096,)}),
    ("rtx3060", "mini", (2048,), {"accumulates": False, "later_lengths": (1900,)}),  # the later one is the heavier one
    ("rtx3060", "mini", (2048,), {"accumulates": False, "later_lengths": (200, 100), "lora": {"r": 64}}),
    ("rtx3060", "mini", (2048,), FUSED),
    ("rtx3060", "mini", (2048,), {**FUSED, **PLAIN}),
    ("rtx2060", "Phi-4-mini", (1000, 700, 400, 100), {**FUSED, **PLAIN, "packing": False}),
    ("rtx3060", "mini", (2048,), {**FUSED, **DORA, **PLAIN}),
    ("rtx3060", "Phi-4", (2048,), {**FUSED, **DROPOUT}),
    ("rtx4090", "Phi-4-mini", (2048,), {**FUSED, **PLAIN, "mlp_tile_tokens": 1024}),
]


#: Seed and number in `random_cases` of those that were predicted wrongly when the sample was drawn for the first time.
WERE_WRONG = [(12, index) for index in (32, 35, 60, 139)] + [(15, 177)]
LONGER = ((12, 45), (12, 79), (12, 132), (12, 189), (13, 82), (13, 166))
WERE_WRONG += [pytest.param(*each, marks=pytest.mark.slow) for each in LONGER]


def make_case(name: str, model: str, lengths: tuple[int, ...], more: dict) -> Case:
    config = {**known_config(MODELS[model]), "num_hidden_layers": 4}
    more = {"optim": "paged_adamw_8bit", **more}
    return runnable(name, Case(name=f"{model} on {name}", config=config, lengths=lengths, **more))


def predict(name: str, case: Case, expandable: bool, caps: tuple[int, ...]) -> dict:
    memory, _ = bench_memory.predict(case, find_gpu(CARDS[name]))
    served = replay(memory.trace, expandable_segments=expandable)
    fits = {str(cap): replay(memory.trace, expandable_segments=expandable, allowed_bytes=cap).fits for cap in caps}
    pinned = memory.host_bytes - memory.paged_bytes
    return {"phases": memory.by_phase, "reserved_bytes": served.peak_reserved_bytes, "pinned": pinned, "fits": fits}


def compare(name: str, case: Case, *, expandable: bool = True, caps: tuple[int, ...] = ()) -> None:
    measured = card.in_child(lambda: measure(name, case, caps, expandable=expandable))
    predicted = card.in_child(lambda: predict(name, case, expandable, caps))
    peak, real = (max(each["phases"].values()) / MIB for each in (predicted, measured))
    reserved, really = (each["reserved_bytes"] / MIB for each in (predicted, measured))
    print(f"allocated {peak:.1f} MiB predicted, {real:.1f} taken; reserved {reserved:.0f} predicted, {really:.0f} taken")
    # A segment that cannot grow leaves a remainder of up to 1 MiB with a block, which counts as allocated.
    assert abs(peak - real) < 0.001 * real + (0 if expandable else 1)
    for phase, size in measured["phases"].items():
        assert predicted["phases"][phase] / MIB - size / MIB > -0.03 * real, phase
    assert abs(reserved - really) <= 2  # a segment of the pool for small requests; seen in 3 of 52
    assert abs(predicted["pinned"] - measured["pinned"]) <= 64 * 1024  # small buffers of torch's own
    assert predicted["fits"] == measured["fits"]


@pytest.mark.parametrize(
    ("name", "model", "lengths", "more"),
    [pytest.param(*each, marks=[pytest.mark.slow] if index % 3 else []) for index, each in enumerate(CONFIGURATIONS)],
)
def test_a_step_takes_what_is_predicted(name, model, lengths, more):
    compare(name, make_case(name, model, lengths, more))


@pytest.mark.parametrize(("seed", "index"), WERE_WRONG)
def test_a_step_that_was_predicted_wrongly_takes_what_is_predicted(seed, index):
    compare(*list(random_cases(seed, index + 1))[-1], caps=(4096 * MIB,))


@pytest.mark.parametrize("more", [{}, {"checkpoint_every": 0}, {"offloading": True}])
def test_without_expandable_segments_a_step_takes_what_is_predicted(more):
    compare("rtx3060", make_case("rtx3060", "mini", (2048,), more), expandable=False)


@pytest.mark.parametrize(
    ("name", "usable_gib", "multiprocessors", "tokens"),
    [
        ("gtx1660", 3.60, 14, 11_264),
        ("rtx2060", 5.60, 22, 36_864),
        ("rtx2060", 7.51, 34, 61_440),
        ("rtx2060", 11.56, 34, 114_688),
        ("rtx3060", 15.43, 34, 131_072),
    ],
)
def test_the_longest_row_that_vram_check_names_for_a_size_goes_through(name, usable_gib, multiprocessors, tokens):
    """All layers, in what such a GPU leaves to tensors beside its context; docs/memory.md has the table of the lengths."""
    plan = {"offloading": True, "mlp_tile_tokens": smaller_mlp_tile(tokens), "accumulates": False, "evaluation_lengths": ()}
    config = known_config(MODELS["mini"])
    case = runnable(name, Case(name="mini", config=config, lengths=(tokens,), optim="paged_adamw_8bit", **plan))

    def work():
        contexts = context_bytes(find_gpu(CARDS[name]).multiprocessors) - context_bytes(multiprocessors)
        card.choose(name, int(usable_gib * 1024) + contexts // MIB)
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        card.tell_supervised(tokens - 1)
        model = build_random(case, torch.device("cuda", 0))
        go_once(model, case, NullTracker(), go_once(model, case, NullTracker()))
        return card.pinned_peak_bytes() / 2**30

    assert card.in_child(work) == pytest.approx(1 << (tokens * 3072 * 2 * 32 - 1).bit_length() - 30, rel=1e-3)


def test_products_of_few_rows_are_fused_where_bitsandbytes_fuses_them():
    def work():
        from bitsandbytes.backends.cuda import ops

        wrong = []
        shapes = {
            shape for name in MODELS.values() for shape in linear_shapes(parse_architecture(known_config(name), name)).values()
        }
        kinds = {(gpu.compute_capability, gpu.multiprocessors) for gpu in GPU_TABLE if gpu.compute_capability in FUSING}
        for (capability, number), (width, depth), dtype in product(kinds, shapes, (torch.float16, torch.bfloat16, torch.float32)):
            ops._gpu_dispatch_props = lambda _: (number, *capability)  # noqa: B023
            fuses = [ops._gemm_4bit_use_custom_cuda.__wrapped__(0, dtype, rows, width, depth) for rows in range(1, 1537)]
            most = fused_rows(capability, number, (width, depth), dtype)
            if fuses != [rows <= most for rows in range(1, 1537)] or most > MOST_FUSED_ROWS:
                wrong.append([capability, number, width, depth, str(dtype), most, sum(fuses)])
        return [len(kinds) * len(shapes), wrong]

    compared, wrong = card.in_child(work)
    assert compared > 400
    assert wrong == []


def test_a_base_from_the_cache_takes_no_more_memory_than_one_that_is_quantized(make_base, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = str(make_base(4))

    def work():
        card.choose("rtx3060")
        prepare_cuda()
        notes, device = [], torch.device("cuda")
        compute_dtype, _ = choose_precision("auto", torch.cuda.get_device_capability())
        model = load_base(
            Model(name=base),
            Quantization(),
            read_architecture(base),
            compute_dtype=compute_dtype,
            device=device,
            longest_row=64,
            note=notes.append,
        )
        sizes = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), torch.cuda.memory_allocated()]
        return [*sizes, len(notes), sum(hasattr(weight, "quant_state") for weight in model.parameters())]

    quantized, cached = card.in_child(work), card.in_child(work)
    print(quantized, cached)
    assert [quantized[3:], cached[3:]] == [[0, 16], [1, 16]]
    assert cached[0] <= quantized[0]
    assert cached[1] <= quantized[1]
    assert abs(cached[2] - quantized[2]) <= 512 * 16 * 2  # tensors that all layers share, or that each has


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
