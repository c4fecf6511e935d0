"""What `init` proposes for data and a GPU: the model, `max_length` and the training keys, each by a rule that the recipe states.

One model is simulated as in `vram-check`; the others are estimated from their weights, which takes no time.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_phi3.data.formats import Chat, detect_format, guess_mapping
from qlora_phi3.data.prepare import check_files
from qlora_phi3.data.report import RowCount, SourceReport, merge_counts
from qlora_phi3.data.sources import open_local
from qlora_phi3.data.tokenize import read_examples
from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES, ExecutionPlan, MicroBatchPlan
from qlora_phi3.family import Architecture, linear_shapes, parse_architecture, read_config
from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.memory.cost import GpuLimits, StepWorkload, count_weights, estimate_step_seconds
from qlora_phi3.memory.margin import read_margin
from qlora_phi3.memory.report import VramReport
from qlora_phi3.memory.tables import find_max_lengths
from qlora_phi3.memory.vram_check import RecipeContext, VramChecker, hub_offline, read_rows, summarize_rows
from qlora_phi3.recipe.edit import commented_toml
from qlora_phi3.recipe.schema import Data, Recipe
from qlora_phi3.reporter import Progress
from qlora_phi3.units import MIB, format_count, format_gib

if TYPE_CHECKING:
    from qlora_phi3.memory.plan import RowLengths

#: UTF-8 bytes of a token where the tokenizer is not here, chosen on the safe side: English has about 4, Chinese 3 to 4 (one
#: character). And tokens around each turn: `<|user|>`, line breaks, `<|end|>`.
BYTES_PER_TOKEN, TOKENS_PER_TURN = 3.3, 5
#: `max_length` is a multiple of this, and cuts one row in so many.
LENGTH_STEP, ROWS_PER_CUT = 64, 100
#: The models that are compared, the most capable first, with what people choose them for.
MODELS = {
    "microsoft/phi-4": "14.7B, the most capable",
    "microsoft/Phi-4-mini-instruct": "3.8B, many languages, tool calls",
    "microsoft/Phi-3-medium-4k-instruct": "14.0B, less memory than phi-4",
    "microsoft/Phi-3.5-mini-instruct": "3.8B, rows up to 131,072 tokens",
    "microsoft/Phi-3-mini-4k-instruct": "3.8B, the least memory",
}
#: Those that are proposed, in this order: the first that fits and whose training ends within a night.
PROPOSED = ("microsoft/phi-4", "microsoft/Phi-4-mini-instruct", "microsoft/Phi-3-mini-4k-instruct")
TOOL_MODEL, SMALLEST_MODEL = PROPOSED[1:]
NIGHT_SECONDS = 8 * 3600.0
RANK = 16
#: GPU memory beside weights and activations: the CUDA context, cuBLAS, and the fp32 logits of a tile with their gradient.
FIXED_BYTES = 350 * MIB + 4 * DEFAULT_LOGITS_TILE_BYTES
#: Bytes of each trained parameter: fp32 weight and gradient, two 8-bit moments.
ADAPTER_BYTES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """The rows that a run can use."""

    #: [data] of the recipe, `train` as a path.
    data: Data
    format: str
    rows_read: int
    #: Tokens of each usable row, longest first.
    lengths: tuple[int, ...]
    skipped: tuple[RowCount, ...]
    has_tools: bool
    #: Counted by the model's tokenizer; else estimated from bytes.
    is_exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingChoice:
    """The training keys that follow from the number of rows."""

    evaluation_rows: int
    batch_size: int
    epochs: int
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOption:
    """A model for these data on a GPU."""

    name: str
    architecture: Architecture
    note: str
    max_length: int
    #: None on a CPU.
    fits: bool | None = None
    #: Estimated, with the plan that needs least; a plan that is faster takes more.
    needed_bytes: int = 0
    tokens_per_second: float = 0.0
    #: Of the complete training with its evaluations.
    seconds: float = 0.0
    is_simulated: bool = False


def read_data(name: str, base_dir: Path, progress: Progress) -> DataSummary:
    """Read local data, and estimate the tokens of each row from its bytes; formats and columns are recognized.

    Raises:
        DataError: the file is missing or unreadable, no row can be used, or the columns are of no format and have no likely name.
    """
    data, sources = Data(train=name), open_local(name, base_dir)
    first = next((row for _, row in sources[0].rows()), None)
    if isinstance(first, dict) and detect_format(first) is None and (guess := guess_mapping(first)) and guess[1]:
        data = Data.model_validate({"train": name, "format": guess[0], "fields": guess[1]})
    check_files(data, base_dir, evaluate=False)
    lengths, reports, has_tools = [], [], False
    for source in sources:
        reports.append(report := SourceReport(source.name))
        for _, example in read_examples(source, data, report, set()):
            words, turns = [], 1
            if isinstance(example, Chat):
                words, turns = [example.tools], len(example.turns)
                words += [text for turn in example.turns for text in (turn.text, turn.thinking, turn.calls)]
                has_tools = has_tools or bool(example.tools)
            else:
                words = [example.text]
            num_bytes = sum(len(text.encode(errors="replace")) for text in words)
            lengths.append(math.ceil(num_bytes / BYTES_PER_TOKEN) + TOKENS_PER_TURN * turns)
            if len(lengths) % 1000 == 0:
                progress("Reading rows", len(lengths), None)
    return DataSummary(
        data=data,
        format=reports[0].format,
        rows_read=sum(report.rows_read for report in reports),
        lengths=tuple(sorted(lengths, reverse=True)),
        skipped=merge_counts(count for report in reports for count in report.skipped.values()),
        has_tools=has_tools,
    )


def count_tokens(summary: DataSummary, option: ModelOption, base_dir: Path, progress: Progress) -> DataSummary:
    """The same with the tokens that the model's tokenizer counts, where it is on this computer."""
    training = {"max_length": option.architecture.max_position_embeddings, "do_eval": False}
    recipe = Recipe.model_validate({"model": {"name": option.name}, "data": summary.data, "training": training})
    with hub_offline():
        lengths, _ = read_rows(recipe, option.architecture, base_dir, progress)
    return summary if lengths.assumed else replace(summary, lengths=lengths.training, is_exact=True)


