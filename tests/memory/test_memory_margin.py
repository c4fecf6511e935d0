"""The margin: its rule on numbers worked out by hand, its records, and the budget it is taken from."""

import json
import os
from dataclasses import replace

import pytest
from tiny_check import GPU, build_recipe

from qlora_phi3.errors import DeviceError
from qlora_phi3.files import user_state_dir
from qlora_phi3.memory.margin import MAX_RECORDS, RECORDS_NAME, Margin, budget_of, read_margin, record_error
from qlora_phi3.units import GIB, MIB


def record(*percent):
    """Runs that took so much more than predicted, the oldest first."""
    for each in percent:
        record_error("this GPU", 1000, 1000 + 10 * each)


def test_the_margin_is_three_percent_and_at_least_128_mib():
    assert read_margin("a GPU") == Margin(0.03)
    assert Margin(0.03).bytes_for(10 * GIB) == int(10 * GIB * 0.03)
    assert Margin(0.03).bytes_for(GIB) == 128 * MIB


@pytest.mark.parametrize("budget", [GIB, 4 * GIB, 24 * GIB])
@pytest.mark.parametrize("share", [0.03, 0.12])
def test_a_prediction_at_the_limit_and_its_margin_make_the_budget(budget, share):
    margin = Margin(share)
    limit = margin.limit(budget)
    assert budget - 2 <= limit + margin.bytes_for(limit) <= budget


def test_a_run_that_took_more_than_predicted_widens_the_margin_of_its_gpu_alone():
    record(4)
    assert read_margin("this GPU").share == pytest.approx(0.06)
    assert read_margin("this GPU").runs == 1
    assert read_margin("that GPU") == Margin(0.03)


def test_runs_that_took_less_leave_the_margin_as_it_is():
    record(-30, -20)
    assert read_margin("this GPU") == Margin(0.03, 2)


@pytest.mark.parametrize(
    ("percent", "share"),
    [
        # Weights, oldest first: 0.81, 0.9, 1. Half of 2.71 is 1.355: of the sorted errors the second reaches it.
        ((4, 100, 6), 0.09),  # 4 (0.81), 6 (1.81): 6 % x 1.5
        ((100, 4, 4), 0.06),  # one odd run changes nothing, whether it is the first,
        ((4, 100, 4), 0.06),  # the second,
        ((4, 4, 100), 0.06),  # or the newest: 4 and 4 weigh 1.71
        # Of two runs the newest outweighs the one before: 1 against 0.9.
        ((10, 4), 0.06),
        ((4, 10), 0.15),
    ],
)
def test_the_share_is_one_and_a_half_times_the_weighted_median_of_the_errors(percent, share):
    record(*percent)
    assert read_margin("this GPU").share == pytest.approx(share)


def test_seven_runs_outweigh_any_number_of_older_ones_and_six_do_not():
    # 0.9^7 = 0.478 of all weight is older than the seven newest, 0.9^6 = 0.531 older than the six newest.
    record(*[0] * 40, *[8] * 6)
    assert read_margin("this GPU").share == 0.03
    record(8)
    assert read_margin("this GPU").share == pytest.approx(0.12)


def test_the_newest_records_are_saved_for_each_gpu():
    record(*[1] * (MAX_RECORDS + 3))
    assert read_margin("this GPU").runs == MAX_RECORDS


@pytest.mark.parametrize("text", ["", "[]", '{"this GPU": 3}', '{"this GPU": [{"predicted_bytes": 0}, 7]}'])
def test_damaged_records_are_ignored(tmp_path, text):
    record(10)
    (path,) = tmp_path.rglob("prediction-errors.json")
    path.write_text(text, encoding="utf-8")
    assert read_margin("this GPU") == Margin(0.03)


@pytest.mark.parametrize("measured", [10**400, 10**18, 1, True, float("nan"), "1000"])
def test_a_record_that_cannot_be_is_ignored_and_the_file_is_made_again(tmp_path, measured):
    record(10)
    path = user_state_dir() / RECORDS_NAME
    records = json.loads(path.read_text(encoding="utf-8"))
    records["this GPU"][-1:] = [{"predicted_bytes": 1000, "measured_bytes": measured}] * 9
    records["another GPU"] = {"of": "another kind"}
    path.write_text(json.dumps(records), encoding="utf-8")
    assert read_margin("this GPU") == Margin(0.03)
    record(10)
    assert [entry["measured_bytes"] for entry in json.loads(path.read_text(encoding="utf-8"))["this GPU"]] == [1100]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_directory_or_a_pipe_in_place_of_the_records_is_replaced(make):
    path = user_state_dir() / RECORDS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    assert read_margin("this GPU") == Margin(0.03)
    record(10)
    assert read_margin("this GPU").runs == 1


def test_the_budget_is_what_is_free_or_less_where_the_recipe_says_so():
    used = replace(GPU, is_local=True, free_bytes=5 * GIB)
    assert budget_of(build_recipe().memory, used) == 5 * GIB
    assert budget_of(build_recipe(memory={"budget": "3GiB"}).memory, used) == 3 * GIB
    assert budget_of(build_recipe(memory={"budget": "6GiB"}).memory, used) == 5 * GIB


def test_a_budget_that_the_gpu_does_not_have_is_refused_for_one_gpu_and_cut_in_a_table():
    recipe = build_recipe(memory={"budget": "20GiB"})
    with pytest.raises(DeviceError):
        budget_of(recipe.memory, GPU)
    assert budget_of(recipe.memory, GPU, strict=False) == GPU.free_bytes
