"""`qlora-phi3 recipe`: check a recipe, and print the schema of all."""

from pathlib import Path

import click

from qlora_phi3.cli.options import debug_option, find_recipe, set_option


@click.group()
def recipe() -> None:
    """Check a recipe, or print the schema that lets an editor complete it."""


@recipe.command()
@debug_option
def schema() -> None:
    """Print the JSON schema of a recipe.

    \b
    Save it in the folder of your recipe, and name it in the recipe's first line:
      qlora-phi3 recipe schema > recipe.schema.json
      #:schema ./recipe.schema.json
    """
    import json

    from qlora_phi3.recipe.load import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))


@recipe.command()
@click.argument("path", metavar="RECIPE", type=click.Path(path_type=Path))
@set_option
@debug_option
def check(path: Path, overrides: tuple[str, ...]) -> None:
    """Check RECIPE and the files it names, and print it with all default values."""
    from qlora_phi3.recipe.load import load_recipe, recipe_as_toml

    path = find_recipe(path)
    click.echo(recipe_as_toml(load_recipe(path, overrides, check_files=True)), nl=False)
    click.echo(f"{path} is fine.", err=True)
