"""loralib 0.1.2's state dicts, read as `LoraDelta`s and written from them.

A loralib file holds `x.lora_A` and `x.lora_B` and nothing else: no alpha, no enabled groups, and an Embedding, a Conv2d and a
Linear look the same in it. A `Spec` gives what is missing.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from qlora_phi3.adapters import peft_io
from qlora_phi3.adapters.delta import Adapter, Kind, LoraDelta, LowRankBlock, last_name, scale_lora_b, stack
from qlora_phi3.errors import ExportError

T = TypeVar("T")
LORA_TENSOR = re.compile(r"(.+)\.lora_([AB])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a loralib file does not hold, by layer name or its end (`qkv_proj` for all of them); "" is every layer."""

    alpha: Mapping[str, float] = field(default_factory=dict)
    enable: Mapping[str, Sequence[bool]] = field(default_factory=dict)  #: enable_lora of every MergedLinear.
    embedding: frozenset[str] = frozenset({"embed_tokens"})
    conv2d: Mapping[str, int] = field(default_factory=dict)  #: kernel_size of every Conv2d; groups must be 1.


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A loralib layer: its matrices as loralib shapes them, and the arguments that it must be built with."""

    lora_A: Tensor
    lora_B: Tensor
    lora_alpha: float
    built_as: str  #: `lora.Linear(128, 256, r=4, lora_alpha=8)`


def look_up(table: Mapping[str, T], layer: str) -> T | None:
    """The entry of the longest key that is the name of a layer or its end."""
    keys = [key for key in table if not key or layer == key or layer.endswith(f".{key}")]
    return table[max(keys, key=len)] if keys else None


def check_spec(spec: Spec, layers: Sequence[str]) -> None:
    """Raise ExportError for a key that fits no layer; the default embedding may be missing."""
    for option, table in (("alpha", spec.alpha), ("enable", spec.enable), ("conv2d", spec.conv2d)):
        for key in table:
            if all(look_up({key: True}, layer) is None for layer in layers):
                names = ", ".join(sorted({last_name(layer) for layer in layers}))
                raise ExportError(f"{option} names '{key}', and no layer has that name.", f"The layers: {names}.")


def read_loralib(tensors: Mapping[str, Tensor], spec: Spec, where: object) -> Adapter:
    """The deltas of a loralib state dict, with the `spec` of what it does not hold; `where` is its place, for the messages.
    ExportError for an unknown key, a missing alpha, or shapes that do not fit the spec.
    """
    pairs, others = defaultdict[str, dict[str, Tensor]](dict), {}
    for key, tensor in tensors.items():
        if match := LORA_TENSOR.fullmatch(key):
            pairs[match[1]][match[2]] = tensor
        else:
            others[key] = tensor
    if not pairs:
        raise ExportError(f"{where} holds no 'x.lora_A' and 'x.lora_B'.", "Give a PEFT adapter as its directory.")
    check_spec(spec, list(pairs))
    deltas = {}
    for layer, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise ExportError(f"{where}: {layer} has lora_{min(pair)} alone.", "Save the state dict again.")
        deltas[layer] = _read_layer(layer, pair["A"], pair["B"], spec, where)
    full_tensors = {}
    for key, tensor in others.items():
        layer, _, kind = key.rpartition(".")
        is_copy = kind == "weight" and layer in deltas and deltas[layer].kind == "embedding"
        if kind != "bias" and not is_copy:
            raise ExportError(f"{where}: '{key}' is neither a LoRA matrix nor a bias.", peft_io.SAVE_STATE_DICT)
        # loralib's Conv2d holds the convolution as its `conv`: x.conv.bias is the base's x.bias.
        outer = layer.removesuffix(".conv")
        is_convolution = outer != layer and outer in deltas and deltas[outer].kind == "conv2d"
        full_tensors[f"{outer}.bias" if is_convolution else key] = tensor
    return Adapter(deltas=deltas, full_tensors=full_tensors)


def _read_layer(layer: str, lora_A: Tensor, lora_B: Tensor, spec: Spec, where: object) -> LoraDelta:
    shapes = f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}"
    if lora_A.dim() != 2 or lora_B.dim() != 2 or 0 in (*lora_A.shape, *lora_B.shape):
        raise ExportError(f"{where}: {layer} has {shapes}, which are not loralib's.", "Save the state dict again.")
    kernel, enable, alpha = look_up(spec.conv2d, layer), look_up(spec.enable, layer), look_up(spec.alpha, layer)
    if alpha is None:
        hint = "Give the lora_alpha that the layers were built with, such as --alpha 16; loralib's default is 1."
        raise ExportError(f"{where}: the lora_alpha of {layer} is not known; loralib's files do not hold it.", hint)
    (stacked_rank, columns), (rows, rank) = lora_A.shape, lora_B.shape
    if kernel is not None:
        if kernel < 1 or any(size % kernel for size in (rows, rank, columns)) or stacked_rank != rank:
            problem = f"{where}: {layer} has {shapes}, not a Conv2d's with kernel_size {kernel}."
            raise ExportError(problem, "Correct --conv2d.")
        # loralib views B A, (out k, in k), as (out, in, k, k): row o k + t is the t-th part of the weight of output o.
        scaling = alpha / (rank // kernel)
        blocks = tuple(
            LowRankBlock(lora_A=lora_A, lora_B=lora_B[part::kernel], scaling=scaling, first_column=part * columns)
            for part in range(kernel)
        )
        return LoraDelta(
            out_features=rows // kernel, in_features=columns * kernel, blocks=blocks, kind="conv2d", kernel_size=kernel
        )
    if enable is not None:
        count, places = sum(enable), [number for number, enabled in enumerate(enable) if enabled]
        if count == 0 or stacked_rank != rank * count or rows % count:
            message = f"{where}: {layer} has {shapes}, not a MergedLinear's with {count} of {len(enable)} groups enabled."
            raise ExportError(message, "lora_A has rank times enabled groups rows; correct --enable.")
        # Each enabled group has r rows of A and its own rows of B.
        size = rows // count
        blocks = tuple(
            LowRankBlock(lora_A=a, lora_B=b, scaling=alpha / rank, first_row=place * size)
            for place, a, b in zip(places, lora_A.chunk(count), lora_B.chunk(count), strict=True)
        )
        return LoraDelta(out_features=size * len(enable), in_features=columns, blocks=blocks)
    if stacked_rank != rank:
        hint = f"For a MergedLinear give the enabled groups: --enable {last_name(layer)}=1,0,1"
        raise ExportError(f"{where}: {layer} has {shapes}: the ranks differ.", hint)
    block = LowRankBlock(lora_A=lora_A, lora_B=lora_B, scaling=alpha / rank)
    kind: Kind = "embedding" if look_up(dict.fromkeys(spec.embedding, True), layer) else "linear"
    return LoraDelta(out_features=rows, in_features=columns, blocks=(block,), kind=kind)


def build_loralib_layers(adapter: Adapter, spec: Spec, where: object) -> dict[str, Layer]:
    """The loralib layers with the same deltas; `where` is the adapter's place, for the messages.

    `spec.enable` makes MergedLinears of the layers it names. `spec.alpha`, where given, is multiplied into B; else every layer
    gets the alpha that leaves its B unchanged. Raises ExportError for what loralib cannot hold.
    """
    check_spec(spec, list(adapter.deltas))
    for name in adapter.full_tensors:
        layer, _, kind = name.rpartition(".")
        if kind != "bias" and layer not in adapter.deltas:
            raise ExportError(f"{where}: loralib cannot hold '{name}'.", "Use it as a PEFT adapter, or merge it.")
    return {name: _build_layer(name, delta, spec, where) for name, delta in adapter.deltas.items()}


def _build_layer(name: str, delta: LoraDelta, spec: Spec, where: object) -> Layer:
    if delta.magnitude is not None:
        raise ExportError(f"{where}: {name} is DoRA (use_dora), which loralib lacks.", "Use it as a PEFT adapter.")
    lora_A, lora_B, scaling = stack(delta)
    enable, alpha = look_up(spec.enable, name), look_up(spec.alpha, name)
    if enable is not None:
        if delta.kind != "linear":
            raise ExportError(f"{where}: {name} is not linear and has no groups.", "Correct --enable.")
        lora_A, lora_B = _as_merged(name, lora_A, lora_B, enable, where)
    elif delta.kind == "conv2d":
        lora_A, lora_B = _as_conv2d(lora_A, lora_B, delta.kernel_size)
    rank = len(lora_A) // delta.kernel_size if enable is None else lora_B.shape[1]
    own_alpha = peft_io.snap_to_integer(scaling * rank)
    alpha = own_alpha if alpha is None else peft_io.snap_to_integer(alpha)
    if alpha != own_alpha:
        lora_B = scale_lora_b(lora_B, scaling / (alpha / rank))
    ends = f"r={rank}, lora_alpha={alpha}"
    if delta.kind == "conv2d":
        channels = delta.in_features // delta.kernel_size**2
        built_as = f"lora.Conv2d({channels}, {delta.out_features}, {delta.kernel_size}, {ends})"
    else:
        kind = "Embedding" if delta.kind == "embedding" else "Linear" if enable is None else "MergedLinear"
        ends += "" if enable is None else f", enable_lora={[bool(on) for on in enable]}"
        built_as = f"lora.{kind}({delta.in_features}, {delta.out_features}, {ends})"
    return Layer(lora_A=lora_A, lora_B=lora_B, lora_alpha=alpha, built_as=built_as)


def _as_merged(name: str, lora_A: Tensor, lora_B: Tensor, enable: Sequence[bool], where: object) -> tuple[Tensor, Tensor]:
    """A (n r, in), B (n s, r) of n groups of s rows: B's own blocks where it is block-diagonal, else A once for every group."""
    count, places = sum(enable), [number for number, enabled in enumerate(enable) if enabled]
    if len(lora_B) % len(enable) or not count:
        raise ExportError(f"{where}: {name} has {len(lora_B)} rows, not {len(enable)} groups.", "Correct --enable.")
    groups = lora_B.reshape(len(enable), -1, len(lora_A))
    for number, enabled in enumerate(enable, start=1):
        if not enabled and groups[number - 1].any():
            problem = f"{where}: {name} is trained in group {number} of {len(enable)} too, which --enable leaves out."
            raise ExportError(problem, "Enable every trained group.")
    trained = groups[places]
    if len(lora_A) % count == 0 and lora_B.any():
        blocks = trained.reshape(count, -1, count, len(lora_A) // count)  # (group, rows, group of ranks, r)
        diagonal = torch.stack([blocks[number, :, number] for number in range(count)])
        if all(not blocks[a, :, b].any() for a in range(count) for b in range(count) if a != b):
            return lora_A, diagonal.flatten(0, 1)
    return lora_A.repeat(count, 1), trained.flatten(0, 1)


def _as_conv2d(lora_A: Tensor, lora_B: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """A (r k, in k) and B (out k, r k): the k copies of one A where it was made of them, else rank r of PEFT's."""
    parts, rank, width = lora_A.chunk(kernel, dim=1), len(lora_A), lora_A.shape[1] // kernel
    if rank % kernel == 0:
        copy = lora_A[: rank // kernel, :width]
        if len(copy) % kernel == 0 and torch.equal(lora_A, torch.kron(torch.eye(kernel, dtype=copy.dtype), copy)):
            return copy, lora_B.reshape(-1, rank // kernel)
    placed = lora_B.new_zeros(len(lora_B), kernel, kernel, rank)
    for part in range(kernel):
        placed[:, part, part] = lora_B
    return torch.cat(parts), placed.flatten(0, 1).flatten(1)


def build_state_dict(adapter: Adapter, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The state dict as `loralib.lora_state_dict` makes it: lora_A and lora_B of every layer, and the tensors stored in full."""
    tensors = {}
    for name, tensor in adapter.full_tensors.items():
        layer_name, _, kind = name.rpartition(".")
        is_convolution = layer_name in adapter.deltas and adapter.deltas[layer_name].kind == "conv2d"
        tensors[f"{layer_name}.conv.{kind}" if is_convolution else name] = tensor
    for name, layer in layers.items():
        tensors |= {f"{name}.lora_A": layer.lora_A, f"{name}.lora_B": layer.lora_B}
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # a view is saved with its storage
