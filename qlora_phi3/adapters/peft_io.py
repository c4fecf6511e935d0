"""The files of adapters: read without running a pickle, written whole or not at all, and only over what may be replaced.

PEFT's LoRA: adapter_config.json and its tensors, to updates and back; what cannot be held is refused by name.

Ranks and alphas are read with their patterns and use_rslora resolved, and written as plain ones: the scaling stays what it was.
"""

import json
import math
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor

from qlora_phi3.adapters.delta import Adapter, Kind, LoraDelta, LowRankBlock, stack
from qlora_phi3.errors import ExportError, disk_error_hint
from qlora_phi3.files import sha256_file

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


def adapter_record(folder: Path) -> dict[str, str]:
    """What a run notes down of the adapter it wrote, so that an export can tell whether it is the same: file -> SHA-256."""
    return {name: sha256_file(folder / name) for name in (WEIGHTS, CONFIG)}


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
            f"{target} cannot be written: {error.strerror or error}.",
            f"{disk_error_hint(error)}, or choose another place.",
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


PREFIX = "base_model.model."


LORA = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)")


#: Starts that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it.
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva", None)


#: Keys of LoraConfig (PEFT 0.21) that are read here or change nothing about what is added to the base.
UNDERSTOOD = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "init_lora_weights", "bias", "modules_to_save", "use_dora", "megatron_core", "qalora_group_size", "eva_config",
}  # fmt: skip


def read_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: object) -> Adapter:
    """The updates of a PEFT LoRA.

    Args:
        tensors: of adapter_model.safetensors.
        config: of adapter_config.json.
        where: the adapter's place, for the messages.

    Raises:
        ExportError: a tensor or a setting that is not understood, named, or shapes that do not fit each other.
    """
    _check_config(config, where)
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    whole = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise ExportError(f"{where}: '{key}' is no name PEFT writes.", f"They begin with {PREFIX}")
        if match := LORA.fullmatch(name):
            layers[match[1]][match[2]] = tensor
        else:
            whole[name] = tensor
    if not layers:
        raise ExportError(f"{where} holds no LoRA matrix.", "Give the folder of a trained LoRA.")
    deltas = {layer: _read_layer(layer, parts, config, where) for layer, parts in layers.items()}
    return Adapter(deltas=deltas, whole=_read_whole(whole, deltas, config, where))


def _check_config(config: Mapping[str, Any], where: object) -> None:
    if str(config.get("peft_type")) != "LORA":
        raise ExportError(f"{where} is a {config.get('peft_type')} adapter.", "Only LoRA can be converted.")
    unknown = sorted(key for key, value in config.items() if key not in UNDERSTOOD and value)
    if unknown:
        raise ExportError(
            f"{where}: {unknown[0]} = {config[unknown[0]]!r} changes what a LoRA is, and the other form cannot hold it.",
            "Merge that adapter instead.",
        )
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        raise ExportError(
            f"{where}: init_lora_weights = {config['init_lora_weights']!r} has changed the base's weights, which the other form "
            "cannot hold.",
            "Save it with PEFT's path_initial_model_for_weight_conversion first.",
        )


def _read_layer(layer: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], where: object) -> LoraDelta:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    missing = [name for name in names if name not in parts]
    if missing:
        raise ExportError(f"{where}: {layer} has no {missing[0]}.", "Copy the adapter again.")
    lora_A, lora_B = (parts[name] for name in names)
    rank, shapes = len(lora_A), f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}"
    kind: Kind = "embedding" if embedding else "linear" if lora_A.dim() == 2 else "conv2d"
    if (
        lora_A.dim() not in (2, 4)
        or lora_B.dim() != lora_A.dim()
        or lora_B.shape[1] != rank
        or lora_B[0, 0].numel() != 1
    ):
        raise ExportError(f"{where}: {layer} has {shapes}, which are no pair.", "Copy the adapter again.")
    if kind == "conv2d" and lora_A.shape[2] != lora_A.shape[3]:
        raise ExportError(f"{where}: {layer} has a kernel that is not square.", "loralib cannot hold it.")
    r, alpha = (
        _resolve(config, layer, *keys) for keys in (("rank_pattern", "r", 8), ("alpha_pattern", "lora_alpha", 8))
    )
    if r != rank:
        raise ExportError(
            f"{where}: adapter_config.json says rank {r} for {layer}, which has {shapes}.", "Mend r there."
        )
    if not alpha > 0:
        raise ExportError(f"{where}: lora_alpha = {alpha} of {layer} adds nothing.", "Mend it in adapter_config.json.")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraDelta(
        out_features=len(lora_B),
        in_features=lora_A[0].numel(),
        blocks=(LowRankBlock(lora_A=lora_A.flatten(1), lora_B=lora_B.flatten(1), scaling=scaling),),
        kind=kind,
        kernel_size=lora_A.shape[-1] if kind == "conv2d" else 1,
        magnitude=parts.get("lora_magnitude_vector"),
    )


