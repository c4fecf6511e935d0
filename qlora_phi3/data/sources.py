"""Rows from local .json, .jsonl, .csv and .parquet files, from folders of them, and from data sets on the hub or on the disk.

A `Source` numbers its rows from 1: by the line in a text file (an object over several lines has the line it starts on), by the
position in a .parquet file or a data set. In place of a row that cannot be read there is a SkipRow, in place of a line that is
not JSON its DataError.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import logging
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, dropwhile
from pathlib import Path
from typing import IO, Any, cast

from qlora_phi3.data.messages import DECODER, SkipRow
from qlora_phi3.errors import DataError, first_line
from qlora_phi3.recipe.load import GLOB, candidate_paths, find_path, is_local_data, local_files, missing_data
from qlora_phi3.recipe.schema import Data

RowIterator = Iterator[tuple[int, Any]]
#: Files of a folder that are no data: hidden ones, documentation, programs, and what describes the others.
NO_DATA = re.compile(r"\..*|.*\.(md|rst|py|ipynb|lock|yaml|yml)|LICEN[CS]E.*|README.*|dataset_infos?\.json", re.IGNORECASE)
#: What an empty file may hold, with the marks of UTF-8 and UTF-16.
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
BLANK = b"\xef\xbb\xbf\xff\xfe\x00 \t\r\n"
WHITESPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Source:
    """One origin of rows."""

    name: str  #: As the recipe writes it; a row is named `name:number` in messages.
    digest: str  #: SHA-256 of the content, in hex.
    #: Starts a new iteration over (number, row). It raises DataError where the content cannot be read.
    rows: Callable[[], RowIterator]


def open_sources(names: Sequence[str], data: Data, split: str, base_dir: Path) -> list[Source]:
    """Open files, and data sets of the hub with the subset and the revision of the recipe's [data], in the order of `names`.
    DataError for the first that cannot be opened.
    """
    sources: list[Source] = []
    for name in names:
        if is_local_data(name, base_dir):
            sources += open_local(name, base_dir, split)
        else:
            sources.append(open_hub(name, split=split, subset=data.subset, revision=data.revision))
    return sources


def open_local(name: str, base_dir: Path, split: str = "train") -> list[Source]:
    """Open a file; each file of a folder or of a pattern such as `chats/*.jsonl`, by name; or the `split` of a saved data set.
    DataError where nothing of this name is there, or a file is unreadable or of an unsupported type.
    """
    path = find_path(name, base_dir)
    if path is not None and any((path / saved).is_file() for saved in ("state.json", "dataset_dict.json")):
        return [_open_saved(name, path, split)]
    patterns = candidate_paths(name, base_dir) if GLOB.search(name) else []
    if path is not None:
        patterns = [path] if path.is_dir() else []
    if not patterns:
        return [open_file(name, base_dir)]  # it says where a missing file was looked for
    for pattern in patterns:
        files = [file for file in local_files(pattern) if file.is_file() and not NO_DATA.fullmatch(file.name)]
        if other := [file.name for file in files if _suffix(str(file)) not in READERS]:
            raise DataError(
                f"{name} has {', '.join(other[:3])}{', …' if len(other) > 3 else ''} of a type that is not supported.",
                f"Take them out, convert them to one of {', '.join(READERS)}, or give a pattern such as 'chats/*.jsonl'.",
            )
        if files:
            return [open_file(str(file), base_dir) for file in files]
    raise DataError(f"{name} has no data file.", f"Supported are {', '.join(READERS)}, each also with .gz at its end.")


def _suffix(name: str) -> str:
    """What says how a file is read: `.jsonl` of `a.JSONL.gz`."""
    return Path(name.lower().removesuffix(".gz")).suffix


def open_file(name: str, base_dir: Path) -> Source:
    """Open a local file, looked for as in `candidate_paths`; DataError where it is missing, unreadable, empty or unsupported."""
    path = find_path(name, base_dir)
    if path is None:
        raise missing_data(name, base_dir)
    suffix = _suffix(name)
    if suffix not in READERS:
        raise DataError(f"{name} ends in {suffix!r}, which is not supported.", f"Use one of {', '.join(READERS)}, or .gz of one.")
    if not path.is_file():
        raise DataError(f"{name} is not a file.", "Name a file, a folder of files, or a pattern such as 'chats/*.jsonl'.")
    with _read_errors(name), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with _read_errors(name), _open_bytes(path) as file:
        head = file.read(4096)
    if not head.strip(BLANK):
        raise DataError(f"{name} is empty.", "Give it at least one row.")
    if b"\x00" in head and suffix != ".parquet" and head[:2] not in UTF16_MARKS:
        raise DataError(f"{name} is no text in UTF-8: it holds zero bytes.", "Save the file as UTF-8.")
    return Source(name, digest, lambda: READERS[suffix](name, path))


def _open_bytes(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _open_text(path: Path) -> io.TextIOWrapper:
    """A file as text: UTF-16 where it begins with that mark, as PowerShell and Excel write it, else UTF-8. Line ends stay."""
    with _open_bytes(path) as file:
        mark = file.read(2)
    encoding = "utf-16" if mark in UTF16_MARKS else "utf-8-sig"
    return io.TextIOWrapper(_open_bytes(path), encoding=encoding, newline="")


def _open_saved(name: str, path: Path, split: str) -> Source:
    """A folder that `Dataset.save_to_disk` wrote."""
    from datasets import Dataset, load_from_disk

    try:
        with _silent_downloads():
            dataset = load_from_disk(str(path))
            chosen = dataset if isinstance(dataset, Dataset) else dataset[split]
    except Exception as error:
        message = f"The saved data set {name} (split {split!r}) cannot be loaded: {first_line(error)}."
        raise DataError(message, "Check [data] split, or save it again.") from error
    return _from_dataset(name, chosen)


def open_hub(name: str, *, split: str, subset: str | None, revision: str | None) -> Source:
    """Open a data set of the hub, which the datasets library downloads once into its cache. DataError where there is no
    connection, no access, or no such data set, split, subset or revision.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with _silent_downloads():
            dataset = load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"The hub's data set {name!r} (split {split!r}) cannot be loaded: {first_line(error)}.",
            "Check the id, [data] split, subset and revision, the connection, and `hf auth login` for a gated set; "
            "or download it and name its files.",
        ) from error
    return _from_dataset(f"{name}[{split}]", dataset)


