"""Windows: the driver spills into the computer's memory instead of saying no, and a step takes many times as long.

NVIDIA's drivers for Windows (and so under WSL) page a card's memory out rather than fail an allocation. A run that outgrows
its card then neither stops nor gets its out-of-memory, it crawls. So it is allowed no more than is free on the card when it
starts: PyTorch's allocator raises, and `oom.py` does the rest. Other programs can still push it out later, which shows in the
time of a step.
"""

import platform
import sys
from collections import deque
from statistics import median

import torch

#: Left free for what the allocator does not count, the kernels CUDA loads when they are first used. Not measured.
SPARE_BYTES = 128 * 2**20
#: Steps that a step is compared with, how many there must be, and how many times slower is worth a warning.
REMEMBERED_STEPS = 20
FEWEST_STEPS = 5
SUSPICIOUS_FACTOR = 5.0


def driver_spills() -> bool:
    """Whether this system's driver moves a card's memory out where it should say no: Windows, and WSL, which uses its driver."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def cap_to_free_memory(device: torch.device) -> int | None:
    """Let this process allocate no more than is free on its card now, where the driver would spill.

    Elsewhere the driver says no by itself, and a cap would only keep the run from memory that another program gives back.

    Returns:
        Bytes this process may hold, what it holds already included; None where there is no cap.
    """
    if device.type != "cuda" or not driver_spills():
        return None
    free, total = torch.cuda.mem_get_info(device)
    room = max(0, free - SPARE_BYTES) + torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    return room


class SpillWatch:
    """Compares each step with those before it, and says once that one took many times as long."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=REMEMBERED_STEPS)  # seconds, seconds a token
        self._told = False

    def look(self, tokens: int, seconds: float) -> str | None:
        """The line to show after a step of so many tokens, or None.

        A short batch takes more time a token and a long one more time, both rightly: only what exceeds both counts.
        """
        measured = (seconds, seconds / max(1, tokens))
        usual = [median(column) for column in zip(*self._steps, strict=True)]
        count = len(self._steps)
        self._steps.append(measured)
        if self._told or count < FEWEST_STEPS:
            return None
        factor = min(now / before for now, before in zip(measured, usual, strict=True))
        if factor <= SUSPICIOUS_FACTOR:
            return None
        self._told = True
        cause = (
            "the driver has probably moved memory of the card into the computer's, because another program took it"
            if driver_spills()
            else "another program is probably computing on the card, or the card slows down to cool"
        )
        return f"This step took {factor:.0f} times as long as those before it: {cause}. Close what else uses the card."
