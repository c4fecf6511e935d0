"""Options that several commands share, and what `--debug` switches off: the silence of the libraries."""

import logging
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
    """Hide warnings, and log lines below an error, for the rest of the process."""
    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "transformers", "datasets", "accelerate", "peft", "trl", "torch"):
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
