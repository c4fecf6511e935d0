"""Reading a recipe file with the changes of `--set`, and finding the files that it names.

All problems of a recipe come in one RecipeError, one a line. Nothing here imports torch or reads data.
"""

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_phi3.errors import DataError, RecipeError, UserError, quoted
from qlora_phi3.family import Architecture, is_hub_id, original_of
from qlora_phi3.files import is_dir, nesting
from qlora_phi3.recipe.edit import format_toml
from qlora_phi3.recipe.messages import Problem, find_nearest, find_problems, suggest_key
from qlora_phi3.recipe.schema import TABLES, Data, Model, Recipe, Training
from qlora_phi3.units import format_count

#: Python syntax in place of TOML: True, None, "key": value, or a comma at the end of the line.
PYTHON_IN_TOML = re.compile(r"\b(True|False|None)\b|^\s*[\"']\w+[\"']\s*:|,\s*$")
TEMPLATES = files("qlora_phi3") / "templates"
#: A line of YAML: key, colon, value; and a list.
YAML_LINE = re.compile(r"^\s*(- )?[\w-]+:(\s|$)", flags=re.MULTILINE)
#: Tables in tables, and lists in lists: a recipe has 3 of them.
MAX_DEPTH = 16
#: Suffixes of files that are data, never recipes.
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
#: Suffixes that mean a file even where no such file exists, so that a misspelt name is never requested from the hub.
FILE_SUFFIXES = frozenset([*DATA_SUFFIXES, ".txt", ".md", ".xml", ".arrow", ".xlsx", ".gz", ".zip", ".zst"])
#: Usual values of keys; others are hardly ever meant.
USUAL = {"lora.r": (2, 512), "training.learning_rate": (1e-6, 1e-2), "training.num_train_epochs": (0, 20)}
#: A name that stands for several files.
GLOB = re.compile(r"[*?\[]")


def load_recipe(path: Path, overrides: Sequence[str] = (), *, check_files: bool = False) -> Recipe:
    """Read a recipe. RecipeError has all problems, one a line, each with the file (or the override), the table and the key.

    Args:
        path: a TOML file in UTF-8.
        overrides: `table.key=value` each; the value is TOML, or a bare word that is read as a string.
        check_files: a missing model, adapter or data file is a problem as well.
    """
    raw = _read_toml(path)
    sources = {_apply_override(raw, override): f"--set {override}" for override in overrides}
    problems = []
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems = list(find_problems(error, raw, TABLES))
        problems += _find_contradictions(raw, problems)
    if check_files:
        problems += _find_missing_files(raw, path.parent)
    if not problems:
        return recipe
    lines = [f"{_find_origin(problem, sources, path)}: {problem.sentence}" for problem in problems]
    raise RecipeError(lines[0] if len(lines) == 1 else "\n".join((f"{path} has {len(lines)} problems:", *lines)))


def _find_origin(problem: Problem, sources: Mapping[tuple[str, str], str], path: Path) -> str:
    """The `--set` that a problem comes from, else the file; of keys that contradict each other, the file and each `--set`."""
    words = () if problem.key else re.findall(r"\w+", problem.sentence)
    is_unknown = problem.table not in ("", *TABLES)
    given = [
        each
        for (table, key), each in sources.items()
        if (key in words and problem.table in ("", table)) or (is_unknown and table == problem.table)
    ]
    return f"{path} with {' '.join(given)}" if given else sources.get((problem.table, problem.key), str(path))


def describe_unusual(recipe: Recipe) -> str | None:
    """A line about the values that are out of the usual range, and may be slips of the keyboard; None where there are none."""
    found = []
    for (table, key), (low, high) in ((name.split("."), ends) for name, ends in USUAL.items()):
        if not low <= (value := getattr(getattr(recipe, table), key)) <= high:
            found.append(f"[{table}] {key} = {format_toml(value)} (usual: {low:g} to {high:g})")
    return f"Unusual, is it meant? {', '.join(found)}" if found else None


