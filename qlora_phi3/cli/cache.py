"""`qlora-phi3 cache`: what is kept on the disk to be faster the next time, and deleting it."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from qlora_phi3.cli.options import debug_option
from qlora_phi3.errors import RunError, UserError, printable

#: The kinds of what is kept, as a person names them.
KINDS = ("bases", "rows", "vram-check")


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """What is kept, and can be made again."""

    kind: str
    path: Path
    text: str  #: What it holds.
    size_bytes: int
    used: float  #: When it was last read or written, in seconds since 1970.


@click.group(invoke_without_command=True, short_help="List and delete what is kept to be faster the next time.")
@debug_option
@click.pass_context
def cache(ctx: click.Context) -> None:
    """List what is kept on the disk: 4-bit bases, tokenized rows, and answers of vram-check. All of it can be made again.

    \b
    Examples:
      qlora-phi3 cache
      qlora-phi3 cache clean
      qlora-phi3 cache clean bases --yes

    Bases and answers are below XDG_CACHE_HOME, rows below HF_DATASETS_CACHE.
    """
    if ctx.invoked_subcommand is None:
        show(list(list_entries()))


@cache.command()
@click.argument("kinds", metavar="[KIND]...", nargs=-1, type=click.Choice(KINDS))
@click.option("--yes", is_flag=True, help="Do not ask.")
@debug_option
def clean(kinds: tuple[str, ...], yes: bool) -> None:
    """Delete what is kept: everything, or each KIND: bases, rows, vram-check. A run that is reading it is not disturbed."""
    from filelock import FileLock, Timeout

    from qlora_phi3.files import remove

    entries = [entry for entry in list_entries() if entry.kind in (kinds or KINDS)]
    show(entries)
    if entries and not yes:
        click.confirm("Delete it?", abort=True)
    for entry in entries:
        try:
            with FileLock(entry.path.with_name(f"{entry.path.name.lstrip('.').partition('.')[0]}.lock"), timeout=0):
                remove(entry.path)
        except Timeout:
            raise UserError(f"{entry.path} is being written.", "Try again when that run has started its training.") from None
        if entry.path.exists():
            raise UserError(f"{entry.path} cannot be deleted completely.", "Check that you may write to it.")


def show(entries: list[CacheEntry]) -> None:
    """Print a line for each entry, and the sum."""
    from qlora_phi3.units import format_gib

    if not entries:
        click.echo("Nothing is kept.")
        return
    for entry in entries:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        click.echo(printable(f"{entry.kind:<10}  {format_gib(entry.size_bytes):>9}  last used {used}  {entry.text}"))
    click.echo(f"In all {format_gib(sum(entry.size_bytes for entry in entries))}.")


def list_entries() -> Iterator[CacheEntry]:
    """Everything that is kept, the last used first of each kind; the answers of vram-check as one."""
    from qlora_phi3.files import BASES_DIR, CACHE_ENTRY_NAME, row_cache_dir, user_cache_dir
    from qlora_phi3.units import format_count

    def describe_rows(report: dict[str, Any]) -> str:
        return f"{report['name']}, {format_count(report['rows_kept'], 'row')}"

    kept = user_cache_dir()
    yield from _directories("bases", kept / BASES_DIR, CACHE_ENTRY_NAME, lambda record: str(record["description"]))
    yield from _directories("rows", row_cache_dir(), "report.json", describe_rows)
    if answers := list((kept / "vram-check").glob("*.json")):
        size, used = sum(path.stat().st_size for path in answers), max(path.stat().st_mtime for path in answers)
        yield CacheEntry("vram-check", kept / "vram-check", format_count(len(answers), "answer"), size, used)


def _directories(kind: str, parent: Path, record: str, describe: Any) -> Iterator[CacheEntry]:
    """A directory for each entry, also of a damaged one and of what a killed process left."""
    from qlora_phi3.files import read_json_object

    entries = []
    for path in parent.iterdir() if parent.is_dir() else ():
        if path.is_dir():
            try:
                text = describe(read_json_object(path / record, RunError, ""))
            except (RunError, KeyError, TypeError, ValueError):
                text = "incomplete"
            used = (path / record if (path / record).is_file() else path).stat().st_mtime
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            entries.append(CacheEntry(kind, path, text, size, used))
    yield from sorted(entries, key=lambda entry: -entry.used)
