"""`qlora-phi3` on the emulated card as a person calls it, each command in a forked process.

What is imported here is imported once; the process that forks never computes.
"""

import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import card
import torch
from workshop import Workshop, call, read_json, read_lines

import qlora_phi3.export.run
import qlora_phi3.training.run  # noqa: F401
from qlora_phi3.training.trainer import Phi3Trainer

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command printed and how it ended."""

    exit_code: int
    stdout: str
    stderr: str
    native: str  #: What libraries wrote to the file descriptor of stderr themselves.
    retries: int  #: Times the allocator emptied its cache to serve a request.

    @property
    def error(self) -> str:
        """The line that says why it ended."""
        [line] = [line for line in self.stderr.splitlines() if line.startswith("Error: ")]
        return line


class CardWorkshop(Workshop):
    """A folder with a recipe on a sparse base, and one row of each of these lengths; the last four are held out."""

    def __init__(self, path: Path, base: Path, lengths: Sequence[int]) -> None:
        super().__init__(path, base)
        write_rows(path / "chats.jsonl", lengths[:-4])
        write_rows(path / "held_out.jsonl", lengths[-4:])

    def default_tables(self) -> dict[str, dict[str, Any]]:
        """Three steps of four rows."""
        return {
            "model": {"name": str(self.base)},
            "lora": {"r": 16},
            "data": {"train": "chats.jsonl", "eval": "held_out.jsonl"},
            "training": {"batch_size": 4, "max_length": 8192, "max_steps": 3, "save_strategy": "no", "report_samples": 0},
            "memory": {},
        }

    def on_card(
        self,
        *words: str,
        name: str = "rtx3060",
        others_mib: int = 0,
        before_step: Mapping[int, Callable[[], None]] | None = None,
        wsl: bool = False,
    ) -> Outcome:
        """Call `qlora-phi3 ...` on a card of which other programs hold so much.

        Args:
            before_step: what happens before the training steps of these numbers.
            wsl: the system is Windows' Linux, where torch's segments do not grow and the driver spills.
        """

        def work() -> list[Any]:
            card.choose(name)
            card.hold(others_mib * MIB)
            card.stand_in_for_values()
            if wsl:
                platform.release = lambda: "5.15.167.4-microsoft-standard-WSL2"
            call_before_steps(before_step or {})
            with tempfile.TemporaryFile("w+") as native:
                os.dup2(native.fileno(), 2)
                result = call(*words)
                native.seek(0)
                retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
                return [result.exit_code, result.stdout, result.stderr, native.read(), retries]

        exit_code, stdout, stderr, native, retries = card.in_child(work)
        return Outcome(exit_code=exit_code, stdout=stdout, stderr=stderr, native=native, retries=retries)

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind of the newest run."""
        return [record for record in read_lines(self.runs()[-1] / "metrics.jsonl") if record["kind"] == kind]

    def report(self) -> dict[str, Any]:
        """report.json of the newest run."""
        return read_json(self.runs()[-1] / "report.json")


def call_before_steps(actions: Mapping[int, Callable[[], None]]) -> None:
    """In the process that trains: what happens before the training steps of these numbers."""
    left, usual = dict(actions), Phi3Trainer.training_step

    def training_step(trainer: Phi3Trainer, *arguments: Any, **more: Any) -> Any:
        if action := left.pop(trainer.state.global_step + 1, None):
            action()
        return usual(trainer, *arguments, **more)

    Phi3Trainer.training_step = training_step


def write_rows(path: Path, lengths: Sequence[int]) -> None:
    """Chats of about these lengths in tokens of the tests' tokenizer, all of them learned but for the question."""
    rows = []
    for number, length in enumerate(lengths):
        turns = [("user", f"What is {number}?"), ("assistant", "the grass is green " * max(1, (length - 16) // WORDS_TOKENS))]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


#: Tokens of "the grass is green " in `tiny.build_tokenizer`.
WORDS_TOKENS = 14
