"""A line on stderr that says what is being worked on, and goes away at the end."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class Watcher:
    """Opens its line when there is something to say: an answer that was kept needs none, nor rich's progress bars.

    Silent where stderr is no terminal.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._card = ""

    def say(self, what: str) -> None:
        """Name what is being done now."""
        self._update(description=f"{self._card}{what}")

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Say how far the data have been read."""
        self.say(f"{what}: {done:,}" + (f" of {total:,}" if total else ""))

    def card(self, name: str, done: int, total: int) -> None:
        """Say which card is looked at, of how many."""
        self._card = f"{name}: " if name else ""
        self._update(completed=done, total=total)

    def close(self) -> None:
        """Take the line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _update(self, **changes: object) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            self._bar = _open_bar()
        self._bar.update(self._bar.task_ids[0], **changes)  # type: ignore[arg-type]


def _open_bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("", total=None)
    bar.start()
    return bar
