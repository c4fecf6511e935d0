"""The heaviest step, once, before the first: what does not fit shows now and not at hour three.

The longest rows that can meet in one optimizer step are trained on, the longest held-out rows are scored, and a checkpoint is
written. Then weights, optimizer, random numbers and gradients are as if nothing had been, bit for bit; the order of the data is
not touched, since the rows are taken by their length and not from the loader. Where memory runs out, `oom.py` lowers the plan,
and the run begins with the lowered one.
"""

import gc
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from torch.nn.utils import clip_grad_norm_

from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.memory.report import MemoryReport
from qlora_phi3.training.report import measure_memory
from qlora_phi3.training.trainer import Phi3Trainer


def dry_run_heaviest_step(trainer: Phi3Trainer, card: Gpu | None, *, max_grad_norm: float) -> MemoryReport:
    """Run the heaviest step, evaluation and checkpoint of a trainer that has not begun, and undo them.

    Args:
        card: as it was before the run.

    Raises:
        RunError: a single row does not fit.
    """
    with _undone(trainer):
        if trainer.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.args.device)
        trainer.run_heaviest("training")
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        optimizer = trainer.create_optimizer()
        if max_grad_norm:
            clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        trainer.run_heaviest("training")  # now beside the optimizer's state
        for parameter in trained:
            parameter.grad = None
        if trainer.eval_dataset is not None:
            trainer.run_heaviest("evaluation")
        _write_checkpoint(trainer, optimizer)
        return measure_memory(trainer.model, optimizer, trainer.args.device, card)


def _write_checkpoint(trainer: Phi3Trainer, optimizer: torch.optim.Optimizer) -> None:
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=folder) as target:
        trainer.model.save_pretrained(target)
        torch.save(optimizer.state_dict(), Path(target) / "optimizer.pt")


@contextmanager
def _undone(trainer: Phi3Trainer) -> Iterator[None]:
    """Put weights, random numbers and modes back, and let the optimizer go."""
    device, model = trainer.args.device, trainer.model
    weights = {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    rng_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    drawn_on_card = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    was_training = model.training
    try:
        yield
    finally:
        trainer.optimizer = trainer.lr_scheduler = None
        model.train(was_training)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
                    parameter.grad = None
        gc.collect()
        random.setstate(rng_state[0])
        numpy.random.set_state(rng_state[1])
        torch.set_rng_state(rng_state[2])
        if drawn_on_card is not None:
            torch.cuda.set_rng_state(drawn_on_card, device)
            torch.cuda.empty_cache()
