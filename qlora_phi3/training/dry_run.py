"""The heaviest step, once before the first one, so that what does not fit in memory shows at once and not after hours.

Then weights, optimizer, random numbers and gradients are restored bit for bit. The order of the data does not change, since the
rows are selected by length. Where memory runs out, `oom.py` lowers the execution plan, and the run starts with the lowered one.
"""

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from qlora_phi3.hardware.gpu import Gpu
from qlora_phi3.memory.report import MemoryReport
from qlora_phi3.training.oom import RngState
from qlora_phi3.training.report import measure_memory
from qlora_phi3.training.trainer import Phi3Trainer


def dry_run_heaviest_step(trainer: Phi3Trainer, gpu: Gpu | None) -> MemoryReport:
    """Run the heaviest step, evaluation and checkpoint of a trainer that has not started, and undo them.

    Returns:
        The peak of the memory; `gpu` is as it was before the run.

    Raises:
        RunError: a single row does not fit.
    """
    device = trainer.args.device
    with _undone(trainer):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        trainer.run_heaviest("training")
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        optimizer = trainer.create_optimizer()
        if trainer.args.max_grad_norm:
            clip_grad_norm_(trained, trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        trainer.run_heaviest("training")  # now with the optimizer's state in memory
        for parameter in trained:
            parameter.grad = None
        if trainer.eval_dataset is not None:
            trainer.run_heaviest("evaluation")
        checkpoints = Path(trainer.args.output_dir)
        checkpoints.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=checkpoints) as target:
            trainer.model.save_pretrained(target)
            torch.save(optimizer.state_dict(), Path(target) / "optimizer.pt")
        return measure_memory(trainer.model, optimizer, device, gpu)


@contextmanager
def _undone(trainer: Phi3Trainer) -> Iterator[None]:
    """Restore weights, random numbers and the training mode at the end, and drop the optimizer."""
    device, model = trainer.args.device, trainer.model
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}
    rng_state = RngState.read(device)
    was_training = model.training
    try:
        yield
    finally:
        trainer.optimizer = trainer.lr_scheduler = None
        model.train(was_training)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
                parameter.grad = None
        gc.collect()
        rng_state.restore()
        if device.type == "cuda":
            torch.cuda.empty_cache()
