"""What `init` proposes, against the rules worked out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_phi3.hardware.gpu import gpu_of_size
from qlora_phi3.memory.proposal import (
    MODELS,
    SMALLEST_MODEL,
    TOOL_MODEL,
    DataSummary,
    choose_max_length,
    choose_training,
    estimate_option,
    model_option,
    propose,
    read_data,
    recipe_text,
    training_seconds,
)
from qlora_phi3.memory.vram_check import RecipeContext, VramChecker, summarize_rows
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.recipe.schema import Data, Recipe
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


def test_the_time_is_of_all_epochs_and_of_the_evaluations_between_and_around_them():
    """950 rows three times, and 50 rows in five evaluations, each a third of the work: 1,000 tokens each at 100 a second."""
    option = replace(model_option(SMALLEST_MODEL, ROWS), max_length=1000, tokens_per_second=100.0)
    assert training_seconds(option, ROWS, choose_training(1000)) == pytest.approx((950 * 3 + 50 * 5 / 3) * 10)


def test_the_estimate_is_near_the_simulation():
    """The plan that needs least memory, without what its allocator adds."""
    device, choice = gpu_of_size(12 * GIB), choose_training(1000)
    option = estimate_option(replace(model_option(SMALLEST_MODEL, ROWS), max_length=1024), ROWS, choice, device)
    recipe = Recipe.model_validate({"model": {"name": option.name}, "data": ROWS.data, "training": {"max_length": 1024}})
    from qlora_phi3.family import known_config
    from qlora_phi3.memory.plan import read_lengths
    from qlora_phi3.memory.search import minimal_memory_plan

    lengths = read_lengths(ROWS.lengths, (1000,), 16)
    rows = summarize_rows(lengths, "")
    config = known_config(option.name)
    checker = VramChecker(
        RecipeContext(recipe=recipe, config=config, architecture=option.architecture, lengths=lengths, rows=rows), print
    )
    predictor = checker.predictor(device)
    least = predictor.on_gpu_bytes(max(predictor.phases(*minimal_memory_plan(predictor, lengths)).values()))
    assert option.needed_bytes == pytest.approx(least, rel=0.15)
    assert option.fits


def test_the_most_capable_model_is_proposed_that_fits_and_is_trained_within_a_night():
    choice = choose_training(1000)

    def names(gigabytes, summary=ROWS):
        options = [estimate_option(model_option(name, summary), summary, choice, gpu_of_size(gigabytes * GIB)) for name in MODELS]
        return [option.name for option in propose(options, summary)]

    assert names(4) == [SMALLEST_MODEL]
    assert names(8) == [TOOL_MODEL, SMALLEST_MODEL]
    assert names(24)[0] == "microsoft/phi-4"
    assert names(24, replace(ROWS, has_tools=True))[0] == TOOL_MODEL
    assert names(24, replace(ROWS, lengths=(4000,) * 100_000))[0] == TOOL_MODEL  # phi-4 would take days


def test_columns_of_likely_names_become_fields_that_the_recipe_states(tmp_path):
    (tmp_path / "faq.csv").write_text("Question,Answer\n" + "Why?,Because.\n" * 30, encoding="utf-8")
    summary = read_data(str(tmp_path / "faq.csv"), tmp_path, lambda *_: None)
    assert (summary.data.format, summary.data.fields) == ("alpaca", {"instruction": "Question", "output": "Answer"})
    assert summary.lengths == (14,) * 30  # 12 bytes are 4 tokens; the template has 5 more for each of two turns
    target = tmp_path / "faq.toml"
    target.write_text(
        recipe_text(summary, model_option(SMALLEST_MODEL, summary), choose_training(30), target, "nothing"), "utf-8"
    )
    recipe = load_recipe(target, check_files=True)
    assert (recipe.data.fields, recipe.data.eval_size, recipe.training.eval_strategy) == (summary.data.fields, 3, "epoch")


def test_every_key_of_the_recipe_has_its_reason(tmp_path):
    text = recipe_text(ROWS, model_option(SMALLEST_MODEL, ROWS), choose_training(1000), Path("a.toml"), "nothing")
    keys = [line for line in text.splitlines() if " = " in line and not line.startswith("#")]
    assert len(keys) == 11
    assert all("   # " in line for line in keys)
