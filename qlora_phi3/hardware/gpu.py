"""What a graphics card offers and who else is on it: the card here, read through NVML, or any card of the table.

NVML is the driver's own interface: asking it makes no CUDA context, so that looking costs the card no memory. A card of
the table is an idle one without a display: what a desktop takes (0.3 to 1 GiB on Windows) is known only of the card here.
"""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PureWindowsPath
from statistics import median
from typing import Any

from qlora_phi3.errors import DeviceError, NoDeviceError
from qlora_phi3.hardware.gpu_table import CARDS, NATIVE_BFLOAT16, GpuSpec
from qlora_phi3.units import GIB, format_gib

ELSEWHERE = "Ask about a card that is not here: --gpu 'RTX 4070', --vram 12GB, or --all."


#: Words of a card's full name that tell no card from another.
STOP_WORDS = {
    "nvidia",
    "geforce",
    "quadro",
    "tesla",
    "rtx",
    "gtx",
    "gpu",
    "graphics",
    "card",
    "with",
    "design",
    "generation",
}


#: The same word as others write it.
SYNONYMS = {"mobile": "laptop", "notebook": "laptop", "maxq": "laptop", "s": "super"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """Another program on the card."""

    name: str
    pid: int
    #: None where the driver does not say, as on Windows and WSL.
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A graphics card: here, from the table, or any of a size."""

    name: str
    #: What CUDA programs can use when nothing else is on the card.
    total_bytes: int
    #: What they can use now; the same for a card that is not here.
    free_bytes: int
    processes: tuple[GpuProcess, ...] = ()
    compute_capability: tuple[int, int]
    bandwidth_bytes_per_second: float
    #: Dense 16-bit matrix products with fp32 accumulation, 10^12 operations a second.
    tflops_16bit: float
    is_local: bool
    #: `total_bytes` comes from a rule and not from a reading, or only the size of the card was asked for.
    estimated: bool = False
    #: Cards of the table, where it is no single one: its memory is the smallest's, its speed a middling one.
    represents: tuple[str, ...] = ()

    @property
    def other_processes_bytes(self) -> int:
        """What is taken on the card, by the `processes` and by whoever the driver does not name."""
        return self.total_bytes - self.free_bytes


def read_gpu(index: int = 0, *, nvml: Any = None) -> Gpu:
    """The card that PyTorch would call `cuda:<index>`, as it is now.

    NVML counts cards by their slot. CUDA puts the fastest first unless CUDA_DEVICE_ORDER=PCI_BUS_ID is set, which
    machines with several unlike cards should do.

    Args:
        index: the number among the cards that CUDA_VISIBLE_DEVICES leaves.
        nvml: the module `pynvml`, or a stand-in.

    Raises:
        NoDeviceError: no nvidia-ml-py, no driver, no card, or the driver fails.
        DeviceError: no such card.
    """
    if nvml is None:
        nvml = _import_nvml()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NoDeviceError(f"No NVIDIA driver answers on this machine ({error}).", ELSEWHERE) from error
    try:
        return _read(nvml, _find_handle(nvml, index))
    except nvml.NVMLError as error:
        raise NoDeviceError(f"The NVIDIA driver failed while reading card {index}: {error}.", ELSEWHERE) from error
    finally:
        nvml.nvmlShutdown()


def _import_nvml() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise NoDeviceError(
            "The card cannot be read: the package nvidia-ml-py is not installed.",
            f"Install it (pip install nvidia-ml-py). {ELSEWHERE}",
        ) from error
    return pynvml


def _find_handle(nvml: Any, index: int) -> Any:
    handles = [nvml.nvmlDeviceGetHandleByIndex(slot) for slot in range(nvml.nvmlDeviceGetCount())]
    if not handles:
        raise NoDeviceError("The NVIDIA driver finds no card in this machine.", ELSEWHERE)
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None:
        handles = list(_visible(wanted, handles, [nvml.nvmlDeviceGetUUID(handle) for handle in handles]))
    if not 0 <= index < len(handles):
        reason = "" if wanted is None else f" with CUDA_VISIBLE_DEVICES={wanted!r}"
        raise NoDeviceError(f"There is no card {index} on this machine{reason}: it shows {len(handles)}.", ELSEWHERE)
    return handles[index]


def _visible(wanted: str, handles: Sequence[Any], uuids: Sequence[str]) -> Iterator[Any]:
    """The handles in the order of CUDA_VISIBLE_DEVICES; like CUDA, up to the first entry that fits no card."""
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.isdecimal():
            slots = [int(entry)] if int(entry) < len(handles) else []
        else:
            slots = [slot for slot, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
        if len(slots) != 1:
            return
        yield handles[slots[0]]


def _read(nvml: Any, handle: Any) -> Gpu:
    name = str(nvml.nvmlDeviceGetName(handle))
    total_bytes, free_bytes = _read_memory(nvml, handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    bandwidth, tflops = _speed(nvml, handle, name, total_bytes, (major, minor))
    return Gpu(
        name=name,
        total_bytes=total_bytes,
        free_bytes=min(free_bytes, total_bytes),
        processes=_read_processes(nvml, handle),
        compute_capability=(major, minor),
        bandwidth_bytes_per_second=bandwidth,
        tflops_16bit=tflops,
        is_local=True,
    )


def _read_memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """(usable, free) bytes. Drivers before R510 do not tell what they keep for themselves; then it counts as taken."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except nvml.NVMLError:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return memory.total, memory.free
    return memory.total - memory.reserved, memory.free


def _read_processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    """The other programs on the card, the largest first; a program that computes and draws is one.

    Who they are is told where the driver tells it: not in every container, nor to every user.
    """
    used: dict[int, int | None] = {}
    for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        with suppress(nvml.NVMLError):
            for process in ask(handle):
                used[process.pid] = max(used.get(process.pid) or 0, process.usedGpuMemory or 0) or None
    used.pop(os.getpid(), None)
    processes = [GpuProcess(name=_program(nvml, pid), pid=pid, used_bytes=size) for pid, size in used.items()]
    return tuple(sorted(processes, key=lambda process: (-(process.used_bytes or 0), process.name)))


def _program(nvml: Any, pid: int) -> str:
    """The bare name of a program; NVML gives its path, on some systems with arguments."""
    try:
        path = str(nvml.nvmlSystemGetProcessName(pid))
    except (nvml.NVMLError, UnicodeDecodeError):
        return "a program the driver does not name"
    return PureWindowsPath(path.split(" -")[0].strip()).name or path


def _speed(
    nvml: Any, handle: Any, name: str, total_bytes: int, compute_capability: tuple[int, int]
) -> tuple[float, float]:
    """Bytes and 10^12 operations a second: the table's where it knows the card, else from NVML's widths and clocks.

    Operations for each core and clock beyond a plain multiply-add: 8 on Volta, 4 on Turing, 16 on the data center's
    Ampere, Hopper and Blackwell (x.0 and x.3), 2 on what GeForce has been since.
    """
    known = _matches(name)
    if known:
        card = min(known, key=lambda card: abs(card.usable_bytes - total_bytes))
        return card.bandwidth_gb * 1e9, card.tflops_16bit
    major, minor = compute_capability
    tensor = {7: 4 if minor == 5 else 8, 8: 2 if minor else 16, 9: 16, 10: 16}.get(major, 2 if major > 8 else 1)
    try:
        bits, cores = nvml.nvmlDeviceGetMemoryBusWidth(handle), nvml.nvmlDeviceGetNumGpuCores(handle)
        memory_mhz = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)
        core_mhz = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
    except nvml.NVMLError:
        return _usual_speed(_cards_near(total_bytes))
    return bits / 8 * memory_mhz * 2e6, cores * core_mhz * 2e6 * tensor / 1e12


