"""The rows of one source as token ids and labels in an Arrow file, with a count of every row that is not used unchanged.

The Arrow file is memory-mapped from a cache. The key of a cache entry is the hash of everything that its content depends on: the
source's content, the template, the tokenizer, the settings, and the code of this package. A damaged entry is built again.

Supervised are the assistant's words and its end token, but neither the line break after it nor the closing `<|endoftext|>`.
Everything else has the label -100, and so has position 0, which no position predicts. Labels are not shifted.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qlora_phi3.data.batching import IGNORE_INDEX
from qlora_phi3.data.formats import Chat, Document, SkipRow, detect_format, read_row
from qlora_phi3.data.report import SourceReport
from qlora_phi3.data.sources import Source
from qlora_phi3.data.template import ChatTemplate, Span, render_chat
from qlora_phi3.errors import DataError
from qlora_phi3.files import atomic_dir, disk_errors
from qlora_phi3.recipe.schema import Data
from qlora_phi3.reporter import Progress
from qlora_phi3.units import format_count

#: Rows that are tokenised at once.
BATCH_ROWS = 256

ROWS_NAME, REPORT_NAME = "rows.arrow", "report.json"

INJECTION = "message that holds a special token of the model as text: read as that token"

#: One row's token ids, or its labels: int32, shape (length,).
Ids = np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class TokenizeConfig:
    """How rows are read and tokenised; the same for all sources of a run. The fields are those of `prepare_datasets`."""

    data: Data
    max_length: int
    template: ChatTemplate
    tokenizer: Any
    cache_dir: Path
    progress: Progress | None


def tokenize_source(source: Source, config: TokenizeConfig, max_rows: int | None) -> tuple[Any, SourceReport]:
    """The usable rows of a source, at most `max_rows` of them, and a report of all rows read; from the cache if they are there.

    Processes that need the same entry at the same time build it once: the others wait for it.

    Returns:
        A `datasets.Dataset`, memory-mapped, with the columns `input_ids` and `labels` (lists of int32, as long as each
        other), `length` (int32, tokens), `supervised` (int32, labels that are not -100) and `source_row` (int64, the
        number of the row in its source); and the report.

    Raises:
        DataError: a row of another format than the first, an unknown role, unreadable content, or a full disk.
    """
    from filelock import FileLock

    entry = config.cache_dir / _cache_key(source, config, max_rows)
    if (found := _read_entry(entry)) is not None:
        return found
    with disk_errors(
        config.cache_dir, DataError, hint="{cause}, or set HF_DATASETS_CACHE to a directory on another disk."
    ):
        config.cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_suffix(".lock")):
            if _read_entry(entry) is None:
                with atomic_dir(entry) as staging:
                    report = _write_rows(staging / ROWS_NAME, source, config, max_rows)
                    (staging / REPORT_NAME).write_text(json.dumps(asdict(report)), encoding="utf-8")
        if (found := _read_entry(entry)) is None:
            raise OSError("what was written cannot be read back")
    return found


def _read_entry(entry: Path) -> tuple[Any, SourceReport] | None:
    """The rows and the report of a cache entry; None where either is missing or damaged."""
    import pyarrow  # type: ignore[import-untyped]
    from datasets import Dataset
    from pydantic import TypeAdapter

    try:
        report = TypeAdapter(SourceReport).validate_json((entry / REPORT_NAME).read_bytes())
        rows = Dataset.from_file(str(entry / ROWS_NAME))
    except (OSError, ValueError, pyarrow.ArrowException):
        return None
    # An Arrow stream that was cut between two batches is valid: only the number of rows shows it.
    return (rows, report) if len(rows) == report.rows_kept else None


def _cache_key(source: Source, config: TokenizeConfig, max_rows: int | None) -> str:
    import tokenizers
    import transformers

    # From "added_tokens" on, the state is the vocabulary and its rules. Before it stand the padding and the truncation
    # of the last call, which do not matter here and would change the key from run to run.
    data, state = config.data, config.tokenizer.backend_tokenizer.to_str()
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    parts = [
        source.name,
        source.digest,
        [data.format, sorted(data.fields.items()), data.loss_on, config.max_length, max_rows],
        {**asdict(config.template), "roles": sorted(config.template.roles)},
        sha256(state[state.index('"added_tokens"') :].encode()).hexdigest(),
        config.tokenizer.special_tokens_map,
        sha256(code).hexdigest(),
        [tokenizers.__version__, transformers.__version__],
    ]
    return sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _write_rows(path: Path, source: Source, config: TokenizeConfig, max_rows: int | None) -> SourceReport:
    """Write the usable rows of a source as an Arrow stream, `BATCH_ROWS` at a time."""
    import pyarrow as pa

    tokens, count = pa.list_(pa.int32()), pa.int32()
    schema = pa.schema(
        {"input_ids": tokens, "labels": tokens, "length": count, "supervised": count, "source_row": pa.int64()}
    )
    report, names, activity = SourceReport(source.name), set[str](), f"Reading {Path(source.name).name}"
    examples = read_examples(source, config.data, report, names)
    pattern = special_token_pattern(config.tokenizer)
    most = float("inf") if max_rows is None else max_rows
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := list(islice(examples, int(min(BATCH_ROWS, most - report.rows_kept)))):
            rows = list(_truncate_rows(_tokenize_batch(batch, config, pattern, report), config.max_length, report))
            if rows:
                numbers, ids, labels = zip(*rows, strict=True)
                supervised = [int(np.count_nonzero(row != IGNORE_INDEX)) for row in labels]
                lengths = [len(row) for row in ids]
                writer.write_batch(pa.record_batch([ids, labels, lengths, supervised, numbers], schema=schema))
            report.rows_kept += len(rows)
            if config.progress is not None:
                config.progress(activity, report.rows_read, None)
    if config.progress is not None and report.rows_read:
        config.progress(activity, report.rows_read, report.rows_read)
    missing = sorted(theirs for theirs in config.data.fields.values() if theirs not in names)
    if missing and names:
        raise DataError(
            f"[data] fields names {', '.join(map(repr, missing))}, which is a column of none of the "
            f"{format_count(report.rows_read, 'row')} of {source.name}.",
            f"Its columns are: {', '.join(sorted(names))}.",
        )
    return report


def read_examples(
    source: Source, data: Data, report: SourceReport, columns: set[str]
) -> Iterator[tuple[int, Chat | Document]]:
    """Number and content of every row that can be read; the others are counted in `report`.

    Args:
        columns: the names of all columns are added to it if [data] fields maps any.

    Raises:
        DataError: unreadable content, an unknown role, or a row of another format than the first.
    """
    first = ""
    for number, row in source.rows():
        where = f"{source.name}:{number}"
        report.rows_read += 1
        try:
            if not isinstance(row, Mapping):
                raise SkipRow("the row is no object with columns")
            if data.fields:
                columns.update(row)
                row = {**row, **{ours: row.get(theirs) for ours, theirs in data.fields.items()}}
            name = data.format if data.format != "auto" else detect_format(row)
            if name is None:
                raise SkipRow(f"its columns ({', '.join(sorted(map(str, row)))[:100]}) fit no format")
            if report.format and name != report.format:
                raise DataError(
                    f"{where} is of format {name!r}, while {first} is of format {report.format!r}.",
                    "Use one format in a file, or name the one to read in [data] format.",
                )
            first, report.format = first or where, name
            yield number, read_row(row, name, where)
        except SkipRow as reason:
            report.add(report.skipped, str(reason), number)


def _tokenize_batch(
    batch: Sequence[tuple[int, Chat | Document]],
    config: TokenizeConfig,
    pattern: re.Pattern[str],
    report: SourceReport,
) -> Iterator[tuple[int, Ids, Ids]]:
    """Number, ids and labels of rows of one format, with a note for each that is changed or remarkable."""
    numbers, texts, spans = [], [], []
    for number, example in batch:
        if isinstance(example, Chat):
            try:
                text, supervised, notes = render_chat(example, config.template, config.tokenizer)
            except SkipRow as reason:
                report.add(report.skipped, str(reason), number)
                continue
            if any(pattern.search(turn.text) for turn in example.turns):
                notes.append(INJECTION)
            for note in notes:
                report.add(report.notes, note, number)
            spans.append(supervised)
        else:
            text = example.text
        numbers.append(number)
        texts.append(text)
    if isinstance(batch[0][1], Document):
        rows = tokenize_documents(texts, config.tokenizer)
    else:
        rows = tokenize_chats(texts, spans if config.data.loss_on == "assistant" else None, config.tokenizer)
    return ((number, *row) for number, row in zip(numbers, rows, strict=True))


def tokenize_chats(
    texts: Sequence[str], spans: Sequence[Sequence[Span]] | None, tokenizer: Any
) -> list[tuple[Ids, Ids]]:
    """Tokenise rendered conversations; the ids are those of `apply_chat_template`.

    Args:
        texts: rendered conversations.
        spans: of each text, the characters [start, end) to supervise; None: supervise every token.

    Returns:
        For each text its ids and its labels, int32 of shape (length,) both.
    """
    if not texts:
        return []
    batch = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    rows = []
    for index, ids in enumerate(batch["input_ids"]):
        row = np.asarray(ids, dtype=np.int32)
        labels = row.copy() if spans is None else np.full_like(row, IGNORE_INDEX)
        for span in spans[index] if spans is not None else ():
            first, last = _find_tokens(batch, index, span)
            labels[first:last] = row[first:last]
        labels[:1] = IGNORE_INDEX
        rows.append((row, labels))
    return rows


def _find_tokens(batch: Any, index: int, span: Span) -> tuple[int, int]:
    """The tokens [first, last) that lie in a span of characters.

    A special token with `rstrip` covers the white space after it, so the token at the first character may be the
    header before the span: a token counts only when it starts inside. A character of several byte tokens belongs to
    all of them.
    """
    start, end = span
    inside = (batch.char_to_token(index, position) for position in range(start, end))
    first = next((t for t in inside if t is not None and batch.token_to_chars(index, t).start >= start), None)
    if first is None:
        return 0, 0
    backwards = (batch.char_to_token(index, position) for position in range(end - 1, start - 1, -1))
    last = next(t for t in backwards if t is not None)
    size = len(batch["input_ids"][index])
    while last + 1 < size and (chars := batch.token_to_chars(index, last + 1)) is not None and chars.start < end:
        last += 1
    return first, last + 1


def tokenize_documents(texts: Sequence[str], tokenizer: Any) -> list[tuple[Ids, Ids]]:
    """Tokenise raw text with the tokenizer's own start of a text, and close it with the end-of-text token.

    Returns:
        For each text its ids and its labels (every token but the first), int32 of shape (length,) both.
    """
    batch = tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False)
    end, rows = [tokenizer.eos_token_id], []
    for ids in batch["input_ids"]:
        row = np.asarray(ids if ids[-1:] == end else ids + end, dtype=np.int32)
        labels = row.copy()
        labels[:1] = IGNORE_INDEX
        rows.append((row, labels))
    return rows


def special_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches a text that would be read as one of the tokenizer's special tokens, by accident or as an injection."""
    tokens = sorted({*tokenizer.all_special_tokens, *(t for t in tokenizer.get_added_vocab() if t.startswith("<|"))})
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _truncate_rows(
    rows: Iterable[tuple[int, Ids, Ids]], max_length: int, report: SourceReport
) -> Iterator[tuple[int, Ids, Ids]]:
    """Cut rows at `max_length` tokens; those with nothing supervised are counted and left out."""
    for number, ids, labels in rows:
        is_long = len(ids) > max_length
        kept = labels[:max_length]
        if (kept != IGNORE_INDEX).any():
            report.truncated += is_long
            yield number, ids[:max_length], kept
        elif is_long:
            report.add_fully_truncated(number)
        else:
            report.add(report.skipped, "the chat template marks nothing to learn", number)
