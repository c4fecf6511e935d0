"""A trained adapter as the start of another run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from qlora_phi3.adapters.peft_io import PREFIX, find_adapter, read_config, read_peft, read_weights
from qlora_phi3.errors import ExportError
from qlora_phi3.recipe.schema import Lora

#: Layers of models whose projections are apart.
PARTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


SWITCHES = ("use_rslora", "use_dora")


#: Keys of [lora] that decide which tensors an adapter has and how strong they are.
SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")


def check_start(place: Path, table: Lora) -> None:
    """What can be told of an adapter before anything is loaded.

    Raises:
        ExportError: there is none, its projections are apart, or its settings are not the table's.
    """
    if not place.exists():
        raise ExportError(f"[model] adapter: There is no folder {place}.", "Give a run's folder, or an adapter's.")
    folder = find_adapter(place)
    config = read_config(folder)
    targets = config.get("target_modules") or ()
    parts = [
        part for part in PARTS if not isinstance(targets, str) and part in {name.rpartition(".")[2] for name in targets}
    ]
    if parts:
        raise ExportError(
            f"[model] adapter: {folder} has {parts[0]}, which Phi-3 has fused with others.",
            f"Convert it: qlora-phi3 adapter convert {folder} NEW --to fused",
        )
    for key in () if config.get("rank_pattern") or config.get("alpha_pattern") else ("r", "lora_alpha", *SWITCHES):
        given, wanted = config.get(key) or False, getattr(table, key)
        if given != wanted:
            raise _differs(f"was trained with {key} = {given}, and [lora] says {wanted}", config, folder)


def start_from(model: PeftModel, place: Path) -> str:
    """Put a trained adapter's values in place of a fresh one's.

    Args:
        model: with a fresh adapter, as its [lora] table says.
        place: a PEFT folder, or a run's.

    Returns:
        The name of the base that it was trained on; empty where it does not say.

    Raises:
        ExportError: it cannot be read, or has other tensors or another strength than the fresh one.
    """
    folder = find_adapter(place)
    tensors, config = read_weights(folder), read_config(folder)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    _check_tensors(tensors, expected, config, folder)
    _check_strength(model, tensors, config, folder)
    with torch.no_grad():
        set_peft_model_state_dict(model, tensors)
    return str(config.get("base_model_name_or_path") or "")


def _check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> None:
    for name, tensor in expected.items():
        if name not in tensors:
            raise _differs(f"has no {name}, which [lora] asks for", config, folder)
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, and [lora] asks for {tuple(tensor.shape)}"
            raise _differs(f"has {name} of shape {shapes}", config, folder)
    more = sorted(tensors.keys() - expected.keys())
    if more:
        raise _differs(f"has {more[0]}, for which [lora] leaves no place", config, folder)


def _check_strength(model: PeftModel, tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    deltas = read_peft(tensors, config, folder).deltas
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            (block,), fresh = deltas[name.removeprefix(PREFIX)].blocks, layer.scaling["default"]
            if block.scaling != fresh:
                raise _differs(f"scales {name} by {block.scaling:g}, and [lora] by {fresh:g}", config, folder)


def _differs(how: str, config: Mapping[str, Any], folder: Path) -> ExportError:
    written = ", ".join(f"{key} = {config[key]}" for key in SETTINGS if config.get(key))
    return ExportError(f"[model] adapter: {folder} {how}.", f"Write what it was trained with: {written}.")
