"""The search for a plan: what it may choose and what it may not, on GPUs of all sizes; and the search for the longest row."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tiny_check import build_recipe, tiny_config

from qlora_phi3.execution import plan_micro_batches
from qlora_phi3.family import parse_architecture
from qlora_phi3.memory import search
from qlora_phi3.memory.cost import gpu_limits
from qlora_phi3.memory.plan import assume_lengths, describe_plan, read_lengths, step_shape
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.search import WORTH, MaxLengthSearch, find_plan, minimal_memory_plan, round_length
from qlora_phi3.units import MIB

LENGTHS = [150, 61, 123, 40, 212, 90, 233, 18, 77, 140, 201, 99, 64, 30, 180, 111]
ROWS = read_lengths(LENGTHS, [200], 8)
#: Of the GPUs, in addition to what every process takes; a page of the allocator is 20 MiB.
ALLOWED_MIB = (30, 40, 80)
LIMITS = gpu_limits(tflops_16bit=50.0, bandwidth_bytes_per_second=4e11, multiprocessors=40)
LONG_ROWS = assume_lengths(4096, 1)


def build_predictor(num_hidden_layers=4, **tables):
    tables["training"] = {"batch_size": 8, **tables.get("training", {})}
    config = tiny_config(hidden_size=256, intermediate_size=768, num_hidden_layers=num_hidden_layers)
    architecture = parse_architecture(config, "tiny")
    gpu = {"capability": (8, 6), "multiprocessors": 46}
    return Predictor(build_recipe(**tables), config, architecture, compute_dtype=torch.bfloat16, **gpu)


def plan(predictor, allowed_mib, rows=ROWS):
    limits = replace(LIMITS, limit_bytes=predictor.on_gpu_bytes(allowed_mib * MIB))
    return limits, find_plan(predictor, rows, limits, progress=lambda _: None)


@pytest.fixture(scope="module")
def predictor():
    """Of the plain recipe; remembers what it simulated."""
    return build_predictor()


@pytest.fixture(scope="module")
def plans(predictor):
    """Limits and plan, the smallest GPU first."""
    return [plan(predictor, mib) for mib in ALLOWED_MIB]


def test_gpus_of_different_sizes_get_different_plans(plans):
    assert len({found.execution for _, found in plans}) == 3


def test_a_step_sees_the_same_rows_once_on_every_gpu(plans):
    for _, found in plans:
        groups = plan_micro_batches(LENGTHS[:8], found.execution.micro_batch)
        assert sorted(row for group in groups for row in group) == list(range(8))


def test_the_prediction_of_a_plan_that_fits_is_within_its_limit(plans):
    for limits, found in plans:
        memory = found.memory
        assert found.fits
        assert memory.allocated_bytes <= memory.reserved_bytes < memory.on_gpu_bytes <= limits.limit_bytes


def test_a_larger_gpu_is_never_slower(plans):
    for (_, smaller), (_, larger) in pairwise(plans):
        assert larger.step_seconds <= smaller.step_seconds * WORTH


def test_with_more_than_enough_memory_nothing_is_recomputed_or_offloaded(plans):
    execution = plans[-1][1].execution
    assert (execution.checkpoint_every, execution.activation_offloading, execution.optim) == (0, False, "adamw_8bit")


def test_layers_are_recomputed_with_their_mlps_in_tiles_only_where_nothing_else_fits():
    predictor = build_predictor(training={"max_length": 4096, "batch_size": 1})
    minimal, shape = minimal_memory_plan(predictor, LONG_ROWS)
    assert minimal.mlp_tile_tokens == 1024
    kinds = minimal, replace(minimal, mlp_tile_tokens=0)
    needed = [predictor.predict(kind, shape, limit_bytes=2**40)[0].on_gpu_bytes for kind in kinds]
    small, large = (
        find_plan(predictor, LONG_ROWS, replace(LIMITS, limit_bytes=limit), progress=lambda _: None)
        for limit in (sum(needed) // 2, needed[1] * 21 // 20)
    )
    assert small.fits
    assert (small.execution.checkpoint_every, small.execution.mlp_tile_tokens) == (1, 1024)
    assert "last resort" in small.reasons["mlp_tile_tokens"]
    assert large.fits
    assert (large.execution.checkpoint_every, large.execution.mlp_tile_tokens) != (1, 1024)
    assert small.step_seconds > large.step_seconds


def test_a_pinned_key_is_never_overruled():
    training = {"gradient_checkpointing": True, "activation_offloading": False, "optim": "adamw_torch"}
    memory = {"checkpoint_every_n_layers": 2, "keep_attention": True, "micro_batch_tokens": 300}
    memory |= {"logits_tile": "16MiB", "mlp_tile_tokens": 128}
    predictor = build_predictor(training=training, memory=memory)
    for allowed_mib in (30, 80):
        _, found = plan(predictor, allowed_mib)
        plan_found = found.execution
        kept = plan_found.checkpoint_every, plan_found.keep_attention, plan_found.activation_offloading
        assert kept == (2, True, False)
        assert (plan_found.micro_batch.max_tokens, plan_found.optim) == (300, "adamw_torch")
        assert (plan_found.logits_tile_bytes, plan_found.mlp_tile_tokens) == (16 * MIB, 128)
        assert set(found.reasons.values()) == {"the recipe sets it"}


def test_a_pasted_pair_of_batch_size_and_accumulation_keeps_its_rows():
    predictor = build_predictor(training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    for allowed_mib in (30, 80):
        _, found = plan(predictor, allowed_mib)
        assert found.execution.micro_batch.max_tokens == 2 * 256
    assert predictor.recipe.training.batch_size == 8


def test_nothing_fits_a_gpu_without_memory_and_the_plan_is_then_the_minimal_one(predictor):
    _, found = plan(predictor, 1)
    assert not found.fits
    assert found.execution == minimal_memory_plan(predictor, ROWS)[0]
    assert (found.execution.checkpoint_every, found.execution.activation_offloading) == (1, True)


def test_assumed_lengths_never_need_less_than_the_rows_they_replace(predictor):
    _, read = plan(predictor, 400)
    _, assumed = plan(predictor, 400, replace(assume_lengths(256, 8), longest_evaluation=200))
    assert read.execution.checkpoint_every == assumed.execution.checkpoint_every == 0
    assert assumed.memory.allocated_bytes >= read.memory.allocated_bytes


def test_between_none_and_all_layers_and_with_tiles_the_estimate_is_near_the_simulation():
    predictor = build_predictor(16, training={"max_length": 4096, "batch_size": 1})
    minimal = replace(minimal_memory_plan(predictor, LONG_ROWS)[0], activation_offloading=False)
    for every, tile, keep in ((8, 0, False), (4, 0, False), (3, 0, True), (4, 1024, False), (1, 0, True)):
        execution = replace(minimal, checkpoint_every=every, mlp_tile_tokens=tile, keep_attention=keep)
        shape = step_shape(LONG_ROWS, execution)
        estimated = max(predictor.estimate(execution, shape).values())
        simulated = predictor.simulate(execution, shape, 16).allocated_bytes
        assert simulated * 0.98 <= estimated <= simulated * (1.2 if tile else 1.02)


@pytest.mark.parametrize("limit", [0, 99, 100, 640, 5_000, 123_456, 10**9])
def test_the_longest_row_is_found_along_a_line(limit):
    computed = []

    def needs(length):
        computed.append(length)
        return 36 + length

    length = MaxLengthSearch(needs, 65_536).within(limit)
    assert length % 64 == 0
    assert length <= 65_536
    if length:
        assert needs(length) <= limit
    if length < 65_536:
        assert limit < needs(length + max(64, length // 128) + 64)
    assert len(computed) < 12


def test_the_longest_row_is_found_along_a_bent_curve_and_nothing_is_computed_twice():
    computed = []

    def needs(length):
        computed.append(length)
        return length**2 // 500 + 10 * length

    search = MaxLengthSearch(needs, 65_536)
    first = search.within(500_000)
    assert needs(first) <= 500_000 < needs(first + 256)
    before = len(computed)
    assert search.within(500_000) == first
    assert len(computed) == before


@pytest.mark.parametrize(("length", "reported"), [(0, 0), (63, 0), (64, 64), (4_095, 4_032), (81_999, 81_920)])
def test_lengths_are_reported_in_steps_of_two_percent(length, reported):
    assert round_length(length) == reported


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("every", "tile"), [(1, 0), (2, 0), (1, 1024)])
def test_the_kernels_of_kept_attention_are_those_that_its_simulation_starts(every, tile, offload):
    predictor = build_predictor(8, training={"max_length": 4096, "batch_size": 1})
    minimal, shape = minimal_memory_plan(predictor, LONG_ROWS)
    plan = replace(minimal, checkpoint_every=every, activation_offloading=offload, mlp_tile_tokens=tile, keep_attention=True)
    derived = predictor.step_kernels(plan, shape)
    simulated = predictor._trace(plan, replace(shape, evaluation_lengths=()), 8).kernels
    for phase in ("forward", "backward"):
        assert {kernel: count for kernel, count in getattr(derived, phase).items() if count} == simulated[phase]


def test_attention_is_kept_where_that_is_faster_and_fits():
    """Rows of 16,384 tokens: a fast GPU, for which attention is most of the step."""
    rows = assume_lengths(16384, 1)
    predictor = build_predictor(16, training={"max_length": 16384, "batch_size": 1, "gradient_checkpointing": True})
    kinds = {"plain": {}, "kept": {"keep_attention": True}}
    minimal, shape = minimal_memory_plan(predictor, rows)
    everything = replace(minimal, activation_offloading=False, mlp_tile_tokens=0, checkpoint_every=1)
    needed = {
        name: predictor.predict(replace(everything, **more), shape, limit_bytes=2**40)[0].on_gpu_bytes
        for name, more in kinds.items()
    }
    assert minimal.keep_attention is False
    found = {
        name: find_plan(predictor, rows, replace(LIMITS, limit_bytes=size + 60 * MIB), progress=lambda _: None)
        for name, size in needed.items()
    }
    assert {name: plan.execution.keep_attention for name, plan in found.items()} == {"plain": False, "kept": True}
    assert found["kept"].step_seconds * WORTH < found["plain"].step_seconds
    assert found["kept"].reasons["keep_attention"] == "computed once and kept on the GPU"
    assert "recomputing all layers but their attention" in describe_plan(found["kept"].execution)


@pytest.mark.parametrize(
    ("tables", "changes", "allowed"),
    [
        ({}, {}, (False, True)),
        ({"memory": {"keep_attention": False}}, {}, (False,)),
        ({"memory": {"keep_attention": True}}, {}, (True,)),
        ({"model": {"name": "tiny", "attn_implementation": "eager"}}, {}, (False,)),
        ({}, {"capability": (7, 5)}, (False,)),  # no fused kernel for bf16 there
        ({}, {"capability": (7, 5), "compute_dtype": torch.float16}, (False, True)),
        ({}, {"config": {"attention_dropout": 0.1}}, (False,)),  # its kernel draws random numbers
    ],
)
def test_attention_may_be_kept_where_a_fused_kernel_computes_it(tables, changes, allowed):
    predictor = build_predictor(**tables)
    for name, value in changes.items():
        setattr(predictor, name, value)
    assert search._Search(predictor, ROWS, LIMITS, progress=print).keeps == allowed


def test_attention_is_kept_in_host_memory_only_where_the_computer_has_enough(monkeypatch):
    """16 layers of 16,384 tokens: an input and an output of 8 MiB each, and 256 KiB of logarithms, for each layer."""
    needed = 16 * (2 * 8 * MIB + MIB // 4)
    predictor = build_predictor(16, training={"max_length": 16384, "batch_size": 1, "activation_offloading": True})
    for host_bytes, offered in ((needed / search.HOST_SHARE - MIB, False), (needed / search.HOST_SHARE + MIB, True)):
        monkeypatch.setattr(search.psutil, "virtual_memory", lambda size=host_bytes: SimpleNamespace(total=size))
        stages = search._Search(predictor, assume_lengths(16384, 1), LIMITS, progress=print).stages()
        assert any(kind.keep_attention for stage in stages for kind in stage) is offered
