"""The loss on the supervised positions, computed in tiles so that the full logits never exist.

The full logits of Phi-3-mini take 0.31 MiB a token. `tiled_cross_entropy` computes the gradient with respect to the hidden states
from the same tile in the forward pass, so its backward pass needs neither logits nor a second matmul.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES, IGNORE_INDEX
from qlora_phi3.model.kernels import multiply, takes_onednn


def select_supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Select the hidden states that predict a supervised token, and those tokens.

    Args:
        hidden: (rows, length, hidden_size), any dtype.
        labels: (rows, length), int64, unshifted: position t holds the token at t, or -100 if it is not supervised. The first
            token of a document has no predecessor and must be -100.

    Returns:
        (positions, hidden_size) in the dtype of `hidden`, and (positions,) int64.
    """
    predicting = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return hidden[:, :-1][predicting], labels[:, 1:][predicting]


def tiled_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, normalizer: float, tile_bytes: int = DEFAULT_LOGITS_TILE_BYTES
) -> tuple[Tensor, Tensor]:
    """Compute the summed negative log-likelihood of `targets`, divided by `normalizer`.

    Args:
        hidden: (positions, hidden_size), floating point: the final hidden states of the supervised positions.
        weight: (vocabulary, hidden_size), the output head; it is cast to the dtype of `hidden`.
        targets: (positions,), int64 token ids.
        normalizer: the number of supervised tokens of the complete optimizer batch.
        tile_bytes: bytes of fp32 logits alive at once; a tile has at least one position.

    Returns:
        The loss, an fp32 scalar, differentiable with respect to `hidden` and `weight`; and the number of targets that were the
        most likely token, an int64 scalar.
    """
    loss, num_correct = _TiledCrossEntropy.apply(hidden, weight, targets, normalizer, tile_bytes)  # type: ignore[no-untyped-call]
    return loss, num_correct


def tile_starts(positions: int, tile_rows: int) -> Sequence[int]:
    """The first position of each tile; the memory simulation leaves out those that only repeat what the others do."""
    return range(0, positions, tile_rows)


class _TiledCrossEntropy(torch.autograd.Function):
    """loss = sum(nll) / normalizer; saves d loss / d hidden, and d loss / d weight if the head is trained."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, normalizer: float, tile_bytes: int
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        # Gradients divided by thousands of tokens underflow in fp16; GradScaler's factor arrives only in the backward pass.
        saved_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        grad_hidden = torch.empty_like(hidden, dtype=saved_dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        head = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        tile_rows = max(1, tile_bytes // (4 * len(head)))
        # Two buffers that every tile reuses; they are one where `hidden` is fp32 or fp64. oneDNN's product is a new tensor.
        size = min(tile_rows, len(hidden)), len(head)
        buffer_16 = None if takes_onednn(hidden) else hidden.new_empty(size)
        buffer_32 = hidden.new_empty(size, dtype=torch.float32) if hidden.element_size() == 2 else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in tile_starts(len(hidden), tile_rows):
                rows = slice(start, start + tile_rows)
                tile, target = hidden[rows], targets[rows, None]
                out = buffer_16 if buffer_16 is None else buffer_16[: len(tile)]
                grad_logits = multiply(tile, head.T) if out is None else torch.mm(tile, head.T, out=out)
                logits = grad_logits if buffer_32 is None else buffer_32[: len(tile)].copy_(grad_logits)
                max_logits, top = logits.max(dim=-1, keepdim=True)
                num_correct += (top == target).sum()
                target_logits = logits.gather(1, target)
                sum_exp = logits.sub_(max_logits).exp_().sum(dim=-1, keepdim=True)
                total += (sum_exp.log() + max_logits - target_logits).sum()
                if grad_hidden is not None or grad_weight is not None:
                    logits.div_(sum_exp).scatter_add_(1, target, torch.full_like(target_logits, -1.0))
                    grad_logits.copy_(logits)
                if grad_hidden is not None:
                    grad_hidden[rows] = multiply(grad_logits, head).float() / normalizer
                if grad_weight is not None:
                    grad_weight += (grad_logits.T @ tile).float() / normalizer
                del grad_logits, logits  # before the next tile's
        ctx.mark_non_differentiable(num_correct)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total / normalizer, num_correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss = grads[0]
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if grad is None else (grad * grad_loss).to(dtype) for grad, dtype in saved), None, None, None
