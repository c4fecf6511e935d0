"""The names people write in a recipe that are not its keys, and the key that was meant.

Removed, renamed, or from another tool: each entry says what to write instead, so that a dictionary pasted from a 2024
notebook is mended by reading our messages.

What pydantic found wrong with a recipe, told in the words of the file: table, key, value, what is expected.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

#: A name that is refused -> what became of it and what to write. `{value}` stands for the value in the file.
REPLACED = {
    # gone from transformers 5 and trl 1
    "warmup_ratio": "was removed: write [training] warmup_steps = {value} (below 1 it is a share of all steps).",
    "group_by_length": "was removed: write [training] packing = true, which leaves no padding to save.",
    "length_column_name": "is not needed: write [training] packing = true, which leaves no padding to save.",
    "train_sampling_strategy": "is not needed: write [training] packing = true, which leaves no padding to save.",
    "evaluation_strategy": "was renamed: write [training] eval_strategy = {value}.",
    "max_seq_length": "was renamed: write [training] max_length = {value}.",
    "overwrite_output_dir": "was removed: delete it; every run gets a folder of its own under output_dir.",
    "per_gpu_train_batch_size": "was renamed: write [training] per_device_train_batch_size = {value}.",
    "per_gpu_eval_batch_size": "was renamed: write [training] per_device_eval_batch_size = {value}.",
    "save_safetensors": "was removed: delete it; adapters are always safetensors.",
    "logging_dir": "was removed: delete it; figures are written into the run's folder.",
    "no_cuda": 'was removed: delete it; for 32-bit arithmetic write [quantization] bnb_4bit_compute_dtype = "float32".',
    # renamed here and there
    "torch_dtype": "was replaced: write [quantization] bnb_4bit_compute_dtype = {value}.",
    "dtype": "was replaced: write [quantization] bnb_4bit_compute_dtype = {value}.",
    "activation_checkpointing": "is written [training] gradient_checkpointing = {value} here.",
    "activation_checkpointing_kwargs": "is written [training] gradient_checkpointing_kwargs = {value} here.",
    "auto_find_batch_size": 'was replaced: write [training] per_device_train_batch_size = "auto".',
    "assistant_only_loss": 'was replaced: write [data] loss_on = "assistant".',
    "completion_only_loss": 'was replaced: write [data] loss_on = "assistant".',
    "train_on_inputs": 'was replaced: write [data] loss_on = "assistant" or "all".',
    "chat_template_path": "was replaced: write [data] chat_template = {value}.",
    "dataset_text_field": 'was replaced: write [data] format = "text" and fields = { text = {value} }.',
    "load_in_8bit": "is not offered: write [quantization] load_in_4bit = true, or false for 16 bit.",
    # always so here
    "use_cache": "is not needed: delete it; the cache is always off while training.",
    "trust_remote_code": "is not needed: delete it; transformers has this model built in.",
    "device_map": "is not needed: delete it; the device is found.",
    "do_train": "is not needed: delete it; a run always trains.",
    "inference_mode": "is not needed: delete it; a run always trains.",
    "peft_type": "is not needed: delete it; the adapter is always LoRA.",
    "metric_for_best_model": "is not needed: delete it; the best checkpoint is the one with the lowest held-out loss.",
    "greater_is_better": "is not needed: delete it; the best checkpoint is the one with the lowest held-out loss.",
}


#: What other tools and everyday speech call a key.
ALIASES = {
    "rank": "r",
    "lora_r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "batch_size",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "sample_packing": "packing",
    "model_name": "name",
    "model_id": "name",
    "base_model": "name",
    "model_name_or_path": "name",
    "dataset": "train",
    "dataset_name": "train",
    "train_file": "train",
    "validation": "eval",
    "val_set_size": "eval_size",
    "test_size": "eval_size",
    "template": "chat_template",
}


def find_nearest(name: str, choices: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The choice most like `name`, or None where none is alike."""
    return next(iter(difflib.get_close_matches(name, choices, n=1, cutoff=cutoff)), None)


