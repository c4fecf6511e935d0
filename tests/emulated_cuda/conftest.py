"""A base of true width and a folder to work in; without the emulated GPU nothing here is collected (scripts/test_cuda.py)."""

import os

import pytest

IS_EMULATED = "EMULATED_CUDA" in os.environ
if not IS_EMULATED:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def make_base(tmp_path_factory, base):
    """A function: the folder of a sparse base by its name and layers, made once."""
    from memory_bench.base import write_base

    made = {}

    def make(layers=0, name="microsoft/Phi-3-mini-128k-instruct"):
        if (name, layers) not in made:
            folder = tmp_path_factory.mktemp("sparse") / "base"
            made[name, layers] = write_base(folder, name, base, layers, is_sparse=True)
        return made[name, layers]

    return make


@pytest.fixture
def workplace(tmp_path, make_base, monkeypatch):
    """A function: a current directory with rows of given tokens, for a sparse base of so many layers."""
    from program import CardWorkshop

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return lambda layers, lengths: CardWorkshop(tmp_path, make_base(layers), lengths)