def _from_dataset(name: str, dataset: Any) -> Source:
    for column, feature in dataset.features.items():
        if getattr(feature, "decode", False):  # pictures and sound: they are not read, and decoding needs more libraries
            dataset = dataset.cast_column(column, type(feature)(decode=False))
    digest = hashlib.sha256(f"{dataset.num_rows} {dataset.column_names}".encode())
    for cached in dataset.cache_files:
        with Path(cached["filename"]).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Source(name, digest.hexdigest(), lambda: enumerate(map(_without_nulls, dataset), 1))


def _without_nulls(value: Any) -> Any:
    """A row without the nulls that Arrow puts into objects that lack a key of others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


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
    except UnicodeError as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{name} is not UTF-8 text ({reason}).", "Save the file as UTF-8.") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{name} is not a whole .gz file: {first_line(error)}.", "Copy the file again.") from error


def _read_json_file(name: str, path: Path) -> RowIterator:
    """One array of objects, or objects one after the other (JSON lines, too)."""
    with _read_errors(name), _open_text(path) as file:
        text = file.read()
    return _parse_json(name, text)


def _read_jsonl_file(name: str, path: Path) -> RowIterator:
    """One object a line; blank lines are skipped. A file that starts with an array, or is UTF-16, is read as a .json file."""
    with _read_errors(name), _open_bytes(path) as file:
        head = file.read(4096)
        if head[:2] in UTF16_MARKS or head.decode("utf-8-sig", errors="replace").lstrip().startswith("["):
            yield from _read_json_file(name, path)
            return
        file.seek(0)
        # Decoded line by line, so that a wrong byte has a line; no other character than a line feed ends a line.
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig").strip()
                if not line:
                    continue
                row = DECODER.decode(line)
            except UnicodeDecodeError as error:
                row = DataError(f"{name}:{number} is not UTF-8 text ({error.reason}).", "Save the file as UTF-8.")
            except (ValueError, RecursionError) as error:
                row = _invalid_json(name, number, error, is_line=True)
            yield number, row


def _parse_json(name: str, text: str) -> RowIterator:
    """The values of a JSON text, one at a time, each with the line it starts on; of an array in one line with its place in it."""

    def skip(position: int) -> int:
        found = WHITESPACE.match(text, position)
        return found.end() if found else position

    def invalid(position: int, reason: str) -> DataError:
        number = text.count("\n", 0, position) + 1
        return DataError(f"{name}:{number}: not valid JSON ({reason}).", "Correct the file, or copy it again.")

    position, line, counted, place = skip(0), 1, 0, 0
    in_array = text.startswith("[", position)
    is_one_line = in_array and "\n" not in text.strip()
    position = skip(position + in_array)
    while position < len(text) and not (in_array and text[position] == "]"):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _invalid_json(name, line, error) from None
        place += 1
        yield place if is_one_line else line, value
        end, position = position, skip(position)
        if in_array and text.startswith(",", position):
            position = skip(position + 1)
        elif in_array and position < len(text) and text[position] != "]":
            raise invalid(end, "no ',' or ']' after an object")
    if in_array and position == len(text):
        raise invalid(position, "the array is cut short")
    if in_array and (after := skip(position + 1)) < len(text):
        raise invalid(after, "text after the array's end")


def _invalid_json(name: str, line: int, error: Exception, *, is_line: bool = False) -> DataError:
    """The error for text that starts in `line`, of which it is all where `is_line`."""
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        if error.msg.startswith("Expecting ','"):  # Python names the place after it, maybe lines below
            error = json.JSONDecodeError(error.msg, error.doc, len(error.doc[: error.pos].rstrip()))
        line, reason = line if is_line else error.lineno, f"{error.msg} at column {error.colno}"
    return DataError(f"{name}:{line}: not valid JSON ({reason}).", "Correct that line, or delete it.")


def _read_csv_file(name: str, path: Path) -> RowIterator:
    """One row a record. The first record names the columns; an empty cell is an empty text.

    The separator is the one of `,;\\t|` that the first line has most often outside quotes.
    """
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # some conversations exceed the default of 128 KiB
    start = 1
    try:
        with _read_errors(name), _open_text(path) as file:
            lines: Iterator[str] = dropwhile(lambda line: not line.strip(), file)
            head, second = next(lines, ""), next(lines, "")
            bare = re.sub(r'"[^"]*"?', "", head)
            is_tab = _suffix(name) == ".tsv" and ("\t" in bare or not re.search("[,;|]", bare))
            separator = "\t" if is_tab else max(",;\t|", key=bare.count)
            # A space between separator and quote would make the quotes part of the text.
            spaced = re.search(f'{re.escape(separator)} +"', re.sub(r'"[^"]*"', '""', f"{head}{second}")) is not None
            lines = chain([line for line in (head, second) if line], lines)
            reader = csv.reader(lines, strict=True, delimiter=separator, skipinitialspace=spaced)
            header = [cell.strip() for cell in next(reader, [])]
            if twice := sorted({column for column in header if column and header.count(column) > 1}):
                columns = ", ".join(map(repr, twice))
                raise DataError(f"{name} has the column {columns} more than once.", "Rename one of them, or delete it.")
            start = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    yield start, SkipRow("the record has more or fewer cells than the first line has columns")
                elif cells:
                    pairs = zip(header, cells, strict=True)
                    yield start, {column or "(no name)": cell for column, cell in pairs if column or cell}
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
            yield from enumerate((_without_nulls(row) for batch in batches for row in batch.to_pylist()), 1)
    except (pyarrow.ArrowException, OverflowError, ValueError) as error:
        raise DataError(f"{name} is not a readable .parquet file: {first_line(error)}.", "Copy the file again.") from error


READERS: dict[str, Callable[[str, Path], RowIterator]] = {
    ".json": _read_json_file,
    ".jsonl": _read_jsonl_file,
    ".ndjson": _read_jsonl_file,
    ".csv": _read_csv_file,
    ".tsv": _read_csv_file,
    ".parquet": _read_parquet_file,
}
