"""The files and folders that a recipe names and that are not on this computer; told before torch is imported."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_phi3.recipe.names import find_nearest
from qlora_phi3.recipe.places import listed, possible_places
from qlora_phi3.recipe.problems import Problem

#: Whether a name of [data], looked for beside a recipe in this folder, means a file and not a data set of the hub.
IsFile = Callable[[str, Path], bool]


def find_missing(raw: Mapping[str, Any], base_folder: Path, is_file: IsFile) -> Iterator[Problem]:
    """Yield a problem for the model folder, the adapter and every data file that does not exist.

    Args:
        raw: the tables as they were read; what is of a wrong type is passed over.
        base_folder: the recipe's.
    """
    name = _table(raw, "model").get("name")
    if isinstance(name, str) and name and _is_folder_name(name) and not _exists(name, base_folder):
        cure = "Give a folder that exists, or a hub id such as microsoft/Phi-3-mini-4k-instruct."
        yield Problem("model", "name", f"[model] name: There is no model folder {name}. {cure}")
    adapter = _table(raw, "model").get("adapter")
    if isinstance(adapter, str) and adapter and not _exists(adapter, base_folder):
        yield Problem("model", "adapter", f"[model] adapter: There is no folder {adapter}.")
    measures = _table(raw, "training").get("do_eval") is not False
    for key in ("train", "eval") if measures else ("train",):
        names = _table(raw, "data").get(key)
        for name in listed(names) if isinstance(names, str | list) else ():
            if isinstance(name, str) and name and is_file(name, base_folder) and not _exists(name, base_folder):
                yield Problem("data", key, f"[data] {key}: There is no file {name}{_looked(name, base_folder)}")


def _table(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = raw.get(name)
    return table if isinstance(table, dict) else {}


def _is_folder_name(name: str) -> bool:
    """Whether it cannot be a hub id, which is owner/name."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1


def _exists(name: str, base_folder: Path) -> bool:
    return any(place.exists() for place in possible_places(name, base_folder))


def _looked(name: str, base_folder: Path) -> str:
    """Where it was looked for, and the file there whose name is nearest."""
    folders = list(dict.fromkeys(place.absolute().parent for place in possible_places(name, base_folder)))
    where = f" in {' or '.join(map(str, folders))}."
    for folder in folders:
        files = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        if nearest := find_nearest(Path(name).name, files, cutoff=0.8):  # endings are alike anyway
            return f"{where} Did you mean {Path(name).with_name(nearest).as_posix()}?"
    return where
