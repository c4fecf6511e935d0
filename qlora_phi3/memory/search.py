"""Searches for the fastest execution plan of a recipe that fits a GPU or a CPU, and for the longest row that fits.

The plan chooses only how the recipe is computed, and never overrules a key that the recipe sets. Kinds of plan (which layers are
recomputed, offloading, the MLPs in tiles) are tried in the order of their speed by `cost.py`. Each has the largest micro-batch
that seems to fit; the fastest is simulated in full and replayed in the allocator's model at the exact limit.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]

from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES, ExecutionPlan, MicroBatchPlan, plan_micro_batches, smaller_mlp_tile
from qlora_phi3.family import linear_shapes
from qlora_phi3.memory.cost import Limits, StepKernels, StepWorkload, estimate_step, gpu_limits
from qlora_phi3.memory.plan import Plan, RowLengths, describe_kind, explain_choices, step_shape
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.simulate import StepShape
from qlora_phi3.recipe.schema import Memory, Training
from qlora_phi3.units import parse_size

#: Kinds of recomputation that are tried: none, one layer in sixteen, in eight and so on, all.
CHECKPOINTING = (0, 16, 8, 6, 4, 3, 2, 1)
SMALL_LOGITS_TILE_BYTES = 8 * 2**20
#: What the small tile saves at most: fp32 logits, their exponentials and gradient, and the 16-bit ones.
SMALL_LOGITS_SAVE_BYTES = 4 * (DEFAULT_LOGITS_TILE_BYTES - SMALL_LOGITS_TILE_BYTES)
#: A larger micro-batch must make a step this much faster to be worth its memory, and one for which layers are recomputed too.
WORTH = 1.02
#: A kind that seems to miss by no more than this is simulated in full before it is given up.
NEARLY_FITS = 1.015
#: So near to the limit the 8-bit state of Phi-3-mini's adapter (1.6 % of the total) decides.
NEARLY_FULL = 1.04
ROUNDING_TOKENS = 64
#: Of the computer's memory, for attention that is kept there and the inputs of layers: 16 GB have room for 16,384 tokens.
HOST_SHARE = 0.6

#: Lengths of a row are tried in multiples of this many tokens, and to this share of their length.
STEP, PRECISION = 64, 1 / 128
#: Lengths that a row is reported in: as many to each doubling, so that the next is 1.6 to 3.1 % longer.
STEPS_TO_DOUBLE = 32


def find_plan(predictor: Predictor, rows: RowLengths, limits: Limits, *, progress: Callable[[str], None]) -> Plan:
    """The fastest plan that fits; where none fits, the one that needs least memory, with `fits` False."""
    for tokens in dict.fromkeys((predictor.usual_tokens, None)):
        search = _Search(predictor, rows, limits, progress, tokens)
        for kinds in search.stages():
            if (plan := search.fastest(kinds)) is not None:
                return plan
    return search.verify_full_model(search.minimal)


def minimal_memory_plan(predictor: Predictor, rows: RowLengths) -> tuple[ExecutionPlan, StepShape]:
    """The plan that needs least memory of all that the recipe allows, on any GPU, and its heaviest step."""
    no_limits = gpu_limits(tflops_16bit=1, bandwidth_bytes_per_second=1, multiprocessors=1)
    execution = _Search(predictor, rows, no_limits, progress=lambda _: None).minimal
    return execution, step_shape(rows, execution)


class _Tiles(NamedTuple):
    """How much goes through the loss and through an MLP at once."""

    logits_bytes: int
    mlp_tokens: int


class _Search:
    """The search for one plan; `tokens` are those of every micro-batch, unless the recipe fixes them (None: the fastest)."""

    def __init__(
        self, predictor: Predictor, rows: RowLengths, limits: Limits, progress: Callable[[str], None], tokens: int | None = None
    ) -> None:
        self.predictor, self.rows, self.limits, self.progress = predictor, rows, limits, progress
        recipe, step = predictor.recipe, rows.training[: rows.batch_size]
        self.training, wanted_tokens = recipe.training, recipe.memory.micro_batch_tokens
        self.pinned = pinned = tokens if wanted_tokens == "auto" else wanted_tokens
        fewest, most = rows.longest, sum(step) if recipe.training.packing else len(step) * rows.longest
        fewest, most = (pinned, pinned) if pinned else (fewest, predictor.usual_tokens or most)
        #: Micro-batches are of complete rows, where all rows are of one length.
        self.complete_rows = rows.training[-1] == rows.longest and pinned is None
        #: Tokens of the smallest and of the largest micro-batch.
        self.fewest, self.most = (self._layouts(tokens)["micro_batch"].max_tokens for tokens in (fewest, most))
        self.most_allocated = predictor.most_allocated(limits.limit_bytes)
        offloading = self.training.activation_offloading if predictor.is_gpu else False
        self.kinds = _allowed_kinds(recipe.training, recipe.memory, offloading, predictor.architecture.num_hidden_layers)
        self.tiles = _allowed_tiles(recipe.memory, self.fewest)
        wanted = recipe.memory.keep_attention
        self.keeps = (wanted,) if wanted != "auto" else (False, True) if predictor.may_keep_attention else (False,)
        #: The one that needs least memory last.
        self.optimizers = predictor.optimizers
        #: The plan that needs least memory of all that the recipe allows.
        self.minimal = self._smallest(*self.kinds[-1], self.tiles[-1])
        #: Kinds that would be faster and do not fit, and what each would need on the GPU.
        self.refused: dict[ExecutionPlan, int] = {}
        self._kernels: dict[ExecutionPlan, StepKernels] = {}

    def stages(self) -> Iterator[list[ExecutionPlan]]:
        """Kinds of plan, each with its smallest micro-batch: where nothing of one stage fits, the next is tried.

        Offloading, which costs more than larger micro-batches gain, comes where nothing fits without it. The MLPs in tiles while
        all layers are recomputed are the last resort. Each kind that recomputes layers may also keep their attention.
        """
        for tiles in self.tiles:
            on_gpu = [self._smallest(every, False, tiles) for every, offload in self.kinds if not offload]
            in_tiles = tiles._replace(mlp_tokens=self.tiles[-1].mlp_tokens)
            if len(on_gpu) > 1 and in_tiles.mlp_tokens > tiles.mlp_tokens == 0:
                # fewer layers, and the MLPs of all others
                on_gpu += [self._smallest(kind.checkpoint_every, False, in_tiles) for kind in on_gpu[:-1]]
            offloaded = [self._smallest(every, True, tiles) for every, offload in self.kinds if offload]
            for kinds in (on_gpu, offloaded) if len(self.keeps) > 1 else ():
                recomputing = (kind for kind in kinds if kind.checkpoint_every and self._host_has_room(kind))
                kinds += [replace(kind, keep_attention=True) for kind in recomputing]
            # A smaller tile of the loss is tried only where it may decide: simulating its many tiles takes time.
            alike = [needed for kind, needed in self.refused.items() if kind.mlp_tile_tokens == tiles.mlp_tokens]
            nearly_fitted = min(alike, default=0) <= self.limits.limit_bytes + SMALL_LOGITS_SAVE_BYTES
            if tiles.logits_bytes == self.tiles[0].logits_bytes or nearly_fitted:
                yield on_gpu
                yield offloaded

    def fastest(self, kinds: Sequence[ExecutionPlan]) -> Plan | None:
        """The fastest that fits, None where none does; a kind is sized only when nothing faster is left."""
        if kinds and self.fewest == self.most and not (kinds[0].checkpoint_every or kinds[0].mlp_tile_tokens):
            first = self._with_tokens(kinds[0], self.most)  # nothing is faster
            if self._may_fit(first) and (plan := self.verify_full_model(first)).fits:
                return plan
        #: Plans, and whether they were sized; else they stand for the best that their kind could do.
        waiting = [(self._with_tokens(kind, self.most), False) for kind in kinds]
        while waiting:
            execution, is_sized = best = min(waiting, key=lambda each: self._rank(each[0]))
            if self._least_seconds(execution) < self._time_step(execution):
                continue  # now that its kernels are counted
            waiting.remove(best)
            kind = self._with_tokens(execution, self.fewest)
            if not is_sized:
                if self._may_fit(kind):
                    waiting.append((self._largest_worth_its_memory(kind), True))
                continue
            plan = self.verify_full_model(execution)
            if plan.fits:
                return plan
            tokens = execution.micro_batch.max_tokens
            if tokens > self.fewest:  # the full simulation found that it needs more than the estimate
                waiting.append((self._with_tokens(execution, max(self.fewest, int(tokens * 0.9))), True))
            else:
                self.refused[kind] = plan.memory.on_gpu_bytes
        return None

    def verify_full_model(self, execution: ExecutionPlan) -> Plan:
        """Simulate every layer, at the limit; with the optimizer whose state is not paged where enough memory is left."""
        self.progress("Simulating every layer")
        shape, optim = step_shape(self.rows, execution), self.optimizers[0]
        is_smallest = execution.micro_batch.max_tokens == self.fewest
        if is_smallest and max(self._phases(execution).values()) * NEARLY_FULL > self.most_allocated:
            optim = self.optimizers[-1]
        limit_bytes = self.limits.limit_bytes
        execution = replace(execution, optim=optim)
        memory, fits = self.predictor.predict(execution, shape, limit_bytes=limit_bytes)
        if optim != self.optimizers[-1] and not fits:
            execution = replace(execution, optim=self.optimizers[-1])
            memory, fits = self.predictor.predict(execution, shape, limit_bytes=limit_bytes)
        recipe, kernels = self.predictor.recipe, self._step_kernels(execution)
        flushes = -(-memory.cache_flushes // 2)  # two steps are replayed
        workload, held_out = replace(self._workload(execution), cache_flushes=flushes), self._held_out(execution)
        return Plan(
            execution=execution,
            memory=memory,
            fits=fits,
            kernels=kernels,
            workload=workload,
            seconds=estimate_step(kernels, workload, self.limits),
            evaluation_seconds=estimate_step(kernels, held_out, self.limits, trains=False).total if held_out else 0.0,
            reasons=explain_choices(recipe.training, recipe.memory, execution, self.rows, self.refused, limit_bytes)
            | self.predictor.explain(execution),
        )

    def _may_fit(self, kind: ExecutionPlan) -> bool:
        """Whether a kind seems to fit with the smallest micro-batch, or to miss by little."""
        self.progress(f"Trying a plan: {describe_kind(kind)}")
        enough = self.most_allocated * NEARLY_FITS
        chooses_tile = self.predictor.recipe.memory.mlp_tile_tokens == "auto"
        if kind.mlp_tile_tokens and kind.checkpoint_every != 1 and chooses_tile:
            smaller = replace(kind, checkpoint_every=1, mlp_tile_tokens=0, keep_attention=False)  # saves less of every layer
            if max(self._phases(smaller).values()) > enough:
                return False
        needed = max(self._phases(kind).values())
        if needed > enough:
            self.refused[kind] = self.predictor.estimate_on_gpu(needed)
        return needed <= enough

    def _largest_worth_its_memory(self, kind: ExecutionPlan) -> ExecutionPlan:
        """The largest micro-batch that seems to fit, or a smaller one that is nearly as fast: the last tokens gain little.

        As if all that is not resident grew with the tokens: a little too careful, and needs no simulation.
        """
        phases = self._phases(kind)
        growing = max(1, max(phases.values()) - phases["save"])
        fitting = self.fewest * (self.most_allocated - phases["save"]) // growing
        if kind.keep_attention and kind.activation_offloading:
            fitting = self.fewest  # as `_host_has_room` was asked for
        largest = self._with_tokens(kind, max(self.fewest, min(self.most, fitting)))
        most, slowest = largest.micro_batch.max_tokens, self._time_step(largest) * WORTH
        sizes = range(self.fewest, most, max(ROUNDING_TOKENS, (most - self.fewest) // 32))
        smaller = (self._with_tokens(kind, tokens) for tokens in sizes)
        return next((each for each in smaller if self._time_step(each) <= slowest), largest)

    def _host_has_room(self, kind: ExecutionPlan) -> bool:
        """Whether this computer has the memory for what a kind offloads with its attention: pinned, of powers of two bytes."""
        output, log_sums = self.predictor.kept_attention_bytes(step_shape(self.rows, kind).lengths, kind)
        layer_bytes = sum(1 << (size - 1).bit_length() for size in (output, output, log_sums))  # its input is like its output
        needed = kind.activation_offloading * layer_bytes * self.predictor.architecture.num_hidden_layers
        share = HOST_SHARE * self.rows.batch_size / self.training.batch_size  # of one of several processes
        return needed <= share * int(psutil.virtual_memory().total)

    def _smallest(self, every: int, offload: bool, tiles: _Tiles) -> ExecutionPlan:
        return ExecutionPlan(
            **self._layouts(self.fewest),
            checkpoint_every=every,
            activation_offloading=offload,
            optim=self.optimizers[-1],
            keep_attention=self.keeps[0] and every > 0,
            logits_tile_bytes=tiles.logits_bytes,
            mlp_tile_tokens=tiles.mlp_tokens,
            fused_kernels=self.predictor.fused_kernels,
        )

    def _with_tokens(self, execution: ExecutionPlan, tokens: int) -> ExecutionPlan:
        if self.complete_rows and self.rows.longest <= tokens:
            tokens = tokens // self.rows.longest * self.rows.longest
        return replace(execution, **self._layouts(tokens))

    def _layouts(self, tokens: int) -> dict[str, Any]:
        """Micro-batches of so many tokens, or of as many rows as the recipe sets; evaluation as training, unless it is set."""
        training, rows = self.training, self.training.per_device_eval_batch_size
        as_training = None if self.predictor.usual_tokens else training.micro_batch_size
        evaluation = (as_training if rows == "auto" else rows, self.pinned or tokens)
        sizes = {"micro_batch": (training.micro_batch_size, tokens), "evaluation": evaluation}
        return {
            name: MicroBatchPlan(
                max_tokens=rows * training.max_length if rows else tokens,
                max_rows=rows or training.batch_size,
                packing=training.packing,
                longrope_boundary=self.predictor.architecture.longrope_boundary,
            )
            for name, (rows, tokens) in sizes.items()
        }

    def _phases(self, execution: ExecutionPlan) -> Mapping[str, int]:
        return self.predictor.estimate(execution, step_shape(self.rows, execution))

    def _rank(self, execution: ExecutionPlan) -> float:
        """Seconds, by which plans are ordered: as a larger micro-batch must be, recomputation and keeping must be worth it."""
        recomputes = bool(execution.checkpoint_every or execution.mlp_tile_tokens)
        return self._least_seconds(execution) * WORTH ** (recomputes + execution.keep_attention)

    def _least_seconds(self, execution: ExecutionPlan) -> float:
        """The time of a typical step; where it was not simulated with the MLPs in tiles, what it takes at least.

        In tiles the gate_up projections of the other layers are computed once more, as they are in a recomputed layer.
        """
        if not execution.mlp_tile_tokens or self._kind(execution) in self._kernels:
            return self._time_step(execution)
        shapes, every = self.predictor.architecture, execution.checkpoint_every
        layers = shapes.num_hidden_layers - (math.ceil(shapes.num_hidden_layers / every) if every else 0)
        flops = 2 * layers * math.prod(linear_shapes(shapes)["gate_up_proj"]) * self._workload(execution).tokens
        return self._time_step(replace(execution, mlp_tile_tokens=0)) + flops / self.limits.flops_per_second

    def _time_step(self, execution: ExecutionPlan) -> float:
        """Seconds of a typical step by the cost model."""
        return estimate_step(self._step_kernels(execution), self._workload(execution), self.limits).total

    def _workload(self, execution: ExecutionPlan) -> StepWorkload:
        """A typical step."""
        lengths, layout = self.rows.typical_step(), execution.micro_batch
        groups = [[lengths[row] for row in group] for group in plan_micro_batches(lengths, layout)]
        widths = [length if layout.packing else max(group) for group in groups for length in group]
        return StepWorkload(
            lengths=lengths, num_micro_batches=len(groups), tokens=sum(widths), squares=sum(width**2 for width in widths)
        )

    def _held_out(self, execution: ExecutionPlan) -> StepWorkload | None:
        """All held-out rows, as if they were as long as those of a typical step."""
        tokens, step = self.rows.evaluation_tokens, self._workload(execution)
        number = math.ceil(tokens / execution.evaluation.max_tokens)
        squares = tokens * step.squares // step.tokens
        return StepWorkload(lengths=(), num_micro_batches=number, tokens=tokens, squares=squares) if tokens else None

    def _kind(self, execution: ExecutionPlan) -> ExecutionPlan:
        """With the smallest micro-batch."""
        return replace(self._with_tokens(execution, self.fewest), optim=self.optimizers[-1])

    def _step_kernels(self, execution: ExecutionPlan) -> StepKernels:
        """Of the longest row alone, on a GPU: larger micro-batches start the same ones, whatever the recipe sets."""
        kind = self._kind(execution)
        if kind not in self._kernels:
            shape = step_shape(self.rows, kind)
            if self.predictor.is_gpu:
                alone = replace(kind.micro_batch, max_tokens=self.rows.longest)
                shape = replace(step_shape(self.rows, replace(kind, micro_batch=alone)), evaluation_lengths=())
            self._kernels[kind] = self.predictor.step_kernels(kind, shape)
        return self._kernels[kind]


def _allowed_kinds(training: Training, memory: Memory, offloading: bool | str, num_layers: int) -> list[tuple[int, bool]]:
    """(checkpoint_every, activation_offloading): all that the recipe allows, the one with least memory last."""
    pinned = memory.checkpoint_every_n_layers
    wanted = training.gradient_checkpointing
    every = [1] if wanted is True else [each for each in CHECKPOINTING if each < max(2, num_layers)]
    if wanted is False:
        every = [0]
    elif pinned != "auto":
        every = [pinned]
    if offloading is True:
        return [(number, True) for number in every]
    kinds = [(number, False) for number in every]
    return [*kinds, (every[-1], True)] if offloading == "auto" and every[-1] else kinds


def _allowed_tiles(memory: Memory, fewest_tokens: int) -> list[_Tiles]:
    """All tiles that the recipe allows, the fastest first."""
    tile = smaller_mlp_tile(fewest_tokens)
    sizes, tokens = [DEFAULT_LOGITS_TILE_BYTES, SMALL_LOGITS_TILE_BYTES], [0, tile] if fewest_tokens > tile else [0]
    if memory.logits_tile != "auto":
        sizes = [parse_size(memory.logits_tile)]
    if memory.mlp_tile_tokens != "auto":
        tokens = [memory.mlp_tile_tokens]
    return [_Tiles(size, mlp_tokens) for mlp_tokens in tokens for size in sizes]


def round_length(length: int) -> int:
    """The largest reported length, in tokens, that is no longer."""
    step = max(STEP, (1 << length.bit_length() - 1) // STEPS_TO_DOUBLE) if length else STEP
    return length // step * step


class MaxLengthSearch:
    """Searches for the longest row along one curve of memory over length; what was computed for one GPU is known for the next.

    Args:
        compute_bytes: bytes for a row of so many tokens; never falls.
        at_most: tokens.
    """

    def __init__(self, compute_bytes: Callable[[int], int], at_most: int) -> None:
        self._compute_bytes, self.at_most = compute_bytes, max(STEP, at_most // STEP * STEP)
        self._known: dict[int, int] = {}

    def bytes_for(self, length: int) -> int:
        """Bytes for a row of so many tokens."""
        if length not in self._known:
            self._known[length] = self._compute_bytes(length)
        return self._known[length]

    def within(self, limit_bytes: int) -> int:
        """The longest row, in tokens, that needs no more than this; 0 where not even the shortest fits.

        The curve is nearly a line: where the line between two known points crosses the limit is nearly the answer.
        """
        if self.bytes_for(STEP) > limit_bytes:
            return 0
        if self.bytes_for(self.at_most) <= limit_bytes:
            return self.at_most
        low = max(length for length, needed in self._known.items() if needed <= limit_bytes)
        high = min(length for length, needed in self._known.items() if needed > limit_bytes)
        while True:
            share = (limit_bytes - self._known[low]) / (self._known[high] - self._known[low])
            guess = min(low + int((high - low) * share) // STEP * STEP, high - STEP)
            if guess - low <= low * PRECISION:  # nearly there, unless the curve bends upwards: try further on
                guess = low + max(STEP, int(4 * PRECISION * low) // STEP * STEP)
                if guess >= high:
                    return low
            if self.bytes_for(guess) <= limit_bytes:
                low = guess
            else:
                high = guess
