"""Recovery from out-of-memory errors: the batch is computed again, in smaller pieces where necessary, with the same gradients.

Nothing of a failed pass stays: its tensors are released with the traceback, gradients are dropped, the allocator's cache is
emptied, and the random numbers are rewound to the start of the batch. Repeating the batch, and not only the micro-batch that
failed, needs no copy of the gradients. What follows the backward pass is not repeated: it changes weights in place. The remedies:

1. "again": an empty cache removes fragmentation. It is left out where it was needed a few steps ago, or a run that fragments at
   every step would compute every step twice;
2. "split": micro-batches of fewer tokens, so that the one that failed is cut in two; down to single rows;
3. "offload", for a single row: every layer recomputed with its attention, on a GPU with its input in the computer's memory;
4. "tile", for a single row of many tokens: the MLPs computed in tiles;
5. then the run stops and names the row.

The lowered plan stays, and a resumed run starts with it (`restore_execution_plan`). The loss is always divided by the supervised
tokens of the complete batch, so that without dropout a split changes only the order in which numbers are added. With dropout,
"again" draws the same masks; a split draws others, as if the run had another seed from that step on.
"""

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qlora_phi3.errors import RunError
from qlora_phi3.execution import ExecutionPlan, MicroBatchPlan, smaller_mlp_tile, split_plan
from qlora_phi3.model.quantized import describe_device
from qlora_phi3.objectives import ObjectiveOutput
from qlora_phi3.reporter import OomRecord, Phase, Remedy, Reporter, record_as_json
from qlora_phi3.step import Batch, MicroBatchMemoryError, collate
from qlora_phi3.training.processes import count_processes, own_rank
from qlora_phi3.training.report import row_name
from qlora_phi3.units import parse_size

#: Within so many steps, a second out-of-memory error of the same phase means that the plan is too large.
RETRY_COOLDOWN_STEPS = 20
#: In torch's message (2.14): what was allocated at the failure. When the error arrives here, the stack is unwound.
ALLOCATED = re.compile(r"Of the allocated memory (\S+ [KMG]iB) is allocated by PyTorch")


def read_rng_state(device: torch.device) -> Callable[[], None]:
    """A function that puts torch's random number generators, which a pass draws from, back to their present state."""
    on_cuda = device.type == "cuda"
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_cuda else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return restore


