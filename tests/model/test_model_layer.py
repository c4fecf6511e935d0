"""The lean decoder layer against transformers' on loss and gradients, and what it computes and keeps."""

from copy import deepcopy

import pytest
import torch
from tiny_model import gradients, load_tiny, random_rows, relative_difference, save_tiny_model
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.model import kernels, layer
from qlora_phi3.model.phi3 import find_base, set_checkpointing, set_mlp_tiles
from qlora_phi3.recipe.schema import Lora
from qlora_phi3.step import collate, forward_backward

LENGTHS = [7, 61, 90, 33]
ROPE_SIZE = 128 // 4 // 2
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * ROPE_SIZE,
    "long_factor": [4.0] * ROPE_SIZE,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 50,
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
SHAPES = {
    "grouped queries": {},
    "a key for each query": {"num_key_value_heads": 4},
    "longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 50, "max_position_embeddings": 400},
    "partial rotary": {"rope_parameters": PARTIAL},
}
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=3)


def step(model, *, packing=True, dtype=torch.float32):
    model.train().zero_grad()
    plan = MicroBatchPlan(max_tokens=10_000, max_rows=8, packing=packing, longrope_boundary=None)
    batch = collate(random_rows(LENGTHS), plan)
    result = forward_backward(model, batch, compute_dtype=dtype, backward=torch.Tensor.backward)
    return float(result.loss), gradients(model)


def as_transformers(model):
    """The same model with transformers' own layers."""
    for each in find_base(model).model.layers:
        each.__class__ = Phi3DecoderLayer
    return model


@pytest.fixture
def pieces(monkeypatch):
    """The names of the autograd functions that ran forward."""
    ran = set()
    for name in ("_NormedProjection", "_AddedProjection", "_GatedProjection", "_Rotation", "_RmsNorm", "_SwiGlu"):
        usual = getattr(layer, name).apply
        monkeypatch.setattr(getattr(layer, name), "apply", lambda *a, name=name, usual=usual: (ran.add(name), usual(*a))[1])
    return ran


