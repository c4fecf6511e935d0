"""Set-ups that must train the same, compared on loss and gradient (fp32, CPU, rows of unequal length)."""

import pytest
import torch
import transformers.modeling_utils
from tiny_model import gradients, load_tiny, random_rows, relative_difference, save_tiny_model
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.model import attention, kernels
from qlora_phi3.model.kernels import takes_onednn
from qlora_phi3.model.layer import LinearWithLora
from qlora_phi3.model.phi3 import find_base, set_checkpointing, set_mlp_tiles
from qlora_phi3.recipe.schema import Lora
from qlora_phi3.step import collate, evaluate, forward_backward

LENGTHS = [7, 61, 23, 40, 12, 90, 33, 18]
ALL_AT_ONCE = MicroBatchPlan(max_tokens=10_000, max_rows=8, packing=False, longrope_boundary=None)
ONE_BY_ONE = MicroBatchPlan(max_tokens=1, max_rows=1, packing=False, longrope_boundary=None)
PACKED = MicroBatchPlan(max_tokens=10_000, max_rows=8, packing=True, longrope_boundary=None)
PACKED_IN_TWO = MicroBatchPlan(max_tokens=150, max_rows=8, packing=True, longrope_boundary=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run_step(model, plan, rows=None):
    model.zero_grad()
    model.train()
    batch = collate(rows or random_rows(LENGTHS), plan)
    result = forward_backward(model, batch, compute_dtype=torch.float32, backward=torch.Tensor.backward)
    return float(result.loss), int(result.metrics["num_correct"]), gradients(model), batch


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("plan", [ONE_BY_ONE, PACKED, PACKED_IN_TWO])
def test_accumulation_and_packing_change_neither_loss_nor_gradient(folder, plan, four_bit):
    model = load_tiny(folder, four_bit=four_bit)
    loss, correct, expected, together = run_step(model, ALL_AT_ONCE)
    other_loss, other_correct, other, split = run_step(model, plan)
    assert len(together.micro_batches) == 1
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert other_correct == correct
    assert relative_difference(expected, other) < 1e-5
    assert (split.num_tokens, split.num_supervised) == (together.num_tokens, together.num_supervised)


@pytest.mark.skipif(kernels.ONEDNN_LINEAR is None, reason="torch without oneDNN")
@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("lora", [Lora(), Lora(use_dora=True), Lora(lora_dropout=0.1)])
def test_onednns_products_change_neither_loss_nor_gradient(folder, monkeypatch, lora, four_bit):
    """fp32 on a CPU: four projections of each layer, forward, their inputs' gradients, and the logits."""
    model, calls, multiply = load_tiny(folder, lora=lora, four_bit=four_bit), [], kernels.ONEDNN_LINEAR
    monkeypatch.setattr(kernels, "ONEDNN_LINEAR", lambda *args: calls.append(args[0].shape) or multiply(*args))
    torch.manual_seed(0)
    loss, correct, expected, _ = run_step(model, PACKED)
    layers = find_base(model).config.num_hidden_layers
    assert len([shape for shape in calls if shape[0] == 320]) >= 4 * 2 * layers - 1
    assert len(calls) > 4 * 2 * layers + 2
    monkeypatch.setattr(kernels, "ONEDNN_LINEAR", None)
    torch.manual_seed(0)
    other_loss, other_correct, other, _ = run_step(model, PACKED)
    assert (other_loss, other_correct) == (pytest.approx(loss, rel=1e-6), correct)
    assert relative_difference(expected, other) < 1e-5


def test_eight_micro_batches_of_one_row_are_really_eight():
    assert len(collate(random_rows(LENGTHS), ONE_BY_ONE).micro_batches) == 8


def test_checkpointing_changes_neither_loss_nor_gradient(folder):
    model = load_tiny(folder)
    loss, _, expected, _ = run_step(model, PACKED)
    set_checkpointing(model, 1)
    other_loss, _, other, _ = run_step(model, PACKED)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert relative_difference(expected, other) < 1e-6


def test_checkpointing_is_really_on(folder, monkeypatch):
    monkeypatch.setattr(kernels, "ONEDNN_LINEAR", None)  # it multiplies without the base's forward
    model = load_tiny(folder)
    set_checkpointing(model, 1)
    model.train()
    calls = []
    model.base_model.model.model.layers[0].mlp.gate_up_proj.base_layer.register_forward_pre_hook(lambda *_: calls.append(1))
    run_step(model, PACKED)
    assert len(calls) == 2


class CountedKernels(TorchDispatchMode):
    """Counts the calls of attention's fused kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in attention.FUSED_KERNELS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("every", "offload", "tile"), [(1, False, 0), (1, True, 0), (1, True, 100), (2, False, 0)])
@pytest.mark.parametrize("plan", [PACKED_IN_TWO, ALL_AT_ONCE])
def test_attention_that_is_kept_changes_no_bit_and_runs_once(folder, monkeypatch, plan, every, offload, tile, dtype):
    monkeypatch.setattr(transformers.modeling_utils, "save_on_cpu", lambda **_: save_on_cpu())
    monkeypatch.setattr(attention, "CPU_SCORES_BYTES", 0)  # no matmuls, which are not kept
    lora = Lora(r=8, lora_dropout=0.2)
    model = load_tiny(folder, lora=lora, compute_dtype=dtype).train()
    set_mlp_tiles(model, tile)
    batch, results = collate(random_rows(LENGTHS), plan), []
    for keep_attention in (False, True):
        set_checkpointing(model, every, offload=offload, keep_attention=keep_attention)
        model.zero_grad()
        torch.manual_seed(0)
        with CountedKernels() as kernels:
            result = forward_backward(model, batch, compute_dtype=dtype, backward=torch.Tensor.backward)
        results.append((float(result.loss), gradients(model), kernels.count))
    (loss, expected, again), (kept_loss, found, once) = results
    documents = sum(len(micro.get("document_lengths", (1,))) for micro in batch.micro_batches)
    assert once == documents * model.config.num_hidden_layers
    assert again == once + documents * -(-model.config.num_hidden_layers // every)
    assert kept_loss == loss
    assert relative_difference(expected, found) == 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_with_dropout_of_its_own_is_not_kept(tmp_path, dropout):
    model = load_tiny(save_tiny_model(tmp_path, attention_dropout=dropout))
    set_checkpointing(model, 1, keep_attention=True)
    (layer, *_) = model.base_model.model.model.layers
    assert ("context_fn" in layer._gradient_checkpointing_func.keywords) == (dropout == 0)


def calls_of_mlp(model, monkeypatch):
    """Grows by (tokens) with every call of the first layer's gate_up_proj."""
    calls = []
    layer = model.base_model.model.model.layers[0].mlp.gate_up_proj
    base = getattr(layer, "base_layer", layer)
    base.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[:-1].numel()))
    usual = LinearWithLora.forward

    def forward(lora, x, *weights):
        if lora.base is base and (lora.magnitude is not None or takes_onednn(x)):  # multiplied with its weight itself
            calls.append(x.shape[:-1].numel())
        return usual(lora, x, *weights)

    monkeypatch.setattr(LinearWithLora, "forward", forward)
    return calls