def choose_max_length(lengths: Sequence[int], positions: int) -> int:
    """The smallest multiple of 64 tokens that cuts at most one row in a hundred, and no more than the model's positions.

    Args:
        lengths: tokens of each row, longest first.
    """
    longest_kept = lengths[len(lengths) // ROWS_PER_CUT]
    return min(math.ceil(longest_kept / LENGTH_STEP) * LENGTH_STEP, positions // LENGTH_STEP * LENGTH_STEP)


def choose_training(num_rows: int) -> TrainingChoice:
    """Held-out rows, batch size, epochs and learning rate for so many usable rows; `recipe_text` states the reasons."""
    held_out = 0 if num_rows < 20 else min(500, max(round(num_rows * 0.05), min(30, num_rows // 10)))
    rows = num_rows - held_out
    epochs = next(count for limit, count in ((300, 5), (3000, 3), (30_000, 2), (math.inf, 1)) if rows <= limit)
    batch_size = 16 if rows >= 500 else 8 if rows >= 200 else 4
    rate = 1e-4 if epochs >= 5 else 2e-4
    return TrainingChoice(evaluation_rows=held_out, batch_size=batch_size, epochs=epochs, learning_rate=rate)


def model_option(name: str, summary: DataSummary) -> ModelOption:
    """A model whose shapes are known here, with the `max_length` for the rows. CannotTellError or ModelError as `read_config`."""
    with hub_offline():
        architecture = parse_architecture(read_config(name, prefer_shipped=True), name)
    max_length = choose_max_length(summary.lengths, architecture.max_position_embeddings)
    return ModelOption(name=name, architecture=architecture, note=MODELS.get(name, ""), max_length=max_length)


def estimate_option(option: ModelOption, summary: DataSummary, choice: TrainingChoice, device: Gpu) -> ModelOption:
    """Memory and speed from the shapes of the weights: the memory is within 15 % of the simulated minimum (tests)."""
    architecture, limits = option.architecture, _limits(device)
    lengths, layers, hidden = _lengths_of(summary, option, choice), architecture.num_hidden_layers, architecture.hidden_size
    outer = architecture.vocab_size * hidden * (1 if architecture.tie_word_embeddings else 2)
    adapter = layers * RANK * sum(map(sum, linear_shapes(architecture).values()))
    fixed = int(sum(count_weights(architecture)) * 4.127 / 8) + 2 * outer + ADAPTER_BYTES * adapter + FIXED_BYTES
    # Per token, in 16 bit: the inputs and outputs of a layer's matmuls, and their gradients in the layer that goes backward.
    layer_bytes = 2 * (9 * hidden + 3 * architecture.intermediate_size)
    needed, step = fixed + lengths.longest * 2 * layer_bytes, lengths.typical_step()
    seconds = math.inf
    for every, token_bytes in ((0, (layers + 1) * layer_bytes), (1, 2 * layer_bytes + 2 * layers * hidden)):
        tokens = max(lengths.longest, min(sum(step), (limits.limit_bytes - fixed) // token_bytes))
        if every or fixed + tokens * token_bytes <= limits.limit_bytes:
            micro_batch = MicroBatchPlan(max_tokens=tokens, max_rows=choice.batch_size, packing=True, longrope_boundary=None)
            plan = ExecutionPlan(
                micro_batch=micro_batch, evaluation=micro_batch, checkpoint_every=every, activation_offloading=False, optim="auto"
            )
            passes = math.ceil(sum(step) / tokens)
            workload = StepWorkload(lengths=step, num_micro_batches=passes, rank=RANK, quantized=True)
            seconds = min(seconds, estimate_step_seconds(architecture, plan, workload, limits))
    found = replace(option, fits=needed <= limits.limit_bytes, needed_bytes=needed, tokens_per_second=sum(step) / seconds)
    return replace(found, seconds=training_seconds(found, summary, choice))


def simulate_option(
    option: ModelOption, summary: DataSummary, choice: TrainingChoice, device: Gpu, info: Callable[[str], None]
) -> tuple[ModelOption, VramChecker]:
    """The option by the simulation and the search of `vram-check`, and the checker, which has found what is shared."""
    training = {"max_length": option.max_length, "batch_size": choice.batch_size, "do_eval": choice.evaluation_rows > 0}
    recipe = Recipe.model_validate({"model": {"name": option.name}, "data": summary.data, "training": training})
    lengths = _lengths_of(summary, option, choice)
    with hub_offline():
        config = read_config(option.name, prefer_shipped=True)
    context = RecipeContext(
        recipe=recipe, config=config, architecture=option.architecture, lengths=lengths, rows=summarize_rows(lengths, "")
    )
    checker = VramChecker(context, lambda what: info(f"{option.name}: {what}"))
    report: VramReport = checker.report(device, device.free_bytes, with_suggestions=False)
    found = replace(option, fits=report.fits, tokens_per_second=report.tokens_per_second, is_simulated=True)
    return replace(found, seconds=training_seconds(found, summary, choice)), checker


def longest_that_fits(option: ModelOption, checker: VramChecker, device: Gpu) -> int:
    """The largest `max_length` of a model on a GPU, a multiple of 64; 0 where none fits."""
    (row,) = find_max_lengths(checker, [device], lambda *_: None)
    return row.max_length // LENGTH_STEP * LENGTH_STEP


def _limits(device: Gpu) -> GpuLimits:
    return GpuLimits(
        limit_bytes=read_margin(device.name).limit(device.free_bytes),
        tflops_16bit=device.tflops_16bit,
        bandwidth_bytes_per_second=device.bandwidth_bytes_per_second,
    )


def _lengths_of(summary: DataSummary, option: ModelOption, choice: TrainingChoice) -> "RowLengths":
    from qlora_phi3.memory.plan import read_lengths  # starts torch

    lengths = [min(length, option.max_length) for length in summary.lengths]
    return read_lengths(lengths, lengths[:1] if choice.evaluation_rows else (), choice.batch_size)


def training_seconds(option: ModelOption, summary: DataSummary, choice: TrainingChoice) -> float:
    """The time of all epochs with an evaluation after each and two around them; a token of an evaluation costs a third."""
    tokens = sum(min(length, option.max_length) for length in summary.lengths)
    share = choice.evaluation_rows / len(summary.lengths)
    return tokens * ((1 - share) * choice.epochs + share * (choice.epochs + 2) / 3) / option.tokens_per_second


def propose(options: Sequence[ModelOption], summary: DataSummary) -> list[ModelOption]:
    """The options to simulate, the one to propose first: those of `PROPOSED` that seem to fit, at last the smallest model.

    Rows with tools ask for the model whose template has a place for them. phi-4 is proposed where it is trained within a night.
    """
    by_name = {option.name: option for option in options}
    if by_name.keys() != MODELS.keys():  # --model names one
        return list(options)
    order = [by_name[name] for name in ((TOOL_MODEL, *PROPOSED) if summary.has_tools else PROPOSED)]
    chosen = [each for each in order if each.fits and (each.name != PROPOSED[0] or each.seconds <= NIGHT_SECONDS)]
    return list(dict.fromkeys((*chosen, by_name[SMALLEST_MODEL])))


def recipe_text(summary: DataSummary, option: ModelOption, choice: TrainingChoice, target: Path, where: str) -> str:
    """The recipe, with the reason of every key as a comment.

    Args:
        target: the file that it is written to; a relative path of the data is one from there.
        where: the GPU that it was planned for, in words.
    """
    rows, held_out = len(summary.lengths), choice.evaluation_rows
    chosen = "" if choice.epochs == choose_training(rows).epochs else "your choice; "
    tables: dict[str, list[tuple[str, Any, str]]] = {
        "model": [("name", option.name, option.note or "as --model names it")],
        "data": list(_data_keys(summary, target, held_out)),
        "lora": [
            ("r", RANK, "rank of the adapter: enough for a style or a task; 32 or 64 for much new knowledge"),
            ("lora_alpha", RANK, "the adapter is scaled by lora_alpha / r = 1"),
        ],
        "training": [
            ("max_length", option.max_length, _length_reason(summary, option)),
            ("batch_size", choice.batch_size, f"{-(-(rows - held_out) // choice.batch_size):,} optimizer steps an epoch"),
            ("num_train_epochs", choice.epochs, f"{chosen}rule: 5 up to 300 rows, 3 up to 3,000, 2 up to 30,000, else 1"),
            ("learning_rate", choice.learning_rate, "rule: 2e-4, as in the QLoRA paper; 1e-4 for 5 epochs over few rows"),
            *_evaluation_keys(held_out),
        ],
    }
    return commented_toml(
        tables, [f"Written by qlora-phi3 init for {where}.", "Every key, also those that are left out: docs/recipe.md"]
    )


def _data_keys(summary: DataSummary, target: Path, held_out: int) -> Iterator[tuple[str, Any, str]]:
    path, skipped = Path(str(summary.data.train)).absolute(), summary.rows_read - len(summary.lengths)
    try:
        train = Path(os.path.relpath(path, target.absolute().parent)).as_posix()
    except ValueError:  # another drive of Windows
        train = path.as_posix()
    unusable = f", {skipped:,} more cannot be used (qlora-phi3 inspect shows them)" if skipped else ""
    yield "train", train, f"{format_count(len(summary.lengths), 'row')} of format {summary.format}{unusable}"
    if summary.data.fields:
        yield "format", summary.data.format, "the format whose columns yours stand for"
        yield "fields", summary.data.fields, "its columns = yours, guessed from their names: check that they are right"
    if held_out:
        yield "eval_size", held_out, "rows held out to see whether it learns more than the words: 5 %, at most 500"


def _evaluation_keys(held_out: int) -> Iterator[tuple[str, Any, str]]:
    """The keys of evaluation and of early stopping."""
    if not held_out:
        yield "do_eval", False, "fewer than 20 rows: none to spare"
        return
    yield "eval_strategy", "epoch", "the held-out loss after each epoch shows when it stops falling"
    yield "early_stopping_patience", 2, "ends after 2 epochs without a lower held-out loss, and keeps the best: more do no harm"


def _length_reason(summary: DataSummary, option: ModelOption) -> str:
    cut = sum(length > option.max_length for length in summary.lengths)
    counted = "counted by its tokenizer" if summary.is_exact else f"estimated at {BYTES_PER_TOKEN} bytes a token"
    return f"tokens: cuts {cut:,} of {format_count(len(summary.lengths), 'row')}, the longest {summary.lengths[0]:,} ({counted})"


def describe_gpu(device: Gpu | None) -> str:
    """The GPU in words, for the recipe's first line."""
    return "a computer without an NVIDIA GPU" if device is None else f"{device.name}, {format_gib(device.free_bytes)} for a run"
