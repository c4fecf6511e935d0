"""What a recipe may ask of its model: positions and layers that it has.

Where the files that a recipe names lie.

The files and folders that a recipe names and that are not on this computer; told before torch is imported.

A TOML file, and what `--set` adds to it, read into one frozen Recipe; every problem of it is told at once.

The tables and their keys are in `tables.py`, the names that are refused in `names.py`, the wording of
errors in `problems.py`. Nothing here reads the environment, a model or data.
"""

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qlora_phi3.errors import RecipeError, UserError
from qlora_phi3.recipe.messages import Problem, find_nearest, find_problems, format_toml
from qlora_phi3.recipe.schema import TABLES, Recipe

if TYPE_CHECKING:
    from qlora_phi3.family import Architecture
    from qlora_phi3.recipe.schema import Recipe


def check_limits(recipe: "Recipe", architecture: "Architecture") -> None:
    """Refuse rows longer than the model's positions, and a layer to recompute that it does not have.

    Raises:
        UserError: names the key, its value and the model's.
    """
    asked, most = recipe.training.max_length, architecture.max_position_embeddings
    if asked > most:
        raise UserError(
            f"[training] max_length = {asked}, and {recipe.model.name} has {most} positions.",
            f"Write max_length = {most} or less.",
        )
    every, layers = recipe.memory.checkpoint_every_n_layers, architecture.num_hidden_layers
    if every != "auto" and every > layers:
        raise UserError(
            f"[memory] checkpoint_every_n_layers = {every}, and {recipe.model.name} has {layers} layers.",
            f"Write {layers} or less; to recompute none write [training] gradient_checkpointing = false.",
        )


def resolve_paths(recipe: "Recipe", base_folder: Path) -> "Recipe":
    """The recipe with local files and folders as absolute paths, so that it means the same from anywhere.

    Args:
        base_folder: the recipe's; its relative paths are looked for there, then in the working folder.
    """

    def find(place: str) -> str:
        found = next((candidate for candidate in candidate_paths(place, base_folder) if candidate.exists()), None)
        return str(found.resolve()) if found else place

    def find_all(places: str | list[str] | None) -> str | list[str] | None:
        return [find(place) for place in places] if isinstance(places, list) else places and find(places)

    data = recipe.data.model_copy(update={"train": find_all(recipe.data.train), "eval": find_all(recipe.data.eval)})
    adapter = recipe.model.adapter
    model = recipe.model.model_copy(update={"name": find(recipe.model.name), "adapter": adapter and find(adapter)})
    return recipe.model_copy(update={"data": data, "model": model})


def candidate_paths(name: str, base_dir: Path) -> tuple[Path, ...]:
    """The paths that a name of a recipe can mean, in the order of the search: the recipe's directory, the working directory."""
    path = Path(name).expanduser()
    return (base_dir / path).absolute(), path.absolute()


