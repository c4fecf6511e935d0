"""A base of full size without a download: with random weights, or as safetensors of zeros, a file with a hole, on no disk space.

On the emulated card nobody copies its weights, so that the whole program loads, quantizes and trains a model of full size.
"""

import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from qlora_phi3.family import known_config

#: Random weights that are drawn; a larger tensor repeats them.
DRAWN = 2**24


def write_base(folder: Path, name: str, tokenizer: Path, layers: int = 0, *, is_sparse: bool = False) -> Path:
    """Write the base `name` with the tokenizer of another base's folder; of so many layers, 0: all."""
    config = dict(known_config(name))
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_size = hidden // config["num_attention_heads"]
    queries, keys = (config[key] * head_size for key in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = [config["vocab_size"], hidden]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        shapes |= {
            layer + "input_layernorm.weight": [hidden],
            layer + "post_attention_layernorm.weight": [hidden],
            layer + "self_attn.qkv_proj.weight": [queries + 2 * keys, hidden],
            layer + "self_attn.o_proj.weight": [hidden, queries],
            layer + "mlp.gate_up_proj.weight": [2 * inner, hidden],
            layer + "mlp.down_proj.weight": [hidden, inner],
        }
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in shapes.items():
        end = offset + 2 * prod(shape)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    for file in tokenizer.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "generation_config.json"):
            shutil.copy(file, folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if is_sparse:
            file.truncate(8 + len(text) + offset)
        else:
            write_weights(file, shapes)
    config |= {"architectures": ["Phi3ForCausalLM"], "torch_dtype": "bfloat16"}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def write_weights(file: IO[bytes], shapes: Mapping[str, Sequence[int]]) -> None:
    """Matrices as transformers initialises them, and norms of one, in bf16."""
    drawn = np.random.default_rng(0).normal(0, 0.02, DRAWN).astype(np.float32)
    drawn_bf16 = (drawn.view(np.uint32) >> 16).astype(np.uint16)
    one_bf16 = np.uint16(0x3F80)
    for shape in shapes.values():
        values = drawn_bf16 if len(shape) > 1 else np.full(shape, one_bf16)
        for start in range(0, prod(shape), len(values)):
            values[: prod(shape) - start].tofile(file)
