"""The plan of micro-batches, on random lengths."""

import random
from dataclasses import replace

import pytest

from qlora_phi3.execution import MicroBatchPlan, plan_micro_batches, share_rows, split_plan


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
    plan = plan_micro_batches(lengths, bounds(1000, 4, packing=packing, boundary=boundary))
    assert sorted(row for batch in plan for row in batch) == list(range(len(lengths)))
    for batch in plan:
        rows = [lengths[row] for row in batch]
        tokens = sum(rows) if packing else max(rows) * len(rows)
        assert tokens <= 1000 or len(rows) == 1
        assert packing or len(rows) <= 4
        if boundary is not None:
            assert len({length > boundary for length in rows}) == 1
    assert plan == plan_micro_batches(lengths, bounds(1000, 4, packing=packing, boundary=boundary))


def test_packing_fits_each_row_where_it_leaves_the_least_room():
    # 7 and 6 stand apart; 4 fills the 6 up to 10 rather than nothing; 3 fills the 7.
    plan = plan_micro_batches([6, 3, 7, 4], bounds(10, 1, packing=True))
    assert plan == [[2, 1], [0, 3]]


def test_padding_joins_rows_of_like_length():
    plan = plan_micro_batches([5, 100, 6, 99], bounds(1000, 2, packing=False))
    assert plan == [[1, 3], [2, 0]]


def test_a_row_longer_than_the_bound_stands_alone():
    plan = plan_micro_batches([2000, 10], bounds(1000, 8, packing=True))
    assert plan == [[0], [1]]


@pytest.mark.parametrize(
    ("packing", "lengths", "expected"),
    [(True, [30, 25, 9], 32), (True, [90, 5], 90), (False, [30, 25, 9], 60), (False, [30, 30], 30)],
)
def test_a_split_plan_keeps_rows_apart_that_shared_a_micro_batch(packing, lengths, expected):
    plan = bounds(100, 8, packing=packing)
    lowered = split_plan(plan, lengths)
    groups = plan_micro_batches(lengths, bounds(expected, 8, packing=packing))
    assert lowered == replace(plan, max_tokens=expected)
    assert len(groups) >= 2


@pytest.mark.parametrize("packing", [True, False])
def test_splitting_again_and_again_ends_in_single_rows(packing):
    draw = random.Random(3)
    for _ in range(100):
        lengths = [draw.randint(1, 500) for _ in range(draw.randint(2, 16))]
        plan, times = bounds(9000, 16, packing=packing), 0
        while len(group := max(plan_micro_batches(lengths, plan), key=len)) > 1:
            lowered = split_plan(plan, [lengths[row] for row in group])
            assert lowered.max_tokens < plan.max_tokens
            assert not any(set(group) <= set(other) for other in plan_micro_batches(lengths, lowered))
            plan, times = lowered, times + 1
        assert times < 40


def bounds(max_tokens, max_rows, *, packing, boundary=None):
    return MicroBatchPlan(max_tokens=max_tokens, max_rows=max_rows, packing=packing, longrope_boundary=boundary)


def test_rows_are_shared_by_tokens_and_no_process_has_more_than_its_part_of_the_rows():
    assert share_rows([9, 1, 8, 2, 7, 3], 2) == [[0, 3, 5], [1, 2, 4]]
    draw = random.Random(1)
    for _ in range(200):
        lengths, count = [draw.randint(1, 500) for _ in range(draw.randint(1, 40))], draw.randint(1, 8)
        shares = share_rows(lengths, count)
        assert sorted(row for share in shares for row in share) == list(range(len(lengths)))
        assert max(map(len, shares)) == -(-len(lengths) // count)
        tokens = [sum(lengths[row] for row in share) for share in shares]
        assert max(tokens) <= sum(sorted(lengths, reverse=True)[: max(map(len, shares))])
        if len(lengths) % count == 0:
            assert max(tokens) - min(tokens) <= max(lengths)
