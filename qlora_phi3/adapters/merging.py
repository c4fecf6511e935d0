"""What an adapter adds to each tensor of its base, as PEFT itself resolves it; whatever cannot be merged is refused by name."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.initialization import no_init_weights

from qlora_phi3.errors import ExportError
from qlora_phi3.model.weights import StoredWeights, open_file, read_tensor
from qlora_phi3.units import format_count

ADAPTER_NAME = "adapter_model.safetensors"


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


_ADAPTER = "default"


#: PEFT's, before every name of the base.
PREFIX = "base_model.model."


#: Ways to start an adapter that leave the base as it is; the others (pissa, olora, corda, loftq …) train on a changed base.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


#: Of an adapter whose two files do not fit each other on this base, which of them is wrong cannot be told.
OTHER_BASE_OR_CONFIG = (
    "Either it was trained on another base (give that one), or its adapter_config.json was changed, say in r or target_modules "
    "(put its own back)."
)


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """What is added to a weight: scaling * up @ down, all fp32; with DoRA each row is then brought to length `magnitude`.

    down: (rank, in_features). up: (out_features, rank). magnitude: (out_features,) or None.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A tensor of the base that the adapter adds to, and under which names the adapter's file holds the parts."""

    shape: tuple[int, int]
    lora_A: str
    lora_B: str
    magnitude: str | None
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterDeltas:
    """An adapter, read part by part.

    `targets`: what is added to, by the base's names. `replaced`: base's name -> the name in the adapter's file of the tensor that
    stands in its place (`modules_to_save`). `unties`: embedding and head were one tensor and are two now.
    """

    stored: StoredWeights
    targets: Mapping[str, Target]
    replaced: Mapping[str, str]
    unties: bool

    def read(self, name: str) -> LoraDelta:
        """The update of a target, in fp32 on the CPU."""
        target = self.targets[name]
        return LoraDelta(
            lora_A=read_tensor(self.stored, target.lora_A).float(),
            lora_B=read_tensor(self.stored, target.lora_B).float(),
            scaling=target.scaling,
            magnitude=None if target.magnitude is None else read_tensor(self.stored, target.magnitude).float(),
        )


def read_deltas(folder: Path, config: Mapping[str, Any]) -> AdapterDeltas:
    """Read a PEFT LoRA adapter for a base.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        config: the contents of the base's config.json.

    Raises:
        ExportError: files missing or cut, a tensor of another shape than the base's, NaN or infinity in one, or anything that
            a merge could not keep: other kinds of adapter, biases, LoRA on embeddings or the head, tensors nobody reads.
    """
    settings = read_settings(folder)
    stored = open_file(folder / ADAPTER_NAME, error=ExportError)
    model = _skeleton(settings, config, folder)
    targets: dict[str, Target] = {}
    trained: dict[int, list[str]] = {}  # parameters in full, each under all its names: tied ones have two
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            targets[f"{name}.weight"] = _target(name, module, stored, folder)
        elif isinstance(module, ModulesToSaveWrapper):
            for part, parameter in module.modules_to_save[_ADAPTER].named_parameters():
                _check_shape(stored, f"{PREFIX}{name}.{part}", tuple(parameter.shape), folder)
                trained.setdefault(id(parameter), []).append(f"{name}.{part}")
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise _refused(folder, f"single trained tokens of {name} (trainable_token_indices)")
    replaced = {names[0]: f"{PREFIX}{names[0]}" for names in trained.values()}
    tied = any({EMBEDDING, HEAD} <= set(names) for names in trained.values())
    _check_all_read(stored, targets, [name for names in trained.values() for name in names], folder)
    _check_finite(stored, folder)
    were_tied = bool(model.get_base_model().config.tie_word_embeddings)
    unties = were_tied and not tied and not {EMBEDDING, HEAD}.isdisjoint(replaced)
    return AdapterDeltas(stored=stored, targets=targets, replaced=replaced, unties=unties)


