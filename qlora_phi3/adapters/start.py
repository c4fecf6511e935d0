"""A trained adapter as the start of another run ([model] adapter)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from qlora_phi3.adapters import peft_io
from qlora_phi3.adapters.delta import last_name
from qlora_phi3.errors import ExportError
from qlora_phi3.family import FUSED, Architecture, layer_shapes
from qlora_phi3.model.weights import open_file
from qlora_phi3.recipe.edit import format_toml
from qlora_phi3.recipe.schema import Lora

#: Keys of [lora] that decide which tensors an adapter has and by what they are scaled.
SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
#: Keys of [lora] that decide which layers have an adapter.
LAYER_KEYS = ("layers_to_transform", "exclude_modules", "target_modules")


def check_start(place: Path, table: Lora, architecture: Architecture) -> None:
    """Check an adapter, in a PEFT directory or a run's, before anything is loaded: ExportError where there is none, it is no
    plain LoRA, or a setting or a shape is not that of [lora] or of the base.
    """
    folder = peft_io.find_adapter(place)
    config, path = peft_io.read_config(folder), folder / peft_io.ADAPTER_WEIGHTS
    if path.is_file():  # of safetensors only the header is read
        shapes = {name: info.shape for name, info in open_file(path, error=ExportError).info.items()}
    else:
        shapes = {name: tuple(tensor.shape) for name, tensor in peft_io.read_weights(folder).items()}
    where = f"[model] adapter: {folder}"
    peft_io.check_config(config, where, also_understood=("ensure_weight_tying",))
    if not config.get("rank_pattern") and not config.get("alpha_pattern"):  # else compared layer by layer, in `start_from`
        for key in ("r", "lora_alpha", "use_rslora", "use_dora"):
            trained, wanted = config.get(key) or False, getattr(table, key)
            if trained != wanted:
                problem = f"{where} was trained with {key} = {trained}, and [lora] has {wanted}."
                raise ExportError(problem, _describe_settings(config))
    for key, default in (("bias", "none"), ("modules_to_save", [])):
        trained, wanted = config.get(key) or default, getattr(table, key) or default
        if sorted(trained) != sorted(wanted):
            raise _other_setting(where, key, trained, wanted)
    names = {match[1]: name for name in shapes if (match := peft_io.LORA_TENSOR.fullmatch(name.removeprefix(peft_io.PREFIX)))}
    _check_layers(where, config, table, architecture, frozenset(names))
    for name, shape in shapes.items():
        _check_tensor(where, config, architecture, name.removeprefix(peft_io.PREFIX), shape)


def _check_layers(where: str, config: Mapping[str, Any], table: Lora, architecture: Architecture, found: frozenset[str]) -> None:
    """Compare the layers that have an adapter with those of [lora], and name the setting that differs."""
    if parts := sorted(name for name in found if last_name(name) in FUSED):
        hint = f"Convert it: qlora-phi3 adapter convert {where.partition(': ')[2]} NEW --to fused"
        raise ExportError(f"{where} has {parts[0]}, which Phi-3 has fused with others.", hint)
    if special := sorted(name for name in found if last_name(name) in ("embed_tokens", "lm_head")):
        hint = "Start from an adapter of the linear layers; an embedding or a head is trained in full by modules_to_save."
        raise ExportError(f"{where} has a LoRA on {special[0]}, which is not trained here.", hint)
    shapes = layer_shapes(architecture, fused=True)
    layers = [name for name in shapes if last_name(name) not in ("embed_tokens", "lm_head")]
    wanted = {key: getattr(table, key) for key in LAYER_KEYS}
    if _covered(wanted, layers) == found:
        return
    for key in LAYER_KEYS:
        if _covered({**wanted, key: config.get(key)}, layers) == found:
            raise _other_setting(where, key, config.get(key), wanted[key])
    differing = sorted(found ^ _covered(wanted, layers))
    count = f"{len(found)} layers, [lora] on this base {len(_covered(wanted, layers))}"
    trained = ", ".join(f"{key} = {format_toml(config[key])}" for key in LAYER_KEYS if config.get(key) is not None)
    raise ExportError(f"{where} has {count}; the first that differs is {differing[0]}.", f"It was trained with {trained}.")


def _covered(settings: Mapping[str, Any], layers: Sequence[str]) -> frozenset[str]:
    """The layers that PEFT gives an adapter with these settings."""
    targets = settings["target_modules"]
    if targets == "all-linear":
        targets = sorted({last_name(name) for name in layers})
    config = SimpleNamespace(**{**settings, "target_modules": targets or (), "target_parameters": None})
    return frozenset(name for name in layers if check_target_module_exists(config, name))


def _check_tensor(where: str, config: Mapping[str, Any], architecture: Architecture, name: str, shape: tuple[int, ...]) -> None:
    """Compare a tensor of the adapter with the base: its columns or rows, or that [lora] trains it in full."""
    match = peft_io.LORA_TENSOR.fullmatch(name)
    layer = match[1] if match else name.rpartition(".")[0].removesuffix(".base_layer")
    base = layer_shapes(architecture, fused=True).get(layer)
    if match and base:
        side = {"lora_A.weight": shape[-1:] == base[1:], "lora_B.weight": shape[:1] == base[:1]}
        if side.get(match[2], True):
            return
        trained = config.get("base_model_name_or_path") or "another base"
        problem = f"{where} has {name} of shape {shape}, and that layer is {base[0]} x {base[1]} (out x in) in this base."
        raise ExportError(problem, f"It was trained on {trained}: use that one.")
    saved = last_name(layer) in (config.get("modules_to_save") or ())
    if last_name(layer) in ("embed_tokens", "lm_head") and shape[:1] != (architecture.vocab_size,):
        problem = f"{where} was trained with another vocabulary: {name} has {shape[0] if shape else 0:,} rows"
        hint = "Use the base whose vocabulary was resized in the same way."
        raise ExportError(f"{problem}, and this base {architecture.vocab_size:,}.", hint)
    if not saved and not name.endswith(".bias"):
        hint = "Save the adapter again with save_embedding_layers=False." if base else "Save the adapter with PEFT again."
        raise ExportError(f"{where} has {name}, for which [lora] has no place.", hint)


def _other_setting(where: str, key: str, trained: Any, wanted: Any) -> ExportError:
    hint = f"Delete {key}." if trained in (None, []) else f"Write {key} = {format_toml(trained)}."
    shown = [format_toml(value) if value is not None else "unset" for value in (trained, wanted)]
    return ExportError(f"{where} was trained with {key} = {shown[0]}, and [lora] has {shown[1]}.", hint)


def start_from(model: PeftModel, place: Path) -> str:
    """Replace the values of a new adapter by those of a trained one, in a PEFT directory or a run's. Returns the name of the base
    that it was trained on; empty where its config does not name one. ExportError where it cannot be read, or its tensors, shapes
    or scalings differ from the new one's.
    """
    folder = peft_io.find_adapter(place)
    tensors, config = peft_io.read_weights(folder), peft_io.read_config(folder)
    hint = _describe_settings(config)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, tensor in expected.items():
        if name not in tensors:
            raise ExportError(f"[model] adapter: {folder} has no {name}, which [lora] requires.", hint)
        if tensors[name].shape != tensor.shape:
            found, wanted = tuple(tensors[name].shape), tuple(tensor.shape)
            raise ExportError(f"[model] adapter: {folder} has {name} of shape {found}, [lora] has {wanted}.", hint)
    more = sorted(tensors.keys() - expected.keys())
    if more:
        raise ExportError(f"[model] adapter: {folder} has {more[0]}, for which [lora] has no place.", hint)
    deltas = peft_io.read_peft(tensors, config, folder).deltas
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            trained, own = deltas[name.removeprefix(peft_io.PREFIX)].block.scaling, layer.scaling["default"]
            if trained != own:
                raise ExportError(f"[model] adapter: {folder} scales {name} by {trained:g}, [lora] by {own:g}.", hint)
    with torch.no_grad():
        set_peft_model_state_dict(model, tensors)
    return str(config.get("base_model_name_or_path") or "")


def _describe_settings(config: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} = {config[key]}" for key in SETTINGS if config.get(key))
    return f"Write what it was trained with: {settings}."
