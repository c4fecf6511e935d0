"""llama.cpp's own quantizer, for the types that the gguf package cannot write.

It runs in its own process (`python -m qlora_phi3.export.gguf.quantizer`), because it writes to the terminal, ends the process
where it fails, and ignores Ctrl-C.
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

#: Types that the gguf package itself can write, largest first.
PLAIN = ("f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

#: llama.cpp's file types that need no importance matrix, and the bits of a weight, averaged over all weights of Llama-3.1-8B
#: with its embedding and head (the table in llama.cpp's tools/quantize/README.md).
QUANTIZED = {
    "q2_k": 3.16,
    "q3_k_s": 3.64,
    "q3_k_m": 4.00,
    "q3_k_l": 4.30,
    "iq4_xs": 4.46,
    "iq4_nl": 4.68,
    "q4_k_s": 4.67,
    "q4_k_m": 4.89,
    "q5_k_s": 5.57,
    "q5_k_m": 5.70,
    "q6_k": 6.56,
}

LIBRARY = "llama_cpp"
INSTALL = "pip install llama-cpp-python"

#: Seconds between two reports of progress.
POLL_SECONDS = 0.5


def check_quantizer(quant: str) -> None:
    """Raise ExportError where llama.cpp's quantizer is not installed."""
    if importlib.util.find_spec(LIBRARY) is None:
        raise ExportError(f"--quant {quant} needs llama.cpp's own quantizer.", f"Install it: {INSTALL}")


def quantize_file(source: Path, target: Path, quant: str, progress: Callable[[str, int, int | None], None]) -> None:
    """Quantize a .gguf file of 16 or 32 bit.

    Args:
        source: the file to read.
        target: the file to write.
        quant: of `QUANTIZED`.
        progress: called with the bytes written so far; how many they will be is known only at the end.

    Raises:
        ExportError: the quantizer failed; the message ends with its last line.
    """
    command = [sys.executable, "-m", "qlora_phi3.export.gguf.quantizer", str(source), str(target), quant]
    what, code = f"Quantizing to {quant}", None
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while code is None:
                try:
                    code = process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    progress(what, target.stat().st_size if target.exists() else 0, None)
        finally:
            process.kill()
            process.wait()
        if code != 0:
            log.seek(0)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            last = lines[-1] if lines else f"exit code {code}"
            raise ExportError(f"llama.cpp's quantizer failed on {source}: {last}", f"Update it: {INSTALL} --upgrade")
    progress(what, target.stat().st_size, target.stat().st_size)


def main(source: str, target: str, quant: str) -> int:
    """What runs in the quantizer's process; returns its exit code."""
    llama_cpp = importlib.import_module(LIBRARY)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
    options.nthread = os.cpu_count() or 1
    return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), options))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
