"""These tests run on a GPU that computes, and on the emulated one of scripts/test_cuda.py, which only counts bytes."""

import os

import pytest

IS_EMULATED = "EMULATED_CUDA" in os.environ


@pytest.fixture(scope="session", autouse=True)
def numbers_read_from_an_emulated_gpu():
    """On the emulated GPU, the numbers that would end a run (a loss, a norm) are finite."""
    if IS_EMULATED:
        import card

        card.stand_in_for_values()


@pytest.fixture
def values():
    """Whether the GPU computes values. A test leaves out what it asserts of them where it does not, and nothing else."""
    return not IS_EMULATED
