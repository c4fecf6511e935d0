"""GPUs read through a stand-in for NVML, GPUs of the table, and the choice of one for a run."""

import os
import re
import sys

import pytest
from fake_nvml import FakeNVML, NVMLError, laptop, process, two_gpus

from qlora_phi3.errors import DeviceError, NoDeviceError, NoDriverError
from qlora_phi3.hardware.gpu import (
    GpuProcess,
    choose_gpu,
    find_gpu,
    gpu_of_size,
    hide_other_gpus,
    read_gpu,
    take_launch,
)
from qlora_phi3.hardware.gpu_table import GPU_TABLE
from qlora_phi3.units import parse_size

MIB, GIB = 2**20, 2**30


@pytest.fixture(autouse=True)
def every_gpu_is_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_total_of_a_local_gpu_leaves_out_what_the_driver_reserves():
    nvml = FakeNVML(laptop())
    gpu = read_gpu(nvml=nvml)
    assert gpu.name == "NVIDIA GeForce RTX 4070 Laptop GPU"
    assert gpu.total_bytes == 7806 * MIB
    assert gpu.free_bytes == 7000 * MIB
    assert gpu.other_processes_bytes == 806 * MIB
    assert gpu.compute_capability == (8, 9)
    assert gpu.bandwidth_bytes_per_second == 256e9
    assert gpu.is_local
    assert not nvml.is_open


def test_other_processes_are_listed_once_each_the_largest_first_and_without_this_one():
    gpu = laptop(
        computing=[process(20, 900 * MIB), process(os.getpid(), 300 * MIB)],
        drawing=[process(10, 120 * MIB), process(20, 850 * MIB), process(30, None)],
    )
    assert read_gpu(nvml=FakeNVML(gpu)).processes == (
        GpuProcess(name="game.exe", pid=20, used_bytes=900 * MIB),
        GpuProcess(name="Xorg", pid=10, used_bytes=120 * MIB),
        GpuProcess(name="chrome", pid=30, used_bytes=None),
    )


def test_a_driver_that_lists_no_processes_still_reports_the_free_memory():
    gpu = laptop(computing=[process(10, MIB)])
    refused = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
    assert read_gpu(nvml=FakeNVML(gpu, broken=refused)).processes == ()
    nameless = read_gpu(nvml=FakeNVML(gpu, broken=("nvmlSystemGetProcessName",)))
    assert nameless.processes[0].name == "a process that the driver does not name"


def test_the_speed_of_a_gpu_that_the_table_lacks_comes_from_its_bus_width_and_clocks():
    h200 = laptop(name="NVIDIA H200", total=143_771 * MIB, compute_capability=(9, 0))
    gpu = read_gpu(nvml=FakeNVML(h200))
    assert gpu.bandwidth_bytes_per_second == pytest.approx(4.81e12, rel=0.01)  # 4.8 TB/s on its data sheet
    assert gpu.tflops_16bit == pytest.approx(989, rel=0.01)  # as on its data sheet
    assert gpu.multiprocessors == 132
    blind = read_gpu(nvml=FakeNVML(h200, broken=("nvmlDeviceGetMemoryBusWidth",)))
    assert blind.bandwidth_bytes_per_second == 1792e9  # the table's largest, an RTX 5090


@pytest.mark.parametrize(
    ("visible", "found"),
    [(None, "first"), ("1", "second"), ("1,0", "second"), ("GPU-22", "second"), ("GPU-11, GPU-22", "first"), ("0,-1,1", "first")],
)
def test_the_gpu_is_the_one_that_torch_would_use(monkeypatch, visible, found):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNVML(laptop(uuid="GPU-11", name="first"), laptop(uuid="GPU-22", name="second"))
    assert read_gpu(nvml=nvml).name == found


