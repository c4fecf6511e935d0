"""`qlora-phi3 docs`: the documentation that ships, in the terminal."""

import difflib
import re
import sys

import click

from qlora_phi3.cli.options import shipped_files
from qlora_phi3.errors import UserError


@click.command()
@click.argument("page", metavar="[PAGE]", required=False)
def docs(page: str | None) -> None:
    """Print PAGE of the documentation, such as data; without PAGE list the pages."""
    pages = {name: path.read_text(encoding="utf-8").rstrip() for name, path in shipped_files("docs", "md").items()}
    if page not in pages and page is not None:
        near = difflib.get_close_matches(page, pages, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError(f"There is no page {page!r}.", f"{hint}The pages are {', '.join(pages)}.")
    text = "\n".join(f"{name:18}{text.splitlines()[0].lstrip('# ')}" for name, text in pages.items())
    text = f"{text}\n\nRead one: qlora-phi3 docs data" if page is None else pages[page]
    click.echo_via_pager(text if page is None or not sys.stdout.isatty() else render(text))


def render(text: str) -> str:
    """A page for a terminal: a link to another page becomes the command that prints it."""
    from rich.console import Console
    from rich.markdown import Markdown

    text = re.sub(r"\[([\w-]+)\.md\]\(\1\.md\)", r"`qlora-phi3 docs \1`", text)
    text = re.sub(r"\[([^\]]+)\]\(([\w-]+)\.md\)", r"\1 (`qlora-phi3 docs \2`)", text)
    console = Console()
    with console.capture() as captured:
        console.print(Markdown(text, hyperlinks=False))
    return captured.get()
