"""The LoRA update of a linear layer in one matmul on top of the base's output.

PEFT clones the base's output, scales the update and adds it: three passes over (tokens, out_features) that `addmm` does not
need. The scale goes onto the rank-sized tensor instead. Everything else of PEFT's layer stays as it is.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear


def fuse_updates(model: nn.Module, adapter: str = "default") -> None:
    """Let every plain LoRA layer of a PEFT model add its update by `addmm`.

    Layers with dropout, DoRA or a bias on B keep PEFT's own forward, and so does every call with adapters disabled or merged.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_plain(layer, adapter):
            layer.forward = _AddUpdate(layer, adapter)


def _is_plain(layer: Any, adapter: str) -> bool:
    return (
        isinstance(layer.get_base_layer(), nn.Linear)
        and adapter in layer.lora_A
        and adapter not in layer.lora_variant
        and isinstance(layer.lora_dropout[adapter], nn.Identity)
        and layer.lora_B[adapter].bias is None
    )


class _AddUpdate:
    """A layer's forward: base(x) + scaling * B(A(x))."""

    def __init__(self, layer: Any, adapter: str) -> None:
        self.layer, self.adapter = layer, adapter
        self.peft_forward = layer.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        layer = self.layer
        down, up = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight
        same_dtype = x.dtype == down.dtype or torch.is_autocast_enabled(x.device.type)
        if (
            args
            or kwargs
            or layer.disable_adapters
            or layer.merged
            or layer.active_adapters != [self.adapter]
            or not same_dtype
        ):
            output: Tensor = self.peft_forward(x, *args, **kwargs)
            return output
        base: Tensor = layer.base_layer(x)
        narrow = linear(x, down) * layer.scaling[self.adapter]
        return torch.addmm(base.flatten(0, -2), narrow.flatten(0, -2), up.T).view_as(base)
