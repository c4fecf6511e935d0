"""The libraries' hints are for developers; `--debug` shows them."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quieten() -> None:
    """Leave the terminal to us: no warnings, and no log line below an error."""
    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "transformers", "datasets", "accelerate", "peft", "trl", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quietly() -> Iterator[None]:
    """No warnings and no log line below an error inside; some libraries set their loggers back while they are imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