@pytest.mark.parametrize("visible", ["", "-1", "7,0", "GPU-"])
def test_a_hidden_gpu_is_not_read(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNVML(laptop(uuid="GPU-11"), laptop(uuid="GPU-22"))
    with pytest.raises(NoDeviceError, match=re.escape(f"CUDA_VISIBLE_DEVICES={visible!r} shows no GPU.")):
        read_gpu(nvml=nvml)
    assert not nvml.is_open


@pytest.mark.parametrize(
    "nvml",
    [FakeNVML(broken=("nvmlInit",)), FakeNVML(), FakeNVML(laptop(), broken=("nvmlDeviceGetMemoryInfo",))],
    ids=["no driver", "no GPU", "the driver fails"],
)
def test_a_gpu_that_cannot_be_read_is_exit_code_4(nvml):
    with pytest.raises(NoDeviceError) as caught:
        read_gpu(nvml=nvml)
    assert caught.value.exit_code == 4
    assert not nvml.is_open


def test_only_a_driver_that_is_not_installed_leaves_the_processor():
    class LibraryNotFound(FakeNVML.NVMLError):
        pass

    for missing in (FakeNVML.NVMLError, LibraryNotFound):
        nvml = FakeNVML()
        nvml.NVMLError_LibraryNotFound = LibraryNotFound

        def fail(missing=missing):
            raise missing("NVML Shared Library Not Found")

        nvml.nvmlInit = fail
        with pytest.raises(NoDeviceError, match="No NVIDIA driver answers") as caught:
            read_gpu(nvml=nvml)
        assert isinstance(caught.value, NoDriverError) == (missing is LibraryNotFound)


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
        ("4060 ti 16", "RTX 4060 Ti 16GB"),
        ("RTX4060Ti16GB", "RTX 4060 Ti 16GB"),
        ("4070tis", "RTX 4070 Ti SUPER 16GB"),
        ("3060 12", "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 3050 6GB Laptop GPU", "RTX 3050 Laptop 6GB"),
        ("RTX 4050", "RTX 4050 Laptop 6GB"),
        ("GTX 1650", "GTX 1650 4GB"),
        ("RTX 4090 D", "RTX 4090 D 24GB"),
        ("T4", "Tesla T4 16GB"),
        ("NVIDIA RTX A2000 12GB", "RTX A2000 12GB"),
        ("a10g", "A10G 24GB"),
        ("NVIDIA RTX 4000 Ada Generation", "RTX 4000 Ada 20GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 96GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
    ],
)
def test_a_gpu_is_found_by_the_names_people_write(name, found):
    assert find_gpu(name).name == found


def test_every_gpu_is_found_by_its_own_label():
    assert [find_gpu(gpu.label).name for gpu in GPU_TABLE] == [gpu.label for gpu in GPU_TABLE]


def test_a_gpu_of_the_table_is_idle_and_not_local():
    gpu = find_gpu("RTX 3060 12GB")
    assert gpu.total_bytes == gpu.free_bytes == 11_910 * MIB
    assert gpu.processes == ()
    assert gpu.compute_capability == (8, 6)
    assert gpu.bandwidth_bytes_per_second == 360e9
    assert gpu.tflops_16bit == 25.5
    assert not gpu.is_local
    assert not gpu.estimated


