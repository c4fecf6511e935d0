"""What is chosen and reported before the first step."""

import platform
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from qlora_phi3.errors import NoDeviceError
from qlora_phi3.hardware.gpu import read_cpu
from qlora_phi3.memory.cuda_path import context_bytes
from qlora_phi3.memory.margin import LEAST_BYTES
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.training import prepare as prepare_module
from qlora_phi3.training.prepare import load_model, outline_run, plan_run, prepare, return_freed_memory
from qlora_phi3.units import GIB, MIB, format_gib


class Lines:
    """A reporter that collects facts and warnings."""

    def __init__(self):
        self.facts, self.warnings = [], []
        self.info, self.warning = self.facts.append, self.warnings.append

    def progress(self, what, done, total):
        pass


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_run_names_the_kind_of_4_bit_that_it_trains_on(shop, kind):
    reporter = Lines()
    recipe = load_recipe(shop.write(quantization={"bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": "float32"}))
    load_model(prepare(recipe, shop.path, reporter))
    (line,) = [line for line in reporter.facts if line.startswith("Model: ")]
    assert f", {kind.upper()}, " in line


def test_a_budget_for_gpus_gives_a_warning_on_a_cpu(shop):
    reporter = Lines()
    context = prepare(load_recipe(shop.write(memory={"budget": "4GiB"})), shop.path, reporter)
    planned = plan_run(context)
    assert planned.fits
    assert [line for line in reporter.warnings if "budget" in line]


def test_a_run_on_a_cpu_reports_its_plan_and_a_smaller_memory_makes_it_recompute(shop, monkeypatch):
    """Half of the free memory is the budget, less its margin; the tensors of the plan without recomputation take 8 MB."""
    context = prepare(load_recipe(shop.write()), shop.path, reporter := Lines())
    plans = []
    for free_bytes, count in ((8 * GIB, 1), (8 * GIB, 4), (2 * (LEAST_BYTES + 3 * MIB), 1), (0, 1)):
        cpu = replace(read_cpu(), free_bytes=free_bytes)
        monkeypatch.setattr(prepare_module, "read_cpu", lambda cpu=cpu: cpu)
        monkeypatch.setattr(prepare_module, "count_processes", lambda count=count: count)
        reporter.facts.clear()
        reporter.warnings.clear()
        plans.append(prepare_module._plan(context, fused_kernels=False))
        (line,) = [line for line in reporter.facts if line.startswith("Plan: ")]
        limit = max(0, min(free_bytes // 2 // count - LEAST_BYTES, int(free_bytes // 2 // count / 1.03)))
        shared = f", for each of {count} processes" if count > 1 else ""
        assert line.endswith(f" of {format_gib(limit)} in memory: tensors, in half of what is free{shared}")
        assert f"{plans[-1].execution.micro_batch.max_tokens} tokens at once, " in line
        assert bool(reporter.warnings) == (not plans[-1].fits)
    assert reporter.warnings == [
        "This should not fit in memory; qlora-phi3 vram-check suggests what to change. The run tries it anyway."
    ]
    assert [planned.fits for planned in plans] == [True, True, True, False]
    assert [planned.execution.checkpoint_every for planned in plans] == [0, 0, 1, 1]
    outline = outline_run(context, plans[0], plans[0].execution, [], None)
    assert outline.budget_bytes == 0  # the process takes more than the tensors that it is of
    assert outline.predicted_bytes == plans[0].memory.allocated_bytes
    assert outline.step_seconds == plans[0].step_seconds > 0


@pytest.mark.parametrize("reason", [None, "Triton is not installed"])
def test_without_nvml_a_gpu_is_read_by_torch_and_planned_for_with_fused_kernels_if_they_run(shop, monkeypatch, reason):
    def no_nvml():
        raise NoDeviceError("no driver")

    properties = SimpleNamespace(name="NVIDIA Thing", major=8, minor=6, multi_processor_count=28)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (9 * GIB, 12 * GIB))
    monkeypatch.setattr(prepare_module, "prepare_cuda", lambda: None)
    monkeypatch.setattr(prepare_module, "read_gpu", no_nvml)
    monkeypatch.setattr(prepare_module, "why_unavailable", lambda *_: reason)
    context = prepare(load_recipe(shop.write()), shop.path, reporter := Lines())
    assert context.device == torch.device("cuda", 0)
    known = (context.gpu.name, context.gpu.total_bytes, context.gpu.compute_capability, context.gpu.multiprocessors)
    assert known == ("NVIDIA Thing", 12 * GIB, (8, 6), 28)
    assert context.gpu.free_bytes == 9 * GIB + context_bytes(28)  # torch's own context, without which nothing is read
    planned = plan_run(context)
    assert planned.fits
    assert outline_run(context, planned, planned.execution, [], None).budget_bytes == context.gpu.free_bytes
    assert planned.execution.optim == "adamw_8bit"
    assert planned.execution.fused_kernels == (reason is None)
    kernels = [line for line in reporter.facts if "Kernels" in line]
    assert kernels == ([f"Kernels: PyTorch's own, without fused ones: {reason}"] if reason else [])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_freed_is_returned_to_the_system():
    blocks = [bytearray(64 * 2**10) for _ in range(4000)]  # 250 MiB, below the size that glibc maps by itself
    before = psutil.Process().memory_info().rss  # glibc itself returns them where they are the last of its memory
    del blocks[:-1]
    return_freed_memory()
    assert before - psutil.Process().memory_info().rss > 150 * 2**20
