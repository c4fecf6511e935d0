import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from tiny_model import FP32, load_tiny, save_tiny_model
from torch import nn

from qlora_phi3.errors import ModelError
from qlora_phi3.family import parse_architecture, read_architecture
from qlora_phi3.model.lora import attach_adapter, linear_layers, measure_coverage
from qlora_phi3.model.phi3 import choose_precision, load_base, set_checkpointing
from qlora_phi3.recipe.schema import Lora, Model, Quantization

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def load(folder, **quantization):
    return load_base(
        Model(name=str(folder)),
        Quantization(**quantization),
        read_architecture(str(folder)),
        precision=FP32,
        device=CPU,
        longest_row=100,
    )


def test_the_base_is_nf4_with_double_quantization_and_frozen(folder):
    model = load(folder)
    layer = model.model.layers[0].mlp.down_proj
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.weight.dtype == torch.uint8
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is False


def test_the_head_and_the_embedding_are_not_quantized(folder):
    model = load(folder)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.float32


def test_bitsandbytes_repacking_is_off_in_every_layer(folder, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    assert bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu
    layers = [module for module in load(folder).modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(layers) == 8
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_all_linear_covers_every_linear_weight_and_the_adapter_is_fp32(folder):
    model = attach_adapter(load(folder), Lora(r=4))
    coverage = measure_coverage(model)
    assert coverage.share == 1.0
    assert coverage.targets == ("down_proj", "gate_up_proj", "o_proj", "qkv_proj")
    # by hand: in + out of qkv (128, 256), o (128, 128), gate_up (128, 512), down (256, 128), x rank 4 x 2 layers
    assert coverage.trainable_parameters == 4 * 2 * (384 + 256 + 640 + 384)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_two_of_the_fused_layers_cover_their_share(folder):
    model = attach_adapter(load(folder), Lora(r=4, target_modules=["o_proj", "down_proj"]))
    # 128*128 + 256*128 of 128*256 + 128*128 + 128*512 + 256*128
    assert measure_coverage(model).share == pytest.approx(49152 / 147456)


def test_a_llama_name_that_matches_nothing_is_refused_with_the_models_own_layers(folder):
    with pytest.raises(ModelError, match=r"'q_proj' matches no layer.*down_proj, gate_up_proj, o_proj, qkv_proj"):
        attach_adapter(load(folder), Lora(target_modules=["q_proj", "o_proj"]))


def test_an_adapter_on_the_head_is_refused(folder):
    with pytest.raises(ModelError, match="lm_head"):
        attach_adapter(load(folder), Lora(target_modules=["lm_head"]))


def test_a_trained_head_gets_the_gradient_of_the_full_cross_entropy(folder):
    model = attach_adapter(load(folder, load_in_4bit=False), Lora(r=4, modules_to_save=["lm_head"]))
    ids = torch.randint(3, 512, (1, 20))
    model(input_ids=ids, labels=ids).loss.backward()
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    ours, head.grad = head.grad.clone(), None
    logits = model(input_ids=ids).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.testing.assert_close(ours, head.grad, rtol=1e-4, atol=1e-6)


def test_the_loss_with_labels_is_that_of_transformers_without_them(folder):
    model = load_tiny(folder)
    ids = torch.randint(3, 512, (1, 30))
    labels = ids.clone()
    labels[:, :10] = -100
    logits = model(input_ids=ids).logits
    expected = nn.functional.cross_entropy(logits[0, 9:-1], ids[0, 10:])
    output = model(input_ids=ids, labels=labels)
    assert output.logits is None
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-5)


def test_checkpointing_needs_no_gradient_of_the_embedding(folder):
    model = load_tiny(folder)
    set_checkpointing(model, 1)
    model.train()
    seen = []
    model.base_model.model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    ids = torch.randint(3, 512, (1, 30))
    model(input_ids=ids, labels=ids).loss.backward()
    assert seen[0] is False


@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_a_named_precision_is_taken(wanted):
    assert choose_precision(wanted, CPU).compute_dtype == getattr(torch, wanted)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bf16_only_where_it_is_native(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_precision("auto", CPU).compute_dtype == expected


@pytest.mark.parametrize(("capability", "expected"), [((8, 6), torch.bfloat16), ((7, 5), torch.float16)])
def test_a_card_computes_in_bf16_from_compute_capability_8(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_precision("auto", torch.device("cuda", 0)).compute_dtype == expected


def test_another_model_type_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match=r"type 'llama', not phi3.*Phi-4-mini"):
        read_architecture(str(tmp_path))


def test_weights_cut_short_are_one_clear_error(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "cut")
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot be read"):
        load(copy)


def test_missing_tensors_are_refused_and_never_made_up(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "holes")
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete.*layers\.1\.mlp\.down_proj"):
        load(copy)


def test_a_pickle_is_refused_with_the_reason(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "pickle")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only as a pickle \(pytorch_model\.bin\)"):
        load(copy)


def test_the_shapes_of_phi_3_mini_4k_are_read_from_its_config():
    config = {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047,
    }  # fmt: skip
    architecture = parse_architecture(config, "phi-3")
    assert (architecture.sliding_window, architecture.longrope_boundary) == (2047, None)
    long = parse_architecture({**config, "rope_scaling": {"type": "longrope"}, "sliding_window": None}, "phi-3")
    assert (long.sliding_window, long.longrope_boundary) == (None, 4096)


def test_linear_layers_leave_out_the_head(folder):
    names = linear_layers(load(folder))
    assert len(names) == 8
    assert not any("lm_head" in name for name in names)
