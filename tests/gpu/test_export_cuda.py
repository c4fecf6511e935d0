"""The export of a run on a card, there and on a computer without one. Skipped, visibly, where there is none."""

import pytest
import torch
from workshop import Workshop, call, read_json

from qlora_phi3.errors import ProofError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def run(tmp_path, base, monkeypatch):
    """A finished run on the card that kept its 4-bit base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    shop = Workshop(tmp_path, base)
    shop.write(model={"save_quantized": True}, quantization={"bnb_4bit_compute_dtype": "auto"})
    result = shop.run()
    assert result.exit_code == 0, result.stderr
    return shop.runs()[-1]


def export(run, name, values):
    """The report of an export. Without values its proof fails, and its files are under a name that says so."""
    target = run.parent / name
    result = call("export", str(run), "--onto", "nf4", "--out", str(target))
    assert result.exit_code == 0 or (not values and result.exit_code == ProofError.exit_code), result.stderr
    [report] = run.parent.glob(f"{name}*/export_report.json")
    return read_json(report)


def test_on_the_card_the_base_quantizes_to_the_runs_own_bits(run, values):
    (run / "quantized_base").rename(run / "away")
    report = export(run, "there", values)
    assert not values or report["status"] == "proved"
    assert report["base"]["compared"]["differing"] == []


def test_without_a_card_the_bits_that_the_run_kept_are_taken(run, values, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = export(run, "elsewhere", values)
    assert not values or report["status"] == "proved"
    scores = {score["name"]: score for score in report["proof"]["scores"]}
    assert not values or scores["nf4"]["mean_kl"] < 1e-4
