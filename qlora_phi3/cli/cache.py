"""`qlora-phi3 cache`: what is kept on the disk to be faster the next time, and deleting it."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import click

from qlora_phi3.cli.options import debug_option
from qlora_phi3.cli.output import confirm
from qlora_phi3.errors import RunError, UserError, printable

#: The kinds of what is kept, as a person names them.
KINDS = ("bases", "rows", "vram-check")


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A directory of what is kept, and can be made again."""

    kind: str
    path: Path
    text: str  #: What it holds.
    size_bytes: int
    used: float  #: When it was last read or written, in seconds since 1970.


@click.group(invoke_without_command=True)
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
        show(list_entries())


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
        confirm("Delete it?")
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

    for entry in entries:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        name, size = "" if entry.kind == KINDS[-1] else entry.path.name[:8], format_gib(entry.size_bytes)
        click.echo(printable(f"{entry.kind:<10}  {name:<8}  {size:>9}  last used {used}  {entry.text}"))
    click.echo(f"In all {format_gib(sum(entry.size_bytes for entry in entries))}." if entries else "Nothing is kept.")


def list_entries() -> list[CacheEntry]:
    """Everything that is kept, also what killed processes left; of each kind the last used first."""
    from qlora_phi3.files import BASES_DIR, CACHE_ENTRY_NAME, read_json_object, row_cache_dir, user_cache_dir

    kept, entries = user_cache_dir(), []
    places = [("bases", path, CACHE_ENTRY_NAME, "{description}") for path in (kept / BASES_DIR).glob("*")]
    places += [("rows", path, "report.json", "{name}, rows: {rows_kept:,}") for path in row_cache_dir().glob("*")]
    places += [("vram-check", path, "", "") for path in kept.glob("vram-check")]
    for kind, path, record, text in places:
        if found := [file.stat() for file in (path, *path.rglob("*")) if path.is_dir()]:
            try:
                text = text.format(**read_json_object(path / record, RunError, "")) if text else f"answers: {len(found) - 1:,}"
            except (RunError, KeyError, TypeError, ValueError):
                text = "incomplete"
            times = [each.st_mtime for each in found[1:] or found]
            entries.append(CacheEntry(kind, path, text, sum(each.st_size for each in found[1:]), max(times)))
    return sorted(entries, key=lambda entry: (KINDS.index(entry.kind), -entry.used))
