"""What `init` proposes for data and a GPU: the model, `max_length` and the training keys, each by a rule that the recipe states.

Each model is simulated with the recipe that would be written for it, as by `vram-check`.
"""

import math
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qlora_phi3.data.formats import Chat, detect_format, guess_mapping
from qlora_phi3.data.prepare import check_files
from qlora_phi3.data.report import RowCount, SourceReport, merge_counts
from qlora_phi3.data.sources import open_local
from qlora_phi3.data.tokenize import UNCUT, read_examples
from qlora_phi3.errors import DataError, quoted
from qlora_phi3.family import Architecture, parse_architecture, read_config
from qlora_phi3.files import user_cache_dir
from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.memory.cached import cache_key, find_cached, save_cached
from qlora_phi3.memory.margin import read_margin
from qlora_phi3.memory.report import VramReport, as_json, from_json
from qlora_phi3.memory.tables import find_max_lengths
from qlora_phi3.memory.vram_check import RecipeContext, VramChecker, hub_offline, read_rows
from qlora_phi3.recipe.edit import commented_toml
from qlora_phi3.recipe.schema import Data, Recipe
from qlora_phi3.reporter import Progress
from qlora_phi3.units import format_count, format_gib, format_percent

#: UTF-8 bytes of a token where the tokenizer is not here, chosen on the safe side: English has about 4, Chinese 3 to 4 (one
#: character). And tokens around each turn: `<|user|>`, line breaks, `<|end|>`.
BYTES_PER_TOKEN, TOKENS_PER_TURN = 3.3, 5
#: `max_length` is a multiple of this, and cuts one row in so many.
LENGTH_STEP, ROWS_PER_CUT = 64, 100
EPOCHS_RULE = "5 up to 300 rows, 3 up to 3,000, 2 up to 30,000, else 1"
#: The models that are compared, the one with the most parameters first, with what people choose them for.
MODELS = {
    "microsoft/phi-4": "14.7B, the most capable",
    "microsoft/Phi-3-medium-4k-instruct": "14.0B, rows to 4,096 tokens",
    "microsoft/Phi-4-mini-instruct": "3.8B, many languages, tools",
    "microsoft/Phi-3.5-mini-instruct": "3.8B, rows to 131,072 tokens",
    "microsoft/Phi-3-mini-4k-instruct": "3.8B, rows to 4,096 tokens",
}
#: Those that are proposed, in this order: the first that fits and whose training ends within a night.
PROPOSED = ("microsoft/phi-4", "microsoft/Phi-4-mini-instruct", "microsoft/Phi-3-mini-4k-instruct")
TOOL_MODEL, SMALLEST_MODEL = PROPOSED[1:]
NIGHT_SECONDS = 8 * 3600.0
RANK = 16
#: Tokens of each row, where no data are named.
TYPICAL_LENGTH = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """The rows that a run can use."""

    #: [data] of the recipe, `train` as a path.
    data: Data
    format: str
    rows_read: int
    #: Tokens of each usable row, longest first; estimated from bytes.
    lengths: tuple[int, ...]
    skipped: tuple[RowCount, ...]
    has_tools: bool
    unread: tuple[RowCount, ...] = ()  #: Columns, with the rows that have them.
    duplicates: int = 0  #: Usable rows with the words of an earlier one.


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
    #: Tokens of each usable row, longest first; `is_exact`: counted by the model's tokenizer.
    lengths: tuple[int, ...]
    is_exact: bool
    #: None on a CPU.
    report: VramReport | None = None


def unknown_columns(name: str, base_dir: Path) -> list[str]:
    """The columns of a local file, if they are of no format and none has a likely name; else none. DataError as `read_data`."""
    first = next((row for _, row in open_local(name, base_dir)[0].rows()), None)
    if not isinstance(first, dict) or detect_format(first) is not None or guess_mapping(first) is not None:
        return []
    return [str(column) for column in first]


def read_data(name: str, columns: Mapping[str, str], base_dir: Path, progress: Progress) -> DataSummary:
    """Read local data, and estimate the tokens of each row from its bytes; formats and columns are recognized.

    Args:
        columns: [data] fields where a person named them; empty to recognize them.

    Raises:
        DataError: the file is missing or unreadable, no row can be used, or the columns are of no format and have no likely name.
    """
    data, sources = Data(train=name), open_local(name, base_dir)
    first = next((row for _, row in sources[0].rows()), None)
    guess = ("alpaca", dict(columns)) if columns else None
    if not columns and isinstance(first, dict) and detect_format(first) is None:
        guess = guess_mapping(first)
    if guess and guess[1]:
        data = Data.model_validate({"train": name, "format": guess[0], "fields": guess[1]})
    elif names := unknown_columns(name, base_dir):
        hint = f"Say which is which: qlora-phi3 init {quoted(name)} --question COLUMN --answer COLUMN"
        raise DataError(f"The columns of {name} are of no known format: {', '.join(names)}.", hint)
    check_files(data, base_dir, evaluate=False)
    lengths, reports, has_tools, seen = [], [], False, set[int]()
    for source in sources:
        reports.append(report := SourceReport(source.name))
        for _, example in read_examples(source, data, report):
            if isinstance(example, Chat):
                words, turns = [example.tools], len(example.turns)
                words += [text for turn in example.turns for text in (turn.text, turn.thinking, turn.calls)]
                has_tools = has_tools or bool(example.tools)
            else:
                words, turns = [example.text], 1
            seen.add(hash(tuple(words)))
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
        unread=merge_counts(count for report in reports for count in report.unread.values()),
        duplicates=len(lengths) - len(seen),
    )


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


