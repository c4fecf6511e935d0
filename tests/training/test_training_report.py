"""How the device, its load, and an adapter that learned nothing are described."""

import psutil
import pytest
import torch

from qlora_phi3.model.quantized import describe_device
from qlora_phi3.training.report import describe_load, describe_unlearned, trained_digest


@pytest.mark.parametrize(("load", "threads", "warns"), [(5.06, 2, True), (2.0, 2, False), (5.0, 1, False)])
def test_a_busy_processor_is_named_where_several_threads_are_to_train(monkeypatch, load, threads, warns):
    monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = describe_load()
    assert (line is not None) == warns
    assert line is None or "load 5.1 on 2 cores" in line


def test_one_thread_is_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert describe_device(torch.device("cpu")).endswith(" CPU, 1 thread")


@pytest.mark.parametrize(
    ("changes", "losses", "said"),
    [
        ({}, (2.0, 1.0), "no trained parameter changed"),
        ({"a.lora_A": 1.0}, (2.0, 1.0), "in 2 of 2 layers: lora_B is zero, first in a"),
        ({"a.lora_B": 1.0}, (2.0, 1.0), "in 1 of 2 layers: lora_B is zero, first in b"),
        ({"a.lora_B": 1.0, "b.lora_B": 1e-30}, (2.0, 2.0), "held-out loss is 2.0000, bit for bit"),
        ({"a.lora_B": 1.0, "b.lora_B": 1.0}, (2.0, 1.9), None),
        ({"a.lora_B": 1.0, "b.lora_B": 1.0}, (None, None), None),
    ],
)
def test_an_adapter_that_learned_nothing_is_described(changes, losses, said):
    linear = torch.nn.Linear
    layers = {f"{name}_{part}": linear(2, 2, bias=False) for name in "ab" for part in ("lora_A", "lora_B")}
    model = torch.nn.ModuleDict(
        {name: torch.nn.ModuleDict({part: layers[f"{name}_{part}"] for part in ("lora_A", "lora_B")}) for name in "ab"}
    )
    for name in "ab":
        layers[f"{name}_lora_B"].weight.data.zero_()
    report = {"trained_sha256_before": trained_digest(model)}
    report |= {"eval_loss_before": losses[0], "eval_loss_after": losses[1]}
    for name, value in changes.items():
        model.get_submodule(name).weight.data.add_(value)
    line = describe_unlearned(model, report)
    assert line is None if said is None else said in line
