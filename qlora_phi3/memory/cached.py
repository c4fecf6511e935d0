"""`vram-check` of a recipe, with results saved on disk, so that the same result is shown again without torch.

The key of a result is everything that it depends on: the recipe's text, the options, the GPU as it is now, the margin, the
versions of the libraries and of our code. It is valid while size and time of every file that was read are unchanged.
"""

import hashlib
import json
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qlora_phi3.errors import RunError
from qlora_phi3.files import file_state, read_json_object, save_for_later, user_cache_dir
from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.memory.allocator import uses_expandable_segments
from qlora_phi3.memory.margin import budget_of, read_margin
from qlora_phi3.memory.report import VramReport, as_json, from_json, read_versions
from qlora_phi3.memory.tables import MaxLengthRow, build_gpu_table, find_max_lengths
from qlora_phi3.memory.vram_check import VramChecker, files_of, read_recipe_context

if TYPE_CHECKING:
    from qlora_phi3.recipe.schema import Recipe

#: Results that are saved; of more, the oldest are removed.
MAX_RESULTS = 200
PACKAGE = Path(__file__).parents[1]

Result = TypeVar("Result")


class CheckProgress(Protocol):
    """Shows what is being done, how far the data have been read, and which GPU is computed, of how many."""

    def info(self, what: str) -> None: ...
    def progress(self, what: str, done: float, total: int | None) -> None: ...
    def card(self, name: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class CachedVramCheck:
    """A recipe file with what the command line changes in it.

    The methods raise UserError: see `read_recipe_context`, `budget_of` and `VramChecker.report`.
    """

    path: Path
    overrides: tuple[str, ...]
    #: Entered only where something must be computed.
    open_progress: Callable[[], AbstractContextManager[CheckProgress]]
    #: How many share a step, each with a GPU of its own.
    processes: int = 1

    @cached_property
    def recipe(self) -> "Recipe":
        """The recipe; RecipeError where it cannot be used."""
        from qlora_phi3.recipe.load import load_recipe

        return load_recipe(self.path, self.overrides)

    @property
    def wanted_gpu(self) -> str | int:
        """[memory] gpu; "auto" without loading the recipe where its text has no such word, as loading needs pydantic."""
        text = self._recipe_bytes().decode(errors="replace")
        return self.recipe.memory.gpu if re.search(r"\bgpu\b", " ".join((text, *self.overrides))) else "auto"

    def report(self, device: Gpu) -> VramReport:
        """Whether the recipe fits a GPU, or this computer's CPU."""

        def compute(progress: CheckProgress) -> list[VramReport]:
            budget_bytes = budget_of(self.recipe.memory, device, processes=self.processes)  # refused before torch is started
            return [self._checker(progress).report(device, budget_bytes)]

        (report,) = self._cached("report", [device], compute, as_json, from_json)
        return replace(report, device=device)  # the processes on it may have other sizes by now

    def gpu_table(self, devices: Sequence[Gpu]) -> list[VramReport]:
        """The plan on each GPU, or on those that it represents."""

        def compute(progress: CheckProgress) -> list[VramReport]:
            return build_gpu_table(self._checker(progress), devices, progress.card)

        return self._cached("gpu table", devices, compute, as_json, from_json)

    def max_lengths(self, devices: Sequence[Gpu]) -> list[MaxLengthRow]:
        """The longest row on each GPU."""

        def compute(progress: CheckProgress) -> list[MaxLengthRow]:
            return find_max_lengths(self._checker(progress), devices, progress.card)

        return self._cached("max lengths", devices, compute, asdict, lambda saved: MaxLengthRow(**saved))

    def _recipe_bytes(self) -> bytes:
        return self.path.read_bytes() if self.path.is_file() else b""  # loading it says why there is no recipe

    def _checker(self, progress: CheckProgress) -> VramChecker:
        recipe = self.recipe
        if "torch" not in sys.modules:
            progress.info("Starting torch, transformers and peft")
        context = read_recipe_context(recipe, self.path.parent, progress.progress, self.processes)
        return VramChecker(context, progress.info)

    def _cached(
        self,
        kind: str,
        devices: Sequence[Gpu],
        compute: Callable[[CheckProgress], list[Result]],
        encode: Callable[[Result], Any],
        decode: Callable[[Any], Result],
    ) -> list[Result]:
        """The saved results of the same question, else the computed ones, which are saved."""
        key = cache_key(
            {
                "kind": kind,
                "recipe": hashlib.sha256(self._recipe_bytes()).hexdigest(),
                "overrides": [*self.overrides, self.processes],
                "directories": [str(self.path.absolute().parent), str(Path.cwd())],
                "devices": [asdict(replace(device, processes=())) for device in devices],
                "margins": [read_margin(device.name).share for device in devices],
            }
        )
        path = user_cache_dir() / "vram-check" / f"{key}.json"
        if saved := find_cached(path):
            return list(map(decode, saved))
        with self.open_progress() as progress:
            results = compute(progress)
        save_cached(path, list(map(encode, results)), files_of(self.recipe, self.path.parent))
        return results


def cache_key(parts: Mapping[str, Any]) -> str:
    """The name of a result; it changes with `parts`, the system, the versions of the libraries, and our own code."""
    code = hashlib.sha256()
    for path in sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".json", ".jinja")):
        code.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    system = [platform.system(), platform.release(), uses_expandable_segments()]
    complete = {**parts, "versions": read_versions(), "code": code.hexdigest(), "system": system}
    return hashlib.sha256(json.dumps(complete, sort_keys=True).encode()).hexdigest()[:40]


def find_cached(path: Path) -> Any:
    """The result of `save_cached`; None where there is none, it is damaged, or a file that it was read from has changed."""
    try:
        saved = read_json_object(path, RunError, "")
        result, files = saved["result"], saved["files"]
        if saved["sha256"] != _digest(result, files):
            return None
        return result if all(file_state(file) == state for file, state in files.items()) else None
    except (RunError, KeyError, RecursionError):
        return None


def save_cached(path: Path, result: Any, files: Iterable[Path]) -> None:
    """Save a result with the state of `files`, which it was read from; a directory that cannot be written is ignored."""
    states = {str(file): file_state(file) for file in files}
    save_for_later(path, json.dumps({"result": result, "files": states, "sha256": _digest(result, states)}))
    with suppress(OSError):
        for old in sorted(path.parent.glob("*.json"), key=lambda path: -path.stat().st_mtime_ns)[MAX_RESULTS:]:
            old.unlink(missing_ok=True)


def _digest(result: Any, files: Any) -> str:
    return hashlib.sha256(json.dumps([result, files], sort_keys=True).encode()).hexdigest()
