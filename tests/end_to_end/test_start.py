"""A run that begins with the adapter of another."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from workshop import Workshop, read_json

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    """A workshop with a finished run."""
    shop = Workshop(tmp_path_factory.mktemp("finished"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.path)
        shop.write()
        assert shop.run().exit_code == 0
    return shop


@pytest.fixture
def trained(finished, tmp_path, monkeypatch):
    """A copy of that workshop, and its run's directory."""
    shop = Workshop(tmp_path / "shop", finished.base)
    shutil.copytree(finished.path, shop.path)
    monkeypatch.chdir(shop.path)
    return shop, shop.runs()[-1]


def test_training_goes_on_where_the_other_run_ended(trained):
    shop, first = trained
    shop.write(model={"adapter": str(first)})
    result = shop.run()
    assert result.exit_code == 0, result.stderr
    assert f"Starting from the adapter {first.relative_to(shop.path)}" in result.stdout
    report, before = read_json(shop.runs()[-1] / "report.json"), read_json(first / "report.json")
    assert report["eval_loss_before"] == pytest.approx(before["eval_loss_after"], rel=1e-6)
    assert report["eval_loss_after"] < before["eval_loss_after"]


def test_without_a_step_the_adapter_comes_out_as_it_went_in(trained):
    shop, first = trained
    shop.write(model={"adapter": str(first / "adapter")}, training={"learning_rate": 1e-30, "max_steps": 1})
    assert shop.run().exit_code == 0
    written, given = load_file(shop.runs()[-1] / ADAPTER), load_file(first / ADAPTER)
    assert written.keys() == given.keys()
    assert all(torch.equal(written[name], given[name]) for name in given)


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"r": 2}, "r = 4"),
        ({"lora_alpha": 99}, "lora_alpha = 16"),
        ({"target_modules": ["qkv_proj"]}, "[lora]"),
        ({"use_dora": True}, "use_dora = false"),
    ],
    ids=["rank", "strength", "layers", "kind"],
)
def test_an_adapter_of_other_settings_is_one_line_and_exit_code_2(trained, lora, named):
    shop, first = trained
    shop.write(model={"adapter": str(first)}, lora=lora)
    result = shop.run()
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert named in line
    assert len(shop.runs()) == 1


def test_an_adapter_that_is_not_there_is_refused_before_anything_starts(shop):
    shop.write(model={"adapter": "nowhere"})
    result = shop.run()
    assert result.exit_code == 2
    assert "nowhere" in result.stderr


def test_an_adapter_that_holds_nan_is_refused(trained):
    shop, first = trained
    tensors = load_file(first / ADAPTER)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, first / ADAPTER)
    shop.write(model={"adapter": str(first)})
    result = shop.run()
    assert result.exit_code == 2
    assert "NaN" in result.stderr


def test_an_adapter_of_another_base_gives_a_warning(trained):
    shop, first = trained
    path = first / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**read_json(path), "base_model_name_or_path": "someone/else"}), encoding="utf-8")
    shop.write(model={"adapter": str(first)})
    result = shop.run()
    assert result.exit_code == 0
    assert "someone/else" in result.stderr
