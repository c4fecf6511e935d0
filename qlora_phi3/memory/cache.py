"""Answers that were worked out before, found again without torch: keyed on all that an answer depends on.

What the question says is in the key: the recipe's text, the options, the card as it is now, the margin, the versions of the
libraries and of our own code. What was read on the way, the model's files and the data, is watched: each file's size and
time lie beside the answer, and an answer whose files changed is none. A file of the cache that cannot be read is none either.
"""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlora_phi3.errors import RunError
from qlora_phi3.memory.folders import cache_folder
from qlora_phi3.runfolder import write_atomically

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
#: Answers that are kept; of more, the oldest go.
KEPT = 200
PACKAGE = Path(__file__).parents[1]


def read_versions() -> dict[str, str]:
    """The versions that an answer depends on, our own among them, read without importing anything."""
    found = {"qlora-phi3": _version("qlora-phi3")} | {name: _version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **found}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def question_key(parts: Mapping[str, Any]) -> str:
    """A name for a question; `parts` is all that it depends on, as JSON takes it."""
    whole = {
        **parts,
        "versions": read_versions(),
        "code": _own_code(),
        "system": [platform.system(), platform.release()],
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:40]


@lru_cache(maxsize=1)
def _own_code() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".json", ".jinja")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def watch(paths: Iterable[Path]) -> dict[str, list[int] | None]:
    """Size and time of each file or folder; None where there is none."""
    return {str(path): _state(path) for path in paths}


def _state(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def find_kept(key: str) -> Any:
    """What was kept under a key; None where nothing was, or what it was read from has changed."""
    try:
        kept = json.loads(_path(key).read_text(encoding="utf-8"))
        unchanged = all(_state(Path(path)) == state for path, state in kept["watched"].items())
        return kept["answer"] if unchanged else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def keep(key: str, answer: Any, watched: Mapping[str, Sequence[int] | None]) -> None:
    """Keep an answer; where the folder cannot be written, it is worked out again next time."""
    with suppress(OSError, RunError):
        folder = _path(key).parent
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(_path(key), json.dumps({"answer": answer, "watched": watched}))
        for old in sorted(folder.glob("*.json"), key=lambda path: -path.stat().st_mtime_ns)[KEPT:]:
            old.unlink(missing_ok=True)


def _path(key: str) -> Path:
    return cache_folder() / "vram-check" / f"{key}.json"
