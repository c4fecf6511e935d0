"""The emulated card from inside a process; see runtime.cpp. Without it (EMULATED_CUDA is not set) nothing here can be used."""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

IS_HERE = "EMULATED_CUDA" in os.environ
_library = ctypes.CDLL("libcudart.so.13") if IS_HERE else None
if _library is not None:
    for _name in ("emu_used_bytes", "emu_peak_bytes", "emu_managed_bytes", "emu_pinned_peak_bytes"):
        getattr(_library, _name).restype = ctypes.c_size_t
    _library.emu_set_nonzero.argtypes = [ctypes.c_long]
    _library.emu_set_others_bytes.argtypes = [ctypes.c_size_t]
    _library.emu_choose.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]

    import torch

    # bitsandbytes asks when it is imported, and torch would remember that card in all children.
    _usual, torch.cuda.get_device_capability = torch.cuda.get_device_capability, lambda *_: (8, 6)
    import bitsandbytes  # noqa: F401

    torch.cuda.get_device_capability = _usual


def choose(card: str, total_mib: int = 0) -> None:
    """Take another card of runtime.cpp's list, before the first call of CUDA. Without a size it has that card's own."""
    if _library.emu_choose(card.encode(), total_mib, 0):
        raise ValueError(f"runtime.cpp has no card {card}")


def tell_supervised(count: int) -> None:
    """How many positions `nonzero` finds from now on: the one thing whose size depends on values, which nobody computes."""
    _library.emu_set_nonzero(count)


def leave(free_bytes: int) -> None:
    """Let other programs take what this one does not hold, but for so many bytes; they give the rest back."""
    torch.cuda.empty_cache()  # nobody can take what the allocator keeps
    _library.emu_set_others_bytes(0)
    _library.emu_set_others_bytes(max(0, torch.cuda.mem_get_info()[0] - free_bytes))


def hold(num_bytes: int) -> None:
    """Let other programs hold so many bytes of the card, whatever this one does; 0: they end."""
    _library.emu_set_others_bytes(num_bytes)


def used_bytes() -> int:
    """What this process holds, its context included, as the driver counts it."""
    return int(_library.emu_used_bytes())


def pinned_peak_bytes() -> int:
    """Most pinned host memory at once."""
    return int(_library.emu_pinned_peak_bytes())


def managed_bytes() -> int:
    """Managed memory, which paged optimizers use."""
    return int(_library.emu_managed_bytes())


def census() -> tuple[Counter[str], Counter[str]]:
    """Kernels by their name, and calls by theirs, since `forget_census`."""
    with tempfile.NamedTemporaryFile() as file:
        _library.emu_write_census(file.name.encode())
        lines = [line.split(" ", 2) for line in Path(file.name).read_text(encoding="utf-8").splitlines()]
    kernels, calls = Counter[str](), Counter[str]()
    for kind, count, name in lines:
        (kernels if kind == "kernel" else calls)[name] += int(count)
    plain = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True).stdout
    readable = Counter[str]()
    for name, count in zip(plain.splitlines(), kernels.values(), strict=True):
        readable[name] += count
    return readable, calls


def forget_census() -> None:
    """Count from here on."""
    _library.emu_reset_census()


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns, as JSON carries it, from a forked process: a process can be only one card, and only once.

    The parent must not have run a backward pass: the threads of autograd are not in a child, which would wait for them.
    """
    receiving, sending = os.pipe()
    if not (child := os.fork()):
        os.close(receiving)
        try:
            answer = {"result": work()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(sending, "w") as pipe:
            json.dump(answer, pipe)
        sys.stdout.flush()
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    answer = json.loads(text or '{"error": "the process died"}')
    if "error" in answer:
        raise AssertionError(answer["error"])
    return answer["result"]


def stand_in_for_values() -> None:
    """Until this process ends, what the product reads of results that nobody computed lets a run go on.

    `nonzero` finds as many positions as the labels on the card hold (copies of up to 256 KiB are made); and where code of
    qlora_phi3 makes a float or a bool of a number on the card, it is 1: losses and norms are finite, weights are not zero.
    What is recorded of 4-bit weights is the same for all, so that an export finds the base that was trained on. Trained weights
    are zero where they are saved, and not what lay in the memory before.
    """
    from peft import PeftModel

    from qlora_phi3 import objectives
    from qlora_phi3.export import base, streamed
    from qlora_phi3.model import quantized
    from qlora_phi3.model.loss import IGNORE_INDEX, select_supervised

    def select_and_tell(hidden: Any, labels: Any) -> Any:
        if labels.device.type == "cuda":
            values = (ctypes.c_int64 * labels.numel()).from_address(labels.data_ptr())  # the card's memory is the host's
            length = labels.shape[1]
            tell_supervised(sum(value != IGNORE_INDEX for place, value in enumerate(values) if place % length))
        return select_supervised(hidden, labels)

    objectives.select_supervised = streamed.select_supervised = select_and_tell
    for name, kind in (("__float__", float), ("__bool__", bool)):
        usual = getattr(torch.Tensor, name)

        def read(tensor: Any, usual: Callable[[Any], Any] = usual, kind: type = kind) -> Any:
            caller, value = sys._getframe(1).f_globals["__name__"], usual(tensor)  # read, as the host waits for the card then
            return kind(1) if tensor.device.type == "cuda" and caller.startswith("qlora_phi3.") else value

        setattr(torch.Tensor, name, read)
    save_pretrained = PeftModel.save_pretrained

    def zero_and_save(model: Any, *args: Any, **kwargs: Any) -> None:
        for weight in model.parameters():
            if weight.requires_grad and weight.device.type == "cuda":
                ctypes.memset(weight.data_ptr(), 0, weight.nbytes)
        save_pretrained(model, *args, **kwargs)

    PeftModel.save_pretrained = zero_and_save
    same = {"kind": "4bit", "sha256": "0" * 64, "codes": "0" * 64, "mean_absmax": 1.0, "sampled_codes": ""}
    base.quantized_record = quantized.quantized_record = lambda packed, state: dict(same)
    base.isclose = lambda *_, **__: True
