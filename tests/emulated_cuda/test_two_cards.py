"""Two processes, each with an emulated GPU, connected as torchrun connects them: `python3 scripts/test_cuda.py`."""

import json
import os
import sys
from pathlib import Path

import card
import fake_nvml
import pytest
import torch
from program import MIB, call_before_steps
from several import run_processes

CARDS = ("rtx3090", "rtx3060")
UUIDS = ("GPU-90", "GPU-60")


def driver():
    first = fake_nvml.laptop(uuid=UUIDS[0], name="NVIDIA GeForce RTX 3090", total=24123 * MIB, reserved=0, free=24123 * MIB)
    second = fake_nvml.laptop(uuid=UUIDS[1], name="NVIDIA GeForce RTX 3060", total=11910 * MIB, reserved=0, free=11910 * MIB)
    for gpu in (first, second):
        gpu.compute_capability = (8, 6)
    return fake_nvml.FakeNVML(first, second)


def on_its_card(before_step=None):
    """For `run_processes`: a process takes the card of its rank, and writes down at its end what it did with it.

    Args:
        before_step: what happens to the second card before the training steps of these numbers.
    """

    def in_each(rank):
        card.choose(CARDS[rank])
        card.stand_in_for_values()
        sys.modules["pynvml"] = driver()
        call_before_steps(before_step or {} if rank else {})
        end = torch.distributed.destroy_process_group

        def end_and_tell():
            seen = {"visible": os.environ["CUDA_VISIBLE_DEVICES"], "allocated": torch.cuda.max_memory_allocated()}
            seen["devices"] = torch.cuda.device_count()
            Path(f"{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
            end()

        torch.distributed.destroy_process_group = end_and_tell

    return in_each


def test_each_process_uses_its_own_card_with_the_plan_of_all(workplace):
    shop = workplace(4, [600, 500, 400, 300] + [64] * 4)
    shop.write(training={"eval_strategy": "no", "max_steps": 2, "batch_size": 4})
    ended = run_processes(shop, in_each=on_its_card(), timeout=300)
    assert [process.code for process in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    first, second = (json.loads((shop.path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    print(first, second)
    assert [first["visible"], second["visible"]] == list(UUIDS)
    assert "shared by 2 processes" in ended[0].stdout
    assert ended[1].stdout == ""
    assert [step["step"] for step in shop.metrics("train")] == [1, 2]
    assert second["allocated"] == pytest.approx(first["allocated"], rel=0.1)  # the shares of a step differ
    predicted = shop.report()["memory"]["predicted"]["allocated_bytes"]
    assert max(first["allocated"], second["allocated"]) <= 1.02 * predicted


@pytest.mark.slow
def test_memory_that_runs_out_on_one_card_lowers_the_plan_of_both(workplace):
    shop = workplace(4, [600, 500, 400, 300] + [64] * 4)
    shop.write(training={"eval_strategy": "no", "max_steps": 3, "batch_size": 4})
    ended = run_processes(shop, in_each=on_its_card({2: lambda: card.leave(170 * MIB)}), timeout=300)
    assert [process.code for process in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert [step["step"] for step in shop.metrics("train")] == [1, 2, 3]
    remedies = shop.metrics("oom")
    print(remedies)
    assert {record["step"] for record in remedies} == {2}
