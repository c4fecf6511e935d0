"""The report on one GPU, and the rows it is made for."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from tiny_check import GPU, build_checker, build_recipe
from workshop import write_chats

from qlora_phi3.memory.vram_check import hub_offline, read_recipe_context
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.units import MIB


def test_the_figures_of_a_report_agree_with_each_other(report):
    assert report.fits
    assert report.memory.on_gpu_bytes + report.margin_bytes <= report.budget_bytes == GPU.free_bytes
    assert report.micro_batch_size * report.gradient_accumulation_steps == report.batch_size == 4
    assert report.tokens_per_second == pytest.approx(4 * 256 / report.seconds_per_step)


def test_gpus_without_bfloat16_compute_in_float16_unless_the_recipe_says_otherwise(checker):
    old = replace(GPU, compute_capability=(7, 5))
    assert checker.report(old, old.free_bytes).compute_dtype == "float16"
    pinned = build_checker(quantization={"bnb_4bit_compute_dtype": "float32"})
    assert pinned.report(old, old.free_bytes).compute_dtype == "float32"


def test_ampere_and_ada_share_what_is_simulated_and_turing_has_its_own(checker):
    ada, turing = (replace(GPU, compute_capability=capability) for capability in ((8, 9), (7, 5)))
    assert checker.predictor(ada)._simulated is checker.predictor(GPU)._simulated
    assert checker.predictor(turing)._simulated is not checker.predictor(GPU)._simulated


def test_the_context_of_each_gpu_is_its_own(checker):
    small, large = (replace(GPU, multiprocessors=number) for number in (28, 128))
    first, second = checker.predictor(small), checker.predictor(large)
    assert second.on_gpu_bytes(0) - first.on_gpu_bytes(0) == pytest.approx(100 * 2.92 * MIB, abs=2)
    assert (
        checker.report(large, large.free_bytes).memory.on_gpu_bytes > checker.report(small, small.free_bytes).memory.on_gpu_bytes
    )


def test_rows_are_counted_where_tokenizer_and_data_are_here(tmp_path, base):
    write_chats(tmp_path / "chats.jsonl", rows=20)
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(base)},
            "data": {"train": "chats.jsonl", "eval_size": 4},
            "training": {"max_length": 128},
        }
    )
    context = read_recipe_context(recipe, tmp_path, lambda *_: None)
    assert not context.lengths.assumed
    assert len(context.lengths.training) == 16
    assert 0 < context.lengths.longest <= 128
    assert context.lengths.origin.startswith("16 to train on and 4 to evaluate on, the longest ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.json", "[]"),
        ("rows.jsonl", ""),
        ("rows.jsonl", "\n\n"),
        ("rows.csv", "instruction,output\n"),
        (None, ""),
    ],
)
def test_rows_are_assumed_where_a_data_file_is_empty_or_missing_and_the_reason_is_given(tmp_path, base, name, text):
    if name is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    tables = {"model": {"name": str(base)}, "data": {"train": name or "rows.jsonl"}}
    recipe = build_recipe(**tables, training={"max_length": 128, "batch_size": 16, "do_eval": False})
    context = read_recipe_context(recipe, tmp_path, lambda *_: None)
    assert context.lengths.assumed
    assert (context.lengths.training, context.lengths.longest_evaluation) == ((128,) * 16, 0)
    assert "max_length = 128 tokens each" in context.lengths.origin
    assert (name or "rows.jsonl") in context.lengths.problem
    assert "\n" not in context.lengths.problem


def test_the_hub_is_offline_inside_and_as_it_was_before_afterwards(monkeypatch):
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    with hub_offline():
        assert constants.is_offline_mode()
        assert datasets.config.HF_HUB_OFFLINE
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not constants.is_offline_mode()
    assert not datasets.config.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ


def test_libraries_that_are_first_imported_offline_may_go_online_afterwards():
    code = (
        "from qlora_phi3.memory.vram_check import hub_offline\n"
        "with hub_offline():\n"
        "    import datasets, huggingface_hub\n"
        "    inside = huggingface_hub.is_offline_mode(), datasets.config.HF_HUB_OFFLINE\n"
        "print(inside, (huggingface_hub.is_offline_mode(), datasets.config.HF_HUB_OFFLINE))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "(True, True) (False, False)"
