"""Fixtures of all tests: one torch thread, no hub, and user directories of their own for each test process."""

import os
import shutil
import signal
import tempfile

import pytest

# Set before any library reads them. Each worker of pytest-xdist imports this file and gets its own directories.
os.environ["HF_HUB_OFFLINE"] = "1"
OWN_DIRECTORIES = {
    name: tempfile.mkdtemp(prefix="qlora-phi3-tests-") for name in ("HF_DATASETS_CACHE", "XDG_CACHE_HOME", "XDG_STATE_HOME")
}
os.environ.update(OWN_DIRECTORIES)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_unconfigure():
    """Delete this process's directories. `atexit` does not run in the workers of pytest-xdist."""
    for directory in OWN_DIRECTORIES.values():
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def same_environment():
    """One torch thread, as other cores belong to other workers and sums then have one order; no width of pytest-xdist's.

    Signals act as in a terminal: a shell ignores SIGINT for what it starts in the background, and nohup ignores SIGHUP.
    """
    import torch

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)
    os.environ.pop("COLUMNS", None)


@pytest.fixture(autouse=True)
def environment_restored():
    """What a test sets in `os.environ`, as a run does with CUDA_VISIBLE_DEVICES, is gone after it."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def every_prepared_row_is_checked():
    """Check the ids and the labels of every row that a test prepares in this process."""
    from row_checks import check_rows

    from qlora_phi3.data import prepare

    tokenize_source = prepare.tokenize_source

    def tokenize_and_check(*arguments):
        rows, report = tokenize_source(*arguments)
        check_rows(rows)
        return rows, report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "tokenize_source", tokenize_and_check)
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The directory of a tiny Phi-3 with its tokenizer; read only."""
    from workshop import build_base

    return build_base(tmp_path_factory.mktemp("models") / "tiny-phi3")


@pytest.fixture
def shop(tmp_path, base, monkeypatch):
    """An empty current directory with a recipe `mine.toml` on the tiny base, and its data."""
    from workshop import Workshop

    monkeypatch.chdir(tmp_path)
    return Workshop(tmp_path, base)


@pytest.fixture(scope="session", autouse=True)
def pages_have_no_charts():
    """The pages that runs write at their end have tables for charts, which take 0.3 s each; the tests of the page draw them."""
    from qlora_phi3.ui import page

    draw_charts = page.draw_charts
    page.draw_charts = lambda run: []
    yield draw_charts
    page.draw_charts = draw_charts
