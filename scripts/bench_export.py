"""Time and memory of an export at Phi-3-mini's real sizes, compared with PEFT's merge and with its parts alone.

    python scripts/bench_export.py --scratch FOLDER [--layers 32] [--contenders nf4 original peft-nf4 peft-16bit]

Makes a base of random bf16 weights and an adapter of rank 16 (7.6 GB at 32 layers, written piece by piece), and merges them in
fp16. FOLDER needs disk space for the base and one merged model, and is emptied afterwards. The parts, each alone:

    read      every byte of the base, 4 MiB at a time
    quantize  bitsandbytes quantizes (NF4, double quantization) and dequantizes every linear layer
    write     as many bytes as the merged model has, 4 MiB at a time, flushed to the disk at the end of every shard

"peft-nf4" loads the base in 4 bit, dequantizes it, merges and saves: the same model as ours onto NF4. "peft-16bit" merges onto
the unquantized base. Each contender runs in its own process; files are dropped from the page cache before it starts. Memory is
the rise of the process's peak resident memory over its resident memory after all imports. Linux only.
"""

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from bench_train import processor_name
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import BitsAndBytesConfig, Phi3Config, Phi3ForCausalLM

from qlora_phi3.adapters.adapter_deltas import read_deltas
from qlora_phi3.export.base import RecordedBase, read_record, summarise
from qlora_phi3.export.merge import MergedWeights
from qlora_phi3.export.writer import write_shards
from qlora_phi3.family import read_architecture
from qlora_phi3.model.weights import ROW_CHUNK_BYTES, TensorInfo, open_weights, read_tensor, rows_per_chunk

TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "export.csv"
HIDDEN, INTERMEDIATE, VOCABULARY, RANK = 3072, 8192, 32_064, 16
LINEARS = {
    "self_attn.qkv_proj": (3 * HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_up_proj": (2 * INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
SHARD_BYTES = 4 * 2**30
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "qlora-phi3")
PARTS = ("read", "quantize", "write")


class RandomWeights:
    """Tensors of random weights that exist only while they are written."""

    def __init__(self, info: dict[str, TensorInfo], scale: float) -> None:
        self.info = info
        self.noise = torch.randn(ROW_CHUNK_BYTES, generator=torch.Generator().manual_seed(0)).mul_(scale)

    def iter_row_chunks(self, name: str) -> Iterator[Tensor]:
        """Noise rolled by another distance each time, norms of ones."""
        info = self.info[name]
        step = rows_per_chunk(info)
        for row in range(0, info.shape[0], step):
            shape = (min(step, info.shape[0] - row), *info.shape[1:])
            noise = self.noise.roll(7919 * row + len(name))[: prod(shape)].view(shape)
            yield (noise if len(shape) > 1 else torch.ones_like(noise)).to(info.dtype)


def build_config(layers: int) -> Phi3Config:
    """Phi-3-mini's shapes."""
    return Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        pad_token_id=0,
        torch_dtype="bfloat16",
    )


def linears(layers: int) -> dict[str, tuple[int, int]]:
    """Every linear layer of the decoder and its shape."""
    return {f"model.layers.{number}.{name}": shape for number in range(layers) for name, shape in LINEARS.items()}


