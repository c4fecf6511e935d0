"""The checks of `doctor` on computers that this one is not: stand-ins for torch, bitsandbytes, the driver and the hub."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from workshop import call

from qlora_phi3.hardware import doctor
from qlora_phi3.hardware.doctor import (
    Check,
    check_bitsandbytes,
    check_gpu,
    check_hub,
    check_python,
    check_space,
    check_system,
    check_torch,
    check_versions,
    import_library,
)
from qlora_phi3.hardware.gpu import find_gpu


def chosen(name="RTX 3060 12GB"):
    return find_gpu(name)


def torch_of(cuda="12.8", available=True, kernels=("sm_75", "sm_80", "sm_86", "sm_90")):
    cuda_module = SimpleNamespace(is_available=lambda: available, get_arch_list=lambda: list(kernels))
    return SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=cuda), cuda=cuda_module)


@pytest.mark.parametrize(
    ("torch", "gpu", "status", "fix"),
    [
        (torch_of(), chosen(), "ok", ""),
        (torch_of(), chosen("RTX 4070"), "ok", ""),  # 8.9 runs kernels of 8.6
        (torch_of(cuda=None), None, "ok", ""),
        (torch_of(cuda=None), chosen(), "failed", "--index-url"),
        (torch_of(available=False), chosen(), "failed", "drivers"),
        (torch_of(), chosen("RTX 5070"), "failed", "--index-url"),  # 12.0 has no kernels
        (torch_of(kernels=["sm_120a"]), chosen("RTX 5070"), "ok", ""),
    ],
)
def test_torch_must_be_built_for_the_gpu_that_is_here(torch, gpu, status, fix):
    check = check_torch(torch, gpu)
    assert (check.status, fix in check.fix) == (status, True)


def test_a_gpu_names_its_data_type_and_one_that_is_too_old_fails():
    assert "bfloat16" in check_gpu(chosen(), "").text
    assert "float16" in check_gpu(chosen("RTX 2060 12GB"), "").text
    assert check_gpu(replace(chosen(), compute_capability=(6, 1)), "").status == "failed"
    missing = check_gpu(None, "no driver")
    assert (missing.status, "install its driver" in missing.fix) == ("warning", True)


@pytest.mark.parametrize(
    ("states", "code", "line"),
    [
        (["ok"], 0, "A run can work."),
        (["ok", "warning"], 0, "A run can work, with 1 warning: see above."),
        (["failed", "warning"], 1, "A run cannot work: see what failed above."),
    ],
)
def test_the_last_line_is_the_verdict(monkeypatch, states, code, line):
    monkeypatch.setattr(doctor, "run_checks", lambda: [Check("x", state, "y") for state in states])
    result = call("doctor", "--no-step")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (code, line)


def test_bitsandbytes_needs_its_library_and_with_a_gpu_that_of_cuda():
    class ErrorHandlerMockBNBNativeLibrary:
        pass

    def library(lib):
        return SimpleNamespace(__version__="0.50.2", cextension=SimpleNamespace(lib=lib))

    cpu, cuda = (SimpleNamespace(compiled_with_cuda=flag) for flag in (False, True))
    found = [(cpu, None), (cpu, chosen()), (cuda, chosen()), (ErrorHandlerMockBNBNativeLibrary(), None)]
    states = [check_bitsandbytes(library(lib), gpu).status for lib, gpu in found]
    assert states == ["ok", "failed", "ok", "failed"]


def test_versions_are_compared_with_the_ranges_of_the_distribution():
    ranges = {each.name: each for each in map(Requirement, requires("qlora-phi3")) if each.marker is None}

    def read(name):
        if name == "peft":
            raise PackageNotFoundError(name)
        return "0.0.1" if name == "torch" else next(str(each.version) for each in ranges[name].specifier if each.operator == ">=")

    checks = {check.name: check for check in check_versions(read)}
    assert checks.keys() == {"torch", "peft", "packages"}
    assert checks["peft"].text.startswith("not installed")
    assert checks["torch"].fix == f"pip install 'torch{ranges['torch'].specifier}'"


def test_windows_and_wsl_have_their_traps():
    states = [check.status for check in check_system("Linux", "5.15.0-microsoft-standard-WSL2", Path("/mnt/c/me"), chosen())]
    assert states == ["ok", "warning", "warning"]
    assert [check.status for check in check_system("Windows", "11", Path("/home"), chosen())] == ["ok", "warning"]
    assert [check.status for check in check_system("Linux", "6.1", Path("/mnt/c"), chosen())] == ["ok"]


def test_an_old_or_32_bit_python_fails():
    assert [check_python((3, 10), sys.maxsize).status, check_python((3, 12), 2**31 - 1).status] == ["failed", "failed"]


def test_a_full_disk_fails_with_the_variable_that_moves_the_models(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    assert [check.status for check in check_space()][:2] == ["failed", "failed"]


def test_a_token_is_reported_and_never_shown(tmp_path):
    (tmp_path / "token").write_text("hf_secret", encoding="utf-8")
    found = list(check_hub({"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}))
    assert [check.status for check in found] == ["warning", "ok"]
    assert found[1].text == "present"
    assert "secret" not in repr([*found, *check_hub({"HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "1"})])


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.2)
    with socket.socket() as silent:  # it takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        (check, _) = check_hub({"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"})
    assert check.status == "warning"


def test_a_library_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "brokenlib.py").write_text("raise OSError('libcudart.so.12: cannot open\\nmore')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    module, check = import_library("brokenlib")
    assert (module, check.status, "\n" in check.text) == (None, "failed", False)


def test_doctor_works_where_torch_is_broken(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch.so: undefined symbol')", encoding="utf-8")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom qlora_phi3.cli.main import main\n"
        "sys.argv = ['qlora-phi3', 'doctor']\nmain()"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert found.returncode == 1
    assert "failed   torch: it cannot be imported: libtorch.so: undefined symbol" in found.stdout
    assert "failed   training" in found.stdout
    assert found.stderr == ""
