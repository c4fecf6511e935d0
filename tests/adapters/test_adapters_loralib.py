"""loralib's state dicts as PEFT adapters and back, held against the real loralib 0.1.2."""

import json
from pathlib import Path

import pytest
import torch
from adapter_models import ALPHA, build_pair, logits, loralib_layers, relative, save_trained, some_ids, torch_layers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_phi3.adapters.convert import loralib_to_peft, peft_to_loralib, read_base
from qlora_phi3.adapters.delta import read_enable
from qlora_phi3.adapters.loralib import Spec
from qlora_phi3.errors import ExportError
from qlora_phi3.family import part_rows, read_architecture

lora = pytest.importorskip("loralib", reason="the real loralib is needed: pip install loralib==0.1.2")

#: PEFT warns of every embedding that is adapted.
pytestmark = pytest.mark.filterwarnings("ignore:.*embedding layer:UserWarning")

MASKS = [[True, True, True], [True, False, True], [False, True, False], [False, True, True]]
#: What the conversions print is evaluated: `lora.Linear(...)`.
NAMES = {"lora": lora}


def spec_of(enable: list[bool], kernel: int = 3) -> Spec:
    return Spec(alpha={"": ALPHA}, enable={"merged": enable}, conv2d={"conv": kernel})


def build_as_noted(notes: tuple[str, ...], layer: str) -> nn.Module:
    """The loralib layer that a conversion describes."""
    (line,) = [line for line in notes if line.strip().startswith(f"{layer}: ")]
    return eval(line.partition(": ")[2].partition("   ")[0], NAMES)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("enable", MASKS, ids=str)
def test_peft_computes_what_the_real_loralib_computes(tmp_path, enable, kernel):
    torch.manual_seed(0)
    model = loralib_layers(enable, kernel=kernel)
    torch.save(lora.lora_state_dict(model), tmp_path / "lora.pt")
    loralib_to_peft(tmp_path / "lora.pt", tmp_path / "peft", spec_of(enable, kernel))
    loaded = PeftModel.from_pretrained(torch_layers(model, kernel=kernel), tmp_path / "peft").double()
    assert relative(model(some_ids()), loaded(some_ids())) < 1e-12
    assert relative(model.float()(some_ids()), loaded.float()(some_ids())) < 1e-6


