"""Errors that the user can fix: a message, a hint and an exit code. The command line prints them without a traceback.

Any other exception is a defect of this program and keeps its traceback.
"""

import errno
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import TextWrapper

#: The text of a RuntimeError that means out of memory: libraries below torch, and torch's own CPU allocator, raise no other
#: class. cuBLAS reports either of its two status codes if it finds no memory for its handle.
OUT_OF_MEMORY = re.compile(
    r"out of memory|_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|(can't|cannot) allocate memory|not enough memory"
    r"|bad[_ ]alloc",
    re.IGNORECASE,
)
#: A command in a line: up to the end of its sentence or of the line.
COMMAND = re.compile(r"\b(?:qlora-phi3|ollama|llama-cli|pip|hf) (?:'[^']*'|\"[^\"]*\"|.)+?(?=[.,;:)]+ |[.;)]*$)", re.MULTILINE)
#: Characters of a line of a message.
LONGEST_LINE = 2000


def printable(text: str, *, longest_line: int = LONGEST_LINE) -> str:
    """Text in which no character can control a terminal, in lines of at most `longest_line` characters.

    Names and values in files of other people may hold ANSI escapes, and may be as long as the file.
    """
    if not text.isprintable():
        text = "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
    if len(text) <= longest_line:
        return text
    half = longest_line // 2
    lines = text.split("\n")
    return "\n".join(line if len(line) <= longest_line else f"{line[:half]} ... {line[-half:]}" for line in lines)


def wrap_words(text: str, columns: int) -> str:
    """A text whose lines end between words. A command stays on one line, also a longer one: it is to be copied."""
    wrapper = TextWrapper(columns, break_long_words=False, break_on_hyphens=False)
    lines = COMMAND.sub(lambda command: command[0].replace(" ", "\0"), text).split("\n")
    return "\n".join(wrapper.fill(line) if len(line) > columns else line for line in lines).replace("\0", " ")


def quoted(path: object) -> str:
    """A path as one word of a command that people copy into a shell."""
    text = str(path)
    return shlex.quote(text) if os.name != "nt" else f'"{text}"' if " " in text else text


class UserError(Exception):
    """A problem that the user can fix.

    Args:
        message: what is wrong and where, with the offending value.
        hint: what to do or to type next; one sentence.
    """

    exit_code = 2
    #: In a run with several processes: all of them raise it; and this process shows it, although it is not process 0.
    is_shared = is_shown = False

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = printable(message), printable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class RecipeError(UserError):
    """The recipe file cannot be used; the message lists every problem, one a line."""


class DataError(UserError):
    """The training or evaluation data cannot be used."""


class ModelError(UserError):
    """The base model cannot be used."""


class DeviceError(UserError):
    """The GPU cannot be read or used, or no known GPU has that name or size."""


class CannotTellError(UserError):
    """There is too little information to decide whether a recipe fits a GPU."""

    exit_code = 4


class NoDeviceError(DeviceError, CannotTellError):
    """This computer has no GPU that can be read; the input is correct."""


class NoDriverError(NoDeviceError):
    """This computer has no NVIDIA driver: a run uses the CPU."""


class RunError(UserError):
    """The run folder cannot be written, read, or resumed."""


class ExportError(UserError):
    """A run or an adapter cannot be exported or converted."""


class ProofError(UserError):
    """An exported model does not behave as the trained one; its files stay under a name that says so."""

    exit_code = 5


class Interrupted(UserError):  # noqa: N818 - no error: the user requested it
    """Ctrl-C: the work so far is saved, and the message says how to continue."""

    exit_code = 130


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which end also what goes on after a Ctrl-C."""


def disk_error_hint(error: BaseException) -> str:
    """What to do about a path that cannot be written, without a full stop: the beginning of a sentence. `error` is an OSError or
    has one as its cause; anything else counts as a full disk.
    """
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError) or cause.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return "Free disk space"
    if cause.errno == errno.EFBIG:
        return "Raise the limit on a file's size (ulimit -f)"
    return "Check that the directory exists and that you may write to it"


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its full stop; the name of its class where it has no text. A KeyError's is a key.

    torch's text on memory that ran out ends with what is free, and not with its account of who holds what.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ("it has no " * isinstance(error, KeyError)) + line.partition(" Including non-PyTorch memory")[0].rstrip(" :.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error means that memory ran out. torch's own class is known by its name, as this file imports no torch."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def memory_errors(kind: type[UserError], message: str, hint: str) -> Iterator[None]:
    """Raise `kind` where memory runs out in the block; "{reason}" in its message becomes the first line of that error."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise kind(message.replace("{reason}", first_line(error)), hint) from error
