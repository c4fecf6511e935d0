"""Adapters from one form to another.

A conversion is lossless or refused: what was written is read again and compared with what was read, layer by layer, before it
replaces anything.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from qlora_phi3.adapters import peft_io
from qlora_phi3.adapters.base_files import copy_portable
from qlora_phi3.adapters.delta import Adapter, check_layers, fuse, last_name, relative_difference, split
from qlora_phi3.adapters.loralib import Spec, build_loralib_layers, build_state_dict, read_loralib
from qlora_phi3.errors import ExportError, ModelError
from qlora_phi3.family import FUSED, PARTS, UNFUSED, Architecture, layer_shapes, parse_architecture
from qlora_phi3.family import read_config as read_model_config
from qlora_phi3.files import atomic_dir, atomic_file, disk_errors

#: Largest relative difference of a delta that counts as lossless; one rounding to fp32 makes 3e-8.
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model an adapter is for."""

    name: str
    architecture: Architecture
    unfused: bool  #: Whether q, k, v, gate and up are layers of their own.

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every layer that can have a delta, by name."""
        return layer_shapes(self.architecture, fused=not self.unfused)


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written, and how far its deltas are from those that were read."""

    target: Path
    num_layers: int
    largest_difference: float
    worst_layer: str
    notes: tuple[str, ...]  #: Lines for a person: what the file does not hold, or what to do with it.


def read_base(name: str, *, label: str | None = None) -> Base:
    """The base of a directory or hub id; a Llama or Mistral counts as an unfused Phi-3. ModelError where it is neither."""
    config = read_model_config(name, prefer_shipped=True)
    unfused = config.get("model_type") in UNFUSED
    architecture = parse_architecture({**config, "model_type": "phi3"} if unfused else config, name)
    return Base(name=label or absolute_name(name), architecture=architecture, unfused=unfused)


