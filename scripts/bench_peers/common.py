"""What every contender of bench_train.py shares: its arguments, the clock of its steps, and the file it leaves.

Imported by scripts that run in different virtual environments, so nothing here imports more than it must.
Sizes are bytes, durations seconds.
"""

import argparse
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: The libraries whose versions decide a figure.
LIBRARIES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "unsloth", "unsloth_zoo",
    "qlora-phi3",
)  # fmt: skip


def argument_parser() -> argparse.ArgumentParser:
    """What bench_train.py passes to every contender."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, required=True, help="model folder")
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines of input_ids and labels, in order")
    parser.add_argument("--adapter", type=Path, help="initial LoRA adapter, loaded before the first step")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, required=True, help="empty folder for whatever the tool writes")
    parser.add_argument("--quantization", choices=("nf4", "none"), required=True)
    parser.add_argument("--compute", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--checkpointing", choices=("on", "off", "auto"), required=True)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--core", type=int, help="without a GPU: run on this core only, where the system can")
    parser.add_argument("--gpu-gib", type=float, help="train on the GPU, and take so much of it at most")
    return parser


def pin(arguments: argparse.Namespace) -> None:
    """Bind the process to its core, where it does not train on the GPU."""
    if not arguments.gpu_gib and arguments.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {arguments.core})


def read_arguments() -> argparse.Namespace:
    """A contender's arguments; the process is pinned to its core."""
    arguments = argument_parser().parse_args()
    pin(arguments)
    return arguments


def limit_torch(arguments: argparse.Namespace) -> None:
    """Let torch take one thread, or its share of the GPU."""
    import torch

    if not arguments.gpu_gib:
        torch.set_num_threads(1)
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.gpu_gib * 2**30 / total))


def device_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a peer's SFTConfig has on a CPU: a step's rows at once; and on a GPU: one row at once, 8-bit AdamW."""
    if not arguments.gpu_gib:
        return {"use_cpu": True, "optim": "adamw_torch", "per_device_train_batch_size": arguments.batch_size}
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": arguments.batch_size}
    return {"optim": "adamw_8bit", **batch}


def read_rows(path: Path) -> list[dict[str, list[int]]]:
    """Read the rows all contenders train on: `input_ids` and `labels` (-100 where unsupervised)."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def peak_memory_bytes(*, on_gpu: bool) -> int:
    """The process's high-water mark of resident memory since it started, imports and loading included; or that of what torch's
    allocator reserved on the GPU.
    """
    if on_gpu:
        import torch

        return torch.cuda.max_memory_reserved()
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def step_clock(arguments: argparse.Namespace) -> Any:
    """A TrainerCallback whose `steps` holds wall seconds, processor seconds, loss and gradient norm of every step."""
    from transformers import TrainerCallback

    on_gpu = bool(arguments.gpu_gib)

    def wait_for_gpu() -> None:
        if on_gpu:
            import torch

            torch.cuda.synchronize()

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []
            self.peak_before_training_bytes = self.peak_bytes = 0

        def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.peak_before_training_bytes = peak_memory_bytes(on_gpu=on_gpu)

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            wait_for_gpu()
            self._wall, self._cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            wait_for_gpu()
            self.peak_bytes = max(self.peak_bytes, peak_memory_bytes(on_gpu=on_gpu))  # a program may reset the GPU's
            self.steps.append({"step_seconds": time.perf_counter() - self._wall, "cpu_seconds": time.process_time() - self._cpu})

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any], **_kwargs: Any) -> None:
            if "loss" in logs and self.steps:
                self.steps[state.global_step - 1] |= {"loss": logs["loss"], "grad_norm": float(logs["grad_norm"])}

    return StepClock()


def load_initial_adapter(model: Any, folder: Path | None) -> None:
    """Copy a saved adapter's weights into a PEFT model in place, and say how many tensors found their place."""
    if folder is None:
        return
    import torch
    from safetensors.torch import load_file

    saved = load_file(str(folder / "adapter_model.safetensors"))
    own = {name.replace(".default.", "."): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)
    print(f"initial adapter: {len(saved)} tensors copied")


def write_result(arguments: argparse.Namespace, contender: str, clock: Any) -> None:
    """Write the contender's JSON: settings, versions, steps and the peak of the whole process."""
    result = {
        "contender": contender,
        "quantization": arguments.quantization,
        "compute": arguments.compute,
        "checkpointing": arguments.checkpointing,
        "steps": clock.steps,
        "peak_memory_bytes": max(clock.peak_bytes, peak_memory_bytes(on_gpu=bool(arguments.gpu_gib))),
        "peak_before_training_bytes": clock.peak_before_training_bytes,
        "versions": {name: found for name in LIBRARIES if (found := version_of(name))},
    }
    arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


def version_of(library: str) -> str | None:
    """An installed library's version, or None."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None
