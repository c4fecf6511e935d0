# ruff: noqa: N802 - the stand-in has the names of NVML's functions
import os
import re
import sys
from types import SimpleNamespace

import pytest

from qlora_phi3.errors import DeviceError
from qlora_phi3.hardware.gpu import GpuProcess, find_gpu, gpu_of_size, read_gpu
from qlora_phi3.hardware.gpu_table import CARDS
from qlora_phi3.units import parse_size

MIB, GIB = 2**20, 2**30


class NVMLError(Exception):
    pass


class FakeNVML:
    """A driver with the cards given; `broken` names the functions that fail."""

    NVMLError = NVMLError
    nvmlMemory_v2 = 2  # noqa: N815
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, *cards, broken=()):
        self.cards, self.broken, self.is_open = cards, broken, False

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
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, slot):
        return self.cards[slot]

    def nvmlDeviceGetUUID(self, card):
        return card.uuid

    def nvmlDeviceGetName(self, card):
        return card.name

    def nvmlDeviceGetMemoryInfo(self, card, version=None):
        if version:
            return SimpleNamespace(total=card.total, free=card.free, reserved=card.reserved)
        return SimpleNamespace(total=card.total, free=card.free)

    def nvmlDeviceGetCudaComputeCapability(self, card):
        return card.compute_capability

    def nvmlDeviceGetComputeRunningProcesses(self, card):
        return card.computing

    def nvmlDeviceGetGraphicsRunningProcesses(self, card):
        return card.drawing

    def nvmlSystemGetProcessName(self, pid):
        return {10: "/usr/lib/xorg/Xorg", 20: "C:\\Program Files\\Game\\game.exe", 30: "/opt/chrome --type=gpu"}[pid]

    def nvmlDeviceGetMemoryBusWidth(self, card):
        return 6016

    def nvmlDeviceGetNumGpuCores(self, card):
        return 16896

    def nvmlDeviceGetMaxClockInfo(self, card, clock):
        return 3201 if clock == self.NVML_CLOCK_MEM else 1830


def process(pid, used):
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def laptop(**changes):
    card = {
        "uuid": "GPU-1234-aa",
        "name": "NVIDIA GeForce RTX 4070 Laptop GPU",
        "total": 8188 * MIB,
        "reserved": 382 * MIB,
        "free": 7000 * MIB,
        "compute_capability": (8, 9),
        "computing": [],
        "drawing": [],
    }
    return SimpleNamespace(**card | changes)


@pytest.fixture(autouse=True)
def every_card_is_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_card_here_offers_its_memory_less_what_the_driver_keeps():
    nvml = FakeNVML(laptop())
    device = read_gpu(nvml=nvml)
    assert device.name == "NVIDIA GeForce RTX 4070 Laptop GPU"
    assert device.total_bytes == 7806 * MIB
    assert device.free_bytes == 7000 * MIB
    assert device.other_processes_bytes == 806 * MIB
    assert device.compute_capability == (8, 9)
    assert device.bandwidth_bytes_per_second == 256e9
    assert device.is_local
    assert not nvml.is_open


def test_an_old_driver_that_does_not_tell_what_it_keeps_is_read_too():
    class Old(FakeNVML):
        def nvmlDeviceGetMemoryInfo(self, card, version=None):
            if version:
                raise NVMLError("Function Not Found")
            return super().nvmlDeviceGetMemoryInfo(card)

    device = read_gpu(nvml=Old(laptop()))
    assert device.total_bytes == 8188 * MIB
    assert device.free_bytes == 7000 * MIB


def test_the_other_programs_are_named_once_each_without_ourselves_the_largest_first():
    card = laptop(
        computing=[process(20, 900 * MIB), process(os.getpid(), 300 * MIB)],
        drawing=[process(10, 120 * MIB), process(20, 850 * MIB), process(30, None)],
    )
    assert read_gpu(nvml=FakeNVML(card)).processes == (
        GpuProcess(name="game.exe", pid=20, used_bytes=900 * MIB),
        GpuProcess(name="Xorg", pid=10, used_bytes=120 * MIB),
        GpuProcess(name="chrome", pid=30, used_bytes=None),
    )


def test_a_driver_that_does_not_tell_who_is_on_the_card_still_tells_how_much_is_free():
    card = laptop(computing=[process(10, MIB)])
    refused = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
    assert read_gpu(nvml=FakeNVML(card, broken=refused)).processes == ()
    nameless = read_gpu(nvml=FakeNVML(card, broken=("nvmlSystemGetProcessName",)))
    assert nameless.processes[0].name == "a program the driver does not name"


