"""The files of adapters: read without running a pickle, written whole or not at all, and only over what may be replaced."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor

from qlora_phi3.errors import ExportError, mend

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
#: Where people's training scripts put the state dict in what they save; the first is that of loralib's own GPT-2 example.
NESTED = ("model_state_dict", "state_dict")
#: Copied byte for byte wherever an adapter or an export goes. config.json is among them: without it beside them transformers 5
#: reads the same tokenizer files as another class, which gives other ids.
TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adapter_record(folder: Path) -> dict[str, str]:
    """What a run notes down of the adapter it wrote, so that an export can tell whether it is the same: file -> SHA-256."""
    return {name: file_checksum(folder / name) for name in (WEIGHTS, CONFIG)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of one that torch.save wrote, by name, on the CPU.

    Raises:
        ExportError: there is no such file, it is cut, it holds more than tensors, or a tensor is no number somewhere.
    """
    if not path.is_file():
        raise ExportError(f"There is no file {path}.", "Check the name.")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ExportError(
                f"{path}: '{name}' is no tensor but {type(tensor).__name__}.",
                "Save the state dict alone: torch.save(loralib.lora_state_dict(model), path).",
            )
        if not tensor.is_floating_point():
            raise ExportError(f"{path}: '{name}' holds {tensor.dtype}, not floating-point numbers.", "Save it again.")
        if not torch.isfinite(tensor).all():
            raise ExportError(
                f"{path}: '{name}' holds NaN or infinity.", "That training went wrong: take an earlier checkpoint."
            )
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} cannot be read as safetensors: {error}.", "Copy or download it again.") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ExportError(
            f"{path} is refused: it is a pickle that holds more than tensors (or no pickle at all), and opening one can run "
            "any program.",
            "Save the state dict alone, torch.save(loralib.lora_state_dict(model), path), or as safetensors.",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise ExportError(f"{path} cannot be read: {reason}.", "Copy it again; it may have been cut.") from error
    inner = next((content[key] for key in NESTED if key in content), content) if isinstance(content, dict) else content
    if not isinstance(inner, dict):
        raise ExportError(
            f"{path} holds a {type(inner).__name__}, not a state dict.",
            "Save one: torch.save(loralib.lora_state_dict(model), path).",
        )
    return inner


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a PEFT folder; ExportError where there is none or it is no JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        raise ExportError(f"{folder} holds no {CONFIG}.", "Give the folder of a PEFT adapter, or a run's folder.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is not JSON: {error}.", "Copy it again.") from error
    if not isinstance(config, dict):
        raise ExportError(f"{path} holds no JSON object.", "Copy it again.")
    return config


def find_adapter(path: Path) -> Path:
    """The PEFT folder meant: the one given, or the `adapter` of a run's folder; ExportError where it is neither."""
    if not path.exists():
        raise ExportError(f"There is no {path}.", "Check the name.")
    if path.is_file():
        raise ExportError(
            f"{path} is a file, and a PEFT adapter is a folder.",
            "From loralib: qlora-phi3 adapter convert FILE NEW --to peft --alpha ALPHA",
        )
    if not (path / CONFIG).is_file() and (path / "adapter" / CONFIG).is_file():
        return path / "adapter"
    return path


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT folder; safetensors are taken before an old adapter_model.bin."""
    pickled = folder / PICKLED_WEIGHTS
    return read_tensors(pickled if pickled.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS)


def check_target(source: Path, target: Path, *, force: bool, is_folder: bool = True) -> None:
    """Refuse a target that would damage something, before any work is done.

    Raises:
        ExportError: it exists and `force` is not set, is of the other kind or no adapter, lies in the source, or the source lies
            in it.
    """
    if target.name in ("", ".."):
        raise ExportError(f"{target} is no name for something new.", "Name a new folder or file.")
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise ExportError(f"{target} lies inside {source}, which is read.", "Choose another place.")
    if inner in outer.parents:
        raise ExportError(f"{target} holds {source}, which is read.", "Choose another place.")
    if not target.exists():
        return
    if is_folder and target.is_file():
        raise ExportError(f"{target} is a file, and a PEFT adapter is a folder.", "Name a new folder.")
    if not is_folder and target.is_dir():
        raise ExportError(f"{target} is a folder, and a loralib state dict is a file.", "Name a file that ends in .pt.")
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise ExportError(f"{target} is a folder that holds something else than an adapter.", "Choose another place.")
    if not force:
        raise ExportError(f"{target} is there already.", "Choose another place, or replace it with --force.")


@contextmanager
def drafted(target: Path) -> Iterator[Path]:
    """A neighbour of the target to write to, which takes its place at the end; whatever fails, it is gone and the target stands.

    Raises:
        ExportError: the disk is full or refuses.
    """
    draft, old = (target.with_name(f".{target.name}.{word}") for word in ("partial", "replaced"))
    try:
        _remove(draft)
        target.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        _flush(draft)
        if target.exists():
            _remove(old)
            target.replace(old)
        draft.replace(target)
        _remove(old)
    except OSError as error:
        raise ExportError(
            f"{target} cannot be written: {error.strerror or error}.", f"{mend(error)}, or choose another place."
        ) from error
    finally:
        if old.exists() and not target.exists():
            old.replace(target)
        _remove(draft)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(draft: Path) -> None:
    for path in [draft] if draft.is_file() else sorted(draft.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def write_folder(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], beside: Path | None) -> None:
    """Write a PEFT folder; from `beside` tokenizer files and config.json are taken along."""
    folder.mkdir()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (folder / WEIGHTS).write_bytes(as_safetensors(contiguous, metadata={"format": "pt"}))
    text = json.dumps(dict(config), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8", newline="\n")
    for name in TOKENIZER_FILES if beside else ():
        if beside and (beside / name).is_file():
            shutil.copyfile(beside / name, folder / name)


def write_state_dict(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write plain tensors with torch.save, as loralib's users do."""
    buffer = BytesIO()  # torch's own writer tells of a full disk as an error of its zip archive
    torch.save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, buffer)
    path.write_bytes(buffer.getbuffer())
