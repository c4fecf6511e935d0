"""Small models for adapters: loralib's layers and torch's own, Phi-3 and the same model unfused."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_model import build_config
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3ForCausalLM

RANK, ALPHA, VOCABULARY = 3, 5, 50


class Layers(nn.Module):
    """An embedding, a linear layer, one of three groups, and a convolution; of torch or of loralib."""

    def __init__(self, embed_tokens: nn.Module, plain: nn.Module, merged: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.embed_tokens, self.plain, self.merged, self.conv = embed_tokens, plain, merged, conv

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, tokens) -> (rows, channels, 2, 3)."""
        hidden = self.merged(self.plain(self.embed_tokens(ids)))  # (rows, tokens, 30)
        return self.conv(hidden.reshape(len(ids), 5, 4, -1)[..., :5])


def loralib_layers(enable: Sequence[bool], *, kernel: int = 3) -> Layers:
    """loralib's layers with random weights; B is not zero."""
    import loralib as lora

    common = {"r": RANK, "lora_alpha": ALPHA}
    model = Layers(
        lora.Embedding(VOCABULARY, 12, **common),
        lora.Linear(12, 20, **common),
        lora.MergedLinear(20, 30, enable_lora=list(enable), **common),
        lora.Conv2d(5, 7, kernel, **common),
    ).double()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def torch_layers(model: Layers, *, kernel: int = 3) -> Layers:
    """torch's own layers with the weights of loralib's."""
    plain = Layers(nn.Embedding(VOCABULARY, 12), nn.Linear(12, 20), nn.Linear(20, 30), nn.Conv2d(5, 7, kernel)).double()
    state = {name.replace("conv.conv", "conv"): tensor for name, tensor in model.state_dict().items()}
    plain.load_state_dict({name: state[name].clone() for name in plain.state_dict()})
    return plain


def some_ids() -> torch.Tensor:
    """(4, 8)."""
    return torch.randint(0, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(1))


def build_pair(**shapes: Any) -> tuple[Phi3ForCausalLM, LlamaForCausalLM]:
    """A random Phi-3, and the same model with q, k, v, gate and up apart."""
    torch.manual_seed(0)
    config = build_config(tie_word_embeddings=False, **shapes)
    fused = Phi3ForCausalLM(config).eval()
    for parameter in fused.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.08)
    same = {key: getattr(config, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = {key: getattr(config, key) for key in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")}
    apart = LlamaForCausalLM(LlamaConfig(**same, **heads, pad_token_id=0, tie_word_embeddings=False)).eval()
    apart.load_state_dict(_take_apart(fused.state_dict(), config))
    return fused, apart


def _take_apart(state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    head = config.hidden_size // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    rows = {
        "qkv_proj": {"q_proj": queries, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size),
    }
    apart = {}
    for name, tensor in state.items():
        fused = next((layer for layer in rows if layer in name), None)
        if fused is None:
            apart[name] = tensor
            continue
        for part, piece in zip(rows[fused], tensor.split(list(rows[fused].values())), strict=True):
            apart[name.replace(fused, part)] = piece.clone()
    return apart


def save_trained(model: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """Put a LoRA with random B (and moved DoRA magnitudes) on a copy of a model, save it, and return the PEFT model."""
    torch.manual_seed(2)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **settings})).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
        if "lora_magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
    adapted.save_pretrained(folder)
    return adapted


def logits(model: nn.Module) -> torch.Tensor:
    """Of twelve fixed tokens."""
    with torch.no_grad():
        return model(torch.arange(3, 15)[None]).logits


def relative(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest difference over the largest entry of the first."""
    return float((first - second).detach().abs().max() / first.detach().abs().max())
