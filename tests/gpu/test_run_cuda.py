"""A whole run on a card: planned, rehearsed, reckoned. Skipped, visibly, where there is none."""

import pytest
import torch
from workshop import Workshop, read_json

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def shop(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Workshop(tmp_path, base)


def run(shop, **memory):
    shop.write(quantization={"bnb_4bit_compute_dtype": "auto"}, memory=memory)
    result = shop.run()
    assert result.exit_code == 0, result.stderr
    return result, shop.runs()[-1]


def test_a_run_on_a_card_plans_rehearses_and_reckons(shop):
    result, folder = run(shop)
    assert "Plan: " in result.stdout
    assert "Rehearsal: predicted" in result.stdout
    memory = read_json(folder / "report.json")["memory"]
    for category in ("4-bit weights", "quantization state", "adapter"):
        predicted, measured = (memory[kind]["by_category"][category] for kind in ("predicted", "measured"))
        assert measured <= predicted <= measured + 80 * 512  # the allocator rounds each tensor up to 512 bytes
    assert memory["measured"]["allocated_bytes"] > 0
    assert list((shop.path / "state").rglob("prediction-errors.json"))


def test_a_rehearsal_leaves_the_run_as_it_would_have_been(shop, values):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        _, without = run(shop, rehearsal=False)
        _, rehearsed = run(shop, rehearsal=True)
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (without, rehearsed))
    assert len(one) == len(other)
    assert not values or one == other


def test_offloading_changes_no_loss(shop):
    shop.write(training={"batch_size": 4, "max_length": 128, "max_steps": 3, "activation_offloading": True})
    offloaded = shop.run()
    assert offloaded.exit_code == 0, offloaded.stderr
    shop.write(training={"batch_size": 4, "max_length": 128, "max_steps": 3, "activation_offloading": False})
    kept = shop.run()
    assert kept.exit_code == 0, kept.stderr
    losses = [read_json(folder / "report.json")["eval_loss_after"] for folder in shop.runs()[-2:]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
