"""A few optimizer steps of a tiny random model on this device, through the code that trains: the end of `doctor`."""

import tempfile
import time
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import Phi3Config, Phi3ForCausalLM

from qlora_phi3.execution import ExecutionPlan, MicroBatchPlan
from qlora_phi3.family import read_architecture
from qlora_phi3.model.lora import attach_adapter
from qlora_phi3.model.optimizer import build_optimizer, default_optimizer
from qlora_phi3.model.phi3 import apply_execution_plan, choose_precision, load_base, quiet_transformers
from qlora_phi3.recipe.schema import Lora, Model, Quantization, Training
from qlora_phi3.step import collate, forward_backward

STEPS, ROWS, LENGTH, VOCABULARY = 8, 4, 64, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """What was measured."""

    device: str
    compute_dtype: str
    optim: str
    #: Of each step, on the same rows.
    losses: tuple[float, ...]
    #: Of each step, before clipping.
    grad_norms: tuple[float, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every gradient was finite and not zero, and the loss fell."""
        return all(0 < norm < float("inf") for norm in self.grad_norms) and self.losses[-1] < self.losses[0]


def train_tiny_model() -> SelfTest:
    """Quantize a random Phi-3 of 450,000 parameters to 4 bit, and train a LoRA adapter on four random rows."""
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute_dtype, _ = choose_precision("auto", torch.cuda.get_device_capability() if device.type == "cuda" else None)
    training = Training(learning_rate=0.1)
    optim = default_optimizer(training, is_cuda=device.type == "cuda")
    micro_batch = MicroBatchPlan(max_tokens=2 * LENGTH, max_rows=ROWS, packing=True, longrope_boundary=None)
    plan = ExecutionPlan(
        micro_batch=micro_batch, evaluation=micro_batch, checkpoint_every=1, activation_offloading=False, optim=optim
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="qlora-phi3-doctor-") as folder, quiet_transformers():
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = Phi3Config(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes, **special)
        Phi3ForCausalLM(config).save_pretrained(folder)
        base = load_base(
            Model(name=folder),
            Quantization(),
            read_architecture(folder),
            compute_dtype=compute_dtype,
            device=device,
            longest_row=LENGTH,
        )
    model = attach_adapter(base, Lora(r=8))
    apply_execution_plan(model, plan)
    model.train()
    optimizer = build_optimizer(optim, model, training, is_cuda=device.type == "cuda")
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH)).tolist()
    batch = collate([{"input_ids": row, "labels": row} for row in ids], micro_batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses, grad_norms = [], []
    for _ in range(STEPS):
        result = forward_backward(model, batch, compute_dtype=compute_dtype, backward=torch.Tensor.backward)
        losses.append(result.loss.item())
        grad_norms.append(clip_grad_norm_(trained, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return SelfTest(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        compute_dtype=str(compute_dtype).removeprefix("torch."),
        optim=optim,
        losses=tuple(losses),
        grad_norms=tuple(grad_norms),
        seconds=time.perf_counter() - started,
    )
