"""The data of a run: the rows of all its sources, the part that is held out, and a report of every row.

This is the door of the room: `prepare_datasets` is what the rest of the program calls. Nothing here knows a model or
torch.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qlora_phi3.data.formats import FORMATS, check_fields, detect_format, guess_mapping
from qlora_phi3.data.sources import Source, is_local, open_file, open_sources
from qlora_phi3.data.template import ChatTemplate
from qlora_phi3.data.tokenize import (
    EXAMPLES,
    NAMED,
    Progress,
    RowCount,
    SourceReport,
    TokenizeConfig,
    read_to_first_usable,
    tokenize_source,
)
from qlora_phi3.errors import DataError
from qlora_phi3.units import format_count

#: With fewer held-out rows than this their loss is a rough figure, and that is said.
FEW_ROWS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of the data, row by row where it matters.

    Args:
        sources: their names; the column `source` counts into it.
        formats: of each source, the format it was read as.
        chat_template: name of the template.
        max_length: in tokens, as asked for.
        rows_read, rows_kept: of all sources.
        skipped: rows that cannot be used, by reason, the most frequent first.
        notes: rows that are used, but not quite as they stand.
        truncated: rows kept that were cut at `max_length`.
        cut_off: rows dropped because the cut took everything there was to learn, each named (the first 1,000).
        tokens, supervised_tokens: of the training rows.
        longest_row: in tokens, training and evaluation.
        sha256: of the content of all sources, in their order.
        eval_indices: which of the kept rows (0 is the first) are held out; empty where evaluation has its own sources.
    """

    sources: tuple[str, ...]
    formats: tuple[str, ...]
    chat_template: str
    max_length: int
    rows_read: int
    rows_kept: int
    train_rows: int
    evaluation_rows: int
    skipped: tuple[RowCount, ...]
    notes: tuple[RowCount, ...]
    truncated: int
    fully_truncated: RowCount
    tokens: int
    supervised_tokens: int
    longest_row: int
    sha256: str
    split_seed: int
    eval_indices: tuple[int, ...]

    def summary_lines(self) -> list[str]:
        """What there is, for people."""
        origin = ", ".join(f"{name} ({form})" for name, form in zip(self.sources, self.formats, strict=True) if form)
        measured = f" and {self.evaluation_rows:,} to measure on" if self.evaluation_rows else ""
        drawn = f" (drawn with seed {self.split_seed})" if self.eval_indices else ""
        few = 0 < self.evaluation_rows < FEW_ROWS
        return [
            f"Data: {format_count(self.train_rows, 'row')} to train on{measured}{drawn}, from {origin}",
            *(
                [f"Held-out loss: from {format_count(self.evaluation_rows, 'row')} only, so a rough figure"]
                if few
                else []
            ),
            f"Tokens: {self.tokens:,}, of which {self.supervised_tokens:,} are learned; the longest row has "
            f"{self.longest_row:,}; chat template {self.chat_template}",
        ]

    def warning_lines(self) -> list[str]:
        """What was left out or altered, one line a reason, for people."""
        lines = [f"{format_count(count.rows, 'row')} skipped: {_with_places(count)}" for count in self.skipped]
        if self.truncated:
            kept = format_count(self.rows_kept, "row")
            lines.append(f"{self.truncated:,} of {kept} cut at max_length = {self.max_length}")
        if self.fully_truncated.rows:
            lines.append(
                f"{format_count(self.fully_truncated.rows, 'row')} dropped, {_with_places(self.fully_truncated)}"
            )
        return lines + [f"{format_count(count.rows, 'row')}, {_with_places(count)}" for count in self.notes]


