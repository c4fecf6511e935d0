"""Configs of Axolotl, LLaMA-Factory, TRL, Unsloth and Microsoft's notebooks as recipes; nothing of them is executed.

Every key is carried over, not needed for a reason, or refused by name. `other_keys.toml` has most names and reasons, and
`peer_keys.json` the rest.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_phi3.errors import RecipeError, first_line
from qlora_phi3.family import FUSED, known_config, nearest_known
from qlora_phi3.files import is_dir
from qlora_phi3.recipe.edit import commented_toml, format_toml
from qlora_phi3.recipe.messages import ALIASES, REPLACED, find_problems, replacement
from qlora_phi3.recipe.schema import TABLES, Recipe

PEERS: dict[str, Any] = json.loads((files("qlora_phi3") / "peer_keys.json").read_text(encoding="utf-8"))
SECTIONS = frozenset(PEERS["sections"].split())
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # PyYAML reads 2e-4 as text
#: What a reason of `REPLACED` tells people to write.
ASSIGNED = re.compile(r'\[(\w+)\] (\w+) = (\{value\}|"\w+"|true|false)(?= |\.|,|$)')
#: Keys of Axolotl's data -> values that say what is recognized in the rows.
RECOGNIZED: Mapping[str, tuple[Any, ...]] = {
    "type": ("chat_template",),
    "message_property_mappings": ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
}
#: Stands for a value that a program computes.
COMPUTED = "<computed>"
OFF = "it is off, as it is here"
HINT = "Give a config of Axolotl, LLaMA-Factory, TRL, Unsloth or Microsoft's notebooks, in YAML, JSON, Python or a notebook."


@dataclass(slots=True)
class ImportedRecipe:
    """What became of the keys of a config, each as a line of text."""

    peer: str
    #: (table, key) -> value, and the comment on it.
    keys: dict[tuple[str, str], tuple[Any, str]] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    not_needed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def set(self, place: str, value: Any, source: str) -> None:
        """Carry over `source` to `table.key`; a second source with another value is refused."""
        table, _, key = place.partition(".")
        known, comment = self.keys.setdefault((table, key), (value, f"{self.peer}: {source}"))
        if known == value:
            self.carried.append(f"{source} -> [{table}] {key} = {_show(value)}")
        else:
            self.refused.append(f"{source} = {_show(value)}: {comment} gives [{table}] {key} = {_show(known)} already")

    def get(self, place: str) -> Any:
        """The value of `table.key`, None where it is not set."""
        table, _, key = place.partition(".")
        return self.keys.get((table, key), (None, ""))[0]

    def as_toml(self) -> str:
        """The recipe with a comment behind each key, and what was refused above all."""
        tables = {name: [(key, *self.keys[each, key]) for each, key in self.keys if each == name] for name in TABLES}
        refused = ["Refused, for you to decide:", *(f"  {line}" for line in self.refused)] if self.refused else []
        heading = [f"Imported from a config of {self.peer}.", *refused]
        return commented_toml({name: keys for name, keys in tables.items() if keys}, heading)


def import_recipe(path: Path) -> ImportedRecipe:
    """Read a config of another program, and convert it. RecipeError where it cannot be read, is of no known program, describes
    another kind of training, or gives no recipe.
    """
    settings = list(_read(path))
    keys = {key for key, _ in settings}
    scores = {peer: len(keys & set(marks.split())) for peer, marks in PEERS["marks"].items()}
    decisive = "Unsloth" if "FastLanguageModel" in keys else "Microsoft" if scores["Microsoft"] else ""
    peer = decisive or max(scores, key=lambda name: scores[name])
    if not scores[peer]:
        raise RecipeError(f"{path} has no key of {', '.join(scores)}.", HINT)
    found, defaults = ImportedRecipe(peer), PEERS["defaults"][peer]
    batch = {"micro": ("default", defaults["micro"]), "times": ("default", defaults.get("times", 1))}
    for key, given in settings:
        value = float(given) if isinstance(given, str) and NUMBER.fullmatch(given) else given
        is_micro = key in ("per_device_train_batch_size", "micro_batch_size") or (key == "batch_size" and peer == "Unsloth")
        if type(value) is int and (is_micro or key == "gradient_accumulation_steps"):
            batch["micro" if is_micro else "times"] = (key, value)
        elif not (key in SECTIONS and isinstance(value, dict)):
            _convert(found, key, value)
    if found.get("training.batch_size") is None:
        (micro, rows), (accumulation, times) = batch.values()
        found.set("training.batch_size", rows * times, f"{micro} {rows} x {accumulation} {times}")
    _complete(found)
    _validate(found)
    return found


def _complete(found: ImportedRecipe) -> None:
    """Add what the other program takes where a key is left out, the shares of steps, and the keys that a recipe needs."""
    evaluates = any(found.get(place) is not None for place in ("data.eval", "data.eval_size", "training.eval_strategy"))
    for place, value in PEERS["defaults"][found.peer].items():
        if place not in ("micro", "times") and found.get(place) is None and not (place == "training.do_eval" and evaluates):
            found.set(place, value, f"default {place.rpartition('.')[2]}")
    if found.get("lora.lora_alpha") is None:
        found.set("lora.lora_alpha", 2 * (found.get("lora.r") or 8), "default lora_alpha, twice the rank")
    for name in ("eval_steps", "save_steps"):
        if isinstance(found.get(f"training.{name}"), str):  # of evals_per_epoch and saves_per_epoch
            value, comment = found.keys.pop(("training", name))
            share = round(1 / (int(value) * found.get("training.num_train_epochs")), 4)
            found.set(f"training.{name}", share, comment.partition(": ")[2])
    for table, key, value in (("model", "name", "microsoft/Phi-3-mini-4k-instruct"), ("data", "train", "my-data.jsonl")):
        if (table, key) not in found.keys:
            found.keys[table, key] = (value, "WRITE YOURS: the config names none")
            found.refused.append(f"[{table}] {key}: the config names none; write yours in place of {_show(value)}")


def _validate(found: ImportedRecipe) -> None:
    """Refuse the values that a recipe cannot have, until the rest is a recipe."""
    while True:
        raw: dict[str, dict[str, Any]] = {}
        for (table, key), (value, _) in found.keys.items():
            raw.setdefault(table, {})[key] = value
        try:
            Recipe.model_validate(raw)
            return
        except ValidationError as error:
            problem = next(find_problems(error, raw, TABLES))
        words = re.findall(r"\w+", problem.sentence)  # a contradiction names its keys in the sentence
        named = [each for each in found.keys if each == (problem.table, problem.key) or (not problem.key and each[1] in words)]
        place = next(iter(reversed(named)), ("model", "name"))
        if place in (("model", "name"), ("data", "train")):
            raise RecipeError(f"The config gives no recipe: {problem.sentence}", "Correct that key.")
        _, comment = found.keys.pop(place)
        found.carried = [line for line in found.carried if f"-> [{place[0]}] {place[1]} = " not in line]
        found.refused.append(f"{comment.partition(': ')[2]}: {problem.sentence}")


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """The keys and values of a file, those of its sections among them; RecipeError where it cannot be read."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".ipynb":
            cells = ("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
            text = "\n".join(line for cell in cells for line in cell.splitlines() if not line.lstrip().startswith(("%", "!")))
        if path.suffix in (".py", ".ipynb"):
            yield from _read_python(ast.parse(text))
            return
        config = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.", HINT) from error
    except (ValueError, SyntaxError, RecursionError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = first_line(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise RecipeError(f"{path} cannot be read: {reason}.", HINT) from error
    if not isinstance(config, dict):
        raise RecipeError(f"{path} holds no keys with values.", HINT)
    yield from _flatten(config)


def _flatten(config: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield str(key), value
        if key in SECTIONS and isinstance(value, dict):
            yield from _flatten(value)


def _read_python(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """The dictionaries that are assigned, and the keywords of known calls; a name stands for the literal that it was given."""
    names: dict[str, Any] = {}

    def evaluate(node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch":
            return node.attr
        if isinstance(node, ast.Dict):
            return {evaluate(key): evaluate(value) for key, value in zip(node.keys, node.values, strict=True) if key}
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError):
            return COMPUTED

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, evaluate(node.value)
            names |= {} if value == COMPUTED else {name: value}
            if isinstance(value, dict):
                yield from _flatten({name: value} if name in SECTIONS else value)
    for node in ast.walk(tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and called in PEERS["calls"]:
            if called == "FastLanguageModel.from_pretrained":
                yield "FastLanguageModel", True
            if node.args and PEERS["calls"][called]:
                yield PEERS["calls"][called], evaluate(node.args[0])
            yield from ((keyword.arg, evaluate(keyword.value)) for keyword in node.keywords if keyword.arg)


def _convert(found: ImportedRecipe, key: str, value: Any) -> None:
    """Sort one key into the lists of `found`."""
    home = next((table for table, model in TABLES.items() if ALIASES.get(key, key) in model.model_fields), "")
    text, allowed = str(value).lower(), PEERS["methods"].get(key, "").split()
    reason = PEERS["dropped"].get(key, "")
    if value is None or value in ("", [], {}):
        reason = "it is empty there"
    elif value == COMPUTED:
        if key in PEERS["objects"].split():
            reason = "an object of the program, which the keys of the recipe describe"
        else:
            found.refused.append(f"{key}: its value is computed by the program; write it yourself")
            return
    elif allowed and text not in allowed:
        message = f"{key} = {_show(value)} is another kind of training: a recipe is supervised fine-tuning of a LoRA adapter."
        raise RecipeError(message, "Such a config cannot be imported.")
    elif value == "auto" and key != "optim":
        reason = "it is chosen here as well"
    elif key in ("template", "chat_template") and text in PEERS["same_templates"].split():
        reason = "the model's own template is recognized"
    elif rule := PEERS["by_truth"].get(key):
        written = rule[1] if value else rule[2]
        reason = OFF if written is None else ""
    if reason:
        found.not_needed.append(f"{key} = {_show(value)}: {reason}")
    elif rule := PEERS["by_truth"].get(key):
        found.set(rule[0], value if rule[1 if value else 2] == "{value}" else rule[1 if value else 2], key)
    elif _convert_specially(found, key, value):
        pass
    elif place := PEERS["renamed"].get(key):
        found.set(place, value, key)
    elif home and not (key == "adapter" and text in ("lora", "qlora")):
        found.set(f"{home}.{ALIASES.get(key, key)}", value, key)
    else:
        _replace(found, key, value)


def _convert_specially(found: ImportedRecipe, key: str, value: Any) -> bool:
    """Convert a key that needs more than another name; False for any other key."""
    if key in PEERS["model_names"].split():
        _set_model(found, key, str(value))
    elif key in ("lora_target", "lora_target_modules", "target_modules"):
        _set_targets(found, key, value)
    elif key in ("datasets", "test_datasets"):
        _set_datasets(found, key, value)
    elif key in ("dataset", "dataset_name"):
        names = [name.strip() for name in str(value).split(",")]
        sources = names if len(names) > 1 else names[0]
        if not (unknown := ", ".join(name for name in names if "/" not in name and not Path(name).suffix)):
            found.set("data.train", sources, key)
        else:
            found.keys["data", "train"] = (sources, f"{found.peer}: {key}")
            found.refused.append(f"{key} = {unknown}: if only the other program knows that name, write the file or a hub id")
    elif key == "quantization_bit" and value == 4:
        found.set("quantization.load_in_4bit", True, key)
    elif key in ("quantization_bit", "load_in_8bit"):
        lists = (found.refused, "8 bit is not offered: 4 and 16 bit are") if value else (found.not_needed, OFF)
        lists[0].append(f"{key} = {_show(value)}: {lists[1]}")
    elif key in ("evals_per_epoch", "saves_per_epoch"):
        # `_complete` makes it a share of all steps, when the epochs are known
        found.keys["training", f"{key[:4]}_steps"] = (str(value), f"{found.peer}: {key}")
    elif key == "cosine_min_lr_ratio":
        found.set("training.lr_scheduler_kwargs", {"min_lr_rate": value}, key)
        found.keys["training", "lr_scheduler_type"] = ("cosine_with_min_lr", f"{found.peer}: {key}")
    else:
        return False
    return True


def _replace(found: ImportedRecipe, key: str, value: Any) -> None:
    """Do what `messages.py` tells people to do with a key: write others, or delete it; refuse a key that it does not know."""
    sentence, assigned = replacement(key, value), ASSIGNED.findall(REPLACED.get(key, ""))
    if "delete it" in sentence or (sentence and value is False):
        found.not_needed.append(f"{key} = {_show(value)}: {sentence.partition('; ')[2] or sentence}")
    elif assigned:
        for table, ours, written in assigned:
            found.set(f"{table}.{ours}", value if written == "{value}" else json.loads(written), key)
    else:
        found.refused.append(f"{key} = {_show(value)}: {f'it {sentence}' if sentence else 'this key is not known'}")


def _set_model(found: ImportedRecipe, key: str, name: str) -> None:
    """The model; of Unsloth's copies, whose layers are split as Llama's, the original."""
    short = re.sub(r"(-unsloth)?(-bnb-4bit|-gguf)?$", "", name.rpartition("/")[2].lower())
    original = nearest_known(f"microsoft/{short}") if name.startswith("unsloth/") else None
    if not original and not known_config(name) and not re.search(r"phi-?[34]", name, re.IGNORECASE) and not is_dir(name):
        found.refused.append(f"{key} = {name}: nothing says that it is of the Phi-3 family, and others cannot be trained")
    found.set("model.name", original or name, f"{key} = {name}, a copy with Llama's layers" if original else key)


def _set_targets(found: ImportedRecipe, key: str, value: Any) -> None:
    """Layers by phi3's names: q, k and v are qkv_proj, gate and up gate_up_proj; all four are all-linear."""
    names = re.split(r"\s*,\s*", value) if isinstance(value, str) else value
    fused = list(dict.fromkeys(FUSED.get(name, name) for name in names))
    is_all = names in (["all"], ["all-linear"]) or set(fused) >= {*FUSED.values(), "o_proj", "down_proj"}
    found.set("lora.target_modules", "all-linear" if is_all else fused, key)


def _set_datasets(found: ImportedRecipe, key: str, value: Any) -> None:
    """Axolotl's list of data: path, type, split, field_messages; other keys of an entry are refused by name."""
    entries = [entry if isinstance(entry, dict) else {"path": entry} for entry in value] if isinstance(value, list) else []
    paths = [str(entry.get("data_files") or entry.get("path")) for entry in entries]
    found.set("data.eval" if key == "test_datasets" else "data.train", paths[0] if len(paths) == 1 else paths, f"{key}.path")
    formats = {"alpaca": "alpaca", "completion": "text", "sharegpt": "sharegpt"}
    places = {"split": "data.split", "name": "data.subset"}
    for name, item in ((name, item) for entry in entries for name, item in entry.items() if name not in ("path", "data_files")):
        if name == "type" and item in formats:
            found.set("data.format", formats[item], f"{key}.type")
        elif name == "field_messages":
            found.set("data.format", "messages", f"{key}.{name}")
            found.set("data.fields", {"messages": item}, f"{key}.{name}")
        elif name in places:
            found.set(places[name], item, f"{key}.{name}")
        elif name == "ds_type" or item in RECOGNIZED.get(name, ()):
            found.not_needed.append(f"{key}.{name} = {_show(item)}: the format is recognized")
        else:
            found.refused.append(f"{key}.{name} = {_show(item)}: write it in [data] with format and fields")


def _show(value: Any) -> str:
    """A value as TOML writes it, or where TOML has no such value as Python does."""
    try:
        return format_toml(value)
    except (ValueError, TypeError):
        return repr(value)
