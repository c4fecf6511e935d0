"""The directory of a run: its paths, metrics.jsonl and report.json."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_phi3.errors import RunError
from qlora_phi3.files import atomic_write, disk_errors, read_json_object


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`runs/<recipe>/<time>/` and the paths in it."""

    path: Path
    recipe: Path = field(init=False)  #: The recipe with all its defaults; `qlora-phi3 run` on it repeats the run.
    metrics: Path = field(init=False)  #: One JSON object a line: a step, an evaluation, or an out-of-memory error.
    report: Path = field(init=False)  #: Status, versions, hashes and results.
    adapter: Path = field(init=False)  #: The trained adapter, as `PeftModel.from_pretrained` loads it.
    base: Path = field(init=False)  #: The base: name, commit, and a checksum of every tensor as it was loaded.
    quantized_base: Path = field(init=False)  #: The 4-bit base itself, where the recipe says save_quantized.
    held_out: Path = field(init=False)  #: Tokenized rows on which an export is compared with what was trained.
    chat_template: Path = field(init=False)  #: The chat template, where the recipe names a file.
    checkpoints: Path = field(init=False)  #: Checkpoints that `--resume` continues from.

    def __post_init__(self) -> None:
        files = ("recipe.toml", "metrics.jsonl", "report.json", "base.json", "held_out.jsonl", "chat_template.jinja")
        for name in (*files, "adapter", "quantized_base", "checkpoints"):
            object.__setattr__(self, name.partition(".")[0], self.path / name)

    def read_report(self) -> dict[str, Any]:
        """The content of report.json; RunError where there is none, or it holds no JSON object."""
        if self.recipe.is_file() and not self.report.exists():
            hint = f"Put it back, or train again: qlora-phi3 run {self.recipe}"
            raise RunError(f"{self.path} is a run without its report.json.", hint)
        return read_json_object(self.report, RunError, "Give the directory of a run: runs/<recipe>/<time>.")


def create_run_folder(root: Path, recipe_name: str) -> RunFolder:
    """Create `root/recipe_name/<time>`, never one that exists; RunError where that is impossible."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 100):
        path = root / recipe_name / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            path.mkdir(parents=True)
            (path / "checkpoints").mkdir()
        except FileExistsError:
            if not path.is_dir():
                raise RunError(f"{path.parent} is not a directory.", "Choose another [training] output_dir.") from None
            continue
        except OSError as error:
            hint = "Choose another [training] output_dir, or free the disk."
            raise RunError(f"The run directory {path} cannot be created: {error.strerror}.", hint) from error
        return RunFolder(path)
    raise RunError(f"{root / recipe_name} has 99 runs of this second.", "Try again.")


@contextmanager
def removed_on_failure(folder: RunFolder) -> Iterator[None]:
    """Remove a new, still empty run directory if what is done inside fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the recipe's directory may hold other runs
            for path in (folder.checkpoints, folder.path, folder.path.parent):
                path.rmdir()
        raise


def find_run(root: Path, recipe_name: str, wanted: str | None) -> RunFolder:
    """The run to resume: the directory `wanted`, or the newest run of the recipe with a report; RunError where there is none."""
    runs = sorted(report.parent for report in (root / recipe_name).glob("*/report.json"))
    if wanted is None and not runs:
        raise RunError(f"There is no run of {recipe_name} under {root} to resume.", "Leave --resume out to start one.")
    if wanted is not None and not Path(wanted).is_dir():
        newest = f"The newest of {recipe_name} is {runs[-1]}." if runs else "Leave --resume out to start one."
        raise RunError(f"There is no run directory {wanted}.", newest)
    folder = RunFolder(runs[-1] if wanted is None else Path(wanted))
    folder.read_report()
    return folder


def run_group_name(recipe: Path) -> str:
    """Name of the directory for the runs of a recipe file. The runs of a run's own recipe.toml are next to that run.

    Never a name that means another directory (a recipe `...toml` has the stem `..`), a hidden one, or none.
    """
    if recipe.name == "recipe.toml" and (recipe.parent / "report.json").is_file():
        return recipe.resolve().parent.parent.name or "recipe"
    return recipe.name.removesuffix(".toml").strip(". ") or "recipe"


def write_report(folder: RunFolder, report: Mapping[str, Any]) -> None:
    """Replace report.json."""
    atomic_write(folder.report, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def append_metrics(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """Add one line to metrics.jsonl; RunError where the disk is full or refuses."""
    hint = "{cause}, then go on with --resume."
    with disk_errors(folder.metrics, hint=hint), folder.metrics.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that a kill cut short is left out."""
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
    """Remove the records after a step, which a resumed run measures again.

    Records of out-of-memory errors stay: the resumed run starts with the execution plan that they led to.
    """
    records = [record for record in read_metrics(folder) if record["step"] <= step or record["kind"] == "oom"]
    atomic_write(folder.metrics, "".join(json.dumps(record) + "\n" for record in records))
