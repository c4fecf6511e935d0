"""The command line. Nothing heavy is imported outside a command's body."""

import errno
from typing import Any

import click

from qlora_phi3.cli.recipe import recipe
from qlora_phi3.cli.run import run
from qlora_phi3.errors import Interrupted, UserError

FULL_OR_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class OneLine(click.ClickException):
    """A UserError as click shows it: its line on stderr, its exit code, no traceback."""

    def __init__(self, error: UserError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code


class Commands(click.Group):
    """A group that turns what a person caused into one line; `--debug` shows the traceback instead."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise OneLine(
                Interrupted("Stopped.", "Nothing was being trained yet, or the last checkpoint stands.")
            ) from None
        except UserError as error:
            if ctx.meta.get("debug"):
                raise
            raise OneLine(error) from error
        except OSError as error:
            if ctx.meta.get("debug") or error.errno not in FULL_OR_REFUSED:
                raise
            where = f" ({error.filename})" if error.filename else ""
            raise OneLine(UserError(f"{error.strerror}{where}.", "Free the disk or choose another folder.")) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qlora-phi3")
def main() -> None:
    """Fine-tune Microsoft's Phi-3 family with QLoRA on one consumer GPU.

    \b
    Start with:
      qlora-phi3 run recipes/chat.toml
    """


main.add_command(run)
main.add_command(recipe)
