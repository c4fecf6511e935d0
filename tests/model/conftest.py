"""A tiny model on disk, shared by the tests of this package; read only."""

import pytest
from tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))