class MemoryGuard:
    """Computes batches until memory suffices, and lowers the execution plan where it does not.

    `model` owns the gradients that a failed pass leaves; `sources` names a row that does not fit; `apply` applies a lowered plan.
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
        #: Recoveries of this session, and those that the other processes do not know of yet.
        self.num_recovered = 0
        self.unshared: list[OomRecord] = []
        self._model, self._device, self._reporter, self._sources = model, device, reporter, sources
        self._execution, self._apply = execution, apply
        self._last_again: dict[Phase, int] = {}

    @property
    def plans(self) -> dict[Phase, MicroBatchPlan]:
        """How rows become tensors now."""
        return {"training": self._execution.micro_batch, "evaluation": self._execution.evaluation}

    def compute(
        self, rows: Sequence[Mapping[str, Any]], run_pass: Callable[[Batch], ObjectiveOutput], *, phase: Phase, step: int
    ) -> tuple[Batch, ObjectiveOutput]:
        """Collate the rows of a batch and run a pass over them (forward, and in training backward), again until memory suffices.
        `step` is that of the record; of an evaluation, the step it follows.

        Returns the batch in its last layout, and the result of the pass that succeeded. RunError where a single row does not fit;
        gradients are dropped, weights and random numbers are those of before.
        """
        restore_rng_state = read_rng_state(self._device)
        failed: list[tuple[int, ...]] = []
        while True:
            batch = collate(rows, self.plans[phase], rank=own_rank(), count=count_processes())
            try:
                return batch, run_pass(batch)
            except MicroBatchMemoryError as error:
                indices, reason = batch.row_indices[error.micro_batch], error.reason
                found = ALLOCATED.search(str(error.__cause__))
            # Here the error is released, and with it every tensor that its traceback held.
            for parameter in self._model.parameters():
                parameter.grad = None
            gc.collect()  # an error and the frames of its traceback may hold each other
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            restore_rng_state()
            lengths = [len(rows[index]["input_ids"]) for index in indices]
            remedy = self._choose_remedy(lengths, phase, step, is_first=not failed, is_repeated=indices in failed)
            failed.append(indices)
            if remedy is None:
                raise self._row_does_not_fit(rows[indices[0]], reason, len(failed), phase, step)
            if remedy == "again":
                self._last_again[phase] = step
            before = self.plans[phase]
            record = OomRecord(
                step=step,
                phase=phase,
                remedy=remedy,
                rows=len(lengths),
                tokens=sum(lengths),
                before=before,
                after=split_plan(before, lengths) if remedy == "split" else before,
                allocated_bytes=parse_size(found[1]) if found else None,
                free_bytes=torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else None,
                reason=reason,
            )
            self.unshared.append(record)
            self.adopt([record])

    def _choose_remedy(
        self, lengths: Sequence[int], phase: Phase, step: int, *, is_first: bool, is_repeated: bool
    ) -> Remedy | None:
        """The remedy for a micro-batch of rows of these lengths; None where nothing is left to try.

        `is_first`: nothing failed in this batch before; `is_repeated`: this micro-batch did.
        """
        is_recent = step - self._last_again.get(phase, -RETRY_COOLDOWN_STEPS - 1) <= RETRY_COOLDOWN_STEPS
        if is_first and not is_recent:
            return "again"
        if len(lengths) > 1:
            return "split"
        if phase == "training" and _offloaded(self._execution, self._device) != self._execution:
            return "offload"
        if lengths[0] > smaller_mlp_tile(lengths[0]) and _tiled(self._execution, lengths[0]) != self._execution:
            return "tile"
        return None if is_repeated else "again"

    def adopt(self, records: Sequence[OomRecord]) -> None:
        """Lower the plan for recoveries of this process or of another, and report them."""
        self._execution = restore_execution_plan(self._execution, list(map(record_as_json, records)), self._device)
        if any(record.remedy in ("offload", "tile") for record in records):
            self._apply(self._execution)
        self.num_recovered += len(records)
        for record in records:
            self._reporter.oom(record)

    def _row_does_not_fit(self, row: Mapping[str, Any], reason: str, times: int, phase: Phase, step: int) -> RunError:
        length, device = len(row["input_ids"]), describe_device(self._device)
        name = row_name(row, self._sources)
        where = f"step {step}" if phase == "training" else f"the evaluation after step {step}"
        return RunError(
            f"{name} with its {length:,} tokens does not fit in the memory of {device}: "
            f"{where} ran out of memory {times} times, the last time with this row alone ({reason.rstrip('.')}).",
            "Close other programs that use this memory and go on with --resume; or start a new run with a smaller "
            f"[training] max_length than {length}.",
        )


def restore_execution_plan(execution: ExecutionPlan, records: Sequence[Mapping[str, Any]], device: torch.device) -> ExecutionPlan:
    """Lower a plan as the out-of-memory errors in `records`, of the run's metrics.jsonl, lowered theirs."""
    for record in records:
        if record["kind"] != OomRecord.kind:
            continue
        remedy = record.get("remedy", record.get("measure"))  # version 0.1 wrote "measure"
        if remedy == "split":
            name = "micro_batch" if record["phase"] == "training" else "evaluation"
            plan: MicroBatchPlan = getattr(execution, name)
            lowered = replace(plan, max_tokens=min(plan.max_tokens, record["after"]["max_tokens"]))
            execution = replace(execution, **{name: lowered})  # type: ignore[arg-type]
        elif remedy == "offload":
            execution = _offloaded(execution, device)
        elif remedy == "tile":
            execution = _tiled(execution, record["tokens"])
    return execution


def _offloaded(execution: ExecutionPlan, device: torch.device) -> ExecutionPlan:
    """The plan with every layer recomputed, its attention too, on a GPU from inputs in the computer's memory."""
    offloads = execution.activation_offloading or device.type != "cpu"
    return replace(execution, checkpoint_every=1, keep_attention=False, activation_offloading=offloads)


def _tiled(execution: ExecutionPlan, tokens: int) -> ExecutionPlan:
    """The plan with the MLPs in tiles for a row of so many tokens, unless they are in smaller tiles already."""
    tile = smaller_mlp_tile(tokens)
    return replace(execution, mlp_tile_tokens=min(execution.mlp_tile_tokens or tile, tile))
