"""One optimizer step's forward and backward passes, shared by training, the memory simulation and the dry run.

The rows of an optimizer batch are the recipe's. They are split into micro-batches to fit memory. The objective divides every
micro-batch by the supervised tokens of the complete batch, so the split changes no gradient.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qlora_phi3.errors import first_line, is_out_of_memory
from qlora_phi3.execution import IGNORE_INDEX, MicroBatchPlan, plan_micro_batches, share_rows
from qlora_phi3.objectives import Objective, ObjectiveOutput, sft

#: Packed sequences are padded to a multiple of this. oneDNN caches a compiled kernel for every shape: over 20 steps of 4 rows,
#: SmolLM2-135M in bf16 on CPU peaked at 1,413 MiB without padding, 1,121 with 64, 1,075 with 128, at equal speed. On CUDA fewer
#: sizes fragment the allocator's cache less.
PACKED_MULTIPLE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rows of one optimizer step (or of one slice of the evaluation), as micro-batches of tensors.

    One of several processes has the micro-batches of its share of the rows; the three counts are of all rows.
    """

    #: Keyword arguments of the model, and labels: input_ids, position_ids, labels, each (rows, length) int64; attention_mask of
    #: the same shape if rows are padded, document_lengths (a tuple of int) if they are packed.
    micro_batches: tuple[dict[str, Any], ...]
    #: The indices of the batch's rows in each micro-batch.
    row_indices: tuple[tuple[int, ...], ...]
    num_rows: int
    #: Tokens without padding.
    num_tokens: int
    #: Positions whose next token is supervised; the normalizer of the loss.
    num_supervised: int


class MicroBatchMemoryError(Exception):
    """Memory ran out in the micro-batch of this index; the gradients of its batch are incomplete.

    While this error is alive, its cause holds the tensors of that micro-batch.
    """

    def __init__(self, micro_batch: int, reason: str) -> None:
        super().__init__(f"memory ran out in micro-batch {micro_batch}: {reason}")
        self.micro_batch, self.reason = micro_batch, reason


def collate(rows: Sequence[Mapping[str, Any]], plan: MicroBatchPlan, *, rank: int = 0, count: int = 1) -> Batch:
    """Build the micro-batches of one optimizer step from tokenized rows (`input_ids`, `labels`): the share of one process."""
    lengths = [len(row["input_ids"]) for row in rows]
    share = share_rows(lengths, count)[rank]
    row_indices = [[share[row] for row in group] for group in plan_micro_batches([lengths[row] for row in share], plan)]
    tensors = []
    for row in rows:
        ids, labels = (torch.as_tensor(row[name], dtype=torch.int64).clone() for name in ("input_ids", "labels"))
        labels[0] = IGNORE_INDEX  # nothing predicts a document's first token
        tensors.append((ids, labels))
    build = _pack_rows if plan.packing else _pad_rows
    micro_batches = tuple(build([tensors[index] for index in indices]) for indices in row_indices)
    return Batch(
        micro_batches=micro_batches,
        row_indices=tuple(map(tuple, row_indices)),
        num_rows=len(rows),
        num_tokens=sum(lengths),
        num_supervised=sum(int((labels != IGNORE_INDEX).sum()) for _, labels in tensors),
    )


def _pack_rows(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Concatenate rows into one sequence. `document_lengths`, with their sums for the GPU's kernel in `document_starts`, and for
    transformers' attention `position_ids`, mark the documents.

    A last document without supervised tokens, at position 0 throughout, pads it to a multiple of `PACKED_MULTIPLE`.
    """
    lengths = [len(ids) for ids, _ in rows]
    padding = torch.zeros(-sum(lengths) % PACKED_MULTIPLE, dtype=torch.int64)
    documents = (*lengths, len(padding)) if len(padding) else tuple(lengths)
    return {
        "input_ids": torch.cat([*(ids for ids, _ in rows), padding])[None],
        "labels": torch.cat([*(labels for _, labels in rows), torch.full_like(padding, IGNORE_INDEX)])[None],
        "position_ids": torch.cat([*(torch.arange(length) for length in lengths), padding])[None],
        "document_lengths": documents,
        "document_starts": torch.tensor([0, *accumulate(documents)], dtype=torch.int32),
    }


def _pad_rows(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    ids = pad_sequence([ids for ids, _ in rows], batch_first=True)
    micro = {
        "input_ids": ids,
        "labels": pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=IGNORE_INDEX),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids).contiguous(),
    }
    if len({len(ids) for ids, _ in rows}) > 1:
        micro["attention_mask"] = pad_sequence([torch.ones_like(ids) for ids, _ in rows], batch_first=True)
    return micro


def forward_backward(
    model: nn.Module, batch: Batch, *, objective: Objective = sft, compute_dtype: torch.dtype, backward: Callable[[Tensor], None]
) -> ObjectiveOutput:
    """Add the gradients of a complete optimizer batch to the model's parameters, micro-batch by micro-batch.
    MicroBatchMemoryError where memory ran out; the caller must discard the gradients.

    Args:
        model: may be wrapped.
        compute_dtype: the dtype of the matmuls, through autocast unless it is fp32.
        backward: runs the backward pass of a loss: `Tensor.backward`, or the Trainer's, which scales the loss for fp16.
    """
    outputs = []
    for index, micro_batch in enumerate(batch.micro_batches):
        with _in_micro_batch(index):
            output = _forward(model, micro_batch, objective, compute_dtype, batch.num_supervised)
            backward(output.loss)
            outputs.append(ObjectiveOutput(loss=output.loss.detach(), metrics=output.metrics))
    return _sum(outputs)


def evaluate(
    model: nn.Module, batches: Iterable[Batch], *, objective: Objective = sft, compute_dtype: torch.dtype
) -> Iterator[tuple[Batch, ObjectiveOutput]]:
    """Evaluate batches without gradients, one at a time; every loss is normalized by its own batch's supervised tokens.
    MicroBatchMemoryError where memory ran out.
    """
    with evaluating(model), torch.no_grad():
        for batch in batches:
            outputs = []
            for index, micro_batch in enumerate(batch.micro_batches):
                with _in_micro_batch(index):
                    outputs.append(_forward(model, micro_batch, objective, compute_dtype, batch.num_supervised))
            yield batch, _sum(outputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set `model.eval()`, and restore the previous mode at the end."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _in_micro_batch(index: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MicroBatchMemoryError(index, first_line(error)) from error


def _forward(
    model: nn.Module, micro_batch: Mapping[str, Any], objective: Objective, compute_dtype: torch.dtype, normalizer: int
) -> ObjectiveOutput:
    device = next(model.parameters()).device
    inputs = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for name, value in micro_batch.items()
    }
    with torch.autocast(device.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32):
        return objective(model, inputs, max(1, normalizer))


def _sum(outputs: Sequence[ObjectiveOutput]) -> ObjectiveOutput:
    if not outputs:  # this process has no row of a short batch
        return ObjectiveOutput(loss=torch.zeros(()), metrics={})
    with _in_micro_batch(len(outputs) - 1):
        names = outputs[0].metrics
        metrics = {name: torch.stack([output.metrics[name] for output in outputs]).sum() for name in names}
        return ObjectiveOutput(loss=torch.stack([output.loss for output in outputs]).sum(), metrics=metrics)