@pytest.mark.parametrize("plan", [PACKED, ALL_AT_ONCE])
@pytest.mark.parametrize(("every", "offload"), [(0, False), (1, False), (1, True), (2, True)])
@pytest.mark.parametrize("lora", [Lora(r=8), Lora(r=8, use_dora=True), Lora(r=8, target_modules=["down_proj"])])
def test_an_mlp_in_tiles_changes_neither_loss_nor_gradient(folder, monkeypatch, plan, every, offload, lora):
    monkeypatch.setattr(transformers.modeling_utils, "save_on_cpu", lambda **_: save_on_cpu())  # pinned: CUDA alone has it
    model = load_tiny(folder, lora=lora)
    loss, correct, expected, batch = run_step(model, plan)
    set_checkpointing(model, every, offload=offload)
    set_mlp_tiles(model, 100)
    calls = calls_of_mlp(model, monkeypatch)
    other_loss, other_correct, other, _ = run_step(model, plan)
    tokens = batch.micro_batches[0]["input_ids"].numel()
    assert (max(calls), sum(calls)) == (100, tokens + tokens)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert other_correct == correct
    assert relative_difference(expected, other) < 1e-5


def test_an_mlp_in_tiles_computes_in_bf16_as_a_whole_one_does(folder):
    model = load_tiny(folder, compute_dtype=torch.bfloat16)
    set_checkpointing(model, 1)
    batch, results = collate(random_rows(LENGTHS), PACKED), []
    for tokens in (0, 100):
        set_mlp_tiles(model, tokens)
        model.zero_grad()
        result = forward_backward(model, batch, compute_dtype=torch.bfloat16, backward=torch.Tensor.backward)
        results.append((float(result.loss), gradients(model)))
    (loss, expected), (other_loss, other) = results
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert relative_difference(expected, other) < 0.02


def test_tiles_are_set_and_taken_back_at_any_time(folder, monkeypatch):
    model = load_tiny(folder)
    loss, _, expected, batch = run_step(model, PACKED)
    calls = calls_of_mlp(model, monkeypatch)
    for tokens, longest in ((100, 100), (64, 64), (0, 320), (100, 100), (0, 320)):
        calls.clear()
        set_mlp_tiles(model, tokens)
        again, _, other, _ = run_step(model, PACKED)
        assert max(calls) == longest
        assert again == pytest.approx(loss, rel=1e-6)
        assert relative_difference(expected, other) < 1e-5
        ((_, result),) = evaluate(model, [batch], compute_dtype=torch.float32)
        assert float(result.loss) == pytest.approx(loss, rel=1e-6)
    assert (again, relative_difference(expected, other)) == (loss, 0.0)


