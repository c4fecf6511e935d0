"""The rows of one source as token ids and labels in an Arrow file, with a count of every row that is not used unchanged.

The Arrow file is memory-mapped from a cache. The key of a cache entry is the hash of everything that its content depends on: the
source's content, the template, the tokenizer, the settings, and the code of this package. A damaged entry is built again.

Supervised are the assistant's words and its end token, but neither the line break after it nor the closing `<|endoftext|>`.
Everything else has the label -100, and so has position 0, which no position predicts. Labels are not shifted.
"""

import gc
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from qlora_phi3.data.formats import SYNONYMS, Chat, Document, check_document, detect_format, read_row
from qlora_phi3.data.messages import CONTENT_KEYS, SkipRow, check_unread, parse_json
from qlora_phi3.data.report import NAMED, SourceReport
from qlora_phi3.data.sources import Source
from qlora_phi3.data.template import LEADING_UNICODE_SPACE, ChatTemplate, render_chat
from qlora_phi3.data.tokenizer import MARK, Span, SpecialTokens
from qlora_phi3.errors import DataError, UserError
from qlora_phi3.execution import IGNORE_INDEX
from qlora_phi3.files import atomic_file, disk_errors, hash_file, remove, replace_dir, row_cache_dir
from qlora_phi3.recipe.schema import Data
from qlora_phi3.reporter import Progress
from qlora_phi3.units import format_count

#: Rows that are tokenised at once.
BATCH_ROWS = 256
#: Batches that are tokenized at once, each in a thread of its own. One thread renders and writes; it has no work for more.
THREADS = min(4, os.cpu_count() or 1)
#: By this variable tokenizers is told whether to start threads.
PARALLELISM = "TOKENIZERS_PARALLELISM"
ROWS_NAME, REPORT_NAME = "rows.arrow", "report.json"
#: Of an entry that is being written: the report so far, and the bytes of the rows that it counts.
STATE_NAME = "state.json"
#: What ends an Arrow stream.
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
#: Rows after which what is written can be continued.
PART_ROWS = 100 * BATCH_ROWS
READ_AS_TEXT = "special tokens of the model in the words of the row: read as text"
READ_AS_TOKENS = "special tokens of the model in the words of the row: read as these tokens (allow_special_tokens)"
UNICODE_SPACE = "a message begins with Unicode white space: llama.cpp reads it as other tokens (qlora-phi3 docs gguf)"
CHAT_IN_TURN = "a turn that holds a rendered chat: it is rendered a second time (the format text reads rendered chats)"
CHAT_IN_TEXT = "raw text that looks like a rendered chat: its prompts are learned too"
PLACEHOLDER = "words in double braces, as in {{name}}: they are learned as they stand (write the real ones)"
#: A place in a template that was not filled.
UNFILLED = re.compile(r"\{\{ ?[A-Za-z_]\w{0,30} ?\}\}")
#: The headers that chat templates and prompts of the field write before a turn.
RENDERED_CHAT = re.compile(
    r"<[|\uff5c](user|assistant|system|im_start|start_header_id|start_of_role)[|\uff5c]>|<start_of_turn>|\[/?INST\]|<(human|bot)>:"
    r"|\b(USER|ASSISTANT):|GPT4 Correct (User|Assistant):|^(Q|A):"
    r"|^(### ?|<)?(Human|Assistant|User|Instruction|Response|Question|Answer)[:>]|### ?(Human|Assistant|Response):",
    re.MULTILINE | re.IGNORECASE,
)
#: `max_length` at which no row is cut.
UNCUT = 2**31 - 1
#: Faulty rows that an error names.
NAMED_FAULTS = 5
#: One row's token ids, or its labels: int32, shape (length,).
Ids = np.ndarray[tuple[int], np.dtype[np.int32]]
#: Number and content of rows.
Examples = Iterator[tuple[int, Chat | Document]]
#: The rows of a source read so far, and number, ids and labels of some of them.
Batches = Iterator[tuple[int, Iterable[tuple[int, Ids, Ids]]]]


