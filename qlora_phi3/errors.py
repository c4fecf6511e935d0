"""What a person can cause: one line that says what is wrong, where, and what to do, with its exit code.

Everything the command line reports without a traceback is a `UserError`; anything else is a fault of ours and keeps
its traceback.
"""

import errno


class UserError(Exception):
    """A problem the person at the keyboard can mend.

    Args:
        message: what is wrong and where, with the offending value.
        cure: what to do or type next; one sentence.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class RecipeError(UserError):
    """The recipe file cannot be used; its message lists every problem found, one a line."""


class DataError(UserError):
    """The training or evaluation data cannot be used."""


class ModelError(UserError):
    """The base model cannot be used."""


class DeviceError(UserError):
    """The graphics card cannot be read, or nobody knows one of that name or size."""


class CannotTellError(UserError):
    """There is too little to go by: whether a recipe fits cannot be said."""

    exit_code = 4


class NoDeviceError(DeviceError, CannotTellError):
    """There is no graphics card here that can be read; nothing is wrong with what was typed."""


class RunError(UserError):
    """The run folder cannot be written, read, or resumed."""


class ExportError(UserError):
    """A run or an adapter cannot be exported or converted."""


class ProofError(UserError):
    """What was written is not what was trained; it is kept under a name that says so."""

    exit_code = 5


class Interrupted(UserError):  # noqa: N818 - no error: the person asked for it
    """Ctrl-C; what was done is saved and the message says how to go on."""

    exit_code = 130


#: What a disk says that is full, or a person's share of it.
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


def disk_error_hint(error: BaseException) -> str:
    """What to do about a place that cannot be written, as the beginning of a sentence."""
    told = error if isinstance(error, OSError) else error.__cause__
    if isinstance(told, OSError) and told.errno == errno.EFBIG:
        return "Raise the limit on a file's size (ulimit -f)"
    refused = isinstance(told, OSError) and told.errno not in FULL
    return "See that it is there and may be written" if refused else "Free the disk"


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its full stop; the name of its class where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
