"""Messages about recipe files, `--set`, and the files that a recipe names."""

from contextlib import chdir
from dataclasses import replace
from pathlib import Path

from message_table import Message
from run_files import write_run

from qlora_phi3.cli.options import find_recipe
from qlora_phi3.errors import RecipeError, UserError
from qlora_phi3.family import StoredQuantization, read_architecture
from qlora_phi3.recipe.load import check_model_limits, load_recipe, use_stored_quantization
from qlora_phi3.recipe.peers import import_recipe

START = '[model]\nname = "microsoft/phi-4"\n[data]\ntrain = "owner/chats"\n'


def load(text, *overrides, check_files=False):
    """A trigger that loads a recipe of this text."""
    return lambda shop: load_recipe(shop.write(text), overrides, check_files=check_files)


def load_file(name, content=None):
    """A trigger that loads a file of this name and content."""

    def trigger(shop):
        (shop.path / "chat.toml").touch()
        if content is not None:
            Path(name).write_bytes(content)
        load_recipe(Path(name))

    return trigger


def import_file(name, text):
    """A trigger that imports a config of this name and text."""

    def trigger(shop):
        Path(name).write_text(text, encoding="utf-8")
        import_recipe(Path(name))

    return trigger


def check_limits(**changes):
    """A trigger that checks a recipe against a smaller model."""

    def trigger(shop):
        recipe = load_recipe(shop.write(START), ["memory.checkpoint_every_n_layers=2"])
        check_model_limits(recipe, replace(read_architecture("microsoft/phi-4", prefer_shipped=True), **changes))

    return trigger


def refused(name, trigger, says, hint, error=RecipeError):
    return Message(name=name, trigger=trigger, error=error, exit_code=2, says=says, hint=hint)


def stored(text, check=use_stored_quantization):
    """A trigger that checks a recipe against a base whose files are FP4."""
    fp4 = StoredQuantization(quant_type="fp4", double_quant=False, compute_dtype="float16", skip_modules=None)
    architecture = replace(read_architecture("microsoft/phi-4", prefer_shipped=True), stored=fp4)
    return lambda shop: check(load_recipe(shop.write(START + text)), architecture)


def name_a_run(shop):
    write_run(shop.path / "runs" / "mine" / "1")
    with chdir(shop.path):
        find_recipe(Path("runs/mine/latest"))