def find_gpu(name: str) -> Gpu:
    """The card of the table that a person means: `RTX 4070 Laptop`, `nvidia geforce rtx4060ti 16gb`.

    Raises:
        DeviceError: nobody knows it (with the nearest names), or it is sold with several sizes and none is given.
    """
    cards, size = _matches(name), _size_in(name)
    if not cards:
        words, brand = _words(name), re.match(r"(?:nvidia )?(?:geforce )?([gr]tx)", name.lower())
        names = {
            " ".join(sorted(_words(card.name))): card.name
            for card in CARDS
            if brand is None or card.name.lower().startswith(brand[1])
        }
        near = [names[key] for key in difflib.get_close_matches(" ".join(sorted(words)), names, n=3, cutoff=0.6)]
        without = [card.name for card in CARDS if _words(card.name) < words and card.name in names.values()]
        near = list(dict.fromkeys([*near[:1], *without, *near[1:]]))[:3]
        nearest = f"The nearest are {', '.join(near)}." if near else "It knows GTX 16, RTX 20 to 50, and some more."
        raise DeviceError(f"The table has no card '{name}'. {nearest}", "Or give its memory: --vram 12GB.")
    wanted = [card for card in cards if size in (None, card.nominal_gb)]
    if len(wanted) == 1:
        return _device(wanted[0])
    sizes = " and ".join(f"{card.nominal_gb} GB" for card in cards)
    reason = f", not with {size} GB" if size else ""
    raise DeviceError(f"The {cards[0].name} comes with {sizes}{reason}.", f"Say which: --gpu '{cards[0].label}'.")


