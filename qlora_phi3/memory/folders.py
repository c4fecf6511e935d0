"""Where this program keeps what it learns about a computer: state that matters, and a cache that may go at any time."""

import os
import sys
from pathlib import Path


def state_folder() -> Path:
    """For what runs measured: `~/.local/state/qlora-phi3` (XDG_STATE_HOME), on Windows `%LOCALAPPDATA%\\qlora-phi3\\state`."""
    return _folder("XDG_STATE_HOME", ".local/state", "state")


def cache_folder() -> Path:
    """For what can be computed again: `~/.cache/qlora-phi3` (XDG_CACHE_HOME), on Windows `%LOCALAPPDATA%\\qlora-phi3\\cache`."""
    return _folder("XDG_CACHE_HOME", ".cache", "cache")


def _folder(variable: str, usual: str, kind: str) -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        return Path(local) / "qlora-phi3" / kind
    wanted = os.environ.get(variable, "")
    # The XDG rule: a relative path is to be ignored.
    return (Path(wanted) if Path(wanted).is_absolute() else Path.home() / usual) / "qlora-phi3"
