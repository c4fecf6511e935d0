"""Options that several commands share."""

from collections.abc import Callable
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
