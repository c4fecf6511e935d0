"""How the device and its load are described."""

import psutil
import pytest
import torch

from qlora_phi3.training.report import describe_device, describe_load


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
