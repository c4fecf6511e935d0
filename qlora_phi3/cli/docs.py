"""`qlora-phi3 docs`: the documentation that ships, in the terminal."""

import sys

import click

from qlora_phi3.cli.options import shipped_files
from qlora_phi3.cli.output import wrapped
from qlora_phi3.errors import UserError


@click.command()
@click.argument("page", metavar="[PAGE]", required=False)
def docs(page: str | None) -> None:
    """Print PAGE of the documentation, or without PAGE the names of all.

    \b
    Examples:
      qlora-phi3 docs
      qlora-phi3 docs data
    """
    pages = shipped_files("docs", "md")
    if page is None:
        for name, path in pages.items():
            with path.open(encoding="utf-8") as file:
                click.echo(f"{name:18}{file.readline().lstrip('# ')}", nl=False)
        click.echo("\nRead one: qlora-phi3 docs data")
        return
    if page not in pages:
        raise UserError(f"There is no page {page!r}.", f"The pages are {', '.join(pages)}.")
    text = pages[page].read_text(encoding="utf-8").rstrip()
    click.echo_via_pager(wrapped(text) if sys.stdout.isatty() else text)
