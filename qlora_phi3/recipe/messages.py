"""Messages about a recipe: pydantic's errors in the terms of the file, with the key that was probably meant.

Keys from older library versions and from other tools are in `other_keys.toml`, with what to write instead.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from pydantic import BaseModel, ValidationError

from qlora_phi3.recipe.edit import format_toml

_OTHER_KEYS = tomllib.loads((files("qlora_phi3") / "other_keys.toml").read_text(encoding="utf-8"))
#: Reason to delete keys -> their names, separated by white space.
DELETED: dict[str, str] = _OTHER_KEYS["deleted"]
#: Key that is refused -> what to write instead; `{value}` stands for the value in the file.
REPLACED: dict[str, str] = _OTHER_KEYS["replaced"] | {
    name: f"has no place here: delete it; {reason}." for reason, names in DELETED.items() for name in names.split()
}
#: Name in other tools or in everyday use -> key.
ALIASES: dict[str, str] = {alias: key for key, names in _OTHER_KEYS["other_names"].items() for alias in names.split()}
#: Reasons for the keys that have one value only, or no value that people expect.
REASONS = {
    ("training", "gradient_checkpointing_kwargs"): "Reentrant checkpointing needs inputs with a gradient.",
    ("training", "remove_unused_columns"): "Only token ids reach the model.",
    ("lora", "task_type"): "The Phi-3 family generates text.",
    ("lora", "init_lora_weights"): (
        "PiSSA, OLoRA and CorDA move a part of the base into the adapter and quantize the rest anew: it fits no base that "
        'others have, and no export of it could be proved. In 4 bit, "loftq" corrects the base without changing it.'
    ),
    ("memory", "checkpoint_every_n_layers"): "To recompute no layer, write [training] gradient_checkpointing = false.",
    ("model", "attn_implementation"): "sdpa does what flash-attn does, without a build step.",
}


#: Kind of pydantic's error -> what the value must be.
EXPECTED = {
    "string_type": "a text in quotes", "string_too_short": "a text that is not empty", "literal_error": "{expected}",
    "bool_type": "true or false", "int_type": "a whole number", "float_type": "a number", "finite_number": "a finite number",
    "greater_than": "more than {gt:g}", "greater_than_equal": "{ge} or more", "less_than": "less than {lt:g}",
    "less_than_equal": "{le} or less", "list_type": "a list", "too_short": "a list that is not empty",
    "dict_type": "a table of keys and values", "model_type": "a table of keys and values",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a recipe; `table` and `key` are empty where it concerns the complete file or table."""

    table: str
    key: str
    sentence: str


def find_problems(error: ValidationError, raw: Mapping[str, Any], tables: Mapping[str, type[BaseModel]]) -> Iterator[Problem]:
    """Yield one problem for each key that pydantic refused in `raw`, in its order; `tables` has the model of each table."""
    by_key: dict[tuple[str, str], list[Any]] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] != "default_factory_not_called":
            table, key = (*map(str, detail["loc"][:2]), "", "")[:2]
            by_key.setdefault((table, key), []).append(detail)
    for (table, key), details in by_key.items():
        if not key and details[0]["type"] == "value_error":
            where = f"[{table}] " if table else ""
            yield from (Problem(table, "", where + line) for line in str(details[0]["ctx"]["error"]).splitlines())
        elif not key:
            yield Problem(table, "", _describe_table(table, raw, tables))
        elif details[0]["type"] == "missing" and len(details[0]["loc"]) == 2:
            yield Problem(table, key, f"[{table}] needs {key}: {tables[table].model_fields[key].description}")
        elif key in tables[table].model_fields:
            yield Problem(table, key, _describe_value(table, key, raw[table][key], details))
        elif instead := replacement(key, raw[table][key]):
            yield Problem(table, key, f"[{table}] {key} {instead}")
        else:
            yield Problem(table, key, f"[{table}] has no key '{key}'. {suggest_key(table, key, tables)}")


