"""`qlora-phi3 cache`: what is kept on the disk to be faster the next time, and deleting it."""

from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import click

from qlora_phi3.cli.options import debug_option
from qlora_phi3.cli.output import confirm
from qlora_phi3.errors import RunError, UserError, printable
from qlora_phi3.units import format_count, format_gib

#: The kinds of what is kept, as a person names them, and what there are several of.
KINDS = {"bases": "base", "rows": "tokenized file", "vram-check": "answer"}


class CacheEntry(NamedTuple):
    """A directory of what is kept, and can be made again."""

    kind: str
    path: Path
    text: str  #: What it holds; empty for answers, which have no names.
    number: int  #: 1, or the answers in it.
    size_bytes: int
    used: float  #: When it was last read or written, in seconds since 1970.


@click.group(invoke_without_command=True)
@click.option(
    "--all",
    "each",
    is_flag=True,
    help="A line for each base and each tokenized file (one for each max_length).",
)
@debug_option
@click.pass_context
def cache(ctx: click.Context, each: bool) -> None:
    """List what is kept on the disk: 4-bit bases, tokenized rows, and answers of vram-check. All of it can be made again.

    \b
    Examples:
      qlora-phi3 cache
      qlora-phi3 cache clean
      qlora-phi3 cache clean bases --yes

    Bases and answers are below XDG_CACHE_HOME, rows below HF_DATASETS_CACHE.
    """
    if ctx.invoked_subcommand is None:
        show(list_entries(), each=each)


@cache.command()
@click.argument("kinds", metavar="[KIND]...", nargs=-1, type=click.Choice(list(KINDS)))
@click.option("--yes", is_flag=True, help="Do not ask.")
@debug_option
def clean(kinds: tuple[str, ...], yes: bool) -> None:
    """Delete what is kept, or only each KIND.

    KIND is bases, rows or vram-check. A run that is reading it is not disturbed.
    """
    from filelock import FileLock, Timeout

    from qlora_phi3.files import remove

    entries = [entry for entry in list_entries() if entry.kind in (kinds or KINDS)]
    show(entries)
    if entries and not yes and not confirm("Delete it?"):
        return
    for entry in entries:
        try:
            with FileLock(entry.path.with_name(f"{entry.path.name.lstrip('.').partition('.')[0]}.lock"), timeout=0):
                remove(entry.path)
        except Timeout:
            raise UserError(f"{entry.path} is being written.", "Try again when that run has started its training.") from None
        if entry.path.exists():
            raise UserError(f"{entry.path} cannot be deleted completely.", "Check that you may write to it.")


def show(entries: list[CacheEntry], *, each: bool = False) -> None:
    """Print a line for each kind, or for `each` entry, and the sum."""
    from qlora_phi3.ui.page import show_size

    groups = [[entry] for entry in entries] if each else [[entry for entry in entries if entry.kind == kind] for kind in KINDS]
    for group in filter(None, groups):
        first, size = group[0], show_size(sum(entry.size_bytes for entry in group))  # the first is the last used
        used = datetime.fromtimestamp(first.used).strftime("%Y-%m-%d %H:%M")
        text = format_count(sum(entry.number for entry in group), KINDS[first.kind])
        name, text = (f"{first.path.name[:8]:<8}  {size:>9}", first.text) if each and first.text else (f"{size:>9}", text)
        click.echo(printable(f"{first.kind:<10}  {name}  last used {used}  {text}"))
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
                text = text and text.format(**read_json_object(path / record, RunError, ""))
            except (RunError, KeyError, TypeError, ValueError):
                text = "incomplete"
            times, count = [each.st_mtime for each in found[1:] or found], 1 if record else len(found) - 1
            entries.append(CacheEntry(kind, path, text, count, sum(each.st_size for each in found[1:]), max(times)))
    return sorted(entries, key=lambda entry: (list(KINDS).index(entry.kind), -entry.used))
