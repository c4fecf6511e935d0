"""Bytes, counts and durations as people write and read them."""

import re
from collections.abc import Sequence

#: Bytes in a unit. GB is decimal and GiB binary; a letter alone, as in `11g`, is decimal, which is the smaller.
UNITS: dict[str, int] = {"b": 1} | {
    letter + ending: base**power
    for power, letter in enumerate("kmgt", start=1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
MIB = UNITS["mib"]
GIB = UNITS["gib"]


def parse_size(text: str, *, binary: bool = False) -> int:
    """Bytes of a size such as `11GiB`, `12 GB`, `11.5g` or `500MiB`, in upper or lower case, rounded down. ValueError, which says
    what to write, where it is no size, has no unit, or is not more than zero.

    `binary`: read GB as GiB, as it is meant on the box of a GPU: a 12 GB GPU has 12 GiB.
    """
    found = re.fullmatch(r"\s*([+-]?\d{1,15}(?:\.\d*)?|[+-]?\.\d+)\s*([a-z]*)\s*", text, flags=re.ASCII | re.IGNORECASE)
    number, unit = found.groups() if found else ("", "")
    if found and float(number) == 0:
        raise ValueError(f"'{text}' is not a size: it must be more than zero.")
    if found and not unit:
        amount = number.lstrip("+-")
        raise ValueError(f"'{text}' has no unit: write {amount}GiB, {amount}GB or {amount}MiB.")
    if unit.lower() not in UNITS:
        raise ValueError(f"'{text}' is not a size: write a number and its unit, such as 11GiB, 12GB or 500MiB.")
    power = "bkmgt".index(unit[0].lower())
    size = int(float(number) * (1024**power if binary else UNITS[unit.lower()]))
    if size < 1:
        raise ValueError(f"'{text}' is not a size: it must be more than zero.")
    return size


def format_gib(num_bytes: int) -> str:
    """A size for people: `3.62 GiB`, or `412 MiB` where it is less than 1 GiB; a difference may be negative."""
    mib = round(num_bytes / MIB)
    return f"{mib} MiB" if abs(mib) < 1024 else f"{num_bytes / GIB:.2f} GiB"


def format_count(number: int, noun: str) -> str:
    """A count for people: `1 row`, `1,200 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_percent(share: float, digits: int = 0) -> str:
    """A share for people: `75 %`, with so many digits after the point."""
    return f"{100 * share:.{digits}f} %"


def round_to_100(values: Sequence[float]) -> list[int]:
    """Shares of the sum in whole percent that add up to 100: those with the largest fractions are rounded up."""
    exact = [100 * value / sum(values) for value in values]
    order = sorted(range(len(exact)), key=lambda number: int(exact[number]) - exact[number])
    up = order[: 100 - sum(map(int, exact))]
    return [int(share) + (number in up) for number, share in enumerate(exact)]


def describe_epochs(epochs: float) -> str:
    """Passes over the data for people: `1 epoch`, `2.5 epochs`."""
    return "1 epoch" if f"{epochs:.3g}" == "1" else f"{epochs:.3g} epochs"


def format_duration(seconds: float) -> str:
    """A duration for a person: `0:07`, `12:30`, `3:05:00`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def describe_duration(seconds: float) -> str:
    """An estimated duration for a person, rounded: `40 s`, `25 min`, `3 h 10 min`, `2.5 days`."""
    if round(seconds) < 90:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 36 * 60:
        hours, minutes = divmod(5 * round(minutes / 5), 60)
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{seconds / 86_400:.1f} days"
