"""Run torch's CUDA code on an emulated GPU: `python3 scripts/test_cuda.py`, on Linux, without a GPU.

Makes the virtual environment .venv-cuda (a CUDA build of torch without NVIDIA's libraries, and Triton, 2.2 GB; all else in the
tested versions), builds the stand-ins of tests/emulated_cuda with the system's C and C++ compilers, and runs tests/emulated_cuda
and tests/gpu there, in about six minutes of one core. They hand out addresses, count bytes and compute nothing: that proves
allocations, no value, no time; tests/gpu leaves out what it asserts of values. More arguments are passed to pytest, or with
--bench to `scripts/bench_memory.py emulated`. Exit code 3: this machine cannot run an emulated GPU, and one line says why.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import NoReturn

from environment import REPOSITORY, print_step

#: The newest CUDA build of torch that was tried; its libraries are of CUDA 13, as the stand-ins are.
TORCH = "torch==2.14.1"
#: The version that it requires.
TRITON = "triton==3.8.0"
#: The headers of the runtime, and those that they include.
HEADERS = ("nvidia-cuda-runtime==13.*", "nvidia-cuda-crt==13.*")
FOLDER = REPOSITORY / ".venv-cuda"
STAND_INS = FOLDER / "stand-ins"
STAMP = FOLDER / "installed.txt"
#: Has the version of this project, which is not installed in the environment: the program writes it into reports.
METADATA = FOLDER / "metadata"
NO_EMULATED_GPU = 3
#: Each in a process of its own: tests/emulated_cuda forks, and a process that has computed gradients must not.
TESTS = ("tests/emulated_cuda", "tests/gpu")


def main() -> None:
    """Make the environment and the stand-ins, and run the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bench", action="store_true", help="compare predictions with emulated GPUs instead of running the tests"
    )
    options, arguments = parser.parse_known_args()
    check_machine()
    python = make_environment()
    with tempfile.TemporaryDirectory() as scratch:
        print_step("Building the stand-ins for CUDA's libraries")
        include = fetch_headers(python, Path(scratch))
        run([python, "tests/emulated_cuda/build.py", STAND_INS, include])
    write_metadata()
    places = [REPOSITORY, METADATA, *(REPOSITORY / name for name in ("tests", "scripts", "tests/emulated_cuda"))]
    preloaded = ("fork.so", "libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13")
    environment = {
        **os.environ,
        "EMULATED_CUDA": "1",
        "LD_LIBRARY_PATH": str(STAND_INS),
        "LD_PRELOAD": " ".join(str(STAND_INS / name) for name in preloaded),
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # else no process forked from one that counted the GPUs could use one
        "OMP_NUM_THREADS": "1",
    }
    paths = [word for word in arguments if word.startswith("tests/")]
    arguments = [word for word in arguments if word not in paths]
    programs = [["-m", "pytest", "-p", "no:xdist", "--timeout=1800", tests] for tests in paths or TESTS]
    if options.bench:
        programs = [["scripts/bench_memory.py", "emulated"]]
    codes = []
    for program in programs:
        command = [python, *program, *arguments]
        print_step(f"Running {program[-1]} on the emulated GPU")
        codes.append(subprocess.run(list(map(str, command)), cwd=REPOSITORY, env=environment, check=False).returncode)
    raise SystemExit(max(codes))


def check_machine() -> None:
    """End with one line where the stand-ins cannot run."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        leave_out(f"The emulated GPU runs on Linux on x86-64, and this is {sys.platform} on {platform.machine()}.")
    missing = [name for name in ("g++", "gcc", "nm", "readelf", "c++filt") if shutil.which(name) is None]
    if missing:
        leave_out(f"{', '.join(missing)}: not found. Install a C and C++ compiler with binutils.")


def make_environment() -> Path:
    """The Python of .venv-cuda, which is made unless it is there for these constraints."""
    python = FOLDER / "bin" / "python"
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == TORCH + TRITON + constraints:
        print_step("The environment .venv-cuda is up to date.")
        return python
    print_step(f"Making the virtual environment .venv-cuda with {TORCH}; the first time takes minutes")
    run([sys.executable, "-m", "venv", FOLDER])
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    run([*pip, "--no-deps", TORCH, TRITON])
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        others = [line for line in constraints.splitlines() if not line.startswith(("torch==", "triton=="))]
        file.write("\n".join(others))
        file.flush()
        # With --no-deps, since torch's own dependencies are NVIDIA's libraries; the constraints hold every other one.
        run([*pip, "--no-deps", "-r", file.name, "setuptools<81"])
    STAMP.write_text(TORCH + TRITON + constraints, encoding="utf-8")
    return python


def write_metadata() -> None:
    """Write what importlib.metadata reads of an installed project."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shutil.rmtree(METADATA, ignore_errors=True)
    folder = METADATA / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")


def fetch_headers(python: Path, scratch: Path) -> Path:
    """cuda.h and what it includes, from NVIDIA's wheels."""
    run([python, "-m", "pip", "download", "--disable-pip-version-check", "-q", "--no-deps", "-d", scratch, *HEADERS])
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(scratch)
    return next(scratch.rglob("cuda.h")).parent


def run(command: list[object]) -> None:
    """Run a program of the preparation in the repository; end where it fails."""
    words = list(map(str, command))
    if subprocess.run(words, cwd=REPOSITORY, check=False).returncode:
        leave_out(f"This failed: {' '.join(words)}. {TORCH} for Linux, its headers and a C++ compiler are needed.")


def leave_out(reason: str) -> NoReturn:
    """End with one line where there is no emulated GPU."""
    print(f"No emulated GPU: {reason} All other tests run without it: scripts/test.py", file=sys.stderr)
    raise SystemExit(NO_EMULATED_GPU)


if __name__ == "__main__":
    main()
