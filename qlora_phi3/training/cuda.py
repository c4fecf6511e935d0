"""How a CUDA device is set up before its first allocation."""

import os
import platform

import torch

from qlora_phi3.memory.allocator import expandable_segments_work


def prepare_cuda() -> None:
    """Let segments grow instead of leaving holes, and keep to the attention kernels whose memory is known.

    A setting of the user's in PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF stands. cuDNN's attention, which torch prefers on
    compute capability 9 and 10, takes a workspace that nobody states.
    """
    chosen = any(name in os.environ for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    if not chosen and expandable_segments_work(platform.system(), platform.release()):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    torch.backends.cuda.enable_cudnn_sdp(False)
