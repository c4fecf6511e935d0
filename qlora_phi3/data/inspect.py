"""What a run will learn, row by row and in figures: the rows of `prepare_datasets` as text, and statistics on their lengths.

Nothing is printed here. Rows come from the function that a run calls, so what is shown is what is learned.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_phi3.data.messages import SkipRow
from qlora_phi3.data.prepare import PreparedData, read_columns, row_lengths
from qlora_phi3.data.report import DataReport
from qlora_phi3.data.sources import open_sources
from qlora_phi3.data.tokenize import UNCUT
from qlora_phi3.errors import DataError
from qlora_phi3.execution import IGNORE_INDEX
from qlora_phi3.recipe.load import as_list
from qlora_phi3.recipe.schema import Data, Recipe

#: The suggested max_length is the smallest multiple of 64 that cuts at most this share of the rows, and of the learned tokens.
CUT_SHARE = 0.01
#: Lengths at which the cuts are listed, in tokens.
CANDIDATES = tuple(2**power for power in range(7, 18))
PERCENTILES = (0, 10, 50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of a row that are all learned, or all not."""

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]  #: As the vocabulary writes them.
    is_learned: bool


@dataclass(frozen=True, slots=True)
class RowView:
    """A row as it is trained on."""

    name: str  #: `file:number`
    pieces: tuple[Piece, ...]
    num_tokens: int
    num_learned: int
    num_cut: int  #: Tokens beyond max_length, which are not trained on.
    is_held_out: bool


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that is left out or cut: `file:number`, why, and the row as the file has it."""

    name: str
    reason: str
    content: str


@dataclass(frozen=True, slots=True)
class Cut:
    """What a max_length cuts: shares of the rows, of all learned tokens, and the rows that nothing learned is left of."""

    max_length: int
    rows_share: float
    learned_share: float
    rows_dropped: int


@dataclass(frozen=True, slots=True)
class DataStatistics:
    """Figures of the rows before they are cut, rows held out of them included; lengths in tokens."""

    report: DataReport
    percentiles: dict[int, int]
    histogram: tuple[tuple[int, int], ...]  #: (largest length of the class, rows), in powers of two.
    learned_share: float  #: Of the tokens that are trained on.
    cuts: tuple[Cut, ...]
    padding_share: float  #: Of the positions, if all rows of a step were padded to the longest of them.
    suggested_max_length: int


def view_rows(
    dataset: Any, indices: Sequence[int], data: PreparedData, tokenizer: Any, *, held_out: bool = False
) -> list[RowView]:
    """Rows of a data set of `prepare_datasets` as text. `indices` count the rows of the data set from 0."""
    views = []
    for row in (dataset[int(index)] for index in indices):
        ids, pieces, text, position = row["input_ids"], [], "", 0
        for is_learned, group in groupby(label != IGNORE_INDEX for label in row["labels"]):
            end = position + sum(1 for _ in group)
            # A tokenizer drops the space before the first word that it decodes: each piece is what it adds to the row's text.
            longer = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            part = tuple(ids[position:end])
            pieces.append(Piece(longer[len(text) :], part, tuple(tokenizer.convert_ids_to_tokens(part)), is_learned))
            text, position = longer, end
        name = f"{data.report.sources[row['source']]}:{row['source_row']}"
        views.append(RowView(name, tuple(pieces), len(ids), row["supervised"], row["num_cut"], held_out))
    return views


def find_row(data: PreparedData, wanted: str, tokenizer: Any) -> RowView:
    """The row that a person names: its number in the data, or `file:number` (the end of the file's name is enough). DataError
    where no such row is trained or evaluated on.
    """
    file, _, number = wanted.rpartition(":")
    for dataset in filter(None, (data.train, data.evaluation)):
        numbers, sources = read_columns(dataset, "source_row", "source")
        for index in np.flatnonzero(numbers == (int(number) if number.isdecimal() else -1)):
            if data.report.sources[sources[index]].endswith(file):
                return view_rows(dataset, [int(index)], data, tokenizer, held_out=dataset is data.evaluation)[0]
    reasons = {name: reason for name, reason in data.left_out.items() if f":{name}".endswith(f":{number}")}
    if row := next((name for name in reasons if name.rpartition(":")[0].endswith(file)), None):
        hint = "Correct it there to train on it; `--problems` lists all such rows."
        raise DataError(f"--row {wanted}: {row} is not trained on: {reasons[row]}.", hint)
    raise DataError(
        f"--row {wanted}: no such row of {', '.join(data.report.sources)} is trained or evaluated on.",
        "The number is that of the line on which the row starts, in .parquet and JSON of one line that of the row; `--problems` "
        "lists rows left out.",
    )


def find_problems(data: PreparedData, recipe: Data, base_dir: Path) -> Iterator[Problem]:
    """Every row that is cut, and the first 1,000 of each reason that are left out, with their content from the file."""
    reasons, max_length = dict(data.left_out), data.report.max_length
    for dataset in filter(None, (data.train, data.evaluation)):
        for source, number, num_cut in zip(*read_columns(dataset, "source", "source_row", "num_cut"), strict=True):
            if num_cut:
                line = f"cut: {max_length + num_cut:,} tokens, max_length is {max_length:,}"
                reasons.setdefault(f"{data.report.sources[source]}:{number}", line)
    names = [(as_list(recipe.train), recipe.split), (as_list(recipe.eval), recipe.eval_split or "test")]
    contents: dict[str, list[Any]] = defaultdict(list)
    for source in (source for each, split in names for source in open_sources(each, recipe, split, base_dir)):
        for number, row in source.rows() if any(name.startswith(f"{source.name}:") for name in reasons) else ():
            if (name := f"{source.name}:{number}") in reasons:
                contents[name].append(row)
    for name, rows in contents.items():
        content = str(rows[0]) if isinstance(rows[0], str | SkipRow) else json.dumps(rows[0], ensure_ascii=False, default=str)
        several = f"One of {len(rows):,} rows that start on this line; in a .jsonl file each has a line of its own."
        yield Problem(name, reasons[name], content if len(rows) == 1 else several)


def measure(data: PreparedData, uncut: PreparedData, recipe: Recipe, positions: int) -> DataStatistics:
    """The statistics of a recipe's data; `uncut` are the same data with `max_length` = `UNCUT` and no row held out of `train`.

    `positions` of the model bound the suggested `max_length`.
    """
    training, lengths = recipe.training, row_lengths(uncut.train)
    learned_before = _learned_before(uncut.train)
    first, last = (int(length - 1).bit_length() for length in (lengths.min(), lengths.max()))
    classes = [2**power for power in range(first, last + 1)]
    counts = np.histogram(lengths, bins=[0.5, *(edge + 0.5 for edge in classes)])[0]
    near = [length for length in CANDIDATES if length < 2 * lengths.max()] or [CANDIDATES[0]]
    suggested = min(suggest_max_length(lengths, learned_before), positions)
    kept, batch_size = row_lengths(data.train).tolist(), training.batch_size
    batches = [kept[start : start + batch_size] for start in range(0, len(kept), batch_size)]
    return DataStatistics(
        report=data.report,
        percentiles={share: int(np.percentile(lengths, share, method="higher")) for share in PERCENTILES},
        histogram=tuple(zip(classes, counts.tolist(), strict=True)),
        learned_share=data.report.supervised_tokens / data.report.tokens,
        cuts=tuple(_cut(length, lengths, learned_before) for length in sorted({*near, training.max_length, suggested})),
        padding_share=1 - data.report.tokens / sum(len(batch) * max(batch) for batch in batches),
        suggested_max_length=suggested,
    )


def suggest_max_length(lengths: NDArray[np.int64], learned_before: Callable[[int], NDArray[np.int64]]) -> int:
    """The smallest multiple of 64 that cuts at most 1 % of the rows, and at most 1 % of the learned tokens."""
    longest = -(-int(lengths.max()) // 64) * 64
    start = max(64, int(np.quantile(lengths, 1 - CUT_SHARE, method="inverted_cdf")) // 64 * 64)
    fits = (
        length
        for length in range(start, longest + 1, 64)
        if (cut := _cut(length, lengths, learned_before)).rows_share <= CUT_SHARE and cut.learned_share <= CUT_SHARE
    )
    return next(fits, longest)


def _learned_before(uncut: Any) -> Callable[[int], NDArray[np.int64]]:
    """A function from a max_length to the learned tokens that each row keeps, int64 of shape (rows,)."""
    parts = []
    for chunk in uncut.select_columns(["labels"]).with_format("arrow")[:]["labels"].chunks:
        counts = np.concatenate([[0], np.cumsum(np.asarray(chunk.values) != IGNORE_INDEX)])
        offsets = np.asarray(chunk.offsets, dtype=np.int64)
        parts.append((counts, offsets[:-1], np.diff(offsets)))

    def learned_before(max_length: int) -> NDArray[np.int64]:
        kept = [counts[starts + np.minimum(lengths, max_length)] - counts[starts] for counts, starts, lengths in parts]
        return np.concatenate(kept)

    return learned_before


def _cut(max_length: int, lengths: NDArray[np.int64], learned_before: Callable[[int], NDArray[np.int64]]) -> Cut:
    kept, total = learned_before(max_length), int(learned_before(UNCUT).sum())
    return Cut(max_length, float((lengths > max_length).mean()), 1 - int(kept.sum()) / total, int((kept == 0).sum()))
