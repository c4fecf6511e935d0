"""The hint for a path that cannot be written."""

import errno

import pytest

from qlora_phi3.errors import RunError, disk_error_hint


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "Free disk space"),
        (errno.EFBIG, "Raise the limit on a file's size (ulimit -f)"),
        (errno.ENOENT, "Check that the directory exists and that you may write to it"),
        (errno.EACCES, "Check that the directory exists and that you may write to it"),
    ],
)
def test_the_hint_fits_the_cause_of_the_error(number, hint):
    error = OSError(number, "no")
    assert disk_error_hint(error) == hint
    outer = RunError("x cannot be written.")
    outer.__cause__ = error
    assert disk_error_hint(outer) == hint
