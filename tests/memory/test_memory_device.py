"""The plan for a CPU: what is chosen as its memory shrinks, and that a step takes what was predicted."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from memory_bench.cases import Case, mid_size
from memory_bench.truth import measure_phases, step_shape
from tiny_check import build_recipe, tiny_config

from qlora_phi3.execution import plan_micro_batches
from qlora_phi3.family import parse_architecture
from qlora_phi3.hardware.gpu import find_gpu, read_cpu
from qlora_phi3.memory import device
from qlora_phi3.memory.cost import BANDWIDTH_SHARE, CPU_LAUNCH_SECONDS, Kernel, Limits, StepKernels, StepWorkload, estimate_step
from qlora_phi3.memory.device import CpuPredictor, build_predictor, limits_of
from qlora_phi3.memory.plan import assume_lengths, read_lengths
from qlora_phi3.memory.plan import step_shape as heaviest
from qlora_phi3.memory.search import CHECKPOINTING, find_plan

TINY = mid_size(2, 256, 512, heads=4, vocab_size=4096, bos_token_id=0, eos_token_id=0)
#: What is not counted on a CPU, for each of 28 layers and tile: the generator's state, and what operators take inside.
INSIDE_SHARE = 0.02
LIMITS = Limits(
    limit_bytes=0,
    flops_per_second=2e11,
    bytes_per_second=dict.fromkeys(BANDWIDTH_SHARE, 1e10),
    launch_seconds=(CPU_LAUNCH_SECONDS, 0.0),
)
LENGTHS = [150, 61, 123, 40, 212, 90, 233, 18, 77, 140, 201, 99, 64, 30, 180, 111]
ROWS = read_lengths(LENGTHS, [200], 8)


def build(num_hidden_layers=8, **tables):
    tables["training"] = {"batch_size": 8, **tables.get("training", {})}
    config = tiny_config(hidden_size=256, intermediate_size=768, num_hidden_layers=num_hidden_layers)
    architecture = parse_architecture(config, "tiny")
    return CpuPredictor(build_recipe(**tables), config, architecture, compute_dtype=torch.bfloat16)


def plan(predictor, limit_bytes, rows=ROWS):
    return find_plan(predictor, rows, replace(LIMITS, limit_bytes=limit_bytes), progress=lambda _: None)


@pytest.fixture(scope="module")
def predictor():
    return build()


@pytest.fixture(scope="module")
def needed(predictor):
    """(checkpoint_every, logits tile) -> bytes of a micro-batch of 512 tokens, and the plan of most memory."""
    free = plan(predictor, 2**40)
    tiles = (free.execution.logits_tile_bytes, 8 * 2**20)
    kinds = product([every for every in CHECKPOINTING if every < 8], tiles)
    plans = [replace(free.execution, checkpoint_every=every, logits_tile_bytes=tile) for every, tile in kinds]
    return free, {
        (each.checkpoint_every, each.logits_tile_bytes): predictor.simulate_all_layers(each, heaviest(ROWS, each)).allocated_bytes
        for each in plans
    }


def test_with_enough_memory_nothing_is_recomputed_and_512_tokens_pass_at_once(needed):
    free, _ = needed
    assert free.fits
    execution = free.execution
    assert (execution.checkpoint_every, execution.mlp_tile_tokens, execution.optim) == (0, 0, "adamw_torch")
    assert execution.micro_batch.max_tokens == execution.evaluation.max_tokens == 512
    memory = free.memory
    assert memory.allocated_bytes == memory.reserved_bytes == memory.on_gpu_bytes
    assert "512" not in free.reasons["micro_batch_tokens"]
    assert free.step_seconds > 0
    assert free.evaluation_seconds > 0


@pytest.mark.parametrize("every", [0, 6, 3, 2, 1])
def test_as_memory_shrinks_the_fewest_layers_that_fit_are_recomputed(predictor, needed, every):
    _, sizes = needed
    tile = max(tile for _, tile in sizes)
    found = plan(predictor, sizes[every, tile])
    assert found.fits
    assert found.memory.allocated_bytes <= sizes[every, tile]
    # the more layers are left alone, the faster: of all kinds that fit, in the order of their time, it is the first
    fitting = [kind for kind in CHECKPOINTING if kind < 8 and sizes[kind, tile] <= sizes[every, tile]]
    assert found.execution.checkpoint_every == fitting[0] == every
    assert found.execution.micro_batch.max_tokens == 512


def test_fewer_tokens_are_tried_only_where_nothing_fits_with_512(predictor, needed):
    _, sizes = needed
    found = plan(predictor, min(sizes.values()) - 1)
    assert found.fits
    assert ROWS.longest <= found.execution.micro_batch.max_tokens < 512
    assert found.reasons["micro_batch_tokens"] == "fewer than 512, which do not fit"
    groups = plan_micro_batches(LENGTHS[:8], found.execution.micro_batch)
    assert sorted(row for group in groups for row in group) == list(range(8))


def test_the_mlps_of_a_long_row_are_computed_in_tiles_as_the_last_resort():
    predictor, rows = build(training={"max_length": 4096, "batch_size": 1}), assume_lengths(4096, 1)
    smallest = plan(predictor, 1, rows)
    assert not smallest.fits
    assert (smallest.execution.checkpoint_every, smallest.execution.mlp_tile_tokens) == (1, 1024)
    fitting = plan(predictor, smallest.memory.allocated_bytes, rows)
    assert fitting.fits
    assert (fitting.execution.checkpoint_every, fitting.execution.mlp_tile_tokens) == (1, 1024)
    assert fitting.execution.micro_batch.max_tokens == 4096


def test_a_cpu_neither_offloads_nor_pages_nor_keeps_attention_by_itself():
    wanted = {"activation_offloading": True}
    found = plan(build(training=wanted), 1)
    execution = found.execution
    assert (execution.activation_offloading, execution.keep_attention, execution.optim) == (False, False, "adamw_torch")
    assert found.reasons["activation_offloading"] == "not needed"
    kept = plan(build(memory={"keep_attention": True}, training={"gradient_checkpointing": True}), 2**40)
    assert kept.execution.keep_attention


def test_the_layout_is_the_recipes_where_it_fixes_rows_and_held_out_rows_have_512_tokens():
    found = plan(build(training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}), 2**40)
    assert found.execution.micro_batch.max_tokens == 2 * 256
    assert (found.execution.evaluation.max_tokens, found.execution.evaluation.max_rows) == (512, 8)
    long = plan(build(training={"max_length": 700}), 2**40)
    assert long.execution.micro_batch.max_tokens == 700
    pinned = plan(build(memory={"micro_batch_tokens": 300}), 2**40)
    assert pinned.execution.micro_batch.max_tokens == 300
    assert pinned.reasons["micro_batch_tokens"] == "the recipe sets it"


def test_a_plan_that_fits_a_tiny_model_takes_one_simulation(monkeypatch):
    done = []
    simulate = device.Predictor._trace.__globals__["simulate"]
    monkeypatch.setattr("qlora_phi3.memory.predict.simulate", lambda *args, **more: done.append(args) or simulate(*args, **more))
    assert plan(build(2), 2**40).fits
    assert len(done) == 1


@pytest.mark.parametrize(
    "more",
    [
        {"checkpoint_every": 0, "lengths": (300,)},
        {"checkpoint_every": 2, "lengths": (160, 130)},
        {"compute": "float32", "lengths": (160, 130), "packing": False, "lora": {"lora_dropout": 0.1}},
        {"lengths": (400,), "mlp_tile_tokens": 128, "optim": "adamw_8bit"},
    ],
)
def test_a_real_step_of_many_layers_takes_what_is_predicted_from_a_few(more):
    case = Case(name="cpu", config=TINY | {"num_hidden_layers": 28}, **more)
    predictor = CpuPredictor(case.recipe, dict(case.config), case.architecture, compute_dtype=getattr(torch, case.compute))
    memory, _ = predictor.predict(case.execution, step_shape(case), limit_bytes=2**40)
    assert all(number < 28 for _, _, number, _ in predictor._simulated)
    measured = measure_phases(case)
    for phase in ("update", "forward", "backward", "save", "evaluation"):
        assert memory.by_phase[phase] == pytest.approx(measured[phase], rel=INSIDE_SHARE), phase
    assert predictor.predict(case.execution, step_shape(case), limit_bytes=memory.allocated_bytes)[1]
    assert not predictor.predict(case.execution, step_shape(case), limit_bytes=memory.allocated_bytes - 1)[1]


def test_a_step_takes_the_time_of_its_kernels_at_the_rates_of_the_cpu():
    """200 products of 2e9 operations, half of them of attention; 100 copies of 1e8 bytes; 300 starts."""
    kernels = {
        Kernel("matmul", 2e9, 1, 0): 100,
        Kernel("attention", 2e9, 1, 0): 100,
        Kernel("elementwise", 0, 10**8, 0): 100,
    }
    step = StepKernels(forward=kernels, backward={}, update={}, layers={}, num_layers=1, kept_bytes=0, tokens=64, squares=64**2)
    seconds = estimate_step(step, StepWorkload(lengths=(64,), num_micro_batches=1, tokens=64, squares=64**2), LIMITS)
    assert seconds.matmul == pytest.approx(1)
    assert seconds.attention == pytest.approx(1)
    assert seconds.elementwise == pytest.approx(1)
    assert seconds.launch == pytest.approx(300 * CPU_LAUNCH_SECONDS)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_attention_counts_half_of_every_square_on_a_cpu(compute):
    """Matmuls in 16 bit compute all of it, two products forward and four backward; fp32's kernel two and five."""
    case = Case(name="attention", config=TINY, lengths=(512,), compute=compute, checkpoint_every=0, evaluation_lengths=())
    predictor = CpuPredictor(case.recipe, dict(case.config), case.architecture, compute_dtype=getattr(torch, compute))
    step = predictor.step_kernels(case.execution, step_shape(case))
    flops = sum(
        count * kernel.flops
        for kernels in (step.forward, step.backward)
        for kernel, count in kernels.items()
        if kernel.kind == "attention"
    )
    square = 2 * 512**2 * 256 * 2  # one product of two layers
    assert flops == pytest.approx({"float32": (2 + 5) / 2, "bfloat16": 2 + 4}[compute] * square)


def test_a_device_has_its_predictor_and_its_limits(monkeypatch):
    recipe, config = build_recipe(), tiny_config()
    model = (recipe, config, parse_architecture(config, "tiny"))
    gpu, cpu = find_gpu("RTX 3060 12GB"), read_cpu()
    assert type(build_predictor(cpu, *model, compute_dtype=torch.float32)) is CpuPredictor
    assert build_predictor(gpu, *model, compute_dtype=torch.float32).multiprocessors == gpu.multiprocessors
    assert 0 < limits_of(gpu, 5, torch.float32).flops_per_second < gpu.tflops_16bit * 1e12
    limits = limits_of(cpu, 5, torch.float32)
    assert limits.limit_bytes == 5
    assert limits.bytes_per_second.keys() == {"matmul", "attention", "dequantize", "elementwise"}
    assert min(limits.flops_per_second, *limits.bytes_per_second.values()) > 0
    assert (cpu.is_cpu, cpu.where, gpu.where) == (True, "in memory", "on the GPU")
    assert 0 <= cpu.free_bytes <= cpu.total_bytes
