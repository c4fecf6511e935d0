"""A loralib checkpoint put onto a model, ready to be trained on with PEFT."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn

from qlora_phi3.adapters.files import read_tensors
from qlora_phi3.adapters.fused import check_layers
from qlora_phi3.adapters.loralib import Spec, read_loralib
from qlora_phi3.adapters.peft_folder import peft_settings, peft_tensors
from qlora_phi3.errors import ExportError


def load_loralib(
    model: nn.Module,
    path: str | Path,
    *,
    alpha: float | Mapping[str, float],
    enable: Mapping[str, Sequence[bool]] | None = None,
    lora_dropout: float = 0.0,
) -> PeftModel:
    """Put a loralib checkpoint onto its base, in 4 bit or not; the adapter is trainable and in fp32.

    Which layers are embeddings or convolutions is seen from the model.

    Args:
        model: the base, without an adapter.
        path: what `torch.save(loralib.lora_state_dict(model), path)` wrote, or the same as safetensors.
        alpha: the layers' lora_alpha, one for all or by name or end of name; loralib's default is 1.
        enable: enable_lora of every MergedLinear, by name or end of name: {"qkv_proj": [True, False, True]}.
        lora_dropout: while training on; the file does not hold it.

    Raises:
        ExportError: the file cannot be read, or does not fit the model.
    """
    path = Path(path)
    if isinstance(model, PeftModel):
        raise ExportError("The model has an adapter already.", "Give the base: model.unload().")
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding | nn.Conv2d)
    }
    spec = Spec(
        alpha=alpha if isinstance(alpha, Mapping) else {"": alpha},
        enable=enable or {},
        embedding=frozenset(name for name, layer in layers.items() if isinstance(layer, nn.Embedding)),
        conv2d=_kernels(layers),
    )
    adapter = read_loralib(read_tensors(path), spec, path)
    check_layers(adapter, {name: _shape(layer) for name, layer in layers.items()}, type(model).__name__, path)
    settings = peft_settings(adapter, all_layers=layers)
    adapted = get_peft_model(model, LoraConfig(**settings, lora_dropout=lora_dropout))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    set_peft_model_state_dict(adapted, peft_tensors(adapter))
    return adapted


def _kernels(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """Kernel sizes of the convolutions that loralib and PEFT can both hold."""
    convolutions = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    return {
        name: layer.kernel_size[0]
        for name, layer in convolutions.items()
        if layer.kernel_size[0] == layer.kernel_size[1] and layer.groups == 1
    }


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) as `Update` counts them."""
    if isinstance(layer, nn.Linear):  # bitsandbytes' as well, whose packed weight has another shape
        return layer.out_features, layer.in_features
    weight = cast(Tensor, layer.weight)
    return (weight.shape[1], weight.shape[0]) if isinstance(layer, nn.Embedding) else (len(weight), weight[0].numel())
