"""The rows that a plan must carry, on lengths that can be worked out by hand, and the time of a step."""

from dataclasses import replace

import pytest

from qlora_phi3.execution import ExecutionPlan, MicroBatchPlan
from qlora_phi3.family import read_architecture
from qlora_phi3.memory.cost import count_weights
from qlora_phi3.memory.plan import assume_lengths, read_lengths, step_shape

LAYOUT = MicroBatchPlan(max_tokens=2048, max_rows=2, packing=True, longrope_boundary=None)
EXECUTION = ExecutionPlan(
    micro_batch=LAYOUT, evaluation=LAYOUT, checkpoint_every=1, activation_offloading=False, optim="adamw_8bit"
)


def test_a_typical_step_has_rows_of_all_lengths():
    rows = read_lengths(range(1, 9), [3, 5], 4)
    assert rows.typical_step() == (7, 5, 3, 1)
    assert (rows.longest, rows.longest_evaluation) == (8, 5)


@pytest.mark.parametrize(
    ("max_tokens", "packing", "lengths", "later", "accumulates"),
    [
        (60, True, (40, 20), (), True),  # filled to the last token: 40 and a rest of 20; so are the other 60
        (70, True, (40, 30), (30, 30), False),  # 60 tokens are left, and the gradients are there then
        (500, True, (40, 40, 20), (), False),  # the step has 100 tokens
        (10, True, (40,), (30,), False),  # a longer row is alone
        (80, False, (40, 30), (20, 10), False),  # two rows of 40 with padding: 80; the other two 40
        (65, False, (30, 20), (), True),  # 40; then two of 30
    ],
)
def test_the_heaviest_micro_batch_is_a_packed_one_filled_or_the_largest_padded_one(
    max_tokens, packing, lengths, later, accumulates
):
    """The first of a step finds no gradients on the GPU; a later one does."""
    layout = replace(LAYOUT, max_tokens=max_tokens, packing=packing)
    shape = step_shape(read_lengths([40, 30, 20, 10], [], 4), replace(EXECUTION, micro_batch=layout))
    assert (shape.lengths, shape.later_lengths, shape.accumulates) == (lengths, later, accumulates)
    assert shape.evaluation_lengths == ()


def test_evaluation_has_as_many_of_the_longest_held_out_row_as_a_micro_batch_takes():
    assert step_shape(read_lengths([40] * 8, [600], 8), EXECUTION).evaluation_lengths == (600,) * 3  # packed: by tokens
    assert step_shape(read_lengths([40] * 8, [600], 2), EXECUTION).evaluation_lengths == (600,) * 2
    padded = replace(EXECUTION, evaluation=replace(LAYOUT, packing=False, max_tokens=4800, max_rows=4))
    assert step_shape(read_lengths([40] * 8, [600], 2), padded).evaluation_lengths == (600,) * 4  # more than a step has
    assert step_shape(assume_lengths(3000, 8), EXECUTION).evaluation_lengths == (3000,)


def test_the_cost_model_counts_the_weights_of_the_linear_layers():
    architecture = read_architecture("microsoft/Phi-4-mini-instruct", prefer_shipped=True)
    # 32 layers of 3,072 / 8,192; of 24 heads of 128 there are 8 for key and value.
    attention, down = 32 * 3072 * (3072 + 2 * 1024 + 3072), 32 * 3072 * 8192
    assert count_weights(architecture) == attention + 3 * down
