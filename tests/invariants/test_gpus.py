"""The plans of different GPUs for one recipe train the same (fp32, CPU, no dropout)."""

import json

import pytest
import torch
from tiny_model import load_tiny, random_rows, relative_difference, save_tiny_model

from qlora_phi3.family import parse_architecture
from qlora_phi3.memory.cost import gpu_limits
from qlora_phi3.memory.plan import read_lengths
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.search import find_plan
from qlora_phi3.model.phi3 import apply_execution_plan
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.step import collate, forward_backward

SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
LENGTHS = [150, 61, 123, 40, 212, 90, 233, 18, 77, 140, 201, 99, 64, 30, 180, 111]
BATCH_SIZE, STEPS = 8, 4
#: Memory of each GPU, in addition to what every process takes.
GPU_MIB = (60, 76, 100, 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), **SHAPE)


@pytest.fixture(scope="module")
def plans(folder):
    """The plan of each GPU, smallest first."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(folder)},
            "data": {"train": "rows.jsonl"},
            "lora": {"r": 8},
            "training": {"batch_size": BATCH_SIZE, "max_length": 256},
        }
    )
    predictor = Predictor(
        recipe,
        config,
        parse_architecture(config, "tiny"),
        compute_dtype=torch.float32,
        capability=(8, 6),
        multiprocessors=46,
    )
    rows = read_lengths(LENGTHS, [], BATCH_SIZE)
    gpus = [
        gpu_limits(
            limit_bytes=predictor.on_gpu_bytes(mib * 2**20),
            tflops_16bit=50.0,
            bandwidth_bytes_per_second=4e11,
            multiprocessors=40,
        )
        for mib in GPU_MIB
    ]
    return [find_plan(predictor, rows, gpu, progress=lambda _: None) for gpu in gpus]


def train(folder, execution):
    """The losses of a few steps, and the adapter they leave."""
    model = load_tiny(folder)
    apply_execution_plan(model, execution)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-4)
    rows, losses = random_rows(LENGTHS), []
    model.train()
    for step in range(STEPS):
        start = step * BATCH_SIZE % len(rows)
        batch = collate(rows[start : start + BATCH_SIZE], execution.micro_batch)
        result = forward_backward(model, batch, compute_dtype=torch.float32, backward=torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(result.loss))
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return losses, weights


def test_changing_the_gpu_changes_neither_the_losses_nor_the_weights(folder, plans):
    assert all(plan.fits for plan in plans)
    execution_plans = [plan.execution for plan in plans]
    assert len({(execution.checkpoint_every, execution.micro_batch.max_tokens) for execution in execution_plans}) >= 3
    losses, weights = train(folder, execution_plans[-1])
    assert losses[0] != losses[-1]
    for execution in execution_plans[:-1]:
        other_losses, other_weights = train(folder, execution)
        assert other_losses == pytest.approx(losses, rel=1e-5)
        assert relative_difference(weights, other_weights) < 1e-5


def test_a_larger_gpu_is_never_slower(plans):
    seconds = [plan.step_seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
