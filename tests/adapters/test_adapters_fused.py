"""Adapters of q, k, v, gate and up apart as fused ones and back, on a Phi-3 and the same model unfused."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import build_pair, logits, relative, save_trained
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qlora_phi3.adapters.convert import Converted, change_fusion, read_base
from qlora_phi3.errors import ExportError
from qlora_phi3.family import layer_shapes

APART = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SETTINGS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"k_proj": 2, "layers.1.self_attn.v_proj": 6}, "alpha_pattern": {"q_proj": 3, "up_proj": 20}},
    {"rank_pattern": {"k_proj": 2}, "use_rslora": True, "alpha_pattern": {"v_proj": 5}},
    {"use_dora": True},
    {"use_dora": True, "alpha_pattern": {"q_proj": 3}},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["v_proj", "gate_proj"], "layers_to_transform": [1]},
    {"modules_to_save": ["lm_head"]},
]
FUSED_SETTINGS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"qkv_proj": 2, "layers.1.mlp.gate_up_proj": 6}, "alpha_pattern": {"qkv_proj": 3}},
    {"use_dora": True},
    {"target_modules": ["gate_up_proj"], "layers_to_transform": [1]},
    {"modules_to_save": ["lm_head"]},
]


@pytest.fixture(scope="module", params=[(4, 4), (4, 2), (4, 1)], ids=lambda heads: f"{heads[0]} heads, {heads[1]} kv")
def pair(request, tmp_path_factory):
    """A fused model, the same one unfused, and a folder with both."""
    folder = tmp_path_factory.mktemp("pair")
    fused, apart = build_pair(num_attention_heads=request.param[0], num_key_value_heads=request.param[1])
    fused.save_pretrained(folder / "fused")
    apart.save_pretrained(folder / "apart")
    return fused, apart, folder


def to_fused(source: Path, target: Path, folder: Path, **options: Any) -> Converted:
    return change_fusion(source, target, fused=True, base=str(folder / "fused"), **options)


def to_split(source: Path, target: Path, folder: Path, **options: Any) -> Converted:
    return change_fusion(source, target, fused=False, base=str(folder / "apart"), **options)


def test_both_models_of_the_pair_are_the_same(pair):
    assert relative(logits(pair[0]), logits(pair[1])) < 1e-6


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_split_adapter_computes_the_same_fused(tmp_path, pair, settings):
    fused, apart, folder = pair
    trained = save_trained(apart, tmp_path / "split", **{"target_modules": APART, **settings})
    done = to_fused(tmp_path / "split", tmp_path / "fused", folder)
    assert done.largest_difference < 1e-7
    loaded = PeftModel.from_pretrained(copy.deepcopy(fused), tmp_path / "fused").eval()
    assert relative(logits(apart), logits(trained)) > 0.01
    assert relative(logits(trained), logits(loaded)) < 2e-5


@pytest.mark.parametrize("settings", FUSED_SETTINGS, ids=str)
def test_a_fused_adapter_computes_the_same_split(tmp_path, pair, settings):
    fused, apart, folder = pair
    trained = save_trained(fused, tmp_path / "fused", **{"target_modules": FUSED, **settings})
    done = to_split(tmp_path / "fused", tmp_path / "split", folder)
    assert done.largest_difference < 1e-7
    loaded = PeftModel.from_pretrained(copy.deepcopy(apart), tmp_path / "split").eval()
    assert relative(logits(fused), logits(trained)) > 0.01
    assert relative(logits(trained), logits(loaded)) < 2e-5


def test_split_to_fused_and_back_gives_the_same_bits(tmp_path, pair):
    _, apart, folder = pair
    save_trained(apart, tmp_path / "split", target_modules=APART, lora_alpha=32)
    to_fused(tmp_path / "split", tmp_path / "fused", folder)
    to_split(tmp_path / "fused", tmp_path / "again", folder)
    assert_same_adapter(tmp_path / "split", tmp_path / "again")


def test_fused_to_split_and_back_gives_the_same_bits(tmp_path, pair):
    fused, _, folder = pair
    save_trained(fused, tmp_path / "fused", target_modules=FUSED, lora_alpha=32)
    to_split(tmp_path / "fused", tmp_path / "split", folder)
    to_fused(tmp_path / "split", tmp_path / "again", folder)
    assert_same_adapter(tmp_path / "fused", tmp_path / "again")


def assert_same_adapter(first: Path, second: Path) -> None:
    tensors, others = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    config, other = (json.loads((path / "adapter_config.json").read_text()) for path in (first, second))
    differing = {key for key in config if config[key] != other[key]} - {"target_modules", "base_model_name_or_path"}
    assert not differing
    assert sorted(config["target_modules"]) == other["target_modules"]


def test_ranks_add_up_and_the_scaling_stays(tmp_path, pair):
    _, apart, folder = pair
    save_trained(apart, tmp_path / "split", target_modules=APART, r=4, lora_alpha=8)
    to_fused(tmp_path / "split", tmp_path / "fused", folder)
    config = json.loads((tmp_path / "fused" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (4, {"gate_up_proj": 8, "qkv_proj": 12})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (8, {"gate_up_proj": 16, "qkv_proj": 24})
    assert config["target_modules"] == sorted(FUSED)
    assert config["base_model_name_or_path"] == str(folder / "fused")
    lora_B = load_file(tmp_path / "fused" / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.mlp.gate_up_proj.lora_B.weight"
    ]
    assert not lora_B[:256, 4:].any()
    assert not lora_B[256:, :4].any()


def test_half_precision_stays_where_nothing_is_folded_and_else_becomes_fp32(tmp_path, pair):
    _, apart, folder = pair
    save_trained(apart, tmp_path / "split", target_modules=APART, alpha_pattern={"q_proj": 3})
    halve(tmp_path / "split")
    done = to_fused(tmp_path / "split", tmp_path / "fused", folder)
    tensors = load_file(tmp_path / "fused" / "adapter_model.safetensors")
    dtypes = {name.split(".")[-3]: tensor.dtype for name, tensor in tensors.items()}
    assert dtypes == {
        "qkv_proj": torch.float32,
        "o_proj": torch.bfloat16,
        "gate_up_proj": torch.bfloat16,
        "down_proj": torch.bfloat16,
    }
    assert 0 < done.largest_difference < 1e-7


def halve(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def test_an_adapter_before_its_first_step_keeps_its_rank(tmp_path, pair):
    fused, _, folder = pair
    trained = save_trained(fused, tmp_path / "fused", target_modules=["qkv_proj"], r=4)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    trained.save_pretrained(tmp_path / "fused")
    to_split(tmp_path / "fused", tmp_path / "split", folder)
    tensors = load_file(tmp_path / "split" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {4}
    assert len(tensors) == 2 * 3 * 2  # layers, parts, A and B


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable_token_indices": [1]},
        {"lora_bias": True},
        {"layer_replication": [[0, 1]]},
        {"a_key_of_tomorrow": 3},
        {"init_lora_weights": "pissa"},
        {"peft_type": "LOHA"},
        {"r": 8},
        {"lora_alpha": 0},
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_converted_is_refused_by_its_value_and_nothing_is_written(tmp_path, pair, changes):
    _, apart, folder = pair
    save_trained(apart, tmp_path / "split", target_modules=["q_proj"])
    edit(tmp_path / "split", **changes)
    with pytest.raises(ExportError, match=re.escape(str(next(iter(changes.values()))))):
        to_fused(tmp_path / "split", tmp_path / "fused", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["split"]


def test_dora_on_some_parts_only_is_refused_by_name(tmp_path, pair):
    _, apart, folder = pair
    save_trained(apart, tmp_path / "split", target_modules=["q_proj", "v_proj"], use_dora=True)
    with pytest.raises(ExportError, match="k_proj"):
        to_fused(tmp_path / "split", tmp_path / "fused", folder)


def test_a_part_trained_whole_is_refused_by_name(tmp_path, pair):
    _, apart, folder = pair
    save_trained(apart, tmp_path / "split", target_modules=["q_proj"], modules_to_save=["k_proj"])
    with pytest.raises(ExportError, match=r"self_attn.k_proj.weight"):
        to_fused(tmp_path / "split", tmp_path / "fused", folder)


def test_the_wrong_direction_is_refused(tmp_path, pair):
    fused, apart, folder = pair
    save_trained(apart, tmp_path / "split", target_modules=["q_proj"])
    save_trained(fused, tmp_path / "fused", target_modules=["qkv_proj"])
    save_trained(fused, tmp_path / "neither", target_modules=["o_proj"])
    for convert, name in ((to_split, "split"), (to_fused, "fused"), (to_split, "neither"), (to_fused, "neither")):
        with pytest.raises(ExportError):
            convert(tmp_path / name, tmp_path / "new", folder)


def test_an_adapter_of_another_base_is_refused_with_both_shapes(tmp_path, pair):
    _, apart, folder = pair
    save_trained(apart, tmp_path / "split", target_modules=["q_proj"])
    with pytest.raises(ExportError, match=r"128 x 128 .*3072 x 3072"):
        change_fusion(tmp_path / "split", tmp_path / "new", fused=True, base="microsoft/Phi-3-mini-4k-instruct")
    with pytest.raises(ExportError, match="apart"):
        change_fusion(tmp_path / "split", tmp_path / "new", fused=True, base=str(folder / "apart"))


def test_an_adapter_whose_base_cannot_be_found_is_refused_with_its_name(tmp_path, pair):
    _, apart, _ = pair
    save_trained(apart, tmp_path / "split", target_modules=["q_proj"])
    edit(tmp_path / "split", base_model_name_or_path="somewhere/unfused")
    with pytest.raises(ExportError, match="somewhere/unfused"):
        change_fusion(tmp_path / "split", tmp_path / "new", fused=True)


def test_shapes_of_the_layers_are_those_of_the_model(pair):
    for model, name in ((pair[0], "fused"), (pair[1], "apart")):
        base = read_base(str(pair[2] / name))
        shapes = layer_shapes(base.architecture, fused=not base.unfused)
        linear = {key: tuple(layer.weight.shape) for key, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
        assert {key: shape for key, shape in shapes.items() if key != "model.embed_tokens"} == linear
        assert shapes["model.embed_tokens"] == tuple(model.model.embed_tokens.weight.T.shape)
