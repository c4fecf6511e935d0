"""What the libraries say that is no news."""

import logging

import pytest

from qlora_phi3.training.trainer import _tells_more_than_shares

HEAD = "Warning: The following arguments do not match the ones in the `trainer_state.json` within the checkpoint directory: "


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (HEAD + "\n\teval_steps: 0.2 (from args) != 5 (from trainer_state.json)", False),
        (
            HEAD
            + "\n\teval_steps: 0.2 (from args) != 5 (from trainer_state.json)"
            + "\n\tsave_steps: 0.2 (from args) != 5 (from trainer_state.json)",
            False,
        ),
        (HEAD + "\n\teval_steps: 5 (from args) != 4 (from trainer_state.json)", True),
        (
            HEAD
            + "\n\teval_steps: 0.2 (from args) != 5 (from trainer_state.json)"
            + "\n\tper_device_train_batch_size: 8 (from args) != 4 (from trainer_state.json)",
            True,
        ),
        ("Something else: 0.2 (from args)", True),
    ],
)
def test_a_share_that_became_steps_is_no_difference_at_resuming_and_every_other_is(text, passes):
    record = logging.LogRecord("transformers.trainer_utils", logging.WARNING, "", 0, text, (), None)
    assert _tells_more_than_shares(record) is passes


def test_the_words_are_those_of_transformers():
    """Else the warning is back, or hidden with something else."""
    import inspect

    from transformers import trainer_utils

    source = inspect.getsource(trainer_utils.compare_trainer_and_checkpoint_args)
    assert "`trainer_state.json`" in source
    assert "(from args) != " in source
