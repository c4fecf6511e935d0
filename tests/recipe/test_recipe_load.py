"""Recipes: what is read, what is refused, and where the problem is. The wording is checked in `messages/recipe.py`."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from qlora_phi3.errors import RecipeError
from qlora_phi3.recipe.edit import format_toml
from qlora_phi3.recipe.load import describe_unusual, load_recipe, recipe_as_toml, recipe_schema
from qlora_phi3.recipe.messages import ALIASES, REPLACED, suggest_key
from qlora_phi3.recipe.schema import TABLES, Recipe
from qlora_phi3.runfolder import run_group_name

SHORTEST = '[model]\nname = "base"\n[data]\ntrain = "chats.jsonl"\n'

SAMPLE_FINETUNE = {  # training_config and peft_config of Microsoft's sample_finetune.py, as they stand there
    "training": {
        "bf16": True, "do_eval": False, "learning_rate": 5.0e-06, "log_level": "info", "logging_steps": 20,
        "logging_strategy": "steps", "lr_scheduler_type": "cosine", "num_train_epochs": 1, "max_steps": -1,
        "output_dir": "./checkpoint_dir", "overwrite_output_dir": True, "per_device_eval_batch_size": 4,
        "per_device_train_batch_size": 4, "remove_unused_columns": True, "save_steps": 100, "save_total_limit": 1,
        "seed": 0, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "gradient_accumulation_steps": 1, "warmup_ratio": 0.2,
    },
    "lora": {
        "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": "all-linear", "modules_to_save": None,
    },
}  # fmt: skip
LORA_NOTEBOOK = {  # TrainingArguments and LoraConfig of the two CookBook notebooks, on a GPU with bfloat16
    "training": {
        "output_dir": "./phi-3-mini-LoRA", "evaluation_strategy": "steps", "do_eval": True, "optim": "adamw_torch",
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 8,
        "log_level": "debug", "save_strategy": "epoch", "logging_steps": 100, "learning_rate": 1e-4, "fp16": False,
        "bf16": True, "eval_steps": 100, "num_train_epochs": 3, "warmup_ratio": 0.1, "lr_scheduler_type": "linear",
        "report_to": "wandb", "seed": 42,
    },
    "lora": {
        "r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "task_type": "CAUSAL_LM",
        "target_modules": ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"],
    },
}  # fmt: skip
INFERENCE_NOTEBOOK = {
    "training": {
        "evaluation_strategy": "steps", "per_device_train_batch_size": 7, "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True, "learning_rate": 1e-4, "fp16": False, "bf16": True, "max_steps": -1,
        "num_train_epochs": 3, "save_strategy": "epoch", "logging_steps": 10, "output_dir": "new-model",
        "optim": "paged_adamw_32bit", "lr_scheduler_type": "linear", "max_seq_length": 128,
    },
}  # fmt: skip


def read(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    """The message and the hint of the error, without the folder."""
    with pytest.raises(RecipeError) as caught:
        read(folder, text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{folder / 'mine.toml'}", "mine.toml")


def as_toml(tables: dict[str, dict[str, object]]) -> str:
    """Tables in TOML, which has no None."""
    lines = []
    for table, keys in tables.items():
        lines += [f"[{table}]", *(f"{key} = {format_toml(value)}" for key, value in keys.items() if value is not None)]
    return "\n".join(lines)


# What is read


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.learning_rate=1", "Unusual, is it meant? [training] learning_rate = 1.0 (usual: 1e-06 to 0.01)"),
        ("training.learning_rate=1e-3", None),
        ("lora.r=1024", "Unusual, is it meant? [lora] r = 1024 (usual: 2 to 512)"),
    ],
)
def test_an_unusual_value_is_named_in_one_line(tmp_path: Path, override: str, line: str | None):
    assert describe_unusual(read(tmp_path, SHORTEST, override)) == line


def test_the_shortest_recipe_has_a_default_for_every_other_key(tmp_path: Path):
    recipe = read(tmp_path, SHORTEST)
    assert (recipe.training.batch_size, recipe.training.micro_batch_size, recipe.training.max_length) == (
        16,
        None,
        2048,
    )
    assert (recipe.quantization.load_in_4bit, recipe.compute_dtype, recipe.lora.target_modules) == (
        *(True, "auto"),
        "all-linear",
    )


def test_a_recipe_cannot_be_changed(tmp_path: Path):
    recipe = read(tmp_path, SHORTEST)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.lora.r = 3  # type: ignore[misc]


def test_a_whole_number_may_stand_for_a_float(tmp_path: Path):
    rate = read(tmp_path, SHORTEST + "[training]\nlearning_rate = 1").training.learning_rate
    assert (rate, type(rate)) == (1.0, float)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path):
    assert read(tmp_path, "\ufeff" + SHORTEST).model.name == "base"


def test_set_changes_a_key_and_takes_a_bare_word_as_a_string(tmp_path: Path):
    recipe = read(
        tmp_path,
        SHORTEST + "[lora]\nr = 8",
        *("lora.r=32", "training.optim=adamw_torch", "data.train=['a.csv', 'b.csv']", "lora.rank_pattern.o_proj=4"),
    )
    assert (recipe.lora.r, recipe.training.optim, recipe.data.train) == (32, "adamw_torch", ["a.csv", "b.csv"])
    assert recipe.lora.rank_pattern == {"o_proj": 4}


def test_a_table_that_does_not_exist_is_blamed_on_its_set(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"mine\.toml with --set lorra\.r=3: A recipe has no table \[lorra\]"):
        read(tmp_path, SHORTEST, "lorra.r=3")


def test_a_constant_schedule_has_no_warm_up_by_default(tmp_path: Path):
    assert read(tmp_path, SHORTEST, "training.lr_scheduler_type=constant").training.warmup_steps == 0
    assert read(tmp_path, SHORTEST).training.warmup_steps == 0.03


def test_without_do_eval_the_evaluation_strategy_is_no(tmp_path: Path):
    assert read(tmp_path, SHORTEST, "training.do_eval=false").training.eval_strategy == "no"


def test_batch_size_is_the_product_of_micro_batch_and_accumulation(tmp_path: Path):
    run = read(tmp_path, SHORTEST, "training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=4").training
    assert (run.batch_size, run.micro_batch_size) == (32, 8)


@pytest.mark.parametrize(("key", "micro"), [("per_device_train_batch_size=4", 4), ("gradient_accumulation_steps=2", 6)])
def test_micro_batch_or_accumulation_alone_divides_batch_size(tmp_path: Path, key: str, micro: int):
    run = read(tmp_path, SHORTEST, "training.batch_size=12", f"training.{key}").training
    assert (run.batch_size, run.micro_batch_size) == (12, micro)


def test_bf16_or_fp16_sets_the_compute_type(tmp_path: Path):
    assert read(tmp_path, SHORTEST, "training.bf16=true").compute_dtype == "bfloat16"
    assert read(tmp_path, SHORTEST, "training.fp16=true", "training.bf16=false").compute_dtype == "float16"


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=3", "training.bf16=true"),
        ("training.lr_scheduler_type=constant", "training.do_eval=false", "training.adam_epsilon=1e-12"),
        ("data.train='C:\\Users\\me\\a \"b\" é\t.jsonl'", "lora.rank_pattern={'layers.0.o_proj' = 4}"),
        ("lora.layers_to_transform=[0, 2]", "lora.init_lora_weights=gaussian", "lora.lora_alpha=2.5"),
    ],
)
def test_a_recipe_written_out_reads_back_equal(tmp_path: Path, overrides: tuple[str, ...]):
    recipe = read(tmp_path, SHORTEST, *overrides)
    text = recipe_as_toml(recipe)
    assert read(tmp_path, text) == recipe
    assert recipe_as_toml(read(tmp_path, text)) == text


def test_every_character_survives_being_written_as_toml(tmp_path: Path):
    name = "".join(map(chr, range(1, 129))) + "/" + "".join(map(chr, range(129, 256)))
    recipe = Recipe.model_validate({"model": {"name": name}, "data": {"train": "x"}})
    assert read(tmp_path, recipe_as_toml(recipe)).model.name == name


# Names of the ecosystem


def test_every_key_is_one_of_the_library_it_is_named_after():
    from peft import LoraConfig
    from peft.optimizers import create_loraplus_optimizer
    from transformers import BitsAndBytesConfig, EarlyStoppingCallback
    from trl import SFTConfig

    names = {key: set(TABLES[key].model_fields) for key in TABLES}
    assert names["lora"] <= {field.name for field in dataclasses.fields(LoraConfig)}
    callback, optimizer = EarlyStoppingCallback, create_loraplus_optimizer
    others = {key for function in (callback, optimizer) for key in inspect.signature(function).parameters}
    own = {"batch_size", "save_minutes", "recover_from_divergence", "report_samples"}
    assert names["training"] - own <= {*others, *(field.name for field in dataclasses.fields(SFTConfig))}
    assert names["quantization"] <= set(inspect.signature(BitsAndBytesConfig).parameters)


def test_choices_are_those_of_the_libraries_and_removed_names_are_gone_from_them():
    from transformers import SchedulerType
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.training_args import OptimizerNames
    from trl import SFTConfig

    keys = recipe_schema()["$defs"]["Training"]["properties"]
    assert set(keys["lr_scheduler_type"]["enum"]) == {kind.value for kind in SchedulerType}
    assert set(keys["optim"]["enum"]) - {"auto"} <= {kind.value for kind in OptimizerNames}
    assert set(keys["report_to"]["anyOf"][0]["enum"]) == {*INTEGRATION_TO_CALLBACK, "all", "none"}
    accepted = {field.name for field in dataclasses.fields(SFTConfig)}
    assert not accepted & {name for name, instead in REPLACED.items() if instead.startswith(("was removed", "was renamed"))}


def test_no_name_is_both_a_key_and_refused():
    keys = {key for table in TABLES.values() for key in table.model_fields}
    assert not keys & REPLACED.keys()
    assert set(ALIASES.values()) <= keys
    replacements = {key for instead in REPLACED.values() for key in re.findall(r"write \[\w+\] (\w+) =", instead)}
    assert replacements <= keys


#: Keys of configurations that people have, by the tool that reads them.
FOREIGN = """
base_model base_model_config model_type tokenizer_type trust_remote_code load_in_8bit datasets test_datasets
dataset_prepared_path val_set_size sequence_len sample_packing eval_sample_packing pad_to_sequence_len adapter lora_model_dir
lora_r lora_target_linear lora_target_modules lora_fan_in_fan_out lora_modules_to_save wandb_project wandb_entity wandb_watch
wandb_name wandb_log_model micro_batch_size num_epochs optimizer lr_scheduler train_on_inputs group_by_length tf32
local_rank resume_from_checkpoint xformers_attention flash_attention warmup_ratio evals_per_epoch
saves_per_epoch eval_table_size debug eval_max_new_tokens deepspeed fsdp fsdp_config special_tokens tokens hub_model_id
hf_use_auth_token peft_use_dora relora_steps loss_watchdog_threshold rl cosine_min_lr_ratio
roles_to_train train_on_eos dataset_processes bfloat16 model_name_or_path adapter_name_or_path stage do_train finetuning_type
lora_target lora_rank dataset dataset_dir template cutoff_len max_samples overwrite_cache preprocessing_num_workers plot_loss
overwrite_output_dir save_only_model val_size ddp_timeout eval_dataset quantization_bit double_quantization flash_attn
enable_liger_kernel use_unsloth rope_scaling neat_packing train_on_prompt mask_history streaming shift_attn upcast_layernorm
pure_bf16 disable_gradient_checkpointing additional_target model_name max_seq_length full_finetuning token
use_gradient_checkpointing random_state loftq_config dataset_num_proc fast_inference gpu_memory_utilization max_lora_rank
train_on_responses_only instruction_part response_part
"""


def test_the_keys_of_other_tools_have_a_replacement_or_are_to_be_deleted(tmp_path: Path):
    for key in FOREIGN.split():
        message = refusal(tmp_path, f'{key} = "qlora"\n' + SHORTEST)
        assert re.search(r"\bdelete it\b|(is written|write|was \w+:.*) \[|Did you mean '(\w+)'", message), message
        if found := re.search(r"Did you mean '(\w+)'", message):
            assert ALIASES[key] == found[1]


@pytest.mark.parametrize(
    ("key", "hint"),
    {
        "training.steps": "'max_steps' or 'warmup_steps' or 'eval_steps' or 'save_steps' or 'logging_steps'?",
        "training.warmup": "'warmup_steps'?",
        "training.length": "'max_length'?",
        "data.seed_split": "'split_seed'?",
        "lora.row": "'max_rows' or 'max_eval_rows'? It belongs to [data].",
    }.items(),
)
def test_a_word_of_a_key_leads_to_the_keys_that_have_it(tmp_path: Path, key: str, hint: str):
    table, _, name = key.partition(".")
    expected = f"[{table}] has no key '{name}'. Did you mean {hint}"
    assert refusal(tmp_path, SHORTEST, f"{key}=5") == f"--set {key}=5: {expected}"
    text = (
        SHORTEST.replace(f"[{table}]\n", f"[{table}]\n{name} = 5\n")
        if f"[{table}]" in SHORTEST
        else f"{SHORTEST}[{table}]\n{name} = 5"
    )
    assert refusal(tmp_path, text) == f"mine.toml: {expected}"


@pytest.mark.parametrize(("override", "hint"), [("max_steps=5", "training.max_steps=5"), ("r", "lora.r=32")])
def test_a_key_without_its_table_is_shown_with_it(tmp_path: Path, override: str, hint: str):
    assert refusal(tmp_path, SHORTEST, override) == f"--set {override} is not table.key=value. Write it like: --set {hint}"


def test_an_everyday_name_without_a_table_leads_to_its_key(tmp_path: Path):
    assert "Did you mean 'num_train_epochs' in [training]?" in refusal(tmp_path, SHORTEST, "epochs=2")
    assert "'eval_steps'" in refusal(tmp_path, SHORTEST, "steps=5")


def test_what_to_do_to_train_on_every_row_is_complete_and_names_the_set(tmp_path: Path):
    text = f'{SHORTEST}[training]\neval_strategy = "epoch"\nearly_stopping_patience = 2\n'
    message = refusal(tmp_path, text, "data.eval_size=0")
    assert message.startswith("mine.toml with --set data.eval_size=0: [data] eval_size = 0 ")
    for words in ("delete it", "do_eval = false", "delete eval_strategy, early_stopping_patience and load_best_model_at_end"):
        assert words in message
    message = refusal(tmp_path, text, "training.do_eval=false")
    assert message == (
        'mine.toml with --set training.do_eval=false: [training] do_eval = false and eval_strategy = "epoch" and '
        "early_stopping_patience = 2 contradict each other: delete do_eval, or the rest."
    )
    (tmp_path / "mine.toml").write_text(f"{SHORTEST}[training]\ndo_eval = false\n", encoding="utf-8")
    assert load_recipe(tmp_path / "mine.toml").training.eval_strategy == "no"


def test_no_key_of_the_libraries_is_led_to_another_one():
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    own = {key for table in TABLES.values() for key in table.model_fields}
    known = {field.name for config in (LoraConfig, SFTConfig) for field in dataclasses.fields(config)}
    known |= set(inspect.signature(BitsAndBytesConfig).parameters)
    for key in known - own - REPLACED.keys() - ALIASES.keys() - {"kwargs"}:  # of **kwargs
        assert {suggest_key(table, key, TABLES) for table in ("", *TABLES)} == {"`qlora-phi3 recipe schema` lists every key."}


def test_names_of_run_folders_stay_in_the_output_directory():
    names = ["chat.toml", ".toml", "..toml", "...toml", "..", "a.b.toml", "a", " .toml"]
    assert [run_group_name(Path(name)) for name in names] == ["chat", *["recipe"] * 4, "a.b", "a", "recipe"]


def test_the_output_directory_may_be_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert read(tmp_path, SHORTEST, "training.output_dir=~/runs").training.output_dir == "/home/someone/runs"


def test_an_override_is_one_value(tmp_path: Path):
    with pytest.raises(RecipeError):
        read(tmp_path, SHORTEST, "lora.r=8\nlora_alpha = 5")


def follow(messages: str, tables: dict[str, dict[str, object]]) -> None:
    """Follow each line of the messages: delete the key, or write another in its place."""
    for table, key, instead in re.findall(r"\[(\w+)\] (\w+) (was .*)", messages):
        value = tables[table].pop(key)
        if replacement := re.search(r"write \[(\w+)\] (\w+) =", instead):
            tables.setdefault(replacement[1], {})[replacement[2]] = value


@pytest.mark.parametrize("pasted", [SAMPLE_FINETUNE, LORA_NOTEBOOK, INFERENCE_NOTEBOOK])
def test_microsofts_dictionaries_load_after_following_the_messages(tmp_path: Path, pasted: dict[str, dict[str, object]]):
    tables = {"model": {"name": "base"}, "data": {"train": "x"}, **{name: dict(keys) for name, keys in pasted.items()}}
    follow(refusal(tmp_path, as_toml(tables)), tables)
    recipe = read(tmp_path, as_toml(tables))
    for table, keys in tables.items():
        for key, value in keys.items():
            if value is not None and key != "gradient_checkpointing_kwargs":
                assert getattr(getattr(recipe, table), key) == value
    assert recipe.compute_dtype == "bfloat16"


# What is refused


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("[lora]\nrnk = 8", ("[lora]", "'rnk'", "'r'")),
        ("[training]\nr = 8", ("[training]", "'r'", "[lora]")),
        ("[training]\nlora_alhpa = 8", ("'lora_alhpa'", "'lora_alpha'", "[lora]")),
        ("[training]\nlr = 1e-4", ("'lr'", "'learning_rate'")),
        ("[training]\nxyz = 8", ("'xyz'", "recipe schema")),
        ("[trainig]\nseed = 8", ("[trainig]", "[training]")),
        ("[wandb]\nseed = 8", ("[wandb]", *(f"[{name}]" for name in TABLES))),
    ],
)
def test_an_unknown_name_is_refused_with_the_one_that_was_meant(tmp_path: Path, line: str, parts: tuple[str, ...]):
    message = refusal(tmp_path, SHORTEST + line)
    assert message.startswith("mine.toml: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_key_outside_of_every_table_and_a_table_that_is_a_value_are_refused(tmp_path: Path):
    message = refusal(tmp_path, "learning_rate = 1e-4\nlora = 16\nmax_seq_length = 8\n" + SHORTEST)
    assert [line.split()[1] for line in message.splitlines()[1:]] == ["lora", "learning_rate", "max_seq_length"]
    assert "[training] max_length = 8" in message


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("warmup_ratio = 0.2", "[training] warmup_steps = 0.2 "),
        ("group_by_length = true", "[training] packing = true"),
        ('evaluation_strategy = "epoch"', '[training] eval_strategy = "epoch".'),
        ("max_seq_length = 512", "[training] max_length = 512."),
        ('torch_dtype = "float16"', '[quantization] bnb_4bit_compute_dtype = "float16".'),
        ("overwrite_output_dir = true", "delete it"),
    ],
)
def test_a_removed_name_is_refused_with_the_one_that_replaced_it(tmp_path: Path, line: str, instead: str):
    message = refusal(tmp_path, f"{SHORTEST}[training]\n{line}")
    assert message.startswith(f"mine.toml: [training] {line.partition(' ')[0]} ")
    assert instead in message


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("lora.r='16'", '[lora] r = "16": '),
        ("lora.r=true", "[lora] r = true: "),
        ("lora.r=0", "[lora] r = 0: "),
        ("lora.lora_alpha=true", "[lora] lora_alpha = true: "),
        ("lora.lora_dropout=1", "[lora] lora_dropout = 1: "),
        ("lora.use_dora=1", "[lora] use_dora = 1: "),
        ("lora.target_modules=[]", "[lora] target_modules = []: "),
        ("lora.rank_pattern={x = 'y'}", '[lora] rank_pattern = {x = "y"}: x: '),
        ("lora.init_lora_weights=pissa", '[lora] init_lora_weights = "pissa": '),
        ("model.name=", '[model] name = "": '),
        ("model.attn_implementation=flash_attention_2", '[model] attn_implementation = "flash_attention_2": '),
        ("data.eval_size=1.5", "[data] eval_size = 1.5: "),
        ("training.optim=paged_adamw", 'Did you mean "paged_adamw_8bit"?'),
        ("training.max_steps=0", "[training] max_steps = 0: "),
        ("training.max_length=7", "[training] max_length = 7: "),
        ("training.learning_rate=0", "[training] learning_rate = 0: "),
        ("training.learning_rate=inf", "[training] learning_rate = inf: "),
        ("training.warmup_steps=-1", "[training] warmup_steps = -1: "),
        ("training.gradient_checkpointing_kwargs.use_reentrant=true", "use_reentrant: "),
        ("memory.budget=11", '"11GiB"'),
        ("memory.budget=0", "[memory] budget = 0: "),
        ("memory.budget=11 apples", '[memory] budget = "11 apples": '),
        ("memory.logits_tile=1KiB", '[memory] logits_tile = "1KiB": '),
        ("memory.gpu=-1", "[memory] gpu = -1: "),
        ("memory.gpu=true", "[memory] gpu = true: "),
    ],
)
def test_a_wrong_value_is_one_line_with_the_table_the_key_and_the_value(tmp_path: Path, override: str, place: str):
    message = refusal(tmp_path, SHORTEST, override)
    assert message.startswith(f"--set {override}: ")
    assert place in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ("batch_size = 16\nper_device_train_batch_size = 4\ngradient_accumulation_steps = 2", ("4 x 2 = 8",)),
        ("batch_size = 16\nper_device_train_batch_size = 3", ("= 3 does not divide batch_size = 16",)),
        ("batch_size = 16\ngradient_accumulation_steps = 3", ("= 3 does not divide batch_size = 16",)),
        ("per_device_train_batch_size = 3", ("batch_size, for example 15",)),
        ("gradient_accumulation_steps = 32", ("batch_size, for example 32",)),
        ('lr_scheduler_type = "constant"\nwarmup_steps = 10', ("warmup_steps = 10", '"constant_with_warmup"')),
        ('lr_scheduler_type = "cosine_with_min_lr"', ("lr_scheduler_kwargs", "min_lr or min_lr_rate")),
        ('lr_scheduler_type = "greedy"\neval_strategy = "no"', ('"greedy"', "eval_strategy")),
        ('do_eval = false\neval_strategy = "steps"', ("do_eval = false", 'eval_strategy = "steps"')),
        ('save_strategy = "no"\nsave_minutes = 5', ('save_strategy = "no"', "save_minutes = 5")),
        ("save_steps = 0", ("save_steps = 0", 'save_strategy = "no"')),
        ('load_best_model_at_end = true\neval_strategy = "no"', ("load_best_model_at_end = true", "eval_strategy")),
        ("load_best_model_at_end = true\ndo_eval = false", ("load_best_model_at_end = true", "do_eval = false")),
        ("activation_offloading = true\ngradient_checkpointing = false", ("activation_offloading = true",)),
        ("bf16 = true\nfp16 = true", ("bf16 and fp16",)),
        ("bf16 = false", ("bf16 = false", "[quantization]")),
        ('bf16 = true\n[quantization]\nbnb_4bit_compute_dtype = "float32"', ("bf16 = true", '"float32"')),
        (
            "batch_size = 16\nper_device_train_batch_size = 16\n[memory]\nmicro_batch_tokens = 64",
            ("micro_batch_tokens = 64",),
        ),
        ('[lora]\ninit_lora_weights = "orthogonal"\nr = 3', ("r = 3", '"orthogonal"')),
        ("[data.fields]\ntext = 'x'", ("fields", "format")),
    ],
)
def test_keys_that_contradict_each_other_are_refused(tmp_path: Path, lines: str, parts: tuple[str, ...]):
    message = refusal(tmp_path, f"{SHORTEST}[training]\n{lines}")
    for part in parts:
        assert part in message


def test_an_evaluation_without_rows_is_refused(tmp_path: Path):
    message = refusal(tmp_path, SHORTEST, "data.eval_size=0")
    assert "[data] eval_size = 0 " in message
    assert "do_eval = false" in message


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_best_adapter_is_kept_whatever_the_checkpoints_are(tmp_path: Path, strategy: str):
    lines = f'load_best_model_at_end = true\nsave_strategy = "epoch"\neval_strategy = "{strategy}"\nsave_steps = 0.6'
    assert read(tmp_path, f"{SHORTEST}[training]\n{lines}").training.load_best_model_at_end


def test_every_problem_is_reported_at_once_and_where_it_comes_from(tmp_path: Path):
    text = "[lora]\nrnk = 8\nr = 0\n[training]\nsave_steps = 0"
    lines = refusal(tmp_path, text, "training.seed=-1", "data.trian=x").splitlines()
    assert lines[0] == "mine.toml has 7 problems:"
    starts = [
        "mine.toml: The table [model]",
        "mine.toml: [lora] r = 0: ",
        "mine.toml: [lora] has no key 'rnk'. ",
        f"mine.toml: [data] needs train: {TABLES['data'].model_fields['train'].description}",
        "--set data.trian=x: [data] has no key 'trian'. ",
        "--set training.seed=-1: [training] seed = -1: ",
        "mine.toml: [training] save_steps = 0 ",
    ]
    assert [line[: len(start)] for line, start in zip(lines[1:], starts, strict=True)] == starts


def test_keys_that_contradict_each_other_are_reported_together_with_wrong_values(tmp_path: Path):
    lines = "gradient_checkpointing = false\nseed = -1\n[memory]\ncheckpoint_every_n_layers = 2\nmicro_batch_tokens = 0"
    message = refusal(tmp_path, f"{SHORTEST}[training]\n{lines}")
    assert "mine.toml has 3 problems:" in message
    assert "[memory] checkpoint_every_n_layers needs [training] gradient_checkpointing" in message


@pytest.mark.parametrize("override", ["lora.r", "r=3", "lora=3", ".r=3", "lora.=3", "lora.r.x=3"])
def test_an_override_that_names_no_key_is_refused(tmp_path: Path, override: str):
    assert refusal(tmp_path, f"{SHORTEST}[lora]\nr = 3", override).startswith(f"--set {override}")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("lora.target_modules=[q_proj]", """'lora.target_modules=["q_proj"]'"""),
        ("data.train=['a.csv', b.csv]", """'data.train=["a.csv", "b.csv"]'"""),
        ("data.fields={output=answer}", "'data.fields={ ours"),
    ],
)
def test_a_list_of_an_override_that_is_not_toml_is_refused_with_one_that_is(tmp_path: Path, override: str, hint: str):
    message = refusal(tmp_path, SHORTEST, override)
    assert message.startswith(f"--set {override} is not TOML: ")
    assert hint in message


def test_an_override_that_only_begins_like_a_list_is_a_word(tmp_path: Path):
    assert read(tmp_path, SHORTEST, "lora.target_modules=[qo].*_proj").lora.target_modules == "[qo].*_proj"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ('learning_rate = "2e-4"', "learning_rate = 2e-4"),
        ('packing = "true"', "packing = true"),
        ('gradient_accumulation_steps = "4"', "gradient_accumulation_steps = 4"),
        ('learning_rate = "small"', ""),
        ('packing = "1"', ""),
    ],
)
def test_a_number_in_quotes_is_refused_with_the_line_to_write(tmp_path: Path, line: str, hint: str):
    message = refusal(tmp_path, f"{SHORTEST}[training]\n{line}")
    assert message.endswith(f"without quotes: {hint}") if hint else "without quotes" not in message


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("bf16 = True,", "TOML writes key = true"),
        ('"r": 16,', "TOML writes key = true"),
        ('train = "C:\\Users\\me\\chats.jsonl"', "Write paths with /"),
        ("r = = 3", "The line is: r = = 3"),
    ],
)
def test_a_file_that_is_not_toml_is_refused_with_the_line_and_a_hint(tmp_path: Path, line: str, hint: str):
    message = refusal(tmp_path, f"[lora]\n{line}\n")
    assert "at line 2, column" in message
    assert hint in message


# The schema and the start


def test_the_schema_describes_every_key_and_knows_no_null():
    schema = recipe_schema()
    assert list(schema["properties"]) == list(TABLES)
    for table in TABLES.values():
        definition = schema["$defs"][table.__name__]
        assert definition["additionalProperties"] is False
        for key, part in definition["properties"].items():
            assert len(part["description"]) > 10, key
            assert {"$ref", "anyOf", "const", "enum", "type"} & part.keys(), key
    assert "null" not in str(schema)
    assert "None" not in str(schema)


def test_a_bad_recipe_is_reported_before_torch_is_imported(tmp_path: Path):
    (tmp_path / "bad.toml").write_text("[lora]\nrnk = 8\n", encoding="utf-8")
    code = (
        "import sys; from pathlib import Path\n"
        "from qlora_phi3.errors import RecipeError; from qlora_phi3.recipe.load import load_recipe\n"
        "try: load_recipe(Path('bad.toml'))\n"
        "except RecipeError: print({'torch', 'transformers', 'numpy', 'rich'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
