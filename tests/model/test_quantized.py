"""The 4-bit base that a run keeps is whole, and in a form that transformers knows."""

import errno

import pytest
import torch
from tiny_model import load_tiny, save_tiny_model

from qlora_phi3.errors import RunError
from qlora_phi3.model import quantized
from qlora_phi3.model.quantized import quantized_weights, save_quantized
from qlora_phi3.model.weights import open_weights, read_tensor


def test_every_4bit_weight_is_kept_under_its_name_in_the_checkpoint(tmp_path):
    model = load_tiny(save_tiny_model(tmp_path / "base"))
    save_quantized(model, tmp_path / "kept")
    stored = open_weights(tmp_path / "kept")
    live = quantized_weights(model)
    assert len(live) == 8
    assert "model.layers.0.self_attn.qkv_proj.weight" in live
    for name, weight in live.items():
        assert torch.equal(read_tensor(stored, name), weight.data)
        assert torch.equal(read_tensor(stored, f"{name}.absmax"), weight.quant_state.absmax)
        assert torch.equal(
            read_tensor(stored, f"{name}.quant_map"), weight.quant_state.code
        )  # of every layer, though shared


def test_a_large_base_is_kept_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "_FILE_BYTES", 40_000)
    model = load_tiny(save_tiny_model(tmp_path / "base"))
    save_quantized(model, tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) > 1
    stored = open_weights(tmp_path / "kept")
    assert all(torch.equal(read_tensor(stored, name), weight.data) for name, weight in quantized_weights(model).items())


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    model = load_tiny(save_tiny_model(tmp_path / "base"))
    save_quantized(model, tmp_path / "kept")

    def fill_up(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantized, "save_torch_state_dict", fill_up)
    with pytest.raises(RunError, match=r"cannot be kept in .*No space left on device"):
        save_quantized(model, tmp_path / "kept")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "kept"]
    assert "model.layers.0.self_attn.qkv_proj.weight" in open_weights(tmp_path / "kept").info
