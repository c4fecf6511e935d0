"""The tables over many GPUs: what fits, and the longest row."""

import math
from dataclasses import replace

import pytest
from tiny_check import GPU, build_checker, gpu_with

from qlora_phi3.hardware.gpu import gpu_of_size
from qlora_phi3.hardware.gpu_table import GPU_TABLE
from qlora_phi3.memory import cost
from qlora_phi3.memory.margin import LEAST_BYTES
from qlora_phi3.memory.plan import assume_lengths
from qlora_phi3.memory.search import minimal_memory_plan
from qlora_phi3.memory.tables import build_gpu_table, find_max_lengths, group_gpus, table_row_as_json
from qlora_phi3.units import GIB


def table_of(checker, size_gb):
    """The report on the GPUs of a size with bfloat16."""
    devices = [device for device in group_gpus() if device.name.startswith(f"{size_gb} GB, ") and "30" in device.name]
    (report,) = build_gpu_table(checker, devices, lambda *_: None)
    return report


def test_every_consumer_gpu_from_4_to_24_gb_is_in_one_group():
    devices = group_gpus()
    labels = [label for device in devices for label in device.represents]
    assert len(labels) == len(set(labels))
    sizes = [int(device.name.partition(" ")[0]) for device in devices]
    assert sizes == sorted(sizes)
    assert set(sizes) == {4, 6, 8, 10, 11, 12, 16, 24}
    assert {gpu.name for gpu in GPU_TABLE} - {gpu.name for gpu in GPU_TABLE if gpu.label in labels} == {
        "RTX 5090", "Tesla T4", "RTX A2000 Laptop", "RTX A2000", "RTX A4000", "RTX A4500", "RTX A5000", "RTX A5500", "RTX A6000",
        "A10", "A10G", "L4", "L40S", "A100", "H100", "RTX 2000 Ada", "RTX 4000 Ada", "RTX 4500 Ada", "RTX 5000 Ada",
        "RTX 6000 Ada", "RTX PRO 4000", "RTX PRO 4500", "RTX PRO 5000", "RTX PRO 6000",
    }  # fmt: skip


def test_a_group_has_the_memory_of_its_smallest_gpu():
    for device in group_gpus():
        gpus = [gpu for gpu in GPU_TABLE if gpu.label in device.represents]
        assert device.total_bytes == min(gpu.usable_bytes for gpu in gpus)
        assert math.ceil(device.total_bytes / GIB) == gpus[0].nominal_gb
        assert len({gpu.compute_capability >= (8, 0) for gpu in gpus}) == 1


def test_a_line_of_the_table_names_the_size_and_the_series_of_its_gpus(checker):
    report = table_of(checker, 10)
    line = table_row_as_json(report)
    assert (line["nominal_gb"], line["series"], line["verdict"]) == (10, "RTX 30", "fits")
    assert report.slowest_tokens_per_second <= report.tokens_per_second <= report.fastest_tokens_per_second
    here = replace(report, device=replace(report.device, name="RTX 3080", is_local=True, represents=()))
    assert table_row_as_json(here)["series"] == "RTX 3080"


@pytest.mark.parametrize("size_gb", [4, 12, 24])
def test_a_gpu_of_a_size_gets_the_report_of_its_line_in_the_table(checker, size_gb, monkeypatch):
    monkeypatch.setattr(cost, "HOST_SECONDS", 0.0)  # with a model as small as this one every GPU waits for the host
    line, gpu = table_of(checker, size_gb), gpu_of_size(size_gb * GIB)
    alone = checker.report(gpu, gpu.free_bytes)
    assert replace(alone, device=line.device, created=line.created) == line
    assert alone.slowest_tokens_per_second <= alone.tokens_per_second <= alone.fastest_tokens_per_second
    assert alone.slowest_tokens_per_second < alone.fastest_tokens_per_second  # the median may be equal to one of them


def test_on_a_large_gpu_the_longest_row_is_all_the_positions_of_a_small_model(checker):
    (row,) = find_max_lengths(checker, [GPU], lambda *_: None)
    assert (row.max_length, row.is_model_limit) == (512, True)
    assert row.on_gpu_bytes < GPU.free_bytes


def test_the_longest_row_fits_the_next_does_not_and_other_gpus_change_nothing():
    checker = build_checker({"max_position_embeddings": 16_384})
    gpus = [gpu_with(checker, mib) for mib in (60, 80)]
    alone = [find_max_lengths(checker, [gpu], lambda *_: None)[0] for gpu in gpus]
    assert find_max_lengths(checker, gpus, lambda *_: None) == alone
    assert 0 < alone[0].max_length < alone[1].max_length < 16_384
    for gpu, row in zip(gpus, alone, strict=True):
        predictor = checker.predictor(gpu)
        longer = row.max_length * 9 // 8  # a page of the allocator is much, compared with a tiny model
        (_, fits), (_, fails) = (
            predictor.predict(
                *minimal_memory_plan(predictor, replace(assume_lengths(length, 1), longest_evaluation=0)),
                limit_bytes=gpu.free_bytes - LEAST_BYTES,
            )
            for length in (row.max_length, longer)
        )
        assert (fits, fails) == (True, False)
