"""Make a virtual environment with this project in it; shared by `demo.py` and `test.py`. Standard library only.

This file must still parse on Pythons older than the project asks for, so that it can say so.
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
    "Without an NVIDIA GPU, PyTorch's CPU build spares gigabytes: set PIP_EXTRA_INDEX_URL to the address that PyTorch's "
    "page `Get started` shows for it, then start again."
)


def make_environment(name: str, extra: str) -> Path:
    """Make the virtual environment `name` in the repository, with the project and one of its extras installed.

    Where the last installation was for the same pyproject.toml, constraints.txt and Python, nothing is done.

    Returns:
        The folder with the environment's programs, `bin` or `Scripts`.
    """
    if sys.version_info < MINIMUM_PYTHON:
        raise SystemExit("qlora-phi3 needs Python 3.11 or newer; this is %s, %s." % (_version(), sys.executable))  # noqa: UP031
    folder = REPOSITORY / name
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    stamp = folder / STAMP
    wanted = _describe_installation(extra)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        say(f"The environment {name} is up to date.")
        return programs
    say(f"Making the virtual environment {name} with Python {_version()}")
    hint = "On Debian and Ubuntu its parts come with: sudo apt install python3-venv"
    run([sys.executable, "-m", "venv", str(folder)], hint=hint)
    say(f"Installing qlora-phi3[{extra}] and the tested versions of what it needs; the first time takes minutes")
    if sys.platform == "linux" and shutil.which("nvidia-smi") is None:
        say(f"No NVIDIA GPU found. {TORCH_NOTE}")
    pip = [str(programs / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    hint = "pip's message is above; mend that and start again."
    run([*pip, "-c", "constraints.txt", "-e", f".[{extra}]"], hint=hint)
    stamp.write_text(wanted, encoding="utf-8")
    return programs


def run(command: List[str], *, hint: str = "") -> None:  # noqa: UP006
    """Run a command in the repository; when it fails, stop with its exit code and, where there is a cure, that line.

    Ctrl-C reaches the command as well, and it is waited for until it has saved and told what there is to tell:
    `subprocess.run` would kill it after a quarter of a second.
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


def say(text: str) -> None:
    """Tell what happens now, before what the next program prints."""
    print(f"==> {text}", flush=True)


def _version() -> str:
    return ".".join(str(part) for part in sys.version_info[:3])


def _describe_installation(extra: str) -> str:
    """What an installation depends on; the folder's own place, too, since an editable one points at it."""
    files = [REPOSITORY / "pyproject.toml", REPOSITORY / "constraints.txt"]
    hashes = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    return "\n".join([str(REPOSITORY), f"extra {extra}", f"python {_version()}", *hashes]) + "\n"