def test_a_card_the_table_does_not_know_is_timed_by_its_widths_and_clocks():
    card = laptop(name="NVIDIA H200", total=143_771 * MIB, compute_capability=(9, 0))
    device = read_gpu(nvml=FakeNVML(card))
    assert device.bandwidth_bytes_per_second == pytest.approx(4.81e12, rel=0.01)  # 4.8 TB/s on its data sheet
    assert device.tflops_16bit == pytest.approx(989, rel=0.01)  # as on its data sheet
    blind = read_gpu(nvml=FakeNVML(card, broken=("nvmlDeviceGetMemoryBusWidth",)))
    assert blind.bandwidth_bytes_per_second == 1792e9  # the table's largest, an RTX 5090


@pytest.mark.parametrize(
    ("visible", "index", "found"),
    [
        (None, 1, "second"),
        ("1", 0, "second"),
        ("1,0", 1, "first"),
        ("GPU-22", 0, "second"),
        ("GPU-11, GPU-22", 1, "second"),
    ],
)
def test_the_card_is_the_one_that_torch_would_take(monkeypatch, visible, index, found):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNVML(laptop(uuid="GPU-11", name="first"), laptop(uuid="GPU-22", name="second"))
    assert read_gpu(index, nvml=nvml).name == found


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("7,0", 0), ("0,-1,1", 1), ("GPU-", 0)])
def test_a_hidden_card_is_not_read(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNVML(laptop(uuid="GPU-11"), laptop(uuid="GPU-22"))
    message = f"There is no card {count} on this machine with CUDA_VISIBLE_DEVICES='{visible}': it shows {count}."
    with pytest.raises(DeviceError, match=re.escape(message)):
        read_gpu(count, nvml=nvml)
    assert not nvml.is_open


@pytest.mark.parametrize(
    ("nvml", "message"),
    [
        (FakeNVML(broken=("nvmlInit",)), "No NVIDIA driver answers on this machine (Unknown Error)."),
        (FakeNVML(), "The NVIDIA driver finds no card in this machine."),
        (
            FakeNVML(laptop(), broken=("nvmlDeviceGetMemoryInfo",)),
            "The NVIDIA driver failed while reading card 0: Unknown Error.",
        ),
    ],
)
def test_a_card_that_cannot_be_read_is_one_line_with_a_way_on(nvml, message):
    with pytest.raises(DeviceError) as caught:
        read_gpu(nvml=nvml)
    assert str(caught.value) == f"{message} Ask about a card that is not here: --gpu 'RTX 4070', --vram 12GB, or --all."
    assert caught.value.exit_code == 4  # nothing is wrong with what was typed


def test_without_nvidia_ml_py_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(DeviceError, match=r"nvidia-ml-py is not installed\. Install it \(pip install nvidia-ml-py\)"):
        read_gpu()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("RTX 4070 Laptop", "RTX 4070 Laptop 8GB"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "RTX 4070 Laptop 8GB"),
        ("rtx 4070 mobile", "RTX 4070 Laptop 8GB"),
        ("RTX 4070", "RTX 4070 12GB"),
        ("4070", "RTX 4070 12GB"),
        ("rtx4070ti", "RTX 4070 Ti 12GB"),
        ("RTX 4070TiSuper", "RTX 4070 Ti SUPER 16GB"),
        ("RTX 4060 Ti 16GB", "RTX 4060 Ti 16GB"),
        ("rtx 4060 ti 8 GB", "RTX 4060 Ti 8GB"),
        ("GeForce RTX 2070 with Max-Q Design", "RTX 2070 Laptop 8GB"),
        ("2080s", "RTX 2080 SUPER 8GB"),
        ("NVIDIA GeForce RTX 3050 6GB Laptop GPU", "RTX 3050 Laptop 6GB"),
        ("RTX 4050", "RTX 4050 Laptop 6GB"),
        ("GTX 1650", "GTX 1650 4GB"),
        ("RTX 4090 D", "RTX 4090 D 24GB"),
        ("T4", "Tesla T4 16GB"),
        ("NVIDIA RTX A2000 12GB", "RTX A2000 12GB"),
        ("a10g", "A10G 24GB"),
    ],
)
def test_a_card_is_found_by_the_names_people_write(name, found):
    assert find_gpu(name).name == found


def test_every_card_is_found_by_its_own_label():
    assert [find_gpu(card.label).name for card in CARDS] == [card.label for card in CARDS]


