"""What became of every row: counts by reason while a source is read, the report on a source, and the report on a run's data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qlora_phi3.data.formats import TITLES
from qlora_phi3.errors import printable
from qlora_phi3.units import format_count

#: Reasons that are counted apart in a source: those may be as many as the rows, as a column's name stands in some.
MOST_REASONS = 200
#: Rows that a count names; and rows of a source that are named where they are skipped, or truncation left nothing supervised.
EXAMPLES, NAMED = 3, 1000
#: Columns that a warning names.
NAMED_COLUMNS = 12
#: With fewer held-out rows than this their loss is a rough figure, and the summary says so.
FEW_ROWS = 30


@dataclass(frozen=True, slots=True)
class RowCount:
    """How many rows something happened to, and the first of them as `file:line`."""

    reason: str
    rows: int = 0
    where: tuple[str, ...] = ()

    def plus(self, rows: int, where: Sequence[str], *, named: int = EXAMPLES) -> "RowCount":
        """Add rows; `where` names the first of them, and the sum names its first `named` rows."""
        return RowCount(self.reason, self.rows + rows, (*self.where, *where[: named - len(self.where)]))


def merge_counts(counts: Iterable[RowCount], *, named: int = EXAMPLES) -> tuple[RowCount, ...]:
    """Add up the counts of each reason; the most frequent reason first, each with its first `named` rows."""
    merged: dict[str, RowCount] = {}
    for count in counts:
        merged[count.reason] = merged.get(count.reason, RowCount(count.reason)).plus(count.rows, count.where, named=named)
    return tuple(sorted(merged.values(), key=lambda count: -count.rows))


@dataclass(slots=True)
class SourceReport:
    """What became of the rows of one source. It counts while the source is read; its size does not grow with the rows."""

    name: str  #: A row is named `name:number`.
    format: str = ""  #: That the rows were read as; empty where none was read.
    first_row: str = ""  #: The first that was read as it.
    columns: list[str] = field(default_factory=list)  #: Of all rows, where [data] fields maps some.
    rows_read: int = 0
    rows_kept: int = 0
    rows_digest: str = ""  #: Of the file of tokenised rows.
    truncated: int = 0  #: As in `DataReport`, and so is the rest: by reason or name.
    fully_truncated: RowCount = RowCount("nothing left to learn after truncation")
    skipped: dict[str, RowCount] = field(default_factory=dict)
    notes: dict[str, RowCount] = field(default_factory=dict)
    unread: dict[str, RowCount] = field(default_factory=dict)
    systems: list[str] = field(default_factory=list)  #: The first two system turns that differ; "" for a row without one.

    def add(self, counts: dict[str, RowCount], reason: str, number: int) -> None:
        """Count a row, by its number in the source, in `skipped`, `notes` or `unread`."""
        reason = printable(" ".join(reason.encode(errors="replace").decode().splitlines()))
        if reason not in counts and len(counts) >= MOST_REASONS:
            reason = "other reasons" if counts is not self.unread else "others"
        named = NAMED if counts is self.skipped else EXAMPLES
        counts[reason] = counts.get(reason, RowCount(reason)).plus(1, [f"{self.name}:{number}"], named=named)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of a run's data, row by row where it matters."""

    sources: tuple[str, ...]  #: Their names; the column `source` is an index into it.
    formats: tuple[str, ...]  #: Of each source, the format it was read as.
    chat_template: str
    max_length: int
    rows_read: int  #: Of all sources, and so are `rows_kept`, which are divided into `train_rows` and `evaluation_rows`.
    rows_kept: int
    train_rows: int
    evaluation_rows: int
    skipped: tuple[RowCount, ...]  #: Rows that cannot be used, by reason, the most frequent first.
    notes: tuple[RowCount, ...]  #: Rows that are used, but changed or remarkable.
    unread: tuple[RowCount, ...]  #: Columns, and keys of messages, that hold something and were not read, with their rows.
    repeated: int  #: Held-out rows whose tokens are those of a training row.
    system: str = ""  #: The system turn that every row has.
    truncated: int  #: Rows kept that were cut at `max_length`.
    fully_truncated: RowCount  #: Rows dropped because the cut left nothing supervised; the first 1,000 are named.
    tokens: int  #: Of the training rows, and so are `supervised_tokens`.
    supervised_tokens: int
    longest_row: int  #: In tokens, training and evaluation.
    sha256: str  #: Of the content of all sources, in their order.
    split_seed: int
    eval_indices: tuple[int, ...]  #: Which kept rows (0 is the first) are held out; empty where evaluation has its own sources.

    def summary_lines(self) -> list[str]:
        """What the run trains and measures on, one fact a line."""
        formats = [TITLES.get(form, form) for form in self.formats]
        origin = ", ".join(f"{name} ({form})" for name, form in zip(self.sources, formats, strict=True) if form)
        measured = f" and {self.evaluation_rows:,} to measure on" if self.evaluation_rows else ""
        drawn = f" (drawn with seed {self.split_seed})" if self.eval_indices else ""
        lines = [f"Data: {format_count(self.train_rows, 'row')} to train on{measured}{drawn}, from {origin}"]
        if 0 < self.evaluation_rows < FEW_ROWS:
            rows = format_count(self.evaluation_rows, "row")
            lines.append(f"Held-out loss: from {rows} only, so a rough figure")
        lines.append(
            f"Tokens to train on: {self.tokens:,}, of which {self.supervised_tokens:,} are learned; longest row of all "
            f"{self.longest_row:,}{' after cuts' if self.truncated else ''}; chat template {self.chat_template}"
        )
        return lines

    def warning_lines(self) -> list[str]:
        """What was left out or changed, one reason a line."""
        lines = [f"{format_count(count.rows, 'row')} skipped: {_with_places(count)}" for count in self.skipped]
        if self.truncated:
            kept = format_count(self.rows_kept, "row")
            lines.append(f"{self.truncated:,} of {kept} cut at max_length = {self.max_length}")
        if self.fully_truncated.rows:
            rows = format_count(self.fully_truncated.rows, "row")
            lines.append(f"{rows} dropped, {_with_places(self.fully_truncated)}")
        lines += [f"{format_count(count.rows, 'row')}, {_with_places(count)}" for count in self.notes]
        if self.unread:
            lines.append(describe_unread(self.unread))
        if self.repeated:
            rows = format_count(self.evaluation_rows, "held-out row")
            lines.append(f"{self.repeated:,} of {rows} are training rows too: the held-out loss is too good by them")
        return lines


def describe_unread(unread: Sequence[RowCount]) -> str:
    """A line with the columns that were not read, the first `NAMED_COLUMNS` of them."""
    named = [f"{count.reason} ({format_count(count.rows, 'row')})" for count in unread[:NAMED_COLUMNS]]
    return f"Columns not read: {', '.join(named)}{', …' if len(unread) > NAMED_COLUMNS else ''}"


def _with_places(count: RowCount) -> str:
    named = count.where[:EXAMPLES]
    return f"{count.reason} ({', '.join(named)}{', …' if count.rows > len(named) else ''})"
