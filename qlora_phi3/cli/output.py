"""stdout and stderr of every command: any encoding can take our text, and a reader that is gone ends no command."""

import codecs
import errno
import io
import os
import select
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

import click

from qlora_phi3.errors import UserError, wrap_words

if TYPE_CHECKING:
    from rich.console import Console

#: Characters of our output that ASCII, cp1252 or cp437 lack, with an ASCII character of the same width: the loss curve, the bars
#: of vram-check, rich's spinner and ellipsis.
ASCII_SYMBOLS = dict(zip("▁▂▃▄▅▆▇█▓▒░─▲…°⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "_.,-=+*##%.-^. |/-\\|/-\\|/", strict=True))
#: Columns where stdout is no terminal, unless the variable COLUMNS says otherwise.
PIPED_WIDTH = 100
#: Errors of a file that can take no more: the disk, or the user's share of it, is full.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def replace_symbols(error: UnicodeError) -> tuple[str, int]:
    """A codec error handler: symbols in ASCII, any other character as `\\uXXXX`, which TOML and JSON read."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    codes = ((letter, ord(letter)) for letter in error.object[error.start : error.end])
    shown = (ASCII_SYMBOLS.get(letter) or (f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}") for letter, code in codes)
    return "".join(shown), error.end


class _Output(io.FileIO):
    """A file descriptor that drops what nobody can read any more: a pipe without a reader, or a terminal that was closed.

    A file that cannot be written is an error (`recipe schema > FILE`), but for commands that `keep_running_without_output`.
    """

    file_errors_count = True

    def write(self, data: Any, /) -> int:
        """Write, or drop, all of `data`; wait where the descriptor is non-blocking and its reader is slow."""
        try:
            while (written := super().write(data)) is None:
                select.select([], [self.fileno()], [])
        except OSError as error:
            is_file = error.errno in FULL_DISK or stat.S_ISREG(os.fstat(self.fileno()).st_mode)
            if is_file and self.file_errors_count:
                raise
            return memoryview(data).nbytes
        return written


@contextmanager
def safe_output() -> Iterator[None]:
    """Replace stdout and stderr by streams that take any character and whose reader may go away."""
    codecs.register_error("qlora_phi3_symbols", replace_symbols)
    before, _Output.file_errors_count = (sys.stdout, sys.stderr), True
    sys.stdout, sys.stderr = (_rebuilt(stream, number) for number, stream in enumerate(before, start=1))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a full disk; a stream that the caller has closed
                stream.flush()
        sys.stdout, sys.stderr = before


def print_rich(show: "Callable[[Console], None]") -> None:
    """Print what `show` prints on a console; where stdout is no terminal, without colours and blanks at the ends of lines."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        show(console)
        return
    with console.capture() as captured:
        console.width = shutil.get_terminal_size((PIPED_WIDTH, 0)).columns
        show(console)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def echo(text: str, *, err: bool = False, **style: Any) -> None:
    """Print a text in a style of click's, on a terminal in lines that end between words."""
    text = wrap_words(text, shutil.get_terminal_size().columns) if (sys.stderr if err else sys.stdout).isatty() else text
    click.echo(click.style(text, **style) if style else text, err=err)


def echo_json(value: Any) -> None:
    """Print a value as JSON, for programs."""
    import json

    click.echo(json.dumps(value, indent=2))


def ask(question: str, default: str | None = None, **options: Any) -> Any:
    """What a person answers, as click.prompt returns it; keys that were typed before the question was shown do not count."""
    with suppress(ImportError, OSError, ValueError):  # no terminal, as in a pipe; Windows has no termios
        import termios

        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
    return click.prompt(question, default=default, **options)


def ask_number(question: str, default: int, most: int) -> int:
    """A whole number from 1 to `most` that a person types; asked again where it is none."""
    while not (text := str(ask(question, str(default)))).isdecimal() or not 1 <= int(text) <= most:
        click.echo(f"Error: {text} is not a whole number from 1 to {most}.")
    return int(text)


def confirm(question: str) -> bool:
    """Ask before something is deleted, and say so where the answer is no; UserError where nobody can answer."""
    try:
        agreed = click.confirm(question)
    except click.Abort:
        if sys.stdin.isatty():  # Ctrl-C
            raise
        click.echo()
        raise UserError("There is no answer, so nothing is deleted.", "Add --yes to delete without a question.") from None
    if not agreed:
        click.echo("Nothing was deleted.")
    return agreed


def keep_running_without_output() -> None:
    """Drop output that a full disk does not take, too: for commands whose result is in other files, after hours of work."""
    _Output.file_errors_count = False


def _rebuilt(stream: TextIO | None, number: int) -> TextIO:
    """The stream on a descriptor that drops; a stream that is closed (`>&-`) becomes one to nowhere.

    The descriptor of a closed stream must not stay free, or the next file that is opened receives what libraries print.
    """
    if stream is None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
        return open(number, "w", encoding="utf-8", closefd=False)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="qlora_phi3_symbols")
    if type(getattr(stream.buffer, "raw", stream.buffer)) is not io.FileIO:  # a Windows console, or a test's stream
        return stream
    stream.flush()
    raw = _Output(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="qlora_phi3_symbols",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