def _with_places(count: RowCount) -> str:
    named = count.where[:EXAMPLES]
    return f"{count.reason} ({', '.join(named)}{', …' if count.rows > len(named) else ''})"


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Rows to train on and to measure on (`datasets.Dataset`, mapped from disk), with the report on them.

    Columns: `input_ids` and `labels` (int32 lists; -100 where not supervised and at position 0, not shifted), `length`
    and `supervised` (tokens), `source` (number of the source in the report) and `source_row` (line in the source).
    """

    train: Any
    evaluation: Any | None
    report: DataReport


def prepare_datasets(
    *,
    train: Sequence[str],
    evaluation: Sequence[str] = (),
    eval_size: float = 0.05,
    split_seed: int = 42,
    split: str = "train",
    eval_split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    loss_on: Literal["assistant", "all"] = "assistant",
    max_length: int,
    max_rows: int | None = None,
    max_eval_rows: int | None = None,
    tokenizer: Any,
    template: ChatTemplate,
    base_folder: Path,
    progress: Progress | None = None,
    cache_folder: Path | None = None,
) -> PreparedData:
    """Read, render, tokenise, cut and split the data of a run.

    Args:
        train: files or hub ids; a relative path is looked for here first, then in `base_folder`, the recipe's.
        evaluation: the same; where empty, the `eval_split` of the hub ids of `train`, or else rows held out of `train`.
        eval_size: share (below 1) or number of the rows to hold out; 0 for none.
        split: of hub ids to train on; `eval_split` of those to measure on ("test" where it is None).
        format: a name of `FORMATS`, or "auto" to tell it from the columns of each source.
        fields: our column name -> theirs.
        loss_on: learn the assistant's words and end token, or every token.
        max_length: tokens; longer rows are cut at the right.
        max_rows: read no more usable rows than this to train on, held-out rows included.
        max_eval_rows: measure on no more rows than this.
        tokenizer: a fast one of transformers.
        template: from `choose_template`.
        progress: told of the rows read so far.
        cache_folder: for the tokenised rows; None: that of the datasets library.

    Raises:
        DataError: missing, empty or unreadable data, mixed formats, an unknown role, nothing to train on.
    """
    check_fields(fields or {}, format)
    if not evaluation and eval_split is not None:
        evaluation = [name for name in train if not is_local(name, base_folder)]
    train_sources = open_sources(train, base_folder=base_folder, split=split, subset=subset, revision=revision)
    eval_sources = open_sources(
        evaluation, base_folder=base_folder, split=eval_split or "test", subset=subset, revision=revision
    )
    config = TokenizeConfig(
        format=format,
        fields=dict(fields or {}),
        loss_on=loss_on,
        max_length=max_length,
        template=template,
        tokenizer=tokenizer,
        cache_folder=_default_cache_folder() if cache_folder is None else cache_folder,
        progress=progress,
    )
    rows, reports = _read_all(train_sources, config, max_rows, first=0)
    held_out: Any | None = None
    indices: tuple[int, ...] = ()
    if eval_sources:
        held_out, eval_reports = _read_all(eval_sources, config, max_eval_rows, first=len(train_sources))
        reports += eval_reports
    elif indices := split_indices(len(rows), eval_size, seed=split_seed, at_most=max_eval_rows):
        held_out = rows.select(indices)
        rows = rows.select(np.setdiff1d(np.arange(len(rows)), indices))
    content = sha256("".join(source.digest for source in (*train_sources, *eval_sources)).encode()).hexdigest()
    return PreparedData(rows, held_out, _sum_up(rows, held_out, reports, config, content, split_seed, indices))


def check_files(names: Sequence[str], base_folder: Path, *, format: str, fields: Mapping[str, str]) -> None:
    """Read each local file up to the first row that a run can use; no tokenizer is needed, and nothing of the hub is read.

    Raises:
        DataError: one is missing, unreadable, or has no such row.
    """
    check_fields(fields, format)
    for name in names:
        if is_local(name, base_folder):
            source = open_file(name, base_folder)
            report = read_to_first_usable(source, format, fields)
            if not report.rows_kept:
                raise _nothing_to_learn([source], [report], max_length=0)


def split_indices(num_rows: int, size: float, *, seed: int, at_most: int | None = None) -> tuple[int, ...]:
    """Indices of the rows to hold out, ascending: the first of a permutation drawn with `seed` by numpy's PCG64.

    Args:
        size: a share of the rows (below 1; at least one row of two or more), or their number.
        at_most: hold out no more than this.

    Raises:
        DataError: nothing would be left to train on.
    """
    count = int(size) if size >= 1 else min(max(1, round(size * num_rows)), num_rows - 1) if size else 0
    count = count if at_most is None else min(count, at_most)
    if count >= num_rows and count:
        raise DataError(
            f"[data] eval_size = {size} holds out {count} of {num_rows} usable rows, and none is left to train on.",
            "Lower eval_size, or name evaluation data of its own in [data] eval.",
        )
    return tuple(sorted(int(row) for row in np.random.default_rng(seed).permutation(num_rows)[:count]))


def _default_cache_folder() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "qlora-phi3"


def _read_all(
    sources: Sequence[Source], config: TokenizeConfig, max_rows: int | None, *, first: int
) -> tuple[Any, list[SourceReport]]:
    """The usable rows of several sources as one data set; `first` is the number of the first source in the report."""
    from datasets import concatenate_datasets

    parts, reports, kept = [], [], 0
    for number, source in enumerate(sources, first):
        part, report = tokenize_source(source, config, None if max_rows is None else max_rows - kept)
        if report.rows_read == 0 and max_rows != kept:
            raise DataError(f"{source.name} holds no rows.", "Give it at least one.")
        parts.append(part.add_column("source", np.full(len(part), number, dtype=np.int32)))
        reports.append(report)
        kept += report.rows_kept
    if not kept:
        raise _nothing_to_learn(sources, reports, config.max_length)
    return concatenate_datasets([part for part in parts if len(part)]), reports


def _nothing_to_learn(sources: Sequence[Source], reports: Sequence[SourceReport], max_length: int) -> DataError:
    """Why no row is left, in one line."""
    names = ", ".join(report.name for report in reports)
    fully_truncated = _merge([report.fully_truncated for report in reports], EXAMPLES)
    reasons = [*([fully_truncated] if fully_truncated.rows else []), *_merge_all(report.skipped for report in reports)]
    as_list = "; ".join(f"{count.rows} x {count.reason} (first: {count.where[0]})" for count in reasons[:5])
    read = sum(report.rows_read for report in reports)
    if not read:
        return DataError(f"There is no row in {names}.", "Give it at least one row.")
    first_row = next(row for source in sources for _, row in source.rows())
    return DataError(
        f"None of the {format_count(read, 'row')} of {names} can be trained on: {as_list}.",
        f"Raise [training] max_length, now {max_length}." if fully_truncated.rows else _shape_cure(first_row, read),
    )


def _shape_cure(row: Any, rows_read: int) -> str:
    """What to do about rows of a foreign shape: where the true rows lie, or the two lines that fit them."""
    if isinstance(row, Mapping) and detect_format(row) is None:
        lists = [
            name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if guess := guess_mapping(row):
            pairs = ", ".join(f"{ours} = {json.dumps(theirs, ensure_ascii=False)}" for ours, theirs in guess[1].items())
            return f'Write below [data]: format = "{guess[0]}" and, on a line of its own, fields = {{ {pairs} }}'
        if rows_read == 1 and len(lists) == 1:
            return f"Its rows lie in the list {lists[0]!r}: save that list alone."
    return f"The formats are {', '.join(FORMATS)}; [data] fields maps other column names to theirs."


def _merge_all(counts: Iterable[Sequence[RowCount]]) -> tuple[RowCount, ...]:
    """Counts of several sources, by reason, the most frequent first."""
    by_reason: dict[str, list[RowCount]] = {}
    for count in chain.from_iterable(counts):
        by_reason.setdefault(count.reason, []).append(count)
    return tuple(sorted((_merge(same, EXAMPLES) for same in by_reason.values()), key=lambda count: -count.rows))


def _merge(counts: Sequence[RowCount], named: int) -> RowCount:
    where = chain.from_iterable(count.where for count in counts)
    return RowCount(counts[0].reason, sum(count.rows for count in counts), tuple(islice(where, named)))


def _sum_up(
    rows: Any,
    held_out: Any | None,
    reports: Sequence[SourceReport],
    config: TokenizeConfig,
    content: str,
    split_seed: int,
    eval_indices: tuple[int, ...],
) -> DataReport:
    lengths = _column(rows, "length")
    return DataReport(
        sources=tuple(report.name for report in reports),
        formats=tuple(report.format for report in reports),
        chat_template=config.template.name,
        max_length=config.max_length,
        rows_read=sum(report.rows_read for report in reports),
        rows_kept=sum(report.rows_kept for report in reports),
        train_rows=len(rows),
        evaluation_rows=0 if held_out is None else len(held_out),
        skipped=_merge_all(report.skipped for report in reports),
        notes=_merge_all(report.notes for report in reports),
        truncated=sum(report.truncated for report in reports),
        fully_truncated=_merge([report.fully_truncated for report in reports], NAMED),
        tokens=int(lengths.sum()),
        supervised_tokens=int(_column(rows, "supervised").sum()),
        longest_row=int(max(lengths.max(), 0 if held_out is None else _column(held_out, "length").max())),
        sha256=content,
        split_seed=split_seed,
        eval_indices=eval_indices,
    )


def _column(rows: Any, name: str) -> Any:
    """A column of integers as a numpy array."""
    return np.asarray(rows.select_columns([name]).with_format("numpy")[:][name], dtype=np.int64)
