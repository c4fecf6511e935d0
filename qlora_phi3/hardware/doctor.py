"""Checks of this computer and its packages, each with the command that fixes it. torch may be broken or missing here."""

import importlib
import os
import platform
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from qlora_phi3.errors import DeviceError, first_line
from qlora_phi3.files import APP_NAME
from qlora_phi3.hardware.gpu import Gpu, choose_gpu, read_gpu
from qlora_phi3.hardware.gpu_table import NATIVE_BFLOAT16
from qlora_phi3.units import GIB, format_gib

#: bitsandbytes' CUDA libraries have no code for older GPUs.
OLDEST_CAPABILITY = (7, 5)
#: The largest download that is usual, phi-4 in 16 bit, and Phi-3-mini's; what loading the smaller one takes of RAM.
LARGE_DOWNLOAD, SMALL_DOWNLOAD, LEAST_RAM = 30 * GIB, 9 * GIB, 8 * GIB
HUB_SECONDS = 3.0
TORCH_INDEX = "https://download.pytorch.org/whl/cu128"
HUB_ADDRESS = "https://huggingface.co"
DRIVER = "If there is an NVIDIA GPU: install its driver (https://www.nvidia.com/drivers), until nvidia-smi lists the GPU"


@dataclass(frozen=True, slots=True)
class Check:
    """The result of a check. `fix` is what to type, or empty; a warning does not keep a run from working."""

    name: str
    status: Literal["ok", "warning", "failed"]
    text: str
    fix: str = ""


def run_checks() -> Iterator[Check]:
    """Yield the result of every check but the training step."""
    try:
        gpu, reason = choose_gpu("auto") or read_gpu(), ""  # which says why there is none
    except DeviceError as error:
        gpu, reason = None, error.message
    yield check_python(sys.version_info[:2], sys.maxsize)
    yield from check_versions()
    yield check_gpu(gpu, reason)
    torch, problem = import_library("torch")
    yield problem or check_torch(torch, gpu)
    library, problem = import_library("bitsandbytes")
    yield problem or check_bitsandbytes(library, gpu)
    yield from check_system(platform.system(), platform.release(), Path.cwd(), gpu)
    yield from check_space()
    yield from check_hub(os.environ)


def check_python(found: tuple[int, ...], largest_int: int) -> Check:
    """Version and width of Python."""
    text = f"{'.'.join(map(str, found))}, {sys.executable}"
    if found < (3, 11) or largest_int < 2**32:
        return Check("Python", "failed", f"{text}: 64-bit Python 3.11 or newer is needed", "uv venv --python 3.12")
    return Check("Python", "ok", text)


def check_versions(read: Callable[[str], str] = version) -> Iterator[Check]:
    """Each package against the range that was tested, as the installed distribution states it; `read` gives the versions."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(line) for line in requires(APP_NAME) or ()]
    except (ImportError, PackageNotFoundError) as error:
        yield Check("packages", "failed", f"the tested versions are not known: {first_line(error)}", f"pip install {APP_NAME}")
        return
    needed, wrong = [each for each in wanted if each.marker is None], 0
    for requirement in needed:
        try:
            found = read(requirement.name)
        except PackageNotFoundError:
            found = "not installed"
        if found == "not installed" or not requirement.specifier.contains(found, prereleases=True):
            wrong += 1
            text = f"{found}; tested with {requirement.specifier}"
            yield Check(requirement.name, "failed", text, f"pip install '{requirement.name}{requirement.specifier}'")
    yield Check("packages", "ok", f"{len(needed) - wrong} of {len(needed)} packages have tested versions")


def import_library(name: str) -> tuple[Any, Check | None]:
    """A module, and None; or None and the check that says why it cannot be imported."""
    try:
        return importlib.import_module(name), None
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # of a missing .so, or of two that do not match
        fix = f"pip install --force-reinstall --no-cache-dir {name}"
        return None, Check(name, "failed", f"it cannot be imported: {first_line(error)}", fix)


def check_gpu(gpu: Gpu | None, reason: str) -> Check:
    """The GPU that a run takes, by the driver; `reason` says why there is none."""
    if gpu is None:
        return Check("GPU", "warning", f"a run would use the CPU, which is slow: {reason}", DRIVER)
    text = f"{gpu.name}, {format_gib(gpu.free_bytes)} of {format_gib(gpu.total_bytes)} free, compute capability "
    text += ".".join(map(str, gpu.compute_capability))
    if gpu.compute_capability < OLDEST_CAPABILITY:
        return Check("GPU", "failed", f"{text}: 7.5 or newer is needed (GTX 16, RTX 20 or later)")
    return Check("GPU", "ok", f"{text}: computes in {'bfloat16' if gpu.compute_capability >= NATIVE_BFLOAT16 else 'float16'}")


def check_torch(torch: Any, gpu: Gpu | None) -> Check:
    """Whether torch's build, the driver and the GPU work together."""
    built = torch.version.cuda
    text = f"{torch.__version__}, built {f'for CUDA {built}' if built else 'without CUDA'}"
    if gpu is None:
        return Check("torch", "ok", text)
    install = f"pip install --force-reinstall torch --index-url {TORCH_INDEX}"
    if built is None:
        return Check("torch", "failed", f"{text}, so that {gpu.name} is not used", install)
    if not torch.cuda.is_available():
        text = f"{text}, and does not reach the GPU: the driver may be older than that CUDA"
        return Check("torch", "failed", text, "Install a newer driver from https://www.nvidia.com/drivers, and restart")
    major, minor = gpu.compute_capability
    built_for = [name.rpartition("_")[2].rstrip("af") for name in torch.cuda.get_arch_list()]
    if not any(int(name[:-1]) == major and int(name[-1]) <= minor for name in built_for if name.isdecimal()):
        return Check("torch", "failed", f"{text}, without kernels for compute capability {major}.{minor}", install)
    return Check("torch", "ok", text)


