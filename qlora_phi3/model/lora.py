"""The adapter: put on, checked against the model, and fused into one matmul.

PEFT passes over a name that matches nothing; here that is an error, and the share of the weights that is reached is told. PEFT
clones the base's output, scales the update and adds it: three passes over (tokens, out_features) that `addmm` does not need. The
scale goes onto the rank-sized tensor instead. Everything else of PEFT's layer stays as it is.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from qlora_phi3.errors import ModelError
from qlora_phi3.model.phi3 import Phi3ForChunkedLoss
from qlora_phi3.recipe.schema import Lora


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of the base the adapter reaches."""

    covered_parameters: int
    linear_parameters: int
    trainable_parameters: int
    targets: tuple[str, ...]

    @property
    def share(self) -> float:
        """Covered share of the weights of the decoder's linear layers, 0 to 1."""
        return self.covered_parameters / self.linear_parameters


def attach_adapter(model: Phi3ForChunkedLoss, config: Lora) -> PeftModel:
    """Put a fresh LoRA adapter, kept in fp32, on the base.

    Raises:
        ModelError: a name in the table matches nothing in the model, or the output head is a target.
    """
    check_targets(model, config)
    settings = config.model_dump(exclude_none=True)
    if config.layers_to_transform is not None and config.target_modules == "all-linear":
        settings["target_modules"] = _leaves(linear_layers(model))  # PEFT 0.21 takes the word for all layers only
    try:
        adapted = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=True)
    except ValueError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ModelError(f"PEFT refuses the [lora] table: {reason}.", "Change [lora].") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fuse_lora_forward(adapted)
    return adapted


def linear_layers(model: nn.Module) -> dict[str, int]:
    """Name of every linear layer of the decoder (not the output head) -> its number of weights."""
    return {
        name: layer.in_features * layer.out_features
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] != "lm_head"
    }


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def check_targets(model: Phi3ForChunkedLoss, config: Lora) -> None:
    """Refuse a name in [lora] that matches nothing: PEFT passes over it without a word."""
    layers, modules = linear_layers(model), [name for name, _ in model.named_modules()]
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    if any(target.rpartition(".")[2] == "lm_head" for target in targets):
        raise ModelError(
            "[lora] target_modules names lm_head, whose weight the loss reads directly: that adapter would never be trained.",
            'Use modules_to_save = ["lm_head"] to train the head itself.',
        )
    if isinstance(config.target_modules, str):
        pattern, hint = config.target_modules, f'For a name, not a pattern, write target_modules = ["{targets[0]}"].'
        if pattern != "all-linear" and not any(re.fullmatch(pattern, name) for name in layers):
            raise _matches_nothing("target_modules", pattern, layers, hint)
    else:
        _check_names("target_modules", targets, layers, layers, 'Write target_modules = "all-linear".')
    _check_names(
        "modules_to_save", config.modules_to_save or (), modules, layers, "lm_head and embed_tokens are others."
    )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in layers):
                raise _matches_nothing(key, pattern, layers, f"Mend {key}.")
    chosen = config.layers_to_transform
    for number in [chosen] if isinstance(chosen, int) else chosen or ():
        if number >= (count := model.config.num_hidden_layers):
            raise ModelError(
                f"[lora] layers_to_transform = {number}, and the model has {count} layers.",
                f"They are 0 to {count - 1}.",
            )


def _check_names(key: str, names: Iterable[str], choices: Iterable[str], layers: Iterable[str], hint: str) -> None:
    for name in names:
        if not any(choice == name or choice.endswith(f".{name}") for choice in choices):
            raise _matches_nothing(key, name, layers, hint)


def _matches_nothing(key: str, name: str, layers: Iterable[str], hint: str) -> ModelError:
    as_list = ", ".join(_leaves(layers))
    return ModelError(
        f"[lora] {key}: '{name}' matches no layer of this model, whose linear layers are {as_list}.", hint
    )


def measure_coverage(model: PeftModel) -> Coverage:
    """Count what the attached adapter covers; the weights of a layer count whole where it carries a LoRA."""
    covered = total = 0
    targets = set()
    for name, module in model.base_model.model.named_modules():
        if not hasattr(module, "base_layer") or not isinstance(module.base_layer, nn.Linear):
            continue
        covered += module.in_features * module.out_features
        targets.add(name.rpartition(".")[2])
    total = sum(
        layer.in_features * layer.out_features
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, nn.Linear) and "lora_" not in name and "lm_head" not in name
    )
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Coverage(
        covered_parameters=covered,
        linear_parameters=total,
        trainable_parameters=trainable,
        targets=tuple(sorted(targets)),
    )


def fuse_lora_forward(model: nn.Module, adapter: str = "default") -> None:
    """Let every plain LoRA layer of a PEFT model add its update by `addmm`.

    Layers with dropout, DoRA or a bias on B keep PEFT's own forward, and so does every call with adapters disabled or merged.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_plain(layer, adapter):
            layer.forward = _FusedLoraForward(layer, adapter)


def _is_plain(layer: Any, adapter: str) -> bool:
    return (
        isinstance(layer.get_base_layer(), nn.Linear)
        and adapter in layer.lora_A
        and adapter not in layer.lora_variant
        and isinstance(layer.lora_dropout[adapter], nn.Identity)
        and layer.lora_B[adapter].bias is None
    )


class _FusedLoraForward:
    """A layer's forward: base(x) + scaling * B(A(x))."""

    def __init__(self, layer: Any, adapter: str) -> None:
        self.layer, self.adapter = layer, adapter
        self.peft_forward = layer.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        layer = self.layer
        lora_A, lora_B = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight
        same_dtype = x.dtype == lora_A.dtype or torch.is_autocast_enabled(x.device.type)
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
        low_rank = linear(x, lora_A) * layer.scaling[self.adapter]
        return torch.addmm(base.flatten(0, -2), low_rank.flatten(0, -2), lora_B.T).view_as(base)
