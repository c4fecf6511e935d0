"""Table of GPUs: usable memory, compute capability and speed. Gathered in November 2026.

- `observed_total_mib` is the smallest total that PyTorch, llama.cpp or hashcat printed on Linux in public issues, logs and notes.
  It shrinks with the driver's version (an RTX 3060 had 12,045 MiB in 2023 and 11,910 in 2026). Windows and WSL print nearly all
  of the memory, but there the desktop uses some of it. `nvidia_smi_mib` includes the driver's own reserve.
- Speeds are NVIDIA's specifications: memory bandwidth, and the dense 16-bit matrix rate with fp32 accumulation, as PyTorch
  multiplies: cores x boost clock x 2, times 4 on RTX 20, times 2 on GTX 16 (no tensor cores, but fp16 at double rate) and on
  GeForce RTX 30 to 50. Advertised figures are 2 to 8 times that: fp16 accumulation, sparse weights, fp8. A laptop's power limit
  changes its rate by a third; the table has a medium setting. A Tesla T4 falls from 1,590 to about 900 MHz at its 70 W.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from qlora_phi3.units import MIB

#: Driver's reserve where nobody printed the usable memory: the largest that was seen on any GPU up to 6 GB (409 MiB, RTX 2060)
#: and on any larger one (498 MiB, RTX 5090), rounded up.
RESERVE_MIB_TO_6_GB, RESERVE_MIB_ABOVE = 410, 500
#: Lowest compute capability with native bfloat16.
NATIVE_BFLOAT16 = (8, 0)


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One row of the table."""

    name: str
    #: Memory in GB as on the box, where GB means GiB.
    nominal_gb: int
    nvidia_smi_mib: int
    #: None where nobody printed it.
    observed_total_mib: int | None
    compute_capability: tuple[int, int]
    multiprocessors: int
    #: 10^9 bytes a second.
    bandwidth_gb: float
    #: 10^12 operations a second, dense, fp32 accumulation.
    tflops_16bit: float
    #: Error correction, on by default, takes a sixteenth of the memory.
    ecc: bool = False

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


