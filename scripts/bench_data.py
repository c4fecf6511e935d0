"""Speed and memory of preparing chats: this program, TRL's SFTTrainer with two processes, and the tokenizer alone.

    python scripts/bench_data.py ROWS BASE CHATS [--rounds 3]

ROWS chats are made of the Alpaca rows in CHATS (.json), with every eighth word replaced, so that no two are alike. BASE is a
directory with a tokenizer. Each program runs in a process of its own with an empty cache, one after the other. Memory is the
largest PSS of the process and its children (Linux); seconds are from the file on the disk to the prepared rows, without imports.
TRL tokenizes whole turns without an assistant's mask, which is the least that it can do, and packs the rows.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

MAX_LENGTH = 1024
PROGRAMS = ("tokenizer", "ours", "trl")


def main() -> None:
    """Make the rows, run each program in turn, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int)
    parser.add_argument("base", type=Path)
    parser.add_argument("chats", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--child", choices=PROGRAMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options.child, options.base, options.chats)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, options.rows, json.loads(options.chats.read_text(encoding="utf-8")))
        for _ in range(options.rounds):
            for program in options.programs:
                print(program, json.dumps(run_program(program, options.base, file)), flush=True)


def write_rows(file: Path, count: int, chats: list[dict[str, str]]) -> None:
    """Write `count` chats of two turns."""
    draw = random.Random(0)
    vocabulary = [word for chat in chats for word in chat["output"].split()]
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            chat = draw.choice(chats)
            words = chat["output"].split(" ")
            for _ in range(len(words) // 8 + 1):
                words[draw.randrange(len(words))] = draw.choice(vocabulary)
            question = f"{chat['instruction']} {chat['input']} ({number})"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": " ".join(words)}]
            lines.write(json.dumps({"messages": turns}) + "\n")


def run_program(program: str, base: Path, file: Path) -> dict[str, Any]:
    """Run a program with an empty cache, and add the largest memory that it and its children had."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "0", str(base), str(file), "--child", program]
        peak, child = 0, subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        while child.poll() is None:
            peak = max(peak, sum(tree_bytes(psutil.Process(child.pid))))
            time.sleep(0.2)
        assert child.stdout is not None
        result = json.loads(child.stdout.read().splitlines()[-1])
    return {**result, "peak_mib": peak >> 20}


def tree_bytes(process: psutil.Process) -> Iterator[int]:
    """The PSS of a process and of each of its children."""
    with suppress(psutil.Error):
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                yield each.memory_full_info().pss


def run_child(program: str, base: Path, file: Path) -> None:
    """Prepare the rows of a file and print seconds, processor seconds, rows and tokens."""
    prepare = {"tokenizer": tokenize, "ours": prepare_ours, "trl": prepare_trl}[program](base)
    started, cpu = time.perf_counter(), cpu_seconds()
    rows, tokens = prepare(file)
    seconds = time.perf_counter() - started
    figures = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds() - cpu, 1), "rows": rows, "tokens": tokens}
    print("\n" + json.dumps(figures))


def cpu_seconds() -> float:
    """Of this process and of its children that ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def tokenize(base: Path) -> Any:
    """The tokenizer's Rust code alone, on the texts of the chats."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))

    def prepare(file: Path) -> tuple[int, int]:
        rows = tokens = 0
        with file.open(encoding="utf-8") as lines:
            while batch := [json.loads(line)["messages"] for _, line in zip(range(256), lines, strict=False)]:
                texts = ["".join(turn["content"] for turn in turns) for turns in batch]
                tokens += sum(map(len, tokenizer.encode_batch(texts)))
                rows += len(texts)
        return rows, tokens

    return prepare


def prepare_ours(base: Path) -> Any:
    """What a run does before its plan."""
    from qlora_phi3.data.prepare import prepare_datasets
    from qlora_phi3.data.template import choose_template
    from qlora_phi3.data.tokenizer import load_tokenizer
    from qlora_phi3.recipe.schema import Data, Model

    tokenizer = load_tokenizer(Model(name=str(base)))

    def prepare(file: Path) -> tuple[int, int]:
        options = {"evaluate": True, "tokenizer": tokenizer, "template": choose_template(tokenizer), "base_dir": Path()}
        report = prepare_datasets(Data(train=str(file)), max_length=MAX_LENGTH, progress=lambda *_: None, **options).report
        return report.rows_kept, report.tokens

    return prepare


def prepare_trl(base: Path) -> Any:
    """What SFTTrainer does to its data set when it is made, without a model."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer._tokenizer, trainer.chat_template, trainer.completion_only_loss = tokenizer, None, False
    config = SFTConfig(output_dir="unused", packing=True, max_length=MAX_LENGTH, dataset_num_proc=2, use_cpu=True, bf16=False)

    def prepare(file: Path) -> tuple[int, int]:
        rows = load_dataset("json", data_files=str(file), split="train")
        packed = trainer._prepare_dataset(rows, tokenizer, config, True, None, "train")
        lengths = packed.with_format("arrow")[:]["seq_lengths"].combine_chunks().flatten()
        return len(rows), int(lengths.to_numpy().sum())

    return prepare


if __name__ == "__main__":
    main()
