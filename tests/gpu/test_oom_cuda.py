"""A card that really runs out of memory, by a cap on the allocator. Skipped, visibly, where there is none."""

import gc
from types import SimpleNamespace

import pytest
import torch
from tiny_model import gradients, random_rows, relative_difference, save_tiny_model

from qlora_phi3.execution import ExecutionPlan, MicroBatchPlan
from qlora_phi3.family import read_architecture
from qlora_phi3.model.lora import attach_adapter
from qlora_phi3.model.phi3 import load_base, set_checkpointing
from qlora_phi3.recipe.schema import Lora, Model, Quantization
from qlora_phi3.step import forward_backward
from qlora_phi3.training.oom import MemoryGuard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ROWS = random_rows([512] * 16)


@pytest.fixture
def capped():
    """Caps what this process may reserve on the card, in bytes; the cap ends with the test."""

    def cap(num_bytes):
        torch.cuda.set_per_process_memory_fraction(num_bytes / torch.cuda.mem_get_info()[1])

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_that_does_not_fit_the_card_is_split_and_leaves_nothing_behind(tmp_path, capped, values, checkpointing):
    folder = save_tiny_model(tmp_path, max_position_embeddings=8192, original_max_position_embeddings=8192)
    device = torch.device("cuda", 0)
    base = load_base(
        Model(name=str(folder)),
        Quantization(),
        read_architecture(str(folder)),
        compute_dtype=torch.float32,
        device=device,
        longest_row=512,
    )
    model = attach_adapter(base, Lora(r=8))
    set_checkpointing(model, int(checkpointing))
    model.train()

    def learn():
        plan = MicroBatchPlan(max_tokens=8192, max_rows=16, packing=True, longrope_boundary=None)
        execution = ExecutionPlan(
            micro_batch=plan, evaluation=plan, checkpoint_every=0, activation_offloading=False, optim="adamw_torch"
        )
        records = []
        guard = MemoryGuard(
            model,
            execution=execution,
            device=device,
            reporter=SimpleNamespace(oom=records.append),
            sources=(),
            apply=lambda execution: None,
        )
        model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        guard.compute(
            ROWS,
            lambda batch: forward_backward(model, batch, compute_dtype=torch.float32, backward=torch.Tensor.backward),
            phase="training",
            step=1,
        )
        return records, gradients(model)

    learn()
    _, expected = learn()
    expected = {name: gradient.cpu() for name, gradient in expected.items() if not values or float(gradient.norm()) > 0}
    alive, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_reserved()
    capped(int(peak * 0.7))
    for _ in range(3):
        records, found = learn()
        found = {name: found[name].cpu() for name in expected}
        assert [record.remedy for record in records][:2] == ["again", "split"]
        assert records[0].allocated_bytes > 0
        assert not values or relative_difference(expected, found) < 1e-4
        assert torch.cuda.memory_allocated() <= alive
