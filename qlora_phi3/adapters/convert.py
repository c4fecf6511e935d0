"""Adapters from one form to another: lossless or refused, and held against each other layer by layer before anything is kept."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from qlora_phi3.adapters.delta import Adapter, Progress, relative_difference
from qlora_phi3.adapters.fused import check_layers, fuse, split
from qlora_phi3.adapters.loralib import Layer, Spec, loralib_layers, loralib_tensors, read_loralib
from qlora_phi3.adapters.peft_io import (
    check_target,
    drafted,
    find_adapter,
    last_name,
    peft_settings,
    peft_tensors,
    read_config,
    read_peft,
    read_tensors,
    read_weights,
    write_folder,
    write_state_dict,
)
from qlora_phi3.errors import ExportError, ModelError
from qlora_phi3.family import FUSED, PARTS, Architecture, layer_shapes, parse_architecture
from qlora_phi3.family import read_config as read_model_config

#: Largest relative difference of an update that is still called lossless; one rounding to fp32 makes 3e-8.
TOLERANCE = 1e-6


#: What transformers calls the model whose layers an unfused Phi-3 has.
UNFUSED = ("llama", "mistral")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model an adapter is for."""

    name: str
    architecture: Architecture
    #: Whether q, k, v, gate and up are layers of their own.
    unfused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was written, and how far its updates are from those that were read."""

    target: Path
    num_layers: int
    largest_difference: float
    #: Layer with that difference.
    worst_layer: str
    #: For people: what the file does not say, or what to do with it.
    told: tuple[str, ...]


def read_base(name: str, *, label: str | None = None) -> Base:
    """The base of a folder or hub id; a Llama or Mistral is taken for an unfused Phi-3. ModelError where it is neither."""
    config = read_model_config(name, prefer_shipped=True)
    unfused = config.get("model_type") in UNFUSED
    architecture = parse_architecture({**config, "model_type": "phi3"} if unfused else config, name)
    return Base(name=label or name, architecture=architecture, unfused=unfused)


def find_base(given: str | None, folder: Path) -> Base:
    """The base of a PEFT adapter: the one named, else the config.json beside it, else the one its adapter_config.json names.

    Raises:
        ModelError: the one named is no phi3 model.
        ExportError: none is named, and the adapter's own cannot be looked up.
    """
    if given:
        return read_base(given)
    own = read_config(folder).get("base_model_name_or_path")
    place = str(folder) if (folder / "config.json").is_file() else own
    try:
        return read_base(place or "", label=own)
    except ModelError as error:
        raise ExportError(
            f"The base of {folder} cannot be looked up: {error.message}",
            "Name it: --base microsoft/Phi-3-mini-4k-instruct",
        ) from error


def loralib_to_peft(
    source: Path,
    target: Path,
    spec: Spec,
    *,
    base: Base | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a loralib state dict as a PEFT adapter.

    Args:
        source: .pt, .bin or .safetensors.
        target: the new folder.
        spec: what the file does not say.
        base: the model it was trained on; with it, every name and shape is checked.
        force: replace an adapter that is there.
        progress: told of every layer that was checked.

    Raises:
        ExportError: the file or the target cannot be used, or something in it cannot be held.
    """
    if source.is_dir():
        raise ExportError(
            f"{source} is a folder, and a loralib state dict is a file.",
            "For a PEFT adapter write --to loralib, fused or split.",
        )
    check_target(source, target, force=force)
    adapter = read_loralib(read_tensors(source), spec, source)
    shapes = layer_shapes(base.architecture, fused=not base.unfused) if base else {}
    if base:
        check_layers(adapter, shapes, base.name, source)
    config = LoraConfig(
        task_type="CAUSAL_LM" if base else None,
        base_model_name_or_path=base.name if base else None,
        inference_mode=True,
    ).to_dict()
    unchecked = () if base else ("Names and shapes were not held against a base; --base does that.",)
    told = (_tell_alpha(spec), *unchecked)
    return _write_peft(adapter, config, target, beside=None, all_layers=shapes, told=told, progress=progress)