def test_a_card_of_the_table_is_idle_and_not_here():
    device = find_gpu("RTX 3060 12GB")
    assert device.total_bytes == device.free_bytes == 11_910 * MIB
    assert device.processes == ()
    assert device.compute_capability == (8, 6)
    assert device.bandwidth_bytes_per_second == 360e9
    assert device.tflops_16bit == 25.5
    assert not device.is_local
    assert not device.estimated


def test_where_no_reading_is_known_the_drivers_reserve_is_taken_off_and_that_is_said():
    device = find_gpu("RTX 4070 Ti")
    assert device.total_bytes == (12_282 - 500) * MIB
    assert device.estimated
    assert find_gpu("GTX 1660").total_bytes == (6144 - 410) * MIB


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RTX 4075", "The table has no card 'RTX 4075'. The nearest are RTX 4070"),
        ("RTX 4070 Laptp", "The nearest are RTX 4070 Laptop"),
        ("GTX 1080", "The table has no card 'GTX 1080'. It knows GTX 16, RTX 20 to 50, and some more. Or give"),
        ("", "The table has no card ''. It knows GTX 16"),
        ("Radeon RX 7900 XTX", "The table has no card 'Radeon RX 7900 XTX'."),
        ("12GB", "Or give its memory: --vram 12GB."),
        ("RTX 4060 Ti", "The RTX 4060 Ti comes with 8 GB and 16 GB. Say which: --gpu 'RTX 4060 Ti 8GB'."),
        ("RTX 4070 16GB", "The RTX 4070 comes with 12 GB, not with 16 GB. Say which: --gpu 'RTX 4070 12GB'."),
    ],
)
def test_an_unknown_or_unclear_card_is_one_line_with_the_nearest(name, message):
    with pytest.raises(DeviceError, match=re.escape(message)) as caught:
        find_gpu(name)
    assert "\n" not in str(caught.value)


def test_a_card_of_a_size_is_the_smallest_of_that_size_with_bfloat16():
    device = gpu_of_size(parse_size("12GB", binary=True))
    assert device.name == "a 12 GB card"
    assert device.total_bytes == device.free_bytes == (12_227 - 500) * MIB  # RTX 5070 Ti Laptop
    assert device.compute_capability == (12, 0)
    assert not device.is_local
    assert device.estimated
    assert "RTX 3060 12GB" in device.represents
    assert "RTX 2060 12GB" not in device.represents
    smallest = {gb: gpu_of_size(gb * GIB).total_bytes // MIB for gb in (4, 6, 8, 10, 16, 24)}
    assert smallest == {4: 4096 - 410, 6: 6144 - 410, 8: 8151 - 500, 10: 9871, 16: 16_303 - 500, 24: 24_463 - 500}


def test_a_size_that_is_only_sold_without_bfloat16_is_that_card():
    device = gpu_of_size(11 * GIB)
    assert (device.represents, device.compute_capability) == (("RTX 2080 Ti 11GB",), (7, 5))


def test_a_size_that_no_card_has_loses_the_most_that_its_neighbours_lose():
    # A 16 GB RTX 5070 Ti keeps 16,384 - 15,808 = 576 MiB, more than any smaller card and the 24 GB ones.
    assert gpu_of_size(20 * GIB).total_bytes == (20_480 - 576) * MIB
    assert gpu_of_size(48 * GIB).total_bytes == (49_152 - 659) * MIB  # RTX 5090
    assert gpu_of_size(2 * GIB).total_bytes == (2048 - 384) * MIB  # GTX 1650
    assert gpu_of_size(48 * GIB).estimated


def test_a_card_of_a_size_is_of_middling_speed():
    speeds = sorted(card.bandwidth_gb for card in CARDS if card.label in gpu_of_size(12 * GIB).represents)
    assert speeds[0] * 1e9 < gpu_of_size(12 * GIB).bandwidth_bytes_per_second < speeds[-1] * 1e9


@pytest.mark.parametrize(
    ("num_bytes", "size"), [(GIB - 1, "1.00 GiB"), (500 * MIB, "500 MiB"), (1025 * GIB, "1025.00 GiB")]
)
def test_a_size_no_card_could_have_is_refused(num_bytes, size):
    with pytest.raises(DeviceError, match=f"There is no card of {size}"):
        gpu_of_size(num_bytes)


def test_no_card_offers_more_than_it_has_or_much_less():
    for card in CARDS:
        assert card.nvidia_smi_mib <= card.nominal_gb * 1024
        assert 300 <= card.nvidia_smi_mib - card.usable_bytes // MIB <= 500, card.label
