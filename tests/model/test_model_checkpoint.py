"""Bases as their files say: already quantized in 4 bit, longrope under its old name, and a commit of the hub."""

import json

import pytest
import torch
from tiny_model import FP32, save_tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_phi3.errors import ModelError
from qlora_phi3.family import parse_architecture, read_architecture, read_config
from qlora_phi3.memory.simulate import build_skeleton
from qlora_phi3.model.checkpoint import check_checkpoint
from qlora_phi3.model.phi3 import load_base
from qlora_phi3.model.quantized import quantized_weights
from qlora_phi3.recipe.schema import Model, Quantization

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 40, 5, 77, 200]])
KINDS = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "mixed": {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp", "o_proj"]},
}


def load(folder, quantization=None):
    architecture = read_architecture(str(folder))
    check_checkpoint(str(folder), architecture)
    quantization = quantization or Quantization()
    name = Model(name=str(folder))
    return load_base(name, quantization, architecture, compute_dtype=FP32, device=CPU, longest_row=512)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny base in fp16, as it is quantized from."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "plain")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    return folder


def store(plain, folder, kind):
    """Store a base in 4 bit as transformers does it; returns the folder and the settings."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16, **KINDS[kind])
    options = {"dtype": torch.float16, "quantization_config": settings, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(plain, **options).save_pretrained(folder)
    return folder, settings


@pytest.fixture(scope="module", params=KINDS)
def stored(request, plain, tmp_path_factory):
    """That base stored in 4 bit, and the settings."""
    return store(plain, tmp_path_factory.mktemp("stored") / request.param, request.param)


def test_a_stored_4_bit_base_is_used_as_it_is(plain, stored):
    folder, settings = stored
    kind, model = read_architecture(str(folder)).stored, load(folder)
    assert (kind.quant_type, kind.double_quant) == (settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant)
    assert kind.compute_dtype == "float16"
    reference = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    own, theirs = quantized_weights(model), quantized_weights(reference)
    assert own.keys() == theirs.keys()
    assert len(own) == (4 if settings.llm_int8_skip_modules else 8)
    for name, weight in own.items():
        assert torch.equal(weight.data, theirs[name].data)
        assert weight.quant_state.nested == kind.double_quant
    skeleton = build_skeleton(
        read_config(str(folder)), read_architecture(str(folder)), Model(name="x"),
        Quantization(bnb_4bit_quant_type=kind.quant_type, bnb_4bit_use_double_quant=kind.double_quant),
        compute_dtype=torch.float32, longest_row=8,
    )  # fmt: skip
    assert {name for name, layer in skeleton.named_modules() if type(layer).__name__ == "Linear4bit"} == {
        name.removesuffix(".weight") for name in own
    }


def test_a_stored_4_bit_base_computes_in_the_runs_dtype(stored):
    folder, _ = stored
    model = load(folder)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.uint8 if name in quantized_weights(model) else torch.float32)
    assert {layer.compute_dtype for layer in model.modules() if type(layer).__name__ == "Linear4bit"} == {torch.float32}
    with torch.no_grad():
        logits = model(IDS).logits
        reference = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})(IDS).logits.float()
    assert logits.dtype == torch.float32
    # The reference computes in fp16, and on CPUs with AVX512-BF16 in bfloat16.
    assert float((logits - reference).norm() / reference.norm()) < 2e-2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "NF4 with"),
        ({"bnb_4bit_use_double_quant": True}, "without double quantization"),
        ({"llm_int8_skip_modules": ["lm_head", "qkv_proj"]}, "says unquantized"),
        (None, "says unquantized"),
    ],
    ids=["type", "double", "layers", "no-settings"],
)
def test_files_that_are_quantized_in_another_way_than_config_json_says_are_refused(plain, tmp_path, change, says):
    copy, _ = store(plain, tmp_path / "stored", "nf4")
    content = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    content["quantization_config"] = change and {**content["quantization_config"], **change}
    (copy / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match=says):
        check_checkpoint(str(copy), read_architecture(str(copy)))


def test_su_is_longrope(tmp_path):
    folder = save_tiny_model(tmp_path / "su", max_position_embeddings=1024)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del content["rope_parameters"]
    factors = {"short_factor": [1 + i / 10 for i in range(16)], "long_factor": [2 + i / 10 for i in range(16)]}
    content |= {"original_max_position_embeddings": 8, "rope_theta": 10000.0}
    logits = {}
    for kind in ("longrope", "su"):
        content["rope_scaling"] = {"type": kind, **factors}
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
        assert read_architecture(str(folder)).longrope_boundary == 8
        model = load(folder, Quantization(load_in_4bit=False))
        logits[kind] = [model(IDS).logits, model(IDS.repeat(1, 3)).logits]  # below and beyond the boundary
    assert all(torch.equal(*pair) for pair in zip(*logits.values(), strict=True))


def test_an_inner_boundary_of_longrope_is_used(tmp_path):
    """transformers 5.23 ignores it, and takes 4096."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 8, **factors}
    folder = save_tiny_model(tmp_path / "inner")
    content = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"rope_parameters": rope}
    del content["original_max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    assert read_architecture(str(folder)).longrope_boundary == 8
    assert load(folder).config.rope_parameters["original_max_position_embeddings"] == 8


def test_the_commit_of_a_model_in_the_hubs_cache_is_known(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    name = Model(name=str(save_tiny_model(tmp_path / "models--someone--tiny" / "snapshots" / commit)))
    architecture = parse_architecture(read_config(name.name), "tiny")
    model = load_base(name, Quantization(), architecture, compute_dtype=FP32, device=CPU, longest_row=8)
    assert model.config._commit_hash == commit
