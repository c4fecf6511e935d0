"""Make a virtual environment with this project installed; used by `demo.py` and `test.py`. Standard library only.

This file must parse on Pythons older than the project needs, so that it can print an error there.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List  # noqa: UP035

REPOSITORY = Path(__file__).resolve().parent.parent
MINIMUM_PYTHON = (3, 11)
STAMP = "installed.txt"

TORCH_NOTE = (
    "Without an NVIDIA GPU, PyTorch's CPU build saves gigabytes: set PIP_EXTRA_INDEX_URL to the address on PyTorch's page "
    "`Get started`, then start again."
)


def make_environment(name: str, extra: str) -> Path:
    """Make the virtual environment `name` in the repository and install the project with one of its extras.

    Does nothing if the last installation was for the same pyproject.toml, constraints.txt and Python.

    Returns:
        The directory of the environment's programs, `bin` or `Scripts`.
    """
    if sys.version_info < MINIMUM_PYTHON:
        raise SystemExit("qlora-phi3 needs Python 3.11 or newer; this is %s, %s." % (_version(), sys.executable))  # noqa: UP031
    folder = REPOSITORY / name
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    stamp = folder / STAMP
    expected = _describe_installation(extra)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == expected:
        print_step(f"The environment {name} is up to date.")
        return programs
    print_step(f"Making the virtual environment {name} with Python {_version()}")
    hint = "On Debian and Ubuntu install it with: sudo apt install python3-venv"
    run([sys.executable, "-m", "venv", str(folder)], hint=hint)
    print_step(f"Installing qlora-phi3[{extra}] with the tested versions of its dependencies; the first time takes minutes")
    if sys.platform == "linux" and shutil.which("nvidia-smi") is None:
        print_step(f"No NVIDIA GPU found. {TORCH_NOTE}")
    pip = [str(programs / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    hint = "Fix what pip reports above and start again."
    run([*pip, "-c", "constraints.txt", "-e", f".[{extra}]"], hint=hint)
    stamp.write_text(expected, encoding="utf-8")
    return programs


def run(command: List[str], *, hint: str = "") -> None:  # noqa: UP006
    """Run a command in the repository; if it fails, print the hint and exit with its exit code.

    Ctrl-C reaches the command as well. We wait until it has saved and ended: `subprocess.run` would kill it after a
    quarter of a second.
    """
    process, interrupted = subprocess.Popen(command, cwd=REPOSITORY), False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        raise SystemExit(130)
    if code and hint:
        print(f"{' '.join(command)} failed with exit code {code}. {hint}", file=sys.stderr)
    if code:
        raise SystemExit(code)


def print_step(text: str) -> None:
    """Print the next step, before the output of its program."""
    print(f"==> {text}", flush=True)


def _version() -> str:
    return ".".join(str(part) for part in sys.version_info[:3])


def _describe_installation(extra: str) -> str:
    """Everything an installation depends on; also the repository's path, as an editable installation points to it."""
    files = [REPOSITORY / "pyproject.toml", REPOSITORY / "constraints.txt"]
    hashes = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    return "\n".join([str(REPOSITORY), f"extra {extra}", f"python {_version()}", *hashes]) + "\n"
