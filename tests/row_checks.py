"""A check of every row that any test prepares; the fixture in `conftest.py` applies it."""

from typing import Any

import numpy as np
import pyarrow.compute as pc


def check_rows(rows: Any) -> None:
    """Ids and labels are equally long, a label is -100 or the id at its position, and the columns of counts are right.

    Args:
        rows: a `datasets.Dataset` of `tokenize_source`.
    """
    if not len(rows):
        return
    table = rows.with_format("arrow")[:]
    lengths, label_lengths = (pc.list_value_length(table[name]).to_numpy() for name in ("input_ids", "labels"))
    ids, labels = (pc.list_flatten(table[name]).to_numpy() for name in ("input_ids", "labels"))
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    assert (lengths > 0).all()
    assert np.array_equal(lengths, label_lengths), "ids and labels of a row differ in length"
    assert np.array_equal(lengths, table["length"].to_numpy())
    assert ((labels == -100) | (labels == ids)).all(), "a label is neither -100 nor the id at its position"
    assert (labels[first] == -100).all(), "position 0 of a row is supervised"
    assert np.array_equal(np.add.reduceat(labels != -100, first, dtype=np.int32), table["supervised"].to_numpy())
