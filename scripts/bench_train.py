"""Compare training speed and peak memory with TRL and Unsloth on one core or a GPU, interleaved, on the very same token ids.

    python scripts/bench_train.py --base BASE_FOLDER --data CHATS --unsloth-python PYTHON [--rounds 3]
    python scripts/bench_train.py --base BASE_FOLDER --data CHATS --gpu-gib 12 [--unsloth-python PYTHON]

BASE_FOLDER and CHATS are the demo's base model and conversations. Unsloth wants other versions of the libraries, so it
has an environment of its own: a virtual environment, `pip install torch==2.13.0`, then
`pip install --no-deps -r scripts/bench_peers/unsloth-requirements.txt`; PYTHON is its interpreter.

With --gpu-gib a model of --model's size with random weights and the tokenizer of BASE_FOLDER trains on the first GPU: rows of
--max-length tokens, 8-bit AdamW for all, and of its memory so much at most, without the CUDA context for the peers. They take one
row at once and accumulate; qlora-phi3 plans. The peak is then what torch's allocator reserved.

Otherwise every run is a process of its own on one core with one thread. qlora-phi3 writes down the rows in its order and its
adapter before the first step; the peers train on those ids from that adapter. A round runs each contender once; ratios
are taken within a round, and their median is told. Tokens are counted without padding. The peak is the high-water mark
of the process's resident memory, imports and loading included.
"""

import argparse
import csv
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from memory_bench.base import write_base

HERE = Path(__file__).resolve().parent
PEERS = HERE / "bench_peers"
TABLES = HERE.parent / "benchmarks"
STEPS, ROWS_OF_A_STEP = 20, 4
SCRIPTS = {"qlora-phi3": "ours.py", "trl": "trl_sft.py", "unsloth": "unsloth_sft.py"}


@dataclass(frozen=True, slots=True)
class Contender:
    """One program with one set of settings."""

    program: str
    quantization: str
    compute: str
    checkpointing: str

    @property
    def name(self) -> str:
        """As the table writes it."""
        kind = self.quantization.upper() if self.quantization != "none" else "unquantized"
        return f"{self.program} {kind} {self.compute}, checkpointing {self.checkpointing}"


#: "defaults": ours; Unsloth's own on a processor with bf16 (4-bit, bf16, checkpointing), and its 16-bit; TRL in bf16.
#: "fp32-peers": the peers as on a processor without bf16. "equal": one setting for all. "gpu": each with its own on a GPU.
CONFIGURATIONS = {
    "defaults": (
        Contender("qlora-phi3", "nf4", "bfloat16", "auto"),
        Contender("unsloth", "nf4", "bfloat16", "on"),
        Contender("unsloth", "none", "bfloat16", "on"),
        Contender("trl", "nf4", "bfloat16", "on"),
    ),
    "fp32-peers": (
        Contender("qlora-phi3", "nf4", "bfloat16", "auto"),
        Contender("unsloth", "nf4", "float32", "on"),
        Contender("unsloth", "none", "float32", "on"),
        Contender("trl", "none", "float32", "on"),
    ),
    "gpu": (
        Contender("qlora-phi3", "nf4", "bfloat16", "auto"),
        Contender("unsloth", "nf4", "bfloat16", "on"),
        Contender("trl", "nf4", "bfloat16", "on"),
    ),
    "equal": (
        Contender("qlora-phi3", "none", "float32", "off"),
        Contender("unsloth", "none", "float32", "off"),
        Contender("trl", "none", "float32", "off"),
    ),
}


