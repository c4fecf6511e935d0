"""Messages about a recipe: pydantic's errors in the terms of the file, with the key that was probably meant.

Names from older library versions and from other tools are in `REPLACED`, `DELETED` and `ALIASES`, with what to write instead, so
that a dictionary pasted from a 2024 notebook can be corrected by reading the messages.
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
    # other tools' names that need more than another name
    "datasets": 'is written [data] train = "FILE or hub id", with format and fields for its columns.',
    "test_datasets": 'is written [data] eval = "FILE or hub id".',
    "eval_dataset": "is written [data] eval = {value}; a name that only another tool knows becomes a file or a hub id.",
    **dict.fromkeys(
        ("lora_target", "lora_target_modules"),
        'is written [lora] target_modules = "all-linear"; in Phi-3 q, k and v are qkv_proj, gate and up gate_up_proj.',
    ),
    "lora_target_linear": 'is written [lora] target_modules = "all-linear".',
    "quantization_bit": "is written [quantization] load_in_4bit = true; 8 bit is not offered.",
    "val_size": "is written [data] eval_size = {value}.",
    "train_on_prompt": 'is written [data] loss_on = "all".',
    "train_on_responses_only": 'is written [data] loss_on = "assistant".',
    "disable_gradient_checkpointing": "is written [training] gradient_checkpointing = false.",
    "use_gradient_checkpointing": "is written [training] gradient_checkpointing = true.",
    "evals_per_epoch": "is written [training] eval_steps, a share of all steps below 1: 0.25 for four in a run of one epoch.",
    "saves_per_epoch": "is written [training] save_steps, a share of all steps below 1: 0.25 for four in a run of one epoch.",
    "cosine_min_lr_ratio": (
        'is written [training] lr_scheduler_type = "cosine_with_min_lr" and lr_scheduler_kwargs = { min_lr_rate = {value} }.'
    ),
    "resume_from_checkpoint": "is no key: delete it, and continue a run with qlora-phi3 run RECIPE --resume.",
    "auto_resume_from_checkpoints": "is no key: delete it, and continue a run with qlora-phi3 run RECIPE --resume.",
    "flash_attention": "is not needed: delete it; sdpa does what flash-attn does.",
    "use_wandb": 'was replaced: write [training] report_to = "wandb".',
    "pure_bf16": 'was replaced: write [quantization] bnb_4bit_compute_dtype = "bfloat16".',
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
#: Names that have no counterpart: the reason to delete them, and the names (Axolotl, LLaMA-Factory, TRL, transformers, Unsloth).
DELETED = {
    "the model and its tokenizer are recognized by their files": """
        model_type tokenizer_type tokenizer_config tokenizer_use_fast tokenizer_legacy base_model_config is_llama_derived_model
        is_mistral_derived_model model_init_kwargs model_max_length use_fast_tokenizer tokenizer_path tokenizer_name_or_path token
        hf_token hf_hub_token hf_use_auth_token full_finetuning
    """,
    "a run is supervised fine-tuning with LoRA": """
        stage finetuning_type rl do_predict predict_with_generate loss_type create_new_adapter task task_name dpo_beta pref_beta
        pref_loss kto_desirable_weight
    """,
    "the vocabulary and the special tokens stay the base's": """
        special_tokens tokens added_tokens_overrides resize_vocab resize_token_embeddings_to_32x new_special_tokens add_tokens
        add_special_tokens pad_token eos_token bos_token shrink_embeddings trainable_token_indices
    """,
    "the context length and its scaling are the base's": "rope_scaling rope_theta shift_attn s2_attention longlora",
    "one process trains on one GPU": """
        deepspeed fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb
        ddp_broadcast_buffers ddp_backend local_rank accelerator_config accelerator parallelism_config tensor_parallel_size
        sequence_parallel_degree context_parallel_size world_size num_gpus gpu_ids n_gpu ddp_static_graph tpu_num_cores
        tpu_metrics_debug split_batches average_tokens_across_devices max_memory
    """,
    "[data] loss_on decides which turns are learned, and a system turn stands in the rows": """
        roles_to_train train_on_eos train_on_eot default_system_message default_system instruction_part response_part
    """,
    "the memory plan and the kernels are chosen": """
        flash_attn flash_attention_2 use_flash_attention flash_optimum flash_attn_fuse_qkv flash_attn_fuse_mlp xformers_attention
        sdp_attention eager_attention unsloth use_unsloth enable_liger_kernel use_liger_kernel liger_kernel_config liger_rope
        liger_rms_norm liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy torch_compile torch_compile_backend
        torch_compile_mode tf32 jit_mode_eval use_ipex bf16_full_eval fp16_full_eval half_precision_backend fp16_opt_level
        fp16_backend gpu_memory_limit gpu_memory_utilization lora_on_cpu torch_empty_cache_steps low_cpu_mem_usage offload_folder
        upcast_layernorm upcast_lmhead_output use_cpu use_mps_device plugins optim_target_modules eval_accumulation_steps
        include_num_input_tokens_seen lora_mlp_kernel lora_qkv_kernel lora_o_kernel torch_autocast fast_inference use_reentrant_gc
        neat_packing
    """,
    "rows are read and packed without settings": """
        dataset_prepared_path dataset_dir dataset_processes dataset_num_proc dataset_keep_in_memory dataset_kwargs overwrite_cache
        preprocessing_num_workers preprocessing_batch_size dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor
        dataloader_persistent_workers dataloader_drop_last eval_packing eval_sample_packing sample_packing_eff_est
        sample_packing_seq_len_multiplier sample_packing_group_size sample_packing_bin_size packing_strategy pad_to_sequence_len
        pad_to_multiple_of padding_free streaming buffer_size total_num_tokens skip_prepare_dataset shuffle_merged_datasets
        mix_strategy interleave_probs batch_flattening truncation_mode padding_side ignore_data_skip shuffle_dataset
        dataloader_in_order dataloader_multiprocessing_context tokenized_path image_max_pixels video_max_pixels
    """,
    "only what the recipe names is trained": """
        neftune_noise_alpha loraplus_lr_ratio loraplus_lr_embedding relora_steps relora_warmup_steps label_smoothing_factor
        label_names past_index galore_rank use_galore use_badam pissa_init pissa_iter pissa_convert loftq_config corda_config
        eva_config layer_replication megatron_config megatron_core lora_bias fan_in_fan_out lora_fan_in_fan_out
        unfrozen_parameters freeze_trainable_layers mask_history layers_pattern peft_layers_pattern use_llama_pro optim_args
        lr_quadratic_warmup lr_div_factor lr_groups embedding_lr embedding_lr_scale loss_watchdog_threshold loss_watchdog_patience
        early_stopping_patience group_by_modality_length restore_callback_states_from_checkpoint full_determinism use_bdlora
        use_qalora qalora_group_size max_lora_rank alora_invocation_tokens arrow_config kasa_config lora_ga_config
        monteclora_config velora_config target_parameters ensure_weight_tying router_aux_loss_coef
    """,
    "metrics.jsonl and report.json hold every figure": """
        wandb_project wandb_entity wandb_watch wandb_name wandb_run_id wandb_mode wandb_log_model wandb_run_name run_name
        plot_loss logging_first_step logging_nan_inf_filter log_on_each_node log_level_replica mlflow_tracking_uri
        mlflow_experiment_name comet_project_name use_tensorboard trackio_space_id tensorboard_dir eval_table_size
        eval_max_new_tokens eval_max_table_size eval_causal_lm_metrics prediction_loss_only include_for_metrics
        include_inputs_for_metrics include_tokens_per_second batch_eval_metrics project profiler_steps debug skip_memory_metrics
        log_history eval_on_start eval_delay eval_do_concat_batches eval_use_gather_object
    """,
    "the run folder holds what is saved, and an export what is uploaded": """
        hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision auto_mapping peft_version push_to_hub
        push_to_hub_model_id push_dataset_to_hub save_only_model save_on_each_node export_dir merge_lora save_first_step
        enable_jit_checkpoint
    """,
    "bitsandbytes' default is the one that is tested": """
        bnb_4bit_quant_storage llm_int8_threshold llm_int8_skip_modules llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight
        quantization_method
    """,
}
REPLACED |= {name: f"has no place here: delete it; {reason}." for reason, names in DELETED.items() for name in names.split()}
#: Key -> its names in other tools and in everyday use.
OTHER_NAMES = {
    "r": "rank lora_r lora_rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "learning_rate": "lr",
    "num_train_epochs": "epochs num_epochs", "per_device_train_batch_size": "micro_batch_size",
    "batch_size": "train_batch_size", "optim": "optimizer", "lr_scheduler_type": "lr_scheduler",
    "max_length": "sequence_len cutoff_len", "packing": "sample_packing",
    "name": "model_name model_id base_model model_name_or_path base_model_name_or_path pretrained_model_name_or_path",
    "train": "dataset dataset_name train_file dataset_path", "eval": "validation eval_file",
    "eval_size": "val_set_size test_size", "chat_template": "template chat_template_jinja", "bf16": "bfloat16",
    "fp16": "float16", "seed": "random_state", "adapter": "lora_model_dir adapter_name_or_path",
    "modules_to_save": "lora_modules_to_save additional_target", "layers_to_transform": "peft_layers_to_transform",
    "use_dora": "peft_use_dora", "use_rslora": "peft_use_rslora", "init_lora_weights": "peft_init_lora_weights",
    "bnb_4bit_use_double_quant": "double_quantization", "per_device_eval_batch_size": "eval_batch_size",
    "max_rows": "max_samples", "bnb_4bit_quant_type": "quant_type", "bnb_4bit_compute_dtype": "compute_dtype",
    "split": "dataset_split",
}  # fmt: skip
ALIASES = {alias: key for key, aliases in OTHER_NAMES.items() for alias in aliases.split()}
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
        if nearest := find_nearest(name, list(spellings), cutoff=0.8 if other == table else 0.85):
            return f"Did you mean '{spellings[nearest]}'?" + ("" if other == table else f" It belongs to [{other}].")
    return "`qlora-phi3 recipe schema` lists every key."


def find_nearest(name: str, choices: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The choice most similar to `name`, or None where none is similar."""
    return next(iter(difflib.get_close_matches(name, choices, n=1, cutoff=cutoff)), None)
