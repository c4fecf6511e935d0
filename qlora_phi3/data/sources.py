"""Rows from local .json, .jsonl, .csv and .parquet files and from data sets on the hub.

A `Source` numbers its rows from 1: by the line in a text file (an object over several lines has the line it starts on), by the
position in a .parquet file or a data set of the hub.
"""

import csv
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_phi3.errors import DataError
from qlora_phi3.recipe.load import candidate_paths, is_local_data
from qlora_phi3.recipe.schema import Data

RowIterator = Iterator[tuple[int, Any]]

WHITESPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Source:
    """One origin of rows.

    Args:
        name: as the recipe writes it; a row is named `name:number` in messages.
        digest: SHA-256 of the content, in hex.
        rows: starts a new iteration over (number, row). It raises DataError where the content cannot be read.
    """

    name: str
    digest: str
    rows: Callable[[], RowIterator]


def open_sources(names: Sequence[str], data: Data, split: str, base_dir: Path) -> list[Source]:
    """Open files, and data sets of the hub with the subset and the revision of the recipe's [data], in the order of `names`.

    Raises:
        DataError: for the first that cannot be opened.
    """
    return [
        open_file(name, base_dir)
        if is_local_data(name, base_dir)
        else open_hub(name, split=split, subset=data.subset, revision=data.revision)
        for name in names
    ]


def open_file(name: str, base_dir: Path) -> Source:
    """Open a local file; `candidate_paths` gives the order in which a relative path is looked for.

    Raises:
        DataError: the file is missing, a directory, empty, unreadable, or of an unsupported type.
    """
    candidates = candidate_paths(name, base_dir)
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        looked = " or ".join(dict.fromkeys(str(candidate.absolute().parent) for candidate in candidates))
        raise DataError(f"There is no data file {name!r} in {looked}.", "Check the path in [data].")
    if path.is_dir():
        raise DataError(
            f"{name} is a directory, not a data file.", "Name its files one by one: train = ['a.jsonl', …]."
        )
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{name} ends in {suffix!r}, which is not supported.", f"Use one of {', '.join(READERS)}.")
    with _read_errors(name), path.open("rb") as file:
        if not file.read(4096).strip(b"\xef\xbb\xbf \t\r\n"):
            raise DataError(f"{name} is empty.", "Give it at least one row.")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(name, digest, lambda: READERS[suffix](name, path))


def open_hub(name: str, *, split: str, subset: str | None, revision: str | None) -> Source:
    """Open a data set of the hub; the datasets library downloads it once into its cache.

    Raises:
        DataError: no connection, no access, or no such data set, split, subset or revision.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with _silent_downloads():
            dataset = load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"The hub's data set {name!r} (split {split!r}) cannot be loaded: {reason}.",
            "Check the id, [data] split, subset and revision, the connection, and `hf auth login` for a gated set; "
            "or download it and name its files.",
        ) from error
    digest = hashlib.sha256(f"{dataset.num_rows} {dataset.column_names}".encode())
    for cached in dataset.cache_files:
        with Path(cached["filename"]).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Source(f"{name}[{split}]", digest.hexdigest(), lambda: enumerate(dataset, 1))


@contextmanager
def _silent_downloads() -> Iterator[None]:
    """Hide the datasets library's progress bars, and every warning: what matters is reported as one error."""
    import datasets

    had_bars, disabled_level = not datasets.are_progress_bars_disabled(), logging.root.manager.disable
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled_level)
        if had_bars:
            datasets.enable_progress_bars()


@contextmanager
def _read_errors(name: str) -> Iterator[None]:
    """Report an error of the file system, or text that is not UTF-8, as one line."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}.", "Check the file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text ({error.reason}).", "Save the file as UTF-8.") from error


def _read_json_file(name: str, path: Path) -> RowIterator:
    """One array of objects, or objects one after the other (JSON lines, too)."""
    with _read_errors(name):
        text = path.read_text(encoding="utf-8-sig")
    return _parse_json(name, text)


def _read_jsonl_file(name: str, path: Path) -> RowIterator:
    """One object a line; blank lines are skipped. A file that starts with an array is read as a .json file."""
    with _read_errors(name), path.open("rb") as file:
        if file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from _read_json_file(name, path)
            return
        file.seek(0)
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig")
                if not line.strip():
                    continue
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}:{number} is not UTF-8 text ({error.reason}).", "Save the file as UTF-8."
                ) from error
            except (ValueError, RecursionError) as error:
                raise _invalid_json(f"{name}:{number}", error) from None
            yield number, row


def _parse_json(name: str, text: str) -> RowIterator:
    """The values of a JSON text, one at a time, each with the line it starts on."""

    def skip(position: int) -> int:
        found = WHITESPACE.match(text, position)
        return found.end() if found else position

    def invalid(position: int, reason: str) -> DataError:
        number = text.count("\n", 0, position) + 1
        return DataError(f"{name}:{number}: not valid JSON ({reason}).", "Correct the file, or copy it again.")

    decoder, position, line, counted = json.JSONDecoder(), skip(0), 1, 0
    in_array = text.startswith("[", position)
    position = skip(position + in_array)
    while position < len(text) and not (in_array and text[position] == "]"):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _invalid_json(f"{name}:{getattr(error, 'lineno', line)}", error) from None
        yield line, value
        position = skip(position)
        if in_array and text.startswith(",", position):
            position = skip(position + 1)
        elif in_array and position < len(text) and text[position] != "]":
            raise invalid(position, "no ',' or ']' after an object")
    if in_array and position == len(text):
        raise invalid(position, "the array is cut short")
    if in_array and (after := skip(position + 1)) < len(text):
        raise invalid(after, "text after the array's end")


def _invalid_json(where: str, error: Exception) -> DataError:
    reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"{where}: not valid JSON ({reason}).", "Correct that line, or delete it.")


def _read_csv_file(name: str, path: Path) -> RowIterator:
    """One row a record. The first record names the columns; an empty cell is an empty text.

    The separator is the comma. Where the first line has none, it is the semicolon or the tab that spreadsheets write.
    A record with too few or too many cells gives None.
    """
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # some conversations exceed the default of 128 KiB
    start = 1
    try:
        with _read_errors(name), path.open(encoding="utf-8-sig", newline="") as file:
            first_line = file.readline()
            separator = next((mark for mark in ",;\t" if mark in first_line), ",")
            file.seek(0)
            reader = csv.DictReader(file, strict=True, delimiter=separator)
            start = reader.line_num + 1 if reader.fieldnames else 1
            for row in reader:
                yield start, row if None not in row and None not in row.values() else None
                start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}:{start}: not valid CSV ({error}).", "Correct that record, or delete it.") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet_file(name: str, path: Path) -> RowIterator:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with _read_errors(name), parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1000)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{name} is not a readable .parquet file: {reason}.", "Copy the file again.") from error


READERS: dict[str, Callable[[str, Path], RowIterator]] = {
    ".json": _read_json_file,
    ".jsonl": _read_jsonl_file,
    ".csv": _read_csv_file,
    ".parquet": _read_parquet_file,
}