MESSAGES = [
    refused(
        "recipe-quantizes-a-stored-4-bit-base",
        stored('[quantization]\nbnb_4bit_quant_type = "nf4"'),
        ('bnb_4bit_quant_type = "nf4"', "FP4 without double quantization"),
        'bnb_4bit_quant_type = "fp4"',
        UserError,
    ),
    refused(
        "recipe-wants-a-stored-4-bit-base-unquantized",
        stored("[quantization]\nload_in_4bit = false"),
        ("load_in_4bit = false", "FP4"),
        "microsoft/phi-4",
        UserError,
    ),
    refused(
        "recipe-is-yaml", load_file("axolotl.yml", b"base_model: x\n"), ("axolotl.yml is YAML",), "recipe import axolotl.yml"
    ),
    refused("recipe-is-json", load_file("train.json", b'{"stage": "sft"}'), ("train.json is JSON",), "recipe import train.json"),
    refused("recipe-text-is-yaml", load("base_model: x\nlora_r: 8\n"), ("mine.toml is YAML",), "recipe import "),
    refused("recipe-nested-too-deeply", load("x = " + "[" * 900 + "]" * 900), ("mine.toml", "nested too"), "Correct"),
    refused("recipe-number-of-many-digits", load("x = " + "1" * 5000), ("mine.toml", "digits"), "Correct"),
    refused(
        "recipe-missing-template",
        load(START, "data.chat_template=phi5", check_files=True),
        ("[data] chat_template", "phi5"),
        "phi4-mini",
    ),
    refused("recipe-name-of-300-bytes", load(START, f"model.name={'x' * 300}"), ("[model] name",), "255 bytes"),
    refused("recipe-name-with-nul", load(START, 'data.train="a\\u0000b"'), ("[data] train",), "NUL"),
    refused("recipe-target-is-no-pattern", load(START, "lora.target_modules='('"), ("target_modules",), "expression"),
    refused(
        "recipe-key-of-another-tool-deleted",
        load(START, "training.deepspeed='ds.json'"),
        ("[training] deepspeed has no place here",),
        "delete it; one process trains on one GPU.",
    ),
    refused(
        "recipe-key-of-another-tool-replaced",
        load('lora_target = "all"\n' + START),
        ("lora_target is outside of every table",),
        '[lora] target_modules = "all-linear"',
    ),
    refused("recipe-kind-of-adapter", load('adapter = "qlora"\n' + START), ("adapter is outside",), "delete it"),
    refused("recipe-unknown-key", load(START + "[lora]\nrnk = 8"), ("[lora] has no key 'rnk'",), "Did you mean 'r'?"),
    refused("recipe-unknown-key-without-a-similar-one", load(START, "lora.xyz=8"), ("'xyz'",), "recipe schema"),
    refused("recipe-key-of-another-table", load(START, "training.r=8"), ("'r'", "[training]"), "It belongs to [lora]."),
    refused("recipe-alias-of-a-key", load(START, "data.alpha=8"), ("'alpha'",), "Did you mean 'lora_alpha' in [lora]?"),
    refused(
        "recipe-removed-key",
        load(START, "training.warmup_ratio=0.2"),
        ("[training] warmup_ratio was removed",),
        "write [training] warmup_steps = 0.2",
    ),
    refused("recipe-unknown-table", load(START, "trainig.seed=8"), ("[trainig]",), "Did you mean [training]?"),
    refused("recipe-unknown-table-without-a-similar-one", load(START, "wandb.seed=8"), ("[wandb]",), "[quantization]"),
    refused(
        "recipe-key-outside-of-every-table",
        load("learning_rate = 1\n" + START),
        ("learning_rate is outside of every table",),
        "It belongs to [training].",
    ),
    refused(
        "recipe-removed-key-outside-of-every-table",
        load("max_seq_length = 8\n" + START),
        ("max_seq_length is outside of every table",),
        "write [training] max_length = 8",
    ),
    refused("recipe-value-in-place-of-a-table", load("lora = 16\n" + START), ("lora = 16",), "write [lora] and its keys"),
    refused("recipe-missing-table", load(START.partition("[data]")[0]), ("The table [data] is missing",), "train"),
    refused("recipe-missing-key", load("[model]\n[data]\ntrain = 'x'"), ("[model] needs name",), "Hub id or folder"),
    refused("recipe-wrong-type", load(START, "lora.r=true"), ("[lora] r = true",), "it must be a whole number."),
    refused("recipe-wrong-number", load(START, "lora.r=0"), ("[lora] r = 0",), "it must be 1 or more."),
    refused(
        "recipe-value-of-several-types",
        load(START, "training.max_steps=0"),
        ("[training] max_steps = 0",),
        "it must be -1, or 1 or more.",
    ),
    refused(
        "recipe-wrong-word",
        load(START, "training.optim=paged_adamw"),
        ('[training] optim = "paged_adamw"', "'adamw_torch'"),
        'Did you mean "paged_adamw_8bit"?',
    ),
    refused(
        "recipe-number-in-quotes",
        load(START, "lora.r='16'"),
        ('[lora] r = "16"', "a whole number"),
        "Write it without quotes: r = 16",
    ),
    refused(
        "recipe-value-with-a-reason",
        load(START, "model.attn_implementation=flash_attention_2"),
        ('attn_implementation = "flash_attention_2"', "'sdpa' or 'eager'"),
        "without a build step",
    ),
    refused("recipe-size-without-unit", load(START, "memory.budget=11"), ("[memory] budget = 11",), 'write "11GiB"'),
    refused("recipe-size-of-zero", load(START, "memory.budget=0"), ("[memory] budget = 0",), "more than zero"),
    refused("recipe-text-that-is-no-size", load(START, "memory.budget=big"), ('budget = "big"',), "such as 11GiB"),
    refused("recipe-logits-tile", load(START, "memory.logits_tile=1KiB"), ('"1KiB"',), '"1MiB" to "16GiB"'),
    refused("recipe-share-or-count", load(START, "data.eval_size=1.5"), ("eval_size = 1.5",), "a share below 1"),
    refused("recipe-no-held-out-rows", load(START, "data.eval_size=0"), ("eval_size = 0",), "do_eval = false"),
    refused("recipe-fields-without-format", load(START, "data.fields.a=b"), ("[data] fields",), 'format = "alpaca"'),
    refused(
        "recipe-batch-sizes-that-do-not-multiply",
        load(
            START,
            "training.batch_size=16",
            "training.per_device_train_batch_size=4",
            "training.gradient_accumulation_steps=2",
        ),
        ("batch_size = 16", "4 x 2 = 8"),
        "delete one of the three",
    ),
    refused(
        "recipe-micro-batch-alone",
        load(START, "training.per_device_train_batch_size=3"),
        ("per_device_train_batch_size = 3 alone",),
        "add batch_size, for example 15",
    ),
    refused(
        "recipe-batch-size-not-divisible",
        load(START, "training.batch_size=16", "training.per_device_train_batch_size=3"),
        ("per_device_train_batch_size = 3",),
        "does not divide batch_size = 16",
    ),
    refused(
        "recipe-schedule-without-warm-up",
        load(START, "training.lr_scheduler_type=constant", "training.warmup_steps=10"),
        ('"constant" ignores warmup_steps = 10',),
        "constant_with_warmup",
    ),
    refused(
        "recipe-schedule-without-its-settings",
        load(START, "training.lr_scheduler_type=cosine_with_min_lr"),
        ('"cosine_with_min_lr"',),
        "needs lr_scheduler_kwargs with min_lr or min_lr_rate",
    ),
    refused(
        "recipe-schedule-without-evaluation",
        load(START, "training.lr_scheduler_type=greedy", "training.eval_strategy=no"),
        ('"greedy" follows the evaluation loss',),
        'write eval_strategy = "steps"',
    ),
    refused("recipe-interval-of-zero", load(START, "training.save_steps=0"), ("save_steps = 0",), 'save_strategy = "no"'),
    refused(
        "recipe-evaluation-on-and-off",
        load(START, "training.do_eval=false", "training.eval_strategy=steps"),
        ("do_eval = false", 'eval_strategy = "steps"'),
        "delete do_eval",
    ),
    refused(
        "recipe-best-adapter-without-evaluation",
        load(START, "training.load_best_model_at_end=true", "training.eval_strategy=no"),
        ("load_best_model_at_end = true needs evaluations",),
        'eval_strategy = "steps"',
    ),
    refused(
        "recipe-offloading-without-checkpointing",
        load(START, "training.activation_offloading=true", "training.gradient_checkpointing=false"),
        ("activation_offloading = true needs gradient_checkpointing",),
        "delete one",
    ),
    refused(
        "recipe-two-data-types",
        load(START, "training.bf16=true", "training.fp16=true"),
        ("bf16 and fp16",),
        "delete one",
    ),
    refused("recipe-data-type-switched-off", load(START, "training.bf16=false"), ("bf16 = false",), "[quantization]"),
    refused(
        "recipe-data-types-that-differ",
        load(START, "training.bf16=true", "quantization.bnb_4bit_compute_dtype=float32"),
        ("bf16 = true", '"float32"'),
        "delete one",
    ),
    refused(
        "recipe-two-micro-batches",
        load(START, "memory.micro_batch_tokens=64", "training.gradient_accumulation_steps=16", "training.batch_size=16"),
        ("micro_batch_tokens = 64",),
        "delete one",
    ),
    refused(
        "recipe-layers-to-recompute-without-checkpointing",
        load(START, "memory.checkpoint_every_n_layers=2", "memory.keep_attention=true", "training.gradient_checkpointing=false"),
        ("checkpoint_every_n_layers", "keep_attention"),
        "delete one",
    ),
    refused(
        "recipe-orthogonal-start-of-an-odd-rank",
        load(START, "lora.init_lora_weights=orthogonal", "lora.r=3"),
        ("[lora] r = 3",),
        "must be even",
    ),
    refused(
        "recipe-orthogonal-start-with-4-bit",
        load(START, "lora.init_lora_weights=orthogonal"),
        ('init_lora_weights = "orthogonal"',),
        "load_in_4bit = false",
    ),
    refused(
        "recipe-early-stopping-without-evaluation",
        load(START, "training.early_stopping_patience=3", "training.do_eval=false"),
        ("do_eval = false and early_stopping_patience = 3", "contradict"),
        "delete do_eval, or the rest",
    ),
    refused(
        "recipe-loftq-and-dora",
        load(START, "lora.init_lora_weights=loftq", "lora.use_dora=true"),
        ('init_lora_weights = "loftq"', "use_dora"),
        "delete one",
    ),
    refused(
        "recipe-loftq-without-4-bit",
        load(START, "lora.init_lora_weights=loftq", "quantization.load_in_4bit=false"),
        ('init_lora_weights = "loftq"',),
        "load_in_4bit = true",
    ),
    refused(
        "recipe-loftq-and-an-adapter",
        load(START, "lora.init_lora_weights=loftq", "model.adapter=mine"),
        ('init_lora_weights = "loftq"', "[model] adapter"),
        "delete one",
    ),
    refused(
        "recipe-start-that-changes-the-base",
        load(START, "lora.init_lora_weights=pissa"),
        ('[lora] init_lora_weights = "pissa"', "no export of it could be proved"),
        '"loftq"',
    ),
    refused(
        "loftq-on-weights-in-4-bit",
        stored('[lora]\ninit_lora_weights = "loftq"', check=check_model_limits),
        ('init_lora_weights = "loftq"', "are in 4 bit"),
        "unquantized original",
        UserError,
    ),
    refused("recipe-not-toml", load("[lora]\nr = = 3"), ("mine.toml is not TOML", "at line 2"), "The line is: r = = 3"),
    refused("recipe-python-syntax", load("[lora]\nuse_dora = True"), ("is not TOML",), "TOML writes key = true"),
    refused("recipe-backslash", load('[data]\ntrain = "C:\\Users"'), ("is not TOML",), "Write paths with /"),
    refused("recipe-missing", load_file("chta.toml"), ("chta.toml: there is no such recipe",), "Did you mean chat.toml?"),
    refused("recipe-is-a-run", name_a_run, ("runs/mine/latest names a run",), "Its recipe: runs/mine/1/recipe.toml"),
    refused("recipe-of-no-name", lambda shop: find_recipe(Path("caht")), ("caht: there is no such file",), "chat, demo"),
    refused("import-of-no-config", import_file("a.yml", "x: 1\n"), ("a.yml has no key of Axolotl",), "Give a config"),
    refused("import-of-no-keys", import_file("a.json", "[1]"), ("a.json holds no keys",), "Give a config"),
    refused("import-unreadable", import_file("a.py", "x = = 1"), ("a.py cannot be read",), "Give a config"),
    refused(
        "import-missing", lambda shop: import_recipe(Path("gone.yml")), ("gone.yml cannot be read: No such",), "LLaMA-Factory"
    ),
    refused("import-of-other-training", import_file("a.yml", "stage: dpo\n"), ('stage = "dpo"',), "cannot be imported"),
    refused(
        "import-gives-no-recipe",
        import_file("a.yml", f"base_model: {'x' * 300}\n"),
        ("The config gives no recipe: [model] name",),
        "Correct that key",
    ),
    refused("recipe-is-a-directory", load_file("."), ("cannot be read",), "Give the path of a .toml file."),
    refused("recipe-not-utf-8", load_file("a.toml", START.encode("utf-16")), ("not UTF-8 text (byte 0)",), "as UTF-8"),
    refused("recipe-is-data", load_file("a.jsonl", b"{}"), ("a.jsonl is data",), "qlora-phi3 init a.jsonl"),
    refused(
        "set-without-a-table", load(START, "epochs=2"), ("--set epochs=2",), "Did you mean 'num_train_epochs' in [training]?"
    ),
    refused("set-without-a-value", load(START, "lora.r"), ("--set lora.r",), "--set lora.r=32"),
    refused("set-below-a-value", load(START + "[lora]\nr = 3", "lora.r.x=3"), ("r is not a table",), "--set lora.r=32"),
    refused("set-list-without-quotes", load(START, "data.train=[a]"), ("--set data.train=[a]",), """train=["a"]'"""),
    refused(
        "recipe-missing-model",
        load(START, "model.name=./gone", check_files=True),
        ("[model] name: There is no model folder ./gone",),
        "or a hub id such as",
    ),
    refused(
        "recipe-missing-adapter",
        load(START, "model.adapter=gone", check_files=True),
        ("--set model.adapter=gone", "[model] adapter"),
        "There is no folder gone.",
    ),
    refused(
        "recipe-missing-data",
        lambda shop: load_recipe(shop.write(), ["data.train=chat.jsonl"], check_files=True),
        ("[data] train: There is no data file 'chat.jsonl' in ",),
        "Did you mean chats.jsonl?",
    ),
    refused(
        "model-has-fewer-positions",
        check_limits(max_position_embeddings=64),
        ("max_length = 2048", "64 positions"),
        "Write max_length = 64 or less.",
        UserError,
    ),
    refused(
        "model-has-fewer-layers",
        check_limits(num_hidden_layers=1),
        ("checkpoint_every_n_layers = 2", "1 layers"),
        "gradient_checkpointing = false",
        UserError,
    ),
]
