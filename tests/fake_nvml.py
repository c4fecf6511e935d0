"""A stand-in for the module pynvml, and GPUs for it."""

# ruff: noqa: N802 - the names of NVML's functions
from types import SimpleNamespace

MIB, GIB = 2**20, 2**30


class NVMLError(Exception):
    pass


class FakeNVML:
    """A driver with these GPUs; `broken` names the functions that fail."""

    NVMLError = NVMLError
    nvmlMemory_v2 = 2  # noqa: N815
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *gpus, broken=()):
        self.gpus, self.broken, self.is_open = gpus, broken, False

    def __getattribute__(self, function):
        if function.startswith("nvml") and function in object.__getattribute__(self, "broken"):
            return self.fail
        return object.__getattribute__(self, function)

    def fail(self, *arguments, **options):
        raise NVMLError("Unknown Error")

    def nvmlInit(self):
        self.is_open = True

    def nvmlShutdown(self):
        self.is_open = False

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, slot):
        return self.gpus[slot]

    def nvmlDeviceGetUUID(self, gpu):
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu):
        return gpu.name

    def nvmlDeviceGetMemoryInfo(self, gpu, version=None):
        if version:
            return SimpleNamespace(total=gpu.total, free=gpu.free, reserved=gpu.reserved)
        return SimpleNamespace(total=gpu.total, free=gpu.free)

    def nvmlDeviceGetCudaComputeCapability(self, gpu):
        return gpu.compute_capability

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return gpu.computing

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu):
        return gpu.drawing

    def nvmlSystemGetProcessName(self, pid):
        return {10: "/usr/lib/xorg/Xorg", 20: "C:\\Program Files\\Game\\game.exe", 30: "/opt/chrome --type=gpu"}[pid]

    def nvmlDeviceGetPowerUsage(self, gpu):
        return 78_300  # milliwatts

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        return 64

    def nvmlDeviceGetMemoryBusWidth(self, gpu):
        return 6016

    def nvmlDeviceGetNumGpuCores(self, gpu):
        return 16896

    def nvmlDeviceGetMaxClockInfo(self, gpu, clock):
        return 3201 if clock == self.NVML_CLOCK_MEM else 1830


def process(pid, used):
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def laptop(**changes):
    gpu = {
        "uuid": "GPU-1234-aa",
        "name": "NVIDIA GeForce RTX 4070 Laptop GPU",
        "total": 8188 * MIB,
        "reserved": 382 * MIB,
        "free": 7000 * MIB,
        "compute_capability": (8, 9),
        "computing": [],
        "drawing": [],
    }
    return SimpleNamespace(**gpu | changes)


def two_gpus(**options):
    """A driver with a small GPU that is free and a large one of which little is."""
    return FakeNVML(
        laptop(uuid="GPU-11", name="NVIDIA GeForce RTX 4070", free=7000 * MIB),
        laptop(uuid="GPU-22", name="NVIDIA GeForce RTX 4070 Ti SUPER", total=16 * GIB, free=6000 * MIB),
        **options,
    )
