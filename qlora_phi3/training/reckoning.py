"""Predicted and measured memory of a run, side by side."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qlora_phi3.device import Device, read_device
from qlora_phi3.errors import DeviceError
from qlora_phi3.memory.margin import record_error
from qlora_phi3.sizes import format_gib
from qlora_phi3.training.memory import peak_memory_bytes
from qlora_phi3.training.planning import Predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was taken at most so far, in bytes; None where the device cannot tell."""

    allocated_bytes: int | None
    reserved_bytes: int | None
    #: What this process took of the card, other programs as they were.
    on_card_bytes: int | None
    #: Resident memory of the process, where there is no card.
    process_bytes: int | None
    #: Tenant -> bytes, of what lasts from step to step.
    tenants: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reckoning:
    """A prediction and what came of it."""

    predicted: Predicted | None
    measured: Measured

    @property
    def error(self) -> float | None:
        """Signed share by which the prediction of what is allocated was too high; None where one of the two is not known."""
        if self.predicted is None or not self.measured.allocated_bytes:
            return None
        return self.predicted.allocated_bytes / self.measured.allocated_bytes - 1

    def line(self) -> str:
        """For people."""
        parts = [] if self.predicted is None else [f"predicted {format_gib(self.predicted.allocated_bytes)} of tensors"]
        if self.measured.allocated_bytes:
            parts.append(f"measured {format_gib(self.measured.allocated_bytes)}")
            parts.append(f"reserved {format_gib(self.measured.reserved_bytes or 0)}")
        if self.measured.process_bytes:
            parts.append(f"the process took {format_gib(self.measured.process_bytes)}, libraries included")
        if self.error is not None:
            parts.append(f"the prediction was {abs(self.error):.1%} too {'high' if self.error >= 0 else 'low'}")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        predicted = None if self.predicted is None else asdict(self.predicted)
        return {"predicted": predicted, "measured": asdict(self.measured), "error": self.error}

    def remember(self, card: Device | None) -> None:
        """Keep the error of this card; it widens the margin of later plans there."""
        predicted = self.predicted and self.predicted.on_card_bytes
        if card is not None and predicted and self.measured.on_card_bytes:
            record_error(card.name, predicted, self.measured.on_card_bytes)


def measure_memory(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device, card: Device | None
) -> Measured:
    """What this process took at most until now.

    Args:
        card: as it was before; None on a CPU.
    """
    on_cuda = device.type == "cuda"
    return Measured(
        allocated_bytes=torch.cuda.max_memory_allocated(device) if on_cuda else None,
        reserved_bytes=torch.cuda.max_memory_reserved(device) if on_cuda else None,
        on_card_bytes=_taken_since(card),
        process_bytes=None if on_cuda else peak_memory_bytes(device),
        tenants=_lasting(model, optimizer),
    )


def _taken_since(card: Device | None) -> int | None:
    if card is None:
        return None
    try:
        return card.free_bytes - read_device().free_bytes
    except DeviceError:
        return None


def _lasting(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """As the simulation names them."""
    tenants = {"4-bit weights": 0, "quantization state": 0, "adapter": 0, "other weights": 0}
    for parameter in {parameter.data_ptr(): parameter for parameter in model.parameters()}.values():
        packed = parameter.dtype == torch.uint8
        name = "adapter" if parameter.requires_grad else "4-bit weights" if packed else "other weights"
        tenants[name] += parameter.nbytes
        tenants["quantization state"] += _scales_bytes(getattr(parameter, "quant_state", None))
    held = (value for state in optimizer.state.values() for value in state.values()) if optimizer is not None else ()
    state = {value.data_ptr(): value.nbytes for value in held if isinstance(value, torch.Tensor)}
    return {
        name: num_bytes for name, num_bytes in {**tenants, "optimizer state": sum(state.values())}.items() if num_bytes
    }


def _scales_bytes(state: Any) -> int:
    if state is None:
        return 0
    own: int = sum(value.nbytes for value in (state.absmax, state.code, state.offset) if value is not None)
    return own + _scales_bytes(state.state2)
