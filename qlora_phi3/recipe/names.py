"""The names people write in a recipe that are not its keys, and the key that was meant.

Removed, renamed, or from another tool: each entry says what to write instead, so that a dictionary pasted from a 2024
notebook is mended by reading our messages.
"""

import difflib
from collections.abc import Mapping, Sequence

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
