"""One row for each message of the program: what triggers it, its exit code, the value it names, and the hint it gives.

The rows are in `tests/messages/`, a file for each part of the package; `tests/test_messages.py` checks each of them once. Other
tests assert the class of an error and its exit code, and leave the wording to the row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from workshop import Workshop

from qlora_phi3.errors import UserError


@dataclass(frozen=True)
class Message:
    """A message of the program.

    Args:
        name: as the error index of the docs lists it; unique.
        trigger: called in a fresh `Workshop`, the current directory; raises `error`.
        error: the class of the error, exactly.
        exit_code: of the command line.
        says: parts of the message that carry the place and the offending value.
        hint: a part of the hint.
    """

    name: str
    trigger: Callable[[Workshop], object]
    error: type[UserError]
    exit_code: int
    says: tuple[str, ...]
    hint: str


def read_messages() -> list[Message]:
    """The rows of every file in `tests/messages/`, by file name."""
    names = sorted(path.stem for path in (Path(__file__).parent / "messages").glob("*.py") if path.stem != "__init__")
    return [message for name in names for message in import_module(f"messages.{name}").MESSAGES]
