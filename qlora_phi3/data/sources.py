"""Where rows come from: local .json, .jsonl, .csv and .parquet files, or a data set on the hub.

A `Source` knows its name, a digest of its content, and how to walk its rows, each with its number: the line in a text
file (1 is the first; of an object over several lines, the line it starts on), the row in a .parquet file or on the
hub. What the columns mean is left to `formats.py`.
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

RowIterator = Iterator[tuple[int, Any]]


#: Endings that say "a file" even where there is none, so that a typo is never looked up on the hub.
FILE_SUFFIXES = frozenset(
    [".json", ".jsonl", ".csv", ".parquet", ".txt", ".tsv", ".md", ".xml", ".arrow", ".xlsx", ".gz", ".zip", ".zst"]
)


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Source:
    """One origin of rows.

    Args:
        name: as the recipe writes it; rows are named `name:number`.
        digest: sha256 of the content, as hexadecimal digits.
        rows: a fresh walk over (number, row). Raises DataError where the content cannot be read.
    """

    name: str
    digest: str
    rows: Callable[[], RowIterator]


def is_local(name: str, base_folder: Path) -> bool:
    """Whether a name of the recipe means a file: it exists, or it looks like one."""
    looks_like_file = Path(name).suffix.lower() in FILE_SUFFIXES or not HUB_ID.fullmatch(name)
    return looks_like_file or any(place.exists() for place in _places(name, base_folder))


def open_file(name: str, base_folder: Path) -> Source:
    """A local file as a source. A relative path is looked for here first, then beside the recipe.

    Raises:
        DataError: missing, a folder, empty, unreadable, or of another kind.
    """
    path = next((place for place in _places(name, base_folder) if place.exists()), None)
    if path is None:
        looked = " or ".join(dict.fromkeys(str(place.parent) for place in _places(name, base_folder)))
        raise DataError(f"There is no data file {name!r} in {looked}.", "Check the path in [data].")
    if path.is_dir():
        raise DataError(f"{name} is a folder, not a data file.", "Name its files one by one: train = ['a.jsonl', …].")
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{name} ends in {suffix!r}, which is not read here.", f"Use one of {', '.join(READERS)}.")
    with _readable(name), path.open("rb") as file:
        if not file.read(4096).strip(b"\xef\xbb\xbf \t\r\n"):
            raise DataError(f"{name} is empty.", "Give it at least one row.")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(name, digest, lambda: READERS[suffix](name, path))


def open_hub(name: str, *, split: str, subset: str | None, revision: str | None) -> Source:
    """A data set of the hub as a source; it is downloaded once into the cache of the datasets library.

    Raises:
        DataError: no connection, no such data set, split, subset or revision, or no access to it.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with _quiet():
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
def _quiet() -> Iterator[None]:
    """No bars and no warnings of the datasets and hub libraries meanwhile: what matters arrives as one error."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    bars, level, hub_level = (
        not datasets.are_progress_bars_disabled(),
        datasets.logging.get_verbosity(),
        hub_logging.get_verbosity(),
    )
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
        datasets.logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)


def _places(name: str, base_folder: Path) -> tuple[Path, Path]:
    return Path(name).expanduser().absolute(), (base_folder / Path(name).expanduser()).absolute()


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what the file system says into a line for people."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}.", "Check the file.") from error


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason}).", "Save the file as UTF-8.") from error


def _read_json_file(name: str, path: Path) -> RowIterator:
    """One array of objects, or objects one after the other (JSON lines under that name, too)."""
    with _readable(name):
        raw = path.read_bytes()
    return _walk_json(name, _decode(raw, name))


def _read_jsonl_file(name: str, path: Path) -> RowIterator:
    """One object a line; blank lines are passed over. An array under that name is read as one."""
    with _readable(name), path.open("rb") as file:
        if file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from _read_json_file(name, path)
            return
        file.seek(0)
        for number, raw in enumerate(file, 1):
            line = _decode(raw, f"{name}:{number}")
            if line.strip():
                yield number, _parse_line(line, f"{name}:{number}")


def _parse_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from None


def _walk_json(name: str, text: str) -> RowIterator:
    """The values of a JSON text, one at a time, each with the line it starts on."""
    decoder, spot, line, counted = json.JSONDecoder(), _skip(text, 0), 1, 0
    in_array = text.startswith("[", spot)
    spot = _skip(text, spot + in_array)
    while spot < len(text) and not (in_array and text[spot] == "]"):
        line, counted = line + text.count("\n", counted, spot), spot
        try:
            value, spot = decoder.raw_decode(text, spot)
        except (ValueError, RecursionError) as error:
            raise _not_json(f"{name}:{getattr(error, 'lineno', line)}", error) from None
        yield line, value
        spot = _skip(text, spot)
        if in_array and text.startswith(",", spot):
            spot = _skip(text, spot + 1)
        elif in_array and spot < len(text) and text[spot] != "]":
            raise _bad_array(name, text, spot, "no ',' or ']' after an object")
    if in_array and spot == len(text):
        raise _bad_array(name, text, spot, "the array is cut short")
    if in_array and (after := _skip(text, spot + 1)) < len(text):
        raise _bad_array(name, text, after, "text after the array's end")


def _bad_array(name: str, text: str, spot: int, reason: str) -> DataError:
    line = text.count("\n", 0, spot) + 1
    return DataError(f"{name}:{line}: not valid JSON ({reason}).", "Mend the file, or copy it again.")


def _skip(text: str, spot: int) -> int:
    match = SPACE.match(text, spot)
    return match.end() if match else spot


def _not_json(where: str, error: Exception) -> DataError:
    reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"{where}: not valid JSON ({reason}).", "Mend that line, or delete it.")


def _read_csv_file(name: str, path: Path) -> RowIterator:
    """One row a record, the first record names the columns; an empty cell is an empty text.

    The separator is the comma; where the first line has none, the semicolon or the tab that spreadsheets write.
    """
    limit = csv.field_size_limit(
        min(sys.maxsize, 2**31 - 1)
    )  # the default of 128 KiB is shorter than some conversations
    try:
        with _readable(name), path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            separator = next((mark for mark in ",;\t" if mark in first), ",")
            file.seek(0)
            reader, start = csv.DictReader(file, strict=True, delimiter=separator), 1
            start = reader.line_num + 1 if reader.fieldnames else 1
            for row in reader:
                yield start, row if None not in row and None not in row.values() else None
                start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}:{start}: not valid CSV ({error}).", "Mend that record, or delete it.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text ({error.reason}).", "Save the file as UTF-8.") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet_file(name: str, path: Path) -> RowIterator:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    number = 0
    try:
        with _readable(name), parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{name} is not a readable .parquet file: {reason}.", "Copy the file again.") from error


READERS: dict[str, Callable[[str, Path], RowIterator]] = {
    ".json": _read_json_file,
    ".jsonl": _read_jsonl_file,
    ".csv": _read_csv_file,
    ".parquet": _read_parquet_file,
}


def open_sources(
    names: Sequence[str], *, base_folder: Path, split: str, subset: str | None, revision: str | None
) -> list[Source]:
    """Every name of a recipe's list as a source, in its order. Raises DataError for the first that cannot be opened."""
    return [
        open_file(name, base_folder)
        if is_local(name, base_folder)
        else open_hub(name, split=split, subset=subset, revision=revision)
        for name in names
    ]
