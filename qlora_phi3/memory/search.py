"""The fastest set-up of a recipe that fits a card, and where none does, what to change.

What the optimizer sees is the recipe's on every card; the plan chooses only how it is computed. Kinds of set-up (which layers
are recomputed, whether their inputs are offloaded, the MLPs in tiles) are looked at in the order of the speed that `cost.py`
gives them at best. Each is given the largest micro-batch that seems to fit; the fastest is simulated whole and served by the
allocator's model at the very limit. Where nothing fits, the tiles of the loss are made smaller, and as the last resort whole
layers recomputed with their MLPs in tiles. A pinned key of the recipe is never overruled.

The longest row that fits, in tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES, ExecutionPlan, MicroBatchPlan, smaller_mlp_tile
from qlora_phi3.memory.cost import StepTime, StepWorkload, estimate_step_time
from qlora_phi3.memory.plan import (
    GpuLimits,
    Plan,
    RowLengths,
    count_micro_batches,
    explain_choices,
    in_words,
    step_shape,
)
from qlora_phi3.memory.predict import Prediction, Predictor, estimate_allocated, estimate_reserved
from qlora_phi3.units import parse_size

if TYPE_CHECKING:
    from qlora_phi3.memory.plan import Plan, RowLengths
    from qlora_phi3.memory.predict import Prediction, Predictor

#: Kinds of recomputation that are tried: none, one layer in sixteen, in eight and so on, all.
CHECKPOINTING = (0, 16, 8, 6, 4, 3, 2, 1)


SMALL_LOGITS_TILE_BYTES = 8 * 2**20


#: What the small tile saves at most: fp32 logits, their exponentials and gradient, and the 16-bit ones.
SMALL_LOGITS_SAVE_BYTES = 4 * (DEFAULT_LOGITS_TILE_BYTES - SMALL_LOGITS_TILE_BYTES)


#: A larger micro-batch must make a step this much faster to be worth its memory.
WORTH = 1.02


#: A kind that seems to miss by no more than this is simulated whole before it is given up.
NEARLY_FITS = 1.015


#: So near to the limit the 8-bit state of Phi-3-mini's adapter (1.6 % of all) decides.
NEARLY_FULL = 1.04


ROUNDING_TOKENS = 64


def find_plan(predictor: Predictor, rows: RowLengths, card: GpuLimits, *, progress: Callable[[str], None]) -> Plan:
    """The fastest set-up that fits; where none fits, the leanest one, whose forecast says so."""
    search = _Search(predictor, rows, card, progress)
    for kinds in search.stages():
        if (plan := search.fastest(kinds)) is not None:
            return plan
    return search.verify_full_model(search.leanest())


def minimal_memory_plan(predictor: Predictor, rows: RowLengths) -> ExecutionPlan:
    """What takes least of all that the recipe allows, on any card."""
    anywhere = GpuLimits(limit_bytes=0, tflops_16bit=1, bandwidth_bytes_per_second=1)
    return _Search(predictor, rows, anywhere, progress=lambda _: None).leanest()


class _Tiles(NamedTuple):
    """How much goes through the loss and through an MLP at once."""

    logits_bytes: int
    mlp_tokens: int


class _Search:
    """One plan in the making."""

    def __init__(
        self, predictor: Predictor, rows: RowLengths, card: GpuLimits, progress: Callable[[str], None]
    ) -> None:
        self.predictor, self.rows, self.card, self.progress = predictor, rows, card, progress
        self.training = predictor.recipe.training
        #: Kinds that would be faster and do not fit, and what each would show on the card.
        self._refused: dict[ExecutionPlan, int] = {}

    def tiles(self) -> list[_Tiles]:
        """All that the recipe allows, the fastest first."""
        memory, fewest = self.predictor.recipe.memory, self._fewest_tokens()
        logits: tuple[int, ...] = (DEFAULT_LOGITS_TILE_BYTES, SMALL_LOGITS_TILE_BYTES)
        if memory.logits_tile != "auto":
            logits = (parse_size(memory.logits_tile),)
        if memory.mlp_tile_tokens != "auto":
            return [_Tiles(size, memory.mlp_tile_tokens) for size in logits]
        tile = smaller_mlp_tile(fewest)
        return [_Tiles(size, tokens) for tokens in ((0, tile) if fewest > tile else (0,)) for size in logits]

    def stages(self) -> Iterator[list[ExecutionPlan]]:
        """Kinds of set-up, each with its smallest micro-batch: where nothing of one stage fits, the next is tried.

        Offloading, which costs more than larger micro-batches gain, comes where nothing fits without it.
        """
        tiles, fewest, choices = self.tiles(), self._fewest_tokens(), self._kinds()
        for each in tiles:
            kept = [self._setup(every, False, fewest, each) for every, offload in choices if not offload]
            if (
                len(kept) > 1 and tiles[-1].mlp_tokens > each.mlp_tokens == 0
            ):  # fewer layers, and the MLPs of all others
                in_tiles = _Tiles(each.logits_bytes, tiles[-1].mlp_tokens)
                kept += [self._setup(kind.checkpoint_every, False, fewest, in_tiles) for kind in kept[:-1]]
            moved = [self._setup(every, True, fewest, each) for every, offload in choices if offload]
            if each.logits_bytes == tiles[0].logits_bytes or self._nearly_fitted(each):
                yield kept
                yield moved

    def _nearly_fitted(self, tiles: _Tiles) -> bool:
        """Whether a smaller tile of the loss may decide; simulating its many tiles takes its time."""
        alike = [needed for kind, needed in self._refused.items() if kind.mlp_tile_tokens == tiles.mlp_tokens]
        return min(alike, default=0) <= self.card.limit_bytes + SMALL_LOGITS_SAVE_BYTES

    def fastest(self, kinds: Sequence[ExecutionPlan]) -> Plan | None:
        """The fastest that fits, None where none does; a kind is sized only when nothing faster is left."""
        most, fewest = self._most_tokens(), self._fewest_tokens()
        #: Set-ups, and whether they were sized; else they stand for the best that their kind could do.
        waiting = [(self._with_tokens(kind, most), False) for kind in kinds]
        while waiting:
            execution, is_sized = best = min(waiting, key=lambda each: self.seconds(each[0]))
            waiting.remove(best)
            kind = self._with_tokens(execution, fewest)
            if not is_sized:
                if self._may_fit(kind):
                    waiting.append((self._smallest_within_2_percent(self._largest_that_fits(kind)), True))
                continue
            plan = self.verify_full_model(execution)
            if plan.fits:
                return plan
            smaller = self.smaller(execution)
            waiting += [(each, True) for each in smaller]
            if not smaller:
                self._refused[kind] = plan.prediction.on_card_bytes
        return None

    def _may_fit(self, kind: ExecutionPlan) -> bool:
        """Whether a kind seems to fit with the smallest micro-batch, or to miss by little."""
        self.progress(f"Trying {in_words(kind)}")
        if (
            kind.mlp_tile_tokens
            and kind.checkpoint_every != 1
            and self.predictor.recipe.memory.mlp_tile_tokens == "auto"
        ):
            leaner = replace(kind, checkpoint_every=1, mlp_tile_tokens=0)  # keeps less of every layer
            if max(self._phases(leaner).values()) > self._most_allocated() * NEARLY_FITS:
                return False
        most = max(self._phases(kind).values())
        if most <= self._most_allocated() * NEARLY_FITS:
            return True
        self._refused[kind] = self.predictor.on_card(estimate_reserved(most))
        return False

    def leanest(self) -> ExecutionPlan:
        """What takes least of all the recipe allows."""
        every, offload = self._kinds()[-1]
        return self._setup(every, offload, self._fewest_tokens(), self.tiles()[-1])

    def verify_full_model(self, execution: ExecutionPlan) -> Plan:
        """Simulate the whole model, at the limit; the optimizer whose state is not paged where there is plenty of room."""
        self.progress("Simulating every layer")
        *usual, leanest = self._optimizers()
        prediction = self._predict(execution, leanest if self._is_tight(execution) else (*usual, leanest)[0])
        if prediction.execution.optim != leanest and not prediction.fits:
            prediction = self._predict(execution, leanest)
        chosen = prediction.execution
        return Plan(
            prediction=prediction,
            workload=self._workload(chosen),
            step_time=self._step_time(chosen),
            reasons=explain_choices(
                self.predictor.recipe,
                chosen,
                num_passes=self._count(chosen),
                longest=self.rows.longest,
                refused=self._refused,
                limit_bytes=self.card.limit_bytes,
            ),
        )

    def smaller(self, execution: ExecutionPlan) -> list[ExecutionPlan]:
        """A tenth fewer tokens, where the whole simulation found less room than the estimate; none below the longest row."""
        tokens, fewest = execution.micro_batch.max_tokens, self._fewest_tokens()
        return [self._with_tokens(execution, max(fewest, int(tokens * 0.9)))] if tokens > fewest else []

    def _kinds(self) -> list[tuple[int, bool]]:
        """(checkpoint_every, activation_offloading), all that the recipe allows, the leanest last."""
        pinned = self.predictor.recipe.memory.checkpoint_every_n_layers
        wanted, offloading = self.training.gradient_checkpointing, self.training.activation_offloading
        if wanted is False:
            every: tuple[int, ...] = (0,)
        elif pinned != "auto":
            every = (pinned,)
        else:
            layers = self.predictor.architecture.num_hidden_layers
            every = (1,) if wanted is True else tuple(each for each in CHECKPOINTING if each < max(2, layers))
        if offloading is True:
            return [(number, True) for number in every]
        kinds = [(number, False) for number in every]
        return [*kinds, (every[-1], True)] if offloading == "auto" and every[-1] else kinds

    def _predict(self, execution: ExecutionPlan, optim: str) -> Prediction:
        shape = step_shape(self.rows, execution)
        return self.predictor.prediction(replace(execution, optim=optim), shape, limit_bytes=self.card.limit_bytes)

    def _is_tight(self, execution: ExecutionPlan) -> bool:
        """Whether hardly anything is free with the leanest optimizer and the smallest micro-batch."""
        smallest = execution.micro_batch.max_tokens == self._fewest_tokens()
        return smallest and max(self._phases(execution).values()) * NEARLY_FULL > self._most_allocated()

    def _optimizers(self) -> tuple[str, ...]:
        wanted = self.training.optim
        return ("adamw_8bit", "paged_adamw_8bit") if wanted == "auto" else (wanted,)

    def _setup(self, every: int, offload: bool, tokens: int, tiles: _Tiles) -> ExecutionPlan:
        return ExecutionPlan(
            micro_batch=self._layout(tokens, self.training.micro_batch_size),
            evaluation=self._evaluation(tokens),
            checkpoint_every=every,
            activation_offloading=offload,
            optim=self._optimizers()[-1],
            logits_tile_bytes=tiles.logits_bytes,
            mlp_tile_tokens=tiles.mlp_tokens,
        )

    def _evaluation(self, tokens: int) -> MicroBatchPlan:
        """As in training, unless the recipe fixes it."""
        rows = self.training.per_device_eval_batch_size
        return self._layout(tokens, self.training.micro_batch_size if rows == "auto" else rows)

    def _layout(self, tokens: int, rows: int | None) -> MicroBatchPlan:
        return MicroBatchPlan(
            max_tokens=rows * self.training.max_length if rows else tokens,
            max_rows=rows or self.training.batch_size,
            packing=self.training.packing,
            longrope_boundary=self.predictor.architecture.longrope_boundary,
        )

    def _with_tokens(self, execution: ExecutionPlan, tokens: int) -> ExecutionPlan:
        tokens = self._fillable(tokens)
        layout = self._layout(tokens, self.training.micro_batch_size)
        return replace(execution, micro_batch=layout, evaluation=self._evaluation(tokens))

    def _fillable(self, tokens: int) -> int:
        """What rows can fill of so many tokens: whole rows, where all are of one length."""
        longest, pinned = self.rows.longest, self.predictor.recipe.memory.micro_batch_tokens != "auto"
        alike = self.rows.training[-1] == longest
        return tokens // longest * longest if alike and not pinned and tokens >= longest else tokens

    def _most_tokens(self) -> int:
        """All rows of the heaviest step at once."""
        pinned = self.predictor.recipe.memory.micro_batch_tokens
        step = self.rows.heaviest_step()
        whole = sum(step) if self.training.packing else len(step) * self.rows.longest
        return self._tokens(max(whole, self.rows.longest) if pinned == "auto" else pinned)

    def _fewest_tokens(self) -> int:
        pinned = self.predictor.recipe.memory.micro_batch_tokens
        return self._tokens(self.rows.longest if pinned == "auto" else pinned)

    def _tokens(self, wanted: int) -> int:
        return self._layout(wanted, self.training.micro_batch_size).max_tokens

    def _largest_that_fits(self, kind: ExecutionPlan) -> ExecutionPlan:
        """As if all that is not there between two steps grew with the tokens: a little too careful, and needs no simulation.

        Args:
            kind: with the smallest micro-batch, which fits.
        """
        low, high, phases = kind.micro_batch.max_tokens, self._most_tokens(), self._phases(kind)
        resident = phases["save"]
        growing = max(1, max(phases.values()) - resident)
        fitting = low * (self._most_allocated() - resident) // growing
        return self._with_tokens(kind, max(low, min(high, fitting)))

    def _phases(self, execution: ExecutionPlan) -> Mapping[str, int]:
        shape = step_shape(self.rows, execution)
        return self.predictor.estimate(
            execution, replace(shape, evaluation_lengths=())
        )  # never the peak; settle() has it

    def _most_allocated(self) -> int:
        return estimate_allocated(self.card.limit_bytes - self.predictor.on_card(0))

    def _smallest_within_2_percent(self, execution: ExecutionPlan) -> ExecutionPlan:
        """The smallest micro-batch that is nearly as fast: the last tokens cost memory and gain little."""
        most, fewest = execution.micro_batch.max_tokens, self._fewest_tokens()
        for tokens in range(fewest, most, max(ROUNDING_TOKENS, (most - fewest) // 32)):
            leaner = self._with_tokens(execution, tokens)
            if self.seconds(leaner) <= self.seconds(execution) * WORTH:
                return leaner
        return execution

    def _count(self, execution: ExecutionPlan) -> int:
        return count_micro_batches(self.rows.usual_step(), execution.micro_batch)

    def seconds(self, execution: ExecutionPlan) -> float:
        """Of an optimizer step, by the cost model."""
        return self._step_time(execution).seconds

    def _workload(self, execution: ExecutionPlan) -> StepWorkload:
        return StepWorkload(
            lengths=self.rows.usual_step(),
            num_micro_batches=self._count(execution),
            rank=self.predictor.recipe.lora.r,
            quantized=self.predictor.recipe.quantization.load_in_4bit,
        )

    def _step_time(self, execution: ExecutionPlan) -> StepTime:
        return estimate_step_time(
            self.predictor.architecture,
            execution,
            self._workload(execution),
            tflops_16bit=self.card.tflops_16bit,
            bandwidth_bytes_per_second=self.card.bandwidth_bytes_per_second,
        )


#: Rows are looked for in multiples of this many tokens, and to this share of their length.
STEP, PRECISION = 64, 1 / 128


#: Lengths that a row is reported in: as many to each doubling, so that the next is 1.6 to 3.1 % longer.
STEPS_TO_DOUBLE = 32


def round_length(length: int) -> int:
    """The largest reported length that is no longer."""
    step = max(STEP, (1 << length.bit_length() - 1) // STEPS_TO_DOUBLE) if length else STEP
    return length // step * step


class MaxLengthSearch:
    """Searches along one curve of memory over length; what was computed for one card helps the next.

    Args:
        needs: bytes for a row of so many tokens; never falls.
        at_most: tokens.
    """

    def __init__(self, needs: Callable[[int], int], at_most: int) -> None:
        self._needs, self.at_most = needs, max(STEP, at_most // STEP * STEP)
        self._known: dict[int, int] = {}

    def within(self, room_bytes: int) -> int:
        """The longest row that needs no more than this; 0 where not even the shortest does.

        The curve is nearly a line, so that the place where a line between two known points crosses the room is nearly the
        answer already.
        """
        low, high = STEP, self.at_most
        if self._need(low) > room_bytes:
            return 0
        if self._need(high) <= room_bytes:
            return high
        low = max(length for length, need in self._known.items() if need <= room_bytes)
        high = min(length for length, need in self._known.items() if need > room_bytes)
        while True:
            share = (room_bytes - self._known[low]) / (self._known[high] - self._known[low])
            guess = min(low + int((high - low) * share) // STEP * STEP, high - STEP)
            if guess - low <= low * PRECISION:  # nearly there, unless the curve bends upwards: a look beyond
                guess = low + max(STEP, int(4 * PRECISION * low) // STEP * STEP)
                if guess >= high:
                    return low
            if self._need(guess) <= room_bytes:
                low = guess
            else:
                high = guess

    @property
    def least_bytes(self) -> int:
        """What the shortest row needs."""
        return self._need(STEP)

    def _need(self, length: int) -> int:
        if length not in self._known:
            self._known[length] = self._needs(length)
        return self._known[length]


def allocated_estimate(predictor: "Predictor", rows: "RowLengths") -> int:
    """What the leanest set-up of a recipe allocates at its peak, from few layers."""
    from qlora_phi3.memory.plan import step_shape

    execution = minimal_memory_plan(predictor, rows)
    return max(predictor.phases(execution, step_shape(rows, execution)).values())


def minimal_prediction(predictor: "Predictor", rows: "RowLengths", *, limit_bytes: int) -> "Prediction":
    """The same, simulated whole."""
    from qlora_phi3.memory.plan import step_shape

    execution = minimal_memory_plan(predictor, rows)
    return predictor.prediction(execution, step_shape(rows, execution), limit_bytes=limit_bytes)