def _describe_table(table: str, raw: Mapping[str, Any], tables: Mapping[str, type[BaseModel]]) -> str:
    if table in tables and table in raw:
        return f"{table} = {format_toml(raw[table])} must be a table: write [{table}] and its keys below it."
    if table in tables:
        required = ", ".join(name for name, field in tables[table].model_fields.items() if field.is_required())
        return f"The table [{table}] is missing; it needs at least {required}."
    instead = replacement(table, raw[table])
    if not isinstance(raw[table], dict):
        hint = f"It {instead}" if instead else suggest_key("", table, tables)
        return f"{table} is outside of every table. {hint}"
    if instead:
        return f"A recipe has no table [{table}]. It {instead}"
    nearest = find_nearest(table, list(tables), cutoff=0.7)
    hint = f"Did you mean [{nearest}]?" if nearest else f"The tables are {', '.join(f'[{name}]' for name in tables)}."
    return f"A recipe has no table [{table}]. {hint}"


def replacement(key: str, value: object) -> str:
    """What `REPLACED` says about a key with this value; empty where it is not there."""
    if key == "adapter" and str(value).lower() in ("lora", "qlora"):  # Axolotl's kind of training, not a trained adapter
        return "has no place here: delete it; LoRA on a base with [quantization] load_in_4bit = true is QLoRA."
    text = REPLACED.get(key, "")
    return text.replace("{value}", format_toml(value)) if "{value}" in text else text


def _describe_value(table: str, key: str, value: object, details: Sequence[Any]) -> str:
    messages = []
    for detail in details:
        keys = [str(part) for part in detail["loc"][2:] if isinstance(value, dict) and part in value]
        inner = f"{'.'.join(keys)}: " if keys else ""
        message = detail["ctx"]["error"] if detail["type"] == "value_error" else detail["msg"]
        if words := EXPECTED.get(detail["type"]):
            message = f"it must be {words.format_map(detail.get('ctx', {}))}"
        messages.append(inner + str(message).rstrip("."))
    text = format_toml(value)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    reasons = "; or: ".join(dict.fromkeys(messages)).replace("; or: it must be", ", or")
    sentence = f"[{table}] {key} = {shown}: {reasons}."
    if isinstance(value, str):
        kinds = {detail["type"] for detail in details}
        expected = [str(detail["ctx"]["expected"]) for detail in details if detail["type"] == "literal_error"]
        if nearest := find_nearest(value, re.findall(r"'([^']+)'", " ".join(expected))):
            sentence += f" Did you mean {format_toml(nearest)}?"
        if ("bool_type" in kinds and value in ("true", "false")) or (
            kinds & {"int_type", "float_type"} and re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", value)
        ):
            sentence += f" Write it without quotes: {key} = {value}"
    return f"{sentence} {REASONS.get((table, key), '')}".rstrip()


def suggest_key(table: str, name: str, tables: Mapping[str, type[BaseModel]]) -> str:
    """One sentence that leads from an unknown key to the one that was probably meant, in this table or another.

    `table` is empty for a key outside of every table.
    """
    meant = ALIASES.get(name, name)
    homes = [other for other, model in tables.items() if meant in model.model_fields]
    if homes and table not in homes:
        return f"It belongs to [{homes[0]}]." if meant == name else f"Did you mean '{meant}' in [{homes[0]}]?"
    words = [rf"(^|_){re.escape(word.removesuffix('s'))}s?(_|$)" for word in name.split("_")]
    for other, model in sorted(tables.items(), key=lambda item: item[0] != table):
        keys = model.model_fields
        spellings = {key: key for key in keys} | {alias: key for alias, key in ALIASES.items() if key in keys}
        nearest = find_nearest(name, list(spellings), cutoff=0.8 if other == table else 0.85)
        found = [spellings[nearest]] if nearest else [key for key in keys if all(re.search(word, key) for word in words)]
        if found:
            shown = " or ".join(f"'{key}'" for key in sorted(found, key=lambda key: key.count("_"))[:5])
            return f"Did you mean {shown}?" + ("" if other == table else f" It belongs to [{other}].")
    return "`qlora-phi3 recipe schema` lists every key."


def find_nearest(name: str, choices: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The choice most similar to `name`, or None where none is similar."""
    return next(iter(difflib.get_close_matches(name, choices, n=1, cutoff=cutoff)), None)
