"""What every test stands on: one thread, no hub, a cache of its own, and the command line called in this process."""

import os
import tempfile

# Before any library reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="qlora-phi3-tests-")
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="qlora-phi3-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import atexit
import shutil

import pytest

for name in ("HF_DATASETS_CACHE", "XDG_STATE_HOME"):
    atexit.register(shutil.rmtree, os.environ[name], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Leave the other cores to others, and add numbers in one order."""
    import torch

    torch.set_num_threads(1)


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
    """A directory to work in, with a recipe `mine.toml` on the tiny base and its data."""
    from workshop import Workshop

    monkeypatch.chdir(tmp_path)
    return Workshop(tmp_path, base)
