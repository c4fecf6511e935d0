"""How long the rows of a recipe are: read from its data where they lie on this computer, else assumed as long as they may be.

Nothing is fetched: the tokenizer and the data count as unreadable unless they are here, in a folder or in the caches of the
hub's libraries. What was looked at is named, so that an answer that is kept can be held against it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_phi3.dataset.load import is_local
from qlora_phi3.errors import DataError, UserError
from qlora_phi3.memory.rows import RowLengths, assume_lengths, read_lengths

if TYPE_CHECKING:
    from qlora_phi3.dataset.prepare import PreparedData
    from qlora_phi3.recipe.load import Recipe

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class RowsRead:
    """The lengths, one line that says where they come from, and one why a run would stop at them, if it would."""

    lengths: RowLengths
    origin: str
    problem: str = ""


@contextmanager
def without_network() -> Iterator[None]:
    """Let the hub's libraries, if they are first imported inside, use what is on this computer and wait for nothing."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def read_rows(recipe: "Recipe", base_folder: Path, progress: Progress) -> RowsRead:
    """Tokenise the data as the run does, or take every row for `max_length` tokens."""
    training, problem = recipe.training, _find_problem(recipe, base_folder)
    if problem:
        return _assume(recipe, "The data cannot be used.", problem)
    try:
        _find_tokenizer(recipe)
        data = _prepare(recipe, base_folder, progress)
    except DataError as error:
        if all(is_local(name, base_folder) for name in _sources(recipe)):
            return _assume(recipe, "The data cannot be used.", str(error))
        return _assume(recipe, error.message)  # a run may fetch what is not here
    except UserError as error:
        return _assume(recipe, error.message)
    evaluation = [] if data.evaluation is None else _lengths(data.evaluation)
    lengths = read_lengths(_lengths(data.train), evaluation, training.batch_size)
    measured = f" and {len(evaluation):,} to measure on" if evaluation else ""
    return RowsRead(lengths, f"{len(lengths.training):,} to train on{measured}, the longest {lengths.longest:,} tokens")


def _assume(recipe: "Recipe", reason: str, problem: str = "") -> RowsRead:
    training = recipe.training
    assumed = assume_lengths(training.max_length, training.batch_size)
    if not training.do_eval:
        assumed = replace(assumed, longest_evaluation=0)
    origin = f"assumed to be max_length = {training.max_length:,} tokens each. {reason.splitlines()[0]}"
    return RowsRead(assumed, origin, problem)


def _sources(recipe: "Recipe") -> list[str]:
    from qlora_phi3.recipe.places import listed

    return [*listed(recipe.data.train), *(listed(recipe.data.eval) if recipe.training.do_eval else ())]


def _find_problem(recipe: "Recipe", base_folder: Path) -> str:
    """Why no run can use the recipe's files, as far as that shows without a tokenizer; else nothing."""
    from qlora_phi3.dataset.prepare import check_files

    try:
        check_files(_sources(recipe), base_folder, format=recipe.data.format, fields=recipe.data.fields)
    except DataError as error:
        return str(error)
    return ""


def _lengths(rows: Any) -> list[int]:
    lengths: list[int] = rows.select_columns(["length"]).with_format("numpy")[:]["length"].tolist()
    return lengths


def _find_tokenizer(recipe: "Recipe") -> None:
    """Say at once that the tokenizer is not here: importing transformers to find out takes a second."""
    name = recipe.model.name
    if Path(name).is_dir():
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer.json", revision=recipe.model.revision)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise UserError("The model's tokenizer, which counts them, is not on this computer.")


def _prepare(recipe: "Recipe", base_folder: Path, progress: Progress) -> "PreparedData":
    from qlora_phi3.dataset.template import choose_template
    from qlora_phi3.model import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)
    template = choose_template(tokenizer, recipe.data.chat_template)
    return prepare_data(recipe, base_folder, tokenizer, template, progress)


def prepare_data(
    recipe: "Recipe", base_folder: Path, tokenizer: Any, template: Any, progress: Progress
) -> "PreparedData":
    """The rows of a recipe, tokenised, as a run trains on them.

    Raises:
        DataError: they cannot be read or used.
    """
    from qlora_phi3.dataset.prepare import prepare_datasets
    from qlora_phi3.recipe.places import listed

    table, measures = recipe.data, recipe.training.do_eval
    return prepare_datasets(
        train=listed(table.train),
        evaluation=listed(table.eval) if measures else (),
        eval_size=table.eval_size if measures else 0,
        split_seed=table.split_seed,
        split=table.split,
        eval_split=table.eval_split if measures else None,
        subset=table.subset,
        revision=table.revision,
        format=table.format,
        fields=table.fields,
        loss_on=table.loss_on,
        max_length=recipe.training.max_length,
        max_rows=table.max_rows,
        max_eval_rows=table.max_eval_rows,
        tokenizer=tokenizer,
        template=template,
        base_folder=base_folder,
        progress=progress,
    )


def files_of(recipe: "Recipe", base_folder: Path) -> list[Path]:
    """All that the model's shapes and the rows' lengths are read from, found or not."""
    from qlora_phi3.recipe.places import listed, possible_places

    names = [recipe.model.name, *listed(recipe.data.train), *listed(recipe.data.eval)]
    paths = [place.absolute() for name in names for place in possible_places(name, base_folder)]
    for folder in paths[:2]:
        paths += [folder / name for name in ("config.json", *TOKENIZER_FILES)]
    if recipe.model.adapter is not None:
        for folder in possible_places(recipe.model.adapter, base_folder):
            paths += [folder.absolute() / name for name in ("adapter_config.json", "adapter/adapter_config.json")]
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    for name in names:
        flat = name.replace("/", "--")
        paths += [Path(HF_HUB_CACHE, f"{kind}--{flat}", "snapshots") for kind in ("models", "datasets")]
        datasets = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets"))
        paths.append(datasets / name.replace("/", "___"))
    return paths