#: A name with such a suffix means a file even where there is none, so that a typo is never looked up on the hub.
FILE_SUFFIXES = frozenset(
    [".json", ".jsonl", ".csv", ".parquet", ".txt", ".tsv", ".md", ".xml", ".arrow", ".xlsx", ".gz", ".zip", ".zst"]
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_local_data(name: str, base_dir: Path) -> bool:
    """Whether a name in [data] means a file: it exists, or it cannot be the id of a data set on the hub."""
    looks_like_file = Path(name).suffix.lower() in FILE_SUFFIXES or not HUB_ID.fullmatch(name)
    return looks_like_file or any(path.exists() for path in candidate_paths(name, base_dir))


def as_list(places: str | list[str] | None) -> Sequence[str]:
    """The value of a key that holds one name or several."""
    return [places] if isinstance(places, str) else places or []


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
        hint = "Give a folder that exists, or a hub id such as microsoft/Phi-3-mini-4k-instruct."
        yield Problem("model", "name", f"[model] name: There is no model folder {name}. {hint}")
    adapter = _table(raw, "model").get("adapter")
    if isinstance(adapter, str) and adapter and not _exists(adapter, base_folder):
        yield Problem("model", "adapter", f"[model] adapter: There is no folder {adapter}.")
    measures = _table(raw, "training").get("do_eval") is not False
    for key in ("train", "eval") if measures else ("train",):
        names = _table(raw, "data").get(key)
        for name in as_list(names) if isinstance(names, str | list) else ():
            if isinstance(name, str) and name and is_file(name, base_folder) and not _exists(name, base_folder):
                yield Problem("data", key, f"[data] {key}: There is no file {name}{_looked(name, base_folder)}")


def _table(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = raw.get(name)
    return table if isinstance(table, dict) else {}


def _is_folder_name(name: str) -> bool:
    """Whether it cannot be a hub id, which is owner/name."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1


def _exists(name: str, base_folder: Path) -> bool:
    return any(place.exists() for place in candidate_paths(name, base_folder))


def _looked(name: str, base_folder: Path) -> str:
    """Where it was looked for, and the file there whose name is nearest."""
    folders = list(dict.fromkeys(place.absolute().parent for place in candidate_paths(name, base_folder)))
    where = f" in {' or '.join(map(str, folders))}."
    for folder in folders:
        files = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        if nearest := find_nearest(Path(name).name, files, cutoff=0.8):  # endings are alike anyway
            return f"{where} Did you mean {Path(name).with_name(nearest).as_posix()}?"
    return where


#: Python's way of writing where TOML's is wanted: True, None, "key": value, or a comma at the end of the line.
PYTHON_IN_TOML = re.compile(r"\b(True|False|None)\b|^\s*[\"']\w+[\"']\s*:|,\s*$")


#: Endings of files that are data, never recipes.
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def load_recipe(path: Path, overrides: Sequence[str] = (), *, is_file: IsFile | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: the TOML file, in UTF-8.
        overrides: `table.key=value` each; the value is TOML, and a bare word is a string.
        is_file: whether a name of [data] means a file; where it is given, files and folders that are missing are problems.

    Raises:
        RecipeError: with every problem there is, one a line, each with the file (or the override) and the table.
    """
    raw = _read_toml(path)
    sources = {}
    for override in overrides:
        sources[_apply_override(raw, override)] = f"--set {override}"
    missing = [] if is_file is None else list(find_missing(raw, path.parent, is_file))
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems = list(find_problems(error, raw, TABLES))
        raise RecipeError(_as_lines([*problems, *_contradictions(raw, problems), *missing], path, sources)) from None
    if missing:
        raise RecipeError(_as_lines(missing, path, sources))
    return recipe


def _contradictions(raw: Mapping[str, Any], problems: Sequence[Problem]) -> list[Problem]:
    """Keys that cannot both hold, among those that are right by themselves: validation gives up before it comes to them."""
    wrong = {(problem.table, problem.key) for problem in problems}
    sound = {
        table: {key: value for key, value in keys.items() if (table, key) not in wrong}
        for table, keys in raw.items()
        if table in TABLES and isinstance(keys, dict)
    }
    try:
        Recipe.model_validate(sound)
    except ValidationError as error:
        found = [each for each in find_problems(error, sound, TABLES) if not each.key and each.table in ("", *sound)]
        words = {key for _, key in wrong}
        return [each for each in found if each not in problems and not words & set(re.findall(r"\w+", each.sentence))]
    return []


def recipe_as_toml(recipe: Recipe) -> str:
    """The recipe with every default written out; `load_recipe` of it gives an equal Recipe."""
    tables = recipe.model_dump(exclude_none=True)
    return "\n".join(
        f"[{table}]\n" + "".join(f"{key} = {format_toml(value)}\n" for key, value in keys.items())
        for table, keys in tables.items()
    )


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors that complete and check TOML."""
    schema = Recipe.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_without_null(schema),
        "title": "qlora-phi3 recipe",
    }


def _without_null(schema: Any) -> Any:
    """The same schema for TOML, which has no null, and without the titles pydantic makes up."""
    if isinstance(schema, list):
        return [_without_null(part) for part in schema if part != {"type": "null"}]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _without_null(part) for key, part in schema.items() if not _is_noise(key, part)}
    choices = kept.get("anyOf", ())
    return {**choices[0], **{k: v for k, v in kept.items() if k != "anyOf"}} if len(choices) == 1 else kept


def _is_noise(key: str, part: object) -> bool:
    made_up = key == "title" and isinstance(part, str)
    return made_up or (key == "default" and (part is None or (isinstance(part, dict) and bool(part))))


def _read_toml(path: Path) -> dict[str, Any]:
    if path.suffix.lower() in DATA_SUFFIXES:
        raise RecipeError(f"{path} is data, not a recipe.", f'Name it in a recipe: [data] train = "{path.as_posix()}"')
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe.", _neighbour(path)) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}).", "Save it as UTF-8.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.", "Give the path of a .toml file.") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}.", _toml_cure(text, str(error))) from None


def _neighbour(path: Path) -> str:
    """The recipe beside it whose name is most like the one asked for."""
    nearest = find_nearest(path.stem, [other.stem for other in path.parent.glob("*.toml")])
    return f"Did you mean {path.with_name(nearest)}.toml?" if nearest else "Give the path of a .toml file."


def _toml_cure(text: str, message: str) -> str:
    """Show the line, and how TOML writes what looks like Python in it."""
    place = re.search(r"line (\d+)", message)
    line = text.split("\n")[int(place[1]) - 1].strip() if place else ""
    shown = f"The line is: {line}" if line else "Mend it there."
    if PYTHON_IN_TOML.search(line):
        shown += " (TOML writes key = true, without a comma at the end; for None delete the line.)"
    elif "\\" in line:
        shown += " (Write folders with /, or the text in 'single quotes'.)"
    return shown


def _apply_override(raw: dict[str, Any], override: str) -> tuple[str, str]:
    """Put one `table.key=value` into `raw`; returns the table and the key."""
    name, equals, text = override.partition("=")
    table, *keys = name.strip().split(".")
    if not equals or not keys or not all((table, *keys)):
        raise RecipeError(f"--set {override} is not table.key=value.", "Write it like: --set lora.r=32")
    place = raw
    for part in (table, *keys[:-1]):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise RecipeError(
                f"--set {override} goes below {part}, which is no table.", "Write it like: --set lora.r=32"
            )
    place[keys[-1]] = _toml_value(text.strip(), name.strip())
    return table, keys[0]


def _toml_value(text: str, name: str) -> Any:
    """The value of an override: TOML, or a bare word; what begins as a list or table must be one."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text[:1] + text[-1:] not in ("[]", "{}"):
            return text
        words = [word.strip(" \"'") for word in text.strip("[]").split(",")]
        shown = format_toml(words) if text.startswith("[") else '{ ours = "theirs" }'
        raise RecipeError(
            f"--set {name}={text} is not TOML: {error}.", f"Quote the names: --set '{name}={shown}'"
        ) from None


def _as_lines(problems: Sequence[Problem], path: Path, sources: dict[tuple[str, str], str]) -> str:
    lines = [f"{sources.get((problem.table, problem.key), path)}: {problem.sentence}" for problem in problems]
    return lines[0] if len(lines) == 1 else "\n".join((f"{path} has {len(lines)} problems:", *lines))