def read_settings(folder: Path) -> LoraConfig:
    """PEFT's own reading of adapter_config.json.

    Raises:
        ExportError: it is missing, unreadable, or of an adapter that cannot be merged.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ExportError(f"{folder} holds no adapter_config.json.", "Give the folder of a PEFT adapter.")
    if not (folder / ADAPTER_NAME).is_file() and (folder / "adapter_model.bin").is_file():
        raise ExportError(
            f"{folder} holds its adapter only as a pickle (adapter_model.bin), which can run code when it is read.",
            "Save it again as safetensors.",
        )
    try:
        settings = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{folder / 'adapter_config.json'} cannot be read: {error}.", "Save the adapter again."
        ) from error
    if type(settings) is not LoraConfig:
        raise _refused(folder, f"an adapter of another kind than LoRA ({settings.peft_type})")
    start = settings.init_lora_weights
    if start not in _PLAIN_STARTS:
        raise _refused(folder, f'init_lora_weights = "{start}", which trains on a base that it has changed')
    for key in ("layer_replication", "alora_invocation_tokens", "megatron_config", "trainable_token_indices"):
        if getattr(settings, key, None):
            raise _refused(folder, f"{key} in adapter_config.json")
    settings.init_lora_weights = True
    return settings


def _skeleton(settings: LoraConfig, config: Mapping[str, Any], folder: Path) -> PeftModel:
    """The base with the adapter on it, without storage: PEFT's own answer to which layer gets what."""
    try:
        with warnings.catch_warnings(), no_init_weights(), torch.device("meta"):
            warnings.simplefilter("ignore")  # PEFT's advice is for those who train
            model = Phi3ForCausalLM(Phi3Config(**config))
            return get_peft_model(model, settings)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ExportError(f"PEFT cannot put {folder} on its base: {reason}.", "Give the adapter's own base.") from error


def _target(name: str, layer: Any, stored: StoredWeights, folder: Path) -> Target:
    if not isinstance(layer.get_base_layer(), nn.Linear) or f"{name}.weight" == HEAD:
        raise _refused(folder, f"a LoRA on {name}")
    variant = layer.lora_variant.get(_ADAPTER)
    uses_dora = type(variant).__name__ == "DoraLinearVariant"
    if variant is not None and not uses_dora:
        raise _refused(folder, f"{type(variant).__name__} on {name}")
    if layer.lora_bias[_ADAPTER]:
        raise _refused(folder, f"a trained bias of the adapter on {name} (lora_bias)")
    lora_A, lora_B = (f"{PREFIX}{name}.lora_{side}.weight" for side in "AB")
    _check_shape(stored, lora_A, tuple(layer.lora_A[_ADAPTER].weight.shape), folder)
    _check_shape(stored, lora_B, tuple(layer.lora_B[_ADAPTER].weight.shape), folder)
    magnitude = f"{PREFIX}{name}.lora_magnitude_vector" if uses_dora else None
    if magnitude is not None:
        _check_shape(stored, magnitude, (layer.out_features,), folder)
    shape = (layer.out_features, layer.in_features)
    return Target(
        shape=shape, lora_A=lora_A, lora_B=lora_B, magnitude=magnitude, scaling=float(layer.scaling[_ADAPTER])
    )


def _check_shape(stored: StoredWeights, key: str, shape: tuple[int, ...], folder: Path) -> None:
    if key not in stored.info:
        raise ExportError(
            f"{folder / ADAPTER_NAME} has no {key}, which its adapter_config.json asks for on this base.",
            OTHER_BASE_OR_CONFIG,
        )
    if stored.info[key].shape != shape:
        raise ExportError(
            f"{folder / ADAPTER_NAME}: {key} is {stored.info[key].shape}, and this base needs {shape}.",
            OTHER_BASE_OR_CONFIG,
        )


def _check_all_read(stored: StoredWeights, targets: Mapping[str, Target], trained: Iterable[str], folder: Path) -> None:
    used = {key for target in targets.values() for key in (target.lora_A, target.lora_B, target.magnitude)}
    unknown = sorted(stored.info.keys() - used - {f"{PREFIX}{name}" for name in trained})
    if unknown:
        raise _refused(
            folder, f"{format_count(len(unknown), 'tensor')} without a place in this base, first {unknown[0]}"
        )


def _check_finite(stored: StoredWeights, folder: Path) -> None:
    for key in stored.info:
        for piece in stored.iter_row_chunks(key):
            if not torch.stack(piece.aminmax()).isfinite().all():
                raise ExportError(
                    f"{folder / ADAPTER_NAME}: {key} holds NaN or infinity.",
                    "The training went astray: train again at a lower learning_rate.",
                )


def _refused(folder: Path, what: str) -> ExportError:
    return ExportError(f"{folder} holds {what}: that cannot be merged into the base.", "Use it with PEFT, unmerged.")
