"""Configs of Axolotl, LLaMA-Factory, TRL, Unsloth and Microsoft's notebooks as recipes; nothing of them is executed.

Every key is carried over, not needed for a reason, or refused by name. `messages.py` has most names and reasons.
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
from qlora_phi3.recipe.edit import commented_toml, format_toml
from qlora_phi3.recipe.messages import ALIASES, REPLACED, find_problems, replacement
from qlora_phi3.recipe.schema import TABLES, Recipe

#: Calls whose keywords are settings, and the key of ours that their first argument without a name is.
CALLS = {
    **dict.fromkeys(("FastLanguageModel.from_pretrained", "AutoModelForCausalLM.from_pretrained"), "base_model"),
    **dict.fromkeys(("AutoTokenizer.from_pretrained", "FastLanguageModel.get_peft_model", "SFTConfig", "LoraConfig"), ""),
    **dict.fromkeys(("TrainingArguments", "BitsAndBytesConfig", "SFTTrainer", "dict", "UnslothTrainingArguments"), ""),
    "load_dataset": "dataset_name",
}
#: Sections of a nested config, whose keys are read as if they stood alone.
SECTIONS = frozenset(
    ("training_config", "peft_config", "model", "data", "lora", "training", "quantization", "logging", "model_kwargs")
)
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # PyYAML reads 2e-4 as text
ASSIGNED = re.compile(r'\[(\w+)\] (\w+) = (\{value\}|"\w+"|true|false)(?= |\.|,|$)')
EMPTY, METHOD = "it is empty there", "only supervised fine-tuning of a LoRA adapter is done here"
UNREADABLE = "<computed>"
MICRO_BATCH = ("per_device_train_batch_size", "micro_batch_size")


@dataclass(slots=True)
class ImportedRecipe:
    """What became of the keys of a config, each as a line of text."""

    peer: str
    #: (table, key) -> value and the reason.
    keys: dict[tuple[str, str], tuple[Any, str]] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    not_needed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def set(self, place: str, value: Any, source: str) -> None:
        """Carry over `source` to `table.key`; a second source with another value is refused."""
        table, _, key = place.partition(".")
        known = self.keys.setdefault((table, key), (value, f"{self.peer}: {source}"))
        if known[0] != value:
            self.refused.append(f"{source} = {_show(value)}: {known[1]} gives [{table}] {key} = {_show(known[0])} already")
        else:
            self.carried.append(f"{source} -> [{table}] {key} = {_show(value)}")

    def as_toml(self) -> str:
        """The recipe with a comment behind each key, and what was refused above all."""
        tables = {name: [(key, *self.keys[each, key]) for each, key in self.keys if each == name] for name in TABLES}
        heading = [
            f"Imported from a config of {self.peer}. Refused, so that you decide:"
            if self.refused
            else f"Imported from {self.peer}."
        ]
        return commented_toml(
            {name: keys for name, keys in tables.items() if keys}, [*heading, *(f"  {line}" for line in self.refused)]
        )


def import_recipe(path: Path) -> ImportedRecipe:
    """Read a config of another program, and convert it.

    Raises:
        RecipeError: the file cannot be read, is of no known kind, or describes another kind of training.
    """
    settings, shipped = list(_read(path)), json.loads((files("qlora_phi3") / "peer_keys.json").read_text(encoding="utf-8"))
    names = {key for key, _ in settings}
    scores = {peer: len(names & set(marks.split())) for peer, marks in shipped["marks"].items()}
    peer = "Microsoft" if scores["Microsoft"] else max(scores, key=lambda name: scores[name])
    if not scores[peer]:
        raise RecipeError(
            f"{path}: no key of Axolotl, LLaMA-Factory, TRL, Unsloth or Microsoft's notebooks.", "Is it a config of these?"
        )
    found, batch = ImportedRecipe(peer), {}
    for key, value in settings:
        if isinstance(value, str) and NUMBER.fullmatch(value):
            value = float(value)
        if key in MICRO_BATCH or key == "gradient_accumulation_steps" or (key == "batch_size" and peer == "Unsloth"):
            batch["times" if key == "gradient_accumulation_steps" else "micro"] = (key, value)
        elif not (key in SECTIONS and isinstance(value, dict)) and key != "FastLanguageModel":
            _convert(found, key, value, shipped)
    defaults = shipped["defaults"][peer]
    micro, times = batch.get("micro", ("default micro-batch", defaults["micro"])), batch.get("times", ("default accumulation", 1))
    if ("training", "batch_size") not in found.keys:
        rows = micro[1] * times[1] if isinstance(micro[1], int) and isinstance(times[1], int) else None
        if rows is None:
            found.refused.append(f"{micro[0]} = {_show(micro[1])}, {times[0]} = {_show(times[1])}: no product of two numbers")
        else:
            found.set("training.batch_size", rows, f"{micro[0]} x {times[0]} = {micro[1]} x {times[1]}")
    _complete(found, {place: value for place, value in defaults.items() if place != "micro"})
    _validate(found)
    return found


def _complete(found: ImportedRecipe, defaults: Mapping[str, Any]) -> None:
    """Add what the other program takes where a key is left out, the shares of steps, and the keys that a recipe needs."""
    has_eval = any(key in found.keys for key in (("data", "eval"), ("data", "eval_size"), ("training", "eval_strategy")))
    epochs = found.keys.get(("training", "num_train_epochs"), (defaults["training.num_train_epochs"], ""))[0]
    for name in ("eval_steps", "save_steps"):
        value, source = found.keys.get(("training", name), (None, ""))
        if isinstance(value, str):  # evals_per_epoch and saves_per_epoch
            found.keys["training", name] = (round(1 / (int(value) * epochs), 4), source)
    for place, value in defaults.items():
        table, _, key = place.partition(".")
        if (table, key) not in found.keys and not (key == "do_eval" and has_eval):
            found.set(place, value, f"default of {found.peer}")
    if ("lora", "lora_alpha") not in found.keys:  # LLaMA-Factory
        found.set("lora.lora_alpha", 2 * found.keys.get(("lora", "r"), (8, ""))[0], f"default of {found.peer}: 2 x rank")
    for place, value in (("model.name", "microsoft/Phi-3-mini-4k-instruct"), ("data.train", "my-data.jsonl")):
        table, _, key = place.partition(".")
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
            for problem in list(find_problems(error, raw, TABLES)):
                place = next((each for each in found.keys if each == (problem.table, problem.key)), None)
                words = re.findall(r"\w+", problem.sentence)
                place = place or next((each for each in reversed(found.keys) if each[1] in words and each[0] != "data"), None)
                if place is None or place in (("model", "name"), ("data", "train")):
                    raise RecipeError(f"The config is no recipe: {problem.sentence}", "Correct that key.") from None
                _, source = found.keys.pop(place)
                found.carried = [line for line in found.carried if f"-> [{place[0]}] {place[1]} = " not in line]
                found.refused.append(f"{source}: {problem.sentence}")


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """The keys and values of a file, those of its sections among them; RecipeError where it cannot be read."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".py":
            yield from _read_python(ast.parse(text))
            return
        if path.suffix == ".ipynb":
            cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
            lines = (line for cell in cells for line in "".join(cell["source"]).splitlines())
            yield from _read_python(ast.parse("\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))))
            return
        config = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.", "Give a config in YAML, JSON or Python.") from error
    except (ValueError, SyntaxError, RecursionError, KeyError, TypeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read: {first_line(error)}.", "Give a config in YAML, JSON or Python.") from error
    if not isinstance(config, dict):
        raise RecipeError(f"{path} holds no keys with values.", "Give a config in YAML, JSON or Python.")
    yield from _flatten(config)


def _flatten(config: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield str(key), value
        if key in SECTIONS and isinstance(value, dict):
            yield from _flatten(value)


def _read_python(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """The dictionaries that are assigned, and the keywords of `CALLS`; names stand for the literals that they were given."""
    names: dict[str, Any] = {}

    def evaluate(node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return node.attr
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            return {evaluate(key): evaluate(value) for key, value in pairs if key is not None}
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError):
            return UNREADABLE

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, evaluate(node.value)
            if value != UNREADABLE:
                names[name] = value
            if isinstance(value, dict):
                yield from _flatten({name: value} if name in SECTIONS else value)
    for node in ast.walk(tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if not isinstance(node, ast.Call) or called not in CALLS:
            continue
        if called.startswith("FastLanguageModel"):
            yield "FastLanguageModel", None
        if node.args and CALLS[called]:
            yield CALLS[called], evaluate(node.args[0])
        yield from ((keyword.arg, evaluate(keyword.value)) for keyword in node.keywords if keyword.arg)


def _convert(found: ImportedRecipe, key: str, value: Any, shipped: Mapping[str, Any]) -> None:
    """Sort one key into the three lists of `found`."""
    homes = [table for table, model in TABLES.items() if key in model.model_fields]
    text = str(value).lower()
    if value is None or value in ("", [], {}):
        found.not_needed.append(f"{key}: {EMPTY}")
    elif value == UNREADABLE and key in shipped["objects"].split():
        found.not_needed.append(f"{key}: an object of the program, which the recipe's keys describe")
    elif value == UNREADABLE:
        found.refused.append(f"{key}: its value is computed by the program; write it yourself")
    elif key in shipped["methods"] and text not in shipped["methods"][key].split():
        raise RecipeError(f"{key} = {_show(value)}: {METHOD}.", "Such a config cannot be imported.")
    elif value == "auto":
        found.not_needed.append(f"{key} = auto: it is chosen here as well")
    elif rule := shipped["by_truth"].get(key):
        written = rule[1] if value else rule[2]
        if written is None:
            found.not_needed.append(f"{key} = {_show(value)}: it is off, as it is here")
        else:
            found.set(rule[0], value if written == "{value}" else written, key)
    elif key in shipped["dropped"]:
        found.not_needed.append(f"{key} = {_show(value)}: {shipped['dropped'][key]}")
    elif key in SPECIAL:
        SPECIAL[key](found, key, value)
    elif key in shipped["model_names"].split():
        _set_model(found, key, str(value))
    elif key in ("template", "chat_template") and text in shipped["same_templates"].split():
        found.not_needed.append(f"{key} = {value}: the model's own template is recognized")
    elif place := shipped["renamed"].get(key):
        found.set(place, value, key)
    elif homes and (key != "adapter" or text not in ("lora", "qlora")):
        found.set(f"{homes[0]}.{key}", value, key)
    elif key in ALIASES:
        home = next(table for table, model in TABLES.items() if ALIASES[key] in model.model_fields)
        found.set(f"{home}.{ALIASES[key]}", value, key)
    elif key in REPLACED or key == "adapter":
        _replace(found, key, value)
    else:
        found.refused.append(f"{key} = {_show(value)}: this key is not known")


def _replace(found: ImportedRecipe, key: str, value: Any) -> None:
    """Do what `messages.py` tells people to do with a key: write others, or delete it."""
    sentence = replacement(key, value)
    assigned = ASSIGNED.findall(REPLACED.get(key, ""))
    if value is False or "delete it" in sentence:
        found.not_needed.append(f"{key} = {_show(value)}: {sentence.partition('; ')[2] or sentence}")
    elif assigned:
        for table, ours, written in assigned:
            found.set(f"{table}.{ours}", value if written == "{value}" else json.loads(written), key)
    else:
        found.refused.append(f"{key} = {_show(value)}: it {sentence}")


def _set_model(found: ImportedRecipe, key: str, name: str) -> None:
    """The model; of Unsloth's copies, whose layers are split as Llama's, the original."""
    short = re.sub(r"(-unsloth)?(-bnb-4bit|-gguf)?$", "", name.rpartition("/")[2].lower()).replace("-v0", "")
    original = nearest_known(f"microsoft/{short}") if name.startswith("unsloth/") else None
    if original and known_config(original):
        found.set("model.name", original, f"{key} = {name}, a copy with other layers, of which this is the original")
    else:
        found.set("model.name", name, key)


def _set_targets(found: ImportedRecipe, key: str, value: Any) -> None:
    """Layers by phi3's names: q, k and v are qkv_proj, gate and up gate_up_proj; all four are all-linear."""
    names = re.split(r"\s*,\s*", value) if isinstance(value, str) else value
    fused = list(dict.fromkeys(FUSED.get(name, name) for name in names))
    is_all = names in (["all"], ["all-linear"]) or set(fused) >= {*FUSED.values(), "o_proj", "down_proj"}
    found.set("lora.target_modules", "all-linear" if is_all else fused, key)


def _set_datasets(found: ImportedRecipe, key: str, value: Any) -> None:
    """Axolotl's list of data: path, type, split; other keys of an entry are refused by name."""
    entries = [entry if isinstance(entry, dict) else {"path": entry} for entry in value] if isinstance(value, list) else [{}]
    place, known = (
        ("data.eval" if key == "test_datasets" else "data.train"),
        {"path", "type", "split", "ds_type", "field_messages", "name"},
    )
    paths = [str(entry["data_files"] if isinstance(entry.get("data_files"), str) else entry.get("path")) for entry in entries]
    found.set(place, paths if len(paths) > 1 else paths[0], f"{key}.path")
    formats = {"alpaca": "alpaca", "completion": "text", "sharegpt": "sharegpt"}
    first = entries[0]
    for name, item in ((name, item) for entry in entries for name, item in entry.items()):
        if name == "type" and item in formats:
            found.set("data.format", formats[item], f"{key}.type")
        elif name == "field_messages" and item != "messages":
            found.set("data.format", "messages", f"{key}.{name}")
            found.set("data.fields", {"messages": item}, f"{key}.{name}")
        elif name in ("split", "name") and len(entries) == 1:
            found.set({"split": "data.split", "name": "data.subset"}[name], first[name], f"{key}.{name}")
        elif name not in known | {"data_files"} or (name == "type" and item != "chat_template"):
            found.refused.append(f"{key}.{name} = {_show(item)}: write it in [data] with format and fields")


def _set_names(found: ImportedRecipe, key: str, value: Any) -> None:
    """LLaMA-Factory's and TRL's data: several names with commas; a name of dataset_info.json becomes a file or a hub id."""
    names = [name.strip() for name in str(value).split(",")]
    found.set("data.train", names if len(names) > 1 else names[0], key)
    if known := [name for name in names if "/" not in name and not Path(name).suffix]:
        found.refused.append(f"{key} = {', '.join(known)}: a name that only the other program knows; write the file or a hub id")


def _set_bits(found: ImportedRecipe, key: str, value: Any) -> None:
    if key == "quantization_bit" and value == 4:
        found.set("quantization.load_in_4bit", True, key)
    elif value:
        found.refused.append(f"{key} = {_show(value)}: 8 bit is not offered; [quantization] load_in_4bit = true is, or 16 bit")
    else:
        found.not_needed.append(f"{key} = {_show(value)}: it is off, as it is here")


def _set_share(found: ImportedRecipe, key: str, value: Any) -> None:
    """So many evaluations or checkpoints an epoch: `_complete` makes it a share of all steps, when the epochs are known."""
    found.set(f"training.{key[:4]}_steps", str(value), key)


def _set_low_rate(found: ImportedRecipe, key: str, value: Any) -> None:
    found.set("training.lr_scheduler_kwargs", {"min_lr_rate": value}, key)
    found.keys["training", "lr_scheduler_type"] = ("cosine_with_min_lr", f"{found.peer}: {key}")


def _show(value: Any) -> str:
    if isinstance(value, str | int | float | list | dict) and value is not None:
        try:
            return format_toml(value)
        except (ValueError, TypeError):
            pass
    return repr(value)


#: Key -> what converts it, where no table of names does.
SPECIAL: dict[str, Any] = {
    **dict.fromkeys(("lora_target", "lora_target_modules", "target_modules"), _set_targets),
    **dict.fromkeys(("datasets", "test_datasets"), _set_datasets),
    **dict.fromkeys(("dataset", "dataset_name"), _set_names),
    **dict.fromkeys(("quantization_bit", "load_in_8bit"), _set_bits),
    **dict.fromkeys(("evals_per_epoch", "saves_per_epoch"), _set_share),
    "cosine_min_lr_ratio": _set_low_rate,
}
