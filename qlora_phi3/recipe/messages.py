"""Messages about a recipe: pydantic's errors in the terms of the file, with the key that was probably meant.

Names from older library versions and from other tools are in `REPLACED` and `ALIASES`, each with what to write instead, so that
a dictionary pasted from a 2024 notebook can be corrected by reading the messages.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from qlora_phi3.recipe.edit import format_toml

#: Names that are refused, and what to write instead; `{value}` stands for the value in the file.
REPLACED = {
    # removed from transformers 5 and trl 1
    "warmup_ratio": "was removed: write [training] warmup_steps = {value} (below 1 it is a share of all steps).",
    "group_by_length": "was removed: write [training] packing = true, which leaves no padding to save.",
    "length_column_name": "is not needed: write [training] packing = true, which leaves no padding to save.",
    "train_sampling_strategy": "is not needed: write [training] packing = true, which leaves no padding to save.",
    "evaluation_strategy": "was renamed: write [training] eval_strategy = {value}.",
    "max_seq_length": "was renamed: write [training] max_length = {value}.",
    "overwrite_output_dir": "was removed: delete it; every run has its own folder under output_dir.",
    "per_gpu_train_batch_size": "was renamed: write [training] per_device_train_batch_size = {value}.",
    "per_gpu_eval_batch_size": "was renamed: write [training] per_device_eval_batch_size = {value}.",
    "save_safetensors": "was removed: delete it; adapters are always safetensors.",
    "logging_dir": "was removed: delete it; metrics are written to the run's folder.",
    "no_cuda": 'was removed: delete it; for 32-bit arithmetic write [quantization] bnb_4bit_compute_dtype = "float32".',
    # other names of the same setting
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
    # fixed in this program
    "use_cache": "is not needed: delete it; the cache is always off in training.",
    "trust_remote_code": "is not needed: delete it; transformers has this model built in.",
    "device_map": "is not needed: delete it; the device is chosen.",
    "do_train": "is not needed: delete it; a run always trains.",
    "inference_mode": "is not needed: delete it; a run always trains.",
    "peft_type": "is not needed: delete it; the adapter is always LoRA.",
    "metric_for_best_model": "is not needed: delete it; the best checkpoint is the one with the lowest held-out loss.",
    "greater_is_better": "is not needed: delete it; the best checkpoint is the one with the lowest held-out loss.",
}
#: Other names of a key, from other tools and from everyday use.
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
#: Reasons for the keys that have one value only, or no value that people expect.
REASONS = {
    ("training", "gradient_checkpointing_kwargs"): "Reentrant checkpointing needs inputs with a gradient.",
    ("training", "remove_unused_columns"): "Only token ids reach the model.",
    ("lora", "task_type"): "The Phi-3 family generates text.",
    ("lora", "init_lora_weights"): "Other initializations change the base, and their adapter fits that base only.",
    ("memory", "checkpoint_every_n_layers"): "To recompute no layer, write [training] gradient_checkpointing = false.",
    ("model", "attn_implementation"): "sdpa does what flash-attn does, without a build step.",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a recipe; `table` and `key` are empty where it concerns the complete file or table."""

    table: str
    key: str
    sentence: str


def find_problems(
    error: ValidationError, raw: Mapping[str, Any], tables: Mapping[str, type[BaseModel]]
) -> Iterator[Problem]:
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
        elif key in REPLACED:
            instead = REPLACED[key].replace("{value}", format_toml(raw[table][key]))
            yield Problem(table, key, f"[{table}] {key} {instead}")
        else:
            yield Problem(table, key, f"[{table}] has no key '{key}'. {suggest_key(table, key, tables)}")


def _describe_table(table: str, raw: Mapping[str, Any], tables: Mapping[str, type[BaseModel]]) -> str:
    if table in tables and table in raw:
        return f"{table} = {format_toml(raw[table])} must be a table: write [{table}] and its keys below it."
    if table in tables:
        required = ", ".join(name for name, field in tables[table].model_fields.items() if field.is_required())
        return f"The table [{table}] is missing; it needs at least {required}."
    if not isinstance(raw[table], dict):
        instead = REPLACED.get(table, "").replace("{value}", format_toml(raw[table]))
        hint = f"It {instead}" if instead else suggest_key("", table, tables)
        return f"{table} is outside of every table. {hint}"
    nearest = find_nearest(table, list(tables))
    hint = f"Did you mean [{nearest}]?" if nearest else f"The tables are {', '.join(f'[{name}]' for name in tables)}."
    return f"A recipe has no table [{table}]. {hint}"


def _describe_value(table: str, key: str, value: object, details: Sequence[Any]) -> str:
    messages = []
    for detail in details:
        inner = f"{'.'.join(map(str, detail['loc'][2:]))}: " if isinstance(value, dict) and detail["loc"][2:] else ""
        message = detail["ctx"]["error"] if detail["type"] == "value_error" else detail["msg"]
        messages.append(inner + str(message).rstrip("."))
    text = format_toml(value)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    sentence = f"[{table}] {key} = {shown}: {'; or: '.join(dict.fromkeys(messages))}."
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
    for other, model in sorted(tables.items(), key=lambda item: item[0] != table):
        keys = model.model_fields
        spellings = {key: key for key in keys} | {alias: key for alias, key in ALIASES.items() if key in keys}
        if nearest := find_nearest(name, list(spellings), cutoff=0.6 if other == table else 0.8):
            return f"Did you mean '{spellings[nearest]}'?" + ("" if other == table else f" It belongs to [{other}].")
    return "`qlora-phi3 recipe schema` lists every key."


def find_nearest(name: str, choices: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The choice most similar to `name`, or None where none is similar."""
    return next(iter(difflib.get_close_matches(name, choices, n=1, cutoff=cutoff)), None)
