"""How much memory has been used at most, in bytes."""

import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Peak allocated on a CUDA device, or the process's resident high-water mark on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
