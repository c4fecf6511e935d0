"""Every key of a recipe has an effect: each is changed, and the change is seen where the key is used."""

from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
import torch
from fake_nvml import two_gpus
from transformers import TrainerControl, TrainerState
from workshop import Workshop, build_base, write_chats

from qlora_phi3.errors import RecipeError
from qlora_phi3.hardware.gpu import choose_gpu
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.recipe.schema import TABLES
from qlora_phi3.step import collate

CPU = torch.device("cpu")


class Silent:
    """A reporter that prints nothing."""

    def __getattr__(self, name):
        return lambda *args: None


class Lab:
    """A workshop, and the effects of a recipe in it, by the names used in `EFFECTS`."""

    def __init__(self, shop, monkeypatch):
        self.shop, self.monkeypatch = shop, monkeypatch

    def read(self, tables):
        return load_recipe(self.shop.write(**tables))

    def data(self, recipe):
        """The training and evaluation rows."""
        from qlora_phi3.training.prepare import prepare

        prepared = prepare(recipe, self.shop.path, Silent()).data
        return [[(row["input_ids"], row["labels"]) for row in rows or ()] for rows in (prepared.train, prepared.evaluation)]

    def loading(self, recipe):
        """The arguments with which the base is loaded."""
        import qlora_phi3.model.phi3 as model
        from qlora_phi3.family import read_architecture

        class Enough(BaseException):
            """Nothing needs to be loaded."""

        def load(*args, **kwargs):
            raise Enough(args, {**kwargs, "quantization_config": str(kwargs["quantization_config"])})

        self.monkeypatch.setattr(model.PackedPhi3ForCausalLM, "from_pretrained", load)
        with pytest.raises(Enough) as caught:
            model.load_base(
                recipe.model,
                recipe.quantization,
                read_architecture(str(self.shop.base)),
                compute_dtype=model.choose_precision(recipe.compute_dtype, None)[0],
                device=CPU,
                longest_row=8,
            )
        return str(caught.value.args)

    def loaded(self, recipe):
        """The model with its adapter: every trained tensor, its scaling and its dropout."""
        from qlora_phi3.training.prepare import load_model, prepare

        model = load_model(prepare(recipe, self.shop.path, Silent()))
        seen = {name: (tuple(p.shape), p.detach().sum().item()) for name, p in model.named_parameters() if p.requires_grad}
        for name, module in model.named_modules():
            if hasattr(module, "lora_dropout"):
                seen[name] = module.scaling["default"], module.use_dora, str(module.lora_dropout["default"])
        return seen, model.peft_config["default"].bias

    def run_files(self, recipe):
        """The files in the run folder at the end; the recipe is the one written last."""
        assert self.shop.run("--set", "training.max_steps=1").exit_code == 0
        return sorted(path.name for path in self.shop.runs()[-1].iterdir())

    def trainer(self, recipe):
        """The trainer of a recipe."""
        from qlora_phi3.runfolder import RunFolder
        from qlora_phi3.training.prepare import load_model, plan_run, prepare
        from qlora_phi3.training.trainer import build_trainer

        context = prepare(recipe, self.shop.path, Silent())
        execution, model = plan_run(context).execution, load_model(context)
        return build_trainer(context, execution, model, RunFolder(self.shop.path / "run"))

    def recovery(self, recipe):
        """Whether a run copies its last good state."""
        return self.trainer(recipe).divergence._recovers

    def rates(self, recipe):
        """The learning rates of the optimizer."""
        return [group["lr"] for group in self.trainer(recipe).create_optimizer().param_groups]

    def first_loss(self, recipe):
        """The loss of the first rows in training."""
        trainer = self.trainer(recipe)
        torch.manual_seed(0)
        return trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader()))).item()

    def patience(self, recipe):
        """Whether one evaluation that is not lower than the one before ends the run."""
        watch, state = self.trainer(recipe).early_stopping, TrainerState(global_step=1)
        return [watch.on_evaluate(None, state, TrainerControl(), metrics={"eval_loss": 1.0}).should_training_stop for _ in "12"]

    def keeps_best(self, recipe):
        """Whether the best weights are kept."""
        watch, state = self.trainer(recipe).early_stopping, TrainerState(global_step=1)
        watch.on_evaluate(None, state, TrainerControl(), metrics={"eval_loss": 1.0})
        return bool(watch.restore_best(state))

    def checkpoints(self, recipe):
        """The checkpoints that are left of a run that wrote five; the recipe is the one written last."""
        assert self.shop.run("--set", "training.max_steps=5", "--set", "training.save_steps=1").exit_code == 0
        return sorted(path.name for path in self.shop.runs()[-1].glob("checkpoints/checkpoint-*"))

    def trackers(self, recipe):
        """The trackers that get the figures."""
        return self.trainer(recipe).trackers._names

    def minutes(self, recipe):
        """Seconds after which a checkpoint is saved."""
        callbacks = self.trainer(recipe).callback_handler.callbacks
        return [callback._seconds for callback in callbacks if hasattr(callback, "_seconds")]

    def recomputed(self, recipe):
        """Whether layers are computed a second time in the backward pass."""
        return [getattr(module, "gradient_checkpointing", None) for module in self.trainer(recipe).model.modules()]

    def execution_on_a_gpu(self, recipe):
        """The execution plan for a GPU that is too small: the one that needs least memory."""
        from dataclasses import replace

        from qlora_phi3.hardware.gpu import gpu_of_size
        from qlora_phi3.training.prepare import plan_run, prepare

        context = prepare(recipe, self.shop.path, Silent())
        return plan_run(replace(context, gpu=replace(gpu_of_size(8 * 2**30), free_bytes=0))).execution

    def fuses(self, recipe):
        """Whether the layers use fused kernels on a GPU that can run them."""
        from dataclasses import replace

        from qlora_phi3.training import prepare

        self.monkeypatch.setattr(prepare, "why_unavailable", lambda *_: None)
        return prepare._can_fuse(replace(prepare.prepare(recipe, self.shop.path, Silent()), device=torch.device("cuda")))

    def budget(self, recipe):
        """The GPU memory that the run may use, and whether the heaviest step is tried first."""
        from qlora_phi3.hardware.gpu import gpu_of_size
        from qlora_phi3.memory.margin import budget_of
        from qlora_phi3.training.prepare import wants_dry_run

        return budget_of(recipe.memory, gpu_of_size(4 * 2**30)), wants_dry_run(recipe.memory, CPU)

    def chosen_gpu(self, recipe):
        """The only GPU that CUDA sees on a computer with two."""
        self.monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return choose_gpu(recipe.memory.gpu, nvml=two_gpus()).visible_devices

    def first_batch(self, recipe):
        """The tensors of the first optimizer step."""
        trainer = self.trainer(recipe)
        batch = collate(next(iter(trainer.get_train_dataloader())).rows, trainer.guard.plans["training"])
        return batch.num_rows, [micro["input_ids"].tolist() for micro in batch.micro_batches]

    def eval_batch(self, recipe):
        """The tensors of the first evaluation step."""
        trainer = self.trainer(recipe)
        batch = collate(next(iter(trainer.get_eval_dataloader())).rows, trainer.guard.plans["evaluation"])
        return [micro["input_ids"].tolist() for micro in batch.micro_batches]

    def dtype(self, recipe):
        """The data type of the computation."""
        from qlora_phi3.model.phi3 import choose_precision

        return choose_precision(recipe.compute_dtype, None)

    def shown(self, recipe):
        """What the command line shows of a run, and the folder of the run."""
        import qlora_phi3.cli.run as command
        import qlora_phi3.training.run as run
        import qlora_phi3.ui.live as live

        seen = []

        @contextmanager
        def open_console(training, *, quiet):
            seen.append((training.logging_strategy, training.logging_steps, training.disable_tqdm))
            yield Silent()

        def train(recipe, name, base_folder, **kwargs):
            folder = run.runfolder.create_run_folder(Path(recipe.training.output_dir), name, datetime.now())
            folder.report.write_text('{"status": "done"}', encoding="utf-8")
            seen.append(folder.path.parent)
            return run.RunResult(folder=folder, steps=0, loss_before=None, loss_after=None, seconds=0.0)

        with self.monkeypatch.context() as patch:
            patch.setattr(live, "open_console", open_console)
            patch.setattr(run, "run", train)
            patch.setattr(command, "silence_libraries", lambda: seen.append("quiet"))
            assert self.shop.run().exit_code == 0
        return seen


