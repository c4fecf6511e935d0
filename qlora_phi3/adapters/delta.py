"""What an adapter adds to each weight of its base, whatever format it came from; for Phi-3's fused layers and for their parts.

A `LoraDelta` is a sum of low-rank blocks: one for a plain LoRA, several for loralib's MergedLinear and Conv2d and for adapters
of q, k and v apart. The rows of qkv_proj are those of q, k and v, the rows of gate_up_proj those of gate and up. An unfused Phi-3
(the same weights in the layout of a Llama, as Unsloth makes it) has the parts as layers of their own.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from qlora_phi3.errors import ExportError
from qlora_phi3.family import FUSED, PARTS, Architecture, part_rows

Kind = Literal["linear", "embedding", "conv2d"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankBlock:
    """scaling * lora_B @ lora_A, added to the weight from `first_row` and `first_column` on.

    lora_A is (r, columns), lora_B is (rows, r); both have the floating-point dtype of the adapter's file.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    first_row: int = 0
    first_column: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraDelta:
    """What an adapter adds to the weight (out_features, in_features) of one layer.

    The weight of an embedding counts as (dim, num_embeddings), that of a Conv2d as (out, in * kernel_size**2).
    """

    out_features: int
    in_features: int
    blocks: tuple[LowRankBlock, ...]
    kind: Kind = "linear"
    kernel_size: int = 1
    magnitude: Tensor | None = None  #: DoRA's length of every row of the adapted weight, (out_features,).

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def block(self) -> LowRankBlock:
        """The block of a delta of a single one, with lora_A (r, in_features) and lora_B (out_features, r)."""
        (block,) = self.blocks
        return block


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Deltas by the name of their layer, and tensors stored in full (biases, modules_to_save) by their name in the base."""

    deltas: Mapping[str, LoraDelta]
    full_tensors: Mapping[str, Tensor] = field(default_factory=dict)


def stack(delta: LoraDelta) -> tuple[Tensor, Tensor, float]:
    """Combine all blocks of a delta into one pair of matrices: lora_A (rank, in_features), lora_B (out_features, rank), both of
    the blocks' common dtype, and the scaling.

    Blocks with the same A share its rows. Where the scalings differ, the largest is kept and the others are multiplied into B,
    which then is fp32 or wider: one rounding of 6e-8.
    """
    blocks, scaling = delta.blocks, max(block.scaling for block in delta.blocks)
    dtypes = [tensor.dtype for block in blocks for tensor in (block.lora_A, block.lora_B)]
    if any(block.scaling != scaling for block in blocks):
        dtypes.append(torch.float32)
    dtype = reduce(torch.promote_types, dtypes)
    rank, starts = 0, list[int]()  # the first rank of each block
    for block in blocks:
        starts.append(rank)
        for start, other in zip(starts, blocks, strict=False):  # the earlier blocks and the block itself
            if other.first_column == block.first_column and torch.equal(other.lora_A, block.lora_A):
                starts[-1] = start
                break
        rank = max(rank, starts[-1] + len(block.lora_A))
    lora_A = torch.zeros(rank, delta.in_features, dtype=dtype)
    lora_B = torch.zeros(delta.out_features, rank, dtype=dtype)
    for start, block in zip(starts, blocks, strict=True):
        ranks = slice(start, start + len(block.lora_A))
        rows = slice(block.first_row, block.first_row + len(block.lora_B))
        columns = slice(block.first_column, block.first_column + block.lora_A.shape[1])
        lora_A[ranks, columns] = block.lora_A.to(dtype)
        lora_B[rows, ranks] = scale_lora_b(block.lora_B, block.scaling / scaling).to(dtype)
    return lora_A, lora_B, scaling


def scale_lora_b(lora_B: Tensor, factor: float) -> Tensor:
    """lora_B (out, r) times a factor: unchanged for 1, else computed in float64 and rounded once to fp32 (float64 stays)."""
    if factor == 1:
        return lora_B
    return (lora_B.double() * factor).to(torch.promote_types(lora_B.dtype, torch.float32))


def relative_difference(first: LoraDelta, second: LoraDelta) -> float:
    """Norm of the difference of two deltas over the norm of the first, in float64; infinite where sizes or magnitudes differ."""
    magnitudes = [delta.magnitude for delta in (first, second) if delta.magnitude is not None]
    if len(magnitudes) == 1 or (magnitudes and not torch.equal(*magnitudes)):
        return float("inf")
    if first.shape != second.shape:
        return float("inf")
    negated = (replace(block, lora_A=-block.lora_A) for block in second.blocks)
    difference, norm = _norm(replace(first, blocks=(*first.blocks, *negated))), _norm(first)
    return difference / norm if norm else float("inf") if difference else 0.0


def _norm(delta: LoraDelta) -> float:
    """Frobenius norm of a delta, whose up to 50 million weights are never formed: with B = Q R and A^T = S P, |B A| = |R P^T|."""
    blocks = [replace(block, lora_A=block.lora_A.double(), lora_B=block.lora_B.double()) for block in delta.blocks]
    lora_A, lora_B, scaling = stack(replace(delta, blocks=tuple(blocks)))
    left, right = (torch.linalg.qr(matrix, mode="r").R for matrix in (lora_B, lora_A.T))
    return scaling * float((left @ right.T).norm())


def last_name(layer: str) -> str:
    """qkv_proj of model.layers.0.self_attn.qkv_proj."""
    return layer.rpartition(".")[2]


def check_layers(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], base: str, where: object) -> None:
    """Raise ExportError where the base has no layer of the (out_features, in_features) of a delta.

    `shapes` are those of the base's layers. Its name `base` and the adapter's place `where` are for the messages.
    """
    for name, delta in adapter.deltas.items():
        if name not in shapes:
            examples = " and ".join(list(shapes)[:3:2])
            raise ExportError(f"{where}: {base} has no layer {name}.", f"Its layers have names such as {examples}.")
        if delta.shape != shapes[name]:
            (rows, columns), (base_rows, base_columns) = delta.shape, shapes[name]
            raise ExportError(
                f"{where}: {name} is {rows} x {columns} (out x in), and in {base} it is {base_rows} x {base_columns}.",
                "Name the base it was trained on with --base; for a MergedLinear, give its groups with --enable.",
            )


def fuse(adapter: Adapter, architecture: Architecture, where: object) -> Adapter:
    """Turn deltas of the parts into deltas of the fused layers; rows of a part without a delta stay zero.

    Raises ExportError where there are no parts, or some parts of a layer have DoRA and others do not.
    """
    grouped, deltas = defaultdict[str, dict[str, LoraDelta]](dict), {}
    for name, delta in adapter.deltas.items():
        place, _, last = name.rpartition(".")
        if last in PARTS:
            raise ExportError(f"{where}: {name} is fused already.", "Write --to split for the other direction.")
        if last in FUSED:
            grouped[f"{place}.{FUSED[last]}"][last] = delta
        else:
            deltas[name] = delta
    if not grouped:
        raise ExportError(f"{where} has no {', '.join(FUSED)} to fuse.", "It fits the fused model as it is.")
    for name, parts in grouped.items():
        deltas[name] = _fuse_parts(name, parts, part_rows(architecture), where)
    return replace(adapter, deltas=deltas)


def _fuse_parts(name: str, parts: Mapping[str, LoraDelta], rows: Mapping[str, int], where: object) -> LoraDelta:
    blocks: list[LowRankBlock] = []
    first_row, order = 0, PARTS[last_name(name)]
    for part in order:
        if part in parts:
            blocks += [replace(block, first_row=first_row + block.first_row) for block in parts[part].blocks]
        first_row += rows[part]
    magnitudes = {part: parts[part].magnitude for part in order if part in parts}
    known = [magnitude for magnitude in magnitudes.values() if magnitude is not None]
    if known and len(known) < len(order):
        missing = next(part for part in order if magnitudes.get(part) is None)
        message = f"{where}: {name} would be DoRA (use_dora) without the magnitude of {missing}, which only the base could give."
        raise ExportError(message, f"Train {' and '.join(order)} together, or merge the adapter.")
    return LoraDelta(
        out_features=first_row,
        in_features=next(iter(parts.values())).in_features,
        blocks=tuple(blocks),
        magnitude=torch.cat(known) if known else None,
    )


def split(adapter: Adapter, architecture: Architecture, where: object) -> Adapter:
    """Turn deltas of the fused layers into deltas of the parts: A unchanged, and the part's rows of B.

    Ranks that a part does not use (columns of its B that are all zero) are left out, and so is a part that uses none. All
    ranks stay where the layer's B is zero, as before training. Raises ExportError where there is no fused layer.
    """
    rows, deltas = part_rows(architecture), {}
    for name, delta in adapter.deltas.items():
        place, _, last = name.rpartition(".")
        if last in FUSED:
            raise ExportError(f"{where}: {name} is split already.", "Write --to fused for the other direction.")
        if last not in PARTS:
            deltas[name] = delta
            continue
        (block,) = delta.blocks  # PEFT's
        keep_ranks = delta.magnitude is not None or not bool(block.lora_B.any())
        first_row = 0
        for part in PARTS[last]:
            own = slice(first_row, first_row + rows[part])
            lora_B = block.lora_B[own]
            used = lora_B.any(dim=0) | keep_ranks
            if used.any():
                deltas[f"{place}.{part}"] = LoraDelta(
                    out_features=rows[part],
                    in_features=delta.in_features,
                    blocks=(replace(block, lora_A=block.lora_A[used], lora_B=lora_B[:, used]),),
                    magnitude=None if delta.magnitude is None else delta.magnitude[own],
                )
            first_row = own.stop
    if deltas.keys() == adapter.deltas.keys():
        raise ExportError(f"{where} has no {' and no '.join(PARTS)} to split.", "It fits the unfused model as it is.")
    return replace(adapter, deltas=deltas)


def read_enable(texts: Sequence[str], find: Callable[[], Architecture]) -> dict[str, tuple[bool, ...]]:
    """Read enable_lora of MergedLinears, by layer name, from the command line; ExportError for a text of neither form.

    Args:
        texts: "q,v" or "gate,up" for Phi-3's fused layers, or NAME=1,0,1 for any layer, with 1 or true for an enabled group.
        find: gives the base's shapes; called only for letters, as the number of groups depends on the heads.
    """
    enable = {}
    for text in texts:
        name, _, as_list = text.rpartition("=")
        words = [word.strip().lower() for word in as_list.strip("[] ").split(",")]
        fused = next((layer for layer, parts in PARTS.items() if {f"{word}_proj" for word in words} <= set(parts)), "")
        if fused and name in ("", fused):
            # Groups of the smallest part's size: with grouped queries q takes 4 of them in Phi-3-medium, 3 in Phi-4-mini.
            rows = part_rows(find())
            sizes = [rows[part] for part in PARTS[fused]]
            groups = ([part.removesuffix("_proj") in words] * (rows[part] // min(sizes)) for part in PARTS[fused])
            enable[fused] = tuple(chain.from_iterable(groups))
        elif name and set(words) <= {"1", "0", "true", "false"}:
            enable[name] = tuple(word in ("1", "true") for word in words)
        else:
            raise ExportError(f"--enable {text} names no groups.", "Write q,v or gate,up or NAME=1,0,1.")
    return enable
