"""One export at a time writes into a place."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qlora_phi3.errors import ExportError
from qlora_phi3.export.writer import writing
from qlora_phi3.memory.folders import state_folder


@contextmanager
def locked(places: Iterable[Path]) -> Iterator[None]:
    """Hold places against other exports of this user; the system lets go of them when the process is killed.

    The locks lie elsewhere, since a place is renamed, and shipped.

    Raises:
        ExportError: another export holds one of them.
    """
    folder = _lock_folder()
    with ExitStack() as held:
        for place in places:
            name = hashlib.sha256(os.path.normcase(place).encode()).hexdigest()[:32]
            with writing(folder):
                try:
                    held.enter_context(FileLock(folder / f"{name}.lock", timeout=0))
                except Timeout as error:
                    cure = "Wait for it, or give --out another folder."
                    raise ExportError(f"Another export is writing {place}.", cure) from error
        yield


def _lock_folder() -> Path:
    """Of this user, or where nothing can be kept there the system's for what is temporary."""
    folder = state_folder() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir())
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
