"""Messages about .gguf files: what llama.cpp cannot hold, and files that exist."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from message_table import Message
from safetensors.torch import load_file, save_file
from tiny import build_byte_tokenizer, build_tokenizer, hub_template
from tokenizers import Tokenizer
from workshop import Workshop

from qlora_phi3.errors import ExportError
from qlora_phi3.export.gguf import tensors
from qlora_phi3.export.gguf.tensors import check_quant
from qlora_phi3.export.gguf.vocab import read_vocabulary
from qlora_phi3.export.gguf.write import convert_to_gguf

HEAD = "lm_head.weight"


def convert_base(shop: Workshop, base: Path) -> object:
    return convert_to_gguf(base, shop.path / "x.gguf", quant="f16", name="x", progress=lambda *_: None)


def convert(shop: Workshop, **changes: Any) -> object:
    """Convert a copy of the base with some of its tensors changed, or left out (None)."""
    base = shop.copy_base()
    tensors = {**load_file(base / "model.safetensors"), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, base / "model.safetensors")
    return convert_base(shop, base)


def read_changed(folder: Path, *, sentencepiece: bool, rows: int = 832, **changes: Any) -> object:
    """Read a vocabulary after changes to its tokenizer.json; those of `model` are merged."""
    tokenizer = build_tokenizer(None) if sentencepiece else build_byte_tokenizer(hub_template("phi-4"), strip=True)
    source = json.loads(tokenizer.backend_tokenizer.to_str())
    if not sentencepiece:
        source["model"]["vocab"]["th"], source["model"]["merges"] = 300, [["t", "h"]]
    source |= {**changes, "model": {**source["model"], **changes.get("model", {})}}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(source))
    return read_vocabulary(folder, tokenizer, rows)


def change_config(shop: Workshop, **changes: Any) -> Path:
    base = shop.copy_base()
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return base


def spoil_tokenizer_model(shop: Workshop) -> object:
    (shop.path / "tokenizer.model").write_bytes(b"nothing")
    return read_changed(shop.path, sentencepiece=True)


def check_without(library: str, quant: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if library == "gguf":
            patch.setattr("importlib.util.find_spec", lambda name: None)
        else:
            patch.setattr(tensors, "PACKAGES", ("llama_cpp_that_is_not_there",))
            patch.setenv("LLAMA_CPP_LIB", library)
        check_quant(quant)


def row(name: str, trigger: Any, *says: str, hint: str) -> Message:
    return Message(name=name, trigger=trigger, error=ExportError, exit_code=2, says=says, hint=hint)


MESSAGES = [
    row("gguf-not-installed", lambda shop: check_without("gguf", "f16"), "gguf", hint="pip install"),
    row("quantizer-not-installed", lambda shop: check_without("", "q4_k_m"), "q4_k_m", hint="llama-cpp-py-sync"),
    row(
        "quantizer-not-loaded",
        lambda shop: check_without("/nowhere/libllama.so", "q4_k_m"),
        "/nowhere/libllama.so cannot be loaded: OSError",
        hint="LLAMA_CPP_LIB",
    ),
    row(
        "gguf-unsupported-config",
        lambda shop: convert_base(shop, change_config(shop, hidden_act="gelu")),
        "hidden_act = 'gelu'",
        hint="Phi-3",
    ),
    row("gguf-tensor-missing", lambda shop: convert(shop, **{HEAD: None}), HEAD, "shape none in", hint="complete export"),
    row(
        "gguf-tensor-unknown", lambda shop: convert(shop, other=torch.ones(2)), "tensor other", "none by", hint="complete export"
    ),
    row(
        "gguf-tensor-of-another-shape",
        lambda shop: convert(shop, **{HEAD: torch.ones(2, 2)}),
        HEAD,
        "(2, 2)",
        hint="complete export",
    ),
    row(
        "gguf-value-too-large-for-fp16",
        lambda shop: convert(shop, **{HEAD: torch.full((832, 128), 7e4)}),
        HEAD,
        "7e+04",
        hint="bf16",
    ),
    row(
        "gguf-value-not-finite",
        lambda shop: convert(shop, **{HEAD: torch.full((832, 128), torch.nan)}),
        HEAD,
        "NaN",
        hint="again",
    ),
    row(
        "tokenizer-with-more-tokens-than-rows",
        lambda shop: read_changed(shop.path, sentencepiece=True, rows=400),
        "id 459",
        "400 rows",
        hint="base",
    ),
    row(
        "tokenizer-with-another-normalizer",
        lambda shop: read_changed(shop.path, sentencepiece=True, normalizer={"type": "NFC"}),
        "{'type': 'NFC'}",
        hint="base's own tokenizer",
    ),
    row("tokenizer-model-unreadable", spoil_tokenizer_model, "tokenizer.model", hint="base's own"),
    row(
        "byte-tokenizer-with-a-normalizer",
        lambda shop: read_changed(shop.path, sentencepiece=False, normalizer={"type": "NFC"}),
        "normalizer {'type': 'NFC'}",
        hint="base",
    ),
    row(
        "byte-tokenizer-without-merges",
        lambda shop: read_changed(shop.path, sentencepiece=False, model={"merges": []}),
        "merges []",
        hint="base",
    ),
]
