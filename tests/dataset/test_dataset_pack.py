"""The plan of micro-batches, on random lengths."""

import random

import pytest

from qlora_phi3.dataset.pack import plan_micro_batches


def random_lengths(seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randint(1, generator.choice([20, 200, 5000])) for _ in range(generator.randint(0, 60))]


CASES = [
    pytest.param(random_lengths(seed), packing, boundary, id=f"{seed}-{'packed' if packing else 'padded'}-{boundary}")
    for seed in range(12)
    for packing in (True, False)
    for boundary in (None, 150, 4096)
]


@pytest.mark.parametrize(("lengths", "packing", "boundary"), CASES)
def test_a_plan_has_every_row_once_within_its_bounds(lengths, packing, boundary):
    plan = plan_micro_batches(lengths, max_tokens=1000, max_rows=4, packing=packing, boundary=boundary)
    assert sorted(row for batch in plan for row in batch) == list(range(len(lengths)))
    for batch in plan:
        rows = [lengths[row] for row in batch]
        tokens = sum(rows) if packing else max(rows) * len(rows)
        assert tokens <= 1000 or len(rows) == 1
        assert packing or len(rows) <= 4
        if boundary is not None:
            assert len({length > boundary for length in rows}) == 1
    assert plan == plan_micro_batches(lengths, max_tokens=1000, max_rows=4, packing=packing, boundary=boundary)


def test_packing_fits_each_row_where_it_leaves_the_least_room():
    # 7 and 6 stand apart; 4 fills the 6 up to 10 rather than nothing; 3 fills the 7.
    plan = plan_micro_batches([6, 3, 7, 4], max_tokens=10, max_rows=1, packing=True, boundary=None)
    assert plan == [[2, 1], [0, 3]]


def test_padding_joins_rows_of_like_length():
    plan = plan_micro_batches([5, 100, 6, 99], max_tokens=1000, max_rows=2, packing=False, boundary=None)
    assert plan == [[1, 3], [2, 0]]


def test_a_row_longer_than_the_bound_stands_alone():
    plan = plan_micro_batches([2000, 10], max_tokens=1000, max_rows=8, packing=True, boundary=None)
    assert plan == [[0], [1]]
