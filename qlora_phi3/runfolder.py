"""The directory of a run: its paths, metrics.jsonl and report.json."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any

from qlora_phi3.errors import ModelError, RunError, disk_error_hint, quoted
from qlora_phi3.files import atomic_write, disk_errors, is_dir, make_directory, read_json_object, remove

#: Held by the process that writes a run directory, and the file with its process id.
LOCK, LOCK_PID = "checkpoints/.lock", "checkpoints/.lock.pid"
#: Last part of a path that means the newest run of a directory. It is no link, which Windows would not allow everyone to make.
LATEST = "latest"
NO_RUNS = "Runs are below the directory in which they were trained: go there, or train one: qlora-phi3 run RECIPE.toml"
#: Types of the values of report.json that are read again.
REPORT_TYPES: dict[str, type | tuple[type, ...]] = {
    "status": str, "name": str, "started": str, "training_began": str, "seconds": (int, float), "recipe": dict, "data": dict,
    "versions": dict, "device": str, "compute_dtype": str, "adapter": dict, "files": dict, "steps": int, "memory": dict,
    "eval_loss_before": (int, float, NoneType), "eval_loss_after": (int, float, NoneType),
}  # fmt: skip


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
    samples: Path = field(init=False)  #: Held-out prompts with the answers of the base and of the tuned model.
    checkpoints: Path = field(init=False)  #: Checkpoints that `--resume` continues from.

    def __post_init__(self) -> None:
        files = ("recipe.toml", "metrics.jsonl", "report.json", "base.json", "held_out.jsonl", "chat_template.jinja")
        for name in (*files, "samples.json", "adapter", "quantized_base", "checkpoints"):
            object.__setattr__(self, name.partition(".")[0], self.path / name)

    @property
    def resume_command(self) -> str:
        """The command that continues this run."""
        return f"qlora-phi3 run --resume {quoted(self.path)}"

    def check_trained(self) -> None:
        """Raise ModelError where the run has no adapter yet."""
        if not (self.adapter / "adapter_config.json").is_file():
            raise ModelError(f"The run {self.path} has no adapter.", f"Finish its training first: {self.resume_command}")

    def read_report(self) -> dict[str, Any]:
        """The content of report.json; RunError where there is none, or it holds no JSON object."""
        if self.recipe.is_file() and not self.report.exists():
            hint = f"Put it back, or train again: qlora-phi3 run {quoted(self.recipe)}"
            raise RunError(f"{self.path} is a run without its report.json.", hint)
        hint = "Give the directory of a run: runs/<recipe>/<time>."
        report = read_json_object(self.report, RunError, hint)
        for key, kind in REPORT_TYPES.items():
            if key in report and not isinstance(report[key], kind):
                raise RunError(f"{self.report} is damaged: {key} cannot be {report[key]!r}.", "Start a new run.")
        if report.pop("sha256", None) not in (None, _report_sha256(report)):  # before 0.3 there was none
            raise RunError(f"{self.report} is damaged: it is not what the run wrote.", "Copy it again, or start a new run.")
        return report

    @property
    def started(self) -> datetime:
        """When the run started by its report; where that cannot be read, when the report was written, or the directory."""
        with suppress(RunError, ValueError, KeyError):
            started = datetime.fromisoformat(self.read_report()["started"])
            return started if started.tzinfo else started.astimezone()
        return datetime.fromtimestamp((self.report if os.path.lexists(self.report) else self.path).lstat().st_mtime, UTC)

    @property
    def training_began(self) -> datetime:
        """When the first step of its checkpoints was trained: for a copy of a run that is trained on, in that run."""
        with suppress(RunError, ValueError, KeyError):
            return datetime.fromisoformat(self.read_report()["training_began"])
        return self.started


def create_run_folder(root: Path, recipe_name: str, started: datetime) -> RunFolder:
    """Create `root/recipe_name/<local time of started>`, never one that exists; RunError where that is impossible."""
    stamp = started.astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 100):
        path = root / recipe_name / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            make_directory(path)
            make_directory(path / "checkpoints")
        except FileExistsError:
            if not path.is_dir():
                raise RunError(f"{path} is a file.", "Delete it, or choose another [training] output_dir.") from None
            continue
        except OSError as error:
            hint = f"{disk_error_hint(error)}, or choose another [training] output_dir."
            raise RunError(f"The run directory {path} cannot be created: {error.strerror}.", hint) from error
        return RunFolder(path)
    raise RunError(f"{root / recipe_name} has 99 runs of this second.", "Try again.")


def copy_run_folder(run: RunFolder, root: Path, recipe_name: str) -> RunFolder:
    """A new run directory, started now, that goes on from the checkpoints of a run that is done, which stays as it is; RunError
    where the disk is full or refuses.
    """
    started = datetime.now(UTC)
    copy = create_run_folder(root, recipe_name, started)
    try:
        with disk_errors(copy.path):
            left_out = shutil.ignore_patterns(".*", "damaged-*", "rehearsal-*")
            shutil.copytree(run.checkpoints, copy.checkpoints, ignore=left_out, dirs_exist_ok=True)
            if run.base.is_file():
                shutil.copyfile(run.base, copy.base)
            times = {"started": started.isoformat(), "training_began": run.training_began.isoformat()}
            write_report(copy, {**run.read_report(), **times, "status": "interrupted"})
    except BaseException:
        remove(copy.path)
        raise
    return copy


@contextmanager
def lock_run(folder: RunFolder, *, wait_seconds: float = 0) -> Iterator[None]:
    """Let no other process write a run directory; a killed process releases its lock. RunError where another one writes it, named
    by its id, or the directory cannot be written.
    """
    from filelock import FileLock, Timeout

    process = folder.path / LOCK_PID
    with ExitStack() as held, disk_errors(folder.path, hint="{cause}, then go on with --resume."):
        folder.checkpoints.mkdir(exist_ok=True)
        try:
            held.enter_context(FileLock(folder.path / LOCK, timeout=wait_seconds))
        except Timeout as error:
            with suppress(OSError, ValueError):
                pid = int(process.read_text(encoding="utf-8"))
                raise RunError(
                    f"Process {pid} is writing {folder.path}.", "Wait for it, or end it, then go on with --resume."
                ) from error
            raise RunError(f"Another process is writing {folder.path}.", "Wait for it, or end it.") from error
        process.write_text(str(os.getpid()), encoding="utf-8")
        free = held.pop_all()
    with free:
        try:
            yield
        finally:
            for path in (process, folder.path / LOCK):
                with suppress(OSError):  # Windows removes no open file
                    path.unlink(missing_ok=True)


def is_locked(folder: RunFolder) -> bool:
    """Whether a process writes a run directory now; False where that cannot be read."""
    from filelock import FileLock, Timeout

    if (folder.path / LOCK).exists():
        with suppress(OSError):  # a directory of someone else
            try:
                with FileLock(folder.path / LOCK, timeout=0):
                    return False
            except Timeout:
                return True
    return False


@contextmanager
def removed_on_failure(folder: RunFolder) -> Iterator[None]:
    """Remove a new, still empty run directory if what is done inside fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the recipe's directory may hold other runs
            for name in (LOCK, LOCK_PID):
                (folder.path / name).unlink(missing_ok=True)
            for path in (folder.checkpoints, folder.path, folder.path.parent):
                path.rmdir()
        raise


