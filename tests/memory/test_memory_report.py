"""Reports as JSON and back."""

import json
from dataclasses import replace

from tiny_check import GPU

from qlora_phi3.hardware.gpu import GpuProcess
from qlora_phi3.memory.report import MemoryReport, as_json, from_json


def test_a_report_goes_to_json_and_back(report):
    process = GpuProcess(name="Xorg", pid=7, used_bytes=None)
    is_local = replace(report, device=replace(GPU, is_local=True, processes=(process,)))
    saved = json.loads(json.dumps(as_json(is_local)))
    assert saved["processes"] == [{"name": "Xorg", "pid": 7, "used_bytes": None}]
    assert from_json(saved) == is_local


def test_the_trace_is_left_out_of_json_and_unknown_sizes_are_null():
    memory = MemoryReport(
        allocated_bytes=3, by_category={"adapter": 3}, by_phase={"load": 3}, resident_bytes=2, trace=((1, 3), (1, 0))
    )
    saved = memory.as_dict()
    assert "trace" not in saved
    assert (saved["allocated_bytes"], saved["reserved_bytes"], saved["process_bytes"]) == (3, None, None)
    assert saved["paged_bytes"] == 0


def test_predicted_categories_add_up_and_are_sorted(report):
    memory = report.memory
    assert sum(memory.by_category.values()) == memory.allocated_bytes == max(memory.by_phase.values())
    assert list(memory.by_category.values()) == sorted(memory.by_category.values(), reverse=True)
    assert memory.allocated_bytes <= memory.reserved_bytes < memory.on_gpu_bytes
    assert memory.trace == ()
