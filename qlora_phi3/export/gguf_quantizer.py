"""llama.cpp's own quantizer, for the types that the gguf package cannot write.

It runs in a process of its own (`python -m qlora_phi3.export.gguf_quantizer`): it writes to the terminal on its own, ends
the process where it fails, and does not hear Ctrl-C.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from qlora_phi3.errors import ExportError

#: Names of llama.cpp's file types that need no importance matrix, smallest first.
QUANTIZED = (
    "q2_k",
    "q3_k_s",
    "q3_k_m",
    "q3_k_l",
    "iq4_xs",
    "iq4_nl",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
)
LIBRARY = "llama_cpp"
INSTALL = "pip install llama-cpp-python"
#: Seconds between two looks at how far it is.
LOOK_SECONDS = 0.5


def check_quantizer(quant: str) -> None:
    """Raise ExportError where llama.cpp's quantizer is not installed."""
    if importlib.util.find_spec(LIBRARY) is None:
        raise ExportError(
            f"--quant {quant} is made by llama.cpp's own quantizer, which is not installed.", f"Install it: {INSTALL}"
        )


def quantize_file(source: Path, target: Path, quant: str, progress: Callable[[str, int, int | None], None]) -> None:
    """Quantize a .gguf file of 16 or 32 bit.

    Args:
        progress: told the bytes written so far; nobody knows how many they will be.

    Raises:
        ExportError: the quantizer failed; the message ends with its last line.
    """
    command = [sys.executable, "-m", "qlora_phi3.export.gguf_quantizer", str(source), str(target), quant]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while (code := _wait(process)) is None:
                progress(f"quantizing to {quant}", target.stat().st_size if target.exists() else 0, None)
        finally:
            process.kill()
            process.wait()
        if code != 0:
            log.seek(0)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            last = lines[-1] if lines else f"exit code {code}"
            raise ExportError(f"llama.cpp's quantizer failed on {source}: {last}", f"Update it: {INSTALL} --upgrade")


def _wait(process: "subprocess.Popen[bytes]") -> int | None:
    try:
        return process.wait(LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def main(source: str, target: str, quant: str) -> int:
    """What runs in the process of its own."""
    llama_cpp = importlib.import_module(LIBRARY)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
    options.nthread = os.cpu_count() or 1
    return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), options))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