def find_run(root: Path, recipe_name: str, wanted: str | None) -> RunFolder:
    """The run to resume: the one that `wanted` names, or the newest run of the recipe; RunError where there is none."""
    if wanted is None and not list_runs(root / recipe_name):
        raise RunError(f"There is no run of {recipe_name} under {root} to resume.", "Leave --resume out to start one.")
    folder = resolve_run(root / recipe_name if wanted is None else wanted, root)
    folder.read_report()
    return folder


def list_runs(root: Path) -> list[RunFolder]:
    """The runs that are in `root`, or in a directory in it, the newest last. A run is a directory with a report.json."""
    reports = [report for depth in ("*", "*/*") for report in root.glob(f"{depth}/report.json")]
    return sorted((RunFolder(report.parent) for report in reports), key=lambda run: (run.started, run.path.name))


def find_unfinished(group: Path) -> RunFolder | None:
    """The newest run in a directory, if it has a checkpoint and did not end; None where it is written now."""
    newest = next(reversed(list_runs(group)), None)
    if newest is None or not any(newest.checkpoints.glob("checkpoint-*")) or is_locked(newest):
        return None
    with suppress(RunError):
        return None if newest.read_report().get("status") == "done" else newest
    return None


def resolve_run(text: str | Path, root: Path = Path("runs")) -> RunFolder:
    """The run that a person names, as every command that takes RUN reads it; a file of the run may be missing or damaged.
    RunError where nothing has this name; it lists the recipes that have runs.

    Args:
        text: the directory of a run, or its adapter; a directory of several runs, of which the newest is meant, also as
            `directory/latest`; a recipe file, or the name of a recipe with runs under `root`: its newest run.
        root: directory of the runs ([training] output_dir).
    """
    path = Path(text)
    group = path.parent if path.name == LATEST and not os.path.lexists(path) else path
    if path.suffix == ".toml" and os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        group = root / run_group_name(path)
        path = path.parent if path.name == "recipe.toml" else group
    if path.name == "adapter" and RunFolder(path.parent).recipe.is_file():
        path = path.parent
    candidates = [group] if group.is_absolute() or ".." in group.parts else [group, root / group]
    with suppress(OSError, ValueError):  # a name that no file system takes
        for folder in map(RunFolder, (path, candidates[-1])):  # as it stands, or as the list of runs writes it
            if folder.recipe.is_file() or folder.report.is_file():
                return folder
        for candidate in candidates:
            if runs := list_runs(candidate):
                return runs[-1]
    runs = list_runs(root)
    if os.path.isdir(path):  # noqa: PTH112 - as above
        raise RunError(f"{path} is no run: it has no report.json.", "Give the directory of a run: runs/<recipe>/<time>.")
    if not runs:
        raise RunError(f"There is no run {text}, and none under {root}.", NO_RUNS)
    names = ", ".join(sorted({run.path.parent.name for run in runs}))
    hint = f"Give the name of a recipe with runs ({names}), or the directory of a run: the newest is {runs[-1].path}."
    raise RunError(f"There is no run {text}.", hint)


