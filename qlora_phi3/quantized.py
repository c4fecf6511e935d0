"""A 4-bit base on the disk, in bitsandbytes' own form, so that an export can take the very bits a run was trained on."""

import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from qlora_phi3.errors import RunError, mend

#: A file's tensors are brought into memory at once when it is written.
_FILE_BYTES = 256 * 2**20


def save_quantized(model: nn.Module, folder: Path) -> None:
    """Write every 4-bit weight of a model, under the names of the base's checkpoint, into safetensors with an index.

    Each is stored as transformers stores it: `x.weight` (n / 2, 1) uint8, `x.weight.absmax`, `x.weight.quant_map`, with double
    quantization `x.weight.nested_absmax` and `x.weight.nested_quant_map`, and `x.weight.quant_state.bitsandbytes__nf4`.

    Args:
        model: the base, with or without an adapter.
        folder: whole afterwards, or as it was before.

    Raises:
        RunError: the disk is full or refuses.
    """
    draft = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_torch_state_dict(_stored(model), draft, max_shard_size=_FILE_BYTES)
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise RunError(f"The 4-bit base cannot be kept in {folder}: {error}.", f"{mend(error)}.") from error


def _stored(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, weight in quantized_weights(model).items():
        tensors[name] = weight.data
        for part, tensor in weight.quant_state.as_dict(packed=True).items():
            # What layers share (quant_map) would be stored for the first of them only.
            tensors[f"{name}.{part}"] = tensor.clone() if part.endswith("quant_map") else tensor
    return tensors


def quantized_weights(model: nn.Module) -> dict[str, Any]:
    """Every `Params4bit` of a base, with or without an adapter, under its name in the base's checkpoint."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in base.named_parameters()
        if isinstance(parameter, bnb.nn.Params4bit)
    }
