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
from qlora_phi3.recipe.edit import format_toml
from qlora_phi3.recipe.schema import Lora

#: Keys of [lora] that decide which tensors an adapter has and by what they are scaled, with PEFT's defaults.
SETTINGS: dict[str, Any] = {
    "r": 8, "lora_alpha": 8, "use_rslora": False, "use_dora": False, "bias": "none", "modules_to_save": [],
}  # fmt: skip
#: Keys of [lora] that decide which layers have an adapter.
LAYER_KEYS = ("layers_to_transform", "exclude_modules", "target_modules")


def check_start(place: Path, table: Lora, architecture: Architecture) -> None:
    """Check an adapter, in a PEFT directory or a run's, before anything is loaded: ExportError where there is none, it is no
    plain LoRA, or a setting or a shape is not that of [lora] or of the base.
    """
    folder = peft_io.find_adapter(place)
    config, where = peft_io.read_config(folder), f"[model] adapter: {folder}"
    peft_io.check_config(config, where)
    # With patterns, ranks and scalings are compared layer by layer, in `start_from`.
    has_patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    for key in ("bias", "modules_to_save") if has_patterns else SETTINGS:
        trained, wanted = config.get(key) or SETTINGS[key], getattr(table, key) or SETTINGS[key]
        if trained != wanted and not (isinstance(trained, list) and sorted(trained) == sorted(wanted)):
            problem = f"{where} was trained with {key} = {format_toml(trained)}, and [lora] has {format_toml(wanted)}."
            raise ExportError(problem, _describe_settings(config))
    tensors = peft_io.read_shapes(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # PEFT saves both after a change of the vocabulary
        tensor = tensors.get(peft_io.PREFIX + name)
        if tensor is not None and tensor.shape[:1] != (vocabulary := architecture.vocab_size,):
            rows = tensor.shape[:1].numel()
            raise ExportError(
                f"{where} was trained with another vocabulary: {name} has {rows:,} rows, and this base {vocabulary:,}.",
                "Use the base whose vocabulary was resized in the same way.",
            )
    adapter = peft_io.read_peft(tensors, config, where)
    _check_layers(where, config, table, architecture, frozenset(adapter.deltas))
    for name, shape in layer_shapes(architecture, fused=True).items():
        if name in adapter.deltas and adapter.deltas[name].shape != shape:
            (rows, columns), trained = adapter.deltas[name].shape, config.get("base_model_name_or_path") or "another base"
            raise ExportError(
                f"{where}: {name} is {rows} x {columns} (out x in), and in this base it is {shape[0]} x {shape[1]}.",
                f"It was trained on {trained}: use that one.",
            )


def _check_layers(where: str, config: Mapping[str, Any], table: Lora, architecture: Architecture, found: frozenset[str]) -> None:
    """Compare the layers that have an adapter with those of [lora], and name the setting that differs."""
    if parts := sorted(name for name in found if last_name(name) in FUSED):
        fix = f"Convert it: qlora-phi3 adapter convert {where.partition(': ')[2]} NEW --to fused"
        raise ExportError(f"{where} has {parts[0]}, which Phi-3 has fused with others.", fix)
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
            trained = config.get(key)
            shown = ["unset" if value is None else format_toml(value) for value in (trained, wanted[key])]
            change = f"Write {key} = {shown[0]}." if trained else f"Delete {key}."
            raise ExportError(f"{where} was trained with {key} = {shown[0]}, and [lora] has {shown[1]}.", change)
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


def start_from(model: PeftModel, place: Path) -> str:
    """Replace the values of a new adapter by those of a trained one, in a PEFT directory or a run's. Returns the name of the base
    that it was trained on; empty where its config does not name one. ExportError where it cannot be read, or its tensors, shapes
    or scalings differ from the new one's.
    """
    folder = peft_io.find_adapter(place)
    tensors, config = peft_io.read_weights(folder), peft_io.read_config(folder)
    hint = _describe_settings(config)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in (*expected, *tensors):
        found, wanted = (tuple(each[name].shape) if name in each else "none" for each in (tensors, expected))
        if found != wanted:
            raise ExportError(f"[model] adapter: {folder} has {name} of shape {found}, [lora] has {wanted}.", hint)
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
    keys = (*SETTINGS, "rank_pattern", "alpha_pattern")
    settings = ", ".join(f"{key} = {format_toml(config[key])}" for key in keys if config.get(key) and config[key] != "none")
    return f"Write what it was trained with: {settings}."
