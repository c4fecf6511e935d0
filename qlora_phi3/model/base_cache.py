"""4-bit bases in the user's cache: a later start reads them (2.1 GB for Phi-3-mini) and quantizes nothing (7.6 GB).

An entry is a directory with all tensors of a loaded base, in the layout in which transformers stores a 4-bit checkpoint, and
`entry.json`: what it holds, and the checksum of each file. Its name is the hash of everything that its bits depend on.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import BitsAndBytesConfig

from qlora_phi3 import files
from qlora_phi3.errors import RunError, first_line
from qlora_phi3.model.quantized import FILE_BYTES, describe_device, quantized_tensors
from qlora_phi3.units import GIB, MIB, format_count, format_gib

#: Checkpoints smaller than this are not cached: even a CPU quantizes them in seconds.
MIN_CHECKPOINT_BYTES = 512 * MIB
#: Free space that remains on the disk when an entry has been written.
RESERVE_BYTES = 10 * GIB
#: Entries that are kept; writing one more removes the one that was not used for longest.
MAX_ENTRIES = 3


@dataclass(frozen=True, slots=True)
class BaseCache:
    """The cache entry of one base, whether it exists or not."""

    path: Path
    description: str
    note: Callable[[str], None]  #: Receives one line about the entry.

    def read(self) -> dict[str, Any] | None:
        """The tensors, each read when it is indexed; None with a note where the entry is damaged, and without where none is."""
        if not os.path.lexists(self.path):
            return None
        path, tensors = self.path / files.CACHE_ENTRY_NAME, dict[str, Any]()
        try:
            record = files.read_json_object(path, RunError, "")
            for name, checksum in record["files"].items():
                if files.hash_file(self.path / name) != checksum:
                    raise ValueError(f"the checksum of {name} differs")
                opened: Any = safe_open(self.path / name, framework="pt")
                tensors |= {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - it cannot be iterated
            if len(tensors) != record["tensors"] or not tensors:
                raise ValueError(f"it has {format_count(len(tensors), 'tensor')}")
        except (RunError, OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
            self.note(f"The cached 4-bit base {self.path} is damaged ({first_line(error)}) and is made again.")
            return None
        with suppress(OSError):
            os.utime(path)
        self.note(f"The 4-bit base is read from the cache: {self.path}")
        return tensors

    def write(self, model: nn.Module) -> None:
        """Write the tensors of a base as it was loaded; nothing but a note where the disk is too full or refuses."""
        tensors = {name: parameter.data for name, parameter in model.named_parameters()} | quantized_tensors(model)
        num_bytes, parent = sum(tensor.nbytes for tensor in tensors.values()), self.path.parent
        try:
            with files.disk_errors(self.path), suppress(Timeout):  # Timeout: another process writes it
                parent.mkdir(parents=True, exist_ok=True)
                files.remove_leftovers(parent, older_than_seconds=files.STALE_SECONDS)
                if (free := shutil.disk_usage(parent).free) < num_bytes + RESERVE_BYTES:
                    need = f"it needs {format_gib(num_bytes)}, and {format_gib(RESERVE_BYTES)} stay free"
                    self.note(f"The 4-bit base is not cached: {parent} has {format_gib(free)} free; {need}.")
                    return
                with FileLock(self.path.with_suffix(".lock"), timeout=0), files.atomic_dir(self.path) as staging:
                    save_torch_state_dict(tensors, staging, max_shard_size=FILE_BYTES)
                    checksums = {path.name: files.hash_file(path) for path in sorted(staging.glob("*.safetensors"))}
                    record = {"description": self.description, "tensors": len(tensors), "files": checksums}
                    (staging / files.CACHE_ENTRY_NAME).write_text(json.dumps(record), encoding="utf-8")
                records = sorted(parent.glob(f"*/{files.CACHE_ENTRY_NAME}"), key=lambda path: -path.stat().st_mtime_ns)
                for record_file in records[MAX_ENTRIES:]:
                    files.remove(record_file.parent)
        except RunError as error:
            self.note(f"The 4-bit base is not cached: {error.message}")


def find_base_cache(
    name: str, folder: Path, quantization: BitsAndBytesConfig, device: torch.device, note: Callable[[str], None]
) -> BaseCache | None:
    """The cache entry of a base, None where its checkpoint is so small that none is kept.

    Args:
        name: the recipe's, for people.
        folder: of the checkpoint. In the hub's cache its files are links, and what they lead to is named by its checksum; of
            other files the size and the times decide.
    """
    weights = sorted(folder.glob("model*.safetensors*"))
    if sum(path.stat().st_size for path in weights) < MIN_CHECKPOINT_BYTES:
        return None
    settings, hardware = quantization.to_dict(), describe_device(device)
    parts = {  # with the versions of the code that decides the bits
        "files": {str(path.resolve()): files.file_state(path) for path in (folder / "config.json", *weights)},
        "quantization": settings,
        "device": hardware,
        "versions": [version(library) for library in ("bitsandbytes", "torch", "transformers")],
    }
    key = sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]
    nested = " double" if settings["bnb_4bit_use_double_quant"] else ""
    kind = f"{settings['bnb_4bit_quant_type'].upper()}{nested}, {settings['bnb_4bit_compute_dtype']}"
    return BaseCache(files.user_cache_dir() / files.BASES_DIR / key, f"{name}, {kind}, {hardware}", note)
