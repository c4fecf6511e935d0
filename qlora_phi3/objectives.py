"""Training objectives: functions from a model and a micro-batch to a loss and metrics.

`step.py`, the retry after an out-of-memory error, the memory simulation and the dry run take an objective and do not know which
one it is. A preference method is one more function here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qlora_phi3.model.loss import select_supervised, tiled_cross_entropy
from qlora_phi3.model.phi3 import find_base


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveOutput:
    """The result of an objective on one micro-batch; of a batch, the sums over its micro-batches."""

    #: 0-dim fp32, already divided by the normalizer; its backward pass gives this micro-batch's share of the gradient.
    loss: Tensor
    #: Name -> 0-dim tensor without gradient; the step sums each over its micro-batches.
    metrics: Mapping[str, Tensor]


#: (model, micro-batch on the model's device, normalizer) -> output. The model may be wrapped; the normalizer is the number of
#: supervised tokens of the complete optimizer batch.
Objective = Callable[[nn.Module, Mapping[str, Any], int], ObjectiveOutput]


def compute_supervised(model: nn.Module, micro_batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Run the model without computing logits.

    Args:
        model: a Phi-3, with or without wrappers.
        micro_batch: keyword arguments of the model, and `labels`, (rows, length) int64, unshifted, -100 where not supervised.

    Returns:
        The final hidden states (positions, hidden_size) that predict a supervised token, and those tokens (positions,) int64.
    """
    inputs = {name: value for name, value in micro_batch.items() if name != "labels"}
    return select_supervised(model(**inputs, return_final_hidden=True).last_hidden_state, micro_batch["labels"])


def sft(model: nn.Module, micro_batch: Mapping[str, Any], normalizer: int) -> ObjectiveOutput:
    """Supervised fine-tuning: the cross-entropy of the supervised tokens.

    Returns:
        The summed negative log-likelihood divided by `normalizer`, and `num_correct` (int64): how many supervised tokens were the
        most likely token.
    """
    base = find_base(model)
    hidden, targets = compute_supervised(model, micro_batch)
    loss, num_correct = tiled_cross_entropy(
        hidden, base.head_weight, targets, normalizer=normalizer, tile_bytes=base.logits_tile_bytes
    )
    return ObjectiveOutput(loss=loss, metrics={"num_correct": num_correct})
