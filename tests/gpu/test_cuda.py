"""What only a card can show. Skipped, visibly, where there is none."""

import pytest
import torch
from tiny_model import gradients, random_rows, relative_difference, save_tiny_model

from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.family import read_architecture
from qlora_phi3.model import kernels
from qlora_phi3.model.lora import attach_adapter
from qlora_phi3.model.phi3 import choose_precision, find_base, load_base, set_checkpointing
from qlora_phi3.recipe.schema import Lora, Model, Quantization
from qlora_phi3.step import collate, forward_backward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
VOCABULARY = 32_064
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
LENGTHS = [7, 61, 23, 40, 12, 90, 33, 18]


def load(folder, dtype):
    device = torch.device("cuda", 0)
    base = load_base(
        Model(name=str(folder)),
        Quantization(),
        read_architecture(str(folder)),
        compute_dtype=choose_precision(dtype, torch.cuda.get_device_capability(device))[0],
        device=device,
        longest_row=100,
    )
    torch.manual_seed(0)
    model = attach_adapter(base, Lora(r=8))
    set_checkpointing(model, 1)
    return model


def run_step(model, dtype, *, packing):
    model.zero_grad()
    model.train()
    plan = MicroBatchPlan(max_tokens=1024 if packing else 1, max_rows=8, packing=packing, longrope_boundary=None)
    result = forward_backward(model, collate(random_rows(LENGTHS), plan), compute_dtype=dtype, backward=torch.Tensor.backward)
    return float(result.loss), gradients(model)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("name", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_packing_changes_no_gradient_on_the_card(tmp_path, values, name, tolerance, window):
    model = load(save_tiny_model(tmp_path, sliding_window=window), name)
    dtype = getattr(torch, name)
    loss, expected = run_step(model, dtype, packing=False)
    packed_loss, packed = run_step(model, dtype, packing=True)
    assert packed.keys() == expected.keys()
    if not values:
        return
    assert packed_loss == pytest.approx(loss, rel=tolerance)
    moving = {key: value for key, value in expected.items() if float(value.norm()) > 0}
    assert relative_difference(moving, {key: packed[key] for key in moving}) < tolerance


@pytest.mark.parametrize(("name", "tolerance"), [("float32", 1e-4), ("float16", 5e-2), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("shape", [{}, {"rope_parameters": PARTIAL}], ids=["full rotary", "partial rotary"])
def test_fused_kernels_change_no_gradient_on_the_card(tmp_path, values, shape, name, tolerance):
    pytest.importorskip("triton")
    model, dtype = load(save_tiny_model(tmp_path, **shape), name), getattr(torch, name)
    assert kernels.why_unavailable(torch.device("cuda", 0), dtype) is None
    for packing in (True, False):
        results = []
        for is_fused in (False, True):
            for layer in find_base(model).model.layers:
                layer.fused_kernels = is_fused
            results.append(run_step(model, dtype, packing=packing))
        (loss, expected), (fused_loss, found) = results
        assert found.keys() == expected.keys()
        if not values:
            continue
        assert fused_loss == pytest.approx(loss, rel=tolerance)
        moving = {key: value for key, value in expected.items() if float(value.norm()) > 0}
        assert relative_difference(moving, {key: found[key] for key in moving}) < tolerance


def test_the_adapter_on_the_card_is_fp32(tmp_path):
    model = load(save_tiny_model(tmp_path), "auto")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_the_peak_of_a_packed_step_has_no_square_mask_and_no_full_logits(tmp_path):
    long = {"max_position_embeddings": 8192, "original_max_position_embeddings": 8192, "vocab_size": VOCABULARY}
    model = load(save_tiny_model(tmp_path, **long), "auto")
    plan = MicroBatchPlan(max_tokens=8192, max_rows=16, packing=True, longrope_boundary=None)

    def peak(num_rows):
        batch = collate(random_rows([512] * num_rows), plan)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(model, batch, compute_dtype=torch.bfloat16, backward=torch.Tensor.backward)
        return torch.cuda.max_memory_allocated() - before

    peak(1)  # cuBLAS takes its workspace
    half, whole = peak(8), peak(16)
    assert whole < 2.1 * half  # a mask of the square would make it four times
    assert whole < 8192 * VOCABULARY * 2