def _read_toml(path: Path) -> dict[str, Any]:
    kind = path.suffix.lower()
    if kind in (".yaml", ".yml") or (kind == ".json" and _is_json_object(path)):
        raise RecipeError(
            f"{path} is {'JSON' if kind == '.json' else 'YAML'}, and a recipe is TOML.",
            f"Convert it: qlora-phi3 recipe import {quoted(path)}",
        )
    if kind in DATA_SUFFIXES and path.exists():
        raise RecipeError(f"{path} is data, not a recipe.", f"Write a recipe for it: qlora-phi3 init {quoted(path)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        nearest = find_nearest(path.stem, [other.stem for other in path.parent.glob("*.toml")])
        hint = f"Did you mean {path.with_name(nearest)}.toml?" if nearest else "Give the path of a .toml file."
        raise RecipeError(f"{path}: there is no such recipe.", hint) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}).", "Save it as UTF-8.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.", "Give the path of a .toml file.") from None
    try:
        return _parse_toml(text)
    except ValueError as error:
        if looks_like := "JSON" if text.lstrip()[:1] == "{" else "YAML" if YAML_LINE.search(text) else "":
            raise RecipeError(
                f"{path} is {looks_like}, and a recipe is TOML.", f"Convert it: qlora-phi3 recipe import {quoted(path)}"
            ) from None
        found = re.search(r"line (\d+)", str(error))
        line = text.split("\n")[int(found[1]) - 1].strip() if found else ""
        hint = f"The line is: {line}" if line else "Correct that place."
        if PYTHON_IN_TOML.search(line):
            hint += " (TOML writes key = true, without a comma at the end; for None delete the line.)"
        elif "\\" in line:
            hint += " (Write paths with /, or the text in 'single quotes'.)"
        raise RecipeError(f"{path} is not TOML: {error}.", hint) from None


def _parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; ValueError where it is none, has a number of thousands of digits, or is nested deeper than any recipe."""
    try:
        raw = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if nesting(raw, MAX_DEPTH) > MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if _has_large_int(raw):  # Python refuses to print one of 4,300 digits
        raise ValueError("it has a whole number of more than 64 bits, which TOML lacks")
    return raw


def _has_large_int(value: object) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_large_int, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def _is_json_object(path: Path) -> bool:
    """Whether a file is the configuration of another tool: one JSON object, where data are a list or a line each."""
    with suppress(OSError, ValueError, RecursionError):
        return isinstance(json.loads(path.read_text(encoding="utf-8-sig")), dict)
    return False


def _apply_override(raw: dict[str, Any], override: str) -> tuple[str, str]:
    """Put one `table.key=value` into `raw`, and return the table and the key.

    The value is TOML or a bare word; one that begins and ends like a list or an inline table must be TOML.
    """
    name, equals, text = (part.strip() for part in override.partition("="))
    table, *keys = name.split(".")
    if not equals or not keys or not all((table, *keys)) or len(keys) > MAX_DEPTH:
        home = next((f"{table}.{override}" for table, model in TABLES.items() if name in model.model_fields and equals), "")
        meant = f"{suggest_key('', name, TABLES)} " if equals and name and not (keys or home) else ""
        raise RecipeError(f"--set {override} is not table.key=value.", f"{meant}Write it like: --set {home or 'lora.r=32'}")
    place = raw
    for part in (table, *keys[:-1]):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise RecipeError(f"--set {override}: {part} is not a table.", "Write it like: --set lora.r=32")
    try:
        if "\n" in text:
            raise ValueError("it has several lines")
        place[keys[-1]] = _parse_toml(f"value = {text}")["value"]
    except ValueError as error:
        if text[:1] + text[-1:] in ("[]", "{}"):
            words = [word.strip(" \"'") for word in text.strip("[]").split(",")]
            shown = format_toml(words) if text.startswith("[") else '{ ours = "theirs" }'
            hint = f"Quote the names: --set '{name}={shown}'"
            raise RecipeError(f"--set {name}={text} is not TOML: {error}.", hint) from None
        place[keys[-1]] = text
    return table, keys[0]


def _find_contradictions(raw: Mapping[str, Any], problems: Sequence[Problem]) -> list[Problem]:
    """Problems between the keys that are valid by themselves; pydantic does not look for them after another error."""
    wrong = {(problem.table, problem.key) for problem in problems}
    valid = {
        table: {key: value for key, value in keys.items() if (table, key) not in wrong}
        for table, keys in raw.items()
        if table in TABLES and isinstance(keys, dict)
    }
    try:
        Recipe.model_validate(valid)
    except ValidationError as error:
        found = [each for each in find_problems(error, valid, TABLES) if not each.key and each.table in ("", *valid)]
        words = {key for _, key in wrong}
        return [each for each in found if each not in problems and not words & set(re.findall(r"\w+", each.sentence))]
    return []


def _find_missing_files(raw: Mapping[str, Any], base_dir: Path) -> Iterator[Problem]:
    """Yield a problem for each model folder, adapter and data file that does not exist; values of a wrong type are skipped."""
    sections = {table: section for table, section in raw.items() if isinstance(section, dict)}
    evaluates = sections.get("training", {}).get("do_eval") is not False
    template = sections.get("data", {}).get("chat_template")
    templates = ["auto", *sorted(path.name.removesuffix(".jinja") for path in TEMPLATES.iterdir())]
    if isinstance(template, str) and template not in templates:
        path = find_path(template, base_dir) if template.endswith(".jinja") else None
        if path is None or not path.is_file():
            sentence = f"[data] chat_template: There is no template and no .jinja file {template}."
            yield Problem("data", "chat_template", f"{sentence} The names: {', '.join(templates)}.")
    for table, key in (("model", "name"), ("model", "adapter"), ("data", "train"), ("data", "eval")):
        names = sections.get(table, {}).get(key) if key != "eval" or evaluates else None
        for name in names if isinstance(names, list) else [names]:
            if not (isinstance(name, str) and name) or find_path(name, base_dir):
                continue
            if key == "name" and not is_hub_id(name):
                hint = "Give a folder that exists, or a hub id such as microsoft/Phi-3-mini-4k-instruct."
                yield Problem(table, key, f"[model] name: There is no model folder {name}. {hint}")
            elif key == "adapter":
                yield Problem(table, key, f"[model] adapter: There is no folder {name}.")
            elif table == "data" and is_local_data(name, base_dir):
                yield Problem(table, key, f"[data] {key}: {missing_data(name, base_dir)}")


def missing_data(name: str, base_dir: Path) -> DataError:
    """The error that there is no data file of this name where it is looked for, with the nearest name there."""
    places = list(dict.fromkeys(path.absolute().parent for path in candidate_paths(name, base_dir)))
    files = [path.name for place in places if is_dir(place) for path in place.iterdir()]
    data = [file for file in files if file.lower().removesuffix(".gz").endswith(DATA_SUFFIXES)]
    nearest = find_nearest(Path(name).name, data, cutoff=0.8)  # the suffixes are alike anyway
    hint = f"Did you mean {quoted(Path(name).with_name(nearest))}?" if nearest else "Check the path."
    return DataError(f"There is no data file {name!r} in {' or '.join(map(str, places))}.", hint)


def candidate_paths(name: str, base_dir: Path) -> tuple[Path, ...]:
    """Paths that a name can mean, first match first: in `base_dir`, the recipe's directory, then in the working directory.

    `~` is the home directory; an absolute path is the only candidate.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises for a user who does not exist
    return (path,) if path.is_absolute() else (base_dir / path, path)


