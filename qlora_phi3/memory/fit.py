"""Writes the plan of `vram-check --fit` into the user's own recipe text, so that a run makes the same plan again."""

import os
from collections.abc import Sequence
from pathlib import Path

from qlora_phi3.memory.report import VramReport, planned_keys
from qlora_phi3.recipe.edit import Choice, fit_recipe
from qlora_phi3.recipe.load import as_list, candidate_paths
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.units import format_gib


def write_fitted(
    recipe: Recipe, text: str, overrides: Sequence[str], report: VramReport, *, source: Path, target: Path
) -> Recipe:
    """Write the recipe with its plan to a file that does not exist yet.

    Args:
        recipe: as `text` and `overrides` (`table.key=value`) say it.
        source: where the text is from; its relative paths are looked for there.

    Returns:
        The recipe that was written.

    Raises:
        FileExistsError: there is such a file; it stays as it is.
    """
    choices = _moved_paths(recipe, source.absolute().parent, target.absolute().parent)
    for override in overrides:
        table, key = override.partition("=")[0].strip().split(".")[:2]
        value = getattr(recipe, table).model_dump(exclude_none=True).get(key)
        if value is not None:
            choices.append(Choice(table, key, value, "from --set"))
    for planned in planned_keys(report):
        fixed = planned.key == "micro_batch_tokens" and recipe.training.micro_batch_size is not None
        if getattr(getattr(recipe, planned.table), planned.key) == "auto" and not fixed:
            choices.append(Choice(planned.table, planned.key, planned.value, planned.reason))
    heading = (
        f"Fitted to {report.device.name} by qlora-phi3 {report.versions['qlora-phi3']} on {report.created[:10]}: predicted "
        f"{format_gib(report.memory.on_gpu_bytes)} and a margin of {format_gib(report.margin_bytes)}, of "
        f"{format_gib(report.budget_bytes)} on the GPU. What is learned is the same on every GPU; the keys with a reason decide "
        "memory and speed."
    )
    fitted, written = fit_recipe(recipe, text, choices, heading)
    with target.open("x", encoding="utf-8", newline="\n") as file:
        file.write(written)
    return fitted


def _moved_paths(recipe: Recipe, old: Path, new: Path) -> list[Choice]:
    """Local paths as they are written from another directory."""

    def move(name: str) -> str:
        path = candidate_paths(name, old)[0]
        if old == new or Path(name).is_absolute() or not path.exists():
            return name
        try:
            return Path(os.path.relpath(path, new)).as_posix()
        except ValueError:  # another drive, on Windows
            return path.as_posix()

    choices = []
    for table, key in (("model", "name"), ("model", "adapter"), ("data", "train"), ("data", "eval")):
        value = getattr(getattr(recipe, table), key)
        moved = [move(name) for name in as_list(value)]
        if moved != list(as_list(value)):
            choices.append(Choice(table, key, moved[0] if isinstance(value, str) else moved, ""))
    return choices
