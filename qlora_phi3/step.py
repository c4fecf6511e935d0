"""One optimizer step's forward and backward: the only place that knows how we train.

The rows of an optimizer batch are the recipe's. They are split into micro-batches to fit memory, and every micro-batch is
divided by the supervised tokens of the whole batch, so that the split changes no gradient.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_phi3.dataset.pack import plan_micro_batches
from qlora_phi3.loss import IGNORED

#: Packed sequences are as long as a multiple of this. oneDNN keeps a compiled kernel for every shape it meets: over 20 steps of
#: 4 rows, SmolLM2-135M in bf16 on CPU peaked at 1,413 MiB without, 1,121 with 64, 1,075 with 128, at equal speed. On CUDA
#: fewer sizes leave the allocator's cache in fewer pieces.
PACKED_MULTIPLE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchPlan:
    """How the rows of a batch are laid out in tensors; it decides memory and speed, never what is learned."""

    #: Tokens of a micro-batch, padding included; a single longer row stands alone.
    max_tokens: int
    #: Rows of a micro-batch.
    max_rows: int
    #: Lay rows end to end in one sequence (block-diagonal attention) instead of padding them.
    packing: bool
    #: Rows longer than this never share a micro-batch with shorter ones (longrope switches its factors for the whole batch).
    longrope_boundary: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rows of one optimizer step (or of one slice of the evaluation), as the model takes them."""

    #: Keyword arguments of the model: input_ids, position_ids, labels (int64), and attention_mask where rows are padded or
    #: document_lengths where they are packed.
    micro_batches: tuple[dict[str, Any], ...]
    num_rows: int
    #: Tokens without padding.
    num_tokens: int
    #: Positions whose next token is learned; the normaliser of the loss.
    num_supervised: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a pass over a batch gave: the mean loss over its supervised tokens, and how many were predicted right."""

    loss: Tensor
    num_correct: Tensor


def collate(rows: Sequence[Mapping[str, Any]], plan: MicroBatchPlan) -> Batch:
    """Turn tokenised rows (`input_ids`, `labels`) into the micro-batches of one optimizer step."""
    lengths = [len(row["input_ids"]) for row in rows]
    groups = plan_micro_batches(
        lengths,
        max_tokens=plan.max_tokens,
        max_rows=plan.max_rows,
        packing=plan.packing,
        boundary=plan.longrope_boundary,
    )
    lay_out = _lay_end_to_end if plan.packing else _pad
    micro_batches = tuple(lay_out([rows[index] for index in group]) for group in groups)
    return Batch(
        micro_batches=micro_batches,
        num_rows=len(rows),
        num_tokens=sum(lengths),
        num_supervised=sum(int((micro["labels"] != IGNORED).sum()) for micro in micro_batches),
    )


def _row_tensors(row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    labels = torch.as_tensor(row["labels"], dtype=torch.int64).clone()
    labels[0] = IGNORED  # nothing precedes a document's first token
    return torch.as_tensor(row["input_ids"], dtype=torch.int64), labels


def _lay_end_to_end(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One sequence; document_lengths, and for transformers' own attention the reset position_ids, tell where a document ends.

    A last document of nothing to learn, at position 0 throughout, fills it up to a multiple of `PACKED_MULTIPLE`.
    """
    pairs = [_row_tensors(row) for row in rows]
    lengths = [len(ids) for ids, _ in pairs]
    filling = torch.zeros(-sum(lengths) % PACKED_MULTIPLE, dtype=torch.int64)
    return {
        "input_ids": torch.cat([*(ids for ids, _ in pairs), filling])[None],
        "labels": torch.cat([*(labels for _, labels in pairs), torch.full_like(filling, IGNORED)])[None],
        "position_ids": torch.cat([*(torch.arange(length) for length in lengths), filling])[None],
        "document_lengths": (*lengths, len(filling)) if len(filling) else tuple(lengths),
    }


def _pad(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    pairs = [_row_tensors(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([ids for ids, _ in pairs], batch_first=True, padding_value=0)
    micro = {
        "input_ids": ids,
        "labels": pad([labels for _, labels in pairs], batch_first=True, padding_value=IGNORED),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids).contiguous(),
    }
    if len({len(ids) for ids, _ in pairs}) > 1:
        micro["attention_mask"] = pad([torch.ones_like(ids) for ids, _ in pairs], batch_first=True, padding_value=0)
    return micro


def forward_backward(
    model: nn.Module, batch: Batch, *, compute_dtype: torch.dtype, backward: Callable[[Tensor], None]
) -> StepResult:
    """Add the gradients of a whole optimizer batch to the model's parameters, micro-batch by micro-batch.

    Args:
        backward: what runs the backward pass of a loss (the Trainer's, which scales it for fp16; or `Tensor.backward`).
    """
    results = []
    for micro in batch.micro_batches:
        result = _forward(model, micro, batch.num_supervised, compute_dtype)
        backward(result.loss)
        results.append(StepResult(loss=result.loss.detach(), num_correct=result.num_correct))
    return _sum(results)


def evaluate(
    model: nn.Module, batches: Iterable[Batch], *, compute_dtype: torch.dtype
) -> Iterator[tuple[Batch, StepResult]]:
    """Score batches without gradients, one at a time; every loss is the mean over its own batch's supervised tokens."""
    with evaluating(model), torch.no_grad():
        for batch in batches:
            yield (
                batch,
                _sum([_forward(model, micro, batch.num_supervised, compute_dtype) for micro in batch.micro_batches]),
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while; the mode it had before comes back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _forward(model: nn.Module, micro: dict[str, Any], normaliser: int, compute_dtype: torch.dtype) -> StepResult:
    device = next(model.parameters()).device
    inputs = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in micro.items()
    }
    with torch.autocast(device.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32):
        output = model(**inputs, num_items_in_batch=max(1, normaliser))
    return StepResult(loss=output.loss, num_correct=output.num_correct)


def _sum(results: Sequence[StepResult]) -> StepResult:
    return StepResult(
        loss=torch.stack([result.loss for result in results]).sum(),
        num_correct=torch.stack([result.num_correct for result in results]).sum(),
    )