def _tell_alpha(spec: Spec) -> str:
    """That the comparison cannot see a wrong alpha: both sides have it from the command line."""
    given = [
        f"{alpha:g} for {name or ('every other layer' if len(spec.alpha) > 1 else 'every layer')}"
        for name, alpha in spec.alpha.items()
    ]
    return f"With alpha {', '.join(given)}, as given: the file holds none to check it against."


def peft_to_loralib(
    source: Path,
    target: Path,
    spec: Spec,
    *,
    base: Base | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a PEFT adapter as a loralib state dict, for `model.load_state_dict(torch.load(target), strict=False)`.

    Args:
        source: PEFT folder, or a run's.
        target: the new file.
        spec: `enable` for MergedLinears, `alpha` to fold another one in.
        base: the model it is for; with it, every name and shape is checked.
        force: replace a file that is there.
        progress: told of every layer that was checked.

    Raises:
        ExportError: the adapter or the target cannot be used, or loralib cannot hold something, which is named.
    """
    folder = find_adapter(source)
    check_target(folder, target, force=force, is_folder=False)
    if target.suffix == ".safetensors":
        raise ExportError(f"{target} would be written by torch.save.", "Name a file that ends in .pt.")
    adapter = read_peft(read_weights(folder), read_config(folder), folder)
    if base:
        check_layers(adapter, layer_shapes(base.architecture, fused=not base.unfused), base.name, folder)
    layers = loralib_layers(adapter, spec, folder)
    with drafted(target) as draft:
        write_state_dict(draft, loralib_tensors(adapter, layers))
        again = Spec(
            alpha={name: layer.lora_alpha for name, layer in layers.items()},
            enable=spec.enable,
            embedding=frozenset(name for name, delta in adapter.deltas.items() if delta.kind == "embedding"),
            conv2d={name: delta.kernel_size for name, delta in adapter.deltas.items() if delta.kind == "conv2d"},
        )
        largest, worst = compare(adapter, read_loralib(read_tensors(draft), again, draft), progress)
    told = ("The file holds no alpha; build the layers as", *(f"  {line}" for line in describe_layers(layers)))
    return Converted(
        target=target, num_layers=len(adapter.deltas), largest_difference=largest, worst_layer=worst, told=told
    )


def describe_layers(layers: Mapping[str, Layer]) -> list[str]:
    """How loralib layers must be built: a line for all of a name, or one for each where they are not all alike."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        alike[last_name(name)].append(layer.built_as)
    lines = [f"{last}: {kinds[0]}   ({len(kinds)} of them)" for last, kinds in alike.items() if len(set(kinds)) == 1]
    others = [name for name in layers if len(set(alike[last_name(name)])) > 1]
    return [*lines, *(f"{name}: {layers[name].built_as}" for name in others)]


def split_to_fused(
    source: Path, target: Path, *, base: str | None = None, force: bool = False, progress: Progress | None = None
) -> Converted:
    """Write a PEFT adapter of q, k, v, gate and up apart as one of qkv_proj and gate_up_proj.

    Args:
        source: PEFT folder, or a run's.
        target: the new folder.
        base: the fused model, where the adapter does not lead to it.
        force: replace an adapter that is there.
        progress: told of every layer that was checked.

    Raises:
        ExportError: it cannot be read, fits no layer of the base, or cannot be held.
    """
    folder = find_adapter(source)
    check_target(folder, target, force=force)
    found = find_base(base, folder)
    if found.unfused:
        raise ExportError(
            f"{found.name} is an unfused model, and the fused adapter is for another.",
            "Name that: --base microsoft/Phi-3-mini-4k-instruct",
        )
    adapter, config = _read_checked(folder, found, fused=False)
    config |= _based_on(base or config.get("base_model_name_or_path"), config)
    converted = fuse(adapter, found.architecture, folder)
    shapes = layer_shapes(found.architecture, fused=True)
    return _write_peft(converted, config, target, beside=folder, all_layers=shapes, progress=progress)


def fused_to_split(
    source: Path, target: Path, *, base: str | None = None, force: bool = False, progress: Progress | None = None
) -> Converted:
    """Write a PEFT adapter of qkv_proj and gate_up_proj as one of q, k, v, gate and up apart, for an unfused Phi-3.

    The arguments are those of `split_to_fused`; `base` is the unfused model.
    """
    folder = find_adapter(source)
    check_target(folder, target, force=force)
    found = find_base(base, folder)
    adapter, config = _read_checked(folder, found, fused=True)
    config |= _based_on(base if found.unfused else None, config)
    told = () if found.unfused else ("It names no base: load it onto an unfused Phi-3, or name that one with --base.",)
    converted = split(adapter, found.architecture, folder)
    shapes = layer_shapes(found.architecture, fused=False)
    return _write_peft(converted, config, target, beside=folder, all_layers=shapes, told=told, progress=progress)


def _read_checked(folder: Path, base: Base, *, fused: bool) -> tuple[Adapter, dict[str, Any]]:
    """An adapter of that kind, every layer held against the base; one of the other kind is left to `fuse` and `split`."""
    config = read_config(folder)
    adapter = read_peft(read_weights(folder), config, folder)
    for name in adapter.whole:
        layer = last_name(name.rpartition(".")[0])
        if layer in PARTS or layer in FUSED:
            raise ExportError(
                f"{folder}: {name} is trained whole (modules_to_save, bias).", "Merge that adapter instead."
            )
    names = {last_name(name) for name in adapter.deltas}
    whole, parts = sorted(names & PARTS.keys()), sorted(names & FUSED.keys())
    if whole and parts:
        raise ExportError(
            f"{folder} has {whole[0]} and {parts[0]}, fused and split.", "No model has layers of both kinds."
        )
    if whole if fused else parts:
        check_layers(adapter, layer_shapes(base.architecture, fused=fused), base.name, folder)
    return adapter, config


def _based_on(name: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    same = name is not None and name == config.get("base_model_name_or_path")
    return {
        "base_model_name_or_path": name,
        "revision": config.get("revision") if same else None,
        "auto_mapping": None,
    }


def _write_peft(
    adapter: Adapter,
    config: Mapping[str, Any],
    target: Path,
    *,
    beside: Path | None,
    all_layers: Iterable[str],
    told: tuple[str, ...] = (),
    progress: Progress | None,
) -> Converted:
    """Write a PEFT folder, read it again, and hold every update against what it was made of."""
    settings = {**config, **peft_settings(adapter, all_layers=all_layers)}
    with drafted(target) as draft:
        write_folder(draft, peft_tensors(adapter), settings, beside)
        largest, worst = compare(adapter, read_peft(read_weights(draft), read_config(draft), draft), progress)
    line = f"PEFT's r = {settings['r']}, lora_alpha = {settings['lora_alpha']}"
    pattern = {**settings["rank_pattern"], **settings["alpha_pattern"]}
    others = f"; others by pattern: {', '.join(sorted({last_name(name) for name in pattern}))}" if pattern else ""
    return Converted(
        target=target,
        num_layers=len(adapter.deltas),
        largest_difference=largest,
        worst_layer=worst,
        told=(line + others, *told),
    )


def compare(expected: Adapter, written: Adapter, progress: Progress | None = None) -> tuple[float, str]:
    """Hold scaling * B A of every layer from both sides against each other.

    Returns:
        The largest relative difference (`relative_difference`), and the layer that has it.

    Raises:
        ExportError: it is past `TOLERANCE`, or a tensor that is held whole is another.
    """
    same_names = expected.deltas.keys() == written.deltas.keys() and expected.whole.keys() == written.whole.keys()
    if not same_names or any(not torch.equal(tensor, written.whole[name]) for name, tensor in expected.whole.items()):
        raise ExportError(
            "What was written holds other tensors than what was read.", "Nothing is kept; please report this."
        )
    largest, worst = 0.0, next(iter(expected.deltas))
    for number, (name, delta) in enumerate(expected.deltas.items()):
        difference = relative_difference(delta, written.deltas[name])
        if difference > largest:
            largest, worst = difference, name
        if progress:
            progress(number + 1, len(expected.deltas))
    if largest > TOLERANCE:
        raise ExportError(f"{worst} would change by {largest:.1e}, relative.", "Nothing was written.")
    return largest, worst
