"""Conversations into token ids and labels.

Supervised is what the model has to write itself: the assistant's words and its end token; neither the line break
after it nor the closing `<|endoftext|>`. Label -100 elsewhere, and always at position 0, which nothing predicts.
Labels are not shifted.

What a model's template has no turn for is never dropped; each case is noted, and counted in the report:
- a system turn, where there is none (Phi-3-medium, the first Phi-3-mini, Phi-4-reasoning), is put ahead of the next
  user turn's text with a blank line between; where no user turn follows at once, it becomes a user turn;
- a tool's result becomes a user turn (Phi-4-mini has a turn for it), a function call is the assistant's;
- tool definitions stand in the system turn: in Phi-4-mini's own place for them, else as text after a blank line.

One source as token ids and labels on disk, with a count of every row that was not used as it stands.

The rows lie in an Arrow file that is mapped into memory, in the cache folder of the datasets library. Its key is
everything it depends on: the source's content, the template, the tokenizer, the settings, and the code of this room.
The same data a second time is read from there.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qlora_phi3.data.formats import Chat, Document, SkipRow, Turn, detect_format, read_row, rename_columns
from qlora_phi3.data.sources import Source
from qlora_phi3.data.template import ChatTemplate, Message, render_template, template_variables
from qlora_phi3.errors import DataError
from qlora_phi3.units import format_count

IGNORE_INDEX = -100


SYSTEM_MOVED = "system turn put ahead of the user's words: the model's template has none"


TOOL_AS_USER = "tool turn rendered as a user turn: the model's template has none"


TOOLS_AS_TEXT = "tool definitions put into the system turn as text: the model's template has no place for them"


Ids = np.ndarray[tuple[int], np.dtype[np.int32]]


Span = tuple[int, int]


def fit_turns(chat: Chat, template: ChatTemplate) -> tuple[list[Message], list[str]]:
    """The messages that a template is rendered with, and a note for each thing it has no turn for."""
    notes: list[str] = []
    turns = list(chat.turns)
    tools = chat.tools if template.has_tools else ""
    if chat.tools:
        head = turns.pop(0).text if turns and turns[0].role == "system" else ""
        if not template.has_tools:
            head = _blank_line(head, chat.tools)
            notes.append(TOOLS_AS_TEXT)
        turns.insert(0, Turn("system", head))
    if any(turn.role == "tool" for turn in turns) and "tool" not in template.roles:
        turns = [Turn("user", turn.text) if turn.role == "tool" else turn for turn in turns]
        notes.append(TOOL_AS_USER)
    if any(turn.role == "system" for turn in turns) and "system" not in template.roles:
        turns = list(_move_system_turns(turns))
        notes.append(SYSTEM_MOVED)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    if tools:
        messages[0]["tools"] = tools
    return messages, notes


def render_chat(chat: Chat, template: ChatTemplate, tokenizer: Any) -> tuple[str, list[Span], list[str]]:
    """A conversation as text, the character spans [start, end) to learn, and the notes of `fit_turns`.

    Raises:
        UnusableRow: the template refuses the conversation.
        DataError: the template's marks do not tell the turns apart.
    """
    from jinja2 import TemplateError

    messages, notes = fit_turns(chat, template)
    variables = template_variables(tokenizer, template.bos_token, template.eos_token)
    try:
        text, spans = render_template(template.source, messages, variables)
    except TemplateError as error:
        raise SkipRow(f"the chat template refuses it: {error}") from error
    learned = [turn.supervised for turn in chat.turns if turn.role == "assistant"]
    if not all(learned) and len(spans) != len(learned):
        raise DataError(
            f"The chat template {template.name!r} marks {len(spans)} spans in a conversation of {len(learned)} "
            "assistant turns, so that the turns not to be learned cannot be told apart.",
            "Mark each assistant turn once in the template of [data] chat_template.",
        )
    return text, spans if all(learned) else [span for span, is_on in zip(spans, learned, strict=True) if is_on], notes


def tokenize_chats(
    texts: Sequence[str], spans: Sequence[Sequence[Span]] | None, tokenizer: Any
) -> list[tuple[Ids, Ids]]:
    """Ids and labels of rendered conversations: the ids are those of `apply_chat_template`.

    Args:
        texts: rendered conversations.
        spans: of each text, the character spans to learn; None: learn every token.
    """
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


def tokenize_documents(texts: Sequence[str], tokenizer: Any) -> list[tuple[Ids, Ids]]:
    """Ids and labels of raw text: as the tokenizer starts a text by itself, closed by the end-of-text token."""
    batch = tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False)
    rows = []
    for ids in batch["input_ids"]:
        closed = [] if ids and ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
        row = np.asarray([*ids, *closed], dtype=np.int32)
        labels = row.copy()
        labels[:1] = IGNORE_INDEX
        rows.append((row, labels))
    return rows


def special_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches a text that would be read as one of the tokenizer's special tokens, by accident or as an injection."""
    tokens = sorted({*tokenizer.all_special_tokens, *(t for t in tokenizer.get_added_vocab() if t.startswith("<|"))})
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _find_tokens(batch: Any, index: int, span: Span) -> tuple[int, int]:
    """The tokens [first, last) that lie in a span of characters.

    A special token with `rstrip` covers the white space after it, so the token at the first character may be the
    header before the span: a token counts only when it starts inside. A character of several byte tokens belongs to
    all of them.
    """
    start, end = span
    inside = (batch.char_to_token(index, spot) for spot in range(start, end))
    first = next((t for t in inside if t is not None and batch.token_to_chars(index, t).start >= start), None)
    if first is None:
        return 0, 0
    backwards = (batch.char_to_token(index, spot) for spot in range(end - 1, start - 1, -1))
    last = next(t for t in backwards if t is not None)
    size = len(batch["input_ids"][index])
    while last + 1 < size and (chars := batch.token_to_chars(index, last + 1)) is not None and chars.start < end:
        last += 1
    return first, last + 1


