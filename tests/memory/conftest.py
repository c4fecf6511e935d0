"""A checker and its report for all tests here, state and cache of each test alone, and the way to what measures real steps."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))


@pytest.fixture(autouse=True)
def own_dirs(tmp_path, monkeypatch):
    """State and cache of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))


@pytest.fixture(scope="session")
def checker():
    """Of the plain tiny recipe; remembers what it simulated."""
    from tiny_check import build_checker

    return build_checker()


@pytest.fixture(scope="session")
def report(checker):
    """The checker's, on a GPU with more than enough memory."""
    from tiny_check import GPU

    return checker.report(GPU, GPU.free_bytes)
