"""GPUs: those of this computer, read through NVML; those of the table, found by name or size; and the one that a run uses.

NVML creates no CUDA context, so reading a GPU takes none of its memory. Nothing here imports torch. A GPU of the table is idle
and drives no display; on Windows a desktop takes 0.3 to 1 GiB.
"""

import difflib
import os
import platform
import re
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import PureWindowsPath
from statistics import median
from typing import Any, NamedTuple

from qlora_phi3.errors import DeviceError, NoDeviceError, NoDriverError
from qlora_phi3.hardware.gpu_table import GPU_TABLE, NATIVE_BFLOAT16, GpuSpec
from qlora_phi3.units import GIB, MIB, format_count, format_gib

OTHER_GPU_HINT = "To check another GPU, write --gpu 'RTX 4070', --vram 12GB, or --all."
#: A computer's free memory is taken as a multiple of this.
MEMORY_STEP = 256 * MIB
#: Words of a GPU's full name that do not distinguish it from another GPU.
STOP_WORDS = frozenset((
        "nvidia", "geforce", "quadro", "tesla", "rtx", "gtx", "gpu", "graphics", "card", "with", "design", "generation",
        "blackwell", "workstation", "edition", "sxm4", "sxm5", "pcie", "hbm3",
))  # fmt: skip
#: Other spellings of a word in a GPU's name.
SYNONYMS = {"mobile": "laptop", "notebook": "laptop", "maxq": "laptop", "s": "super"}
#: The memory in a GPU's name; the numbers of models have more digits.
SIZE = re.compile(r"\b(\d{1,3})(?: ?gi?b)?\b")
#: Words of GPUs that bitsandbytes' CUDA libraries or torch's do not run on: of AMD, Intel and Apple; of Volta and before. And of
#: those that have no memory of their own.
OTHER_MAKERS = re.compile(r"\b(amd|radeon|rx|instinct|mi\d{2,3}x?|intel|arc|iris|apple|m[1-9])\b", re.IGNORECASE)
SHARED_MEMORY = re.compile(r"\b(jetson|orin|xavier|thor|tegra|dgx spark|gb10)\b", re.IGNORECASE)
TOO_OLD = re.compile(r"\b(gtx ?(10|9|7)\d\d|titan(?! rtx)|[pvkm]\d{2,3}|quadro [pkm]\d+|gt ?\d{3,4})\b", re.IGNORECASE)
#: The number of processes, as set by torchrun and accelerate launch; by SLURM; by Open MPI; by Intel MPI and MPICH; by MVAPICH.
PROCESS_COUNTS = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
#: Set to "true" by accelerate launch where the model's weights are to be split among the processes.
SPLITS = [f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """Another process that uses the GPU."""

    name: str
    pid: int
    used_bytes: int | None  #: None where the driver does not report it, as on Windows and WSL.


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU of this computer, of the table, or any GPU with a given memory size."""

    name: str
    total_bytes: int  #: What CUDA programs can use when nothing else uses the GPU.
    free_bytes: int  #: What CUDA programs can use now; equal to `total_bytes` for a GPU that is not in this computer.
    processes: tuple[GpuProcess, ...] = ()
    compute_capability: tuple[int, int]
    multiprocessors: int  #: They decide the size of the CUDA context.
    bandwidth_bytes_per_second: float
    tflops_16bit: float  #: Dense 16-bit matrix products with fp32 accumulation, 10^12 operations a second.
    is_local: bool  #: The GPU is in this computer.
    estimated: bool = False  #: `total_bytes` was computed by a rule, or only the size of the GPU is known; it was not measured.
    #: Labels of the GPUs of the table that this one stands for: its memory is the smallest of theirs, its speed the median.
    represents: tuple[str, ...] = ()
    is_cpu: bool = False  #: The processor of this computer and its memory, in place of a GPU; it has none of the four figures.
    #: Value of CUDA_VISIBLE_DEVICES that leaves this GPU only, where `choose_gpu` found it: its UUID, or its number where the
    #: driver reports no UUID.
    visible_devices: str = ""

    @property
    def where(self) -> str:
        """Where a step's tensors are."""
        return "in memory" if self.is_cpu else "on the GPU"

    @property
    def other_processes_bytes(self) -> int:
        """Memory in use by `processes` and by those that the driver does not list."""
        return self.total_bytes - self.free_bytes


def take_launch(environ: MutableMapping[str, str]) -> tuple[int, int]:
    """The rank of this process and how many there are, from the variables of torchrun and accelerate launch, which are deleted.

    So the libraries see one process: accelerate would shard the batches, and compute in its own configuration's precision. Raises
    DeviceError where the weights should be split, nothing connects the processes, or they are on several computers.
    """
    for name in SPLITS:
        if environ.get(name, "").lower() == "true":
            raise DeviceError(
                f"{name} = true: 4-bit weights cannot be split among GPUs, as accelerate leaves them complete or damages them.",
                "Give every GPU the complete model: accelerate launch --multi_gpu --num_processes N -m qlora_phi3 run RECIPE",
            )
    counts = {name: int(environ[name]) for name in PROCESS_COUNTS if environ.get(name, "").isdecimal()}
    name, count = max(counts.items(), key=lambda item: item[1], default=("", 1))
    rank = environ.get("RANK", "") if count > 1 else "0"
    same = (rank, environ.get("LOCAL_RANK"), counts.get("WORLD_SIZE")) == (environ.get("LOCAL_RANK"), rank, count)
    if count > 1 and not (rank.isdecimal() and same and environ.get("LOCAL_WORLD_SIZE", str(count)) == str(count)):
        raise DeviceError(
            f"{count} processes were started ({name}={count}), but not by a launcher that connects them on one computer.",
            f"Write: accelerate launch --num_processes {count} -m qlora_phi3 run RECIPE; under SLURM with srun --ntasks=1.",
        )
    if environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in [*PROCESS_COUNTS, "RANK", "LOCAL_RANK", *(name for name in environ if name.startswith("ACCELERATE_"))]:
        environ.pop(name, None)
    return int(rank), count


def choose_gpu(wanted: str | int, rank: int | None = None, *, nvml: Any = None) -> Gpu | None:
    """Choose the GPU for a run, among those that CUDA_VISIBLE_DEVICES shows; call it before torch initialises CUDA. None where
    "auto" finds no GPU that NVML can read. DeviceError where no GPU has that number or name, or all have another process; the
    message lists those that there are.

    Args:
        rank: of one of several processes, which gets the GPU of this number among those that match; None: a single one.
        wanted: "auto" for the GPU with the most free memory, the number that nvidia-smi shows, or words of the GPU's name.
            Where several GPUs match a name, an exact match comes first, then the one with the most free memory.
        nvml: the module `pynvml`, or a stand-in.
    """
    found: dict[int, Gpu] = {}
    reason = ""
    try:
        with _nvml_session(nvml) as session:
            for number, uuid, handle in _visible_gpus(session):
                with suppress(session.NVMLError):  # a GPU that has failed; another one may work
                    found[number] = replace(_read(session, handle), visible_devices=uuid or str(number))
    except NoDeviceError as error:
        reason = error.message
    if wanted == "auto":
        matches = list(found.values())
    elif isinstance(wanted, int):
        matches = [found[wanted]] if wanted in found else []
    else:
        words = _words(wanted)
        matches = [gpu for gpu in found.values() if words <= _words(gpu.name)]
        matches = [gpu for gpu in matches if words == _words(gpu.name)] or matches
    matches = matches if rank is None else matches[rank : rank + 1]
    if not matches and (wanted != "auto" or (rank and found)):
        shown = ", ".join(f"{number} ({gpu.name})" for number, gpu in found.items()) or "none"
        process = "" if rank is None else f" for process {rank}"
        message = f"[memory] gpu = {wanted!r} matches no GPU of this computer{process}. It shows: {shown}. {reason}".rstrip()
        raise DeviceError(message, 'Write one of these numbers or names, or gpu = "auto"; and start one process a GPU at most.')
    return max(matches, key=lambda gpu: gpu.free_bytes, default=None)


def hide_other_gpus(chosen: Gpu | None, rank: int = 0) -> None:
    """Show CUDA one GPU only, through the environment of this process; call it before torch initialises CUDA.

    None leaves the first GPU of CUDA_VISIBLE_DEVICES, or of the computer; to one of several processes that of its rank.
    """
    if chosen is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", str(rank)).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[min(rank, len(visible) - 1)]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = chosen.visible_devices
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the numbers of NVML and nvidia-smi


def read_gpu(*, nvml: Any = None) -> Gpu:
    """Read the current state of the first GPU that CUDA_VISIBLE_DEVICES shows, torch's `cuda:0`. NoDeviceError where there is no
    nvidia-ml-py, no driver, no such GPU, or the driver fails. `nvml` is the module `pynvml`, or a stand-in.

    NVML counts GPUs by their slot. CUDA puts the fastest first unless CUDA_DEVICE_ORDER=PCI_BUS_ID is set.
    """
    with _nvml_session(nvml) as session:
        if visible := _visible_gpus(session):
            return _read(session, visible[0][2])
    raise NoDeviceError(f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} shows no GPU.", OTHER_GPU_HINT)


def read_cpu() -> Gpu:
    """The processor of this computer, with the memory that is free: in steps of MEMORY_STEP, as it is never the same twice."""
    import psutil  # type: ignore[import-untyped]

    memory = psutil.virtual_memory()
    return Gpu(
        name=f"{platform.machine()} CPU, {format_count(psutil.cpu_count(logical=False) or 1, 'core')}",
        total_bytes=memory.total,
        free_bytes=memory.available // MEMORY_STEP * MEMORY_STEP,
        compute_capability=(0, 0),
        multiprocessors=0,
        bandwidth_bytes_per_second=0.0,
        tflops_16bit=0.0,
        is_local=True,
        is_cpu=True,
    )


@contextmanager
def _nvml_session(nvml: Any) -> Iterator[Any]:
    try:
        nvml = nvml or import_module("pynvml")
    except ImportError as error:
        hint = f"Install it (pip install nvidia-ml-py). {OTHER_GPU_HINT}"
        raise NoDeviceError("The GPU cannot be read: the package nvidia-ml-py is not installed.", hint) from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        is_missing = isinstance(error, getattr(nvml, "NVMLError_LibraryNotFound", ()))
        kind = NoDriverError if is_missing else NoDeviceError  # else there is one, which fails
        raise kind(f"No NVIDIA driver answers on this computer ({error}).", OTHER_GPU_HINT) from error
    try:
        yield nvml
    except nvml.NVMLError as error:
        raise NoDeviceError(f"The NVIDIA driver failed while reading the GPU: {error}.", OTHER_GPU_HINT) from error
    finally:
        nvml.nvmlShutdown()


def _visible_gpus(nvml: Any) -> list[tuple[int, str, Any]]:
    """Number, UUID and handle of each GPU in CUDA_VISIBLE_DEVICES, in its order; like CUDA, up to an entry that matches none."""
    gpus = []
    for number in range(nvml.nvmlDeviceGetCount()):
        handle, uuid = nvml.nvmlDeviceGetHandleByIndex(number), ""
        with suppress(nvml.NVMLError):
            uuid = str(nvml.nvmlDeviceGetUUID(handle))
        gpus.append((number, uuid, handle))
    if not gpus:
        raise NoDeviceError("The NVIDIA driver finds no GPU in this computer.", OTHER_GPU_HINT)
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return gpus
    visible = []
    for entry in map(str.strip, setting.split(",")):
        by_uuid = [gpu for gpu in gpus if entry and gpu[1].startswith(entry)]
        matches = gpus[int(entry) : int(entry) + 1] if entry.isdecimal() else by_uuid
        if len(matches) != 1:
            break
        visible += matches
    return visible


def _read(nvml: Any, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    total_bytes = memory.total - memory.reserved
    name = str(nvml.nvmlDeviceGetName(handle))
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    multiprocessors, bandwidth, tflops = _read_speed(nvml, handle, name, total_bytes, major, minor)
    return Gpu(
        name=name,
        total_bytes=total_bytes,
        free_bytes=min(memory.free, total_bytes),
        processes=_read_processes(nvml, handle),
        compute_capability=(major, minor),
        multiprocessors=multiprocessors,
        bandwidth_bytes_per_second=bandwidth,
        tflops_16bit=tflops,
        is_local=True,
    )


def _read_processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    """The other processes on the GPU, the largest first; one that computes and draws is listed once.

    The driver does not list processes in every container, nor to every user.
    """
    used: dict[int, int | None] = {}
    for list_processes in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        with suppress(nvml.NVMLError):
            for process in list_processes(handle):
                used[process.pid] = max(used.get(process.pid) or 0, process.usedGpuMemory or 0) or None
    used.pop(os.getpid(), None)
    processes = []
    for pid, used_bytes in used.items():
        path = ""
        with suppress(nvml.NVMLError, UnicodeDecodeError):
            path = str(nvml.nvmlSystemGetProcessName(pid))  # a path, on some systems with arguments
        name = PureWindowsPath(path.split(" -")[0].strip()).name or path or "a process that the driver does not name"
        processes.append(GpuProcess(name=name, pid=pid, used_bytes=used_bytes))
    return tuple(sorted(processes, key=lambda process: (-(process.used_bytes or 0), process.name)))


def _read_speed(nvml: Any, handle: Any, name: str, total_bytes: int, major: int, minor: int) -> tuple[int, float, float]:
    """Multiprocessors, bytes and 10^12 operations a second: from the table where it has the GPU, else from what NVML says.

    A multiprocessor has 64 cores on Volta, Turing and the A100, else 128. Operations for each core and clock, beyond a
    multiply-add: 8 on Volta, 4 on Turing, 16 on the data-centre GPUs of Ampere, Hopper and Blackwell (x.0 and x.3), 2 on GeForce
    since Ampere.
    """
    if known := _find_specs(name):
        spec = min(known, key=lambda spec: abs(spec.usable_bytes - total_bytes))
        return spec.multiprocessors, spec.bandwidth_gb * 1e9, spec.tflops_16bit
    operations = {7: 4 if minor == 5 else 8, 8: 2 if minor else 16, 9: 16, 10: 16}.get(major, 2 if major > 8 else 1)
    try:
        bits, cores = nvml.nvmlDeviceGetMemoryBusWidth(handle), nvml.nvmlDeviceGetNumGpuCores(handle)
        memory_mhz = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)
        core_mhz = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
    except nvml.NVMLError:
        similar = similar_gpu(name, total_bytes)
        return similar.multiprocessors, similar.bandwidth_bytes_per_second, similar.tflops_16bit
    multiprocessors = cores // (64 if (major, minor) <= (8, 0) else 128)
    return multiprocessors, bits / 8 * memory_mhz * 2e6, cores * core_mhz * 2e6 * operations / 1e12


def find_gpu(name: str) -> Gpu:
    """Find a GPU of the table by the name that people write: `RTX 4070 Laptop`, `nvidia geforce rtx4060ti 16gb`. DeviceError
    where the table has no such GPU (it lists similar names), or the GPU is sold with several memory sizes and the name has none.
    """
    specs = _find_specs(name)
    if not specs:
        _refuse_unsupported(name)
        brand = re.search(r"[gr]tx", name.lower())
        same_brand = [spec.name for spec in GPU_TABLE if brand is None or spec.name.lower().startswith(brand[0])]
        names = {" ".join(sorted(_words(other))): other for other in same_brand}
        words = " ".join(sorted(_words(name)))
        similar = [names[match] for match in difflib.get_close_matches(words, names, n=3, cutoff=0.6)]
        listed = f"Similar names: {', '.join(similar)}." if similar else "It has GTX 16, RTX 20 to 50, and some more."
        hint = f"Or give the memory size: --vram {_nominal_gb(name) or 12}GB."
        raise DeviceError(f"The table has no GPU '{name}'. {listed}", hint)
    size = _nominal_gb(name)
    of_size = [spec for spec in specs if size is None or spec.nominal_gb == size]
    if len(of_size) != 1:
        sizes = " and ".join(f"{spec.nominal_gb} GB" for spec in specs)
        reason = f", not with {size} GB" if size else ""
        raise DeviceError(f"The {specs[0].name} has {sizes}{reason}.", f"Give the size: --gpu '{specs[0].label}'.")
    return replace(smallest_of(of_size, of_size[0].label), represents=())


def _find_specs(name: str) -> list[GpuSpec]:
    """The rows that a name can mean; `laptop` may be left out where the table has no desktop GPU of that name."""
    words = _words(name)
    exact = [spec for spec in GPU_TABLE if _words(spec.name) == words]
    return exact or [spec for spec in GPU_TABLE if _words(spec.name) == words | {"laptop"}]


def _spread(name: str) -> str:
    """A GPU's name in lower case, with spaces where people leave them out: `RTX4060Ti16GB` gives `rtx 4060 ti 16gb`."""
    text = re.sub(r"([rg]tx)(?=\w)", r"\1 ", name.lower().replace("max-q", "maxq").replace("(tm)", " "))
    text = re.sub(r"(\d{4})(?=[a-z])", r"\1 ", text)
    return re.sub(r"(?<=\bti)(?=super|s\b|\d)|(?<=super)(?=\d)", " ", text)


def _nominal_gb(name: str) -> int | None:
    """The memory in a GPU's name, where there is any: 16 of `4060 ti 16`."""
    size = re.search(SIZE, _spread(name))
    return int(size[1]) if size else None


def _refuse_unsupported(name: str) -> None:
    """Raise DeviceError for a GPU of another maker, one that is too old, and one without memory of its own."""
    needed = "This program needs an NVIDIA GPU of compute capability 7.5 or newer: a GTX 16, an RTX 20, or a later one."
    if OTHER_MAKERS.search(name):
        raise DeviceError(f"'{name}' is no NVIDIA GPU.", needed)
    if TOO_OLD.search(name):
        raise DeviceError(f"'{name}' is too old.", needed)
    if SHARED_MEMORY.search(name):
        raise DeviceError(f"'{name}' shares the computer's memory, which no plan of this program was tried on.", OTHER_GPU_HINT)


def _words(name: str) -> set[str]:
    """The words of a GPU's name that distinguish it, in lower case: `NVIDIA GeForce RTX4060Ti 16GB` gives 4060 and ti."""
    text = re.sub(SIZE, " ", _spread(name))
    return {SYNONYMS.get(word, word) for word in re.findall(r"[a-z0-9]+", text)} - STOP_WORDS


def gpu_of_size(num_bytes: int) -> Gpu:
    """A GPU that stands for all of a size, consumer GPUs where there are: the smallest usable memory, the median speed.

    Where a size is sold with and without bfloat16, only GPUs with bfloat16 count. For a size that the table lacks, the driver's
    reserve is the largest that was measured on any GPU up to the next larger size.

    `num_bytes` is the size on the box in binary units: 12 x 2^30 for a 12 GB GPU (`parse_size(text, binary=True)`). Raises
    DeviceError where it is less than 1 GiB or more than 1 TiB.
    """
    if not GIB <= num_bytes <= 1024 * GIB:
        raise DeviceError(f"There is no GPU with {format_gib(num_bytes)}.", "Give the size on the box: --vram 12GB.")
    size = f"{round(num_bytes / GIB, 2):g}"
    article = "an" if size.partition(".")[0] in ("11", "18") or size.startswith("8") else "a"
    nearest = _specs_of_nearest_size(num_bytes)
    consumer = [spec for spec in nearest if spec.consumer] or nearest
    specs = [spec for spec in consumer if spec.compute_capability >= NATIVE_BFLOAT16] or consumer
    gpu = replace(smallest_of(specs, f"{article} {size} GB GPU"), estimated=True)
    if specs[0].nominal_gb * GIB == num_bytes:
        return gpu
    measured = [spec for spec in GPU_TABLE if not spec.ecc and not spec.estimated]
    sizes = {spec.nominal_gb * GIB for spec in measured}
    limit = min((size for size in sizes if size > num_bytes), default=max(sizes))
    reserve = max(spec.nominal_gb * GIB - spec.usable_bytes for spec in measured if spec.nominal_gb * GIB <= limit)
    return replace(gpu, total_bytes=num_bytes - reserve, free_bytes=num_bytes - reserve)


def smallest_of(specs: Sequence[GpuSpec], name: str) -> Gpu:
    """A GPU that stands for several of the table: what fits it fits each of them; its speed is their median."""
    smallest = min(specs, key=lambda spec: spec.usable_bytes)
    return Gpu(
        name=name,
        total_bytes=smallest.usable_bytes,
        free_bytes=smallest.usable_bytes,
        compute_capability=max(spec.compute_capability for spec in specs),
        multiprocessors=max(spec.multiprocessors for spec in specs),
        bandwidth_bytes_per_second=median(spec.bandwidth_gb for spec in specs) * 1e9,
        tflops_16bit=median(spec.tflops_16bit for spec in specs),
        is_local=False,
        estimated=smallest.estimated,
        represents=tuple(spec.label for spec in specs),
    )


def _specs_of_nearest_size(num_bytes: int) -> list[GpuSpec]:
    distance = min(abs(spec.nominal_gb * GIB - num_bytes) for spec in GPU_TABLE)
    return [spec for spec in GPU_TABLE if abs(spec.nominal_gb * GIB - num_bytes) == distance]


def similar_gpu(name: str, total_bytes: int) -> Gpu:
    """The GPUs of the table with this name, else those with the nearest memory size, as one."""
    return smallest_of(_find_specs(name) or _specs_of_nearest_size(total_bytes), name)


class GpuLoad(NamedTuple):
    """What a GPU does now; None where the driver does not report it."""

    watts: float | None
    celsius: float | None
    own_bytes: int | None  #: Of this process as the driver shows it, its CUDA context included.


def read_load(*, nvml: Any = None) -> GpuLoad | None:
    """What the GPU that `read_gpu` reads does now; None where NVML does not answer."""
    with suppress(DeviceError, IndexError), _nvml_session(nvml) as session:
        handle = _visible_gpus(session)[0][2]

        def ask(read: Callable[..., Any], *arguments: Any) -> Any:
            with suppress(session.NVMLError):
                return read(handle, *arguments)
            return None

        milliwatts = ask(session.nvmlDeviceGetPowerUsage)
        processes = ask(session.nvmlDeviceGetComputeRunningProcesses) or ()
        return GpuLoad(
            watts=None if milliwatts is None else milliwatts / 1000,
            celsius=ask(session.nvmlDeviceGetTemperature, session.NVML_TEMPERATURE_GPU),
            own_bytes=next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None),
        )
    return None
