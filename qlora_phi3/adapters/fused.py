"""Phi-3's fused layers and their parts: the rows of qkv_proj are those of q, k and v, those of gate_up_proj of gate and up.

An unfused Phi-3 (the same weights laid out as a Llama, as Unsloth does it) has the parts as layers of their own.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from qlora_phi3.adapters.delta import Adapter, LoraDelta, LowRankBlock
from qlora_phi3.adapters.peft_io import last_name
from qlora_phi3.errors import ExportError
from qlora_phi3.family import FUSED, PARTS, Architecture, part_rows


def check_layers(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], base: str, where: object) -> None:
    """Refuse an update of a layer that the base does not have, or has in another size; ExportError names it."""
    for name, delta in adapter.deltas.items():
        if name not in shapes:
            known = list(shapes)[:3]
            called = (
                f"Its layers are called as {' and '.join((known[0], *known[2:]))}."
                if known
                else "It has none to adapt."
            )
            raise ExportError(f"{where}: {base} has no layer {name}.", called)
        size = (delta.out_features, delta.in_features)
        if size != shapes[name]:
            raise ExportError(
                f"{where}: {name} is {size[0]} x {size[1]} (out x in), and that of {base} {shapes[name][0]} x {shapes[name][1]}.",
                "Name the base it was trained on with --base; for a MergedLinear, say its groups with --enable.",
            )


def fuse(adapter: Adapter, architecture: Architecture, where: object) -> Adapter:
    """Updates of the parts to updates of the fused layers; a part that has none stays as it is.

    Raises:
        ExportError: there are no parts, or DoRA is on some parts of a layer and not on others.
    """
    rows, grouped, deltas = part_rows(architecture), defaultdict[str, dict[str, LoraDelta]](dict), {}
    for name, delta in adapter.deltas.items():
        place, _, last = name.rpartition(".")
        if last in PARTS:
            raise ExportError(f"{where}: {name} is fused already.", "Write --to split for the other way.")
        if last in FUSED:
            grouped[f"{place}.{FUSED[last]}"][last] = delta
        else:
            deltas[name] = delta
    if not grouped:
        raise ExportError(f"{where} has no {', '.join(FUSED)} to fuse.", "It fits the fused model as it is.")
    for name, parts in grouped.items():
        deltas[name] = _fuse_parts(name, parts, rows, where)
    return replace(adapter, deltas=deltas)


def _fuse_parts(name: str, parts: Mapping[str, LoraDelta], rows: Mapping[str, int], where: object) -> LoraDelta:
    blocks: list[LowRankBlock] = []
    first_row, order = 0, PARTS[last_name(name)]
    for part in order:
        if part in parts:
            blocks += [replace(block, first_row=first_row + block.first_row) for block in parts[part].blocks]
        first_row += rows[part]
    magnitudes = [parts[part].magnitude for part in order if part in parts]
    known = [magnitude for magnitude in magnitudes if magnitude is not None]
    if known and len(known) < len(order):
        missing = next(part for part in order if part not in parts or parts[part].magnitude is None)
        raise ExportError(
            f"{where}: {name} would be DoRA (use_dora) whose {missing} has no magnitude; it would have to come from the base.",
            f"Train {' and '.join(order)} together, or merge the adapter.",
        )
    some = next(iter(parts.values()))
    return LoraDelta(
        out_features=first_row,
        in_features=some.in_features,
        blocks=tuple(blocks),
        magnitude=torch.cat(known) if known else None,
    )


def split(adapter: Adapter, architecture: Architecture, where: object) -> Adapter:
    """Updates of the fused layers to updates of the parts: A whole, and the part's rows of B.

    Ranks that a part does not use (columns of B that are all zero) are left out, and so is a part that uses none; nothing
    is where the whole B is zero, as before training.

    Raises:
        ExportError: there is no fused layer.
    """
    rows, deltas = part_rows(architecture), {}
    for name, delta in adapter.deltas.items():
        place, _, last = name.rpartition(".")
        if last in FUSED:
            raise ExportError(f"{where}: {name} is split already.", "Write --to fused for the other way.")
        if last not in PARTS:
            deltas[name] = delta
            continue
        first_row = 0
        for part in PARTS[last]:
            taken = _take_rows(delta, first_row, first_row + rows[part])
            if taken.blocks:
                deltas[f"{place}.{part}"] = taken
            first_row += rows[part]
    if deltas.keys() == adapter.deltas.keys():
        raise ExportError(f"{where} has no {' and no '.join(PARTS)} to split.", "It fits the unfused model as it is.")
    return replace(adapter, deltas=deltas)


def _take_rows(delta: LoraDelta, start: int, stop: int) -> LoraDelta:
    magnitude = None if delta.magnitude is None else delta.magnitude[start:stop]
    (block,) = delta.blocks  # PEFT's
    lora_B = block.lora_B[start:stop]
    used = lora_B.any(dim=0)
    blocks: tuple[LowRankBlock, ...] = ()
    if magnitude is not None or not block.lora_B.any():
        blocks = (replace(block, lora_B=lora_B),)
    elif used.any():
        blocks = (replace(block, lora_A=block.lora_A[used], lora_B=lora_B[:, used]),)
    return LoraDelta(out_features=stop - start, in_features=delta.in_features, blocks=blocks, magnitude=magnitude)


def read_enable(texts: Sequence[str], find: Callable[[], Architecture]) -> dict[str, tuple[bool, ...]]:
    """enable_lora of MergedLinears, by layer, as people write it.

    Args:
        texts: "q,v" or "gate,up" for Phi-3's fused layers, or NAME=1,0,1 for any layer, with 1 or true for an enabled group.
        find: gives the base's shapes; called where letters are given, as its heads decide how many groups they are.

    Raises:
        ExportError: the text is neither.
    """
    enable = {}
    for text in texts:
        name, _, as_list = text.rpartition("=")
        words = [word.strip().lower() for word in as_list.strip("[] ").split(",")]
        fused = next(
            (layer for layer, parts in PARTS.items() if {f"{word}_proj" for word in words} <= set(parts)), None
        )
        if fused and name in ("", fused):
            enable[fused] = groups_of(fused, words, find())
        elif name and set(words) <= {"1", "0", "true", "false"}:
            enable[name] = tuple(word in ("1", "true") for word in words)
        else:
            raise ExportError(
                f"--enable {text} names no groups.", "Write q,v or gate,up or NAME=1,0,1, one digit a group."
            )
    return enable


def groups_of(layer: str, words: Sequence[str], architecture: Architecture) -> tuple[bool, ...]:
    """enable_lora of a MergedLinear on a fused layer, from the parts it trains: groups of the smallest part's size.

    Args:
        layer: qkv_proj or gate_up_proj.
        words: of q, k, v, or of gate, up.
        architecture: of the base; with grouped queries q takes several groups, Phi-3-medium's 4 and Phi-4-mini's 3.

    Raises:
        ExportError: the query heads are no multiple of the key-value heads.
    """
    rows = part_rows(architecture)
    sizes = [rows[part] for part in PARTS[layer]]
    if any(size % min(sizes) for size in sizes):
        raise ExportError(
            f"The parts of {layer} have {sizes} rows, which no equal groups can hold.", "Leave --enable out."
        )
    enable: list[bool] = []
    for part, size in zip(PARTS[layer], sizes, strict=True):
        enable += [part.removesuffix("_proj") in words] * (size // min(sizes))
    return tuple(enable)
