"""The cost model meets published speeds of each kind of program, whose layers are simulated as that program computes them."""

import csv

import pytest
from fit_cost import PUBLISHED, count, ratio


@pytest.mark.parametrize(
    ("source", "program", "kernels"),
    [
        ("torchtune README, QLoRA", "fused", 135),
        ("LLaMA-Factory wiki, HF + FA2", "transformers", 339),
        ("QwenLM/Qwen README, LoRA 7B", "transformers, one qkv", 221),
    ],
)
def test_a_published_speed_is_met(source, program, kernels):
    rows = csv.DictReader(PUBLISHED.read_text(encoding="utf-8").splitlines())
    row = next(row for row in rows if row["source"] == source and int(row["length"]) >= 1024)
    assert row["program"] == program
    counted = count(row)
    step = counted[1]
    assert sum(step.layers.values()) / step.num_layers == kernels
    assert 0.75 <= ratio(counted) <= 1.25