def argument(name):
    """The Trainer's argument of this name."""

    def see(lab, recipe):
        from qlora_phi3.model.optimizer import default_optimizer
        from qlora_phi3.training.trainer import build_arguments

        arguments = build_arguments(
            recipe.training,
            Path("checkpoints"),
            device=CPU,
            fp16=False,
            optim=default_optimizer(recipe.training, is_cuda=False),
            evaluates=True,
        )
        return str(getattr(arguments, name))

    return see


#: Key -> (another value, where its effect is seen).
EFFECTS = {
    "model.name": ("other", Lab.loading),
    "model.revision": ("main", Lab.loading),
    "model.attn_implementation": ("eager", Lab.loading),
    "model.adapter": ("trained", Lab.loaded),
    "model.save_quantized": (True, Lab.run_files),
    "quantization.load_in_4bit": (False, Lab.loading),
    "quantization.bnb_4bit_quant_type": ("fp4", Lab.loading),
    "quantization.bnb_4bit_use_double_quant": (False, Lab.loading),
    "quantization.bnb_4bit_compute_dtype": ("float16", Lab.loading),
    "lora.r": (8, Lab.loaded),
    "lora.lora_alpha": (32, Lab.loaded),
    "lora.lora_dropout": (0.5, Lab.loaded),
    "lora.target_modules": (["qkv_proj"], Lab.loaded),
    "lora.exclude_modules": (["down_proj"], Lab.loaded),
    "lora.bias": ("all", Lab.loaded),  # the family has none; the adapter's config has the value
    "lora.use_rslora": (True, Lab.loaded),
    "lora.use_dora": (True, Lab.loaded),
    "lora.modules_to_save": (["lm_head"], Lab.loaded),
    "lora.layers_to_transform": ([1], Lab.loaded),
    "lora.rank_pattern": ({"qkv_proj": 2}, Lab.loaded),
    "lora.alpha_pattern": ({"qkv_proj": 2}, Lab.loaded),
    "lora.init_lora_weights": ("loftq", Lab.loaded),
    "data.train": ("others.jsonl", Lab.data),
    "data.eval": ("others.jsonl", Lab.data),
    "data.eval_size": (5, Lab.data),
    "data.split_seed": (1, Lab.data),
    "data.split": ("second", Lab.data),
    "data.eval_split": ("second", Lab.data),
    "data.subset": ("small", Lab.data),
    "data.revision": ("v2", Lab.data),
    "data.format": ("text", Lab.data),
    "data.fields": ({"text": "other"}, Lab.data),
    "data.ignore_columns": (["prompt", "completion"], Lab.data),
    "data.allow_special_tokens": (True, Lab.data),
    "data.loss_on": ("all", Lab.data),
    "data.max_rows": (20, Lab.data),
    "data.max_eval_rows": (2, Lab.data),
    "data.chat_template": ("own.jinja", Lab.data),
    "training.per_device_train_batch_size": (2, Lab.first_batch),
    "training.gradient_accumulation_steps": (2, Lab.first_batch),
    "training.batch_size": (8, Lab.first_batch),
    "training.per_device_eval_batch_size": (1, Lab.eval_batch),
    "training.max_length": (30, Lab.data),
    "training.packing": (False, Lab.first_batch),
    "training.num_train_epochs": (2, argument("num_train_epochs")),
    "training.max_steps": (3, argument("max_steps")),
    "training.learning_rate": (1e-5, argument("learning_rate")),
    "training.lr_scheduler_type": ("linear", argument("lr_scheduler_type")),
    "training.lr_scheduler_kwargs": ({"num_cycles": 0.7}, argument("lr_scheduler_kwargs")),
    "training.warmup_steps": (3, argument("warmup_steps")),
    "training.optim": ("adamw_torch_fused", argument("optim")),
    "training.adam_beta1": (0.8, argument("adam_beta1")),
    "training.adam_beta2": (0.9, argument("adam_beta2")),
    "training.adam_epsilon": (1e-4, argument("adam_epsilon")),
    "training.weight_decay": (0.1, argument("weight_decay")),
    "training.max_grad_norm": (0.3, argument("max_grad_norm")),
    "training.loraplus_lr_ratio": (16, Lab.rates),
    "training.neftune_noise_alpha": (5, Lab.first_loss),
    "training.recover_from_divergence": (False, Lab.recovery),
    "training.gradient_checkpointing": (True, Lab.recomputed),  # auto: false, as a tiny model fits in any memory
    "training.activation_offloading": (False, Lab.execution_on_a_gpu),
    "training.bf16": (True, Lab.dtype),
    "training.fp16": (True, Lab.dtype),
    "training.seed": (1, Lab.loaded),
    "training.data_seed": (1, Lab.first_batch),
    "training.do_eval": (False, Lab.data),
    "training.eval_strategy": ("epoch", argument("eval_strategy")),
    "training.eval_steps": (3, argument("eval_steps")),
    "training.early_stopping_patience": (1, Lab.patience),
    "training.save_strategy": ("epoch", argument("save_strategy")),
    "training.save_steps": (3, argument("save_steps")),
    "training.save_minutes": (3, Lab.minutes),
    "training.report_samples": (1, Lab.run_files),
    "training.save_total_limit": (2, Lab.checkpoints),
    "training.load_best_model_at_end": (True, Lab.keeps_best),
    "training.logging_strategy": ("epoch", Lab.shown),
    "training.logging_steps": (5, Lab.shown),
    "training.log_level": ("info", Lab.shown),
    "training.disable_tqdm": (True, Lab.shown),
    "training.report_to": ("tensorboard", Lab.trackers),
    "training.output_dir": ("elsewhere", Lab.shown),
    "memory.budget": ("1GiB", Lab.budget),
    "memory.micro_batch_tokens": (64, Lab.first_batch),
    "memory.checkpoint_every_n_layers": (2, Lab.recomputed),
    "memory.keep_attention": (True, Lab.execution_on_a_gpu),
    "memory.logits_tile": ("1MiB", Lab.execution_on_a_gpu),
    "memory.mlp_tile_tokens": (2048, Lab.execution_on_a_gpu),
    "memory.gpu": (1, Lab.chosen_gpu),
    "memory.kernels": ("plain", Lab.fuses),
    "memory.rehearsal": (True, Lab.budget),
}
#: Keys of samples that have one valid value only -> another value, which is refused.
FIXED = {
    "lora.task_type": "SEQ_CLS",
    "training.gradient_checkpointing_kwargs": {"use_reentrant": True},
    "training.remove_unused_columns": False,
}
HUB = {"data": {"train": "owner/chats"}}
SHORT = {"training": {"max_length": 32}}  # packed, a forward pass of n rows holds what n rows of max_length do
#: The other keys of the recipe that a key needs to have an effect.
GIVEN = {
    "data.split": HUB,
    "data.eval_split": HUB,
    "data.subset": HUB,
    "data.revision": HUB,
    "data.format": {"data": {"train": "texts.jsonl", "eval_size": 1}},
    "data.fields": {"data": {"train": "texts.jsonl", "eval_size": 1, "format": "text"}},
    "data.ignore_columns": {"data": {"train": "texts.jsonl", "eval_size": 1}},
    "data.allow_special_tokens": {"data": {"train": "rendered.jsonl", "eval_size": 1}},
    "training.per_device_train_batch_size": SHORT,
    "training.gradient_accumulation_steps": SHORT,
    "training.per_device_eval_batch_size": SHORT,
}


