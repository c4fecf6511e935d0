"""Configs of other programs as recipes: what a person would have written by hand, key by key."""

import json
from pathlib import Path

import pytest
from workshop import call

from qlora_phi3.errors import RecipeError
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.recipe.peers import import_recipe

AXOLOTL = """
base_model: microsoft/Phi-3-mini-4k-instruct
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
adapter: qlora
datasets:
  - path: chats.jsonl
    type: chat_template
    field_messages: conversation
    message_property_mappings: {role: from, content: value}
val_set_size: 0.02
output_dir: ./out
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
lora_r: 64
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: true
gradient_checkpointing: true
warmup_ratio: 0.1
evals_per_epoch: 2
saves_per_epoch: 1
early_bird: 3
wandb_project:
special_tokens:
  pad_token: "<|endoftext|>"
"""
LLAMA_FACTORY = """
### model
model_name_or_path: microsoft/Phi-4-mini-instruct
quantization_bit: 4
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all
### dataset
dataset: identity.json,alpaca_en_demo.json
template: phi4
cutoff_len: 1024
max_samples: 1000
preprocessing_num_workers: 16
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 500
plot_loss: true
mystery_switch: yes
"""
TRL = """
model_name_or_path: microsoft/Phi-3.5-mini-instruct
dataset_name: owner/chats
dataset_config: english
learning_rate: 2.0e-4
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
use_peft: true
load_in_4bit: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
packing: true
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
attn_implementation: flash_attention_2
push_to_hub: false
unheard_of: 7
"""
UNSLOTH = """
from unsloth import FastLanguageModel
import torch
max_seq_length = 2048
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = "unsloth/Phi-3-mini-4k-instruct-bnb-4bit", max_seq_length = max_seq_length, dtype = None, load_in_4bit = True,
)
model = FastLanguageModel.get_peft_model(
    model, r = 16, target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha = 16, lora_dropout = 0, bias = "none", use_gradient_checkpointing = "unsloth", random_state = 3407,
    use_rslora = False, loftq_config = None, shiny = 1,
)
dataset = load_dataset("philschmid/guanaco-sharegpt-style", split = "train")
trainer = SFTTrainer(
    model = model, tokenizer = tokenizer, train_dataset = dataset, dataset_text_field = "text",
    args = SFTConfig(
        per_device_train_batch_size = 2, gradient_accumulation_steps = 4, warmup_steps = 5, max_steps = 60,
        learning_rate = 2e-4, fp16 = not is_bfloat16_supported(), optim = "adamw_8bit", weight_decay = 0.01,
        lr_scheduler_type = "linear", seed = 3407, output_dir = "outputs",
    ),
)
raise SystemExit("never executed")
"""
MICROSOFT = """
import torch
training_config = {
    "bf16": True, "do_eval": False, "learning_rate": 5.0e-06, "log_level": "info", "logging_steps": 20,
    "lr_scheduler_type": "cosine", "num_train_epochs": 1, "max_steps": -1, "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True, "per_device_eval_batch_size": 4, "per_device_train_batch_size": 4,
    "remove_unused_columns": True, "save_steps": 100, "save_total_limit": 1, "seed": 0, "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "gradient_accumulation_steps": 1, "warmup_ratio": 0.2,
    "made_up": 1,
}
peft_config = {
    "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM",
    "target_modules": "all-linear", "modules_to_save": None,
}
checkpoint_path = "microsoft/Phi-3-mini-4k-instruct"
model_kwargs = dict(
    use_cache=False, trust_remote_code=True, attn_implementation="flash_attention_2", torch_dtype=torch.bfloat16, device_map=None
)
model = AutoModelForCausalLM.from_pretrained(checkpoint_path, **model_kwargs)
raw_dataset = load_dataset("HuggingFaceH4/ultrachat_200k")
"""