def check_bitsandbytes(library: Any, gpu: Gpu | None) -> Check:
    """Whether bitsandbytes loaded its compiled library, for CUDA where there is a GPU."""
    native = library.cextension.lib
    text = f"{library.__version__}, {'CUDA' if getattr(native, 'compiled_with_cuda', False) else 'CPU'} library"
    fix = "python -m bitsandbytes"
    if type(native).__name__.startswith("ErrorHandler"):
        return Check("bitsandbytes", "failed", f"{library.__version__}: its compiled library does not load", fix)
    if gpu is not None and not native.compiled_with_cuda:
        return Check("bitsandbytes", "failed", f"{text}, and torch's CUDA has no library in it", fix)
    return Check("bitsandbytes", "ok", text)


def check_system(system: str, release: str, here: Path, gpu: Gpu | None) -> Iterator[Check]:
    """The traps of Windows and of WSL."""
    is_wsl = "microsoft" in release.lower()
    yield Check("system", "ok", f"{system} {release}{' (WSL)' if is_wsl else ''}")
    if is_wsl and here.as_posix().startswith("/mnt/"):
        text = f"{here} is a disk of Windows: files there are read many times slower than in WSL's own"
        yield Check("system", "warning", text, f"cp -r '{here}' ~/")
    if gpu is not None and (is_wsl or system == "Windows"):
        text = "the driver may move GPU memory into the computer's memory instead of failing; a run stays below what is free"
        fix = "NVIDIA Control Panel > Manage 3D settings > CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback"
        yield Check("system", "warning", text, fix)


def check_space() -> Iterator[Check]:
    """Free space where models and runs are written, and the computer's memory."""
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    for name, folder in (("disk of models", cache), ("disk of runs", Path.cwd())):
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        needed = SMALL_DOWNLOAD if folder == cache else GIB
        text = f"{format_gib(free)} free in {folder}"
        if free < needed:
            fix = "export HF_HOME=/path/on/a/larger/disk" if folder == cache else "df -h ."
            yield Check(name, "failed", f"{text}; at least {format_gib(needed)} are needed", fix)
        elif folder == cache and free < LARGE_DOWNLOAD:
            yield Check(
                name, "warning", f"{text}: enough for the models of 3.8B parameters; phi-4 needs {format_gib(LARGE_DOWNLOAD)}"
            )
        else:
            yield Check(name, "ok", text)
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        return  # it is among the packages
    memory = psutil.virtual_memory()
    text = f"{format_gib(memory.available)} of {format_gib(memory.total)} available"
    enough = memory.total >= LEAST_RAM
    fix = "" if enough else "In WSL: set memory= in %UserProfile%\\.wslconfig; else add swap"
    yield Check("memory", "ok" if enough else "warning", text if enough else f"{text}; loading a model may need more", fix)


def check_hub(environ: Mapping[str, str]) -> Iterator[Check]:
    """Whether the hub answers within 3 seconds, and whether a token is set; the token itself is never shown."""
    address = environ.get("HF_ENDPOINT") or HUB_ADDRESS
    if environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Check("hub", "warning", "HF_HUB_OFFLINE is set: only models that are on this computer", "unset HF_HUB_OFFLINE")
    else:
        reason = _reach(address)
        text = (
            f"{address} cannot be reached ({reason}): only models that are on this computer" if reason else f"{address} answers"
        )
        yield Check("hub", "warning" if reason else "ok", text, f"curl -sI {address}" if reason else "")
    home = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    is_set = any(environ.get(name) for name in names) or Path(environ.get("HF_TOKEN_PATH") or home / "token").is_file()
    yield Check("hub token", "ok", "present" if is_set else "not set: needed for gated models and uploads only (hf auth login)")


def _reach(address: str) -> str:
    """Why an address does not answer, empty where it does. A thread, as looking up a name has no timeout of its own."""
    problem = [f"no answer in {HUB_SECONDS:.0f} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS).close()
            problem[0] = ""
        except urllib.error.HTTPError:
            problem[0] = ""  # it answers
        except (OSError, ValueError) as error:
            problem[0] = str(getattr(error, "reason", error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return problem[0]
