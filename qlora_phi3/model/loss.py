"""Cross-entropy over the supervised positions, in tiles, with the gradient made in the forward pass.

The full logits of Phi-3-mini take 0.31 MiB a token; here at most one tile of them is alive. The gradient with respect to the
hidden states is computed from the same tile, so that the backward pass needs neither the logits nor a second matmul.
"""

from typing import Any

import torch
from torch import Tensor

from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES

IGNORE_INDEX = -100


class _TiledCrossEntropy(torch.autograd.Function):
    """loss = sum(nll) / normalizer; saves d loss / d hidden (and d loss / d weight where the head is trained)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, normalizer: float, tile_rows: int
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        # fp16 has no room for gradients divided by thousands of tokens; GradScaler's factor arrives only in backward.
        held_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        grad_hidden = torch.empty_like(hidden, dtype=held_dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        head = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        logits_16 = hidden.new_empty((min(tile_rows, len(hidden)), len(head)))
        logits_32 = logits_16 if logits_16.dtype == torch.float32 else torch.empty_like(logits_16, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], tile_rows):
                rows = slice(start, start + tile_rows)
                tile, target = hidden[rows], targets[rows, None]
                grad_logits = torch.mm(tile, head.T, out=logits_16[: len(tile)])
                logits = grad_logits if logits_32 is logits_16 else logits_32[: len(tile)].copy_(grad_logits)
                max_logits, top = logits.max(dim=-1, keepdim=True)
                correct += (top == target).sum()
                target_logits = logits.gather(1, target)
                sum_exp = logits.sub_(max_logits).exp_().sum(dim=-1, keepdim=True)
                total += (sum_exp.log() + max_logits - target_logits).sum()
                if grad_hidden is None and grad_weight is None:
                    continue
                logits.div_(sum_exp).scatter_add_(1, target, torch.full_like(target_logits, -1.0))
                grad_logits.copy_(logits)
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad_logits @ head).float() / normalizer
                if grad_weight is not None:
                    grad_weight += (grad_logits.T @ tile).float() / normalizer
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total / normalizer, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss = grads[0]
        scaled = [
            None if held is None else (held * grad_loss).to(dtype)
            for held, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], scaled[1], None, None, None


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, normalizer: float, tile_bytes: int = DEFAULT_LOGITS_TILE_BYTES
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of `targets`, divided by `normalizer`.

    Args:
        hidden: (positions, hidden_size), the final hidden states of the supervised positions only.
        weight: (vocabulary, hidden_size), the output head; cast to the dtype of `hidden`.
        targets: (positions,), int64, every one a token id.
        normalizer: what the sum is divided by; the supervised tokens of the whole optimizer batch.
        tile_bytes: fp32 logits alive at once; at least one position's.

    Returns:
        The loss, fp32 scalar, differentiable with respect to `hidden` and `weight`; and how many targets were the most
        likely token, int64 scalar.
    """
    rows = max(1, tile_bytes // (4 * weight.shape[0]))
    loss, correct = _TiledCrossEntropy.apply(hidden, weight, targets, normalizer, rows)  # type: ignore[no-untyped-call]
    return loss, correct


def select_supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states that predict a supervised token, and those tokens.

    Args:
        hidden: (rows, length, hidden_size).
        labels: (rows, length), int64, unshifted: position t holds the token at t, or -100 where it is not supervised. The
            first token of a document has no predecessor and must be -100.

    Returns:
        (positions, hidden_size) and (positions,).
    """
    predicting = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return hidden[:, :-1][predicting], labels[:, 1:][predicting]