def test_without_a_measured_total_the_drivers_reserve_is_subtracted_and_the_gpu_is_estimated():
    gpu = find_gpu("RTX 4070 Ti")
    assert gpu.total_bytes == (12_282 - 500) * MIB
    assert gpu.estimated
    assert find_gpu("GTX 1660").total_bytes == (6144 - 410) * MIB


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RTX 4075", "'RTX 4075'. Similar names: RTX 4070"),
        ("RTX 4070 Laptp", "Similar names: RTX 4070 Laptop"),
        ("GTX 1080", "'GTX 1080' is too old"),
        ("V100 16GB", "'V100 16GB' is too old"),
        ("Titan RTX", "The table has no GPU 'Titan RTX'"),
        ("B200 180GB", "--vram 180GB"),
        ("Jetson Orin", "'Jetson Orin' shares the computer's memory"),
        ("Apple M3", "'Apple M3' is no NVIDIA GPU"),
        ("", "''. It has GTX 16"),
        ("Radeon RX 7900 XTX", "'Radeon RX 7900 XTX' is no NVIDIA GPU"),
        ("arc b580", "7.5 or newer"),
        ("12GB", "--vram 12GB"),
        ("RTX 4060 Ti", "8 GB and 16 GB"),
        ("RTX 4070 16GB", "not with 16 GB"),
    ],
)
def test_an_unknown_or_ambiguous_name_is_refused_with_similar_names(name, message):
    with pytest.raises(DeviceError, match=re.escape(message)) as caught:
        find_gpu(name)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_gpu_of_a_size_is_the_smallest_of_that_size_with_bfloat16():
    gpu = gpu_of_size(parse_size("12GB", binary=True))
    assert gpu.name == "a 12 GB GPU"
    assert gpu.total_bytes == gpu.free_bytes == (12_227 - 500) * MIB  # RTX 5070 Ti Laptop
    assert gpu.compute_capability == (12, 0)
    assert not gpu.is_local
    assert gpu.estimated
    assert "RTX 3060 12GB" in gpu.represents
    assert "RTX 2060 12GB" not in gpu.represents
    smallest = {gb: gpu_of_size(gb * GIB).total_bytes // MIB for gb in (4, 6, 8, 10, 16, 24)}
    assert smallest == {4: 4096 - 410, 6: 6144 - 410, 8: 8151 - 500, 10: 9871, 16: 16_303 - 500, 24: 24_463 - 500}


def test_a_size_that_is_only_sold_without_bfloat16_is_that_gpu():
    gpu = gpu_of_size(11 * GIB)
    assert (gpu.represents, gpu.compute_capability) == (("RTX 2080 Ti 11GB",), (7, 5))


def test_a_size_that_the_table_lacks_has_the_largest_reserve_of_its_neighbours():
    # A 16 GB RTX 5070 Ti reserves 16,384 - 15,808 = 576 MiB, more than any smaller GPU and the 24 GB ones.
    assert gpu_of_size(18 * GIB).total_bytes == (18_432 - 576) * MIB
    assert gpu_of_size(64 * GIB).total_bytes == (65_536 - 659) * MIB  # RTX 5090
    assert gpu_of_size(2 * GIB).total_bytes == (2048 - 384) * MIB  # GTX 1650
    assert gpu_of_size(64 * GIB).estimated


def test_a_size_that_no_consumer_gpu_has_is_that_of_the_workstation_gpus():
    assert gpu_of_size(20 * GIB).total_bytes == (20_470 - 500) * MIB  # RTX A4500
    assert gpu_of_size(48 * GIB).total_bytes == (46_068 - 500) * MIB  # with error correction


@pytest.mark.parametrize("spec", [spec for spec in GPU_TABLE if spec.consumer], ids=lambda spec: spec.label)
def test_multiprocessors_and_arithmetic_rate_give_a_clock_that_such_gpus_have(spec):
    cores = spec.multiprocessors * (64 if spec.compute_capability == (7, 5) else 128)
    operations = 8 if spec.name.startswith("RTX 20") and spec.compute_capability == (7, 5) else 4
    newer = spec.compute_capability >= (8, 9)
    lowest, highest = (2.0, 2.7) if newer else (1.05, 1.9)
    assert lowest < spec.tflops_16bit * 1e3 / (cores * operations) < highest


def test_a_gpu_of_a_size_has_the_largest_context_of_that_size():
    of_12_gb = gpu_of_size(12 * GIB)
    assert of_12_gb.multiprocessors == max(gpu.multiprocessors for gpu in GPU_TABLE if gpu.label in of_12_gb.represents)
    assert find_gpu("RTX 3060 12GB").multiprocessors == 28


def test_a_gpu_of_a_size_has_the_median_speed():
    speeds = sorted(gpu.bandwidth_gb for gpu in GPU_TABLE if gpu.label in gpu_of_size(12 * GIB).represents)
    assert speeds[0] * 1e9 < gpu_of_size(12 * GIB).bandwidth_bytes_per_second < speeds[-1] * 1e9


@pytest.mark.parametrize("num_bytes", [GIB - 1, 500 * MIB, 1025 * GIB])
def test_a_size_that_no_gpu_has_is_refused(num_bytes):
    with pytest.raises(DeviceError):
        gpu_of_size(num_bytes)


def test_no_gpu_has_more_usable_memory_than_installed_or_much_less():
    for gpu in GPU_TABLE:
        assert gpu.nvidia_smi_mib <= gpu.nominal_gb * 1024
        assert 300 <= gpu.nvidia_smi_mib - gpu.usable_bytes // MIB <= 500, gpu.label


# The GPU of a run


@pytest.mark.parametrize(
    ("wanted", "visible", "uuid"),
    [
        ("auto", None, "GPU-11"),
        ("auto", "1", "GPU-22"),
        ("auto", "GPU-22,0", "GPU-11"),
        (1, None, "GPU-22"),
        (1, "1", "GPU-22"),  # the number of nvidia-smi, not the place in CUDA_VISIBLE_DEVICES
        ("4070", None, "GPU-11"),  # the exact name, although both contain it
        ("rtx 4070ti", None, "GPU-22"),
        ("GeForce", None, "GPU-11"),
    ],
)
def test_a_run_uses_the_wanted_gpu_or_the_one_with_most_free_memory(monkeypatch, wanted, visible, uuid):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = two_gpus()
    chosen = choose_gpu(wanted, nvml=nvml)
    assert chosen.visible_devices == uuid
    assert chosen.name == {gpu.uuid: gpu.name for gpu in nvml.gpus}[uuid]
    assert not nvml.is_open


@pytest.mark.parametrize(("wanted", "visible"), [(2, None), ("RTX 3060", None), (1, "0"), ("Ti", "0")])
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(monkeypatch, wanted, visible):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(DeviceError, match=re.escape(f"{wanted!r}")) as caught:
        choose_gpu(wanted, nvml=two_gpus())
    assert caught.value.exit_code == 2
    assert "0 (NVIDIA GeForce RTX 4070)" in caught.value.message
    assert ("1 (NVIDIA GeForce RTX 4070 Ti SUPER)" in caught.value.message) == (visible is None)


def test_without_a_readable_gpu_auto_finds_none_and_a_name_is_refused(monkeypatch):
    no_driver = two_gpus(broken=("nvmlInit",))
    assert choose_gpu("auto", nvml=no_driver) is None
    with pytest.raises(DeviceError, match="none") as caught:
        choose_gpu("RTX 4070", nvml=no_driver)
    assert caught.value.exit_code == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_gpu("auto", nvml=two_gpus()) is None


def test_a_gpu_that_has_failed_is_not_chosen():
    class OneLost(FakeNVML):
        def nvmlDeviceGetCudaComputeCapability(self, gpu):  # noqa: N802
            if gpu.uuid == "GPU-11":
                raise NVMLError("GPU is lost")
            return super().nvmlDeviceGetCudaComputeCapability(gpu)

    assert choose_gpu("auto", nvml=OneLost(*two_gpus().gpus)).visible_devices == "GPU-22"


def test_without_a_uuid_the_gpu_is_shown_by_its_number(monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    nvml = two_gpus(broken=("nvmlDeviceGetUUID",))
    hide_other_gpus(choose_gpu(1, nvml=nvml))
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1,0", "1"), ("MIG-5", "MIG-5"), ("", "")])
def test_where_none_was_chosen_the_first_gpu_stays_visible(monkeypatch, before, after):
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "set, so that it is restored")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    hide_other_gpus(None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after


def test_the_chosen_gpu_is_the_only_one_that_is_read_afterwards(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    nvml = two_gpus()
    hide_other_gpus(choose_gpu("4070 Ti SUPER", nvml=nvml))
    assert read_gpu(nvml=nvml).name == "NVIDIA GeForce RTX 4070 Ti SUPER"
    assert os.environ["CUDA_VISIBLE_DEVICES"].count(",") == 0


TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "environ",
    [
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"SLURM_NTASKS": "4"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "8"},
        {**TWO, "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {**TWO, "SLURM_NTASKS": "4"},
    ],
)
def test_processes_that_no_launcher_connects_on_this_computer_are_refused(environ):
    with pytest.raises(DeviceError, match="connects them on one computer") as caught:
        take_launch(environ)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_splitting_the_weights_is_refused(name):
    with pytest.raises(DeviceError, match=f"ACCELERATE_USE_{name} = true"):
        take_launch({**TWO, f"ACCELERATE_USE_{name}": "true"})


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": "1", "SLURM_NTASKS": "1"}, {"WORLD_SIZE": ""}, {"PMI_SIZE": "x"}])
def test_a_single_process_is_accepted(environ):
    assert take_launch(environ) == (0, 1)


def test_a_launcher_s_variables_are_taken_so_that_the_libraries_see_one_process():
    environ = {**TWO, "MASTER_ADDR": "here", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true", "HOME": "/"}
    assert take_launch(environ) == (1, 2)
    assert environ == {"MASTER_ADDR": "here", "LOCAL_WORLD_SIZE": "2", "HOME": "/", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(("visible", "uuids"), [(None, ["GPU-11", "GPU-22"]), ("1,0", ["GPU-22", "GPU-11"])])
def test_each_of_several_processes_has_the_visible_gpu_of_its_rank(monkeypatch, visible, uuids):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [choose_gpu("auto", rank, nvml=two_gpus()).visible_devices for rank in (0, 1)] == uuids
    with pytest.raises(DeviceError, match="for process 2"):
        choose_gpu("auto", 2, nvml=two_gpus())
    with pytest.raises(DeviceError, match="for process 1"):
        choose_gpu(1, 1, nvml=two_gpus())


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("3,5", "5"), ("", "")])
def test_without_nvml_the_gpu_of_the_rank_stays_visible(monkeypatch, before, after):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "set, so that it is restored")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    hide_other_gpus(None, 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after
