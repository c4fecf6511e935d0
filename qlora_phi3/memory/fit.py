"""The plan as a recipe: what it chose written into the user's own text, so that the same plan is made again."""

import os
from collections.abc import Iterator, Sequence
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
    choices = [
        *_given(recipe, overrides),
        *_moved(recipe, source.absolute().parent, target.absolute().parent),
        *_planned(recipe, report),
    ]
    fitted, written = fit_recipe(recipe, text, choices, _heading(report))
    with target.open("x", encoding="utf-8", newline="\n") as file:
        file.write(written)
    return fitted


def _heading(report: VramReport) -> str:
    needs, budget = format_gib(report.peak_on_card_bytes), format_gib(report.budget_bytes)
    return (
        f"Set up for {report.device.name} by qlora-phi3 {report.versions['qlora-phi3']} on {report.created[:10]}: predicted "
        f"{needs}, and {format_gib(report.margin_bytes)} of margin, of {budget} on the card. What is learned is the same "
        "on every card; the keys with a reason beside them decide memory and speed."
    )


def _given(recipe: Recipe, overrides: Sequence[str]) -> Iterator[Choice]:
    """What --set changed."""
    for override in overrides:
        table, key = override.partition("=")[0].strip().split(".")[:2]
        value = getattr(recipe, table).model_dump(exclude_none=True).get(key)
        if value is not None:
            yield Choice(table, key, value, "from --set")


def _moved(recipe: Recipe, old: Path, new: Path) -> Iterator[Choice]:
    """Local paths as they are written from another folder."""
    if old == new:
        return

    def move(place: str) -> str:
        beside = candidate_paths(place, old)[0]
        if Path(place).is_absolute() or not beside.exists():
            return place
        try:
            return Path(os.path.relpath(beside, new)).as_posix()
        except ValueError:  # another drive, on Windows
            return beside.as_posix()

    data = recipe.data
    for table, key, value in (
        ("model", "name", recipe.model.name),
        ("model", "adapter", recipe.model.adapter),
        ("data", "train", data.train),
        ("data", "eval", data.eval),
    ):
        moved = [move(place) for place in as_list(value)]
        if moved != list(as_list(value)):
            yield Choice(table, key, moved[0] if isinstance(value, str) else moved, "")


def _planned(recipe: Recipe, report: VramReport) -> Iterator[Choice]:
    """The keys that the recipe leaves to the plan."""
    for planned in planned_keys(report):
        fixed = planned.key == "micro_batch_tokens" and recipe.training.micro_batch_size is not None
        if getattr(getattr(recipe, planned.table), planned.key) == "auto" and not fixed:
            yield Choice(planned.table, planned.key, planned.value, planned.reason)
