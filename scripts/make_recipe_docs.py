"""Write docs/recipe.md from the schema of the recipe: `python scripts/make_recipe_docs.py`."""

from pathlib import Path

from qlora_phi3.recipe.edit import format_toml
from qlora_phi3.recipe.load import recipe_schema
from qlora_phi3.recipe.schema import TABLES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipe.md"
HEAD = """# Every key of a recipe

Made from the program by `scripts/make_recipe_docs.py`; `qlora-phi3 recipe schema` prints the same for an editor. Names are those
of LoraConfig (`[lora]`), BitsAndBytesConfig (`[quantization]`), TrainingArguments and SFTConfig (`[training]`). `batch_size`, the
rows of an optimizer step, and the keys of `[data]` and `[memory]` are our own.

A relative path in `[model]` or `[data]` is looked for in the folder of the recipe, then in the working directory. `output_dir` is
relative to the working directory.
"""


def render_page() -> str:
    """The page as Markdown: a table of key, default and meaning for each table of the recipe."""
    parts = [HEAD]
    definitions = recipe_schema()["$defs"]
    for table, model in TABLES.items():
        described = definitions[model.__name__]
        parts.append(f"\n## [{table}]\n\n{described['description']}\n\n| key | default | meaning |\n|---|---|---|\n")
        for key, field in model.model_fields.items():
            if field.is_required():
                default = "must be given"
            elif field.default_factory is not None or field.default is None:
                default = ""
            else:
                default = f"`{format_toml(model.model_construct().model_dump()[key])}`"
            meaning = described["properties"][key].get("description", "").replace("|", "\\|")
            parts.append(f"| `{key}` | {default} | {meaning} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8", newline="\n")
