"""The adapter covers the layers it names, and its fused forward is PEFT's."""

from unittest.mock import patch

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from tiny_model import FP32, gradients, load_tiny, relative_difference

from qlora_phi3.errors import ModelError
from qlora_phi3.family import read_architecture
from qlora_phi3.model.lora import (
    _FusedLoraForward,
    attach_adapter,
    linear_layers,
    measure_coverage,
    start_from_quantization_error,
)
from qlora_phi3.model.phi3 import load_base
from qlora_phi3.model.weights import open_weights, read_tensor
from qlora_phi3.objectives import sft
from qlora_phi3.recipe.schema import Lora, Model, Quantization


def load_base_of(folder):
    return load_base(
        Model(name=str(folder)),
        Quantization(),
        read_architecture(str(folder)),
        compute_dtype=FP32,
        device=torch.device("cpu"),
        longest_row=100,
    )


def fused_layers(model):
    return [module for module in model.modules() if isinstance(getattr(module, "forward", None), _FusedLoraForward)]


def loss_and_gradients(model):
    model.zero_grad()
    ids = torch.randint(3, 512, (1, 40), generator=torch.Generator().manual_seed(0))
    loss = sft(model, {"input_ids": ids, "labels": ids}, 39).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("lora", [Lora(r=8, lora_alpha=24), Lora(r=8, use_rslora=True), Lora(r=8, rank_pattern={"o_proj": 4})])
def test_the_update_in_one_matmul_is_pefts(folder, four_bit, lora):
    model = load_tiny(folder, four_bit=four_bit, lora=lora)
    layers = fused_layers(model)
    assert len(layers) == 8
    loss, ours = loss_and_gradients(model)
    for layer in layers:
        del layer.forward
    peft_loss, theirs = loss_and_gradients(model)
    assert loss == pytest.approx(peft_loss, rel=1e-6)
    assert relative_difference(theirs, ours) < 1e-5


@pytest.mark.parametrize("lora", [Lora(r=8, lora_dropout=0.1), Lora(r=8, lora_dropout=0.1, use_dora=True)])
def test_dropout_keeps_pefts_own_forward(folder, lora):
    assert fused_layers(load_tiny(folder, lora=lora)) == []


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_magnitude_of_dora_is_the_length_of_every_row_of_base_and_update(folder, start, dropout):
    model = attach_adapter(load_base_of(folder), Lora(r=8, use_dora=True, init_lora_weights=start, lora_dropout=dropout))
    layers = [each for each in model.modules() if isinstance(each, LoraLayer)]
    assert len(layers) == 8
    for each in layers:
        packed, update = each.get_base_layer().weight, each.get_delta_weight("default")
        weight = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
        assert (update.norm() > 0.1) == (not start)  # false: B is not zero
        magnitude = each.lora_magnitude_vector["default"].weight
        assert magnitude.requires_grad
        torch.testing.assert_close(magnitude.detach(), (weight + update).norm(dim=1), rtol=1e-6, atol=0)


def test_dora_without_gradients_multiplies_as_peft_does_without_the_product_of_its_matrices(folder):
    model, sizes = load_tiny(folder, lora=Lora(r=8, use_dora=True)).eval(), []
    norms = DoraLinearLayer.get_lora_weight
    ids = torch.randint(3, 512, (1, 20))
    with torch.no_grad(), patch.object(DoraLinearLayer, "get_lora_weight", lambda *a, **k: sizes.append(1) or norms(*a, **k)):
        logits = model(input_ids=ids).logits
        assert sizes == []
        for layer in fused_layers(model):
            del layer.forward
        expected = model(input_ids=ids).logits
        assert len(sizes) == 4 * 2
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_disabled_adapter_leaves_the_base(folder):
    model = load_tiny(folder)
    ids = torch.randint(3, 512, (1, 20))
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        for layer in fused_layers(model):
            layer.lora_B["default"].weight.zero_()
        torch.testing.assert_close(model(input_ids=ids).logits, base)
    assert float((adapted - base).abs().max()) > 1e-3


def test_all_linear_covers_every_linear_weight_and_the_adapter_is_fp32(folder):
    model = attach_adapter(load_base_of(folder), Lora(r=4))
    assert measure_coverage(model) == (1.0, ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"])
    # by hand: in + out of qkv (128, 256), o (128, 128), gate_up (128, 512), down (256, 128), x rank 4 x 2 layers
    assert model.get_nb_trainable_parameters()[0] == 4 * 2 * (384 + 256 + 640 + 384)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_two_of_the_fused_layers_cover_their_share(folder):
    model = attach_adapter(load_base_of(folder), Lora(r=4, target_modules=["o_proj", "down_proj"]))
    # 128*128 + 256*128 of 128*256 + 128*128 + 128*512 + 256*128
    assert measure_coverage(model)[0] == pytest.approx(49152 / 147456)


def test_a_llama_name_that_matches_nothing_is_refused_with_the_models_own_layers(folder):
    with pytest.raises(ModelError):
        attach_adapter(load_base_of(folder), Lora(target_modules=["q_proj", "o_proj"]))


def test_an_adapter_on_the_head_is_refused(folder):
    with pytest.raises(ModelError):
        attach_adapter(load_base_of(folder), Lora(target_modules=["lm_head"]))


def test_linear_layers_leave_out_the_head(folder):
    names = linear_layers(load_base_of(folder))
    assert len(names) == 8
    assert not any("lm_head" in name for name in names)


def test_loftq_starts_with_the_best_update_of_its_rank_for_what_quantization_changed(folder):
    from bitsandbytes.functional import dequantize_4bit

    model = attach_adapter(load_base_of(folder), Lora(r=8, lora_alpha=32, init_lora_weights="loftq"))
    assert model.peft_config["default"].init_lora_weights is True  # what is saved is a plain LoRA
    codes = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    originals = open_weights(folder)
    start_from_quantization_error(model, originals)
    assert all(torch.equal(p, codes[name]) for name, p in model.named_parameters() if name in codes)
    for name, layer in model.get_base_model().named_modules():
        if "lora_A" in getattr(layer, "_modules", {}):
            weight = layer.get_base_layer().weight
            error = read_tensor(originals, f"{name}.weight") - dequantize_4bit(weight.data, weight.quant_state).float()
            update = 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            left = float(torch.linalg.svdvals(error)[8:].norm())  # Eckart and Young
            assert float((error - update).norm()) == pytest.approx(left, rel=0.01)
            assert left < 0.95 * float(error.norm())
