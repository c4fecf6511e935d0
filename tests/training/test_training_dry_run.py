"""The heaviest step before the first: run once, measured, and undone bit for bit."""

import pytest
from out_of_memory import RunOutAt
from workshop import Workshop, read_json, read_lines

import qlora_phi3.training.run as training_run

DROPOUT = {"lora": {"r": 4, "lora_dropout": 0.2}, "training": {"batch_size": 4, "max_steps": 4, "save_strategy": "no"}}


def train(shop, *, rehearsal, **tables):
    shop.write(**{**DROPOUT, **tables, "memory": {"rehearsal": rehearsal}})
    result = shop.run()
    assert result.exit_code == 0, result.stderr
    return result, shop.runs()[-1]


def adapter_of(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def losses_of(folder):
    return [record["loss"] for record in read_lines(folder / "metrics.jsonl") if record["kind"] == "train"]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory, base):
    """A run with dropout and a rehearsal: the workshop, what the command printed, and the run's directory."""
    shop = Workshop(tmp_path_factory.mktemp("rehearsed"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.path)
        result, folder = train(shop, rehearsal=True)
    return shop, result, folder


def test_a_rehearsed_run_is_the_same_to_the_bit_with_dropout_too(shop, rehearsed):
    _, without = train(shop, rehearsal=False)
    _, result, folder = rehearsed
    assert "Rehearsal: predicted" in result.stdout
    assert adapter_of(folder) == adapter_of(without)
    assert losses_of(folder) == losses_of(without)


def test_predicted_and_measured_stand_side_by_side_in_the_report(rehearsed):
    memory = read_json(rehearsed[2] / "report.json")["memory"]
    predicted, measured = memory["predicted"], memory["measured"]
    for category in ("4-bit weights", "adapter", "optimizer state"):
        assert predicted["by_category"][category] == pytest.approx(measured["by_category"][category], rel=0.01)
    assert predicted["allocated_bytes"] == sum(predicted["by_category"].values())
    assert measured["process_bytes"] > predicted["allocated_bytes"]


def test_no_rehearsal_on_the_command_line_skips_it(shop):
    shop.write(**DROPOUT, memory={"rehearsal": True})
    result = shop.run("--no-rehearsal")
    assert result.exit_code == 0, result.stderr
    assert "Rehearsal" not in result.stdout


def test_a_rehearsal_leaves_nothing_in_the_run_folder(rehearsed):
    assert not [path for path in rehearsed[2].rglob("*") if "rehearsal" in path.name]


def test_what_does_not_fit_is_split_before_the_first_step(shop, monkeypatch):
    _, undisturbed = train(shop, rehearsal=False, lora={"r": 4})
    dry_run_heaviest_step = training_run.dry_run_heaviest_step

    def rehearse_on_a_small_card(*args, **kwargs):
        with RunOutAt({200, 600}):
            return dry_run_heaviest_step(*args, **kwargs)

    monkeypatch.setattr(training_run, "dry_run_heaviest_step", rehearse_on_a_small_card)
    _, folder = train(shop, rehearsal=True, lora={"r": 4})
    events = [record for record in read_lines(folder / "metrics.jsonl") if record["kind"] == "oom"]
    assert events
    assert {event["step"] for event in events} == {0}
    assert losses_of(folder) == pytest.approx(losses_of(undisturbed), rel=1e-5)
