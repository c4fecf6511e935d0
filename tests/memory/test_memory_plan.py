"""The plan: what it may choose and what it may not, on cards of all sizes, for a tiny model."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny_model import build_config

from qlora_phi3.data.batching import plan_micro_batches
from qlora_phi3.execution import ExecutionPlan, MicroBatchPlan
from qlora_phi3.family import parse_architecture, read_architecture
from qlora_phi3.memory.cost import StepWorkload, recomputation_of
from qlora_phi3.memory.plan import GpuLimits, assume_lengths, read_lengths, step_shape
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.search import WORTH, find_plan, minimal_memory_plan
from qlora_phi3.recipe.schema import Recipe

LENGTHS = [150, 61, 123, 40, 212, 90, 233, 18, 77, 140, 201, 99, 64, 30, 180, 111]
ROWS = read_lengths(LENGTHS, [200], 8)
#: Of the cards, beside what every process takes; a page of the allocator is 20 MiB.
ROOM_MIB = (30, 40, 80)
WHOLE = MicroBatchPlan(max_tokens=2048, max_rows=1, packing=True, longrope_boundary=None)
FAST = GpuLimits(limit_bytes=0, tflops_16bit=50.0, bandwidth_bytes_per_second=4e11)


def build_recipe(**tables):
    usual = {"model": {"name": "tiny"}, "data": {"train": "rows.jsonl"}}
    training = {"batch_size": 8, "max_length": 256, **tables.pop("training", {})}
    return Recipe.model_validate({**usual, "training": training, **tables})


def build_predictor(recipe, num_hidden_layers=4):
    config = build_config(hidden_size=256, intermediate_size=768, num_hidden_layers=num_hidden_layers).to_dict()
    config = json.loads(json.dumps(config, default=str))
    architecture = parse_architecture(config, "tiny")
    return Predictor(recipe, config, architecture, compute_dtype=torch.bfloat16, capability=(8, 6))


def plan(predictor, room_mib, rows=ROWS):
    card = replace(FAST, limit_bytes=predictor.on_card(int(room_mib * 2**20)))
    return card, find_plan(predictor, rows, card, progress=lambda _: None)


@pytest.fixture(scope="module")
def predictor():
    """Of the plain recipe; remembers what it simulated."""
    return build_predictor(build_recipe())


@pytest.fixture(scope="module")
def plans(predictor):
    """Card and plan, the smallest card first."""
    return [plan(predictor, mib) for mib in ROOM_MIB]


def test_the_cards_get_different_plans(plans):
    assert len({found.execution for _, found in plans}) == 3


def test_a_step_sees_the_same_rows_once_on_every_card(plans):
    for _, found in plans:
        layout = found.execution.micro_batch
        groups = plan_micro_batches(
            LENGTHS[:8], max_tokens=layout.max_tokens, max_rows=layout.max_rows, packing=True, boundary=None
        )
        assert sorted(row for group in groups for row in group) == list(range(8))


def test_the_forecast_of_a_plan_that_fits_is_within_its_limit(plans):
    for card, found in plans:
        assert found.fits
        assert found.prediction.allocated_bytes <= found.prediction.reserved_bytes < found.prediction.on_card_bytes
        assert found.prediction.on_card_bytes <= card.limit_bytes


def test_a_larger_card_is_never_slower(plans):
    for (_, smaller), (_, larger) in pairwise(plans):
        assert larger.step_time.seconds <= smaller.step_time.seconds * WORTH


def test_with_all_the_room_in_the_world_nothing_is_recomputed_or_offloaded(plans):
    execution = plans[-1][1].execution
    assert (execution.checkpoint_every, execution.activation_offloading, execution.optim) == (0, False, "adamw_8bit")


def test_whole_layers_are_recomputed_with_their_mlps_in_tiles_only_where_nothing_else_fits():
    predictor, rows = (
        build_predictor(build_recipe(training={"max_length": 4096, "batch_size": 1})),
        assume_lengths(4096, 1),
    )
    leanest = minimal_memory_plan(predictor, rows)
    tiled, whole = (
        predictor.prediction(replace(leanest, mlp_tile_tokens=tokens), step_shape(rows, leanest), limit_bytes=2**40)
        for tokens in (1024, 0)
    )
    assert leanest == tiled.execution
    small, large = (
        find_plan(predictor, rows, replace(FAST, limit_bytes=limit), progress=lambda _: None)
        for limit in ((tiled.on_card_bytes + whole.on_card_bytes) // 2, whole.on_card_bytes * 21 // 20)
    )
    assert small.fits
    assert (small.execution.checkpoint_every, small.execution.mlp_tile_tokens) == (1, 1024)
    assert small.reasons["mlp_tile_tokens"] == "the last resort: without it the longest row does not fit"
    assert large.fits
    assert (large.execution.checkpoint_every, large.execution.mlp_tile_tokens) != (1, 1024)
    assert small.step_time.arithmetic > large.step_time.arithmetic


@pytest.mark.parametrize("room_mib", [30, 80])
def test_a_pinned_key_is_never_overruled(room_mib):
    training = {"gradient_checkpointing": True, "activation_offloading": False, "optim": "adamw_torch"}
    memory = {"checkpoint_every_n_layers": 2, "micro_batch_tokens": 300, "logits_tile": "16MiB", "mlp_tile_tokens": 128}
    _, found = plan(build_predictor(build_recipe(training=training, memory=memory)), room_mib)
    execution = found.execution
    assert (execution.checkpoint_every, execution.activation_offloading, execution.optim) == (2, False, "adamw_torch")
    assert (execution.micro_batch.max_tokens, execution.logits_tile_bytes, execution.mlp_tile_tokens) == (
        300,
        16 * 2**20,
        128,
    )
    assert set(found.reasons.values()) == {"the recipe asks for it"}


@pytest.mark.parametrize("room_mib", [30, 80])
def test_a_pasted_pair_of_batch_size_and_accumulation_keeps_its_rows(room_mib):
    recipe = build_recipe(training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    _, found = plan(build_predictor(recipe), room_mib)
    assert found.execution.micro_batch.max_tokens == 2 * 256
    assert recipe.training.batch_size == 8


def test_nothing_fits_a_card_without_room_and_the_plan_is_then_the_leanest(predictor):
    _, found = plan(predictor, 1)
    assert not found.fits
    assert found.execution == minimal_memory_plan(predictor, ROWS)
    assert (found.execution.checkpoint_every, found.execution.activation_offloading) == (1, True)


def test_assumed_lengths_never_take_less_than_the_rows_they_stand_for(predictor):
    _, read = plan(predictor, 400)
    _, assumed = plan(predictor, 400, replace(assume_lengths(256, 8), longest_evaluation=200))
    assert read.execution.checkpoint_every == assumed.execution.checkpoint_every == 0
    assert assumed.prediction.allocated_bytes >= read.prediction.allocated_bytes


def test_every_eighth_and_every_tenth_layer_of_32_are_the_same_four():
    architecture, execution = (
        read_architecture("microsoft/Phi-3-mini-4k-instruct", prefer_shipped=True),
        ExecutionPlan(
            micro_batch=WHOLE, evaluation=WHOLE, checkpoint_every=1, activation_offloading=False, optim="adamw_8bit"
        ),
    )
    workload = StepWorkload(lengths=(2048,), num_micro_batches=1, rank=16, quantized=True)
    eighth, tenth, sixth = (
        recomputation_of(architecture, replace(execution, checkpoint_every=n), workload) for n in (8, 10, 6)
    )
    assert eighth == tenth
    assert (eighth.layers, sixth.layers) == (4 / 32, 6 / 32)


def test_between_none_and_all_layers_and_with_tiles_the_estimate_is_near_the_simulation():
    predictor = build_predictor(build_recipe(training={"max_length": 4096, "batch_size": 1}), num_hidden_layers=16)
    rows = assume_lengths(4096, 1)
    for every, tile in ((8, 0), (4, 0), (3, 0), (4, 1024)):
        execution = replace(
            minimal_memory_plan(predictor, rows),
            checkpoint_every=every,
            activation_offloading=False,
            mlp_tile_tokens=tile,
        )
        load = step_shape(rows, execution)
        guess, whole = (
            max(predictor.estimate(execution, load).values()),
            max(predictor.profile(execution, load, 16).phases.values()),
        )
        assert whole * 0.98 <= guess <= whole * (1.2 if tile else 1.02)
