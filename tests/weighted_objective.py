"""An objective other than `sft`: log-probabilities weighted by token, as a preference method would use them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qlora_phi3.model.phi3 import find_base
from qlora_phi3.objectives import ObjectiveOutput, compute_supervised


def weighted_logprobs(model: nn.Module, micro_batch: Mapping[str, Any], normalizer: int) -> ObjectiveOutput:
    """Minus the log-probabilities of the supervised tokens, times 1, 2 or 3 by their id, divided by the normalizer."""
    base = find_base(model)
    hidden, targets = compute_supervised(model, micro_batch)
    logits = (hidden @ base.head_weight.to(hidden.dtype).T).float()
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    loss = -(logprobs * (1 + targets % 3)).sum() / normalizer
    return ObjectiveOutput(loss=loss, metrics={"sum_logprobs": logprobs.detach().sum()})
