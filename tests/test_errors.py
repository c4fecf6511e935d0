"""What is said of a place that cannot be written."""

import errno

import pytest

from qlora_phi3.errors import RunError, disk_error_hint


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "Free the disk"),
        (errno.EFBIG, "Raise the limit on a file's size (ulimit -f)"),
        (errno.ENOENT, "See that it is there and may be written"),
        (errno.EACCES, "See that it is there and may be written"),
    ],
)
def test_the_cure_is_of_the_cause_also_where_another_error_passes_it_on(number, told):
    error = OSError(number, "no")
    assert disk_error_hint(error) == told
    outer = RunError("x cannot be written.")
    outer.__cause__ = error
    assert disk_error_hint(outer) == told