def find_model(text: str, root: Path = Path("runs")) -> Path:
    """What `load_for_inference` loads for a name that a person gives: the directory of a run, as `resolve_run` finds it; of an
    adapter, an export or a base; or the hub id of a base. RunError where it is none of these, ModelError for an untrained run.
    """
    path = Path(text)
    if _has_model(path) and not RunFolder(path.parent).recipe.is_file():  # before a run of this name under `root`
        return path
    try:
        run = resolve_run(text, root)
    except RunError:
        from qlora_phi3.family import is_hub_id  # not above: the help of most commands imports this file

        if path.parent.name == LATEST:  # as in runs/NAME/latest/merged
            path = resolve_run(str(path.parent), root).path / path.name
        if _has_model(path):
            return path
        if is_hub_id(text) and not is_dir(path) and not is_dir(path.parent):
            return path
        raise
    run.check_trained()
    return run.path


def _has_model(path: Path) -> bool:
    return is_dir(path) and any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def run_group_name(recipe: Path) -> str:
    """Name of the directory for the runs of a recipe file. The runs of a run's own recipe.toml are next to that run.

    Never a name that means another directory (a recipe `...toml` has the stem `..`), a hidden one, or none.
    """
    if recipe.name == "recipe.toml" and (recipe.parent / "report.json").is_file():
        return recipe.resolve().parent.parent.name or "recipe"
    return recipe.name.removesuffix(".toml").strip(". ") or "recipe"


def write_report(folder: RunFolder, report: Mapping[str, Any]) -> None:
    """Replace report.json."""
    report = {**report, "sha256": _report_sha256(report)}
    atomic_write(folder.report, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def _report_sha256(report: Mapping[str, Any]) -> str:
    values = {key: value for key, value in report.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def append_metrics(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """Add one line to metrics.jsonl; RunError where the disk is full or refuses."""
    hint = "{cause}, then go on with --resume."
    with disk_errors(folder.metrics, hint=hint), folder.metrics.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line that is no record, as a kill leaves the last one, is left out."""
    return parse_metrics(path.read_bytes().splitlines()) if path.is_file() else []


def parse_metrics(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The records in lines of a metrics.jsonl."""
    records = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def restore_metrics(folder: RunFolder, checkpoint: Path | None) -> None:
    """Replace metrics.jsonl by the copy in a checkpoint (None: by nothing); a resumed run measures the rest again.

    Records of out-of-memory errors stay: the resumed run starts with the execution plan that they led to.
    """
    kept = [] if checkpoint is None else read_metrics(checkpoint / folder.metrics.name)
    kept += [record for record in read_metrics(folder.metrics) if record["kind"] == "oom" and record not in kept]
    atomic_write(folder.metrics, "".join(json.dumps(record) + "\n" for record in kept))
