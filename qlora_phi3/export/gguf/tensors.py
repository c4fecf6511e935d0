"""The tensors of a .gguf file: which ones, in which type, and their bytes, a few rows at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Phi3Config

from qlora_phi3.errors import ExportError
from qlora_phi3.model.weights import TensorInfo, Weights

#: Buffers that old checkpoints carry beside their weights.
COMPUTED = "rotary_emb.inv_freq"


#: Types that hold a tensor as it is.
LOSSLESS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


SAME_MODEL = "Convert a whole export of the model that its config.json describes."


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """A tensor to write.

    Args:
        name: in the .gguf file.
        shape: as in torch, rows first.
        type: gguf's name, `Q8_0`.
        num_bytes: in the file, without padding.
        source: its name in the checkpoint; None for one that comes from the config.
        values: of one that comes from the config.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    num_bytes: int
    source: str | None = None
    values: tuple[float, ...] = ()


def plan_tensors(config: Phi3Config, info: Mapping[str, TensorInfo], quant: str | None) -> list[TensorPlan]:
    """Every tensor of a phi3 model in llama.cpp's names.

    Args:
        info: of the checkpoint.
        quant: of `PLAIN`; None for each tensor in the type it has.

    Raises:
        ExportError: the checkpoint lacks a tensor, has one of another shape, or one more than llama.cpp knows.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, config.num_hidden_layers)
    shapes = expected_shapes(config)
    given = {name for name in info if not name.endswith(COMPUTED)}
    if config.tie_word_embeddings:
        given.discard("lm_head.weight")
    for name in sorted(shapes.keys() - given):
        raise ExportError(f"The checkpoint has no {name}.", SAME_MODEL)
    for name in sorted(given - shapes.keys()):
        raise ExportError(f"The checkpoint has a tensor {name}, which llama.cpp's phi3 models do not have.", SAME_MODEL)
    plans = [
        _plan(name, (len(values),), "f32", values=values)
        for name, values in (
            ("rope_factors_long.weight", tuple(config.rope_parameters.get("long_factor") or ())),
            ("rope_factors_short.weight", tuple(config.rope_parameters.get("short_factor") or ())),
        )
        if values
    ]
    for name, shape in shapes.items():
        if info[name].shape != shape:
            raise ExportError(f"{name} has the shape {info[name].shape} and not {shape}.", SAME_MODEL)
        type = quant or LOSSLESS.get(info[name].dtype, "f32")
        plans.append(_plan(names.get_name(name, try_suffixes=(".weight",)), shape, type, source=name))
    return plans


def expected_shapes(config: Phi3Config) -> dict[str, tuple[int, ...]]:
    """The tensors of a phi3 checkpoint, in the order they are written."""
    hidden, wide = config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.qkv_proj": (hidden + 2 * config.num_key_value_heads * head, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_up_proj": (2 * wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for number in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _plan(name: str, shape: tuple[int, ...], quant: str, **rest: Any) -> TensorPlan:
    import gguf

    chosen = _choose_type(name, shape, quant)
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[chosen]]
    count = torch.Size(shape).numel()
    return TensorPlan(name=name, shape=shape, type=chosen, num_bytes=count // block * block_bytes, **rest)


def _choose_type(name: str, shape: tuple[int, ...], quant: str) -> str:
    """The type of one tensor.

    Vectors stay in fp32, and rows that no blocks of 32 fill in fp16, as in llama.cpp's converter. Embedding and head stay
    in 8 bit where the rest has 4 or 5; llama.cpp's quantizer gives the head 6, in a type that the gguf package cannot write.
    """
    if len(shape) == 1:
        return "F32"
    if quant.startswith("q") and shape[-1] % 32:
        return "F16"
    if quant.startswith(("q4", "q5")) and name in ("token_embd.weight", "output.weight"):
        return "Q8_0"
    return quant.upper()


def encode(plan: TensorPlan, weights: Weights) -> Iterator[bytes]:
    """The bytes of a tensor, piece by piece.

    Raises:
        ExportError: a value is not finite, or too large for 16 bit.
    """
    if plan.source is None:
        yield _bytes(torch.tensor(plan.values, dtype=torch.float32), plan)
        return
    for piece in weights.iter_row_chunks(plan.source):
        if not torch.isfinite(piece).all():
            raise ExportError(f"{plan.source} holds values that are no numbers.", "Export the run again.")
        yield _bytes(piece, plan)


def _bytes(piece: Tensor, plan: TensorPlan) -> bytes:
    import gguf

    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(plan.type)
    if dtype is not None:
        cast = piece.to(dtype)
        if dtype is torch.float16 and not torch.isfinite(cast).all():
            largest = float(piece.abs().max())
            raise ExportError(
                f"{plan.source} has a value of size {largest:.4g}; fp16 ends at 65,504.", "Choose bf16, f32 or q8_0."
            )
        return cast.view(torch.uint8).numpy().tobytes()
    return bytes(gguf.quantize(piece.float().numpy(), gguf.GGMLQuantizationType[plan.type]).tobytes())
