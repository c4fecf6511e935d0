"""Break runs of a tiny model and compare what `--resume` makes of them with an undisturbed run.

    python scripts/torture.py all                    # everything, an hour and a half of one core
    python scripts/torture.py kill-before --every 5  # SIGKILL before every fifth write

Kinds: kill-before, kill-middle (SIGKILL before, or in the middle of, each operation that changes a file of the run), kill-random;
full (ENOSPC), io-error (EIO), read-only (EROFS) from each operation on; flip (one bit in each file of the newest checkpoint and
of the run); power (the disk of a run stops at an operation, or some seconds after "Done"; as root, on a loop device).

After each fault the run is resumed without one. It must end with the adapter, the metrics and the report of the undisturbed run,
or be refused in one line. A run that met an error of the disk must end in one line as well. Linux only; needs gcc.
"""

import argparse
import ctypes
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEED = 2024
OFF, LOG, KILL_BEFORE, KILL_MIDDLE, FAIL_FROM, POWER_CUT = range(6)
ERRORS = {"full": errno.ENOSPC, "io-error": errno.EIO, "read-only": errno.EROFS}
#: What differs from run to run although nothing went wrong.
TIMES = ("step_seconds", "tokens_per_second", "seconds", "peak_memory_bytes")
COMPARED = ("status", "steps", "eval_loss_before", "eval_loss_after", "seed", "recipe_sha256", "data", "out_of_memory")
#: Seconds after "Done" at which the power is cut.
AFTER_DONE = (0, 0.1, 0.5, 1, 2, 5, 10, 20)


