"""The deltas of a trained adapter for one base, read from its file one tensor at a time.

Not part of peft_io.py, which a training run imports: only an export needs this.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from qlora_phi3.adapters.delta import LoraDelta
from qlora_phi3.adapters.peft_io import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, read_config, read_peft, read_shapes
from qlora_phi3.errors import ExportError
from qlora_phi3.family import Architecture, layer_shapes
from qlora_phi3.model.weights import StoredWeights, open_file, read_tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterDeltas:
    """An adapter on its base."""

    stored: StoredWeights
    targets: Mapping[str, LoraDelta]  #: The weights with a delta, by their names in the base; the deltas' tensors are on "meta".
    #: Name in the base -> name in the adapter's file of the tensor that replaces it (`modules_to_save`).
    replaced: Mapping[str, str]
    unties: bool  #: Embedding and head are one tensor in the base, and two in the trained model.

    def read(self, name: str) -> LoraDelta:
        """Read the delta of a target: a single block and DoRA's magnitude (out_features,), in fp32 on the CPU."""
        delta, prefix = self.targets[name], PREFIX + name.removesuffix("weight")
        lora_A, lora_B = (read_tensor(self.stored, f"{prefix}lora_{matrix}.weight").float() for matrix in "AB")
        block, magnitude = replace(delta.block, lora_A=lora_A, lora_B=lora_B), None
        if delta.magnitude is not None:
            magnitude = read_tensor(self.stored, f"{prefix}lora_magnitude_vector").float()
        return replace(delta, blocks=(block,), magnitude=magnitude)


def read_deltas(folder: Path, architecture: Architecture) -> AdapterDeltas:
    """Check a PEFT LoRA for a base, whose tensors are read later. ExportError where a file is missing or incomplete, its tensors
    do not fit its config or hold NaN or infinity, or the adapter has something that a merge would lose.
    """
    path = folder / ADAPTER_WEIGHTS
    stored = open_file(path, error=ExportError)
    adapter = read_peft(read_shapes(folder), read_config(folder), folder)
    for name, delta in adapter.deltas.items():
        if delta.kind != "linear" or f"{name}.weight" in (EMBEDDING, HEAD):
            raise ExportError(f"{path} has a LoRA on {name}, which cannot be merged.", "Use the adapter with PEFT.")
    settings = load_lora_config(folder)
    covered = {name for name in layer_shapes(architecture, fused=True) if check_target_module_exists(settings, name)}
    if differing := sorted(covered ^ adapter.deltas.keys()):
        message = f"{path} and its {ADAPTER_CONFIG} have other layers of this base, the first that differs is {differing[0]}."
        raise ExportError(message, "Give the base that the adapter was trained on, or put its original config back.")
    for key in stored.info:
        if not all(torch.stack(chunk.aminmax()).isfinite().all() for chunk in stored.iter_row_chunks(key)):
            raise ExportError(f"{path}: {key} holds NaN or infinity.", "Train again at a lower learning_rate.")
    replaced = {name: PREFIX + name for name in adapter.full_tensors}
    return AdapterDeltas(
        stored=stored,
        targets={f"{name}.weight": delta for name, delta in adapter.deltas.items()},
        replaced=replaced,
        unties=architecture.tie_word_embeddings and not {EMBEDDING, HEAD}.isdisjoint(replaced),
    )


def load_lora_config(folder: Path) -> LoraConfig:
    """PEFT's own reading of adapter_config.json, with the plain start; ExportError where PEFT refuses it."""
    try:
        settings = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}.", "Save the adapter again.") from error
    settings.init_lora_weights = True
    return settings