OWN_TEMPLATE = (
    "{% for turn in messages %}{% if turn.role == 'user' %}<|user|>well, {{ turn.content }}<|end|>"
    "{% else %}<|assistant|>{% generation %}{{ turn.content }}<|end|>{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, base):
    """A workshop with all the data and bases in the values above."""
    shop = Workshop(tmp_path_factory.mktemp("keys"), base)
    build_base(shop.path / "other")
    write_chats(shop.path / "others.jsonl", rows=10, seed=9)
    (shop.path / "texts.jsonl").write_text(
        '{"prompt": "a", "completion": "b", "text": "one and", "other": "two or"}\n' * 4, encoding="utf-8"
    )
    (shop.path / "rendered.jsonl").write_text('{"text": "<|user|>one<|end|>"}\n' * 4, encoding="utf-8")
    (shop.path / "own.jinja").write_text(OWN_TEMPLATE, encoding="utf-8")
    save_adapter(shop)
    return shop


def save_adapter(shop):
    """Save a trained adapter with the default settings."""
    from qlora_phi3.training.prepare import load_model, prepare

    recipe = load_recipe(shop.write())
    model = load_model(prepare(recipe, shop.path, Silent()))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    model.save_pretrained(shop.path / "trained")


@pytest.fixture
def lab(workplace, tmp_path, monkeypatch):
    """The workshop with a hub whose rows hold the arguments of the request."""
    import datasets

    def load_dataset(name, subset, *, split, revision):
        answers = [{"prompt": str(row), "completion": f"{subset} {split} {revision}"} for row in range(40)]
        place = str(tmp_path / f"{subset}-{split}-{revision}")
        datasets.Dataset.from_list(answers).save_to_disk(place)  # the hub's data are on the disk as well
        return datasets.load_from_disk(place)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(workplace.path)
    return Lab(workplace, monkeypatch)


def test_the_lists_above_name_every_key_and_no_other():
    keys = {f"{name}.{key}" for name, table in TABLES.items() for key in table.model_fields}
    assert keys == EFFECTS.keys() | FIXED.keys()


@pytest.mark.parametrize("key", EFFECTS)
def test_a_key_has_an_effect(lab, key):
    value, see = EFFECTS[key]
    given = {"quantization": {"bnb_4bit_compute_dtype": "auto"}, "training": {"save_steps": 0.2, "eval_steps": 0.2}}
    given |= GIVEN.get(key, {})
    table, name = key.split(".")
    before = see(lab, lab.read(given))
    again = see(lab, lab.read(given))
    after = see(lab, lab.read({**given, table: {**given.get(table, {}), name: value}}))
    assert same(before, again), "the effect changes by itself"
    assert not same(before, after)


def same(one, other):
    return repr(one) == repr(other)


@pytest.mark.parametrize("key", FIXED)
def test_a_key_of_one_value_refuses_another(lab, key):
    table, name = key.split(".")
    with pytest.raises(RecipeError, match=rf"\[{table}\] {name} = .*: "):
        lab.read({table: {name: FIXED[key]}})
