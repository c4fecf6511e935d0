"""Options that several commands share, and what `--debug` switches off: the silence of the libraries."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeVar

import click

from qlora_phi3.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])

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


def sampling_options(max_new_tokens: int) -> Callable[[F], F]:
    """`--temperature`, `--top-p`, `--top-k`, and `--max-new-tokens` with its default; `check_sampling` reads the first three."""
    limit = click.IntRange(1)
    shared = (
        click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0, the default: always the likeliest token."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw from this share of the probability."),
        click.option("--top-k", type=limit, help="Draw from this many of the likeliest tokens."),
        click.option("--max-new-tokens", type=limit, default=max_new_tokens, show_default=True, help="Of an answer, at most."),
    )
    return lambda command: reduce(lambda made, option: option(made), reversed(shared), command)


def check_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `inference.Sampling`; UserError for an option that has no effect at temperature 0."""
    for name in ("top_p", "top_k"):
        if options[name] is not None and not options["temperature"]:
            option = f"--{name.replace('_', '-')} {options[name]}"
            raise UserError(f"{option} has no effect: at temperature 0 nothing is drawn.", "Add --temperature 0.7.")
    return {"temperature": options["temperature"], "top_p": options["top_p"] or 1.0, "top_k": options["top_k"] or 0}


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