def _resolve(config: Mapping[str, Any], layer: str, patterns: str, usual: str, default: float) -> float:
    table = config.get(patterns) or {}
    value: float = table.get(get_pattern_key(list(table), layer), config.get(usual, default))
    return value


def _read_whole(
    whole: Mapping[str, Tensor], deltas: Mapping[str, LoraDelta], config: Mapping[str, Any], where: object
) -> dict[str, Tensor]:
    """Biases, modules_to_save and the copy of an adapted embedding that PEFT adds, by their names in the base."""
    saved, found = config.get("modules_to_save") or [], {}
    for name, tensor in whole.items():
        own = name.replace(".base_layer.", ".")
        layer = own.rpartition(".")[0]
        is_bias = own.endswith(".bias") and config.get("bias", "none") != "none"
        is_copy = own.endswith(".weight") and layer in deltas and deltas[layer].kind == "embedding"
        if not (is_bias or is_copy or any(f".{module}." in f".{name}" for module in saved)):
            raise ExportError(
                f"{where}: nobody knows what '{PREFIX}{name}' is for.", "Save the adapter with PEFT again."
            )
        found[own] = tensor
    return found


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors as PEFT names and shapes them."""
    tensors: dict[str, Tensor] = {}
    for layer, delta in adapter.deltas.items():
        lora_A, lora_B, _ = stack(delta)
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if delta.kind == "embedding"
            else ("lora_A.weight", "lora_B.weight")
        )
        if delta.kind == "conv2d":
            lora_A = lora_A.reshape(len(lora_A), -1, delta.kernel_size, delta.kernel_size)
            lora_B = lora_B[:, :, None, None]
        tensors |= {f"{PREFIX}{layer}.{name}": tensor for name, tensor in zip(names, (lora_A, lora_B), strict=True)}
        if delta.magnitude is not None:
            tensors[f"{PREFIX}{layer}.lora_magnitude_vector"] = delta.magnitude
    for name, tensor in adapter.whole.items():
        layer, _, kind = name.rpartition(".")
        tensors[f"{PREFIX}{layer}.base_layer.{kind}" if layer in adapter.deltas else PREFIX + name] = tensor
    return tensors


def peft_settings(adapter: Adapter, *, all_layers: Iterable[str] = ()) -> dict[str, Any]:
    """The keys of adapter_config.json that the adapter itself decides.

    Args:
        adapter: what will be written.
        all_layers: every layer of the base that could have an update, where that is known: a last name that all its layers
            have in common then stands for them in target_modules. Without it every layer is listed.
    """
    ranks, alphas = {}, {}
    for layer, delta in adapter.deltas.items():
        lora_A, _, scaling = stack(delta)
        ranks[layer] = len(lora_A)
        alphas[layer] = whole_number(scaling * len(lora_A))
    r, rank_pattern = _with_pattern(ranks)
    alpha, alpha_pattern = _with_pattern(alphas)
    biased = [name.rpartition(".")[0] for name in adapter.whole if name.endswith(".bias")]
    return {
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "use_rslora": False,
        "use_dora": any(delta.magnitude is not None for delta in adapter.deltas.values()),
        "target_modules": _target_modules(set(adapter.deltas), set(all_layers)),
        "bias": "none" if not biased else "lora_only" if adapter.deltas.keys() >= set(biased) else "all",
        "init_lora_weights": True,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def whole_number(value: float) -> float:
    """16 for 16.0 and for what rounding left of it."""
    near = round(value)
    return near if abs(value - near) <= 1e-12 * abs(value) else value


def _with_pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and the others by last name where all layers of that name agree, else by layer."""
    common = Counter(values.values()).most_common(1)[0][0]
    by_last = defaultdict(set)
    for layer, value in values.items():
        by_last[last_name(layer)].add(value)
    pattern = {}
    for layer, value in values.items():
        alone = len(by_last[last_name(layer)]) == 1
        if value != common:
            pattern[last_name(layer) if alone else re.escape(layer)] = value
    return common, pattern


def _target_modules(layers: set[str], all_layers: set[str]) -> list[str]:
    names = set()
    for layer in layers:
        alike = {other for other in all_layers if last_name(other) == last_name(layer)}
        names.add(last_name(layer) if alike and alike <= layers else layer)
    return sorted(names)


def last_name(layer: str) -> str:
    """qkv_proj of model.layers.0.self_attn.qkv_proj."""
    return layer.rpartition(".")[2]