def absolute_name(name: str) -> str:
    """The absolute path of a base's directory, for an adapter_config.json is read from anywhere; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def find_base(given: str | None, folder: Path) -> Base:
    """The base of a PEFT adapter: the one given, else the config.json next to it, else what its adapter_config.json names.

    Raises ModelError where the one given is not a phi3 model, ExportError where the adapter's own cannot be found.
    """
    if given:
        return read_base(given)
    own = peft_io.read_config(folder).get("base_model_name_or_path")
    try:
        return read_base(str(folder) if (folder / "config.json").is_file() else own or "(no name)", label=own)
    except ModelError as error:
        raise ExportError(
            f"The base of {folder} cannot be found: {error.message}", "Name it: --base microsoft/Phi-3-mini-4k-instruct"
        ) from error


def check_target(source: Path, target: Path, *, force: bool, is_folder: bool = True) -> None:
    """Refuse a target that would damage something: ExportError where it exists and `force` is not set, is of the other kind
    (`is_folder`: a PEFT directory) or not an adapter, or overlaps with the source.
    """
    inner, outer = target.resolve(), source.resolve()
    if target.name in ("", ".."):
        raise ExportError(f"{target} cannot be the name of a new adapter.", "Name a new directory or file.")
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ExportError(f"{target} overlaps with {source}, which is read.", "Choose another place.")
    if not target.exists():
        return
    if is_folder and target.is_file():
        raise ExportError(f"{target} is a file, not a directory.", "Name a new directory for the PEFT adapter.")
    if not is_folder and target.is_dir():
        raise ExportError(f"{target} is a directory, not a file.", "Name a file that ends in .pt.")
    if target.is_dir() and any(target.iterdir()) and not (target / peft_io.ADAPTER_CONFIG).is_file():
        raise ExportError(f"{target} is a directory that holds other things than an adapter.", "Choose another place.")
    if not force:
        raise ExportError(f"{target} exists already.", "Choose another place, or replace it with --force.")


def loralib_to_peft(source: Path, target: Path, spec: Spec, *, base: Base | None = None, force: bool = False) -> Converted:
    """Write a loralib state dict (.pt, .bin or .safetensors) as a PEFT adapter. ExportError where the file or the target cannot
    be used, or PEFT cannot hold something in it.

    Args:
        spec: what the file does not hold.
        base: the model it was trained on; with it, every name and shape is checked.
        force: replace an adapter at the target.
    """
    if source.is_dir():
        hint = "For a PEFT adapter write --to loralib, fused or split."
        raise ExportError(f"{source} is a directory, and a loralib state dict is a file.", hint)
    check_target(source, target, force=force)
    adapter = read_loralib(peft_io.read_tensors(source), spec, source)
    shapes = base.shapes if base else {}
    if base:
        check_layers(adapter, shapes, base.name, source)
    every = "every other layer" if len(spec.alpha) > 1 else "every layer"
    alphas = ", ".join(f"{alpha:g} for {name or every}" for name, alpha in spec.alpha.items())
    # The comparison cannot find a wrong alpha: both sides have it from the command line.
    notes = [f"With alpha {alphas}, as given: the file holds none to check it against."]
    if not base:
        notes.append("Names and shapes were not checked against a base; --base does that.")
    for_base = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base.name} if base else {}
    config = LoraConfig(**for_base, inference_mode=True).to_dict()
    return _write_peft(adapter, config, target, None, all_layers=shapes, notes=notes)


def peft_to_loralib(source: Path, target: Path, spec: Spec, *, base: Base | None = None, force: bool = False) -> Converted:
    """Write a PEFT adapter as a loralib state dict, for `model.load_state_dict(torch.load(target), strict=False)`.

    The arguments are those of `loralib_to_peft`, but `source` is a PEFT directory or a run's, and of `spec` `enable` makes
    MergedLinears and `alpha` multiplies another one in. Raises ExportError where the adapter or the target cannot be used, or
    loralib cannot hold something, which is named.
    """
    folder = peft_io.find_adapter(source)
    check_target(folder, target, force=force, is_folder=False)
    if target.suffix == ".safetensors":
        raise ExportError(f"{target} would be written by torch.save.", "Name a file that ends in .pt.")
    adapter = peft_io.read_peft(peft_io.read_weights(folder), peft_io.read_config(folder), folder)
    if base:
        check_layers(adapter, base.shapes, base.name, folder)
    layers = build_loralib_layers(adapter, spec, folder)
    written_spec = Spec(
        alpha={name: layer.lora_alpha for name, layer in layers.items()},
        enable=spec.enable,
        embedding=frozenset(name for name, delta in adapter.deltas.items() if delta.kind == "embedding"),
        conv2d={name: delta.kernel_size for name, delta in adapter.deltas.items() if delta.kind == "conv2d"},
    )
    with disk_errors(target, ExportError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as staging:
            with staging.open("wb") as file:  # given a path, torch writes its name into the file
                torch.save(build_state_dict(adapter, layers), file)
            largest, worst = compare(adapter, read_loralib(peft_io.read_tensors(staging), written_spec, staging))
    # How to build the layers: a line for all layers of a name, or one for each where they are not all alike.
    alike: dict[str, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        alike[last_name(name)].append(layer.built_as)
    notes = ["The file holds no alpha; build the layers as"]
    notes += [f"  {last}: {kinds[0]}   ({len(kinds)} of them)" for last, kinds in alike.items() if len(set(kinds)) == 1]
    notes += [f"  {name}: {layer.built_as}" for name, layer in layers.items() if len(set(alike[last_name(name)])) > 1]
    return Converted(target, len(adapter.deltas), largest, worst, tuple(notes))


def change_fusion(source: Path, target: Path, *, fused: bool, base: str | None = None, force: bool = False) -> Converted:
    """Write a PEFT adapter of q, k, v, gate and up as one of qkv_proj and gate_up_proj, or the other way. ExportError where the
    adapter cannot be read, fits no layer of the base, or cannot be converted without loss.

    Args:
        source: a PEFT directory, or a run's.
        fused: whether the new adapter is fused; else it is split, for an unfused Phi-3.
        base: the model that the new adapter is for, where the adapter does not lead to it.
        force: as in `loralib_to_peft`.
    """
    folder = peft_io.find_adapter(source)
    check_target(folder, target, force=force)
    found = find_base(base, folder)
    if fused and found.unfused:
        hint = "Name that one: --base microsoft/Phi-3-mini-4k-instruct"
        raise ExportError(f"{found.name} is an unfused model, and the fused adapter is for another one.", hint)
    config, notes = peft_io.read_config(folder), list[str]()
    base, old_name = (name and absolute_name(name) for name in (base, config.get("base_model_name_or_path")))
    adapter = _read_grouped(folder, config, found, fused=not fused)
    if fused:
        new_name = base or old_name
        converted = fuse(adapter, found.architecture, folder)
    else:
        new_name = base if found.unfused else None
        converted = split(adapter, found.architecture, folder)
        if not found.unfused:
            fused_base = f"{found.name} has q, k and v, and gate and up, as one layer each"
            notes.append(f"It names no base: {fused_base}. Name an unfused Phi-3, such as Unsloth's, with --base.")
    config |= {"base_model_name_or_path": new_name, "auto_mapping": None}
    if new_name is None or new_name != old_name:
        config["revision"] = None
    shapes = layer_shapes(found.architecture, fused=fused)
    return _write_peft(converted, config, target, folder, all_layers=shapes, notes=notes)


def _read_grouped(folder: Path, config: Mapping[str, Any], base: Base, *, fused: bool) -> Adapter:
    adapter = peft_io.read_peft(peft_io.read_weights(folder), config, folder)
    for name in adapter.full_tensors:
        if last_name(name.rpartition(".")[0]) in (*PARTS, *FUSED):
            raise ExportError(f"{folder}: {name} is trained in full.", "Merge that adapter instead.")
    names = {last_name(name) for name in adapter.deltas}
    fused_ones, parts = sorted(names & PARTS.keys()), sorted(names & FUSED.keys())
    if fused_ones and parts:
        raise ExportError(f"{folder} has {fused_ones[0]} and {parts[0]}.", "No model has both fused and split layers.")
    if fused_ones if fused else parts:
        check_layers(adapter, layer_shapes(base.architecture, fused=fused), base.name, folder)
    return adapter


def _write_peft(
    adapter: Adapter,
    config: Mapping[str, Any],
    target: Path,
    tokenizer_from: Path | None,
    *,
    all_layers: Iterable[str],
    notes: Iterable[str],
) -> Converted:
    """Write a PEFT directory, read it again, and compare every delta with what it was made of."""
    config = {**config, **peft_io.build_peft_config(adapter, all_layers=all_layers)}
    tensors = {name: tensor.contiguous() for name, tensor in peft_io.build_peft_tensors(adapter).items()}
    with disk_errors(target, ExportError), atomic_dir(target) as staging:
        save_file(tensors, staging / peft_io.ADAPTER_WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (staging / peft_io.ADAPTER_CONFIG).write_text(text, encoding="utf-8", newline="\n")
        if tokenizer_from is not None:
            copy_portable(tokenizer_from, staging)
        written = peft_io.read_peft(peft_io.read_weights(staging), peft_io.read_config(staging), staging)
        largest, worst = compare(adapter, written)
    strength = f"PEFT's r = {config['r']}, lora_alpha = {config['lora_alpha']}"
    if pattern := {**config["rank_pattern"], **config["alpha_pattern"]}:
        strength += f"; others by pattern: {', '.join(sorted({last_name(name) for name in pattern}))}"
    return Converted(target, len(adapter.deltas), largest, worst, (strength, *notes))


def compare(expected: Adapter, written: Adapter) -> tuple[float, str]:
    """The largest relative difference of scaling * B A, and its layer; ExportError above `TOLERANCE`, or where others differ."""
    full, written_full = expected.full_tensors, written.full_tensors
    same_names = expected.deltas.keys() == written.deltas.keys() and full.keys() == written_full.keys()
    if not same_names or not all(torch.equal(tensor, written_full[name]) for name, tensor in full.items()):
        raise ExportError("The written tensors differ from those read.", "Nothing was saved; please report this.")
    differences = {name: relative_difference(delta, written.deltas[name]) for name, delta in expected.deltas.items()}
    worst = max(differences, key=differences.__getitem__)
    largest = differences[worst]
    if largest > TOLERANCE:
        raise ExportError(f"{worst} would change by {largest:.1e}, relative.", "Nothing was written.")
    return largest, worst
