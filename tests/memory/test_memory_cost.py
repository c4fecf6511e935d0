"""The steps and evaluations of a run, counted by hand and by running it; the time of an evaluation."""

import pytest
from workshop import read_lines

from qlora_phi3.memory.cost import Recomputation, count_steps, estimate_evaluation_seconds
from qlora_phi3.recipe.schema import Training


@pytest.mark.parametrize(("keys", "first_step", "counted"), [
    # 101 rows are 13 steps of 8 rows; 0.2 of 26 steps is 5.2, so every 6th: before, after 6, 12, 18, 24 and 26
    ({"num_train_epochs": 2}, 0, (26, 2.0, 6)),
    ({"num_train_epochs": 2}, 18, (26, 2.0, 2)),
    ({"num_train_epochs": 2, "eval_strategy": "epoch"}, 0, (26, 2.0, 3)),
    ({"num_train_epochs": 1.5, "eval_strategy": "epoch"}, 0, (20, 20 / 13, 3)),
    ({"max_steps": 5, "eval_steps": 2}, 0, (5, 5 / 13, 4)),
    ({"eval_strategy": "no"}, 0, (13, 1.0, 2)),
    # the best weights are evaluated once more
    ({"max_steps": 4, "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}, 0, (4, 4 / 13, 4)),
])  # fmt: skip
def test_the_steps_and_the_evaluations_of_a_run_are_those_counted_by_hand(keys, first_step, counted):
    training = Training(batch_size=8, **keys)
    assert count_steps(training, 101, evaluates=True, first_step=first_step) == pytest.approx(counted)
    assert count_steps(training, 101, evaluates=False, first_step=first_step)[2] == 0


@pytest.mark.parametrize("keys", [{"eval_strategy": "epoch", "num_train_epochs": 1.5}, {"eval_steps": 0.3}])
def test_a_run_has_as_many_steps_and_evaluations_as_are_counted(shop, keys):
    shop.write(training={"batch_size": 8, "max_length": 64, "save_steps": 0.5, **keys})
    assert shop.run().exit_code == 0
    kinds = [record["kind"] for record in read_lines(shop.runs()[0] / "metrics.jsonl")]
    steps, _, evaluations = count_steps(Training(batch_size=8, **keys), 40, evaluates=True)
    assert (kinds.count("train"), kinds.count("eval")) == (steps, evaluations)


def test_an_evaluation_is_one_of_the_passes_of_a_step():
    # a step of 1,000 tokens in 6 s: forward, backward, and all layers once more; 5,000 tokens forward take 10 s
    assert estimate_evaluation_seconds(6.0, 1000, 5000, Recomputation(1.0)) == pytest.approx(10.0)
    assert estimate_evaluation_seconds(6.0, 1000, 5000, Recomputation(0.0)) == pytest.approx(15.0)
