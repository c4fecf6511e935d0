"""One optimizer step's forward and backward: the only place that knows how we train.

The rows of an optimizer batch are the recipe's. They are split into micro-batches to fit memory, and every micro-batch is
divided by the supervised tokens of the whole batch, so that the split changes no gradient.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_phi3.data.batching import plan_micro_batches
from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.model.loss import IGNORE_INDEX

#: Packed sequences are as long as a multiple of this. oneDNN keeps a compiled kernel for every shape it meets: over 20 steps of
#: 4 rows, SmolLM2-135M in bf16 on CPU peaked at 1,413 MiB without, 1,121 with 64, 1,075 with 128, at equal speed. On CUDA
#: fewer sizes leave the allocator's cache in fewer pieces.
PACKED_MULTIPLE = 64


#: What the libraries below torch, and its own CPU allocator, write where memory ran out: they raise a plain RuntimeError. cuBLAS
#: says either of its two codes where it finds no memory for its handle.
OUT_OF_MEMORY = re.compile(
    r"out of memory|_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|(can't|cannot) allocate memory|not enough memory"
    r"|bad[_ ]alloc",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rows of one optimizer step (or of one slice of the evaluation), as the model takes them."""

    #: Keyword arguments of the model: input_ids, position_ids, labels (int64), and attention_mask where rows are padded or
    #: document_lengths where they are packed.
    micro_batches: tuple[dict[str, Any], ...]
    #: Which of the batch's rows each micro-batch holds.
    row_indices: tuple[tuple[int, ...], ...]
    num_rows: int
    #: Tokens without padding.
    num_tokens: int
    #: Positions whose next token is learned; the normalizer of the loss.
    num_supervised: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a pass over a batch gave: the mean loss over its supervised tokens, and how many were predicted right."""

    loss: Tensor
    num_correct: Tensor


class MicroBatchMemoryError(Exception):
    """Memory ran out in one micro-batch; the gradients of its batch are half done.

    Until it is let go, its cause holds the tensors of that micro-batch.

    Args:
        micro_batch: its number in the batch.
        reason: what torch or the library said.
    """

    def __init__(self, micro_batch: int, reason: str) -> None:
        super().__init__(f"memory ran out in micro-batch {micro_batch}: {reason}")
        self.micro_batch = micro_batch
        self.reason = reason


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def _in_micro_batch(number: int) -> Iterator[None]:
    """Say in which micro-batch memory ran out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MicroBatchMemoryError(number, reason) from error


def collate(rows: Sequence[Mapping[str, Any]], plan: MicroBatchPlan) -> Batch:
    """Turn tokenised rows (`input_ids`, `labels`) into the micro-batches of one optimizer step."""
    lengths = [len(row["input_ids"]) for row in rows]
    row_indices = plan_micro_batches(
        lengths,
        max_tokens=plan.max_tokens,
        max_rows=plan.max_rows,
        packing=plan.packing,
        boundary=plan.longrope_boundary,
    )
    lay_out = _pack_rows if plan.packing else _pad
    micro_batches = tuple(lay_out([rows[index] for index in group]) for group in row_indices)
    return Batch(
        micro_batches=micro_batches,
        row_indices=tuple(map(tuple, row_indices)),
        num_rows=len(rows),
        num_tokens=sum(lengths),
        num_supervised=sum(int((micro["labels"] != IGNORE_INDEX).sum()) for micro in micro_batches),
    )


def _row_tensors(row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    labels = torch.as_tensor(row["labels"], dtype=torch.int64).clone()
    labels[0] = IGNORE_INDEX  # nothing precedes a document's first token
    return torch.as_tensor(row["input_ids"], dtype=torch.int64), labels


def _pack_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One sequence; document_lengths, and for transformers' own attention the reset position_ids, tell where a document ends.

    A last document of nothing to learn, at position 0 throughout, fills it up to a multiple of `PACKED_MULTIPLE`.
    """
    pairs = [_row_tensors(row) for row in rows]
    lengths = [len(ids) for ids, _ in pairs]
    padding = torch.zeros(-sum(lengths) % PACKED_MULTIPLE, dtype=torch.int64)
    return {
        "input_ids": torch.cat([*(ids for ids, _ in pairs), padding])[None],
        "labels": torch.cat([*(labels for _, labels in pairs), torch.full_like(padding, IGNORE_INDEX)])[None],
        "position_ids": torch.cat([*(torch.arange(length) for length in lengths), padding])[None],
        "document_lengths": (*lengths, len(padding)) if len(padding) else tuple(lengths),
    }


def _pad(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    pairs = [_row_tensors(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([ids for ids, _ in pairs], batch_first=True, padding_value=0)
    micro = {
        "input_ids": ids,
        "labels": pad([labels for _, labels in pairs], batch_first=True, padding_value=IGNORE_INDEX),
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

    Raises:
        MicroBatchMemoryError: memory ran out; what gradients there are must be thrown away.
    """
    results: list[StepResult] = []
    for number, micro in enumerate(batch.micro_batches):
        with _in_micro_batch(number):
            result = _forward(model, micro, batch.num_supervised, compute_dtype)
            backward(result.loss)
            results.append(StepResult(loss=result.loss.detach(), num_correct=result.num_correct))
    return _sum(results)


def evaluate(
    model: nn.Module, batches: Iterable[Batch], *, compute_dtype: torch.dtype
) -> Iterator[tuple[Batch, StepResult]]:
    """Score batches without gradients, one at a time; every loss is the mean over its own batch's supervised tokens.

    Raises:
        MicroBatchMemoryError: memory ran out.
    """
    with evaluating(model), torch.no_grad():
        for batch in batches:
            results: list[StepResult] = []
            for number, micro in enumerate(batch.micro_batches):
                with _in_micro_batch(number):
                    results.append(_forward(model, micro, batch.num_supervised, compute_dtype))
            yield batch, _sum(results)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while; the mode it had before comes back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _forward(model: nn.Module, micro: dict[str, Any], normalizer: int, compute_dtype: torch.dtype) -> StepResult:
    device = next(model.parameters()).device
    inputs = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in micro.items()
    }
    with torch.autocast(device.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32):
        output = model(**inputs, num_items_in_batch=max(1, normalizer))
    return StepResult(loss=output.loss, num_correct=output.num_correct)


def _sum(results: Sequence[StepResult]) -> StepResult:
    with _in_micro_batch(len(results) - 1):
        return StepResult(
            loss=torch.stack([result.loss for result in results]).sum(),
            num_correct=torch.stack([result.num_correct for result in results]).sum(),
        )