def find_path(name: str, base_dir: Path) -> Path | None:
    """The first of `candidate_paths` that exists, or may: reading it says that a directory above is not readable. None for what
    is no name (NUL, a part of 300 bytes).
    """
    for path in candidate_paths(name, base_dir):
        try:
            if path.exists():
                return path
        except PermissionError:
            return path
        except (OSError, ValueError):
            continue
    return None


def is_local_data(name: str, base_dir: Path) -> bool:
    """Whether a name in [data] means a file: it exists, has the suffix of a file, or cannot be a hub id."""
    looks_local = Path(name).suffix.lower() in FILE_SUFFIXES or not is_hub_id(name, needs_owner=False)
    return looks_local or find_path(name, base_dir) is not None


def local_files(path: Path) -> list[Path]:
    """The files that a path means: the file, all files below a folder, or those that match a pattern such as `chats/*.jsonl`."""
    try:
        if path.exists():
            return sorted(path.rglob("*")) if path.is_dir() else [path]
    except OSError:  # a name of more than 255 bytes
        return []
    start = next((place for place, part in enumerate(path.parts) if GLOB.search(part)), None)
    return [] if start is None else sorted(Path(*path.parts[:start]).glob(str(Path(*path.parts[start:]))))


def resolve_paths(recipe: Recipe, base_dir: Path) -> Recipe:
    """The recipe with local files and folders as absolute paths, so that it means the same from any working directory."""

    def resolve(table: Model | Data, *keys: str) -> Model | Data:
        update: dict[str, Any] = {}
        for key in keys:
            names, paths = getattr(table, key), []
            for name in as_list(names):
                found = next((path for path in candidate_paths(name, base_dir) if local_files(path)), None)
                paths.append(str(found.resolve()) if found else name)
            update[key] = paths if isinstance(names, list) else next(iter(paths), None)
        return table.model_copy(update=update)

    template = ["chat_template"] if recipe.data.chat_template.endswith(".jinja") else []
    data = resolve(recipe.data, "train", "eval", *template)
    update = {"model": resolve(recipe.model, "name", "adapter"), "data": data}
    return recipe.model_copy(update=update)


