"""The optimizer of a run. Training and the memory simulation both build it here, so that what is simulated is what trains."""

import re
from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import bitsandbytes.optim.optimizer
import torch
from bitsandbytes.optim import GlobalOptimManager
from torch import nn

from qlora_phi3.recipe.schema import Training

#: Parameters without weight decay, by name: Trainer.get_decay_parameter_names of transformers 5.23.
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def default_optimizer(training: Training, *, is_cuda: bool) -> str:
    """Name of the optimizer that a run uses: the recipe's, or for "auto" 8-bit AdamW on CUDA and torch's AdamW on a CPU.

    Where GPU memory is tight, the execution plan takes the paged variant of the same optimizer.
    """
    if training.optim != "auto":
        return training.optim
    return "adamw_8bit" if is_cuda else "adamw_torch"


class BitsandbytesAdamW(bnb.optim.AdamW):  # type: ignore[misc]
    """bitsandbytes' AdamW, for which the host does not wait after the update of each matrix (`sync_gpu`, 0.50).

    The kernels of one stream run in order. Paged state is waited for once, as the driver may move it while they run.
    """

    def step(self, closure: Any = None) -> Any:
        """Update all parameters."""
        with patch.object(bitsandbytes.optim.optimizer, "sync_gpu", lambda _: None):
            loss = super().step(closure)
        if self.is_paged and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return loss


def build_optimizer(name: str, model: nn.Module, training: Training, *, is_cuda: bool) -> torch.optim.Optimizer:
    """Build the optimizer that transformers builds for a name, over the trainable parameters of a model.

    Args:
        name: transformers' name, one of those that `[training] optim` allows.
        model: its parameters without gradient are left out. Two groups, with and without weight decay, as in the Trainer.
        training: learning rate, betas, epsilon and weight decay.
        is_cuda: take the multi-tensor path of torch's AdamW, which torch takes for CUDA tensors only. The simulation follows
            the CUDA path on CPU tensors, so that it must be said.

    With `loraplus_lr_ratio` lora_B is a third group (as in peft.optimizers.create_loraplus_optimizer, which knows no paged or
    32-bit optimizer of bitsandbytes); the first group's learning rate is the one that is reported.
    """
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": training.weight_decay}, {"params": [], "weight_decay": 0.0}]
    if training.loraplus_lr_ratio:
        groups.append({**groups[0], "params": [], "lr": training.learning_rate * training.loraplus_lr_ratio})
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_lora_B = training.loraplus_lr_ratio and ".lora_B." in key  # noqa: N806 - PEFT's name of the matrix
            groups[2 if is_lora_B else NO_DECAY.search(key.lower()) is not None]["params"].append(parameter)
    shared: dict[str, Any] = {"lr": training.learning_rate, "eps": training.adam_epsilon}
    shared["betas"] = (training.adam_beta1, training.adam_beta2)
    if name in ("adamw_torch", "adamw_torch_fused"):
        fused = name == "adamw_torch_fused"
        return torch.optim.AdamW(groups, fused=fused or None, foreach=is_cuda and not fused, **shared)
    bits, paged = 8 if "8bit" in name else 32, name.startswith("paged")
    optimizer: torch.optim.Optimizer = BitsandbytesAdamW(groups, optim_bits=bits, is_paged=paged, **shared)
    if bits == 8:
        # The Trainer keeps the state of trained embeddings in 32 bit. It says so to bitsandbytes' global manager, which holds
        # every module for ever and applies the setting by index to optimizers that are built later; ours has its own manager.
        manager = GlobalOptimManager.__new__(GlobalOptimManager)
        manager.initialize()
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.weight.requires_grad:
                manager.register_module_override(module, "weight", {"optim_bits": 32})
        optimizer.mng = manager  # type: ignore[attr-defined]
    return optimizer
