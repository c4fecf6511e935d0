"""Messages about GPUs: reading one, finding one in the table, and choosing one for a run."""

import os
import sys
from unittest import mock

from fake_nvml import MIB, FakeNVML, laptop, two_gpus
from message_table import Message

from qlora_phi3.errors import DeviceError, NoDeviceError
from qlora_phi3.hardware.gpu import choose_gpu, find_gpu, gpu_of_size, read_gpu, take_launch


def read_without_package(shop):
    with mock.patch.dict(sys.modules, pynvml=None):
        read_gpu()


def with_every_gpu_visible(trigger):
    """The trigger without CUDA_VISIBLE_DEVICES, which an earlier run in this process may have set."""

    def run(shop):
        with mock.patch.dict(os.environ):
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            trigger(shop)

    return run


def unreadable(name, trigger, says, hint="--gpu 'RTX 4070'"):
    trigger = with_every_gpu_visible(trigger)
    return Message(name=name, trigger=trigger, error=NoDeviceError, exit_code=4, says=says, hint=hint)


def refused(name, trigger, says, hint):
    trigger = with_every_gpu_visible(trigger)
    return Message(name=name, trigger=trigger, error=DeviceError, exit_code=2, says=says, hint=hint)


MESSAGES = [
    unreadable("gpu-without-nvidia-ml-py", read_without_package, ("nvidia-ml-py",), "pip install nvidia-ml-py"),
    unreadable("gpu-without-driver", lambda shop: read_gpu(nvml=FakeNVML(laptop(), broken=("nvmlInit",))), ("Unknown Error",)),
    unreadable("gpu-none", lambda shop: read_gpu(nvml=FakeNVML()), ("finds no GPU",)),
    unreadable(
        "gpu-driver-fails",
        lambda shop: read_gpu(nvml=FakeNVML(laptop(), broken=("nvmlDeviceGetMemoryInfo",))),
        ("The NVIDIA driver failed", "Unknown Error"),
    ),
    refused("gpu-not-in-the-table", lambda shop: find_gpu("RTX 4075"), ("'RTX 4075'", "RTX 4070"), "--vram 12GB"),
    refused("gpu-of-another-maker", lambda shop: find_gpu("RX 7900 XTX"), ("'RX 7900 XTX'", "NVIDIA"), "7.5 or newer"),
    refused("gpu-too-old", lambda shop: find_gpu("GTX 1080 Ti"), ("'GTX 1080 Ti'", "too old"), "7.5 or newer"),
    refused(
        "gpu-of-several-sizes",
        lambda shop: find_gpu("RTX 4060 Ti"),
        ("RTX 4060 Ti", "8 GB and 16 GB"),
        "--gpu 'RTX 4060 Ti 8GB'",
    ),
    refused("gpu-of-that-size", lambda shop: gpu_of_size(500 * MIB), ("500 MiB",), "--vram 12GB"),
    refused(
        "gpu-of-the-recipe-not-here",
        lambda shop: choose_gpu("RTX 3060", nvml=two_gpus()),
        ("[memory] gpu = 'RTX 3060'", "0 (NVIDIA GeForce RTX 4070)"),
        'gpu = "auto"',
    ),
    refused(
        "several-processes",
        lambda shop: take_launch({"WORLD_SIZE": "2"}),
        ("2 processes were started (WORLD_SIZE=2)", "not by a launcher"),
        "accelerate launch --num_processes 2",
    ),
    refused(
        "weights-split-among-gpus",
        lambda shop: take_launch({"ACCELERATE_USE_FSDP": "true"}),
        ("ACCELERATE_USE_FSDP = true", "4-bit weights cannot be split"),
        "--multi_gpu --num_processes",
    ),
]
