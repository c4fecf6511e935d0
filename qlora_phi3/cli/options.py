"""Options that several commands share.

The libraries' hints are for developers; `--debug` shows them.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click


def _remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta["debug"] = value


def debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--debug`: show the traceback of an error, and what the libraries warn of."""
    return click.option(
        "--debug", is_flag=True, expose_value=False, callback=_remember, help="Show tracebacks and library warnings."
    )(command)


def set_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--set table.key=value`, as often as wanted."""
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="TABLE.KEY=VALUE",
        help="Change a key of the recipe: --set lora.r=32",
    )(command)


def silence_libraries() -> None:
    """Leave the terminal to us: no warnings, and no log line below an error."""
    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "transformers", "datasets", "accelerate", "peft", "trl", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def libraries_silenced() -> Iterator[None]:
    """No warnings and no log line below an error inside; some libraries set their loggers back while they are imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
