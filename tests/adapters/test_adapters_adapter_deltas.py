"""An adapter is resolved as PEFT resolves it, and what could not be merged is refused by name."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_model import build_config, save_tiny_model
from tiny_run import TinyRun, leave_run
from transformers import Phi3ForCausalLM

from qlora_phi3.adapters.adapter_deltas import EMBEDDING, HEAD, read_deltas
from qlora_phi3.adapters.peft_io import read_config, read_peft
from qlora_phi3.errors import ExportError
from qlora_phi3.family import Architecture, parse_architecture
from qlora_phi3.recipe.schema import Lora

QKV = "model.layers.1.self_attn.qkv_proj"
PREFIX = "base_model.model."


def architecture_of(**changes: Any) -> Architecture:
    return parse_architecture(build_config(**changes).to_dict(), "tiny")


BASE = architecture_of()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> TinyRun:
    lora = Lora(
        r=8,
        lora_alpha=12,
        use_rslora=True,
        use_dora=True,
        rank_pattern={"layers.1.self_attn.qkv_proj": 4},
        alpha_pattern={"down_proj": 40},
    )
    return leave_run(tmp_path_factory.mktemp("run"), base, lora=lora)


def save_adapter(folder: Path, *, tied: bool = False, **settings: Any) -> Path:
    """An adapter saved by PEFT itself, outside of any recipe."""
    model = Phi3ForCausalLM(build_config(tie_word_embeddings=tied))
    get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["qkv_proj"], **settings})).save_pretrained(folder)
    return folder


def spoil(adapter: Path, to: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of an adapter with some tensors changed or (None) taken out."""
    shutil.copytree(adapter, to)
    tensors = {**load_file(to / "adapter_model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, to / "adapter_model.safetensors")
    return to


def test_every_part_is_what_the_live_layer_holds(run):
    deltas = read_deltas(run.adapter, BASE)
    layers = {
        name.replace("base_model.model.", ""): layer
        for name, layer in run.live.named_modules()
        if hasattr(layer, "lora_A") and len(layer.lora_A)
    }
    assert deltas.targets.keys() == {f"{name}.weight" for name in layers}
    for name, layer in layers.items():
        update = deltas.read(f"{name}.weight")
        assert torch.equal(update.block.lora_A, layer.lora_A["default"].weight)
        assert torch.equal(update.block.lora_B, layer.lora_B["default"].weight)
        assert torch.equal(update.magnitude, layer.lora_magnitude_vector["default"].weight)
        assert update.block.scaling == layer.scaling["default"]
        assert deltas.targets[f"{name}.weight"].shape == (layer.out_features, layer.in_features)


def test_patterns_and_rslora_decide_rank_and_scaling(run):
    deltas = read_deltas(run.adapter, BASE)
    assert deltas.read(f"{QKV}.weight").block.lora_A.shape == (4, 128)
    assert deltas.targets[f"{QKV}.weight"].block.scaling == 12 / 4**0.5
    assert deltas.targets["model.layers.0.mlp.down_proj.weight"].block.scaling == pytest.approx(40 / 8**0.5)


def test_trained_modules_stand_in_the_place_of_the_bases(tmp_path, base):
    run = leave_run(tmp_path, base, lora=Lora(r=4, modules_to_save=["lm_head", "model.norm"]))
    deltas = read_deltas(run.adapter, BASE)
    assert deltas.replaced == {HEAD: f"{PREFIX}lm_head.weight", "model.norm.weight": f"{PREFIX}model.norm.weight"}
    assert deltas.unties is False


@pytest.mark.parametrize(
    ("modules", "unties"),
    [
        (None, False),
        (["lm_head"], True),
        (["embed_tokens"], True),
    ],
)
def test_embedding_and_head_come_apart_only_where_one_of_them_is_trained(tmp_path, modules, unties):
    folder = save_adapter(tmp_path / "a", tied=True, modules_to_save=modules)
    deltas = read_deltas(folder, architecture_of(tie_word_embeddings=True))
    assert deltas.unties is unties
    assert (EMBEDDING in deltas.replaced) is ("embed_tokens" in (modules or ()))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_modules": ["qkv_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["qkv_proj", "embed_tokens"]}, "model.embed_tokens"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(tmp_path, settings, named):
    with pytest.raises(ExportError, match=named):
        read_deltas(save_adapter(tmp_path / "a", **settings), BASE)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize("changes", [{"init_lora_weights": "pissa"}, {"peft_type": "IA3"}], ids=str)
def test_export_and_conversion_refuse_the_same_settings_of_an_adapter(run, tmp_path, changes):
    folder = spoil(run.adapter, tmp_path / "a")
    change_config(folder, **changes)
    for read in (lambda: read_deltas(folder, BASE), lambda: read_peft({}, read_config(folder), folder)):
        with pytest.raises(ExportError, match=next(iter(changes.values()))):
            read()


@pytest.mark.parametrize("key", ["r", "lora_alpha", "bias"])
def test_a_null_that_peft_never_writes_is_refused_by_name(run, tmp_path, key):
    folder = spoil(run.adapter, tmp_path / "a")
    change_config(folder, **{key: None})
    with pytest.raises(ExportError, match=f"{key} = None"):
        read_config(folder)


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.qkv_proj.bias", "model.layers.9.mlp.down_proj.lora_A.weight"])
def test_a_tensor_without_a_place_in_the_base_is_named(run, tmp_path, key):
    folder = spoil(run.adapter, tmp_path / "a", **{f"{PREFIX}{key}": torch.zeros(4)})
    with pytest.raises(ExportError, match=re.escape(key.removesuffix(".lora_A.weight"))):
        read_deltas(folder, BASE)


def test_a_missing_tensor_is_named(run, tmp_path):
    folder = spoil(run.adapter, tmp_path / "a", **{f"{PREFIX}{QKV}.lora_B.weight": None})
    with pytest.raises(ExportError, match=rf"{re.escape(QKV)} has no lora_B\.weight"):
        read_deltas(folder, BASE)


def test_a_layer_that_the_config_names_and_the_file_lacks_is_named(run, tmp_path):
    parts = {f"{PREFIX}{QKV}.{part}": None for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")}
    folder = spoil(run.adapter, tmp_path / "a", **parts)
    with pytest.raises(ExportError, match=rf"first that differs is {re.escape(QKV)}"):
        read_deltas(folder, BASE)


def test_an_adapter_whose_config_was_changed_is_refused(run, tmp_path):
    folder = spoil(run.adapter, tmp_path / "a")
    change_config(folder, r=6)
    with pytest.raises(ExportError, match="lora_A"):
        read_deltas(folder, BASE)


def test_an_adapter_of_a_base_with_fewer_layers_names_what_is_left_over(run):
    with pytest.raises(ExportError, match=r"layers\.1\."):
        read_deltas(run.adapter, architecture_of(num_hidden_layers=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named(run, tmp_path, value):
    key = f"{PREFIX}{QKV}.lora_B.weight"
    tensor = load_file(run.adapter / "adapter_model.safetensors")[key]
    tensor[5, 1] = value
    with pytest.raises(ExportError, match=re.escape(key)):
        read_deltas(spoil(run.adapter, tmp_path / "a", **{key: tensor}), BASE)


def test_an_incomplete_file_is_named(run, tmp_path):
    path = spoil(run.adapter, tmp_path / "a") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ExportError, match=r"adapter_model\.safetensors"):
        read_deltas(path.parent, BASE)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_readable_config_is_refused(run, tmp_path, text):
    folder = spoil(run.adapter, tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    if text is not None:
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ExportError, match=r"adapter_config\.json"):
        read_deltas(folder, BASE)
