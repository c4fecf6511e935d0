"""The optimizer that trains is the one that is simulated, and the one that transformers builds."""

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from tiny_model import load_tiny, save_tiny_model
from transformers import Trainer, TrainingArguments

from qlora_phi3.model.optimizer import build_optimizer, default_optimizer
from qlora_phi3.recipe.schema import Lora, Training

NAMES = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
SETTINGS = {
    "learning_rate": 3e-4, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An adapter with a trained norm, which has no weight decay, and a trained embedding."""
    lora = Lora(r=4, modules_to_save=["norm", "embed_tokens"])
    return load_tiny(save_tiny_model(tmp_path_factory.mktemp("tiny")), lora=lora)


def build_as_transformers_does(name, model, folder):
    """The optimizer of transformers' own Trainer."""
    arguments = TrainingArguments(output_dir=str(folder), optim=name, use_cpu=True, **SETTINGS)
    trainer = Trainer(model=model, args=arguments)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return kind, settings, trainer.create_optimizer()


@pytest.mark.parametrize("name", NAMES)
def test_the_optimizer_is_the_one_that_transformers_builds(model, tmp_path, name):
    kind, settings, expected = build_as_transformers_does(name, model, tmp_path)
    built = build_optimizer(name, model, Training(**SETTINGS), is_cuda=False)
    assert isinstance(built, kind)
    assert getattr(built, "is_paged", None) == settings.get("is_paged")
    assert [len(group["params"]) for group in built.param_groups] == [17, 5]  # 16 matrices and the embedding; 5 norms
    for group, other in zip(built.param_groups, expected.param_groups, strict=True):
        assert all(one is two for one, two in zip(group["params"], other["params"], strict=True))
        for key in ("lr", "betas", "eps", "weight_decay", "fused"):
            assert group.get(key) == other.get(key), key


@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_are_equal_to_the_bit_with_those_of_transformers(model, tmp_path, name):
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    first = {key: parameter.detach().clone() for key, parameter in trained.items()}
    ends, states = [], []
    for build in (
        lambda: build_optimizer(name, model, Training(**SETTINGS), is_cuda=False),
        lambda: build_as_transformers_does(name, model, tmp_path)[2],
    ):
        optimizer = build()
        torch.manual_seed(0)
        with torch.no_grad():
            for key, parameter in trained.items():
                parameter.copy_(first[key])
        for _ in range(2):
            for parameter in trained.values():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        ends.append({key: parameter.detach().clone() for key, parameter in trained.items()})
        state = optimizer.state[find_embedding(model)]
        states.append({value.dtype for value in state.values() if isinstance(value, torch.Tensor) and value.dim()})
        model.zero_grad()
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(first[key])
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in trained)
    assert states == [{torch.float32}, {torch.float32}]  # of an embedding, with 8-bit optimizers too


def find_embedding(model):
    return next(p for key, p in model.named_parameters() if "embed_tokens.modules_to_save" in key)


def test_a_trained_embedding_changes_no_optimizer_that_is_built_later(model):
    build_optimizer("adamw_8bit", model, Training(), is_cuda=False)
    layer = torch.nn.Linear(128, 128, bias=False)
    optimizer = build_optimizer("adamw_8bit", layer, Training(), is_cuda=False)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    assert optimizer.state[layer.weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("wanted", "is_cuda", "name"),
    [
        ("auto", True, "adamw_8bit"),
        ("auto", False, "adamw_torch"),
        ("paged_adamw_32bit", True, "paged_adamw_32bit"),
        ("adamw_torch_fused", False, "adamw_torch_fused"),
    ],
)
def test_one_function_chooses_the_default_optimizer(wanted, is_cuda, name):
    assert default_optimizer(Training(optim=wanted), is_cuda=is_cuda) == name


def test_on_cuda_torchs_adamw_takes_the_multi_tensor_path_unless_it_is_fused():
    layer = torch.nn.Linear(2, 2)
    plain = build_optimizer("adamw_torch", layer, Training(), is_cuda=True)
    fused = build_optimizer("adamw_torch_fused", layer, Training(), is_cuda=True)
    assert [group["foreach"] for group in plain.param_groups] == [True, True]
    assert [group["foreach"] for group in fused.param_groups] == [False, False]


@pytest.mark.parametrize("name", ["adamw_torch", "paged_adamw_8bit"])
def test_lora_plus_has_pefts_groups_with_the_recipes_optimizer(model, name):
    training = Training(loraplus_lr_ratio=16, **SETTINGS)
    built = build_optimizer(name, model, training, is_cuda=False)
    expected = create_loraplus_optimizer(model, torch.optim.AdamW, lr=3e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.1)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in expected.param_groups for p in group["params"]}
    matrices = {id(p) for key, p in model.named_parameters() if ".lora_" in key}
    assert len(matrices) == 16
    for group in built.param_groups:  # PEFT puts trained norms into the group of B as well; theirs is learning_rate here
        for parameter in group["params"]:
            if id(parameter) in matrices:
                assert (group["lr"], group["weight_decay"]) == pytest.approx(rates[id(parameter)])
            else:
                assert group["lr"] == 3e-4
    assert sorted(len(group["params"]) for group in built.param_groups) == [5, 8, 9]


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "paged_adamw_32bit"])
def test_with_lora_plus_the_first_update_of_b_is_larger_by_the_ratio(model, name):
    steps = {}
    for ratio in (1, 16):
        optimizer = build_optimizer(name, model, Training(loraplus_lr_ratio=ratio, learning_rate=1e-3), is_cuda=False)
        trained = {key: p for key, p in model.named_parameters() if ".lora_" in key}
        first = {key: p.detach().clone() for key, p in trained.items()}
        for parameter in trained.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        steps[ratio] = {key: float((trained[key] - first[key]).detach().abs().mean()) for key in trained}
        with torch.no_grad():
            for key, parameter in trained.items():
                parameter.copy_(first[key])
        model.zero_grad()
    for key in steps[1]:
        assert steps[16][key] / steps[1][key] == pytest.approx(16 if "lora_B" in key else 1, rel=1e-3)