def _matches(name: str) -> list[GpuSpec]:
    """The rows a name can mean; one that exists as a laptop's only may leave the word out."""
    words = _words(name)
    exact = [card for card in CARDS if _words(card.name) == words]
    return exact or [card for card in CARDS if _words(card.name) == words | {"laptop"}]


def _words(name: str) -> set[str]:
    text = name.lower().replace("max-q", "maxq").replace("(tm)", " ")
    text = re.sub(r"\b\d+ ?gi?b?\b", " ", text)
    text = re.sub(r"([rg]tx)(?=\w)", r"\1 ", text)
    text = re.sub(r"(\d{4})(?=[a-z])|(?<=ti)(?=super)", r"\1 ", text)
    words = re.findall(r"[a-z0-9]+", text)
    return {SYNONYMS.get(word, word) for word in words} - STOP_WORDS


def _size_in(name: str) -> int | None:
    found = re.search(r"\b(\d+) ?gi?b?\b", name.lower())
    return int(found[1]) if found else None


def _device(card: GpuSpec) -> Gpu:
    return Gpu(
        name=card.label,
        total_bytes=card.usable_bytes,
        free_bytes=card.usable_bytes,
        compute_capability=card.compute_capability,
        bandwidth_bytes_per_second=card.bandwidth_gb * 1e9,
        tflops_16bit=card.tflops_16bit,
        is_local=False,
        estimated=card.estimated,
    )


def gpu_of_size(num_bytes: int) -> Gpu:
    """Any card that is sold with so much memory: the smallest of them, at a middling speed.

    Of a size that is sold with and without bfloat16, the cards that have it. For a size that the table lacks, the driver
    keeps the most that it was seen to keep on any card up to the next larger size.

    Args:
        num_bytes: what the box says, in binary units: 12 x 2^30 for a 12 GB card (`parse_size(text, binary=True)`).

    Raises:
        DeviceError: less than 1 GiB or more than 1 TiB.
    """
    if not GIB <= num_bytes <= 1024 * GIB:
        raise DeviceError(
            f"There is no card of {format_gib(num_bytes)}.", "Give what the box says, such as --vram 12GB."
        )
    name = _with_article(f"{round(num_bytes / GIB, 2):g} GB card")
    near = [card for card in _cards_near(num_bytes) if card.consumer]
    modern = [card for card in near if card.compute_capability >= NATIVE_BFLOAT16] or near
    device = replace(smallest_of(modern, name), estimated=True)
    if modern[0].nominal_gb * GIB == num_bytes:
        return device
    total_bytes = num_bytes - _reserve(num_bytes)
    return replace(device, total_bytes=total_bytes, free_bytes=total_bytes)


def smallest_of(cards: Sequence[GpuSpec], name: str) -> Gpu:
    """What fits this one fits each of the cards; of a middling speed."""
    smallest = min(cards, key=lambda card: card.usable_bytes)
    bandwidth, tflops = _usual_speed(cards)
    return Gpu(
        name=name,
        total_bytes=smallest.usable_bytes,
        free_bytes=smallest.usable_bytes,
        compute_capability=max(card.compute_capability for card in cards),
        bandwidth_bytes_per_second=bandwidth,
        tflops_16bit=tflops,
        is_local=False,
        estimated=smallest.estimated,
        represents=tuple(card.label for card in cards),
    )


def _reserve(num_bytes: int) -> int:
    seen = [card for card in CARDS if not card.ecc and not card.estimated]
    sizes = {card.nominal_gb * GIB for card in seen}
    limit = min((size for size in sizes if size > num_bytes), default=max(sizes))
    return max(card.nominal_gb * GIB - card.usable_bytes for card in seen if card.nominal_gb * GIB <= limit)


def _cards_near(num_bytes: int) -> list[GpuSpec]:
    """The cards of the nearest size."""
    distance = min(abs(card.nominal_gb * GIB - num_bytes) for card in CARDS)
    return [card for card in CARDS if abs(card.nominal_gb * GIB - num_bytes) == distance]


def _usual_speed(cards: Sequence[GpuSpec]) -> tuple[float, float]:
    return median(card.bandwidth_gb for card in cards) * 1e9, median(card.tflops_16bit for card in cards)


def _with_article(words: str) -> str:
    return f"an {words}" if words.startswith(("8", "11 ", "11.", "18 ", "18.")) else f"a {words}"


def read_own_bytes(index: int = 0, *, nvml: Any = None) -> int | None:
    """GPU memory of this process as the driver shows it, its CUDA context included; None where the driver does not show it.

    Args:
        index: as for `read_gpu`.
        nvml: the module `pynvml`, or a replacement.
    """
    try:
        nvml = nvml or _import_nvml()
    except NoDeviceError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(_find_handle(nvml, index))
        return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)
    except (nvml.NVMLError, DeviceError):
        return None
    finally:
        nvml.nvmlShutdown()
