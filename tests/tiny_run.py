"""What a run of a tiny model leaves for an export, without training it: an adapter, and the base noted down to the bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tiny_model import FP32

from qlora_phi3.adapters.adapter_deltas import read_deltas
from qlora_phi3.export.base import RecordedBase, read_record
from qlora_phi3.export.merge import MergedWeights
from qlora_phi3.family import parse_architecture, read_architecture, read_config
from qlora_phi3.model.lora import attach_adapter
from qlora_phi3.model.phi3 import load_base
from qlora_phi3.model.weights import open_weights
from qlora_phi3.recipe.schema import Lora, Model, Quantization
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.training.artifacts import record_base


@dataclass(frozen=True)
class TinyRun:
    """The live model, and the folders it was made from and left behind."""

    live: PeftModel
    base: Path
    adapter: Path
    record: Path

    def open_base(self, **options: Any) -> RecordedBase:
        """The base's files with the run's record."""
        return RecordedBase(open_weights(self.base), read_record(self.record), **options)

    def merged(self, base: RecordedBase | None = None, *, onto: Any = "nf4", dtype: Any = torch.float32) -> MergedWeights:
        """The merged tensors."""
        deltas = read_deltas(self.adapter, read_architecture(str(self.base)))
        return MergedWeights(base or self.open_base(), deltas, onto=onto, dtype=dtype)


def leave_run(
    folder: Path,
    base: Path,
    *,
    lora: Lora | None = None,
    compute_dtype: torch.dtype = FP32,
    quantization: Quantization | None = None,
) -> TinyRun:
    """Load a base, put an adapter on it whose update is not zero, and save what a run saves."""
    quantization = quantization or Quantization()
    loaded = load_base(
        Model(name=str(base)),
        quantization,
        parse_architecture(read_config(str(base)), str(base)),
        compute_dtype=compute_dtype,
        device=torch.device("cpu"),
        longest_row=512,
    )
    torch.manual_seed(0)  # of the A matrices
    live = attach_adapter(loaded, lora or Lora(r=8))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in live.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_B" in name:
            parameter.data.copy_(0.02 * noise)
        if "magnitude" in name or "modules_to_save" in name:
            parameter.data.mul_(1 + 0.1 * noise)
    live.save_pretrained(folder / "adapter")
    run = RunFolder(folder)
    record_base(live, run, name=str(base), quantization=quantization, compute_dtype=compute_dtype)
    return TinyRun(live=live, base=base, adapter=run.adapter, record=run.base)