@pytest.mark.parametrize("every", [0, 1])
def test_with_dropout_a_tile_drops_the_same_when_it_is_recomputed(folder, monkeypatch, every):
    model = load_tiny(folder, lora=Lora(r=8, lora_dropout=0.3))
    set_checkpointing(model, every)
    set_mlp_tiles(model, 100)
    dropped, usual = [], LinearWithLora.draw_masks
    base = model.base_model.model.model.layers[0].mlp.down_proj.base_layer

    def draw_masks(lora, rows):
        masks = usual(lora, rows)
        dropped.extend(masks if lora.base is base else ())
        return masks

    monkeypatch.setattr(LinearWithLora, "draw_masks", draw_masks)
    run_step(model, PACKED)
    first, again = dropped[:4], dropped[4:]
    assert len(again) == 4
    for tile in first:
        assert 0.2 < float((tile == 0).float().mean()) < 0.4
        assert sum(torch.equal(tile, other) for other in again) == 1


@pytest.mark.parametrize("window", [16, 64])
def test_packing_keeps_documents_apart_under_a_sliding_window(tmp_path, window):
    model = load_tiny(save_tiny_model(tmp_path, sliding_window=window))
    loss, _, expected, _ = run_step(model, ONE_BY_ONE)
    other_loss, _, other, _ = run_step(model, PACKED)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert relative_difference(expected, other) < 1e-5


def test_a_sliding_window_no_row_reaches_is_dropped_without_changing_the_loss(tmp_path):
    folder = save_tiny_model(tmp_path, sliding_window=100)
    dropped = load_tiny(folder, longest_row=100)
    with_window = load_tiny(folder, longest_row=101)
    assert dropped.config.sliding_window is None
    assert with_window.config.sliding_window == 100
    assert run_step(dropped, PACKED)[0] == pytest.approx(run_step(with_window, PACKED)[0], rel=1e-6)


def test_longrope_rows_keep_their_factors_whatever_they_share_a_batch_with(tmp_path):
    size = 128 // 4 // 2
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * size,
        "long_factor": [4.0] * size,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 50,
    }
    folder = save_tiny_model(tmp_path, rope_parameters=rope, original_max_position_embeddings=50, max_position_embeddings=400)
    model = load_tiny(folder)
    bounded = {"packing": True, "max_tokens": 10_000, "max_rows": 8}
    loss, _, expected, _ = run_step(model, ONE_BY_ONE)
    other_loss, _, other, _ = run_step(model, MicroBatchPlan(**bounded, longrope_boundary=50))
    leaking, _, _, _ = run_step(model, MicroBatchPlan(**bounded, longrope_boundary=None))
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert relative_difference(expected, other) < 1e-5
    assert abs(leaking - loss) > 1e-4 * loss  # the trap is real: without the boundary the short rows change


@pytest.mark.parametrize("four_bit", [True, False])
def test_an_evaluation_leaves_training_as_it_was(folder, four_bit):
    model = load_tiny(folder, four_bit=four_bit)
    loss, _, expected, batch = run_step(model, PACKED)
    assert len(list(evaluate(model, [batch], compute_dtype=torch.float32))) == 1
    assert model.training
    again, _, other, _ = run_step(model, PACKED)
    assert again == loss
    assert relative_difference(expected, other) == 0.0


def test_the_evaluated_loss_is_the_training_loss_of_the_same_rows(folder):
    model = load_tiny(folder)
    loss, correct, _, batch = run_step(model, PACKED)
    ((_, result),) = evaluate(model, [batch], compute_dtype=torch.float32)
    assert float(result.loss) == pytest.approx(loss, rel=1e-6)
    assert int(result.metrics["num_correct"]) == correct


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_attention_by_matmul_on_a_cpu_is_that_of_sdpa(key_heads, monkeypatch):
    monkeypatch.setattr(attention, "_attend", None)  # only the matmuls run
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 50, 32, generator=generator, dtype=torch.bfloat16).requires_grad_()
        for heads in (4, key_heads, key_heads)
    )
    ours, _ = attention.attend_by_document(torch.nn.Module(), query, key, value, None, (50,), scaling=0.2)
    wide = [tensor.float().repeat_interleave(4 // tensor.shape[1], 1) for tensor in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True, scale=0.2).transpose(1, 2)
    torch.testing.assert_close(ours.float(), expected, rtol=0.02, atol=0.02)
    weight = torch.randn(ours.shape, generator=generator)
    ours_gradients = torch.autograd.grad((ours.float() * weight).sum(), (query, key, value))
    for mine, other in zip(ours_gradients, torch.autograd.grad((expected * weight).sum(), (query, key, value)), strict=True):
        assert float((mine.float() - other.float()).norm() / other.float().norm()) < 0.02


def test_packing_in_bf16_stays_within_bf16_of_padding(folder):
    model = load_tiny(folder, compute_dtype=torch.bfloat16)
    results = []
    for plan in (ONE_BY_ONE, PACKED, ALL_AT_ONCE):
        model.zero_grad()
        batch = collate(random_rows(LENGTHS), plan)
        result = forward_backward(model, batch, compute_dtype=torch.bfloat16, backward=torch.Tensor.backward)
        results.append((float(result.loss), gradients(model)))
    for loss, found in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=2e-3)
        assert relative_difference(results[0][1], found) < 0.1