def make_input(folder: Path, layers: int) -> None:
    """Write the base, the adapter, and a base.json with empty checksums, which cost the same to compare."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes |= {f"{name}.weight": shape for name, shape in linears(layers).items()}
    plain = [f"model.layers.{n}.{norm}_layernorm.weight" for n in range(layers) for norm in ("input", "post_attention")]
    info = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}
    info |= {name: TensorInfo((HIDDEN,), torch.bfloat16) for name in [*plain, "model.norm.weight"]}
    base, adapter = folder / "base", folder / "adapter"
    write_shards(RandomWeights(info, 0.02), base, SHARD_BYTES)
    build_config(layers).save_pretrained(base)
    kinds = {name: "4bit" if "_proj" in name else "plain" for name in info}
    record = {
        "name": str(base),
        "revision": None,
        "dtype": "bfloat16",
        "quantization": {"quant_type": "nf4", "double_quant": True},
        "device": "cpu",
        "tensors": {name: {"kind": kind, "sha256": "", "codes": "", "mean_absmax": 0.1} for name, kind in kinds.items()},
    }
    (folder / "base.json").write_text(json.dumps(record), encoding="utf-8")
    parts = {}
    for name, (rows, columns) in linears(layers).items():
        parts[f"base_model.model.{name}.lora_A.weight"] = TensorInfo((RANK, columns), torch.float32)
        parts[f"base_model.model.{name}.lora_B.weight"] = TensorInfo((rows, RANK), torch.float32)
    write_shards(RandomWeights(parts, 0.01), adapter, 2**40)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    names = [name.rpartition(".")[2] for name in LINEARS]
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, task_type="CAUSAL_LM").save_pretrained(adapter)


def merge_ours(folder: Path, target: Path, onto: Any) -> None:
    """As `qlora-phi3 export` does it, without the proof."""
    base = RecordedBase(open_weights(folder / "base"), read_record(folder / "base.json"))
    deltas = read_deltas(folder / "adapter", read_architecture(str(folder / "base")))
    merged = MergedWeights(base, deltas, onto=onto, dtype=torch.float16)
    write_shards(merged, target, SHARD_BYTES)
    assert summarise(base.compared).num_tensors == len(merged.info)


def merge_peft(folder: Path, target: Path, *, four_bit: bool) -> None:
    """`merge_and_unload` and `save_pretrained`."""
    scheme = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = Phi3ForCausalLM.from_pretrained(
        folder / "base",
        dtype=torch.bfloat16 if four_bit else torch.float16,
        quantization_config=scheme if four_bit else None,
        device_map={"": "cpu"},
    )
    if four_bit:
        model = model.dequantize(dtype=torch.float16)
    model = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    model.to(torch.float16).save_pretrained(target, max_shard_size=SHARD_BYTES)


def read_all(folder: Path, target: Path) -> None:
    """Part "read"."""
    buffer = bytearray(ROW_CHUNK_BYTES)
    for path in sorted((folder / "base").glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def quantize_all(folder: Path, target: Path) -> None:
    """Part "quantize"; one tensor of each shape is made and used for every layer."""
    layers = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    for shape in LINEARS.values():
        weight = read_tensor(RandomWeights({"x": TensorInfo(shape, torch.bfloat16)}, 0.02), "x")
        for _ in range(layers):
            packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            dequantize_4bit(packed, state)


def write_all(folder: Path, target: Path) -> None:
    """Part "write"."""
    target.mkdir()
    left, data = (
        sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")),
        os.urandom(ROW_CHUNK_BYTES),
    )
    while left:
        size = min(left, SHARD_BYTES)
        with (target / f"{left}.bin").open("wb", buffering=0) as file:
            for start in range(0, size, ROW_CHUNK_BYTES):
                file.write(memoryview(data)[: size - start])
            os.fsync(file.fileno())
        left -= size


CONTENDERS: dict[str, Callable[[Path, Path], None]] = {
    "read": read_all,
    "quantize": quantize_all,
    "write": write_all,
    "nf4": lambda folder, target: merge_ours(folder, target, "nf4"),
    "original": lambda folder, target: merge_ours(folder, target, "original"),
    "peft-nf4": lambda folder, target: merge_peft(folder, target, four_bit=True),
    "peft-16bit": lambda folder, target: merge_peft(folder, target, four_bit=False),
}


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Run one contender in this process."""
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    started, used = time.perf_counter(), time.process_time()
    CONTENDERS[name](folder, folder / "target")
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "memory_after_imports_bytes": before,
        "memory_rise_bytes": _memory("VmHWM") - before,
    }


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run one contender in its own process, on files that are not in the page cache."""
    shutil.rmtree(folder / "target", ignore_errors=True)
    for path in (folder / "base").glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--scratch", str(folder), "--measure", name]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=quiet)
    if finished.returncode:
        return {"failed": (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def append(row: dict[str, Any]) -> None:
    """Add a line to the table."""
    TABLE.parent.mkdir(exist_ok=True)
    is_new = not TABLE.exists()
    with TABLE.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Make the input, run everything, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder on the disk to measure; emptied")
    parser.add_argument("--layers", type=int, default=32)
    merges = [name for name in CONTENDERS if name not in PARTS]
    parser.add_argument("--contenders", nargs="+", choices=merges, default=merges)
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--no-table", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.scratch)))
        return
    folder = arguments.scratch / "bench-export"
    try:
        make_input(folder, arguments.layers)
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        results = {}
        for name in (*PARTS, *arguments.contenders):
            results[name] = run(name, folder)
            print(f"{name:12} {results[name]}", flush=True)
        seconds = {name: result.get("seconds", float("nan")) for name, result in results.items()}
        for name in arguments.contenders:
            parts = sum(seconds[part] for part in PARTS)
            row = {
                "date": date.today().isoformat(),
                "processor": processor_name(),
                "threads": torch.get_num_threads(),
                "layers": arguments.layers,
                "input_bytes": size,
                "contender": name,
                **{key: results[name].get(key, "") for key in ("seconds", "processor_seconds")},
                **{key: results[name].get(key, "") for key in ("memory_after_imports_bytes", "memory_rise_bytes")},
                **{f"{part}_seconds": seconds[part] for part in PARTS},
                "over_parts": round(seconds[name] / parts, 3),
                "failed": results[name].get("failed", ""),
                "versions": " ".join(f"{package}={version(package)}" for package in PACKAGES),
            }
            print(f"{name}: {row['over_parts']} x the parts", flush=True)
            if not arguments.no_table:
                append(row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
