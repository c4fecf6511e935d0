"""The deltas of a trained adapter for one base, read from its file one tensor at a time.

PEFT's own layers, built without storage, decide which tensor gets which delta. Not part of peft_io.py, which a training run
imports: only an export needs the model class and the private names of PEFT and transformers used here.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.initialization import no_init_weights

from qlora_phi3.adapters.delta import LoraDelta, LowRankBlock
from qlora_phi3.adapters.peft_io import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, check_config, read_config
from qlora_phi3.errors import ExportError, first_line
from qlora_phi3.model.weights import StoredWeights, open_file, read_tensor
from qlora_phi3.units import format_count

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: PEFT's name for the only adapter of a model.
ADAPTER_NAME = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A weight (out_features, in_features) of the base that has a delta, and the names of its parts in the adapter's file."""

    shape: tuple[int, int]
    lora_A: str
    lora_B: str
    magnitude: str | None  #: Of DoRA's magnitude; None without DoRA.
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterDeltas:
    """An adapter on its base."""

    stored: StoredWeights
    targets: Mapping[str, Target]  #: The weights with a delta, by their names in the base.
    #: Name in the base -> name in the adapter's file of the tensor that replaces it (`modules_to_save`).
    replaced: Mapping[str, str]
    unties: bool  #: Embedding and head are one tensor in the base, and two in the trained model.

    def read(self, name: str) -> LoraDelta:
        """Read the delta of a target: a single block and DoRA's magnitude (out_features,), in fp32 on the CPU."""
        target = self.targets[name]
        lora_A, lora_B = (read_tensor(self.stored, key).float() for key in (target.lora_A, target.lora_B))
        magnitude = None if target.magnitude is None else read_tensor(self.stored, target.magnitude).float()
        out_features, in_features = target.shape
        block = LowRankBlock(lora_A=lora_A, lora_B=lora_B, scaling=target.scaling)
        return LoraDelta(out_features=out_features, in_features=in_features, blocks=(block,), magnitude=magnitude)


def read_deltas(folder: Path, config: Mapping[str, Any]) -> AdapterDeltas:
    """Resolve a PEFT LoRA for the base of this config.json; its tensors are checked, and read later. ExportError where a file is
    missing or incomplete, a tensor has another shape than the base's or holds NaN or infinity, or the adapter has something that
    a merge would lose: LoRA on embedding or head, biases, unknown tensors or settings.
    """
    settings = load_lora_config(folder)
    path = folder / ADAPTER_WEIGHTS
    stored = open_file(path, error=ExportError)
    base_model = _build_model(settings, config, folder).get_base_model()
    targets: dict[str, Target] = {}
    trained: dict[int, list[str]] = {}  # names of each parameter trained in full; a tied one has two
    for name, module in base_model.named_modules():
        if isinstance(module, LoraLayer):
            targets[f"{name}.weight"] = _find_target(name, module, stored, path)
        elif isinstance(module, ModulesToSaveWrapper):
            for part, parameter in module.modules_to_save[ADAPTER_NAME].named_parameters():
                _check_shape(stored, f"{PREFIX}{name}.{part}", tuple(parameter.shape), path)
                trained.setdefault(id(parameter), []).append(f"{name}.{part}")
    used = {key for target in targets.values() for key in (target.lora_A, target.lora_B, target.magnitude)}
    unknown = sorted(stored.info.keys() - used - {f"{PREFIX}{name}" for names in trained.values() for name in names})
    if unknown:
        count = format_count(len(unknown), "tensor")
        problem = f"{path} has {count} without a place in this base, first {unknown[0]}."
        raise ExportError(problem, "Give the base that the adapter was trained on.")
    for key in stored.info:
        if not all(torch.stack(chunk.aminmax()).isfinite().all() for chunk in stored.iter_row_chunks(key)):
            raise ExportError(f"{path}: {key} holds NaN or infinity.", "Train again at a lower learning_rate.")
    replaced = {names[0]: f"{PREFIX}{names[0]}" for names in trained.values()}
    are_tied = any({EMBEDDING, HEAD} <= set(names) for names in trained.values())
    was_tied = bool(base_model.config.tie_word_embeddings)
    unties = was_tied and not are_tied and not {EMBEDDING, HEAD}.isdisjoint(replaced)
    return AdapterDeltas(stored=stored, targets=targets, replaced=replaced, unties=unties)


def load_lora_config(folder: Path) -> LoraConfig:
    """PEFT's own reading of adapter_config.json, with the plain start; ExportError where that adapter cannot be merged."""
    # PEFT itself resolves ensure_weight_tying when the model is built.
    check_config(read_config(folder), folder, also_understood=("ensure_weight_tying",))
    try:
        settings = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}.", "Save the adapter again.") from error
    settings.init_lora_weights = True
    return settings


def _build_model(settings: LoraConfig, config: Mapping[str, Any], folder: Path) -> PeftModel:
    try:
        with warnings.catch_warnings(), no_init_weights(), torch.device("meta"):
            warnings.simplefilter("ignore")  # PEFT's advice is for training
            return get_peft_model(Phi3ForCausalLM(Phi3Config(**config)), settings)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"PEFT cannot put {folder} on its base: {first_line(error)}."
        raise ExportError(problem, "Give the adapter's own base.") from error


def _find_target(name: str, layer: Any, stored: StoredWeights, path: Path) -> Target:
    if not isinstance(layer.get_base_layer(), nn.Linear) or f"{name}.weight" == HEAD:
        raise ExportError(f"{path} has a LoRA on {name}, which cannot be merged.", "Use the adapter with PEFT.")
    target = Target(
        shape=(layer.out_features, layer.in_features),
        lora_A=f"{PREFIX}{name}.lora_A.weight",
        lora_B=f"{PREFIX}{name}.lora_B.weight",
        magnitude=f"{PREFIX}{name}.lora_magnitude_vector" if ADAPTER_NAME in layer.lora_magnitude_vector else None,
        scaling=float(layer.scaling[ADAPTER_NAME]),
    )
    _check_shape(stored, target.lora_A, tuple(layer.lora_A[ADAPTER_NAME].weight.shape), path)
    _check_shape(stored, target.lora_B, tuple(layer.lora_B[ADAPTER_NAME].weight.shape), path)
    if target.magnitude is not None:
        _check_shape(stored, target.magnitude, (layer.out_features,), path)
    return target


def _check_shape(stored: StoredWeights, key: str, shape: tuple[int, ...], path: Path) -> None:
    # Which of the two files is wrong cannot be found out.
    hint = (
        "Either the adapter was trained on another base (give that one), or its adapter_config.json was changed, for example "
        "in r or target_modules (put the original back)."
    )
    if key not in stored.info:
        raise ExportError(f"{path} has no {key}, which its adapter_config.json requires on this base.", hint)
    if stored.info[key].shape != shape:
        raise ExportError(f"{path}: {key} is {stored.info[key].shape}, and this base requires {shape}.", hint)
