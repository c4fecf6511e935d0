import pytest
import torch
from tiny_model import gradients, load_tiny, relative_difference, save_tiny_model

from qlora_phi3.model.lora import _FusedLoraForward
from qlora_phi3.recipe.schema import Lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def fused_layers(model):
    return [module for module in model.modules() if isinstance(getattr(module, "forward", None), _FusedLoraForward)]


def loss_and_gradients(model):
    model.zero_grad()
    ids = torch.randint(3, 512, (1, 40), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize(
    "lora", [Lora(r=8, lora_alpha=24), Lora(r=8, use_rslora=True), Lora(r=8, rank_pattern={"o_proj": 4})]
)
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


@pytest.mark.parametrize("lora", [Lora(r=8, lora_dropout=0.1), Lora(r=8, use_dora=True)])
def test_dropout_and_dora_keep_pefts_own_forward(folder, lora):
    assert fused_layers(load_tiny(folder, lora=lora)) == []


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