ALL_LEAN = {"_NormedProjection", "_AddedProjection", "_GatedProjection", "_Rotation"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packing", [True, False])
def test_gradients_are_those_of_transformers_layer(tmp_path, pieces, shape, packing):
    folder = save_tiny_model(tmp_path, num_hidden_layers=3, **SHAPES[shape])
    loss, expected = step(as_transformers(load_tiny(folder)), packing=packing)
    assert pieces == set()
    model = load_tiny(folder)
    for every, tiles in ((0, 0), (1, 0), (2, 0), (0, 100), (1, 100), (2, 64)):
        set_checkpointing(model, every)
        set_mlp_tiles(model, tiles)
        other_loss, other = step(model, packing=packing)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert relative_difference(expected, other) < 1e-5
    assert pieces == ALL_LEAN


#: What else than a plain LoRA the lean layer computes. On a CPU its masks of dropout are those of `functional.dropout`.
ADAPTERS = {"dropout": Lora(r=8, lora_dropout=0.2), "DoRA": Lora(r=8, use_dora=True)}


def with_other_magnitudes(model):
    """The model with magnitudes that are not the norms of its weights, as after training."""
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(torch.linspace(0.7, 1.4, len(parameter)))
    return model


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("four_bit", [True, False])
def test_gradients_with_dropout_and_with_dora_are_those_of_pefts_layers(folder, pieces, monkeypatch, name, four_bit):
    def load():
        return with_other_magnitudes(load_tiny(folder, lora=ADAPTERS[name], four_bit=four_bit))

    reference, model, plain = as_transformers(load()), load(), {}
    for every, tiles in ((0, 0), (1, 0), (2, 0), (0, 100), (1, 100)):
        set_checkpointing(model, every)
        set_mlp_tiles(model, tiles)
        torch.manual_seed(5)
        loss, found = step(model)
        assert pieces == ALL_LEAN
        if tiles:  # the masks are drawn tile by tile
            with monkeypatch.context() as patch:
                patch.setattr(layer, "read_loras", lambda *_: None)
                torch.manual_seed(5)
                expected_loss, expected = step(model)
            pieces -= {"_RmsNorm", "_SwiGlu"}
        else:
            torch.manual_seed(5)
            expected_loss, expected = step(reference)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert relative_difference(expected, found) < 1e-5
        known = plain.setdefault(tiles, found)
        assert all(torch.equal(known[each], found[each]) for each in known)  # recomputed or not


@pytest.mark.parametrize("name", ADAPTERS)
def test_in_bf16_a_recomputed_layer_with_dropout_or_dora_has_the_same_gradients(folder, name):
    model = load_tiny(folder, lora=ADAPTERS[name], compute_dtype=BF16)
    found = []
    for every in (0, 1):
        set_checkpointing(model, every)
        torch.manual_seed(5)
        found.append(step(model, dtype=torch.bfloat16)[1])
    assert all(torch.equal(found[0][each], found[1][each]) for each in found[0])


def test_dropout_is_left_out_in_eval_mode(folder):
    model, plain = (load_tiny(folder, lora=lora).eval() for lora in (ADAPTERS["dropout"], Lora(r=8)))
    ids = torch.arange(3, 40)[None]
    losses = [each(input_ids=ids).logits.sum().item() for each in (model, plain)]
    assert losses[0] == losses[1]
    assert model.train()(input_ids=ids).logits.sum().item() != losses[0]


def test_the_row_norms_of_dora_follow_the_trained_matrices_and_are_in_no_state_dict(folder):
    model = load_tiny(folder, lora=ADAPTERS["DoRA"])
    assert not [name for name in model.state_dict() if "row_squares" in name]
    for copy in (model, deepcopy(model)):
        projection = find_base(copy).model.layers[0].mlp.down_proj
        lora = layer.read_lora(projection)
        weight = lora.dequantize()
        update = lora.lora_B @ lora.lora_A * lora.scaling
        norms = lora.row_norms(weight, lora.lora_A, lora.lora_B)
        torch.testing.assert_close(norms, (weight + update).norm(dim=1), rtol=1e-6, atol=0)
        assert (update.norm(dim=1) / norms).min() > 0.01


def test_the_gradient_of_a_magnitude_is_finite_where_fp16_would_overflow(folder):
    model = load_tiny(folder, lora=ADAPTERS["DoRA"])
    lora = layer.read_lora(find_base(model).model.layers[0].mlp.down_proj)
    grad, output = (torch.full((2, 128), value, dtype=torch.float16) for value in (30000.0, 10.0))
    scaled, grad_magnitude = lora.unscale(grad, [output, torch.full((128,), 0.5)])
    torch.testing.assert_close(grad_magnitude, 600000.0 / lora.magnitude)
    assert torch.equal(scaled, torch.full((2, 128), 15000.0, dtype=torch.float16))


@pytest.mark.parametrize(
    ("lora", "ran"),
    [
        (Lora(r=8, use_dora=True, lora_dropout=0.1), {"_Rotation", "_RmsNorm", "_SwiGlu"}),
        (Lora(r=8, target_modules=["qkv_proj", "down_proj"]), {"_Rotation", "_RmsNorm", "_SwiGlu"}),
        (
            Lora(r=8, target_modules=["qkv_proj", "o_proj"]),
            {"_Rotation", "_RmsNorm", "_SwiGlu", "_NormedProjection", "_AddedProjection"},
        ),
    ],
)
@pytest.mark.parametrize("every", [0, 1])
def test_what_is_not_plain_takes_pefts_code_and_trains_the_same(folder, pieces, lora, ran, every):
    reference, model = as_transformers(load_tiny(folder, lora=lora)), load_tiny(folder, lora=lora)
    set_checkpointing(model, every)
    torch.manual_seed(5)
    loss, expected = step(reference)
    torch.manual_seed(5)
    other_loss, other = step(model)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert relative_difference(expected, other) < 1e-5
    assert pieces == ran


@pytest.mark.parametrize("lora", [Lora(r=8), *ADAPTERS.values()], ids=["plain", *ADAPTERS])
def test_in_bf16_gradients_are_as_near_to_fp32_as_those_of_transformers_layer(folder, lora):
    """The sum of four draws: each layer's rounding is its own, and so is the noise of one draw."""
    errors = {"theirs": 0.0, "ours": 0.0}
    for seed in range(4):
        exact = step(as_transformers(load_tiny(folder, four_bit=False, seed=seed, lora=lora)))[1]
        for name, change in (("theirs", as_transformers), ("ours", lambda model: model)):
            model = change(load_tiny(folder, compute_dtype=BF16, four_bit=False, seed=seed, lora=lora))
            found = step(model, dtype=torch.bfloat16)[1]
            errors[name] += sum(float((exact[each] - found[each]).pow(2).sum()) for each in exact)
    assert errors["ours"] < 1.03 * errors["theirs"]


def test_without_gradients_or_with_a_cache_transformers_code_runs(folder, pieces):
    model = load_tiny(folder).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=True).logits
    cached = model(input_ids=ids, use_cache=True)
    assert len(cached.past_key_values) == 3
    assert pieces == set()
    torch.testing.assert_close(cached.logits, expected, rtol=1e-5, atol=1e-5)


def test_a_disabled_adapter_is_left_out_of_the_lean_layer(folder, pieces):
    model = load_tiny(folder)
    ids = torch.arange(3, 40)[None]
    with model.disable_adapter():
        lean = model(input_ids=ids).logits
        with torch.no_grad():
            expected = model(input_ids=ids).logits
    assert not pieces & {"_NormedProjection", "_AddedProjection", "_GatedProjection"}
    torch.testing.assert_close(lean, expected, rtol=1e-4, atol=1e-4)


def test_a_second_backward_pass_over_one_graph_is_refused(folder):
    model = load_tiny(folder)
    loss = model(input_ids=torch.arange(3, 40)[None]).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_have_the_names_of_transformers(folder):
    model = load_tiny(folder)
    names = set(model.state_dict())
    assert names == set(as_transformers(model).state_dict())


@pytest.mark.parametrize(("every", "tiles", "calls"), [(0, 0, 1), (1, 0, 1), (0, 64, 3), (1, 64, 3)])
def test_recomputation_leaves_out_the_down_projection(folder, monkeypatch, every, tiles, calls):
    """Every layer's product with the weight of down_proj is made once forward; gate_up_proj's is made again."""
    monkeypatch.setattr(kernels, "ONEDNN_LINEAR", None)  # it multiplies without the base's forward
    model = load_tiny(folder)
    set_checkpointing(model, every)
    set_mlp_tiles(model, tiles)
    mlp, counts = find_base(model).model.layers[0].mlp, {"gate_up_proj": 0, "down_proj": 0}
    for name in counts:
        getattr(mlp, name).base_layer.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    step(model)
    assert counts == {"gate_up_proj": calls * (1 + (every or tiles > 0)), "down_proj": calls}