@dataclass(frozen=True, slots=True)
class TokenizeConfig:
    """How rows are read and tokenised; the same for all sources of a run. The fields are those of `prepare_datasets`."""

    data: Data
    max_length: int
    template: ChatTemplate
    tokenizer: Any
    progress: Progress


def tokenize_source(source: Source, config: TokenizeConfig, max_rows: int | None) -> tuple[Any, SourceReport]:
    """The usable rows of a source, at most `max_rows` of them, and a report of all rows read; from the cache if they are there.

    Processes that need the same entry at the same time build it once: the others wait for it.

    Returns:
        A `datasets.Dataset`, memory-mapped, with the columns `input_ids` and `labels` (lists of int32, as long as each
        other), `length` (int32, tokens), `num_cut` (int32, tokens beyond `max_length`, which are left out), `supervised` (int32,
        labels that are not -100), `source_row` (int64, the number of the row in its source) and `digest` (uint64, a hash of its
        ids); and the report. DataError for a row of another format than the first, an unknown role, unreadable content, or a full
        disk.
    """
    from filelock import FileLock

    cache = row_cache_dir()
    entry = cache / _cache_key(source, config, max_rows)
    if (found := _read_entry(entry)) is not None:
        return found
    with disk_errors(cache, DataError, hint="{cause}, or set HF_DATASETS_CACHE to a directory on another disk."):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_suffix(".lock")):
            if _read_entry(entry) is None:
                _build_entry(entry, source, config, max_rows)
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
        if hash_file(entry / ROWS_NAME) != report.rows_digest:
            return None
        with suppress(OSError):
            os.utime(entry / REPORT_NAME)  # shown by `qlora-phi3 cache`
        return Dataset.from_file(str(entry / ROWS_NAME)), report
    except (OSError, ValueError, pyarrow.ArrowException):
        return None


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
        [sorted(data.ignore_columns), data.allow_special_tokens],
        {**asdict(config.template), "roles": sorted(config.template.roles)},
        sha256(state[state.index('"added_tokens"') :].encode()).hexdigest(),
        config.tokenizer.special_tokens_map,
        sha256(code).hexdigest(),
        [tokenizers.__version__, transformers.__version__],
    ]
    return sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _build_entry(entry: Path, source: Source, config: TokenizeConfig, max_rows: int | None) -> None:
    """Write an entry. What was saved of it before a run was interrupted or killed is continued."""
    staging = entry.with_suffix(".partial")
    try:
        staging.mkdir(exist_ok=True)
        report = _write_rows(staging, source, config, max_rows)
        report.rows_digest = hash_file(staging / ROWS_NAME)
        (staging / REPORT_NAME).write_text(json.dumps(asdict(report)), encoding="utf-8")
        remove(staging / STATE_NAME)
        replace_dir(staging, entry)
    except BaseException as error:
        if isinstance(error, UserError) or not (staging / STATE_NAME).exists():  # corrected data have another entry
            remove(staging)
        raise


