"""The command line. Nothing heavy is imported outside a command's body."""

import errno
from typing import Any

import click

from qlora_phi3.cli.adapter import adapter
from qlora_phi3.cli.export import export
from qlora_phi3.cli.recipe import recipe
from qlora_phi3.cli.run import run
from qlora_phi3.cli.vram_check import vram_check
from qlora_phi3.errors import Interrupted, UserError, disk_error_hint

FULL_OR_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class Commands(click.Group):
    """A group that turns what a person caused into one line and its exit code; `--debug` shows the traceback instead."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (UserError, KeyboardInterrupt, OSError) as error:
            told = _as_user_error(error)
            if told is None or ctx.meta.get("debug"):
                raise
            click.echo(told if isinstance(told, Interrupted) else f"Error: {told}", err=True)
            ctx.exit(told.exit_code)


def _as_user_error(error: BaseException) -> UserError | None:
    """What to tell of an error; None where it is a fault of the program."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("Stopped.")
    if isinstance(error, OSError) and error.errno in FULL_OR_REFUSED:
        where = f" ({error.filename})" if error.filename else ""
        return UserError(f"{error.strerror}{where}.", f"{disk_error_hint(error)}, or choose another folder.")
    return None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qlora-phi3")
def main() -> None:
    """Fine-tune Microsoft's Phi-3 family with QLoRA on one consumer GPU.

    \b
    Start with:
      qlora-phi3 vram-check recipes/chat.toml
      qlora-phi3 run recipes/chat.toml
    """


main.add_command(run)
main.add_command(export)
main.add_command(recipe)
main.add_command(vram_check)
main.add_command(adapter)