def model_option(name: str, summary: DataSummary, base_dir: Path, progress: Progress) -> ModelOption:
    """A model whose shapes are known here, with the `max_length` for the rows. They are counted by its tokenizer where it is on
    this computer. CannotTellError or ModelError as `read_config`.
    """
    with hub_offline():
        architecture = parse_architecture(read_config(name, prefer_shipped=True), name)
        training = {"max_length": UNCUT, "do_eval": False}
        recipe = Recipe.model_validate({"model": {"name": name}, "data": summary.data, "training": training})
        counted = read_rows(recipe, architecture, base_dir, progress)
    lengths = summary.lengths if counted.assumed else counted.training  # before any cut
    return ModelOption(
        name=name,
        architecture=architecture,
        note=MODELS.get(name, ""),
        max_length=choose_max_length(lengths, architecture.max_position_embeddings),
        lengths=lengths,
        is_exact=not counted.assumed,
    )


def simulate_option(
    option: ModelOption, summary: DataSummary, choice: TrainingChoice, device: Gpu, info: Callable[[str], None]
) -> ModelOption:
    """The option with what `vram-check` says of its recipe on a GPU."""
    checker = _build_checker(option, summary, choice, info)
    return replace(option, report=checker.report(device, device.free_bytes, with_suggestions=False))


def shorten_option(
    option: ModelOption, summary: DataSummary, choice: TrainingChoice, device: Gpu, info: Callable[[str], None]
) -> ModelOption:
    """The option with the largest `max_length` that fits, a multiple of 64; as it is where none does."""
    (row,) = find_max_lengths(_build_checker(option, summary, choice, info), [device], lambda *_: None)
    if length := row.max_length // LENGTH_STEP * LENGTH_STEP:
        return simulate_option(replace(option, max_length=length), summary, choice, device, info)
    return option


