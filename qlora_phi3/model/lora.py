"""The LoRA adapter: attached to the base, checked against it, and computed in one fused matmul.

PEFT ignores a name that matches nothing. We raise, and report the share of the linear weights that the adapter covers. PEFT
clones the base's output, scales the update and adds it: three passes over (tokens, out_features), which `addmm` does not need.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from qlora_phi3.errors import ModelError, first_line
from qlora_phi3.model.layer import LinearWithLora, read_lora, read_loras, square_rows
from qlora_phi3.model.phi3 import PackedPhi3ForCausalLM
from qlora_phi3.model.weights import Weights, read_tensor
from qlora_phi3.recipe.schema import Lora


def attach_adapter(model: PackedPhi3ForCausalLM, config: Lora) -> PeftModel:
    """Attach a fresh LoRA adapter in fp32 to the base; ModelError where PEFT refuses it, and as `check_targets`."""
    check_targets(model, config)
    settings = config.model_dump(exclude_none=True)
    if config.init_lora_weights == "loftq":
        settings["init_lora_weights"] = True  # `start_from_quantization_error` follows; to PEFT it is a plain LoRA
    if config.layers_to_transform is not None and config.target_modules == "all-linear":
        # PEFT 0.21 accepts "all-linear" only for all layers.
        settings["target_modules"] = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
    try:
        with patch.object(DoraLinearLayer, "update_layer", _start_magnitude):
            adapted = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=True)
    except ValueError as error:
        raise ModelError(f"PEFT refuses the [lora] table: {first_line(error)}.", "Correct [lora] target_modules.") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in adapted.modules():
        lora = read_lora(layer)
        if lora is not None and lora.magnitude is not None:
            layer.register_buffer("row_squares", square_rows(lora.dequantize()), persistent=False)
    fuse_lora_forward(adapted)
    return adapted


@torch.no_grad()
def _start_magnitude(layer: Any, *, base_layer: Any, lora_A: Tensor, lora_B: Tensor, scaling: float, **_: Any) -> None:
    """Set DoRA's magnitude to the length of every row of W + s B A, as the forward pass computes it: its factor is 1.

    PEFT 0.21 copies the base's layer and adds B A to its weight, in four times the memory of W.
    """
    lora = LinearWithLora(base_layer, lora_A, lora_B, scaling, 0.0, None, None)
    weight = lora.dequantize()
    lora = replace(lora, row_squares=square_rows(weight))
    layer.weight = nn.Parameter(lora.row_norms(weight, lora_A.to(weight.dtype), lora_B.to(weight.dtype)))


@torch.no_grad()
def start_from_quantization_error(model: PeftModel, originals: Weights) -> None:
    """LoftQ, one round: make the update of each 4-bit layer the best one of its rank for what quantization changed.

    The base stays as it is, so that the adapter is an ordinary LoRA on it. PEFT's `replace_lora_weights_loftq` needs CUDA, and
    leaves the layer's scaling out. The decomposition is that of Halko et al., with q = 2r and 4 iterations, on the CPU.

    Args:
        originals: the unquantized weights, by the base's names.
    """
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or not hasattr(weight := layer.get_base_layer().weight, "quant_state"):
            continue
        quantized = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        error = read_tensor(originals, f"{name}.weight").float() - quantized.float().cpu()
        rank, scaling = layer.r["default"], layer.scaling["default"]
        left, values, right = torch.svd_lowrank(error, q=min(2 * rank, *error.shape), niter=4)
        root = (values[:rank] / scaling).sqrt()
        layer.lora_A["default"].weight.copy_((right[:, :rank] * root).T)
        layer.lora_B["default"].weight.copy_(left[:, :rank] * root)


def linear_layers(model: nn.Module) -> dict[str, int]:
    """Name -> number of weights of every linear layer of the decoder, without the output head."""
    return {
        name: layer.in_features * layer.out_features
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] != "lm_head"
    }


def check_targets(model: PackedPhi3ForCausalLM, config: Lora) -> None:
    """Raise ModelError for a name or a layer number in [lora] that matches nothing in the model, and for the output head."""
    layers = linear_layers(model)

    def require(key: str, value: str, pattern: str, hint: str, names: Iterable[str] = layers) -> None:
        if not any(re.fullmatch(pattern, name) for name in names):
            known = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
            message = f"[lora] {key}: '{value}' matches no layer of this model, whose linear layers are {known}."
            raise ModelError(message, hint)

    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    if any(target.rpartition(".")[2] == "lm_head" for target in targets):
        raise ModelError(
            "[lora] target_modules names lm_head, whose weight the loss reads directly: that adapter would never be trained.",
            'Use modules_to_save = ["lm_head"] to train the head itself.',
        )
    if isinstance(config.target_modules, list):
        for name in targets:
            require("target_modules", name, rf"(.*\.)?{re.escape(name)}", 'Write target_modules = "all-linear".')
    elif config.target_modules != "all-linear":
        hint = f'For a name, not a pattern, write target_modules = ["{targets[0]}"].'
        require("target_modules", targets[0], targets[0], hint)
    for name in config.modules_to_save or ():
        hint, modules = "lm_head and embed_tokens can be trained as well.", (name for name, _ in model.named_modules())
        require("modules_to_save", name, rf"(.*\.)?{re.escape(name)}", hint, modules)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            require(key, pattern, rf"(.*\.)?({pattern})", f"Correct {key}.")
    chosen, count = config.layers_to_transform, model.config.num_hidden_layers
    for number in [chosen] if isinstance(chosen, int) else chosen or ():
        if number >= count:
            hint = f"Choose layers from 0 to {count - 1}."
            raise ModelError(f"[lora] layers_to_transform = {number}, but the model has {count} layers.", hint)


def measure_coverage(model: PeftModel) -> tuple[float, list[str]]:
    """The share of the weights of the decoder's linear layers that an attached adapter covers, and the names of those layers; all
    weights of a layer with a LoRA count.
    """
    covered = total = 0
    targets = set()
    for name, module in model.base_model.model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Linear):
            covered += module.in_features * module.out_features
            targets.add(name.rpartition(".")[2])
        elif isinstance(module, nn.Linear) and "lora_" not in name and "lm_head" not in name:
            total += module.in_features * module.out_features
    return covered / total, sorted(targets)


def fuse_lora_forward(model: nn.Module) -> None:
    """Make every plain LoRA layer of a PEFT model add its update by `addmm`, and DoRA without gradients need no B A.

    Layers with dropout or a bias on B keep PEFT's own forward, and so does every call with the adapter disabled or merged.
    """
    for layer in model.modules():
        lora = read_lora(layer)
        if lora is not None and not lora.dropout:
            layer.forward = _FusedLoraForward(layer, layer.forward)


@dataclass(frozen=True, slots=True)
class _FusedLoraForward:
    """Replaces a layer's forward: base(x) + B(scaling * A(x)). The scaling is applied to the rank-sized tensor."""

    layer: Any
    peft_forward: Callable[..., Tensor]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of the base layer's output."""
        lora = read_lora(self.layer)
        if args or kwargs or lora is None or lora.dropout:
            return self.peft_forward(x, *args, **kwargs)
        if lora.magnitude is not None:
            loras = None if torch.is_grad_enabled() else read_loras(x, self.layer)
            return self.peft_forward(x) if loras is None else lora.forward(x, *loras[0][1:3])[0]
        if x.dtype != lora.lora_A.dtype and not torch.is_autocast_enabled(x.device.type):
            return self.peft_forward(x, *args, **kwargs)
        base: Tensor = lora.base(x)
        low_rank = linear(x, lora.lora_A) * lora.scaling
        return torch.addmm(base.flatten(0, -2), low_rank.flatten(0, -2), lora.lora_B.T).view_as(base)
