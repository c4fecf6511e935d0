"""`qlora-phi3 doctor`: whether this computer can train, and what to type where it cannot."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING

import click

from qlora_phi3.cli.options import debug_option, silence_libraries
from qlora_phi3.cli.output import echo, echo_json
from qlora_phi3.errors import UserError, printable
from qlora_phi3.units import format_count

if TYPE_CHECKING:
    from qlora_phi3.hardware.doctor import Check

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@click.command()
@click.option("--no-step", is_flag=True, help="Leave out the training of a tiny model.")
@click.option("--json", "wants_json", is_flag=True, help="Print JSON, for programs.")
@debug_option
@click.pass_context
def doctor(ctx: click.Context, no_step: bool, wants_json: bool) -> None:
    """Check Python, packages, GPU, disk and hub, and train a tiny model; say what to type for each problem.

    \b
    Examples:
      qlora-phi3 doctor
      qlora-phi3 doctor --no-step --json

    Nothing is downloaded; the hub is asked for one answer. Exit codes: 0 a run can work, also with warnings, 1 it cannot.
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.text import Text

    from qlora_phi3.hardware.doctor import run_checks

    silence_libraries()
    checks, console = [], Console(quiet=wants_json)
    for check in chain(run_checks(), () if no_step else _train(wants_json)):
        checks.append(check)
        line = Text.assemble((f"{check.status:<8}", COLOURS[check.status]), f" {check.name}: ", printable(check.text))
        console.print(line, soft_wrap=not console.is_terminal, highlight=False)
        if check.fix and not wants_json:
            echo(f"         -> {printable(check.fix)}")
    passed = all(check.status != "failed" for check in checks)
    if wants_json:
        echo_json({"passed": passed, "checks": list(map(asdict, checks))})
    else:
        warned = sum(check.status == "warning" for check in checks)
        notes = f", with {format_count(warned, 'warning')}: see above" if warned else ""
        echo(f"A run can work{notes}." if passed else "A run cannot work: see what failed above.", bold=True)
    ctx.exit(0 if passed else 1)


def _train(is_silent: bool) -> "Iterator[Check]":
    """The training of a tiny model as a check. What a broken installation raises is shown in one line."""
    from qlora_phi3.files import foreign_errors
    from qlora_phi3.hardware.doctor import Check
    from qlora_phi3.hardware.gpu import choose_gpu, hide_other_gpus

    if not is_silent:
        click.echo("Training a tiny model ...")
    hide_other_gpus(choose_gpu("auto"))
    try:
        debug = click.get_current_context().meta.get("debug")
        with nullcontext() if debug else foreign_errors(UserError, "{reason}", ""):
            from qlora_phi3.training.self_test import train_tiny_model

            result = train_tiny_model()
    except (UserError, MemoryError) as error:
        yield Check("training", "failed", f"a tiny model cannot be trained: {error}", "qlora-phi3 doctor --debug")
        return
    losses = f"loss {result.losses[0]:.2f} to {result.losses[-1]:.2f} in {len(result.losses)} steps"
    text = f"{result.device}, {result.compute_dtype}, 4-bit base, {result.optim}: {losses}, {result.seconds:.0f} s"
    if result.passed:
        yield Check("training", "ok", text)
    else:
        yield Check(
            "training", "failed", f"the loss did not fall, or a gradient was not finite. {text}", "qlora-phi3 doctor --debug"
        )