def suggest_key(table: str, name: str, keys_by_table: Mapping[str, Sequence[str]]) -> str:
    """One sentence that leads from an unknown key to the one that was meant, here or in another table."""
    meant = ALIASES.get(name, name)
    homes = [other for other, keys in keys_by_table.items() if meant in keys]
    if homes and table not in homes:
        return f"It belongs to [{homes[0]}]." if meant == name else f"Did you mean '{meant}' in [{homes[0]}]?"
    for other, keys in sorted(keys_by_table.items(), key=lambda item: item[0] != table):
        spellings = {key: key for key in keys} | {alias: key for alias, key in ALIASES.items() if key in keys}
        nearest = find_nearest(name, list(spellings), cutoff=0.6 if other == table else 0.8)
        if nearest:
            return f"Did you mean '{spellings[nearest]}'?" + ("" if other == table else f" It belongs to [{other}].")
    return "`qlora-phi3 recipe schema` lists every key."


#: Why the only values of a key are the only ones.
REASONS = {
    (
        "training",
        "gradient_checkpointing_kwargs",
    ): "The reentrant kind needs inputs with a gradient; 4-bit ones have none.",
    ("training", "remove_unused_columns"): "Only token ids ever reach the model.",
    ("lora", "task_type"): "The Phi-3 family generates text.",
    ("lora", "init_lora_weights"): "The other starts change the base, and their adapter fits that base alone.",
    ("memory", "checkpoint_every_n_layers"): "To recompute none write [training] gradient_checkpointing = false.",
    ("model", "attn_implementation"): "sdpa does flash-attn's work without a build step.",
}


BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong; `table` and `key` are empty where it concerns the whole."""

    table: str
    key: str
    sentence: str


def format_toml(value: object) -> str:
    """A value as TOML writes it on one line: strings, numbers, booleans, lists and inline tables."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # JSON's escapes are TOML's, but for the one control character JSON leaves alone
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(format_toml, value))}]"
    if isinstance(value, dict):
        pairs = (f"{k if BARE_KEY.fullmatch(k) else format_toml(k)} = {format_toml(v)}" for k, v in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    return str(value)


def find_problems(
    error: ValidationError, raw: Mapping[str, Any], tables: Mapping[str, type[BaseModel]]
) -> Iterator[Problem]:
    """Yield each problem once, in the order of the tables, one sentence each.

    Args:
        error: of validating `raw` as a recipe.
        raw: the tables as they were read.
        tables: name to model of every table there is.
    """
    told = set()
    for detail in error.errors(include_url=False):
        table, key = (*map(str, detail["loc"][:2]), "", "")[:2]
        if detail["type"] == "default_factory_not_called" or (key and (table, key) in told):
            continue
        told.add((table, key))
        if detail["type"] == "value_error" and not key:
            where = f"[{table}] " if table else ""
            yield from (Problem(table, "", where + line) for line in str(detail["ctx"]["error"]).splitlines())
        else:
            yield Problem(table, key, _sentence(detail, table, key, raw, tables))


def _is_key(tables: Mapping[str, type[BaseModel]], table: str, key: str) -> bool:
    return table in tables and key in tables[table].model_fields


def _sentence(detail: Any, table: str, key: str, raw: Mapping[str, Any], tables: Mapping[str, type[BaseModel]]) -> str:
    if not key:
        return _table_sentence(table, raw, tables)
    if detail["type"] == "missing" and len(detail["loc"]) == 2:
        return f"[{table}] needs {key}: {tables[table].model_fields[key].description}"
    value = format_toml(raw[table][key])
    if not _is_key(tables, table, key):
        return f"[{table}] {_unknown_key(table, key, value, tables)}"
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    return f"[{table}] {key} = {shown} {_expectation(detail, table, key, raw[table][key], tables)}"


def _table_sentence(table: str, raw: Mapping[str, Any], tables: Mapping[str, type[BaseModel]]) -> str:
    """A table that is missing, misspelt, no table, or a key that stands outside of every table."""
    if table in tables and table in raw:
        return f"{table} = {format_toml(raw[table])} must be a table: write [{table}] and its keys below it."
    if table in tables:
        return f"There is no table [{table}], and a recipe needs it, with {_required_keys(tables[table])} at least."
    if not isinstance(raw[table], dict):
        return f"{table} stands outside of every table. {_meant('', table, format_toml(raw[table]), tables)}"
    nearest = find_nearest(table, list(tables))
    hint = f"Did you mean [{nearest}]?" if nearest else f"There are {', '.join(f'[{name}]' for name in tables)}."
    return f"A recipe has no table [{table}]. {hint}"


def _required_keys(table: type[BaseModel]) -> str:
    return ", ".join(name for name, field in table.model_fields.items() if field.is_required())


def _unknown_key(table: str, key: str, value: str, tables: Mapping[str, type[BaseModel]]) -> str:
    if key in REPLACED:
        return f"{key} {REPLACED[key].replace('{value}', value)}"
    return f"has no key '{key}'. {_meant(table, key, value, tables)}"


def _meant(table: str, key: str, value: str, tables: Mapping[str, type[BaseModel]]) -> str:
    if key in REPLACED:
        return f"It {REPLACED[key].replace('{value}', value)}"
    return suggest_key(table, key, {name: list(model.model_fields) for name, model in tables.items()})


def _expectation(detail: Any, table: str, key: str, value: object, tables: Mapping[str, type[BaseModel]]) -> str:
    if detail["type"] == "value_error":
        told = f"{str(detail['ctx']['error']).rstrip('.')}."
    else:
        schema = tables[table].model_json_schema()
        expected = schema["properties"][key]
        told = f"must be {_in_words(expected, schema.get('$defs', {}))}."
        nearest = find_nearest(value, list(_words(expected))) if isinstance(value, str) else None
        told += f" Did you mean {format_toml(nearest)}?" if nearest else ""
        told += _without_quotes(table, key, value, tables)
        told += " It is empty." if value in ("", []) else ""
    return " ".join(filter(None, (told, REASONS.get((table, key)))))


def _without_quotes(table: str, key: str, value: object, tables: Mapping[str, type[BaseModel]]) -> str:
    """The cure where the text in quotes is a number or a truth value that the key takes."""
    try:
        plain = tomllib.loads(f"value = {value}")["value"] if isinstance(value, str) and "\n" not in value else None
    except tomllib.TOMLDecodeError:
        return ""
    if not isinstance(plain, bool | int | float):
        return ""
    try:
        tables[table].model_validate({key: plain})
    except ValidationError as error:
        if any(detail["loc"][:1] == (key,) for detail in error.errors(include_url=False)):
            return ""
    return f" Write it without quotes: {key} = {value}"


def _words(schema: Mapping[str, Any]) -> Iterator[str]:
    """The words a key may hold, wherever in its schema they stand."""
    yield from (word for word in (*schema.get("enum", ()), schema.get("const")) if isinstance(word, str))
    for part in schema.get("anyOf", ()):
        yield from _words(part)


def _in_words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A JSON schema as the end of the sentence "… must be"."""
    if "$ref" in schema:
        return _in_words(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        parts = [part for part in schema["anyOf"] if part.get("type") != "null"]
        if any(part.get("type") == "number" for part in parts):  # which takes whole numbers as well
            parts = [part for part in parts if part.get("type") != "integer"]
        return " or ".join(
            "a list of such" if part.get("items") in parts else _in_words(part, definitions) for part in parts
        )
    if "const" in schema:
        return format_toml(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(map(format_toml, schema["enum"]))
    return _type_in_words(schema, definitions) + _bounds_in_words(schema)


def _type_in_words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    match schema.get("type"):
        case "integer":
            return "a whole number"
        case "number":
            return "a number"
        case "boolean":
            return "true or false"
        case "array":
            return f"a list, each {_in_words(schema['items'], definitions)}"
        case "object" if "properties" in schema:
            pairs = (f"{name} = {_in_words(part, definitions)}" for name, part in schema["properties"].items())
            return f"{{ {', '.join(pairs)} }}"
        case "object":
            inner = schema.get("additionalProperties")
            return "a table" + (f", each {_in_words(inner, definitions)}" if isinstance(inner, dict) else "")
        case _:
            return "text in quotes"


def _bounds_in_words(schema: Mapping[str, Any]) -> str:
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    told = [f"{word} {schema[name]}" for name, word in words.items() if name in schema]
    return f" {' and '.join(told)}" if told else ""