@pytest.mark.parametrize("enable", MASKS, ids=str)
def test_loralib_to_peft_and_back_gives_the_same_bits(tmp_path, enable):
    torch.manual_seed(0)
    torch.save(lora.lora_state_dict(loralib_layers(enable)), tmp_path / "lora.pt")
    loralib_to_peft(tmp_path / "lora.pt", tmp_path / "peft", spec_of(enable))
    notes = peft_to_loralib(tmp_path / "peft", tmp_path / "back.pt", Spec(enable={"merged": enable})).notes
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("lora.pt", "back.pt"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {build_as_noted(notes, layer).lora_alpha for layer in ("plain", "merged", "conv", "embed_tokens")} == {ALPHA}


@pytest.mark.parametrize("alpha", [None, 1, 7])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"conv": 20}, "rank_pattern": {"plain": 2}}])
def test_the_real_loralib_loads_a_peft_adapter_with_strict_false(tmp_path, alpha, settings):
    torch.manual_seed(0)
    base = torch_layers(loralib_layers([True, True, True]))
    names = ["embed_tokens", "plain", "merged", "conv"]
    config = LoraConfig(target_modules=names, r=4, lora_alpha=9, init_lora_weights=False, **settings)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = get_peft_model(base, config).double()
    adapted.save_pretrained(tmp_path / "peft")
    spec = Spec(alpha={} if alpha is None else {"": alpha}, enable={"merged": [True, True, True]})
    notes = peft_to_loralib(tmp_path / "peft", tmp_path / "lora.pt", spec).notes
    model = loralib_layers([True, True, True])
    for name in names:
        setattr(model, name, build_as_noted(notes, name).double())
    model.load_state_dict({name.replace("conv.", "conv.conv."): tensor for name, tensor in state.items()}, strict=False)
    result = model.load_state_dict(torch.load(tmp_path / "lora.pt", weights_only=True), strict=False)
    assert not result.unexpected_keys
    # alpha given: B is folded, to float64 here as the adapter is.
    assert relative(adapted(some_ids()), model(some_ids())) < 1e-12
    assert alpha is None or build_as_noted(notes, "conv").lora_alpha == alpha


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_trained_biases_travel_both_ways(tmp_path, kind):
    torch.manual_seed(0)
    model = loralib_layers([True, True, True])
    torch.save(lora.lora_state_dict(model, bias=kind), tmp_path / "lora.pt")
    loralib_to_peft(tmp_path / "lora.pt", tmp_path / "peft", spec_of([True, True, True]))
    other = torch_layers(model)
    for layer in (
        other.plain,
        other.merged,
        *([other.conv] if kind == "all" else []),
    ):  # loralib's lora_only passes over Conv2d
        layer.bias.data.zero_()
    loaded = PeftModel.from_pretrained(other, tmp_path / "peft").double()
    assert relative(model(some_ids()), loaded(some_ids())) < 1e-12
    assert loaded.peft_config["default"].bias == "lora_only"
    peft_to_loralib(tmp_path / "peft", tmp_path / "back.pt", Spec(enable={"merged": [True, True, True]}))
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("lora.pt", "back.pt"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def with_merged_linear(model: nn.Module, enable: tuple[bool, ...]) -> nn.Module:
    """A Phi-3 whose qkv_proj are loralib's, with random matrices."""
    for layer in model.model.layers:
        old = layer.self_attn.qkv_proj
        new = lora.MergedLinear(old.in_features, old.out_features, r=4, lora_alpha=8, enable_lora=list(enable), bias=False)
        new.weight.data = old.weight.data.clone()
        new.lora_A.data.normal_(std=0.1)
        new.lora_B.data.normal_(std=0.1)
        layer.self_attn.qkv_proj = new
    return model.train()


@pytest.mark.parametrize(("words", "mask"), [("qv", (1, 1, 0, 1)), ("qkv", (1, 1, 1, 1)), ("k", (0, 0, 1, 0))])
def test_groups_of_a_grouped_query_model_have_the_size_of_its_key_heads(tmp_path, base, words, mask):
    # 4 heads, 2 of them key-value heads
    enable = read_enable([",".join(words)], lambda: read_architecture(str(base)))["qkv_proj"]
    assert enable == tuple(map(bool, mask))
    fused, _ = build_pair()
    model = with_merged_linear(build_pair()[0], enable)
    torch.save(lora.lora_state_dict(model), tmp_path / "lora.pt")
    spec = Spec(alpha={"": 8}, enable={"qkv_proj": enable})
    loralib_to_peft(tmp_path / "lora.pt", tmp_path / "peft", spec, base=read_base(str(base)))
    loaded = PeftModel.from_pretrained(fused, tmp_path / "peft")
    assert relative(logits(model), logits(loaded)) < 1e-5
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"] == ["qkv_proj"]
    rows = part_rows(read_architecture(str(base)))
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    lora_B = tensors["base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight"]
    parts = zip("qkv", lora_B.split([rows["q_proj"], rows["k_proj"], rows["v_proj"]]), strict=True)
    assert "".join(part for part, piece in parts if piece.any()) == words


@pytest.mark.parametrize(
    ("name", "enable"),
    [
        ("microsoft/Phi-3-mini-4k-instruct", [1, 0, 1]),
        ("microsoft/Phi-3-medium-4k-instruct", [1, 1, 1, 1, 0, 1]),
        ("microsoft/Phi-4-mini-instruct", [1, 1, 1, 0, 1]),
    ],
)
def test_q_and_v_are_these_groups_in_the_real_models(name, enable):
    architecture = read_architecture(name, prefer_shipped=True)
    groups = read_enable(["q,v", "up"], lambda: architecture)
    assert groups == {"qkv_proj": tuple(map(bool, enable)), "gate_up_proj": (False, True)}


def test_one_layer_of_phi_3_mini_agrees_with_loralib_to_1e_6_in_fp32(tmp_path):
    torch.manual_seed(0)
    layer = lora.MergedLinear(3072, 9216, r=16, lora_alpha=16, enable_lora=[True, False, True], bias=False)
    layer.lora_B.data.normal_(std=0.02)
    model = nn.ModuleDict({"qkv_proj": layer})
    torch.save(lora.lora_state_dict(model), tmp_path / "lora.pt")
    spec = Spec(alpha={"": 16}, enable={"qkv_proj": [True, False, True]})
    loralib_to_peft(tmp_path / "lora.pt", tmp_path / "peft", spec)
    plain = nn.ModuleDict({"qkv_proj": nn.Linear(3072, 9216, bias=False)})
    loaded = PeftModel.from_pretrained(plain, tmp_path / "peft").base_model.model["qkv_proj"]
    assert relative(layer.merge_AB() * layer.scaling, loaded.get_delta_weight("default")) < 1e-6


def test_a_loralib_checkpoint_is_trained_on_from_where_it_stood(tmp_path):
    fused, _ = build_pair()
    model = with_merged_linear(build_pair()[0], (True, True, False, True))
    torch.save(lora.lora_state_dict(model), tmp_path / "lora.pt")
    spec = Spec(alpha={"": 8}, enable={"qkv_proj": [True, True, False, True]})
    loralib_to_peft(tmp_path / "lora.pt", tmp_path / "peft", spec)
    loaded = PeftModel.from_pretrained(fused, tmp_path / "peft", is_trainable=True)
    assert relative(logits(model), logits(loaded)) < 1e-5
    trained = {name: tensor.clone() for name, tensor in loaded.named_parameters() if tensor.requires_grad}
    assert {name.rpartition(".lora_")[1] for name in trained} == {".lora_"}
    assert len(trained) == 4
    optimizer = torch.optim.SGD([tensor for tensor in loaded.parameters() if tensor.requires_grad], lr=1.0)
    loaded.train()(torch.arange(3, 15)[None], labels=torch.arange(3, 15)[None]).loss.backward()
    optimizer.step()
    moved = {name for name, tensor in loaded.named_parameters() if name in trained and not torch.equal(tensor, trained[name])}
    assert moved == trained.keys()


def test_a_checkpoint_goes_onto_a_4_bit_base_in_fp32(tmp_path, base):
    from tiny_model import load_tiny

    four_bit = load_tiny(base).unload()
    fused, _ = build_pair(vocab_size=832)
    torch.save(lora.lora_state_dict(with_merged_linear(fused, (True,) * 4)), tmp_path / "lora.pt")
    loralib_to_peft(tmp_path / "lora.pt", tmp_path / "peft", Spec(alpha={"": 8}, enable={"qkv_proj": [True] * 4}))
    loaded = PeftModel.from_pretrained(four_bit, tmp_path / "peft", is_trainable=True)
    trainable = [tensor for tensor in loaded.parameters() if tensor.requires_grad]
    assert {tensor.dtype for tensor in trainable} == {torch.float32}
    saved = torch.load(tmp_path / "lora.pt", weights_only=True)
    assert torch.equal(trainable[0], saved["model.layers.0.self_attn.qkv_proj.lora_A"])


@pytest.mark.parametrize(
    ("settings", "enable", "named"),
    [
        ({"use_dora": True}, {}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, {}, "lm_head.weight"),
        ({}, {"qkv_proj": [True, True, False, True]}, "group 3 of 4"),
    ],
)
def test_what_loralib_cannot_hold_is_refused_by_name_and_nothing_is_written(tmp_path, settings, enable, named):
    save_trained(build_pair()[0], tmp_path / "peft", target_modules=["qkv_proj"], **settings)
    with pytest.raises(ExportError, match=named):
        peft_to_loralib(tmp_path / "peft", tmp_path / "lora.pt", Spec(enable=enable))
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_a_plain_lora_on_a_fused_layer_is_a_merged_linear_with_all_groups_on(tmp_path):
    fused, _ = build_pair()
    adapted = save_trained(fused, tmp_path / "peft", target_modules=["qkv_proj"], r=4, lora_alpha=8)
    peft_to_loralib(tmp_path / "peft", tmp_path / "lora.pt", Spec(enable={"qkv_proj": [True] * 4}))
    model = with_merged_linear(build_pair()[0], (True,) * 4)
    assert not model.load_state_dict(torch.load(tmp_path / "lora.pt", weights_only=True), strict=False).unexpected_keys
    assert relative(logits(adapted), logits(model)) < 1e-5


def test_an_adapted_embedding_brings_peft_s_copy_of_the_base_along(tmp_path):
    fused, _ = build_pair()
    save_trained(fused, tmp_path / "peft", target_modules=["embed_tokens"])
    peft_to_loralib(tmp_path / "peft", tmp_path / "lora.pt", Spec())
    saved = torch.load(tmp_path / "lora.pt", weights_only=True)
    assert sorted(name.rpartition(".")[2] for name in saved) == ["lora_A", "lora_B", "weight"]
    loralib_to_peft(tmp_path / "lora.pt", tmp_path / "back", Spec(alpha={"": 8}))
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("nested", ["model_state_dict", "state_dict"])
def test_a_state_dict_is_found_inside_a_checkpoint_and_in_safetensors(tmp_path: Path, nested):
    tensors = {"x.lora_A": torch.randn(4, 8), "x.lora_B": torch.randn(6, 4)}
    torch.save({nested: tensors, "step": 3}, tmp_path / "lora.pt")
    save_file(tensors, tmp_path / "lora.safetensors")
    for name in ("lora.pt", "lora.safetensors"):
        loralib_to_peft(tmp_path / name, tmp_path / f"{name}-peft", Spec(alpha={"": 16}))
        saved = load_file(tmp_path / f"{name}-peft" / "adapter_model.safetensors")
        assert torch.equal(saved["base_model.model.x.lora_A.weight"], tensors["x.lora_A"])