def _read_state(folder: Path, name: str) -> tuple[SourceReport, int]:
    """The report as `_write_rows` saved it last, and the bytes of the rows that it counts; of nothing where that is damaged or
    missing.
    """
    from pydantic import TypeAdapter

    try:
        state = json.loads((folder / STATE_NAME).read_bytes())
        if (folder / ROWS_NAME).stat().st_size >= state["num_bytes"]:
            return TypeAdapter(SourceReport).validate_python(state["report"]), state["num_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return SourceReport(name), 0


def _write_rows(folder: Path, source: Source, config: TokenizeConfig, max_rows: int | None) -> SourceReport:
    """Write the usable rows of a source as an Arrow stream, `BATCH_ROWS` at a time, and save the report after each `PART_ROWS`.

    Where the cache has the rows uncut, as after `inspect`, they are only cut.
    """
    import pyarrow as pa

    tokens, count = pa.list_(pa.int32()), pa.int32()
    columns = {"input_ids": tokens, "labels": tokens, "length": count, "num_cut": count, "supervised": count}
    schema = pa.schema({**columns, "source_row": pa.int64(), "digest": pa.uint64()})
    report, num_bytes = _read_state(folder, source.name)
    activity, path = f"Reading {Path(source.name).name}", folder / ROWS_NAME
    uncut_key = _cache_key(source, replace(config, max_length=UNCUT), None)
    parts = _tokenize_parts(source, config, max_rows, report)
    if max_rows is None and config.max_length != UNCUT and (uncut := _read_entry(row_cache_dir() / uncut_key)) is not None:
        report, num_bytes = replace(uncut[1], rows_kept=0), 0
        parts = iter([((report.rows_read, batch) for batch in _read_batches(uncut[0]))])
    with path.open("r+b" if num_bytes else "wb") as file:
        file.truncate(num_bytes)
        file.seek(num_bytes)
        if not num_bytes:
            file.write(schema.serialize())
        for part in parts:
            for rows_read, batch in part:
                rows = list(_truncate_rows(batch, config.max_length, report))
                if rows:
                    file.write(pa.record_batch(_as_columns(rows), schema=schema).serialize())
                report.rows_kept += len(rows)
                config.progress(activity, rows_read, None)
            if report.rows_kept >= PART_ROWS:
                file.flush()
                os.fsync(file.fileno())
                with atomic_file(folder / STATE_NAME) as state:
                    state.write_text(json.dumps({"report": asdict(report), "num_bytes": file.tell()}), encoding="utf-8")
        file.write(END_OF_STREAM)
    if report.rows_read:
        config.progress(activity, report.rows_read, report.rows_read)
    missing = sorted(theirs for theirs in config.data.fields.values() if theirs not in report.columns)
    if missing and report.columns:
        raise DataError(
            f"[data] fields names {', '.join(map(repr, missing))}, which is a column of none of the "
            f"{format_count(report.rows_read, 'row')} of {source.name}.",
            f"Its columns are: {', '.join(sorted(report.columns))}.",
        )
    return report


def _as_columns(rows: Sequence[tuple[int, Ids, Ids, int, int]]) -> list[Any]:
    """The columns of a record batch, of rows as `_truncate_rows` yields them."""
    import pyarrow as pa

    numbers, ids, labels, num_cut, supervised = zip(*rows, strict=True)
    lengths = [len(row) for row in ids]
    all_ids, all_labels = np.concatenate(ids), np.concatenate(labels)
    if lengths != list(map(len, labels)) or ((all_labels != all_ids) & (all_labels != IGNORE_INDEX)).any():
        raise RuntimeError("a label is neither -100 nor the id at its position; no run can be made of these rows")
    digests, ends = [xxh3_64_intdigest(row) for row in ids], np.cumsum([0, *lengths], dtype=np.int32)
    lists = [pa.ListArray.from_arrays(ends, values) for values in (all_ids, all_labels)]
    return [*lists, lengths, num_cut, supervised, numbers, digests]


def _tokenize_parts(source: Source, config: TokenizeConfig, max_rows: int | None, report: SourceReport) -> Iterator[Batches]:
    """The rows of a source that `report` has not counted yet, until it has counted `max_rows` that are kept. Between two parts it
    has counted neither more nor less than the rows that were yielded.
    """
    examples = read_examples(source, config.data, report)
    special = SpecialTokens(config.tokenizer, written=config.template.rendered)
    while (max_rows is None or report.rows_kept < max_rows) and (first := next(examples, None)) is not None:
        part = chain([first], islice(examples, PART_ROWS - 1))
        yield _tokenize_batches(part, config, special, max_rows, report)


def _tokenize_batches(
    examples: Examples, config: TokenizeConfig, special: SpecialTokens, max_rows: int | None, report: SourceReport
) -> Batches:
    """The rows of a part, until `report` has counted `max_rows` that are kept."""
    most, ahead = (float("inf"), 2 * THREADS) if max_rows is None else (max_rows, 0)
    pending: deque[tuple[int, Future[list[tuple[int, Ids, Ids]]]]] = deque()
    config.tokenizer.backend_tokenizer.no_padding()
    config.tokenizer.backend_tokenizer.no_truncation()
    # tokenizers releases Python's lock: meanwhile this thread reads, renders and writes.
    with ThreadPoolExecutor(THREADS) as pool, one_thread_a_batch() if ahead else nullcontext():
        while batch := list(islice(examples, int(min(BATCH_ROWS, most - report.rows_kept)))):
            rendered = _render_batch(batch, config, special, report)
            pending.append((report.rows_read, pool.submit(tokenize_rows, rendered, config.tokenizer, special)))
            if len(pending) > ahead:
                rows_read, tokenized = pending.popleft()
                yield rows_read, tokenized.result()
        for rows_read, tokenized in pending:
            yield rows_read, tokenized.result()


@contextmanager
def one_thread_a_batch() -> Iterator[None]:
    """Let tokenizers encode a batch in the thread that asks for it, not in threads of its own, whose memory another thread would
    free (measured in docs/log.md).
    """
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    gc.freeze()  # the libraries' objects, which Python's garbage collector would search again and again
    try:
        yield
    finally:
        gc.unfreeze()
        del os.environ[PARALLELISM]
        if before is not None:
            os.environ[PARALLELISM] = before


def _read_batches(rows: Any) -> Iterator[Iterable[tuple[int, Ids, Ids]]]:
    """The same of rows that are in the cache."""
    for table in rows.with_format("arrow").iter(batch_size=BATCH_ROWS):
        columns = []
        for name in ("input_ids", "labels"):
            part = table[name].combine_chunks()
            offsets = part.offsets.to_numpy()
            columns.append(np.split(part.flatten().to_numpy(), offsets[1:-1] - offsets[0]))
        yield zip(table["source_row"].to_pylist(), *columns, strict=True)


def read_examples(source: Source, data: Data, report: SourceReport) -> Examples:
    """Number and content of every row that can be read, after those that `report` has counted; the others are counted in it.
    DataError for unreadable content, an unknown role, or a row of another format than the first; it names several such rows.
    """
    ignored, faults, num_faults = frozenset(data.ignore_columns), list[DataError](), 0
    for number, row in islice(source.rows(), report.rows_read, None):
        where = f"{source.name}:{number}"
        report.rows_read += 1
        try:
            if isinstance(row, DataError | SkipRow):
                raise row
            if not isinstance(row, Mapping):
                raise SkipRow("the row is no object with columns")
            if data.fields:
                report.columns += [str(column) for column in row if column not in report.columns]
            if ignored:
                row = {key: _messages_without(key, value, ignored) for key, value in row.items() if key not in ignored}
            mapped = _map_columns(row, data.fields) if data.fields else row
            name = data.format if data.format != "auto" else detect_format(mapped)
            if name is None:
                check_unread(row, row, where)
                raise SkipRow(f"its columns ({', '.join(sorted(map(str, row)))[:100]}) fit no format")
            if report.format and name != report.format:
                message = f"{where} is of format {name!r}, while {report.first_row} is of format {report.format!r}."
                raise DataError(message, "Use one format in a file, or name the one to read in [data] format.")
            report.first_row, report.format = report.first_row or where, name
            example = read_row(mapped, name, where)
            if example.unread and name == "text" and data.format == "auto":
                check_document(example.unread, where)
            for name in example.unread:
                report.add(report.unread, name, number)
            if not num_faults:
                yield number, example
        except DataError as fault:
            num_faults += 1
            faults += [fault] if num_faults <= NAMED_FAULTS else []
        except SkipRow as reason:
            report.add(report.skipped, str(reason), number)
        except RecursionError:
            report.add(report.skipped, "its objects are nested too deep", number)
    if num_faults > 1:
        head = f"{num_faults:,} rows of {source.name} are faulty{', the first of them' if num_faults > NAMED_FAULTS else ''}:"
        raise DataError("\n".join([head, *(fault.message for fault in faults)]), faults[0].hint)
    if faults:
        raise faults[0]


def _messages_without(column: str, value: Any, names: frozenset[str]) -> Any:
    """A column without the keys of its messages, and of their parts, that [data] ignore_columns names."""
    if isinstance(value, str) and value.lstrip().startswith("[") and column not in (*SYNONYMS["tools"], "text", "output"):
        value = parse_json(value, value)
    if not isinstance(value, list) or column in SYNONYMS["tools"]:
        return value

    def strip(item: Any) -> Any:
        return {key: part for key, part in item.items() if key not in names} if isinstance(item, Mapping) else item

    messages = [strip(message) for message in value]
    for message in messages:
        for key in CONTENT_KEYS if isinstance(message, dict) else ():
            if isinstance(parts := message.get(key), list):
                message[key] = [strip(part) for part in parts]
    return messages


def _map_columns(row: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The row under the format's names. A column of the row that has one of them already is kept under another one, unread."""
    rest = {name: value for name, value in row.items() if name not in fields.values()}
    hidden = {f"{name} (hidden by fields)": rest.pop(name) for name in fields if name in rest}
    return {**rest, **hidden, **{ours: row.get(theirs) for ours, theirs in fields.items()}}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text."""

    number: int
    text: str
    spans: Sequence[Span] | None  #: The characters to supervise; None: every token.
    is_chat: bool
    is_broken: bool = False  #: Whether the special tokens in its words are broken (`SpecialTokens.break_in`).


def _render_batch(
    batch: Sequence[tuple[int, Chat | Document]], config: TokenizeConfig, special: SpecialTokens, report: SourceReport
) -> list[Rendered]:
    """Rows as text, with a note for each that is changed or remarkable."""
    rendered = []
    for number, example in batch:
        try:
            row, notes = _render_row(number, example, config, special)
        except SkipRow as reason:
            report.add(report.skipped, str(reason), number)
            continue
        rendered.append(row)
        if isinstance(example, Chat) and len(report.systems) < 2:
            system = example.turns[0].text if example.turns[0].role == "system" else ""
            report.systems += [] if system in report.systems else [system]
        for note in (*example.notes, *notes):
            report.add(report.notes, note, number)
    return rendered


def _render_row(
    number: int, example: Chat | Document, config: TokenizeConfig, special: SpecialTokens
) -> tuple[Rendered, list[str]]:
    """A row as text, and what is remarkable in it. Raises SkipRow where it cannot be rendered."""
    if isinstance(example, Document):
        words = [example.text]
    else:
        words = [example.tools, *(text for turn in example.turns for text in (turn.text, turn.thinking, turn.calls) if text)]
    notes, is_broken = [], False
    if any(special.pattern.search(text) for text in words):
        is_broken = not config.data.allow_special_tokens
        notes.append(READ_AS_TEXT if is_broken else READ_AS_TOKENS)
    if special.takes_space and isinstance(example, Chat) and any(map(LEADING_UNICODE_SPACE.match, words)):
        notes.append(UNICODE_SPACE)
    if any(map(UNFILLED.search, words)):
        notes.append(PLACEHOLDER)
    if isinstance(example, Document):
        text = special.break_in(example.text) if is_broken else example.text
        end = config.tokenizer.eos_token
        if READ_AS_TOKENS in notes and end and text.rstrip().endswith(end):
            text = text.rstrip()  # a rendered text that ends already
        if RENDERED_CHAT.search(text.replace(MARK, "")):
            notes.append(CHAT_IN_TEXT)
        return Rendered(number, text, None, False, is_broken), notes
    if READ_AS_TOKENS in notes and any(map(RENDERED_CHAT.search, words)):
        notes.append(CHAT_IN_TURN)
    chat = example
    if is_broken:
        turns = []
        for turn in chat.turns:
            text, thinking, calls = map(special.break_in, (turn.text, turn.thinking, turn.calls))
            turns.append(replace(turn, text=text, thinking=thinking, calls=calls))
        chat = replace(chat, turns=tuple(turns), tools=special.break_in(chat.tools))
    text, spans, more = render_chat(chat, config.template)
    if config.template.is_own and not config.data.allow_special_tokens:
        _check_special_tokens(example, text, config.template, special)
    if config.data.loss_on == "all" and example.switched_off:
        raise SkipRow('a turn is switched off, and [data] loss_on = "all" learns every token')
    return Rendered(number, text, spans if config.data.loss_on == "assistant" else None, True, is_broken), [*notes, *more]


def _check_special_tokens(chat: Chat, text: str, template: ChatTemplate, special: SpecialTokens) -> None:
    """Skip a row whose special tokens in the rendering are not those of the same turns with other words."""
    turns = (replace(turn, text=turn.text and "x", thinking="", calls=turn.calls and "x") for turn in chat.turns)
    plain, _, _ = render_chat(replace(chat, turns=tuple(turns), tools=chat.tools and "x"), template)
    unbroken, _, _ = render_chat(replace(chat, turns=tuple(replace(turn, thinking="") for turn in chat.turns)), template)
    has_thinking = any(turn.thinking for turn in chat.turns)
    changed = not has_thinking and unbroken != text.replace(MARK, "")
    if changed or special.whole_in(text) != special.whole_in(plain):
        raise SkipRow("the chat template makes or removes special tokens in the words of a turn")


def tokenize_rows(rendered: Sequence[Rendered], tokenizer: Any, special: SpecialTokens) -> list[tuple[int, Ids, Ids]]:
    """Number, ids and labels of rows, all of them conversations or none; ids and labels are int32 of shape (length,).

    The ids of a conversation are those of `apply_chat_template`. Raw text has the tokenizer's own start of a text, and ends with
    the end-of-text token, each once.
    """
    texts = [row.text for row in rendered if not row.is_broken]
    rows, encodings = [], iter(())
    if texts:
        encodings = iter(tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=not rendered[0].is_chat))
    for row in rendered:
        spans: Sequence[Span] = row.spans or ()
        if row.is_broken:
            encoding, spans = special.encode(row.text, spans)
            ids = special.ids_of(encoding, with_ends=not row.is_chat)
        else:
            encoding = next(encodings)
            ids = encoding.ids
        if not row.is_chat:
            ids = ids[1:] if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id else ids  # a rendered text
            ids = ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        tokens = np.asarray(ids, dtype=np.int32)
        labels = tokens.copy() if row.spans is None else np.full_like(tokens, IGNORE_INDEX)
        for span in spans:
            first, last = _find_tokens(encoding, span)
            labels[first:last] = tokens[first:last]
        labels[:1] = IGNORE_INDEX
        rows.append((row.number, tokens, labels))
    return rows


def _find_tokens(encoding: Any, span: Span) -> tuple[int, int]:
    """The tokens [first, last) that lie in a span of characters.

    A special token with `rstrip` covers the white space after it, so the token at the first character may be the header before
    the span: a token counts only when it starts inside. A character of several byte tokens belongs to all of them.
    """
    start, end = span
    inside = (encoding.char_to_token(position) for position in range(start, end))
    first = next((t for t in inside if t is not None and encoding.token_to_chars(t)[0] >= start), None)
    if first is None:
        return 0, 0
    backwards = (encoding.char_to_token(position) for position in range(end - 1, start - 1, -1))
    last = next(t for t in backwards if t is not None)
    while last + 1 < len(encoding) and (chars := encoding.token_to_chars(last + 1)) is not None and chars[0] < end:
        last += 1
    return first, last + 1


def _truncate_rows(
    rows: Iterable[tuple[int, Ids, Ids]], max_length: int, report: SourceReport
) -> Iterator[tuple[int, Ids, Ids, int, int]]:
    """Cut rows at `max_length` tokens: number, ids, labels, tokens cut, and labels that are supervised. Rows without any of these
    are counted and left out.
    """
    for number, ids, labels in rows:
        num_cut = max(0, len(ids) - max_length)
        kept = labels[:max_length]
        if supervised := int(np.count_nonzero(kept != IGNORE_INDEX)):
            report.truncated += num_cut > 0
            yield number, ids[:max_length], kept, num_cut, supervised
        elif num_cut:
            report.fully_truncated = report.fully_truncated.plus(1, [f"{report.name}:{number}"], named=NAMED)
        else:
            report.add(report.skipped, "the chat template marks nothing to learn", number)