def imported(tmp_path, name, text):
    """The config converted; the recipe as it is read back from its file; and the names in the three lists."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = import_recipe(tmp_path / name)
    (tmp_path / "made.toml").write_text(found.as_toml(), encoding="utf-8")
    return found, load_recipe(tmp_path / "made.toml")


def names_in(lines):
    return {line.split(" ")[0].rstrip(":") for line in lines}


def test_axolotl(tmp_path):
    found, recipe = imported(tmp_path, "axolotl.yml", AXOLOTL)
    assert found.peer == "Axolotl"
    assert (recipe.model.name, recipe.quantization.load_in_4bit) == ("microsoft/Phi-3-mini-4k-instruct", True)
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (64, 32, 0.05)
    assert recipe.lora.target_modules == "all-linear"
    data, run = recipe.data, recipe.training
    assert (data.train, data.format, data.fields, data.eval_size) == (
        "chats.jsonl",
        "messages",
        {"messages": "conversation"},
        0.02,
    )
    assert (run.batch_size, run.max_length, run.packing, run.num_train_epochs) == (8, 4096, True, 4)
    assert (run.optim, run.lr_scheduler_type, run.learning_rate, run.warmup_steps) == ("paged_adamw_8bit", "cosine", 2e-4, 0.1)
    assert (run.eval_steps, run.save_steps) == (0.125, 0.25)  # 8 and 4 of the four epochs
    assert names_in(found.not_needed) >= {
        "model_type",
        "load_in_8bit",
        "pad_to_sequence_len",
        "tf32",
        "special_tokens",
        "adapter",
        "bf16",
    }
    assert names_in(found.refused) == {"early_bird"}
    assert "#   early_bird = 3" in found.as_toml()


def test_llama_factory(tmp_path):
    found, recipe = imported(tmp_path, "train.yaml", LLAMA_FACTORY)
    assert found.peer == "LLaMA-Factory"
    assert (recipe.model.name, recipe.quantization.load_in_4bit) == ("microsoft/Phi-4-mini-instruct", True)
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.target_modules) == (
        16,
        32,
        "all-linear",
    )  # alpha is twice the rank
    assert (recipe.data.train, recipe.data.max_rows, recipe.data.eval_size) == (
        ["identity.json", "alpaca_en_demo.json"],
        1000,
        0.1,
    )
    run = recipe.training
    assert (run.batch_size, run.max_length, run.packing, run.num_train_epochs, run.bf16) == (8, 1024, False, 3.0, True)
    assert (run.learning_rate, run.warmup_steps, run.eval_strategy, run.eval_steps) == (1e-4, 0.1, "steps", 500)
    assert names_in(found.not_needed) >= {
        "stage",
        "do_train",
        "finetuning_type",
        "template",
        "preprocessing_num_workers",
        "plot_loss",
    }
    assert names_in(found.refused) == {"mystery_switch"}


def test_trl(tmp_path):
    found, recipe = imported(tmp_path, "sft.yaml", TRL)
    assert found.peer == "TRL"
    assert (recipe.data.train, recipe.data.subset) == ("owner/chats", "english")
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (32, 16, 0.05)  # TRL's default dropout
    assert recipe.lora.target_modules == ["qkv_proj"]  # q_proj and v_proj are parts of it
    run = recipe.training
    assert (run.batch_size, run.max_length, run.num_train_epochs, run.lr_scheduler_type) == (8, 1024, 3, "linear")
    assert (run.do_eval, recipe.quantization.bnb_4bit_use_double_quant) == (False, False)
    assert names_in(found.not_needed) >= {"use_peft", "gradient_checkpointing_kwargs", "attn_implementation", "push_to_hub"}
    assert names_in(found.refused) == {"unheard_of"}


def test_unsloth(tmp_path):
    found, recipe = imported(tmp_path, "notebook.py", UNSLOTH)
    assert found.peer == "Unsloth"
    assert recipe.model.name == "microsoft/Phi-3-mini-4k-instruct"  # Unsloth's copy has Llama's layers
    assert (recipe.lora.r, recipe.lora.target_modules, recipe.lora.use_rslora) == (16, "all-linear", False)
    assert (recipe.data.train, recipe.data.split) == ("philschmid/guanaco-sharegpt-style", "train")
    run = recipe.training
    assert (run.batch_size, run.max_length, run.max_steps, run.warmup_steps) == (8, 2048, 60, 5)
    assert (run.seed, run.optim, run.weight_decay, run.gradient_checkpointing) == (3407, "adamw_8bit", 0.01, True)
    assert names_in(found.not_needed) >= {
        "model",
        "tokenizer",
        "train_dataset",
        "args",
        "loftq_config",
        "dtype",
        "dataset_text_field",
    }
    assert names_in(found.refused) == {"fp16", "shiny"}  # fp16 is computed there


def test_unsloth_notebook_and_nested_yaml(tmp_path):
    cells = [{"cell_type": "code", "source": ["%%capture\n", "!pip install unsloth\n"]}, {"cell_type": "code", "source": UNSLOTH}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert import_recipe(tmp_path / "a.ipynb").keys == import_recipe_of(tmp_path, "b.py", UNSLOTH).keys
    text = "model: unsloth/Phi-4-mini-instruct\ntraining:\n  max_seq_length: 512\n  batch_size: 2\n"
    text += "  gradient_accumulation_steps: 4\nlora:\n  lora_r: 8\n  lora_alpha: 8\n  random_state: 1\n"
    text += "data:\n  dataset: owner/chats\n"
    found, recipe = imported(tmp_path, "nested.yaml", text)
    assert (found.peer, recipe.model.name, recipe.lora.r) == ("Unsloth", "microsoft/Phi-4-mini-instruct", 8)
    assert (recipe.training.batch_size, recipe.training.seed) == (8, 1)


def test_a_key_that_is_left_out_has_the_other_programs_default(tmp_path):
    _, recipe = imported(tmp_path, "a.py", 'model = FastLanguageModel.from_pretrained("microsoft/phi-4")\n')
    run = recipe.training
    assert (run.batch_size, run.warmup_steps, run.weight_decay, run.seed) == (8, 0.1, 0.001, 3407)  # 4 rows, 2 times
    _, recipe = imported(tmp_path, "a.yml", "base_model: microsoft/phi-4\nsequence_len: 2048\n")
    run = recipe.training
    assert (run.batch_size, run.warmup_steps, run.num_train_epochs, run.lr_scheduler_type) == (1, 0.03, 1, "cosine")


def import_recipe_of(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return import_recipe(tmp_path / name)


@pytest.mark.parametrize(("name", "is_refused"), [("gpt2", True), ("microsoft/phi-2", True), ("me/my-phi3-chat", False)])
def test_a_model_that_nothing_calls_a_phi3_is_named(tmp_path, name, is_refused):
    found, recipe = imported(tmp_path, "a.yml", f"base_model: {name}\nsequence_len: 2048\n")
    assert recipe.model.name == name
    assert any("nothing says that it is of the Phi-3 family" in line for line in found.refused) == is_refused


def test_microsofts_dictionaries(tmp_path):
    found, recipe = imported(tmp_path, "sample_finetune.py", MICROSOFT)
    assert found.peer == "Microsoft"
    shipped = load_recipe(Path(__file__).parents[2] / "recipes" / "microsoft-sample-finetune.toml")
    assert (recipe.model.name, recipe.data.train) == ("microsoft/Phi-3-mini-4k-instruct", "HuggingFaceH4/ultrachat_200k")
    assert recipe.lora == shipped.lora
    assert recipe.quantization.load_in_4bit is False
    mine, theirs = recipe.training, shipped.training
    for key in ("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "batch_size", "save_steps", "seed"):
        assert getattr(mine, key) == getattr(theirs, key), key
    assert (mine.bf16, mine.do_eval, mine.gradient_checkpointing) == (True, False, True)
    assert names_in(found.refused) == {"made_up"}
    as_json = {"training_config": {"learning_rate": 5e-6, "per_device_train_batch_size": 4}, "peft_config": {"r": 16}}
    found, recipe = imported(tmp_path, "config.json", json.dumps(as_json))
    assert (recipe.lora.r, recipe.training.batch_size, recipe.training.learning_rate) == (16, 4, 5e-6)
    assert names_in(found.refused) == {"[model]", "[data]"}


def test_no_key_is_dropped(tmp_path):
    import yaml

    for text in (AXOLOTL, LLAMA_FACTORY, TRL):
        found = import_recipe_of(tmp_path, "a.yaml", text)
        listed = " ".join((*found.carried, *found.not_needed, *found.refused))
        assert [key for key in yaml.safe_load(text) if key not in listed] == []


def test_a_key_that_would_control_a_terminal_or_write_toml_stays_a_comment(tmp_path):
    text = 'base_model: microsoft/phi-4\nmicro_batch_size: 2\n"evil\\e[31m\\n[lora]\\nr = 7": "\\e[2J"\n'
    found, recipe = imported(tmp_path, "evil.yml", text)
    assert "\x1b" not in found.as_toml()
    assert recipe.lora.r == 16


@pytest.mark.parametrize("change", ["rl: dpo", "stage: dpo", "full_finetuning: true", "use_peft: false", "finetuning_type: full"])
def test_another_kind_of_training_is_refused(tmp_path, change):
    with pytest.raises(RecipeError):
        import_recipe_of(tmp_path, "a.yaml", f"{TRL}\n{change}\n")


def test_a_value_that_no_recipe_has_is_refused_by_name(tmp_path):
    found, recipe = imported(
        tmp_path, "a.yaml", AXOLOTL.replace("paged_adamw_8bit", "lion_8bit").replace("load_in_8bit: false", "load_in_8bit: true")
    )
    assert names_in(found.refused) == {"optimizer", "load_in_8bit", "early_bird"}
    assert recipe.training.optim == "auto"


def test_a_name_that_only_the_other_program_knows_is_refused_only_and_noted_by_the_check(shop):
    text = LLAMA_FACTORY + "\ndataset: my_chats\n"
    (shop.path / "lf.yaml").write_text(text, encoding="utf-8")
    found = import_recipe(shop.path / "lf.yaml")
    assert "dataset" in names_in(found.refused)
    assert "dataset" not in names_in(found.carried)
    shop.write(data={"train": "my_chats"})
    result = call("recipe", "check", "mine.toml")
    verdict, note, again = result.stderr.splitlines()
    assert note.startswith("Note: [data] names my_chats: no file here")
    assert verdict == again == "mine.toml is valid, but its data are not here: my_chats."
    shop.write()
    assert call("recipe", "check", "mine.toml").stderr == "mine.toml is fine.\n" * 2


def test_the_line_of_a_mistake_in_yaml_is_named(tmp_path):
    (tmp_path / "bad.yml").write_text("base_model: x\nlist: [1\nother: 2\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"bad.yml cannot be read: line 3: expected"):
        import_recipe(tmp_path / "bad.yml")


def test_the_command_lists_three_groups_and_overwrites_nothing(shop):
    (shop.path / "sft.yaml").write_text(TRL, encoding="utf-8")
    result = call("recipe", "import", "sft.yaml", "--out", "my.toml")
    assert result.exit_code == 0, result.stderr
    for title in ("Carried over (", "Not needed (", "REFUSED, for you to decide (1)"):
        assert title in result.stderr
    assert load_recipe(shop.path / "my.toml").lora.r == 32
    assert call("recipe", "import", "sft.yaml", "--out", "my.toml").exit_code == 2
    directory = call("recipe", "import", ".")
    assert (directory.exit_code, "--out" in directory.stderr) == (2, False)