def _build_checker(option: ModelOption, summary: DataSummary, choice: TrainingChoice, info: Callable[[str], None]) -> VramChecker:
    from qlora_phi3.memory.plan import read_lengths  # starts torch

    recipe = Recipe.model_validate(tomllib.loads(recipe_text(summary, option, choice, Path(), "")))
    lengths, held_out = [min(length, option.max_length) for length in option.lengths], choice.evaluation_rows
    held = range(1, len(lengths), len(lengths) // held_out)[:held_out] if held_out else ()  # of all lengths, not the longest row
    training = [length for index, length in enumerate(lengths) if index not in held]
    rows = read_lengths(training, [lengths[index] for index in held], choice.batch_size)
    with hub_offline():
        config = read_config(option.name, prefer_shipped=True)
    context = RecipeContext(recipe=recipe, config=config, architecture=option.architecture, lengths=rows)
    return VramChecker(context, lambda what: info(f"{option.name}: {what}"))


def compare_models(device: Gpu, progress: Progress, info: Callable[[str], None]) -> list[ModelOption]:
    """What each model of the family takes on a GPU for 1,000 rows of `TYPICAL_LENGTH` tokens, seen once; kept as vram-check's."""
    rows = (TYPICAL_LENGTH,) * 1000
    summary = DataSummary(data=Data(train="."), format="", rows_read=1000, lengths=rows, skipped=(), has_tools=False)
    choice = TrainingChoice(evaluation_rows=0, batch_size=16, epochs=1, learning_rate=2e-4)
    options = [model_option(name, summary, Path(), progress) for name in MODELS]
    lengths = [option.lengths for option in options]
    question = {"kind": "models", "device": asdict(replace(device, processes=())), "share": read_margin(device.name).share}
    path = user_cache_dir() / "vram-check" / f"{cache_key({**question, 'lengths': lengths})}.json"
    if saved := find_cached(path):
        return [replace(option, report=from_json(report)) for option, report in zip(options, saved, strict=True)]
    for number, option in enumerate(options):
        progress("Simulating the training of each model", number, len(MODELS))
        options[number] = simulate_option(option, summary, choice, device, info)
    save_cached(path, [as_json(option.report) for option in options if option.report is not None], ())
    return options


def propose(options: Sequence[ModelOption], *, has_tools: bool) -> ModelOption:
    """The option to take: the first of `PROPOSED` that fits, else the smallest model; phi-4 where it is trained within a night.

    Rows with tools ask for the model whose template has a place for them.
    """
    by_name = {option.name: option for option in options}
    if by_name.keys() != MODELS.keys():  # --model names one, or there is no GPU
        return options[0]
    for option in (by_name[name] for name in ((TOOL_MODEL, *PROPOSED) if has_tools else PROPOSED)):
        report = option.report
        if report is not None and report.fits and (option.name != PROPOSED[0] or (report.run_seconds or 0) <= NIGHT_SECONDS):
            return option
    return by_name[SMALLEST_MODEL]


def recipe_text(summary: DataSummary, option: ModelOption, choice: TrainingChoice, target: Path, where: str) -> str:
    """The recipe, with the reason of every key as a comment.

    Args:
        target: the file that it is written to; a relative path of the data is one from there.
        where: the GPU that it was planned for, in words.
    """
    rows, held_out = len(option.lengths), choice.evaluation_rows
    chosen = "" if choice.epochs == choose_training(rows).epochs else "your choice; "
    tables: dict[str, list[tuple[str, Any, str]]] = {
        "model": [("name", option.name, option.note or "as --model names it")],
        "data": list(_data_keys(summary, target, held_out)),
        "lora": [
            ("r", RANK, "rank of the adapter: enough for a style or a task; 32 or 64 for much new knowledge"),
            ("lora_alpha", RANK, "the adapter is scaled by lora_alpha / r = 1"),
        ],
        "training": [
            ("max_length", option.max_length, _length_reason(option)),
            ("batch_size", choice.batch_size, f"{-(-(rows - held_out) // choice.batch_size):,} optimizer steps an epoch"),
            ("num_train_epochs", choice.epochs, f"{chosen}rule: {EPOCHS_RULE}"),
            (
                "learning_rate",
                choice.learning_rate,
                "rule: 1e-4 up to 300 rows, which are seen often; else 2e-4, as in the QLoRA paper",
            ),
            *_evaluation_keys(held_out),
        ],
    }
    return commented_toml(
        tables, [f"Written by qlora-phi3 init for {where}.", "Every key, also those that are left out: qlora-phi3 docs recipe"]
    )


def _data_keys(summary: DataSummary, target: Path, held_out: int) -> Iterator[tuple[str, Any, str]]:
    path, skipped = Path(str(summary.data.train)).absolute(), summary.rows_read - len(summary.lengths)
    try:
        train = Path(os.path.relpath(path, target.absolute().parent)).as_posix()
    except ValueError:  # another drive of Windows
        train = path.as_posix()
    unusable = f", {skipped:,} more cannot be used (qlora-phi3 inspect shows them)" if skipped else ""
    yield (
        "train",
        train,
        f"{format_count(len(summary.lengths), 'row')} of format {summary.format}{unusable}",
    )
    if summary.data.fields:
        yield "format", summary.data.format, "the format whose columns yours stand for"
        yield "fields", summary.data.fields, "its columns = yours: check that they are right"
    if held_out:
        yield (
            "eval_size",
            held_out,
            f"rows held out ({format_percent(held_out / len(summary.lengths))}) whose loss shows if it learns more than by heart",
        )


def _evaluation_keys(held_out: int) -> Iterator[tuple[str, Any, str]]:
    """The keys of evaluation and of early stopping."""
    if not held_out:
        yield "do_eval", False, "fewer than 20 rows: none to spare"
        return
    yield "eval_strategy", "epoch", "the held-out loss after each epoch shows when it stops falling"
    yield "early_stopping_patience", 2, "ends after 2 epochs without a lower held-out loss, and keeps the best: more do no harm"


def _length_reason(option: ModelOption) -> str:
    cut, positions = sum(length > option.max_length for length in option.lengths), option.architecture.max_position_embeddings
    limit = f"; the model ends at {positions:,}" if option.lengths[0] > positions else ""
    counted = "counted by its tokenizer" if option.is_exact else f"estimated at {BYTES_PER_TOKEN} bytes a token"
    longest = f"the longest {option.lengths[0]:,}{limit} ({counted})"
    return f"tokens: cuts {'or drops ' if cut else ''}{cut:,} of {format_count(len(option.lengths), 'row')}, {longest}"


def describe_gpu(device: Gpu | None) -> str:
    """The GPU in words, for the recipe's first line."""
    return "a computer without an NVIDIA GPU" if device is None else f"{device.name}, {format_gib(device.free_bytes)} for a run"