def start_with_faults() -> None:
    """Run this program again with the library of faults loaded before any other."""
    if "TORTURE_LIBRARY" in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    library = folder / "faults.so"
    subprocess.run(
        ["gcc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "torture_faults.c", "-ldl"],
        check=True,
    )
    own = {name: str(folder / name) for name in ("HF_DATASETS_CACHE", "XDG_CACHE_HOME", "XDG_STATE_HOME")}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.update(own | quiet | {"LD_PRELOAD": str(library), "TORTURE_LIBRARY": str(library)})
    os.execv(sys.executable, [sys.executable, *sys.argv])


def arm(mode: int, at: int = 0, error: int = 0, root: str = "", log_fd: int = -1) -> None:
    """Say what happens to this process at which operation below a directory."""
    library = ctypes.CDLL(os.environ["TORTURE_LIBRARY"])
    library.torture_arm.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    library.torture_arm(mode, at, error, os.fsencode(root), log_fd)


@dataclass
class Lab:
    """A workshop, its undisturbed run, and what the trials came to."""

    path: Path
    shop: Any
    output_dir: Path
    golden: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def write(self, output_dir: Path) -> None:
        """The recipe: six steps, an evaluation and a checkpoint after every second."""
        self.output_dir = output_dir
        training = {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "output_dir": str(output_dir)}
        self.shop.write(training=training)

    def start(self, *words: str, fault: Callable[[], None] | None = None) -> int:
        """`qlora-phi3 run mine.toml …` in a forked process; its id. `result` has what came of it."""
        (self.path / "result.json").unlink(missing_ok=True)
        if pid := os.fork():
            return pid
        from workshop import call

        if fault is not None:
            fault()
        result = call("run", "mine.toml", *words)
        arm(OFF)
        text = json.dumps([result.exit_code, result.stderr])
        (self.path / "result.json").write_text(text, encoding="utf-8")
        os._exit(0)

    def run(self, *words: str, fault: Callable[[], None] | None = None) -> tuple[int, str]:
        """Start, wait, and return the exit code (-9: killed) and stderr."""
        os.waitpid(self.start(*words, fault=fault), 0)
        return self.result()

    def result(self) -> tuple[int, str]:
        """Exit code and stderr of the last run."""
        try:
            code, text = json.loads((self.path / "result.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return -9, ""
        return code, text

    def folder(self) -> Path | None:
        """The only run directory with a report."""
        found = [path.parent for path in self.output_dir.glob("mine/*/report.json")]
        return found[0] if found else None

    def clear(self) -> None:
        """No run."""
        shutil.rmtree(self.output_dir / "mine", ignore_errors=True)

    def state(self) -> dict[str, Any]:
        """What must be equal: the adapter's files, the metrics and the report without times."""
        folder = self.folder()
        if folder is None or not (folder / "adapter").is_dir():
            return {}
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]
        report, base = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("report.json", "base.json"))
        started = base.pop("run_started")
        return {
            **{path.name: path.read_bytes() for path in sorted((folder / "adapter").iterdir())},
            "held_out": (folder / "held_out.jsonl").read_bytes(),
            "base": base,
            "its start is the run's": started == report["started"],
            "metrics": metrics,
            "report": {key: report[key] for key in COMPARED},
            "left over": [path.name for path in folder.rglob(".*") if not path.name.startswith(".lock")],
        }

    def verdict(self, *words: str) -> str:
        """Resume, or start again where no run is left, and compare."""
        code, text = self.run("--resume", *words)
        if code == 2 and "There is no run of" in text:
            code, text = self.run()
            return "started again, equal" if code == 0 and self.equal() else f"WRONG {self.difference(code, text)}"
        if code == 0:
            return "resumed, equal" if self.equal() else f"WRONG {self.difference(code, text)}"
        if is_one_line(code, text):
            done = "is done" in text and self.equal()
            return "was done, equal" if done else f"refused: {text.strip()[-160:]}"
        return f"WRONG {self.difference(code, text)}"

    def equal(self) -> bool:
        """Whether the run is the undisturbed one."""
        return self.state() == self.golden

    def difference(self, code: int, text: str) -> str:
        """For a person who looks into a failure."""
        state = self.state()
        return f"exit {code}, differs in {[key for key in self.golden if state.get(key) != self.golden[key]]}: {text[-1500:]}"

    def count(self, kind: str, verdict: str, where: object) -> None:
        """Add a result; print what is wrong, or was refused, with its place."""
        head = verdict.split(":")[0].split(" ")[0] if verdict.startswith(("WRONG", "refused", "TRACEBACK")) else verdict
        self.counts[kind, head] += 1
        if (done := sum(number for (name, _), number in self.counts.items() if name == kind)) % 50 == 0:
            print(f"{kind}: {done} trials", file=sys.stderr, flush=True)
        if head != verdict:
            print(f"{kind} at {where}: {verdict}", flush=True)


def is_one_line(code: int, text: str) -> bool:
    """Whether a run ended in one line for the user; notes may stand before it."""
    lines = text.splitlines()
    return code == 2 and lines[-1].startswith("Error: ") and "Traceback" not in text


def operations(lab: Lab) -> list[str]:
    """The operations of an undisturbed run, in order; it becomes what the others are compared with."""
    log = lab.path / "operations.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    lab.clear()
    code, text = lab.run(fault=lambda: arm(LOG, root=str(lab.output_dir), log_fd=descriptor))
    os.close(descriptor)
    assert code == 0, text
    lab.golden = lab.state()
    lab.names = log.read_text(encoding="utf-8").splitlines()
    return lab.names


def kill_at_operations(lab: Lab, kind: str, points: list[int], names: list[str]) -> None:
    """SIGKILL at each of these operations, then resume."""
    mode = KILL_BEFORE if kind == "kill-before" else KILL_MIDDLE
    for at in points:
        lab.clear()
        code, _ = lab.run(fault=lambda at=at: arm(mode, at, root=str(lab.output_dir)))  # type: ignore[misc]
        lab.count(kind, lab.verdict() if code == -9 else f"WRONG not killed, exit {code}", names[at])


def kill_at_random(lab: Lab, number: int) -> None:
    """SIGKILL at random moments; one killed run in three is killed again while it is resumed."""
    draw = random.Random(SEED)
    started = time.monotonic()
    lab.clear()
    lab.run()
    seconds = time.monotonic() - started
    for trial in range(number):
        lab.clear()
        for words in ((), ("--resume",))[: 1 + (trial % 3 == 0)]:
            pid = lab.start(*words)
            time.sleep(draw.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        lab.count("kill-random", lab.verdict(), trial)


def fail_from_operations(lab: Lab, kind: str, points: list[int], names: list[str]) -> None:
    """An error of the disk from each of these operations on, then resume on a disk that works."""
    for at in points:
        lab.clear()
        code, text = lab.run(fault=lambda at=at: arm(FAIL_FROM, at, ERRORS[kind], str(lab.output_dir)))  # type: ignore[misc]
        if not (code == 0 or is_one_line(code, text)):
            lab.count(kind, f"TRACEBACK exit {code}: {text[-1500:]}", names[at])
        elif code == 2 and os.strerror(ERRORS[kind]) not in text and "as a full disk does" not in text:
            lab.count(kind, f"WRONG reason: {text[-400:]}", names[at])
        lab.count(kind, lab.verdict(), names[at])


def flip_bits(lab: Lab, times: int) -> None:
    """One bit in each file of the newest checkpoint, and in each other file of the run, before it is resumed."""
    draw = random.Random(SEED)
    lab.clear()
    lab.run(fault=stop_after_step_4)
    folder = lab.folder()
    assert folder is not None
    saved = lab.path / "stopped"
    shutil.rmtree(saved, ignore_errors=True)
    shutil.copytree(folder, saved)
    newest = max((saved / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    own = [path for path in saved.iterdir() if path.is_file() and not path.name.startswith(".")]
    for kind, files in (("flip in the newest checkpoint", sorted(newest.iterdir())), ("flip in the run", sorted(own))):
        for path in files:
            for trial in range(times):
                shutil.rmtree(folder)
                shutil.copytree(saved, folder)
                target = folder / path.relative_to(saved)
                content = bytearray(target.read_bytes())
                bit = draw.randrange(8 * len(content))
                content[bit // 8] ^= 1 << bit % 8
                target.write_bytes(content)
                lab.count(kind, lab.verdict(), f"{path.name}, bit {bit} ({trial})")


def stop_after_step_4() -> None:
    """Let SIGTERM come in step 4, so that the run saves and stops."""
    from qlora_phi3.ui.console import ConsoleReporter

    shown = ConsoleReporter.step

    def show_and_stop(self: Any, record: Any) -> None:
        shown(self, record)
        if record.step == 4:
            signal.raise_signal(signal.SIGTERM)

    ConsoleReporter.step = show_and_stop  # type: ignore[method-assign]


@dataclass
class Disk:
    """An ext4 file system on a loop device."""

    image: Path
    mounted: Path
    options: str

    def attach(self) -> None:
        """Mount it; the journal is recovered after a power cut."""
        self.mounted.mkdir(exist_ok=True)
        subprocess.run(["mount", "-o", f"loop,{self.options}", self.image, self.mounted], check=True)

    def detach(self) -> None:
        """Unmount it."""
        for _ in range(50):
            if not subprocess.run(["umount", self.mounted], capture_output=True, check=False).returncode:
                return
            time.sleep(0.1)
        raise OSError(f"{self.mounted} is busy")

    def cut_power(self) -> None:
        """Let nothing more reach the device, EXT4_IOC_SHUTDOWN without a flush of the journal."""
        import fcntl

        descriptor = os.open(self.mounted, os.O_RDONLY)
        fcntl.ioctl(descriptor, 0x8004587D, (2).to_bytes(4, sys.byteorder))
        os.close(descriptor)


def cut_power(lab: Lab, number: int) -> None:
    """The power is cut at operations of a run and after "Done", on two kinds of journal; then the run is resumed."""
    for options in ("data=ordered", "data=writeback"):
        disk = Disk(lab.path / "disk.img", lab.path / "disk", options)
        lab.write(disk.mounted / "runs")

        def trial(at: int | None, wait: float = 0, disk: Disk = disk, options: str = options) -> None:
            names = lab.names
            with new_disk(disk):
                if at is None:
                    lab.run()
                    time.sleep(wait)
                    disk.cut_power()
                else:
                    lab.output_dir.mkdir()
                    lab.run(fault=lambda: arm(POWER_CUT, at, root=str(lab.output_dir)))
                disk.detach()
                disk.attach()
                where = f"{wait} s after Done" if at is None else names[at]
                lab.count(f"power, {options}" + (", after Done" if at is None else ""), lab.verdict(), where)

        with new_disk(disk):
            lab.output_dir.mkdir()
            operations(lab)
        for step in range(number):
            trial(step * len(lab.names) // number)
        for seconds in AFTER_DONE:
            trial(None, seconds)
    lab.write(lab.path / "runs")


class new_disk:  # noqa: N801 - used as a function
    """A context with a new, mounted disk."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk

    def __enter__(self) -> None:
        subprocess.run(["truncate", "-s", "48M", self.disk.image], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.disk.image], check=True)
        self.disk.attach()

    def __exit__(self, *reason: object) -> None:
        self.disk.detach()
        self.disk.image.unlink()


def build_lab(path: Path) -> Lab:
    """A tiny base, its data, and everything imported once."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
    import torch
    from workshop import Workshop, build_base

    import qlora_phi3.training.run  # noqa: F401

    torch.set_num_threads(1)
    shop = Workshop(path, build_base(path / "base"))
    os.chdir(path)
    lab = Lab(path, shop, path / "runs")
    lab.write(path / "runs")
    lab.run()  # prepares the data once
    return lab


def table(counts: Mapping[tuple[str, str], int]) -> Iterator[str]:
    """The counts in Markdown."""
    outcomes = sorted({outcome for _, outcome in counts})
    yield "| fault | trials | " + " | ".join(outcomes) + " |"
    yield "|---|---|" + "---|" * len(outcomes)
    for kind in dict.fromkeys(kind for kind, _ in counts):
        row = [counts.get((kind, outcome), 0) for outcome in outcomes]
        yield f"| {kind} | {sum(row)} | " + " | ".join(map(str, row)) + " |"


def main() -> int:
    """Break what the command line asks for; 1 where anything went wrong."""
    kinds = ("kill-before", "kill-middle", "kill-random", *ERRORS, "flip", "power")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=(*kinds, "all"))
    parser.add_argument("--every", type=int, default=1, help="take every n-th operation")
    parser.add_argument("--first", type=int, default=0, help="the first operation that is taken")
    parser.add_argument("--number", type=int, default=100, help="random kills")
    parser.add_argument("--times", type=int, default=10, help="bits flipped in each file")
    parser.add_argument("--points", type=int, default=40, help="operations at which the power is cut")
    options = parser.parse_args()
    wanted = kinds if "all" in options.kinds else options.kinds
    start_with_faults()
    with tempfile.TemporaryDirectory(prefix="torture-") as path:
        lab = build_lab(Path(path))
        names = operations(lab)
        print(f"{len(names)} operations change files of an undisturbed run; seed {SEED}", flush=True)
        points = list(range(options.first, len(names), options.every))
        for kind in wanted:
            started = time.monotonic()
            if kind.startswith("kill-") and kind != "kill-random":
                kill_at_operations(lab, kind, points, names)
            elif kind == "kill-random":
                kill_at_random(lab, options.number)
            elif kind in ERRORS:
                fail_from_operations(lab, kind, points, names)
            elif kind == "flip":
                flip_bits(lab, options.times)
            else:
                cut_power(lab, options.points)
            print(f"{kind}: {time.monotonic() - started:.0f} s", flush=True)
        print("\n".join(table(lab.counts)))
    shutil.rmtree(Path(os.environ["TORTURE_LIBRARY"]).parent, ignore_errors=True)
    return int(any(outcome in ("WRONG", "TRACEBACK") for _, outcome in lab.counts))


if __name__ == "__main__":
    sys.exit(main())
