"""Answers that were worked out before, found again without torch: keyed on all that an answer depends on.

What the question says is in the key: the recipe's text, the options, the card as it is now, the margin, the versions of the
libraries and of our own code. What was read on the way, the model's files and the data, is watched: each file's size and
time lie beside the answer, and an answer whose files changed is none. A file of the cache that cannot be read is none either.

A question about a recipe, and its answer: the one that was kept, or one worked out now and kept.
"""

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qlora_phi3.errors import RunError
from qlora_phi3.files import atomic_write, user_cache_dir
from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.memory.margin import budget_of, read_margin
from qlora_phi3.memory.report import VramReport, as_json, from_json, read_versions
from qlora_phi3.memory.tables import (
    GpuGroup,
    GpuTableRow,
    MaxLengthRow,
    build_gpu_table,
    find_max_lengths,
    gpu_table_as_json,
    gpu_table_from_json,
    max_lengths_from_json,
)
from qlora_phi3.memory.vram_check import VramChecker, read_recipe_context

if TYPE_CHECKING:
    from qlora_phi3.recipe.schema import Recipe


#: Answers that are kept; of more, the oldest go.
KEPT = 200


PACKAGE = Path(__file__).parents[1]


def cache_key(parts: Mapping[str, Any]) -> str:
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
    return {str(path): _file_state(path) for path in paths}


def _file_state(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def find_cached(key: str) -> Any:
    """What was kept under a key; None where nothing was, or what it was read from has changed."""
    try:
        kept = json.loads(_cache_path(key).read_text(encoding="utf-8"))
        unchanged = all(_file_state(Path(path)) == state for path, state in kept["watched"].items())
        return kept["answer"] if unchanged else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def store(key: str, report: Any, watched: Mapping[str, Sequence[int] | None]) -> None:
    """Keep an answer; where the folder cannot be written, it is worked out again next time."""
    with suppress(OSError, RunError):
        folder = _cache_path(key).parent
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(_cache_path(key), json.dumps({"answer": report, "watched": watched}))
        for old in sorted(folder.glob("*.json"), key=lambda path: -path.stat().st_mtime_ns)[KEPT:]:
            old.unlink(missing_ok=True)


def _cache_path(key: str) -> Path:
    return user_cache_dir() / "vram-check" / f"{key}.json"


Result = TypeVar("Result")


class Teller(Protocol):
    """Whom to tell how far the work is."""

    def info(self, what: str) -> None:
        """Name what is being done now."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Say how far the data have been read."""

    def card(self, name: str, done: int, total: int) -> None:
        """Say which card is looked at, of how many."""

    def close(self) -> None:
        """The work is done."""


@dataclass(frozen=True)
class CachedVramCheck:
    """A recipe file with what the command line changes in it."""

    path: Path
    overrides: tuple[str, ...]
    teller: Teller

    @cached_property
    def recipe(self) -> "Recipe":
        """The recipe; RecipeError where it cannot be used."""
        from qlora_phi3.recipe.load import load_recipe

        return load_recipe(self.path, self.overrides)

    @property
    def text(self) -> str:
        """The file's."""
        return self.path.read_text(encoding="utf-8-sig")

    def about_card(self, device: Gpu) -> VramReport:
        """Whether the recipe fits a card.

        Raises:
            UserError: see `read_recipe_context`, `budget_of` and `Bench.report`.
        """

        def compute() -> VramReport:
            budget_bytes = budget_of(self.recipe, device)
            return self._checker().report(device, budget_bytes)

        report = self._cached("card", [device], compute, as_json, from_json)
        return replace(report, device=device)  # who else is on it may have other numbers by now

    def about_every_card(self, groups: Sequence[GpuGroup]) -> list[GpuTableRow]:
        """The plan on each group of cards."""
        devices = [group.device for group in groups]
        return self._cached(
            "every card",
            devices,
            lambda: build_gpu_table(self._checker(), groups, self.teller.card),
            gpu_table_as_json,
            gpu_table_from_json,
        )

    def about_length(self, devices: Sequence[Gpu]) -> list[MaxLengthRow]:
        """The longest row on each card."""
        return self._cached(
            "length",
            devices,
            lambda: find_max_lengths(self._checker(), devices, self.teller.card),
            lambda rows: [asdict(row) for row in rows],
            max_lengths_from_json,
        )

    def _checker(self) -> VramChecker:
        """Ready to work answers out."""
        recipe = self.recipe
        if "torch" not in sys.modules:
            self.teller.info("Starting torch, transformers and peft")
        return VramChecker(read_recipe_context(recipe, self.path.parent, self.teller.progress), self.teller.info)

    def _cached(
        self,
        kind: str,
        devices: Sequence[Gpu],
        compute: Callable[[], Result],
        encode: Callable[[Result], Any],
        decode: Callable[[Any], Result],
    ) -> Result:
        key = self._key(kind, devices)
        kept = find_cached(key) if key else None
        if kept is not None:
            try:
                return decode(kept)
            except ValueError:
                pass  # somebody edited the cache
        result = compute()
        if key:
            from qlora_phi3.memory.vram_check import files_of

            store(key, encode(result), watch(files_of(self.recipe, self.path.parent)))
        return result

    def _key(self, kind: str, devices: Sequence[Gpu]) -> str | None:
        """None for a recipe that cannot be read: loading it will say why."""
        try:
            text = self.path.read_bytes()
        except OSError:
            return None
        return cache_key(
            {
                "kind": kind,
                "recipe": hashlib.sha256(text).hexdigest(),
                "overrides": self.overrides,
                "folders": [str(self.path.absolute().parent), str(Path.cwd())],
                "devices": [asdict(replace(device, processes=())) for device in devices],
                "margins": [read_margin(device.name).share for device in devices],
            }
        )
