"""A few damaged inputs of every surface; `scripts/fuzz.py` itself tries as many as one asks for."""

import fuzz
import pytest


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return fuzz.build_inputs(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("surface", fuzz.SURFACES)
def test_damaged_files_end_in_one_line_and_never_in_a_traceback(inputs, surface):
    count = 10 if surface == "generation-config" else 30  # nearly all of it is accepted, and the model loaded
    counts, problems = fuzz.run_surface(surface, count, 3, *inputs)
    assert problems == []
    assert counts.total() == count
    assert counts["refused"] + counts["accepted"] == count


def test_an_undamaged_base_is_accepted(inputs, tmp_path):
    base, adapter = inputs
    fuzz.Fuzz(fuzz.random.Random(0), base, base, adapter).load()
    fuzz.Fuzz(fuzz.random.Random(0), adapter, base, adapter).start()
