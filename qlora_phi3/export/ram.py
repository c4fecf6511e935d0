"""How much of the computer's memory this process may still take."""

from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from qlora_phi3.sizes import MIB

#: Left to others, and for what an estimate misses.
MARGIN_BYTES = 512 * MIB
#: Where Linux says which control groups a process is in, and what those may take: a container's limit is one of theirs.
MEMBERSHIP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
#: By version of control groups: files of the limit and of what is taken, and what of that is only cached files.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_ram(max_ram_bytes: int | None = None) -> int:
    """Bytes that this process may take beside what it holds: what is free, within its control groups' limits and its own.

    Args:
        max_ram_bytes: all that the process may hold; None for no such limit.
    """
    free = min((int(psutil.virtual_memory().available), *_free_in_groups())) - MARGIN_BYTES
    if max_ram_bytes is not None:
        free = min(free, max_ram_bytes - int(psutil.Process().memory_info().rss))
    return max(0, free)


def _free_in_groups() -> Iterator[int]:
    """What each control group of this process that has a limit may still take; nothing where there are none."""
    try:
        memberships = [line.split(":", 2) for line in MEMBERSHIP.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    for number, controllers, path in memberships:
        if number == "0":
            root, files = GROUPS, _V2
        elif "memory" in controllers.split(","):
            root, files = GROUPS / "memory", _V1
        else:
            continue
        group = root / path.lstrip("/")
        # A container sees its own group as the root, be it named by its path on the host.
        for place in [group, *(parent for parent in group.parents if parent.is_relative_to(root))]:
            if (free := _free_in(place, files)) is not None:
                yield free


def _free_in(group: Path, files: tuple[str, str, str]) -> int | None:
    limit, taken, cached = files
    try:
        most, held = int((group / limit).read_text(encoding="utf-8")), int((group / taken).read_text(encoding="utf-8"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        return most - held + int(statistics.get(cached, 0))
    except (OSError, ValueError):  # no such group, or "max"
        return None
