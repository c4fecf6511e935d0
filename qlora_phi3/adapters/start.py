"""A trained adapter as the start of another run ([model] adapter)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from qlora_phi3.adapters.peft_io import PREFIX, find_adapter, last_name, read_config, read_peft, read_weights
from qlora_phi3.errors import ExportError
from qlora_phi3.family import FUSED
from qlora_phi3.recipe.schema import Lora

#: Keys of [lora] that decide which tensors an adapter has and by what they are scaled.
SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")


def check_start(place: Path, table: Lora) -> None:
    """Check an adapter, in a PEFT directory or a run's, against [lora] before anything is loaded.

    Raises:
        ExportError: there is no adapter, its projections are split, or its settings are not those of the table.
    """
    folder = find_adapter(place)
    config = read_config(folder)
    targets = config.get("target_modules") or ()
    names = set() if isinstance(targets, str) else {last_name(name) for name in targets}  # a string is a pattern
    parts = [part for part in FUSED if part in names]
    if parts:
        hint = f"Convert it: qlora-phi3 adapter convert {folder} NEW --to fused"
        raise ExportError(f"[model] adapter: {folder} has {parts[0]}, which Phi-3 has fused with others.", hint)
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        return  # compared layer by layer, in `start_from`
    for key in ("r", "lora_alpha", "use_rslora", "use_dora"):
        trained, wanted = config.get(key) or False, getattr(table, key)
        if trained != wanted:
            problem = f"[model] adapter: {folder} was trained with {key} = {trained}, and [lora] has {wanted}."
            raise ExportError(problem, _describe_settings(config))


def start_from(model: PeftModel, place: Path) -> str:
    """Replace the values of a new adapter by those of a trained one, in a PEFT directory or a run's.

    Returns:
        The name of the base that the adapter was trained on; empty where its config does not name one.

    Raises:
        ExportError: it cannot be read, or its tensors, shapes or scalings differ from the new one's.
    """
    folder = find_adapter(place)
    tensors, config = read_weights(folder), read_config(folder)
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
    deltas = read_peft(tensors, config, folder).deltas
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            trained, own = deltas[name.removeprefix(PREFIX)].block.scaling, layer.scaling["default"]
            if trained != own:
                raise ExportError(f"[model] adapter: {folder} scales {name} by {trained:g}, [lora] by {own:g}.", hint)
    with torch.no_grad():
        set_peft_model_state_dict(model, tensors)
    return str(config.get("base_model_name_or_path") or "")


def _describe_settings(config: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} = {config[key]}" for key in SETTINGS if config.get(key))
    return f"Write what it was trained with: {settings}."
