"""Options that several commands share, and what `--debug` switches off: the silence of the libraries."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click

#: `--debug`: show the traceback of a user error, and the libraries' warnings. Stored as `ctx.meta["debug"]`.
debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, _, value: ctx.meta.update(debug=value),
    help="Show tracebacks and library warnings.",
)
#: `--set table.key=value`, any number of times; the command's argument is `overrides`, a tuple of strings.
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Change a key of the recipe: --set lora.r=32"
)


def silence_libraries() -> None:
    """Hide warnings, and log lines below an error, for the rest of the process; called before torch is imported."""
    # torch's C++ code writes two or three lines for each out-of-memory error that a run recovers from; both read this at import.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    # torch resets the level of its own logger when it is imported; without Triton (Windows) its flop_counter logs a warning.
    for name in ("bitsandbytes", "transformers", "datasets", "accelerate", "peft", "trl", "torch", "torch.utils.flop_counter"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def libraries_silenced() -> Iterator[None]:
    """Hide warnings, and log lines below an error, inside the block. Some libraries reset their loggers when imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
