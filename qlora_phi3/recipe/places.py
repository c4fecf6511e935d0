"""Where the files that a recipe names lie."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_phi3.recipe.load import Recipe


def with_found_paths(recipe: "Recipe", base_folder: Path) -> "Recipe":
    """The recipe with local files and folders as absolute paths, so that it means the same from anywhere.

    Args:
        base_folder: the recipe's; its relative paths are looked for there, then in the working folder.
    """

    def find(place: str) -> str:
        found = next((candidate for candidate in possible_places(place, base_folder) if candidate.exists()), None)
        return str(found.resolve()) if found else place

    def find_all(places: str | list[str] | None) -> str | list[str] | None:
        return [find(place) for place in places] if isinstance(places, list) else places and find(places)

    data = recipe.data.model_copy(update={"train": find_all(recipe.data.train), "eval": find_all(recipe.data.eval)})
    adapter = recipe.model.adapter
    model = recipe.model.model_copy(update={"name": find(recipe.model.name), "adapter": adapter and find(adapter)})
    return recipe.model_copy(update={"data": data, "model": model})


def possible_places(name: str, base_folder: Path) -> tuple[Path, Path]:
    """Where a relative path of a recipe may lie, in the order in which it is looked for."""
    return base_folder / name, Path(name).expanduser()


def listed(places: str | list[str] | None) -> Sequence[str]:
    """The value of a key that holds one name or several."""
    return [places] if isinstance(places, str) else places or []
