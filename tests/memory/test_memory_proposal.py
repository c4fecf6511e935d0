"""What `init` proposes, against the rules worked out by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_phi3.family import known_config, parse_architecture
from qlora_phi3.hardware.gpu import gpu_of_size
from qlora_phi3.memory import proposal
from qlora_phi3.memory.cost import count_weights
from qlora_phi3.memory.proposal import (
    MODELS,
    NIGHT_SECONDS,
    SMALLEST_MODEL,
    TOOL_MODEL,
    DataSummary,
    choose_max_length,
    choose_training,
    compare_models,
    model_option,
    propose,
    read_data,
    recipe_text,
    simulate_option,
)
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.recipe.schema import Data
from qlora_phi3.units import GIB

ROWS = DataSummary(
    data=Data(train="a.jsonl"), format="messages", rows_read=1000, lengths=(1000,) * 1000, skipped=(), has_tools=False
)


@pytest.mark.parametrize(
    ("lengths", "positions", "expected"),
    [
        ([700, *[100] * 99], 4096, 128),  # 1 of 100 rows may be cut
        ([700, *[100] * 98], 4096, 704),  # of 99 none
        ([64] * 3, 4096, 64),
        ([65] * 3, 4096, 128),
        ([9000] * 3, 4096, 4096),
        ([9000] * 3, 100, 64),
    ],
)
def test_max_length_cuts_one_row_in_a_hundred_and_is_a_multiple_of_64(lengths, positions, expected):
    assert choose_max_length(lengths, positions) == expected


@pytest.mark.parametrize(
    ("rows", "held_out", "batch_size", "epochs", "rate"),
    [
        (8, 0, 4, 5, 1e-4),
        (20, 2, 4, 5, 1e-4),
        (100, 10, 4, 5, 1e-4),  # a tenth, as 5 % would be 5 rows
        (250, 25, 8, 5, 1e-4),
        (330, 30, 8, 5, 1e-4),  # 300 are left
        (331, 30, 8, 3, 2e-4),
        (1000, 50, 16, 3, 2e-4),
        (30_500, 500, 16, 2, 2e-4),
        (100_000, 500, 16, 1, 2e-4),
    ],
)
def test_few_rows_get_more_epochs_smaller_batches_and_a_lower_rate(rows, held_out, batch_size, epochs, rate):
    choice = choose_training(rows)
    assert (choice.evaluation_rows, choice.batch_size, choice.epochs, choice.learning_rate) == (
        held_out,
        batch_size,
        epochs,
        rate,
    )


def option_of(name, summary=ROWS):
    return model_option(name, summary, Path(), lambda *_: None)


def test_a_model_is_simulated_with_the_recipe_that_is_written_for_it():
    choice = choose_training(1000)
    option = simulate_option(option_of(SMALLEST_MODEL), ROWS, choice, gpu_of_size(12 * GIB), lambda _: None)
    report = option.report
    assert (report.fits, report.max_length, report.batch_size, report.rows.longest) == (True, 1024, 16, 1000)
    assert (report.epochs, report.total_steps, report.rows.count) == (3, 180, 950)  # 60 steps an epoch, the last of 6 rows
    seconds = 180 * report.seconds_per_step
    assert seconds < report.run_seconds < 1.2 * seconds  # and five evaluations of 50 rows, a third of the work a token


def test_the_most_capable_model_is_proposed_that_fits_and_is_trained_within_a_night():
    def proposed(*fitting, has_tools=False, seconds=60.0):
        reports = {name: SimpleNamespace(fits=name in fitting, run_seconds=seconds) for name in MODELS}
        options = [replace(option_of(name), report=reports[name]) for name in MODELS]
        return propose(options, has_tools=has_tools).name

    assert proposed() == SMALLEST_MODEL
    assert proposed(SMALLEST_MODEL, TOOL_MODEL) == TOOL_MODEL
    assert proposed(*MODELS) == "microsoft/phi-4"
    assert proposed(*MODELS, has_tools=True) == TOOL_MODEL
    assert proposed(*MODELS, seconds=NIGHT_SECONDS + 1) == TOOL_MODEL
    assert propose([option_of(SMALLEST_MODEL)], has_tools=True).name == SMALLEST_MODEL


def test_the_models_are_listed_by_their_parameters():
    counts = []
    for name in MODELS:
        model = parse_architecture(known_config(name), name)
        counts.append(count_weights(model) + (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.hidden_size)
    assert counts == sorted(counts, reverse=True)


def test_columns_of_likely_names_become_fields_that_the_recipe_states(tmp_path):
    (tmp_path / "faq.csv").write_text("Question,Answer\n" + "Why?,Because.\n" * 30, encoding="utf-8")
    summary = read_data(str(tmp_path / "faq.csv"), {}, tmp_path, lambda *_: None)
    assert (summary.data.format, summary.data.fields) == ("alpaca", {"instruction": "Question", "output": "Answer"})
    assert summary.lengths == (14,) * 30  # 12 bytes are 4 tokens; the template has 5 more for each of two turns
    target = tmp_path / "faq.toml"
    target.write_text(recipe_text(summary, option_of(SMALLEST_MODEL, summary), choose_training(30), target, "nothing"), "utf-8")
    recipe = load_recipe(target, check_files=True)
    assert (recipe.data.fields, recipe.data.eval_size, recipe.training.eval_strategy) == (summary.data.fields, 3, "epoch")


def test_every_key_of_the_recipe_has_its_reason(tmp_path):
    text = recipe_text(ROWS, option_of(SMALLEST_MODEL), choose_training(1000), Path("a.toml"), "nothing")
    keys = [line for line in text.splitlines() if " = " in line and not line.startswith("#")]
    assert len(keys) == 11
    assert all("   # " in line for line in keys)


def test_the_models_of_the_family_are_simulated_once_for_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = {SMALLEST_MODEL: MODELS[SMALLEST_MODEL]}
    monkeypatch.setattr(proposal, "MODELS", one)
    shown = []
    first = compare_models(gpu_of_size(8 * GIB), lambda *_: None, shown.append)
    assert first[0].report.fits
    assert shown.pop() == f"{SMALLEST_MODEL}: Simulating every layer"
    count = len(shown)
    assert compare_models(gpu_of_size(8 * GIB), lambda *_: None, shown.append) == first
    assert len(shown) == count  # the second time nothing is computed
    assert compare_models(gpu_of_size(4 * GIB), lambda *_: None, shown.append) != first
