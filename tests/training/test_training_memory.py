"""What a run is measured to take: its own memory alone, under the categories of the prediction."""

import os
from types import SimpleNamespace

import pytest
import torch
from tiny_model import load_tiny, save_tiny_model

from qlora_phi3.hardware.gpu import GpuLoad, read_load
from qlora_phi3.memory.cuda_path import context_bytes
from qlora_phi3.memory.report import ADAPTER, EMBEDDING_AND_HEAD, OPTIMIZER_STATE, QUANTIZATION_STATE, QUANTIZED_WEIGHTS
from qlora_phi3.training import report
from qlora_phi3.training.report import measure_memory
from qlora_phi3.units import MIB


class Nvml:
    """NVML with one GPU and these processes; None: the driver does not list any."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, *processes):
        self.processes = processes
        self.nvmlInit = self.nvmlShutdown = lambda: None

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle):  # noqa: N802
        return "GPU-0"

    def nvmlDeviceGetPowerUsage(self, handle):  # noqa: N802
        raise self.NVMLError

    def nvmlDeviceGetTemperature(self, handle, sensor):  # noqa: N802
        return 50

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802
        if self.processes == (None,):
            raise self.NVMLError
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]


@pytest.mark.parametrize(
    ("processes", "own"),
    [
        (((os.getpid(), 700), (1, 9000)), 700),
        (((os.getpid(), None),), None),  # Windows
        (((1, 9000),), None),  # a container, whose process ids the driver does not know
        ((None,), None),
    ],
)
def test_the_driver_says_what_this_process_takes_or_nothing(monkeypatch, processes, own):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert read_load(nvml=Nvml(*processes)) == GpuLoad(watts=None, celsius=50, own_bytes=own)


@pytest.fixture
def on_cuda(monkeypatch):
    """1.2 GiB reserved at most, 1 GiB now."""
    figures = {"max_memory_allocated": 1100 * MIB, "max_memory_reserved": 1200 * MIB, "memory_reserved": 1000 * MIB}
    for name, num_bytes in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, num_bytes=num_bytes: num_bytes)
    properties = SimpleNamespace(major=8, minor=6, multi_processor_count=28)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("own", "context"),
    [(1150 * MIB, 150 * MIB), (None, context_bytes(28)), (900 * MIB, context_bytes(28))],
)
def test_a_run_is_measured_by_its_own_peak_whatever_other_programs_take(monkeypatch, on_cuda, own, context):
    monkeypatch.setattr(report, "read_load", lambda: GpuLoad(watts=None, celsius=None, own_bytes=own))
    measured = measure_memory(torch.nn.Linear(4, 4), None, on_cuda)
    assert measured.on_gpu_bytes == 1200 * MIB + context
    assert (measured.allocated_bytes, measured.reserved_bytes) == (1100 * MIB, 1200 * MIB)


def test_measured_memory_has_the_categories_of_the_prediction(tmp_path):
    model = load_tiny(save_tiny_model(tmp_path))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    measured = measure_memory(model, optimizer, torch.device("cpu"))
    sizes = measured.by_category
    adapter_bytes = sum(parameter.nbytes for parameter in trained)
    assert sizes[ADAPTER] == adapter_bytes
    assert sizes[OPTIMIZER_STATE] == 2 * adapter_bytes + 4 * len(trained)  # two moments, and a step counter each
    assert sizes[EMBEDDING_AND_HEAD] == 2 * 512 * 128 * 4
    assert set(sizes) > {QUANTIZED_WEIGHTS, QUANTIZATION_STATE}
    assert measured.resident_bytes == sum(sizes.values())
    assert (measured.on_gpu_bytes, measured.paged_bytes) == (0, 0)
    assert measured.process_bytes > measured.resident_bytes
