"""The training of `doctor`: a tiny 4-bit model learns."""

import json

from workshop import call

from qlora_phi3.training.self_test import SelfTest


def test_doctor_trains_a_tiny_model_whose_loss_falls(shop, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = call("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["training"]["status"] == "ok", checks["training"]
    assert "4-bit base" in checks["training"]["text"]
    assert result.exit_code == int(any(check["status"] == "failed" for check in checks.values()))


def test_a_loss_that_rises_or_a_gradient_that_is_not_finite_does_not_pass():
    def passed(losses, norms):
        return SelfTest(device="CPU", compute_dtype="", optim="", losses=losses, grad_norms=norms, seconds=1.0).passed

    assert passed((2.0, 1.0), (1.0, 1.0))
    assert not passed((1.0, 2.0), (1.0, 1.0))
    assert not passed((2.0, float("nan")), (1.0, 1.0))
    assert not passed((2.0, 1.0), (1.0, float("nan")))
    assert not passed((2.0, 1.0), (0.0, 1.0))
