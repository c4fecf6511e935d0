"""`qlora-phi3 inspect`: what a recipe's data become, before anything is trained."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from qlora_phi3.cli.options import debug_option, find_recipe, set_option, watching
from qlora_phi3.cli.output import echo, echo_json
from qlora_phi3.errors import UserError, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from qlora_phi3.data.inspect import RowView
    from qlora_phi3.data.prepare import PreparedData
    from qlora_phi3.ui.console import Watcher

FIRST_ROWS = 3


@click.command()
@click.argument("recipe", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("--row", "rows", multiple=True, metavar="N", help="Show this row, complete: the line it starts on, or file:line.")
@click.option("--random", "count", type=click.IntRange(1), metavar="N", help="Show N rows drawn at random.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of --random.")
@click.option("--problems", is_flag=True, help="Show the rows that are left out (1,000 of a reason) or cut, and why.")
@click.option("--ids", is_flag=True, help="Show each token on a line of its own, with its id.")
@click.option("--html", "page", type=click.Path(path_type=Path), help="Write figures, rows and problems as a page.")
@click.option("--json", "wants_json", is_flag=True, help="Print JSON, for programs.")
@set_option
@debug_option
def inspect(recipe: Path, overrides: tuple[str, ...], **options: Any) -> None:
    """Show the rows of RECIPE as they are trained on: which text is learned, what is cut, what is left out.

    \b
    Examples:
      qlora-phi3 inspect my.toml
      qlora-phi3 inspect my.toml --row 17 --ids
      qlora-phi3 inspect my.toml --problems
      qlora-phi3 inspect my.toml --random 5 --html rows.html

    Needs the tokenizer of the model, and neither its weights nor a GPU. The tokenized rows are kept for the run.
    """
    from qlora_phi3.files import check_directory

    if (page := options["page"]) is not None:
        if page.exists():
            raise UserError(f"--html {page}: it exists already.", "Name another file, or delete it first.")
        check_directory(page, "--html")
    with watching() as watcher:
        _Inspection(find_recipe(recipe), overrides, watcher).show(SimpleNamespace(**options))


def _import_without_torch() -> None:
    """Import transformers and datasets as if torch was missing: they import it where they find it, 2 of the 4 s of processor time
    until the first row (transformers 5.23 and torch 2.13), and tokenizers work without it.
    """
    hides = "torch" not in sys.modules
    if hides:
        sys.modules["torch"] = None  # type: ignore[assignment]
    import datasets  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    if hides:
        del sys.modules["torch"]


class _Inspection:
    """A recipe's data, read when they are needed: the first rows alone, all, and all without cuts."""

    def __init__(self, path: Path, overrides: tuple[str, ...], watcher: "Watcher") -> None:
        from qlora_phi3.family import read_architecture
        from qlora_phi3.recipe.load import check_model_limits, load_recipe, resolve_paths

        watcher.info("Starting transformers and datasets")
        _import_without_torch()
        recipe = load_recipe(path, overrides, check_files=True)
        self.path, self.overrides, self.watcher, self.recipe = path, overrides, watcher, resolve_paths(recipe, path.parent)
        self.architecture = read_architecture(self.recipe.model.name, self.recipe.model.revision)
        check_model_limits(self.recipe, self.architecture)

        from qlora_phi3.data.template import choose_template
        from qlora_phi3.data.tokenizer import load_tokenizer

        self.tokenizer = load_tokenizer(self.recipe.model)
        self.template = choose_template(self.tokenizer, self.recipe.data.chat_template)

    def read(self, *, max_rows: int | None = None, is_cut: bool = True, evaluate: bool = False) -> "PreparedData":
        """The rows as a run reads them, nothing held out unless `evaluate`; or the first `max_rows` alone, or rows not cut."""
        from qlora_phi3.data.prepare import prepare_datasets
        from qlora_phi3.data.tokenize import UNCUT
        from qlora_phi3.data.tokenizer import check_token_ids

        data = self.recipe.data
        if max_rows is not None:
            data = data.model_copy(update={"max_rows": min(max_rows, data.max_rows or max_rows)})
        max_length, progress = self.recipe.training.max_length if is_cut else UNCUT, self.watcher.progress
        prepared = prepare_datasets(data, max_length, evaluate, self.tokenizer, self.template, self.path.parent, progress)
        check_token_ids([prepared.train], self.tokenizer, self.architecture, self.recipe.model.name)
        return prepared

    def show(self, options: SimpleNamespace) -> None:
        """Print what the options of the command ask for; the first rows before the rest is read."""
        from dataclasses import asdict

        import numpy as np
        from rich.console import Console

        from qlora_phi3.data import inspect as inspection
        from qlora_phi3.files import atomic_write
        from qlora_phi3.ui import inspect as ui

        console = Console(highlight=False, markup=False, emoji=False)
        views: list[RowView] = []
        if not (options.rows or options.count or options.problems or options.wants_json):
            head = self.read(max_rows=FIRST_ROWS)
            views = inspection.view_rows(head.train, range(len(head.train)), head, self.tokenizer)
            self._print_rows(console, views, ids=options.ids, is_complete=False)
        evaluate = self.recipe.training.do_eval
        uncut = self.read(is_cut=False, evaluate=evaluate and self.recipe.data.eval is not None)
        data = self.read(evaluate=evaluate)  # made of the uncut rows
        if options.count:
            count = min(options.count, len(data.train))
            drawn = np.random.default_rng(options.seed).choice(len(data.train), count, replace=False)
            views = inspection.view_rows(data.train, sorted(drawn.tolist()), data, self.tokenizer)
        views += [inspection.find_row(data, row, self.tokenizer) for row in options.rows]
        found = []
        if options.problems or options.page is not None or options.wants_json:
            found = list(inspection.find_problems(data, self.recipe.data, self.path.parent))
        figures = inspection.measure(data, uncut, self.recipe, self.architecture.max_position_embeddings)
        self.watcher.close()
        if options.wants_json:
            echo_json({"statistics": asdict(figures), "rows": list(map(asdict, views)), "problems": list(map(asdict, found))})
        elif options.problems:
            ui.show_problems(console, found)
        elif options.rows or options.count:
            self._print_rows(console, views, ids=options.ids, is_complete=True)
        else:
            for line in ui.statistics_lines(figures):
                echo(line)
            words = [quoted(self.path), *(f"--set {quoted(override)}" for override in self.overrides)]
            echo(f"Then train: qlora-phi3 run {' '.join(words)}", err=True)
        if options.page is not None:
            text = ui.render_page(figures, views, found, recipe=self.path.name)
            atomic_write(options.page, text, hint="{cause}, or name another file.")
            click.echo(f"Written: {options.page}", err=True)

    def _print_rows(self, console: "Console", views: "Sequence[RowView]", *, ids: bool, is_complete: bool) -> None:
        from qlora_phi3.ui import inspect as ui

        self.watcher.close()
        echo(ui.legend(console))
        for view in views:
            ui.show_row(console, view, ids=ids, is_complete=is_complete)
