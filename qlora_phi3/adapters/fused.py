"""Adapters of Phi-3's fused layers to adapters of their parts and back.

The rows of qkv_proj are those of q, k and v, the rows of gate_up_proj those of gate and up. An unfused Phi-3 (the same weights
in the layout of a Llama, as Unsloth makes it) has the parts as layers of their own.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch

from qlora_phi3.adapters.delta import Adapter, LoraDelta, LowRankBlock
from qlora_phi3.adapters.peft_io import last_name
from qlora_phi3.errors import ExportError
from qlora_phi3.family import FUSED, PARTS, Architecture, part_rows


def check_layers(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], base: str, where: object) -> None:
    """Raise ExportError where the base has no layer of the (out_features, in_features) of a delta.

    `shapes` are those of the base's layers. Its name `base` and the adapter's place `where` are for the messages.
    """
    examples = " and ".join(name for number, name in enumerate(shapes) if number in (0, 2))
    hint = f"Its layers have names such as {examples}." if examples else "It has no layers that can be adapted."
    for name, delta in adapter.deltas.items():
        if name not in shapes:
            raise ExportError(f"{where}: {base} has no layer {name}.", hint)
        (rows, columns), size = shapes[name], (delta.out_features, delta.in_features)
        if size != shapes[name]:
            raise ExportError(
                f"{where}: {name} is {size[0]} x {size[1]} (out x in), and in {base} it is {rows} x {columns}.",
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