def main() -> None:
    """Record, run the rounds, print the table, append the runs."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="bench-train-") as scratch:
        rows, adapter = Path(scratch) / "rows.jsonl", Path(scratch) / "adapter"
        if arguments.gpu_gib:
            base = write_base(Path(scratch) / "base", arguments.model, arguments.base, arguments.layers)
            arguments.base, arguments.data = base, write_long_rows(arguments, Path(scratch) / "long.jsonl")
        run_contender(arguments, CONFIGURATIONS["defaults"][0], Path(scratch), rows, adapter, record=True)
        tokens = tokens_of_steps(rows)
        print(f"{sum(tokens):,} tokens in {len(tokens)} steps", flush=True)
        for configuration in arguments.configurations:
            contenders = [c for c in CONFIGURATIONS[configuration] if c.program in arguments.programs]
            rounds = []
            for number in range(1, arguments.rounds + 1):
                results = {}
                for contender in contenders:
                    result = run_contender(arguments, contender, Path(scratch), rows, adapter)
                    results[contender.name] = result | speeds(result["steps"], tokens)
                    told = results[contender.name]
                    print(
                        f"{configuration} round {number}: {contender.name}: {told['tokens_per_second']:.1f} tokens/s, "
                        f"{told['peak_memory_bytes'] / 1e9:.3f} GB",
                        flush=True,
                    )
                    append_run(arguments, configuration, number, told, sum(tokens))
                rounds.append(results)
            print("\n" + summary(configuration, rounds) + "\n", flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--unsloth-python", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--gpu-gib", type=float, help="train on the GPU, within so much of its memory")
    parser.add_argument("--model", default="microsoft/Phi-3-mini-4k-instruct", help="whose size the base has on a GPU")
    parser.add_argument("--layers", type=int, default=0, help="of that base; 0: all")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS)
    parser.add_argument("--csv", type=Path, help="the table to add runs to")
    parser.add_argument("--programs", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    arguments = parser.parse_args()
    arguments.configurations = arguments.configurations or (["gpu"] if arguments.gpu_gib else ["defaults", "equal"])
    arguments.max_length = arguments.max_length or (2048 if arguments.gpu_gib else 256)
    if arguments.unsloth_python is None:
        arguments.programs = [program for program in arguments.programs if program != "unsloth"]
    return arguments


def run_contender(
    arguments: argparse.Namespace,
    contender: Contender,
    scratch: Path,
    rows: Path,
    adapter: Path,
    *,
    record: bool = False,
) -> dict[str, Any]:
    """Run one contender in its own process and return its JSON; empty where it only records."""
    out = scratch / "result.json"
    python = arguments.unsloth_python if contender.program == "unsloth" else sys.executable
    command = [
        python, PEERS / SCRIPTS[contender.program], "--base", arguments.base.resolve(), "--rows", rows,
        "--adapter", adapter, "--out", out, "--quantization", contender.quantization, "--compute", contender.compute,
        "--checkpointing", contender.checkpointing, "--max-length", arguments.max_length, "--batch-size", ROWS_OF_A_STEP,
        *(("--gpu-gib", arguments.gpu_gib) if arguments.gpu_gib else ("--core", arguments.core)),
    ]  # fmt: skip
    if contender.program == "qlora-phi3":
        command += ["--data", arguments.data.resolve(), "--max-rows", ROWS_OF_A_STEP * arguments.steps]
        command += ["--record"] if record else []
    one_thread = {} if arguments.gpu_gib else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory(dir=scratch) as work:
        finished = subprocess.run(
            [*map(str, command), "--work", work],
            env=os.environ | one_thread | offline,
            cwd=work,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    if finished.returncode:
        raise SystemExit(f"{contender.name} failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
    return {} if record else json.loads(out.read_text(encoding="utf-8"))


def tokens_of_steps(rows: Path) -> list[int]:
    """Tokens of each optimizer step, without padding."""
    lengths = [len(json.loads(line)["input_ids"]) for line in rows.read_text(encoding="utf-8").splitlines()]
    return [sum(lengths[start : start + ROWS_OF_A_STEP]) for start in range(0, len(lengths), ROWS_OF_A_STEP)]


def speeds(steps: list[dict[str, float]], tokens: list[int]) -> dict[str, float]:
    """Tokens a second by the wall, without the first step, and by processor time (less disturbed by neighbours)."""
    if len(steps) != len(tokens):
        raise SystemExit(f"{len(steps)} steps were run instead of {len(tokens)}")
    wall, cpu = ([step[name] for step in steps] for name in ("step_seconds", "cpu_seconds"))
    return {
        "tokens_per_second": sum(tokens) / sum(wall),
        "tokens_per_second_after_first": sum(tokens[1:]) / sum(wall[1:]),
        "tokens_per_cpu_second": sum(tokens) / sum(cpu),
    }


def summary(configuration: str, rounds: list[dict[str, dict[str, Any]]]) -> str:
    """A markdown table: medians over the rounds, ratios as the median of ours divided by theirs within a round."""
    ours = next((name for name in rounds[0] if name.startswith("qlora-phi3")), next(iter(rounds[0])))

    def median(name: str, field: str) -> float:
        return statistics.median(results[name][field] for results in rounds)

    def ratio(name: str, field: str) -> float:
        return statistics.median(results[ours][field] / results[name][field] for results in rounds)

    lines = [
        f"{configuration}, median of {len(rounds)} rounds",
        "",
        "| | tokens/s | without step 1 | per CPU second | ours / this | ours / this, CPU | peak GB | ours / this"
        " | largest difference of a step's loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in rounds[0]:
        figures = [
            *(
                f"{median(name, field):.1f}"
                for field in ("tokens_per_second", "tokens_per_second_after_first", "tokens_per_cpu_second")
            ),
            f"{ratio(name, 'tokens_per_second'):.2f}",
            f"{ratio(name, 'tokens_per_cpu_second'):.2f}",
            f"{median(name, 'peak_memory_bytes') / 1e9:.3f}",
            f"{ratio(name, 'peak_memory_bytes'):.2f}",
            f"{loss_difference(rounds[0][ours], rounds[0][name]):.1e}",
        ]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def loss_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest relative difference between two runs' losses at the same step."""
    pairs = zip(one["steps"], other["steps"], strict=True)
    return max(abs(a["loss"] - b["loss"]) / (abs(a["loss"]) or 1.0) for a, b in pairs)


