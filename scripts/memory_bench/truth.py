"""What a configuration really takes: the code of the simulation, run on random weights.

On a CPU torch's profiler counts every allocation, and the system knows the most that the process held at once.
"""

import ctypes
import gc
import re
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import bitsandbytes as bnb
import torch
from memory_bench.cases import Case
from torch import nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function

from qlora_phi3.memory.simulate import StepShape, build_skeleton, run_one_step
from qlora_phi3.memory.tracker import NullTracker
from qlora_phi3.model.lora import attach_adapter
from qlora_phi3.model.phi3 import apply_execution_plan
from qlora_phi3.step import Batch, collate

PHASE = "phase "


def step_shape(case: Case) -> StepShape:
    """The rows of a configuration, as the simulation takes them."""
    return StepShape(
        lengths=case.lengths,
        evaluation_lengths=case.held_out,
        accumulates=case.accumulates,
        later_lengths=case.later_lengths,
    )


def build_random(case: Case, device: torch.device) -> nn.Module:
    """The configuration's model with its adapter, its random weights quantized layer by layer on the device."""
    dtype = getattr(torch, case.compute)
    longest = max(*case.lengths, *case.held_out, 0)
    recipe = case.recipe
    skeleton = build_skeleton(
        dict(case.config),
        case.architecture,
        recipe.model,
        recipe.quantization,
        compute_dtype=dtype,
        longest_row=longest,
    )
    tied = skeleton.lm_head if skeleton.config.tie_word_embeddings else None
    for module in skeleton.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight = _quantize_random(module, device)
        if isinstance(module, bnb.nn.Linear4bit) or module is tied:
            continue
        for name, old in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            new = torch.empty(old.shape, dtype=old.dtype, device=device)
            new = new.normal_(std=0.02) if new.dim() > 1 else new.fill_(1)
            setattr(module, name, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
    skeleton.tie_weights()
    skeleton.neftune_noise_alpha = recipe.training.neftune_noise_alpha
    model = attach_adapter(skeleton, recipe.lora)
    apply_execution_plan(model, case.execution)
    return model.train()


def _quantize_random(layer: bnb.nn.Linear4bit, device: torch.device) -> bnb.nn.Params4bit:
    weight = torch.empty((layer.out_features, layer.in_features), dtype=layer.compute_dtype, device=device)
    return bnb.nn.Params4bit(
        weight.normal_(std=0.02),
        requires_grad=False,
        compress_statistics=layer.weight.compress_statistics,
        quant_type=layer.weight.quant_type,
        module=layer,
    ).to(device)


def go_once(model: nn.Module, case: Case, tracker: NullTracker, optimizer: Optimizer | None = None) -> Optimizer:
    """The update, the micro-batches, the save, the evaluation, on the model's device; with the optimizer of an earlier step."""
    return run_one_step(
        model,
        [_batch(lengths, case) for lengths in (case.lengths, case.later_lengths) if lengths],
        _batch(case.held_out, case) if case.held_out else None,
        case.recipe.training,
        optimizer or case.execution.optim,
        compute_dtype=getattr(torch, case.compute),
        on_cuda=next(model.parameters()).device.type == "cuda",
        accumulates=case.accumulates,
        tracker=tracker,
    )


def _batch(lengths: Sequence[int], case: Case) -> Batch:
    """Rows of which every token is learned; a case has them all in one micro-batch."""
    batch = collate([{"input_ids": [0] * length, "labels": [0] * length} for length in lengths], case.execution.micro_batch)
    if len(batch.micro_batches) != 1:
        raise ValueError(f"The rows of '{case.name}' do not share a micro-batch.")
    return batch


class Marks(NullTracker):
    """Writes the phases into a profile."""

    def enter(self, phase: str) -> None:
        with record_function(PHASE + phase):
            pass


def measure_phases(case: Case) -> dict[str, int]:
    """Phase -> most bytes allocated at once, by every allocation and release of torch's CPU allocator.

    "loaded" is what the model takes before the first step.
    """
    torch.manual_seed(0)
    marks = Marks()
    with profile_memory() as watched:
        marks.enter("load")
        model = build_random(case, torch.device("cpu"))
        marks.enter("loaded")
        go_once(model, case, marks)
    return peaks_of(watched)


def profile_memory() -> profile:
    """A profile of torch's CPU allocator.

    Reference cycles are freed before it begins: torch subtracts a tensor that was allocated in an earlier profile of the process
    and is freed in this one.
    """
    gc.collect()
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def peaks_of(watched: profile) -> dict[str, int]:
    """Phase -> most bytes allocated at once, above those when the profile began; before the first mark it is "load"."""
    events: list[tuple[int, str, int]] = []
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            events.append((event.start_ns(), "", event.nbytes()))
        elif event.name().startswith(PHASE):
            events.append((event.start_ns(), event.name().removeprefix(PHASE), 0))
    live, phase, peaks = 0, "load", {}
    for _, begun, num_bytes in sorted(events, key=lambda event: event[0]):
        phase = begun or phase
        live += num_bytes
        peaks[phase] = max(peaks.get(phase, 0), live)
    return peaks


def measure_rise(case: Case) -> int | None:
    """What the process's high-water mark rose by during a step; None where the system does not know it (not Linux).

    A first pass loads the kernels, and glibc is set to return every block of 64 KiB or more to the system when it is freed.
    For a process of its own, before the profiler ran there: its allocations would lie between the tensors.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        return None
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    libc.mallopt(m_mmap_threshold, 2**16)
    libc.mallopt(m_trim_threshold, 0)
    torch.manual_seed(0)
    model = build_random(case, torch.device("cpu"))
    go_once(model, case, NullTracker())
    gc.collect()
    libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark begins anew: man 5 proc
    except OSError:
        return None
    before = _status("VmRSS")
    go_once(model, case, NullTracker())
    return _status("VmHWM") - before


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) * 1024
