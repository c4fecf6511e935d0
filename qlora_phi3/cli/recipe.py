"""`qlora-phi3 recipe`: check a recipe, import the config of another program, and print the schema of all."""

from pathlib import Path

import click

from qlora_phi3.cli.options import check_new_file, create_file, debug_option, find_recipe, set_option, shipped_files
from qlora_phi3.cli.output import echo, echo_json


@click.group(epilog="\b\n" + "\n  ".join(["Recipes that ship:", *shipped_files("recipes", "toml")]))
def recipe() -> None:
    """Check a recipe, import another program's config, or print the schema that lets an editor complete recipes."""


@recipe.command()
@debug_option
def schema() -> None:
    """Print the JSON schema of a recipe.

    \b
    Save it in the folder of your recipe, and name it in the recipe's first line:
      qlora-phi3 recipe schema > recipe.schema.json
      #:schema ./recipe.schema.json
    """
    from qlora_phi3.recipe.load import recipe_schema

    echo_json(recipe_schema())


@recipe.command()
@click.argument("path", metavar="RECIPE", type=click.Path(path_type=Path))
@set_option
@debug_option
def check(path: Path, overrides: tuple[str, ...]) -> None:
    """Check RECIPE and the files it names, and print it with all default values."""
    from qlora_phi3.recipe.load import as_list, describe_unusual, is_local_data, load_recipe, recipe_as_toml

    path = find_recipe(path)
    loaded = load_recipe(path, overrides, check_files=True)
    hub = [name for name in (*as_list(loaded.data.train), *as_list(loaded.data.eval)) if not is_local_data(name, path.parent)]
    verdict = f"{path} is fine." if not hub else f"{path} is valid, but its data are not here: {', '.join(hub)}."
    echo(verdict, err=True)  # and again below all keys
    click.echo(recipe_as_toml(loaded), nl=False)
    if line := describe_unusual(loaded):
        echo(f"Note: {line}", err=True)
    for name in hub:
        echo(f"Note: [data] names {name}: no file here, so that the hub is asked for it, which this check does not.", err=True)
    echo(verdict, err=True)


@recipe.command("import")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="The recipe to write. [default: FILE.toml, in this directory]"
)
@debug_option
def import_config(path: Path, out: Path | None) -> None:
    """Convert FILE, a config of Axolotl, LLaMA-Factory, TRL, Unsloth or Microsoft's notebooks, into a recipe.

    \b
    Examples:
      qlora-phi3 recipe import axolotl.yml
      qlora-phi3 recipe import sample_finetune.py --out my.toml

    FILE is YAML, JSON, Python or a notebook; Python is read and never executed. stderr lists what became of every key; a refused
    key also stands at the top of the recipe. No file is overwritten.
    """
    from qlora_phi3.errors import printable, quoted
    from qlora_phi3.recipe.peers import import_recipe

    found = import_recipe(path)
    target = out or Path(f"{path.stem}.toml")
    check_new_file(target)
    create_file(target, found.as_toml())
    groups = {"Carried over": found.carried, "Not needed": found.not_needed, "REFUSED, for you to decide": found.refused}
    for title, lines in groups.items():
        echo(printable(f"{title} ({len(lines)}):" + "".join(f"\n  {line}" for line in lines)), err=True)
    echo(f"Written: {target}, from a config of {found.peer}. Next: qlora-phi3 recipe check {quoted(target)}")