def append_run(arguments: argparse.Namespace, configuration: str, number: int, result: dict[str, Any], tokens: int) -> None:
    """Add one run to the table of all runs."""
    on_gpu = bool(arguments.gpu_gib)
    where = {"gpu": gpu_name(), "gpu_gib": arguments.gpu_gib, "model": arguments.model} if on_gpu else {}
    row = {
        "date": date.today().isoformat(),
        **(where or {"processor": processor_name()}),
        "configuration": configuration,
        "round": number,
        **{name: result[name] for name in ("contender", "quantization", "compute", "checkpointing")},
        "tokens": tokens,
        **{
            name: round(result[name], 2)
            for name in ("tokens_per_second", "tokens_per_second_after_first", "tokens_per_cpu_second")
        },
        **{name: result[name] for name in ("peak_memory_bytes", "peak_before_training_bytes")},
        "first_loss": round(result["steps"][0]["loss"], 6),
        "last_loss": round(result["steps"][-1]["loss"], 6),
        "versions": " ".join(f"{name}={value}" for name, value in result["versions"].items()),
    }
    table = arguments.csv or TABLES / ("train_gpu.csv" if on_gpu else "train_cpu.csv")
    is_new = not table.exists()
    with table.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def write_long_rows(arguments: argparse.Namespace, file: Path) -> Path:
    """Rows that are cut at --max-length: chats of --data after each other, four characters a token and more."""
    chats = [json.loads(line)["messages"] for line in arguments.data.read_text(encoding="utf-8").splitlines()]
    turns = itertools.cycle(turn for chat in chats for turn in chat if turn["role"] != "system")
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(ROWS_OF_A_STEP * arguments.steps):
            row, size = [], 0
            while size < 8 * arguments.max_length or len(row) % 2:
                row.append(next(turns))
                size += len(row[-1]["content"])
            lines.write(json.dumps({"messages": row}) + "\n")
    return file


def gpu_name() -> str:
    """The first GPU's."""
    import torch

    return torch.cuda.get_device_name(0)


def processor_name() -> str:
    """The processor's model, and what it has for bf16."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    features = sorted({"avx512_bf16", "amx_bf16"} & set(entries.get("flags", "").split()))
    numbers = f"family {entries.get('cpu family', '?')} model {entries.get('model', '?')}"
    return " ".join([entries.get("model name", platform.processor()), numbers, *features])


if __name__ == "__main__":
    main()