def as_list(names: str | list[str] | None) -> Sequence[str]:
    """The value of a key that holds one name, several, or none."""
    return [names] if isinstance(names, str) else names or []


def check_processes(training: Training, count: int) -> None:
    """Raise RecipeError where a step has fewer rows than there are processes to share it."""
    if count > training.batch_size:
        hint = "Start as many processes as rows at most, or raise [training] batch_size."
        raise RecipeError(f"{count} processes cannot share a step of {format_count(training.batch_size, 'row')}.", hint)


def check_model_limits(recipe: Recipe, architecture: Architecture) -> None:
    """Raise UserError where `max_length` or `checkpoint_every_n_layers` is more than the model has, and LoftQ on 4-bit files."""
    max_length, positions = recipe.training.max_length, architecture.max_position_embeddings
    if max_length > positions:
        message = f"[training] max_length = {max_length}, and {recipe.model.name} has {positions} positions."
        raise UserError(message, f"Write max_length = {positions} or less.")
    if recipe.lora.init_lora_weights == "loftq" and architecture.stored is not None:
        raise UserError(
            f'[lora] init_lora_weights = "loftq" needs unquantized weights, and those of {recipe.model.name} are in 4 bit.',
            "Use the unquantized original as the base, or delete init_lora_weights.",
        )
    every, layers = recipe.memory.checkpoint_every_n_layers, architecture.num_hidden_layers
    if every != "auto" and every > layers:
        hint = f"Write {layers} or less; to recompute no layer, write [training] gradient_checkpointing = false."
        raise UserError(f"[memory] checkpoint_every_n_layers = {every}, and {recipe.model.name} has {layers} layers.", hint)


def use_stored_quantization(recipe: Recipe, architecture: Architecture) -> Recipe:
    """The recipe with the [quantization] of a checkpoint whose weights are stored in 4 bit; keys that it leaves out follow them.
    UserError where it sets one to another value: the weights cannot be quantized again.
    """
    stored, given = architecture.stored, recipe.quantization
    if stored is None:
        return recipe
    update = {"load_in_4bit": True, "bnb_4bit_quant_type": stored.quant_type, "bnb_4bit_use_double_quant": stored.double_quant}
    for key, value in update.items():
        if key in given.model_fields_set and (wanted := getattr(given, key)) != value:
            name, original = recipe.model.name, original_of(asdict(architecture), recipe.model.name)
            message = f"[quantization] {key} = {format_toml(wanted)}, and the weights of {name} are stored in {stored.label}."
            raise UserError(message, f"Write {key} = {format_toml(value)}, or use the unquantized original, such as {original}.")
    return recipe.model_copy(update={"quantization": given.model_copy(update=update)})


def recipe_as_toml(recipe: Recipe) -> str:
    """The recipe with every default written out; `load_recipe` of it gives an equal Recipe."""
    return "\n".join(
        f"[{table}]\n" + "".join(f"{key} = {format_toml(value)}\n" for key, value in keys.items())
        for table, keys in recipe.model_dump(exclude_none=True).items()
    )


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors that complete and check TOML."""
    schema = _simplify_schema(Recipe.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "qlora-phi3 recipe"}


def _simplify_schema(schema: Any) -> Any:
    """The same schema without null, which TOML lacks, without pydantic's titles, and without defaults that are objects."""
    if isinstance(schema, list):
        return [_simplify_schema(part) for part in schema if part != {"type": "null"}]
    if not isinstance(schema, dict):
        return schema
    simple = {}
    for key, part in schema.items():
        is_title = key == "title" and isinstance(part, str)
        if not is_title and not (key == "default" and (part is None or (isinstance(part, dict) and part))):
            simple[key] = _simplify_schema(part)
    if len(simple.get("anyOf", ())) == 1:
        simple |= simple.pop("anyOf")[0]
    return simple
