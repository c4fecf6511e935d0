"""What a simulated step needs, as plain numbers; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The memory of one optimizer step with everything around it, in bytes."""

    #: Most bytes alive at once, and in which phase.
    peak_bytes: int
    peak_phase: str
    #: What lived at the peak, largest first.
    tenants: Mapping[str, int]
    #: The peak of each phase: load, update, forward, backward, save, evaluation.
    phases: Mapping[str, int]
    #: Alive between two steps.
    resident_bytes: int
    #: Optimizer state in managed memory, which the driver moves between card and computer; not in the figures above.
    paged_bytes: int
    #: Most bytes of the computer's memory that stand in for the card's: paged state and offloaded activations.
    host_bytes: int
    #: (storage id, bytes) for an allocation, (storage id, 0) for its end, in order.
    trace: tuple[tuple[int, int], ...]