def _move_system_turns(turns: Sequence[Turn]) -> Iterable[Turn]:
    waiting = ""
    for turn in turns:
        if turn.role == "system":
            waiting = _blank_line(waiting, turn.text)
        elif turn.role == "user":
            yield Turn("user", _blank_line(waiting, turn.text))
            waiting = ""
        else:
            if waiting:
                yield Turn("user", waiting)
            yield turn
            waiting = ""
    if waiting:
        yield Turn("user", waiting)


def _blank_line(before: str, after: str) -> str:
    return f"{before}\n\n{after}" if before and after else before or after


#: Rows that are tokenised at once.
BATCH_ROWS = 256


#: Rows that a count names, and rows that are named when truncation left them nothing to learn.
EXAMPLES, NAMED = 3, 1000


INJECTION = "message that holds a special token of the model as text: read as that token"


#: Called with what is being done, how much is done, and of how much (None: not known).
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class RowCount:
    """How many rows something happened to, and the first of them as `file:line`."""

    reason: str
    rows: int
    where: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenizeConfig:
    """How rows are read and made into tokens; the same for all sources of a run.

    Args:
        tokenizer: a fast one of transformers.
        progress: told of the rows read so far.
    """

    format: str
    fields: Mapping[str, str]
    loss_on: Literal["assistant", "all"]
    max_length: int
    template: ChatTemplate
    tokenizer: Any
    cache_folder: Path
    progress: Progress | None


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What became of the rows of one source.

    Args:
        truncated: rows kept that were cut at `max_length`.
        cut_off: rows dropped because the cut took everything there was to learn.
    """

    name: str
    format: str
    rows_read: int
    rows_kept: int
    truncated: int
    fully_truncated: RowCount
    skipped: tuple[RowCount, ...]
    notes: tuple[RowCount, ...]


@dataclass(slots=True)
class _RowCounters:
    """The counts of a reading under way."""

    format: str = ""
    columns: set[str] = field(default_factory=set)
    read: int = 0
    kept: int = 0
    truncated: int = 0
    fully_truncated: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


def tokenize_source(source: Source, config: TokenizeConfig, max_rows: int | None) -> tuple[Any, SourceReport]:
    """The usable rows of a source as a `datasets.Dataset`, at most `max_rows` of them, and what became of the others.

    Its columns: `input_ids` and `labels` (int32 lists), `length` (tokens) and `supervised` (labels that are not -100),
    `source_row` (the number of the row in its source).

    Raises:
        DataError: a row of another format than the first, a role nobody knows, unreadable content, no room on the disk.
    """
    from datasets import Dataset

    folder = config.cache_folder / _key(source, config, max_rows)
    if not (folder / "report.json").is_file():
        try:
            _build(folder, source, config, max_rows)
        except OSError as error:
            raise DataError(
                f"The tokenised rows of {source.name} cannot be written to {folder.parent}: {error.strerror or error}.",
                "Make room there, or point HF_DATASETS_CACHE to another disk.",
            ) from error
    report = _read_report(folder / "report.json")
    return Dataset.from_file(str(folder / "rows.arrow")), report


def _build(folder: Path, source: Source, config: TokenizeConfig, max_rows: int | None) -> None:
    """Write into a folder beside, then rename: a cache that was cut short is never read."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        report = _sum_up(source, _write_rows(Path(scratch) / "rows.arrow", source, config, max_rows))
        (Path(scratch) / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")
        try:
            Path(scratch).rename(folder)
        except OSError:
            if not (folder / "report.json").is_file():  # another run was faster: its rows are the same
                raise


def read_to_first_usable(source: Source, format: str, fields: Mapping[str, str]) -> SourceReport:
    """Read a source up to the first row that is of a known shape; `rows_kept` is 0 where there is none.

    Raises:
        DataError: as `tokenize_source`, of the rows that were read.
    """
    tally = _RowCounters()
    tally.kept = sum(1 for _ in islice(_read_examples(source, format, fields, tally), 1))
    return _sum_up(source, tally)


def _sum_up(source: Source, tally: _RowCounters) -> SourceReport:
    return SourceReport(
        name=source.name,
        format=tally.format,
        rows_read=tally.read,
        rows_kept=tally.kept,
        truncated=tally.truncated,
        fully_truncated=RowCount(
            "nothing left to learn after truncation", len(tally.fully_truncated), tuple(tally.fully_truncated[:NAMED])
        ),
        skipped=_counts(tally.skipped),
        notes=_counts(tally.notes),
    )


def _write_rows(path: Path, source: Source, config: TokenizeConfig, max_rows: int | None) -> _RowCounters:
    import pyarrow as pa  # type: ignore[import-untyped]

    ids = pa.list_(pa.int32())
    schema = pa.schema(
        {"input_ids": ids, "labels": ids, "length": pa.int32(), "supervised": pa.int32(), "source_row": pa.int64()}
    )
    tally, what = _RowCounters(), f"Reading {Path(source.name).name}"
    examples = _read_examples(source, config.format, config.fields, tally)
    pattern = special_token_pattern(config.tokenizer)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        room = BATCH_ROWS if max_rows is None else min(BATCH_ROWS, max_rows)
        while batch := list(islice(examples, room)):
            rows = _tokenize_documents(batch, config) or _tokenize_chats(batch, source, config, pattern, tally)
            kept = list(_cut_rows(rows, source, config.max_length, tally))
            if kept:
                writer.write_batch(_to_arrow(kept, schema))
            tally.kept += len(kept)
            room = room if max_rows is None else min(BATCH_ROWS, max_rows - tally.kept)
            if config.progress is not None:
                config.progress(what, tally.read, None)
    if config.progress is not None and tally.read:
        config.progress(what, tally.read, tally.read)
    missing = sorted(theirs for theirs in config.fields.values() if theirs not in tally.columns)
    if missing and tally.columns:
        raise DataError(
            f"[data] fields names {', '.join(map(repr, missing))}, which is a column of none of the "
            f"{format_count(tally.read, 'row')} of {source.name}.",
            f"Its columns are: {', '.join(sorted(tally.columns))}.",
        )
    return tally


def _read_examples(
    source: Source, format: str, fields: Mapping[str, str], tally: _RowCounters
) -> Iterator[tuple[int, Chat | Document]]:
    first = ""
    for number, row in source.rows():
        where = f"{source.name}:{number}"
        tally.read += 1
        try:
            if not isinstance(row, Mapping):
                raise SkipRow("the row is no object with columns")
            tally.columns.update(row)
            row = rename_columns(row, fields)
            name = format if format != "auto" else detect_format(row)
            if name is None:
                raise SkipRow(f"its columns ({', '.join(sorted(map(str, row)))[:100]}) fit no format")
            if tally.format and name != tally.format:
                raise DataError(
                    f"{where} is of format {name!r}, while {first} is of format {tally.format!r}.",
                    "Keep one shape a file, or name the one to read in [data] format.",
                )
            first, tally.format = first or where, name
            yield number, read_row(row, name, where)
        except SkipRow as reason:
            tally.skipped.setdefault(str(reason), []).append(where)


def _tokenize_documents(
    batch: Sequence[tuple[int, Chat | Document]], config: TokenizeConfig
) -> list[tuple[int, Ids, Ids]]:
    """Number, ids and labels of the rows that are raw text."""
    documents = [(number, example.text) for number, example in batch if isinstance(example, Document)]
    tokens = tokenize_documents([text for _, text in documents], config.tokenizer) if documents else []
    return [(number, *row) for (number, _), row in zip(documents, tokens, strict=True)]


def _tokenize_chats(
    batch: Sequence[tuple[int, Chat | Document]],
    source: Source,
    config: TokenizeConfig,
    pattern: re.Pattern[str],
    tally: _RowCounters,
) -> list[tuple[int, Ids, Ids]]:
    """Number, ids and labels of the rows that are conversations, with a note for each that is not used as it stands."""
    rendered: list[tuple[int, str, list[Span]]] = []
    for number, chat in ((number, example) for number, example in batch if isinstance(example, Chat)):
        where = f"{source.name}:{number}"
        try:
            text, spans, notes = render_chat(chat, config.template, config.tokenizer)
        except SkipRow as reason:
            tally.skipped.setdefault(str(reason), []).append(where)
            continue
        if any(pattern.search(turn.text) for turn in chat.turns):
            notes.append(INJECTION)
        for note in notes:
            tally.notes.setdefault(note, []).append(where)
        rendered.append((number, text, spans))
    learned = [spans for _, _, spans in rendered] if config.loss_on == "assistant" else None
    tokens = tokenize_chats([text for _, text, _ in rendered], learned, config.tokenizer) if rendered else []
    return [(number, *row) for (number, _, _), row in zip(rendered, tokens, strict=True)]


def _cut_rows(
    rows: Sequence[tuple[int, Ids, Ids]], source: Source, max_length: int, tally: _RowCounters
) -> Iterator[tuple[int, Ids, Ids]]:
    """Rows of at most `max_length` tokens that have something to learn."""
    for number, ids, labels in rows:
        is_long = len(ids) > max_length
        kept = labels[:max_length]
        if (kept != IGNORE_INDEX).any():
            tally.truncated += is_long
            yield number, ids[:max_length], kept
        elif is_long:
            tally.fully_truncated.append(f"{source.name}:{number}")
        else:
            tally.skipped.setdefault("the chat template marks nothing to learn", []).append(f"{source.name}:{number}")


def _to_arrow(rows: Sequence[tuple[int, Ids, Ids]], schema: Any) -> Any:
    import pyarrow as pa

    lengths = np.array([len(ids) for _, ids, _ in rows], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    columns = [
        pa.ListArray.from_arrays(offsets, np.concatenate([ids for _, ids, _ in rows])),
        pa.ListArray.from_arrays(offsets, np.concatenate([labels for _, _, labels in rows])),
        pa.array(lengths),
        pa.array([int((labels != IGNORE_INDEX).sum()) for _, _, labels in rows], type=pa.int32()),
        pa.array([number for number, _, _ in rows], type=pa.int64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _counts(reasons: Mapping[str, Sequence[str]]) -> tuple[RowCount, ...]:
    """The most frequent first."""
    counts = [RowCount(reason, len(where), tuple(where[:EXAMPLES])) for reason, where in reasons.items()]
    return tuple(sorted(counts, key=lambda count: -count.rows))


def _read_report(path: Path) -> SourceReport:
    def count(saved: Mapping[str, Any]) -> RowCount:
        return RowCount(saved["reason"], saved["rows"], tuple(saved["where"]))

    saved = json.loads(path.read_text(encoding="utf-8"))
    lists = {name: tuple(map(count, saved.pop(name))) for name in ("skipped", "notes")}
    return SourceReport(**{**saved, **lists, "fully_truncated": count(saved["fully_truncated"])})


def _key(source: Source, config: TokenizeConfig, max_rows: int | None) -> str:
    import tokenizers
    import transformers

    # From "added_tokens" on the state is the vocabulary and its rules; before it stand the padding and the truncation
    # of the last call, which change nothing here and would make every run's key another.
    state = config.tokenizer.backend_tokenizer.to_str()
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    parts = [
        source.name,
        source.digest,
        [config.format, sorted(config.fields.items()), config.loss_on, config.max_length, max_rows],
        {**asdict(config.template), "roles": sorted(config.template.roles)},
        sha256(state[state.index('"added_tokens"') :].encode()).hexdigest(),
        config.tokenizer.special_tokens_map,
        sha256(code).hexdigest(),
        [tokenizers.__version__, transformers.__version__],
    ]
    return sha256(json.dumps(parts).encode()).hexdigest()[:32]
