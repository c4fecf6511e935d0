"""Random Phi-3s of a few hundred thousand parameters, layer sizes in multiples of 64."""

from pathlib import Path
from typing import Any

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from qlora_phi3.family import parse_architecture
from qlora_phi3.model.lora import attach_adapter
from qlora_phi3.model.phi3 import PackedPhi3ForCausalLM, load_base
from qlora_phi3.recipe.schema import Lora, Model, Quantization

FP32 = torch.float32


def build_config(**changes: Any) -> Phi3Config:
    """A two-layer Phi-3 with grouped queries."""
    shapes = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": None,
    }
    return Phi3Config(**{**shapes, **changes})


def save_tiny_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random Phi-3 in fp32 safetensors; sizes of weights as a trained model has them, so that losses differ."""
    torch.manual_seed(seed)
    model = Phi3ForCausalLM(build_config(**changes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.08)
    model.save_pretrained(folder)
    return folder


def load_tiny(
    folder: Path,
    *,
    four_bit: bool = True,
    lora: Lora | None = None,
    compute_dtype: torch.dtype = FP32,
    seed: int = 0,
    longest_row: int = 512,
) -> Any:
    """The base of a folder with an adapter whose B is not zero, so that gradients reach every part of it."""
    config = Phi3Config.from_pretrained(folder).to_dict()
    base = load_base(
        Model(name=str(folder)),
        Quantization(load_in_4bit=four_bit),
        parse_architecture(config, str(folder)),
        compute_dtype=compute_dtype,
        device=torch.device("cpu"),
        longest_row=longest_row,
    )
    torch.manual_seed(seed)
    model = attach_adapter(base, lora or Lora(r=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model


def random_rows(
    lengths: list[int], *, vocab: int = 512, seed: int = 0, supervised_from: float = 0.4
) -> list[dict[str, list[int]]]:
    """Rows of these lengths whose labels begin at a share of the row."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        cut = int(length * supervised_from)
        rows.append({"input_ids": ids, "labels": [-100] * cut + ids[cut:]})
    return rows


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Clones of every gradient, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest norm of a difference over the norm of the first, over all tensors."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).norm() / first[name].norm().clamp_min(1e-30)) for name in first)


__all__ = [
    "FP32",
    "PackedPhi3ForCausalLM",
    "build_config",
    "gradients",
    "load_tiny",
    "random_rows",
    "relative_difference",
    "save_tiny_model",
]
