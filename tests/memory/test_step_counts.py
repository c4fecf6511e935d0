"""What a training step asks of a GPU, exactly, against benchmarks/step.csv, which scripts/count_step.py writes."""

import csv

import count_step
import pytest

with count_step.TABLE.open(encoding="utf-8", newline="") as file:
    WRITTEN = {row["configuration"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("name", count_step.CASES)
def test_a_step_asks_for_what_the_table_says(name):
    assert {key: str(value) for key, value in count_step.count(name).items()} == WRITTEN[name]


def test_the_table_has_no_other_rows():
    assert list(WRITTEN) == list(count_step.CASES)
