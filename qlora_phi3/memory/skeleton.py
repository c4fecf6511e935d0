"""A phi3 model in the making: every module of the real one in its place, on the meta device, waiting for its tensors.

`fill_without_storage` gives it tensors of the right shape and type that hold nothing, for the simulation;
`scripts/bench_memory.py` fills the same skeleton with random weights, to measure what the simulation predicts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft.tuners.lora import dora
from torch import Tensor, nn
from transformers import Phi3Config
from transformers.initialization import no_init_weights
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from qlora_phi3.architecture import Architecture
from qlora_phi3.attention import register_attention
from qlora_phi3.model import Phi3ForChunkedLoss, Precision, attention_name, quantization_config, settle_base
from qlora_phi3.recipe.load import Recipe

BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256  # bitsandbytes' own for 4 bit, and of the scales' scales


def build_skeleton(
    config: dict[str, Any], architecture: Architecture, recipe: Recipe, *, compute_dtype: torch.dtype, longest_row: int
) -> Phi3ForChunkedLoss:
    """The base as `load_base` makes it, without a single weight.

    Args:
        config: the contents of a config.json.
    """
    register_attention()
    with no_init_weights(), torch.device("meta"):
        settings = Phi3Config(**{**config, "dtype": compute_dtype})
        settings._attn_implementation = attention_name(recipe.model)
        model: Phi3ForChunkedLoss = Phi3ForChunkedLoss(settings).to(compute_dtype)
    kind = quantization_config(recipe.quantization, Precision(compute_dtype=compute_dtype, reason=""))
    if kind is not None:
        replace_with_bnb_linear(model, ["lm_head"], kind)
        model.is_loaded_in_4bit = True
    settle_base(model, architecture, longest_row=longest_row)
    return model


def fill_without_storage(model: Phi3ForChunkedLoss) -> None:
    """Put tensors without storage into a skeleton, in the order in which the real weights are read; under FakeTensorMode."""
    tied = model.lm_head if model.config.tie_word_embeddings else None
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            _quantize_without_storage(module)
        if isinstance(module, bnb.nn.Linear4bit) or module is tied:
            continue
        for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            new = torch.empty(old.shape, dtype=old.dtype)
            setattr(module, name, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
    model.tie_weights()


def _quantize_without_storage(layer: bnb.nn.Linear4bit) -> None:
    """The tensors of `Params4bit` after loading, and for a moment the 16-bit weight they were made from."""
    numel = layer.in_features * layer.out_features
    blocks = -(-numel // BLOCKSIZE)
    dtype = layer.compute_dtype  # load_base reads the checkpoint in the compute type
    whole = torch.empty((layer.out_features, layer.in_features), dtype=dtype)
    scales = torch.empty(blocks)
    packed = nn.Parameter(torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8), requires_grad=False)
    nested = None
    if layer.weight.compress_statistics:
        nested = QuantState(
            absmax=torch.empty(-(-blocks // NESTED_BLOCKSIZE)),
            blocksize=NESTED_BLOCKSIZE,
            code=torch.empty(256),
            dtype=torch.float32,
        )
    packed.quant_state = QuantState(  # type: ignore[attr-defined]
        absmax=torch.empty(blocks, dtype=torch.uint8) if nested else scales,
        shape=whole.shape,
        dtype=dtype,
        blocksize=BLOCKSIZE,
        code=torch.empty(16),
        quant_type=layer.weight.quant_type,
        offset=torch.empty(()) if nested else None,
        state2=nested,
    )
    del whole, scales
    for name in ("compress_statistics", "quant_type"):  # PEFT reads them
        setattr(packed, name, getattr(layer.weight, name))
    layer.weight = packed  # a plain parameter: under FakeTensorMode no Params4bit can be made
    layer.quant_state = packed.quant_state  # type: ignore[attr-defined]


@contextmanager
def four_bit_known_to_dora() -> Iterator[None]:
    """Let PEFT 0.21's DoRA read 4-bit weights without storage: it knows them by their class, which is `FakeTensor` here."""
    usual = dora.dequantize_module_weight
    dora.dequantize_module_weight = _dequantize
    try:
        yield
    finally:
        dora.dequantize_module_weight = usual


def _dequantize(layer: Any) -> Tensor:
    state = getattr(layer.weight, "quant_state", None)
    whole: Tensor = layer.weight if state is None else bnb.functional.dequantize_4bit(layer.weight.data, state)
    return whole
