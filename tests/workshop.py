"""A folder with a tiny base, chats and a recipe, and `qlora-phi3` called in it as a person would."""

import json
import os
import random
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from click.testing import CliRunner, Result
from tiny import build_tokenizer, hub_template
from tiny_model import save_tiny_model

from qlora_phi3.cli.main import main

#: Big enough for the tokenizer of `tiny.py`, in multiples of 64.
VOCABULARY = 832
QUESTIONS = {"red": "a cherry", "green": "the grass", "blue": "the sea", "black": "the night", "white": "the snow"}


def build_base(folder: Path, **changes: Any) -> Path:
    """A random two-layer Phi-3 with a tokenizer of Phi-3-mini's kind and its chat template."""
    save_tiny_model(folder, vocab_size=VOCABULARY, **changes)
    tokenizer = build_tokenizer(hub_template("Phi-3-mini-4k-instruct"))
    assert len(tokenizer) <= VOCABULARY
    tokenizer.save_pretrained(folder)
    return folder


def write_chats(path: Path, rows: int = 40, seed: int = 0) -> Path:
    """Short questions with answers that can be learned."""
    draw = random.Random(seed)
    lines = []
    for number in range(rows):
        colour = draw.choice(sorted(QUESTIONS))
        asked = f"What is {colour}, number {number}?"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": QUESTIONS[colour]}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@dataclass(frozen=True)
class Workshop:
    """A folder to work in; `mine.toml` is written anew by `write`."""

    path: Path
    base: Path

    def write(self, text: str = "", name: str = "mine.toml", **tables: dict[str, Any]) -> Path:
        """A recipe of the tables given over those of `default_tables`; or of the text given, as it is."""
        from qlora_phi3.recipe.edit import format_toml

        path = self.path / name
        if not text:
            merged = {table: {**keys, **tables.get(table, {})} for table, keys in self.default_tables().items()}
            for table, keys in merged.items():
                text += f"[{table}]\n" + "".join(f"{key} = {format_toml(value)}\n" for key, value in keys.items())
        path.write_text(text, encoding="utf-8")
        return path

    def default_tables(self) -> dict[str, dict[str, Any]]:
        """Ten steps of four rows in fp32, on 40 chats of which 8 are held out."""
        if not (self.path / "chats.jsonl").exists():
            write_chats(self.path / "chats.jsonl", rows=48)
        return {
            "model": {"name": str(self.base)},
            "quantization": {"bnb_4bit_compute_dtype": "float32"},
            "lora": {"r": 4},
            "data": {"train": "chats.jsonl", "eval_size": 8},
            "training": {
                "batch_size": 4,
                "max_length": 128,
                "learning_rate": 0.01,
                "save_steps": 2,
                "eval_steps": 5,
                "report_samples": 0,
            },
            "memory": {},
        }

    def run(self, *words: str, recipe: str = "mine.toml") -> Result:
        """`qlora-phi3 run mine.toml …` in this process."""
        return call("run", recipe, *words)

    def runs(self, name: str = "mine") -> list[Path]:
        """The run folders of a recipe, oldest first."""
        return sorted((self.path / "runs" / name).glob("*"), key=lambda path: path.stat().st_mtime_ns)

    def copy_base(self, name: str = "copy") -> Path:
        """A copy of the base to spoil."""
        return Path(shutil.copytree(self.base, self.path / name))


def call(*words: str) -> Result:
    """`qlora-phi3 …` in this process; whatever is no user's error fails the test with its traceback.

    What it sets in `os.environ`, as a run does with CUDA_VISIBLE_DEVICES, is gone after it, as it is after a command.
    """
    with mock.patch.dict(os.environ):
        result = CliRunner().invoke(main, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        result.stderr_bytes += "".join(traceback.format_exception(result.exception)).encode()
    return result


def read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
