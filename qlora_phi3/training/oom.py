"""An out-of-memory that costs nothing: the batch is computed again, in smaller pieces where it must be, and teaches the same.

Nothing of a failed pass stays. Its tensors are let go with the traceback that held them, all gradients of the batch are dropped,
the allocator's cache is given back, and the random numbers are rewound to where the batch began; then the whole batch is
computed again. Redoing the batch and not only the micro-batch that failed needs no copy of the gradients, so that no memory is
held ready for an accident. What comes after the backward pass, clipping and the optimizer's update, is not redone: it changes
gradients and weights in place.

What is tried, in this order:

1. the same again: an emptied cache cures fragmentation. Where that was needed a short while ago, it is left out, or a run that
   fragments at every step would compute every step twice;
2. micro-batches of fewer tokens, so that the one that failed is cut in two; down to single rows;
3. for a single row, every layer recomputed, on a card with its input kept in the computer's memory;
4. for a single row of many tokens, the MLPs computed in tiles;
5. then the run stops and names the row.

The lowered plan stays, and a resumed run begins with it (`restore_execution_plan`). The normalizer is that of the whole batch
whatever the pieces, so that without dropout a split changes only the order in which numbers are added.

With dropout, the same again draws the same masks: it is equal to the bit. A split cannot keep them: masks are drawn micro-batch
by micro-batch, each in the shape of its tensors, so that other pieces get other masks. They are as independent and of the same
probability as the ones they replace, as if the run had another seed from that step on.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora_phi3.data.batching import split_plan
from qlora_phi3.errors import RunError
from qlora_phi3.execution import ExecutionPlan, MicroBatchPlan, smaller_mlp_tile
from qlora_phi3.reporter import OomRecord, Reporter
from qlora_phi3.step import Batch, MicroBatchMemoryError, StepResult, collate
from qlora_phi3.training.report import describe_device

Phase = Literal["training", "evaluation"]


Remedy = Literal["again", "split", "offload", "tile"]


#: Steps within which a second out-of-memory of the same phase is no accident any more: a plan that cannot hold is lowered.
RETRY_COOLDOWN_STEPS = 20


@dataclass(frozen=True, slots=True)
class _When:
    """What a batch is computed for; the step as the record has it."""

    phase: Phase
    step: int

    def __str__(self) -> str:
        return f"step {self.step}" if self.phase == "training" else f"the evaluation after step {self.step}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """Where memory ran out, and how much there was then, in bytes (None on a CPU)."""

    micro_batch: int
    reason: str
    allocated_bytes: int | None


class MemoryGuard:
    """Computes batches, whatever memory allows; holds the plans they are laid out by, which it lowers.

    Args:
        model: whose gradients are dropped.
        setup: what the run begins with.
        sources: names of the data's sources, so that a row can be named.
        apply: gives the model a leaner set-up.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        execution: ExecutionPlan,
        device: torch.device,
        reporter: Reporter,
        sources: Sequence[str],
        apply: Callable[[ExecutionPlan], None],
    ) -> None:
        self.plans: dict[Phase, MicroBatchPlan] = {
            "training": execution.micro_batch,
            "evaluation": execution.evaluation,
        }
        #: Out-of-memory errors of this session that were survived.
        self.num_recovered = 0
        self._model = model
        self._device = device
        self._listener = reporter
        self._sources = sources
        self._setup, self._apply = execution, apply
        self._last_again: dict[Phase, int] = {}

    def compute(
        self, rows: Sequence[Mapping[str, Any]], run_pass: Callable[[Batch], StepResult], *, phase: Phase, step: int
    ) -> tuple[Batch, StepResult]:
        """Lay rows out and pass over them, until memory suffices.

        Args:
            rows: of one batch, as `collate` takes them.
            pass_over: forward, and in training backward; raises MicroBatchMemoryError.
            step: for the record.

        Returns:
            The batch as it was laid out at last, and the result of the pass that succeeded.

        Raises:
            RunError: a single row does not fit; gradients are dropped, weights and random numbers are those of before.
        """
        rng_state = _read_rng_state(self._device)
        failures: list[tuple[int, ...]] = []
        while True:
            batch = collate(rows, self.plans[phase])
            outcome = self._attempt(run_pass, batch)
            if isinstance(outcome, StepResult):
                return batch, outcome
            self._forget(rng_state)
            group, when = batch.row_indices[outcome.micro_batch], _When(phase, step)
            lengths = [len(rows[index]["input_ids"]) for index in group]
            remedy = self._choose(lengths, when, first=not failures, repeated=group in failures)
            failures.append(group)
            if remedy is None:
                raise self._does_not_fit(rows[group[0]], outcome, len(failures), when)
            self._make_room(lengths, outcome, remedy, when)

    def _attempt(self, run_pass: Callable[[Batch], StepResult], batch: Batch) -> StepResult | _Failure:
        """The error, and with it every tensor its traceback holds, is gone when this returns."""
        try:
            return run_pass(batch)
        except MicroBatchMemoryError as error:
            return _Failure(
                micro_batch=error.micro_batch,
                reason=error.reason,
                allocated_bytes=torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else None,
            )

    def _forget(self, rng_state: "_RngState") -> None:
        for parameter in self._model.parameters():
            parameter.grad = None
        gc.collect()  # an error and the frames of its traceback may hold each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        _restore_rng_state(rng_state, self._device)

    def _choose(self, lengths: Sequence[int], when: _When, *, first: bool, repeated: bool) -> Remedy | None:
        """What to do about a micro-batch of rows of these lengths; None: nothing is left.

        Args:
            first: nothing failed in this batch before.
            repeated: this micro-batch did.
        """
        recent = when.step - self._last_again.get(when.phase, -RETRY_COOLDOWN_STEPS - 1) <= RETRY_COOLDOWN_STEPS
        if first and not recent:
            return "again"
        if len(lengths) > 1:
            return "split"
        if when.phase == "training" and _offloaded(self._setup, self._device) != self._setup:
            return "offload"
        if lengths[0] > smaller_mlp_tile(lengths[0]) and _tiled(self._setup, lengths[0]) != self._setup:
            return "tile"
        return None if repeated else "again"

    def _make_room(self, lengths: Sequence[int], failure: _Failure, remedy: Remedy, when: _When) -> None:
        """Take the measure against a micro-batch of rows of these lengths, and tell of it."""
        before = self.plans[when.phase]
        if remedy == "split":
            self.plans[when.phase] = split_plan(before, lengths)
        elif remedy == "again":
            self._last_again[when.phase] = when.step
        else:
            offloaded, tiled = _offloaded(self._setup, self._device), _tiled(self._setup, lengths[0])
            self._setup = offloaded if remedy == "offload" else tiled
            self._apply(self._setup)
        self.num_recovered += 1
        self._listener.oom(
            OomRecord(
                step=when.step,
                phase=when.phase,
                remedy=remedy,
                rows=len(lengths),
                tokens=sum(lengths),
                before=before,
                after=self.plans[when.phase],
                allocated_bytes=failure.allocated_bytes,
                free_bytes=torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else None,
                reason=failure.reason,
            )
        )

    def _does_not_fit(self, row: Mapping[str, Any], failure: _Failure, times: int, when: _When) -> RunError:
        length = len(row["input_ids"])
        offloaded = " and every layer recomputed from the computer's memory" if when.phase == "training" else ""
        return RunError(
            f"{name_row(row, self._sources)} with its {length:,} tokens does not fit in the memory of "
            f"{describe_device(self._device)}: in {when} it ran out {times} times, at last with this row alone, "
            f"the cache emptied{offloaded} ({failure.reason.rstrip('.')}).",
            "Close other programs that use this memory and go on with --resume; or start a new run with a smaller "
            f"[training] max_length than {length}.",
        )