TURING, AMPERE, ADA, BLACKWELL = (7, 5), (8, 6), (8, 9), (12, 0)
GPU_TABLE = (
    # name, GB, nvidia-smi MiB, observed MiB, compute capability, multiprocessors, GB/s, TFLOPS
    GpuSpec("GTX 1650", 4, 4096, 3712, TURING, 14, 128, 6.0),
    GpuSpec("GTX 1650 SUPER", 4, 4096, None, TURING, 20, 192, 8.8),
    GpuSpec("GTX 1650 Laptop", 4, 4096, None, TURING, 16, 128, 5.1),
    GpuSpec("GTX 1650 Ti Laptop", 4, 4096, None, TURING, 16, 192, 6.1),
    GpuSpec("GTX 1660", 6, 6144, None, TURING, 22, 192, 10.1),
    GpuSpec("GTX 1660 SUPER", 6, 6144, None, TURING, 22, 336, 10.1),
    GpuSpec("GTX 1660 Ti", 6, 6144, 5747, TURING, 24, 288, 10.9),
    GpuSpec("GTX 1660 Ti Laptop", 6, 6144, None, TURING, 24, 288, 8.2),
    GpuSpec("RTX 2050 Laptop", 4, 4096, None, AMPERE, 16, 112, 12.1),
    GpuSpec("RTX 2060", 6, 6144, 5735, TURING, 30, 336, 25.8),
    GpuSpec("RTX 2060", 12, 12288, 11833, TURING, 34, 336, 28.7),
    GpuSpec("RTX 2060 SUPER", 8, 8192, None, TURING, 34, 448, 28.7),
    GpuSpec("RTX 2060 Laptop", 6, 6144, None, TURING, 30, 264, 18.2),
    GpuSpec("RTX 2070", 8, 8192, 7782, TURING, 36, 448, 29.9),
    GpuSpec("RTX 2070 SUPER", 8, 8192, None, TURING, 40, 448, 36.3),
    GpuSpec("RTX 2070 Laptop", 8, 8192, None, TURING, 36, 384, 21.8),
    GpuSpec("RTX 2070 SUPER Laptop", 8, 8192, None, TURING, 40, 352, 23.7),
    GpuSpec("RTX 2080", 8, 8192, 7783, TURING, 46, 448, 40.3),
    GpuSpec("RTX 2080 SUPER", 8, 8192, None, TURING, 48, 496, 44.6),
    GpuSpec("RTX 2080 Ti", 11, 11264, 10825, TURING, 68, 616, 53.8),
    GpuSpec("RTX 2080 Laptop", 8, 8192, None, TURING, 46, 384, 25.8),
    GpuSpec("RTX 2080 SUPER Laptop", 8, 8192, None, TURING, 48, 352, 26.5),
    GpuSpec("RTX 3050", 6, 6144, 5803, AMPERE, 18, 168, 13.5),
    GpuSpec("RTX 3050", 8, 8192, None, AMPERE, 20, 224, 18.2),
    GpuSpec("RTX 3050 Laptop", 4, 4096, 3762, AMPERE, 16, 192, 12.3),
    GpuSpec("RTX 3050 Laptop", 6, 6144, None, AMPERE, 20, 168, 15.3),
    GpuSpec("RTX 3050 Ti Laptop", 4, 4096, None, AMPERE, 20, 192, 15.2),
    GpuSpec("RTX 3060", 8, 8192, None, AMPERE, 28, 240, 25.5),
    GpuSpec("RTX 3060", 12, 12288, 11910, AMPERE, 28, 360, 25.5),
    GpuSpec("RTX 3060 Ti", 8, 8192, 7833, AMPERE, 38, 448, 32.4),
    GpuSpec("RTX 3060 Laptop", 6, 6144, 5806, AMPERE, 30, 336, 26.2),
    GpuSpec("RTX 3070", 8, 8192, 7753, AMPERE, 46, 448, 40.6),
    GpuSpec("RTX 3070 Ti", 8, 8192, 7840, AMPERE, 48, 608, 43.5),
    GpuSpec("RTX 3070 Laptop", 8, 8192, None, AMPERE, 40, 448, 33.2),
    GpuSpec("RTX 3070 Ti Laptop", 8, 8192, 7850, AMPERE, 46, 448, 35.0),
    GpuSpec("RTX 3080", 10, 10240, 9871, AMPERE, 68, 760, 59.5),
    GpuSpec("RTX 3080", 12, 12288, None, AMPERE, 70, 912, 61.3),
    GpuSpec("RTX 3080 Ti", 12, 12288, 11910, AMPERE, 80, 912, 68.2),
    GpuSpec("RTX 3080 Laptop", 8, 8192, None, AMPERE, 48, 448, 42.0),
    GpuSpec("RTX 3080 Laptop", 16, 16384, 15993, AMPERE, 48, 448, 42.0),
    GpuSpec("RTX 3080 Ti Laptop", 16, 16384, None, AMPERE, 58, 512, 47.2),
    GpuSpec("RTX 3090", 24, 24576, 24123, AMPERE, 82, 936, 71.2),
    GpuSpec("RTX 3090 Ti", 24, 24564, 24110, AMPERE, 84, 1008, 80.0),
    GpuSpec("RTX 4050 Laptop", 6, 6141, 5785, ADA, 20, 192, 24.3),
    GpuSpec("RTX 4060", 8, 8188, 7807, ADA, 24, 272, 30.2),
    GpuSpec("RTX 4060 Ti", 8, 8188, 7806, ADA, 34, 288, 44.1),
    GpuSpec("RTX 4060 Ti", 16, 16380, 15943, ADA, 34, 288, 44.1),
    GpuSpec("RTX 4060 Laptop", 8, 8188, 7806, ADA, 24, 256, 29.1),
    GpuSpec("RTX 4070", 12, 12282, 11837, ADA, 46, 504, 58.3),
    GpuSpec("RTX 4070 SUPER", 12, 12282, 11857, ADA, 56, 504, 71.0),
    GpuSpec("RTX 4070 Ti", 12, 12282, None, ADA, 60, 504, 80.2),
    GpuSpec("RTX 4070 Ti SUPER", 16, 16376, 15934, ADA, 66, 672, 88.2),
    GpuSpec("RTX 4070 Laptop", 8, 8188, 7806, ADA, 36, 256, 40.1),
    GpuSpec("RTX 4080", 16, 16376, 15945, ADA, 76, 717, 97.5),
    GpuSpec("RTX 4080 SUPER", 16, 16376, 15944, ADA, 80, 736, 104.4),
    GpuSpec("RTX 4080 Laptop", 12, 12282, None, ADA, 58, 432, 67.7),
    GpuSpec("RTX 4090", 24, 24564, 24081, ADA, 128, 1008, 165.2),
    GpuSpec("RTX 4090 D", 24, 24564, None, ADA, 114, 1008, 147.1),
    GpuSpec("RTX 4090 Laptop", 16, 16376, None, ADA, 76, 576, 79.4),
    GpuSpec("RTX 5050", 8, 8151, None, BLACKWELL, 20, 320, 26.3),
    GpuSpec("RTX 5050 Laptop", 8, 8151, None, BLACKWELL, 20, 384, 27.2),
    GpuSpec("RTX 5060", 8, 8151, 7700, BLACKWELL, 30, 448, 38.4),
    GpuSpec("RTX 5060 Ti", 8, 8151, None, BLACKWELL, 36, 448, 47.4),
    GpuSpec("RTX 5060 Ti", 16, 16311, 15825, BLACKWELL, 36, 448, 47.4),
    GpuSpec("RTX 5060 Laptop", 8, 8151, None, BLACKWELL, 26, 384, 33.2),
    GpuSpec("RTX 5070", 12, 12227, 11755, BLACKWELL, 48, 672, 61.7),
    GpuSpec("RTX 5070 Ti", 16, 16303, 15808, BLACKWELL, 70, 896, 87.9),
    GpuSpec("RTX 5070 Laptop", 8, 8151, None, BLACKWELL, 36, 384, 43.3),
    GpuSpec("RTX 5070 Ti Laptop", 12, 12227, None, BLACKWELL, 46, 672, 52.3),
    GpuSpec("RTX 5080", 16, 16303, 15840, BLACKWELL, 84, 960, 112.6),
    GpuSpec("RTX 5080 Laptop", 16, 16303, None, BLACKWELL, 60, 896, 70.3),
    GpuSpec("RTX 5090", 32, 32607, 32109, BLACKWELL, 170, 1792, 209.5),
    GpuSpec("RTX 5090 Laptop", 24, 24463, None, BLACKWELL, 82, 896, 90.7),
    # Workstation and server GPUs that people have or rent.
    GpuSpec("Tesla T4", 16, 15360, 14912, TURING, 40, 320, 37.0, ecc=True),
    GpuSpec("RTX A2000 Laptop", 4, 4096, 3770, AMPERE, 20, 192, 35.0),
    GpuSpec("RTX A2000", 6, 6138, None, AMPERE, 26, 288, 31.9),
    GpuSpec("RTX A2000", 12, 12282, None, AMPERE, 26, 288, 31.9),
    GpuSpec("RTX A4000", 16, 16376, 15984, AMPERE, 48, 448, 76.7),
    GpuSpec("RTX A4500", 20, 20470, None, AMPERE, 56, 640, 94.6),
    GpuSpec("RTX A5000", 24, 23028, 22721, AMPERE, 64, 768, 111.1, ecc=True),
    GpuSpec("RTX A5500", 24, 23028, None, AMPERE, 80, 768, 136.4, ecc=True),
    GpuSpec("RTX A6000", 48, 46068, None, AMPERE, 84, 768, 154.8, ecc=True),
    GpuSpec("A10", 24, 23028, 22599, AMPERE, 72, 600, 125.0, ecc=True),
    GpuSpec("A10G", 24, 23028, 22587, AMPERE, 80, 600, 70.0, ecc=True),
    GpuSpec("L4", 24, 23034, 22563, ADA, 58, 300, 121.0, ecc=True),
    GpuSpec("L40S", 48, 46068, None, ADA, 142, 864, 362.0, ecc=True),
    GpuSpec("RTX 2000 Ada", 16, 16380, None, ADA, 22, 224, 48.0),
    GpuSpec("RTX 4000 Ada", 20, 20475, None, ADA, 48, 360, 106.8),
    GpuSpec("RTX 4500 Ada", 24, 23034, None, ADA, 60, 432, 158.4, ecc=True),
    GpuSpec("RTX 5000 Ada", 32, 32760, None, ADA, 100, 576, 261.2),
    GpuSpec("RTX 6000 Ada", 48, 46068, None, ADA, 142, 960, 364.2, ecc=True),
    GpuSpec("RTX PRO 4000", 24, 24467, None, BLACKWELL, 70, 672, 187.6),
    GpuSpec("RTX PRO 4500", 32, 32623, None, BLACKWELL, 82, 896, 219.6),
    GpuSpec("RTX PRO 5000", 48, 48935, None, BLACKWELL, 110, 1344, 294.8),
    GpuSpec("RTX PRO 6000", 96, 97887, None, BLACKWELL, 188, 1792, 503.8),
    GpuSpec("A100", 40, 40960, None, (8, 0), 108, 1555, 312.0),
    GpuSpec("A100", 80, 81920, None, (8, 0), 108, 1935, 312.0),
    GpuSpec("H100", 80, 81559, None, (9, 0), 132, 3352, 989.4),
)


def name_series(specs: Iterable[GpuSpec]) -> str:
    """Consumer GPUs by their series, others by name: `RTX 3060`, `RTX 4070 SUPER` and `A10` give "RTX 30, 40, A10"."""
    specs = list(specs)
    series: dict[str, set[str]] = {}
    for spec in filter(lambda spec: spec.consumer, specs):
        brand, number = spec.name.split()[:2]
        series.setdefault(brand, set()).add(number[:2])
    by_series = [f"{brand} {', '.join(sorted(numbers))}" for brand, numbers in sorted(series.items())]
    return ", ".join([*by_series, *(spec.name for spec in specs if not spec.consumer)])
