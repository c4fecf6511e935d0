"""The command line: user errors, signals, and the commands, each in a file of its own.

Nothing heavy is imported outside the body of a command, so that `--help` takes 50 ms.
"""

import difflib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from qlora_phi3.cli.output import FULL_DISK, echo, safe_output
from qlora_phi3.errors import Interrupted, Terminated, UserError, disk_error_hint

#: Errors of the operating system that the user can fix: the disk is full or fails, the place may not be written, or is none.
FULL_OR_REFUSED = (
    *FULL_DISK, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip
#: The commands in the order of `--help`, each with its line there. Its click command is in a module of the same name.
COMMANDS = {
    "init": "Write a recipe for a file of chats: the model that fits.",
    "vram-check": "Check whether a recipe fits a GPU, before anything is loaded.",
    "inspect": "Show the rows as they are trained on, and what is left out.",
    "run": "Train the model that a recipe describes.",
    "runs": "List, show, compare and delete runs.",
    "chat": "Talk to the model of RUN.",
    "eval": "Measure a trained model beside its base.",
    "export": "Write a run as a model for other programs, with a proof.",
    "adapter": "Turn adapters into other forms.",
    "recipe": "Check a recipe, or import another program's config.",
    "cache": "List and delete what is kept to be faster the next time.",
    "docs": "Print a page of the documentation.",
    "doctor": "Check whether this computer can train.",
}


class Commands(click.Group):
    """A group whose output any encoding can take, and whose user errors are one line and an exit code.

    The module of a command is imported when the command is needed, so that each starts without the others.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name; None where there is none."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(import_module(f"qlora_phi3.cli.{name}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click's, without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with the nearest name for a command that does not exist."""
        if args[0] not in COMMANDS and (near := difflib.get_close_matches(args[0], COMMANDS, n=1)):
            raise click.UsageError(f"There is no command {args[0]!r}. Did you mean {near[0]!r}?", ctx)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Start the command line with stdout and stderr that print any text, and that may lose their reader."""
        with safe_output():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; turn what the user can fix into one line and its exit code. `--debug` shows the traceback instead."""
        try:
            with signals_as_ctrl_c():
                return super().invoke(ctx)
        except click.UsageError as error:
            if isinstance(error, click.exceptions.NoArgsIsHelpError):
                raise
            echo(f"Error: {describe_usage_error(error)}", err=True)
            ctx.exit(error.exit_code)
        except (UserError, KeyboardInterrupt, click.Abort, OSError) as error:
            if ctx.meta.get("debug") or (isinstance(error, OSError) and error.errno not in FULL_OR_REFUSED):
                raise
            if isinstance(error, KeyboardInterrupt | click.Abort):
                if sys.stderr.isatty():  # behind the ^C that the terminal shows
                    click.echo(err=True)
                error = Interrupted("Stopped.")
            elif isinstance(error, OSError):
                where = f" ({error.filename})" if error.filename else ""
                error = UserError(f"{error.strerror}{where}.", f"{disk_error_hint(error)}, or choose another folder.")
            if not ctx.meta.get("is_silent") or error.is_shown:
                echo(str(error) if isinstance(error, Interrupted) else f"Error: {error}", err=True)
            ctx.exit(error.exit_code)


def describe_usage_error(error: click.UsageError) -> str:
    """A mistake on the command line in one line: the option, the value, and what is allowed."""
    ctx, message = error.ctx or click.get_current_context(), error.format_message()
    if isinstance(error, click.BadParameter) and error.param is not None and error.message:
        limits, message = error.param.type, f"{error.param.opts[-1]}: {error.message}"
        if isinstance(limits, click.IntRange | click.FloatRange):
            kind = "whole number" if isinstance(limits, click.IntRange) else "number"
            least = f"above {limits.min:g}" if limits.min_open else f"of {limits.min:g} or more"
            most = "" if limits.max is None else f", at most {limits.max:g}"
            message = f"{error.param.opts[-1]}: {error.message.split()[0]} is not a {kind} {least}{most}."
    if message.startswith("Got unexpected extra argument"):
        given = [each for each in ctx.command.params if ctx.params.get(each.name or "")]
        flags = [each.opts[-1] for each in given if getattr(each, "is_flag", False)]
        message = f"{message}." + (f" No value is taken by {', '.join(flags)}." if flags else "")
    above = ctx.parent
    if isinstance(error, click.NoSuchOption) and above and any(error.option_name in each.opts for each in above.command.params):
        return f"{error.option_name} comes before {ctx.info_name}: {above.command_path} {error.option_name} ... {ctx.info_name}"
    return f"{message} `{ctx.command_path} --help` explains it."


@contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, by which systems end a program, and SIGHUP of a terminal that closes do what Ctrl-C does.

    So partial files are removed. `nohup` ignores SIGHUP, and so it stays. Windows has none of the two.
    """
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    replaced = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    for number in replaced:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qlora-phi3")
def main() -> None:
    """Fine-tune Microsoft's Phi-3 family with QLoRA on one consumer GPU.

    \b
    Start with:
      qlora-phi3 init my-chats.jsonl
      qlora-phi3 run my-chats.toml
    """
    # Read by libgomp when torch loads it: threads that wait for one another soon give their core away. Beside two busy programs
    # this trained at 108 tokens/s against 85, and generated 2 to 4 times as fast; on an idle computer it costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
