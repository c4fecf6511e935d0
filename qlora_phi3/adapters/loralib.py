"""loralib 0.1.2's state dicts to updates and back.

A loralib file holds `x.lora_A` and `x.lora_B` and nothing else: no alpha, no enabled groups, and an Embedding, a Conv2d and a
Linear look the same in it. What it does not say must be given, as a `Spec`.

A loralib checkpoint put onto a model, ready to be trained on with PEFT.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn

from qlora_phi3.adapters.delta import Adapter, LoraDelta, LowRankBlock, scale_lora_b, stack
from qlora_phi3.adapters.fused import check_layers
from qlora_phi3.adapters.peft_io import last_name, peft_settings, peft_tensors, read_tensors, whole_number
from qlora_phi3.errors import ExportError

T = TypeVar("T")


LORA = re.compile(r"(.+)\.lora_([AB])")


ALPHA_CURE = "Give the lora_alpha the layers were built with, such as --alpha 16; where none was named loralib took 1."


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a loralib file does not say, by layer name or its end (`qkv_proj` for all of them); "" is every layer."""

    alpha: Mapping[str, float] = field(default_factory=dict)
    #: enable_lora of every MergedLinear.
    enable: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    embedding: frozenset[str] = frozenset({"embed_tokens"})
    #: kernel_size of every Conv2d; groups must be 1.
    conv2d: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One loralib layer: its matrices, and the arguments it must be built with."""

    lora_A: Tensor
    lora_B: Tensor
    lora_alpha: float
    built_as: str


def find(table: Mapping[str, T], layer: str) -> T | None:
    """The entry for a layer: of the longest key that is its name or the end of it."""
    keys = [key for key in table if not key or layer == key or layer.endswith(f".{key}")]
    return table[max(keys, key=len)] if keys else None


def check_spec(spec: Spec, layers: Sequence[str]) -> None:
    """Refuse a key that belongs to no layer; the usual embedding may be missing."""
    for option, table in (("alpha", spec.alpha), ("enable", spec.enable), ("conv2d", spec.conv2d)):
        for key in table:
            if key and not any(layer == key or layer.endswith(f".{key}") for layer in layers):
                names = ", ".join(sorted({last_name(layer) for layer in layers}))
                raise ExportError(f"{option} names '{key}', and no layer is called that.", f"There are {names}.")


def read_loralib(tensors: Mapping[str, Tensor], spec: Spec, where: object) -> Adapter:
    """The updates of a loralib state dict.

    Args:
        tensors: of the state dict.
        spec: what it does not say.
        where: its place, for the messages.

    Raises:
        ExportError: an unknown key, a missing alpha, or shapes that do not fit what the spec says.
    """
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if match := LORA.fullmatch(key):
            pairs[match[1]][match[2]] = tensor
    if not pairs:
        raise ExportError(
            f"{where} holds no 'x.lora_A' and 'x.lora_B', as loralib names them.",
            "A PEFT adapter is given as its folder.",
        )
    check_spec(spec, list(pairs))
    deltas = {}
    for layer, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise ExportError(f"{where}: {layer} has lora_{min(pair)} alone.", "Save the state dict again.")
        deltas[layer] = _read_layer(layer, pair["A"], pair["B"], spec, where)
    return Adapter(deltas=deltas, whole=_read_whole(tensors, deltas, where))


def _read_whole(tensors: Mapping[str, Tensor], deltas: Mapping[str, LoraDelta], where: object) -> dict[str, Tensor]:
    whole = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.rpartition(".")
        is_copy = kind == "weight" and layer in deltas and deltas[layer].kind == "embedding"
        if LORA.fullmatch(key):
            continue
        if kind != "bias" and not is_copy:
            raise ExportError(
                f"{where}: '{key}' is neither a LoRA matrix nor a bias.",
                "Save those alone: torch.save(loralib.lora_state_dict(model), path).",
            )
        whole[_name_in_base(key, deltas)] = tensor
    return whole


def _name_in_base(key: str, deltas: Mapping[str, LoraDelta]) -> str:
    """loralib's Conv2d holds the convolution as its `conv`: x.conv.bias is the base's x.bias."""
    outer = key.removesuffix(".conv.bias")
    return f"{outer}.bias" if outer in deltas and deltas[outer].kind == "conv2d" else key


def _read_layer(layer: str, lora_A: Tensor, lora_B: Tensor, spec: Spec, where: object) -> LoraDelta:
    told = f"{where}: {layer} has lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}"
    if lora_A.dim() != 2 or lora_B.dim() != 2 or 0 in (*lora_A.shape, *lora_B.shape):
        raise ExportError(f"{told}; loralib's are matrices.", "Save the state dict again.")
    alpha = find(spec.alpha, layer)
    if alpha is None:
        raise ExportError(
            f"{where}: the lora_alpha of {layer} is not known; loralib's files do not hold it.", ALPHA_CURE
        )
    if (kernel := find(spec.conv2d, layer)) is not None:
        return _read_conv2d(lora_A, lora_B, alpha, kernel, told)
    if (enable := find(spec.enable, layer)) is not None:
        return _read_merged(lora_A, lora_B, alpha, enable, told)
    if len(lora_A) != lora_B.shape[1]:
        groups = len(lora_A) // lora_B.shape[1]
        hint = f" It looks like a MergedLinear with {groups} groups enabled." if groups > 1 else ""
        raise ExportError(
            f"{told}, which are no Linear's: the ranks differ.{hint}",
            f"Say which are: --enable {last_name(layer)}=1,0,1",
        )
    embedding = find(dict.fromkeys(spec.embedding, True), layer)
    block = LowRankBlock(lora_A=lora_A, lora_B=lora_B, scaling=alpha / len(lora_A))
    kind = "embedding" if embedding else "linear"
    return LoraDelta(out_features=len(lora_B), in_features=lora_A.shape[1], blocks=(block,), kind=kind)  # type: ignore[arg-type]


def _read_merged(lora_A: Tensor, lora_B: Tensor, alpha: float, enable: Sequence[bool], told: str) -> LoraDelta:
    """Each enabled group has r rows of A and its own rows of B."""
    rank, count = lora_B.shape[1], sum(enable)
    if count == 0 or len(lora_A) != rank * count or len(lora_B) % count:
        raise ExportError(
            f"{told}, which are no MergedLinear's with {count} of {len(enable)} groups enabled.",
            "lora_A has rank times enabled groups rows; mend --enable.",
        )
    size = len(lora_B) // count
    places = [number for number, enabled in enumerate(enable) if enabled]
    blocks = tuple(
        LowRankBlock(lora_A=a, lora_B=b, scaling=alpha / rank, first_row=place * size)
        for place, a, b in zip(places, lora_A.chunk(count), lora_B.chunk(count), strict=True)
    )
    return LoraDelta(out_features=size * len(enable), in_features=lora_A.shape[1], blocks=blocks)


def _read_conv2d(lora_A: Tensor, lora_B: Tensor, alpha: float, kernel: int, told: str) -> LoraDelta:
    """loralib views B A, (out k, in k), as (out, in, k, k): row o k + t is the t-th part of the weight of output o."""
    if kernel < 1 or any(size % kernel for size in (*lora_A.shape, *lora_B.shape)) or len(lora_A) != lora_B.shape[1]:
        raise ExportError(f"{told}, which are no Conv2d's with kernel_size {kernel}.", "Mend --conv2d.")
    scaling, width = alpha / (len(lora_A) // kernel), lora_A.shape[1]
    blocks = tuple(
        LowRankBlock(lora_A=lora_A, lora_B=lora_B[part::kernel], scaling=scaling, first_column=part * width)
        for part in range(kernel)
    )
    return LoraDelta(
        out_features=len(lora_B) // kernel,
        in_features=width * kernel,
        blocks=blocks,
        kind="conv2d",
        kernel_size=kernel,
    )


def loralib_layers(adapter: Adapter, spec: Spec, where: object) -> dict[str, Layer]:
    """The loralib layers of the same updates.

    Args:
        adapter: the updates.
        spec: `enable` makes MergedLinears of the layers it names; `alpha`, where given, is folded into B; else every layer keeps
            the alpha that leaves its B as it is.
        where: the adapter's place, for the messages.

    Raises:
        ExportError: something that loralib cannot hold, named.
    """
    check_spec(spec, list(adapter.deltas))
    for name in adapter.whole:
        layer, _, kind = name.rpartition(".")
        if kind != "bias" and layer not in adapter.deltas:
            raise ExportError(
                f"{where}: loralib holds no '{name}' (modules_to_save).", "Keep it as a PEFT adapter, or merge it."
            )
    layers = {}
    for name, delta in adapter.deltas.items():
        if delta.magnitude is not None:
            raise ExportError(
                f"{where}: {name} is DoRA (use_dora), and loralib has none.", "Keep it as a PEFT adapter."
            )
        layers[name] = _write_layer(name, delta, find(spec.enable, name), find(spec.alpha, name), where)
    return layers


def _write_layer(
    name: str, delta: LoraDelta, enable: Sequence[bool] | None, alpha: float | None, where: object
) -> Layer:
    lora_A, lora_B, scaling = stack(delta)
    if enable is not None:
        if delta.kind != "linear":
            raise ExportError(f"{where}: {name} is no linear layer, and only those have groups.", "Mend --enable.")
        lora_A, lora_B = _as_merged(name, lora_A, lora_B, enable, where)
    elif delta.kind == "conv2d":
        lora_A, lora_B = _as_conv2d(lora_A, lora_B, delta.kernel_size)
    rank = len(lora_A) // delta.kernel_size if enable is None else lora_B.shape[1]
    kept = whole_number(scaling * rank)
    alpha = kept if alpha is None else whole_number(alpha)
    return Layer(
        lora_A=lora_A,
        lora_B=scale_lora_b(lora_B, scaling / (alpha / rank)) if alpha != kept else lora_B,
        lora_alpha=alpha,
        built_as=_built_as(delta, rank, alpha, enable),
    )


def _built_as(delta: LoraDelta, rank: int, alpha: float, enable: Sequence[bool] | None) -> str:
    sizes, strength = (delta.in_features, delta.out_features), f"r={rank}, lora_alpha={alpha}"
    if delta.kind == "conv2d":
        channels = delta.in_features // delta.kernel_size**2
        return f"lora.Conv2d({channels}, {sizes[1]}, {delta.kernel_size}, {strength})"
    if enable is not None:
        return f"lora.MergedLinear({sizes[0]}, {sizes[1]}, {strength}, enable_lora={[bool(on) for on in enable]})"
    return f"lora.{'Embedding' if delta.kind == 'embedding' else 'Linear'}({sizes[0]}, {sizes[1]}, {strength})"


def _as_merged(
    name: str, lora_A: Tensor, lora_B: Tensor, enable: Sequence[bool], where: object
) -> tuple[Tensor, Tensor]:
    """A and B of a MergedLinear: B's own blocks where it is block-diagonal, else A once for every enabled group."""
    count, places = sum(enable), [number for number, enabled in enumerate(enable) if enabled]
    if len(lora_B) % len(enable) or not count:
        raise ExportError(f"{where}: {name} has {len(lora_B)} rows, not {len(enable)} equal groups.", "Mend --enable.")
    groups = lora_B.reshape(len(enable), -1, len(lora_A))
    for number, enabled in enumerate(enable):
        if not enabled and groups[number].any():
            raise ExportError(
                f"{where}: {name} is trained in group {number + 1} of {len(enable)} too, which --enable leaves out.",
                "Enable every trained group.",
            )
    kept = groups[places]
    if len(lora_A) % count == 0 and lora_B.any():
        blocks = kept.reshape(count, -1, count, len(lora_A) // count)  # (group, rows, group of ranks, r)
        diagonal = torch.stack([blocks[number, :, number] for number in range(count)])
        if all(not blocks[a, :, b].any() for a in range(count) for b in range(count) if a != b):
            return lora_A, diagonal.flatten(0, 1)
    return lora_A.repeat(count, 1), kept.flatten(0, 1)


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


def loralib_tensors(adapter: Adapter, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The state dict, as `loralib.lora_state_dict` makes it."""
    tensors = {}
    for name, tensor in adapter.whole.items():
        layer_name, _, kind = name.rpartition(".")
        wrapped = layer_name in adapter.deltas and adapter.deltas[layer_name].kind == "conv2d"
        tensors[f"{layer_name}.conv.{kind}" if wrapped else name] = tensor
    for name, layer in layers.items():
        tensors |= {f"{name}.lora_A": layer.lora_A, f"{name}.lora_B": layer.lora_B}
    return tensors


def load_loralib(
    model: nn.Module,
    path: str | Path,
    *,
    alpha: float | Mapping[str, float],
    enable: Mapping[str, Sequence[bool]] | None = None,
    lora_dropout: float = 0.0,
) -> PeftModel:
    """Put a loralib checkpoint onto its base, in 4 bit or not; the adapter is trainable and in fp32.

    Which layers are embeddings or convolutions is seen from the model.

    Args:
        model: the base, without an adapter.
        path: what `torch.save(loralib.lora_state_dict(model), path)` wrote, or the same as safetensors.
        alpha: the layers' lora_alpha, one for all or by name or end of name; loralib's default is 1.
        enable: enable_lora of every MergedLinear, by name or end of name: {"qkv_proj": [True, False, True]}.
        lora_dropout: while training on; the file does not hold it.

    Raises:
        ExportError: the file cannot be read, or does not fit the model.
    """
    path = Path(path)
    if isinstance(model, PeftModel):
        raise ExportError("The model has an adapter already.", "Give the base: model.unload().")
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding | nn.Conv2d)
    }
    spec = Spec(
        alpha=alpha if isinstance(alpha, Mapping) else {"": alpha},
        enable=enable or {},
        embedding=frozenset(name for name, layer in layers.items() if isinstance(layer, nn.Embedding)),
        conv2d=_kernels(layers),
    )
    adapter = read_loralib(read_tensors(path), spec, path)
    check_layers(adapter, {name: _shape(layer) for name, layer in layers.items()}, type(model).__name__, path)
    settings = peft_settings(adapter, all_layers=layers)
    adapted = get_peft_model(model, LoraConfig(**settings, lora_dropout=lora_dropout))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    set_peft_model_state_dict(adapted, peft_tensors(adapter))
    return adapted


def _kernels(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """Kernel sizes of the convolutions that loralib and PEFT can both hold."""
    convolutions = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    return {
        name: layer.kernel_size[0]
        for name, layer in convolutions.items()
        if layer.kernel_size[0] == layer.kernel_size[1] and layer.groups == 1
    }


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) as `LoraDelta` counts them."""
    if isinstance(layer, nn.Linear):  # bitsandbytes' as well, whose packed weight has another shape
        return layer.out_features, layer.in_features
    weight = cast(Tensor, layer.weight)
    return (weight.shape[1], weight.shape[0]) if isinstance(layer, nn.Embedding) else (len(weight), weight[0].numel())