def name_row(row: Mapping[str, Any], sources: Sequence[str]) -> str:
    """`file:line` of a row of `prepare_datasets`; "a row" where it does not say."""
    if "source" not in row or row["source"] >= len(sources):
        return "A row"
    return f"{sources[row['source']]}:{row['source_row']}"


def restore_execution_plan(
    execution: ExecutionPlan, records: Sequence[Mapping[str, Any]], device: torch.device
) -> ExecutionPlan:
    """`execution`, as far as memory ran out in earlier sessions of the run lowered to what they had come to.

    Args:
        records: of the run's metrics.jsonl.
        device: on a CPU there is nothing to offload to.
    """
    num_recovered = [record for record in records if record["kind"] == "oom"]
    plans: dict[Phase, MicroBatchPlan] = {"training": execution.micro_batch, "evaluation": execution.evaluation}
    for record in num_recovered:
        plan = plans[record["phase"]]
        remedy = record.get("remedy", record.get("measure"))  # runs before version 0.2 wrote "measure"
        if remedy == "split":
            plans[record["phase"]] = replace(plan, max_tokens=min(plan.max_tokens, record["after"]["max_tokens"]))
        elif remedy == "offload":
            execution = _offloaded(execution, device)
        elif remedy == "tile":
            execution = _tiled(execution, record["tokens"])
    return replace(execution, micro_batch=plans["training"], evaluation=plans["evaluation"])


def _offloaded(execution: ExecutionPlan, device: torch.device) -> ExecutionPlan:
    """Every layer recomputed; on a card from the computer's memory."""
    return replace(
        execution, checkpoint_every=1, activation_offloading=execution.activation_offloading or device.type != "cpu"
    )


def _tiled(execution: ExecutionPlan, tokens: int) -> ExecutionPlan:
    """The MLPs in tiles for a row of so many tokens, unless they are in smaller ones already."""
    tile = smaller_mlp_tile(tokens)
    return replace(execution, mlp_tile_tokens=min(execution.mlp_tile_tokens or tile, tile))


@dataclass(frozen=True, slots=True)
class _RngState:
    """Where torch's random numbers stand; a pass draws from no other generator."""

    cpu: Tensor
    device: Tensor | None


def _read_rng_state(device: torch.device) -> _RngState:
    return _RngState(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)


def _restore_rng_state(rng_state: _RngState, device: torch.device) -> None:
    torch.set_rng_state(rng_state.cpu)
    if rng_state.device is not None:
        torch.cuda.set_rng_state(rng_state.device, device)
