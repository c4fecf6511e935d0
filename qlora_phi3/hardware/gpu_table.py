"""The table of GPUs in `gpus.csv`: usable memory, compute capability and speed. Gathered in November 2026.

- `observed_total_mib` is the smallest total that PyTorch, llama.cpp or hashcat printed on Linux in public issues, logs and notes.
  It shrinks with the driver's version (an RTX 3060 had 12,045 MiB in 2023 and 11,910 in 2026). Windows and WSL print nearly all
  of the memory, but there the desktop uses some of it. `nvidia_smi_mib` includes the driver's own reserve.
- Speeds are NVIDIA's specifications: memory bandwidth, and the dense 16-bit matrix rate with fp32 accumulation, as PyTorch
  multiplies: cores x boost clock x 2, times 4 on RTX 20, times 2 on GTX 16 (no tensor cores, but fp16 at double rate) and on
  GeForce RTX 30 to 50. Advertised figures are 2 to 8 times that: fp16 accumulation, sparse weights, fp8. A laptop's power limit
  changes its rate by a third; the table has a medium setting. A Tesla T4 falls from 1,590 to about 900 MHz at its 70 W.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files

from qlora_phi3.units import MIB

#: Driver's reserve where nobody printed the usable memory: the largest that was seen on any GPU up to 6 GB (409 MiB, RTX 2060)
#: and on any larger one (498 MiB, RTX 5090), rounded up.
RESERVE_MIB_TO_6_GB, RESERVE_MIB_ABOVE = 410, 500
#: Lowest compute capability with native bfloat16.
NATIVE_BFLOAT16 = (8, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One row of the table, under the same names."""

    name: str
    nominal_gb: int  #: Memory in GB as on the box, where GB means GiB.
    nvidia_smi_mib: int
    observed_total_mib: int | None  #: None where nobody printed it.
    compute_capability: tuple[int, int]
    multiprocessors: int
    bandwidth_gb: float  #: 10^9 bytes a second.
    tflops_16bit: float  #: 10^12 operations a second, dense, fp32 accumulation.
    ecc: bool  #: Error correction, on by default, takes a sixteenth of the memory.

    @property
    def estimated(self) -> bool:
        """Whether `usable_bytes` comes from a rule and not from a measurement."""
        return self.observed_total_mib is None

    @property
    def usable_bytes(self) -> int:
        """What CUDA programs can use when nothing else uses the GPU, not even a desktop."""
        reserve_mib = RESERVE_MIB_TO_6_GB if self.nominal_gb <= 6 else RESERVE_MIB_ABOVE
        return (self.observed_total_mib or self.nvidia_smi_mib - reserve_mib) * MIB

    @property
    def consumer(self) -> bool:
        """Whether it is a GeForce GPU; workstation and server GPUs are looked up by name only."""
        return re.match(r"[GR]TX \d{4}\b(?! Ada)", self.name) is not None

    @property
    def label(self) -> str:
        """The name with its size: `RTX 4060 Ti 16GB`."""
        return f"{self.name} {self.nominal_gb}GB"


def _read_specs() -> Iterator[GpuSpec]:
    text = (files("qlora_phi3") / "gpus.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        major, minor = row["compute_capability"].split(".")
        yield GpuSpec(
            name=row["name"],
            nominal_gb=int(row["nominal_gb"]),
            nvidia_smi_mib=int(row["nvidia_smi_mib"]),
            observed_total_mib=int(row["observed_total_mib"]) if row["observed_total_mib"] else None,
            compute_capability=(int(major), int(minor)),
            multiprocessors=int(row["multiprocessors"]),
            bandwidth_gb=float(row["bandwidth_gb"]),
            tflops_16bit=float(row["tflops_16bit"]),
            ecc=row["ecc"] == "yes",
        )


#: GeForce GPUs first, then workstation and server GPUs that people have or rent.
GPU_TABLE = tuple(_read_specs())


def name_series(specs: Iterable[GpuSpec]) -> str:
    """Consumer GPUs by their series, others by name: `RTX 3060`, `RTX 4070 SUPER` and `A10` give "RTX 30, 40, A10"."""
    specs = list(specs)
    series: dict[str, set[str]] = {}
    for spec in filter(lambda spec: spec.consumer, specs):
        brand, number = spec.name.split()[:2]
        series.setdefault(brand, set()).add(number[:2])
    by_series = [f"{brand} {', '.join(sorted(numbers))}" for brand, numbers in sorted(series.items())]
    return ", ".join([*by_series, *(spec.name for spec in specs if not spec.consumer)])
