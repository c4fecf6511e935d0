"""A run's folder on disk: where things lie, and how they are written so that a kill leaves nothing half."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_phi3.errors import RunError, disk_error_hint
from qlora_phi3.files import atomic_write


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`runs/<recipe>/<time>/` and the names in it."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe as resolved; `qlora-phi3 run` on it repeats the run."""
        return self.path / "recipe.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: an optimizer step or an evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """Status, versions, hashes, result."""
        return self.path / "report.json"

    @property
    def adapter(self) -> Path:
        """The trained adapter, as `PeftModel.from_pretrained` loads it."""
        return self.path / "adapter"

    @property
    def base(self) -> Path:
        """What the run was trained on: name, commit, and a checksum of every tensor of the base as it was loaded."""
        return self.path / "base.json"

    @property
    def quantized_base(self) -> Path:
        """The 4-bit base itself, where the recipe asked to keep it."""
        return self.path / "quantized_base"

    @property
    def held_out(self) -> Path:
        """Rows on which an export is held against what was trained, tokenized."""
        return self.path / "held_out.jsonl"

    @property
    def chat_template(self) -> Path:
        """The chat template that was trained with, marks and all, where the recipe named a file."""
        return self.path / "chat_template.jinja"

    @property
    def checkpoints(self) -> Path:
        """Where `--resume` goes on from."""
        return self.path / "checkpoints"

    def read_report(self) -> dict[str, Any]:
        """The report of a run; RunError where there is none."""
        if self.recipe.is_file() and not self.report.exists():
            hint = f"Put it back, or train again: qlora-phi3 run {self.recipe}"
            raise RunError(f"{self.path} is a run without its report.json.", hint)
        try:
            report: dict[str, Any] = json.loads(self.report.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.report} cannot be read: {error}.", "Give the folder of a run: runs/<recipe>/<time>."
            ) from error
        if not isinstance(report, dict):
            raise RunError(f"{self.report} is no report.", "Give the folder of a run: runs/<recipe>/<time>.")
        return report


def create_run_folder(root: Path, recipe_name: str) -> RunFolder:
    """Make `root/recipe_name/<time>`, never one that exists.

    Raises:
        RunError: the folder cannot be made or written.
    """
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 100):
        path = root / recipe_name / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            path.mkdir(parents=True)
            (path / "checkpoints").mkdir()
        except FileExistsError:
            if not path.is_dir():
                raise RunError(f"{path.parent} is not a folder.", "Choose another [training] output_dir.") from None
            continue
        except OSError as error:
            raise RunError(
                f"The run folder {path} cannot be made: {error.strerror}.",
                "Choose another [training] output_dir, or free the disk.",
            ) from error
        return RunFolder(path)
    raise RunError(f"{root / recipe_name} has 99 runs of this very second.", "Try again.")


@contextmanager
def kept_if_loaded(folder: RunFolder, *, is_new: bool) -> Iterator[None]:
    """Take a new folder away again when the model for it cannot be loaded."""
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # the recipe's folder may hold other runs
                for path in (folder.checkpoints, folder.path, folder.path.parent):
                    path.rmdir()
        raise


def find_run(root: Path, recipe_name: str, wanted: str | None) -> RunFolder:
    """The run of that folder, or where none is wanted by name the latest run of a recipe that has a report.

    Raises:
        RunError: there is none, or its report cannot be read.
    """
    runs = sorted(report.parent for report in (root / recipe_name).glob("*/report.json"))
    if wanted is None and not runs:
        raise RunError(f"There is no run of {recipe_name} under {root} to resume.", "Leave --resume out to start one.")
    if wanted is not None and not Path(wanted).is_dir():
        newest = f"The newest of {recipe_name} is {runs[-1]}." if runs else "Leave --resume out to start one."
        raise RunError(f"There is no run folder {wanted}.", newest)
    folder = RunFolder(runs[-1] if wanted is None else Path(wanted))
    folder.read_report()
    return folder


def run_group_name(recipe: Path) -> str:
    """What the runs of a recipe file are filed under: its name, or where it is a run's own copy, the name of that run's."""
    if recipe.name == "recipe.toml" and (recipe.parent / "report.json").is_file():
        return recipe.resolve().parent.parent.name
    return recipe.stem


def write_report(folder: RunFolder, report: Mapping[str, Any]) -> None:
    """Replace report.json."""
    atomic_write(folder.report, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def append_metrics(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """Add one line to metrics.jsonl."""
    try:
        with folder.metrics.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise RunError(
            f"{folder.metrics} cannot be written: {error.strerror}.",
            f"{disk_error_hint(error)}, then go on with --resume.",
        ) from error


def read_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """Every whole line of metrics.jsonl; a last line cut short by a kill is left out."""
    if not folder.metrics.is_file():
        return []
    records = []
    for line in folder.metrics.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def cut_metrics(folder: RunFolder, step: int) -> None:
    """Forget what was measured after a step: a resumed run measures it again.

    Where memory ran out stays: the resumed run begins with the plan it had come to.
    """
    kept = [record for record in read_metrics(folder) if record["step"] <= step or record["kind"] == "oom"]
    atomic_write(folder.metrics, "".join(json.dumps(record) + "\n" for record in kept))
