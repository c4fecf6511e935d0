"""Quantizing again in chunks gives the bits that loading gave; checksums depend on nothing else; a saved base is complete."""

import errno
import hashlib
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from tiny_model import load_tiny, save_tiny_model
from transformers import Phi3Config, Phi3ForCausalLM

from qlora_phi3.errors import ModelError, RunError
from qlora_phi3.family import parse_architecture
from qlora_phi3.model import quantized as quantize_module
from qlora_phi3.model import weights as weights_module
from qlora_phi3.model.phi3 import load_base
from qlora_phi3.model.quantized import (
    SAMPLED_BYTES,
    Scheme,
    checksum_of,
    count_different_codes,
    dequantize,
    logical_info,
    quantize,
    quantized_record,
    quantized_weights,
    read_quantized,
    sample_codes,
    save_quantized,
    tensor_record,
)
from qlora_phi3.model.weights import TensorInfo, open_weights, read_tensor
from qlora_phi3.recipe.schema import Model, Quantization

CPU = torch.device("cpu")
FLOAT = torch.float32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in fp32; odd multiples of 64 everywhere, and rows enough for several pieces."""
    shapes = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 3, "num_key_value_heads": 1}
    return save_tiny_model(tmp_path_factory.mktemp("base"), **shapes, num_hidden_layers=1)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "ROW_CHUNK_BYTES", 64 * 192 * 2)
    monkeypatch.setattr(quantize_module, "CHUNK_WEIGHTS", 64 * 53)


def load(folder: Path, dtype: torch.dtype, kind: str = "nf4", double: bool = True) -> Any:
    return load_base(
        Model(name=str(folder)),
        Quantization(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double),
        parse_architecture(Phi3Config.from_pretrained(folder).to_dict(), str(folder)),
        compute_dtype=dtype,
        device=CPU,
        longest_row=64,
    )


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_quantizing_again_gives_the_bits_that_loading_gave(base, tmp_path, stored, dtype, kind, double):
    folder = base
    if stored is not torch.float32:
        folder = tmp_path
        Phi3ForCausalLM.from_pretrained(base, dtype=stored).save_pretrained(folder)
    weights, loaded = open_weights(folder), quantized_weights(load(folder, dtype, kind, double))
    assert len(loaded) == 4
    for name, parameter in loaded.items():
        again = quantize(weights, name, dtype=dtype, scheme=Scheme(quant_type=kind, double_quant=double), device=CPU)
        live, state = parameter.quant_state, again.state
        assert torch.equal(again.packed, parameter.data)
        assert torch.equal(state.absmax, live.absmax)
        assert torch.equal(state.code, live.code)
        assert (state.shape, state.dtype, state.blocksize) == (live.shape, live.dtype, live.blocksize)
        assert state.nested is live.nested is double
        if double:
            assert torch.equal(state.offset, live.offset)
            assert torch.equal(state.state2.absmax, live.state2.absmax)
            assert torch.equal(state.state2.code, live.state2.code)
        assert quantized_record(again.packed, state) == tensor_record(parameter)
        assert torch.equal(torch.cat(list(dequantize(again))), bnb.functional.dequantize_4bit(parameter.data, live))


def test_a_recorded_offset_is_taken_as_it_is(base):
    """It is a mean, which torch sums in another order on another number of threads."""
    weights, name = open_weights(base), "model.layers.0.mlp.down_proj.weight"
    scheme = Scheme(quant_type="nf4", double_quant=True)
    first = quantize(weights, name, dtype=FLOAT, scheme=scheme, device=CPU)
    noted = float(torch.nextafter(first.state.offset, torch.tensor(1.0)))
    again = quantize(weights, name, dtype=FLOAT, scheme=scheme, device=CPU, offset=noted)
    record, other = quantized_record(first.packed, first.state), quantized_record(again.packed, again.state)
    assert float(again.state.offset) == noted
    assert again.mean_absmax == first.mean_absmax == float(first.state.offset)
    assert record["codes"] == other["codes"]
    assert record["sha256"] != other["sha256"]


@pytest.mark.parametrize("double", [True, False])
def test_a_kept_4bit_base_gives_back_its_bits(base, tmp_path, double):
    model = load(base, torch.bfloat16, double=double)
    save_quantized(model, tmp_path / "saved")
    stored = open_weights(tmp_path / "saved")
    for name, parameter in quantized_weights(model).items():
        saved = read_quantized(stored, name, CPU)
        assert quantized_record(saved.packed, saved.state) == tensor_record(parameter)
        assert saved.state.dtype is torch.bfloat16
        assert torch.equal(saved.state.code, parameter.quant_state.code)
        assert logical_info(stored)[name] == TensorInfo(tuple(parameter.quant_state.shape), torch.bfloat16)


def test_a_kept_4bit_base_that_misses_a_part_is_refused(base, tmp_path):
    save_quantized(load(base, torch.bfloat16), tmp_path / "saved")
    stored = open_weights(tmp_path / "saved")
    name = "model.layers.0.mlp.down_proj.weight"
    stored.info = {key: info for key, info in stored.info.items() if key != f"{name}.absmax"}
    with pytest.raises(ModelError, match="down_proj"):
        read_quantized(stored, name, CPU)


def test_codes_that_differ_are_counted_one_by_one(base):
    weights, name = open_weights(base), "model.layers.0.mlp.down_proj.weight"
    scheme = Scheme(quant_type="nf4", double_quant=True)
    first, second = (quantize(weights, name, dtype=FLOAT, scheme=scheme, device=CPU) for _ in range(2))
    assert count_different_codes(first, second) == 0
    second.packed[3] ^= 0x11
    second.packed[4] ^= 0x80
    assert count_different_codes(first, second) == 3


def quantize_here(weight: torch.Tensor, *, double_quant: bool) -> bnb.nn.Params4bit:
    parameter = bnb.nn.Params4bit(weight.clone(), quant_type="nf4", compress_statistics=double_quant)
    return parameter.to("cpu")


def test_a_plain_tensor_is_summed_over_its_bytes():
    tensor = torch.arange(6, dtype=torch.int32).view(2, 3)
    expected = hashlib.sha256(b"".join(number.to_bytes(4, "little") for number in range(6))).hexdigest()
    assert tensor_record(torch.nn.Parameter(tensor.float()))["kind"] == "plain"
    assert tensor_record(tensor)["sha256"] == expected


def test_the_layout_in_memory_does_not_matter():
    tensor = torch.randn(5, 7)
    assert tensor_record(tensor.t()) == tensor_record(tensor.t().contiguous()) != tensor_record(tensor)


def test_pieces_give_the_checksum_of_the_whole():
    tensor = torch.randn(100, 3).bfloat16()
    assert checksum_of(tensor.split(7)) == tensor_record(tensor)["sha256"]


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_4bit_tensor_is_summed_over_codes_and_scales(double_quant):
    parameter = quantize_here(torch.randn(64, 64), double_quant=double_quant)
    state = parameter.quant_state
    parts = [parameter.data, state.absmax, *([state.state2.absmax, state.offset] if double_quant else [])]
    record = tensor_record(parameter)
    assert record["kind"] == "4bit"
    assert record["sha256"] == hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    assert record["codes"] == hashlib.sha256(parameter.data.numpy().tobytes()).hexdigest()


def test_the_mean_of_absmax_is_the_one_double_quantization_takes_off():
    weight = torch.randn(64, 64)
    double, single = (tensor_record(quantize_here(weight, double_quant=double)) for double in (True, False))
    assert double["mean_absmax"] == single["mean_absmax"] == float(weight.view(-1, 64).abs().amax(1).mean())
    assert double["codes"] == single["codes"]
    assert double["sha256"] != single["sha256"]


def test_scales_alone_change_the_checksum_and_not_that_of_the_codes():
    weight = torch.randn(64, 64)
    one, twice = (tensor_record(quantize_here(factor * weight, double_quant=True)) for factor in (1, 2))
    assert one["codes"] == twice["codes"]
    assert one["sha256"] != twice["sha256"]
    assert twice["mean_absmax"] == 2 * one["mean_absmax"]


def test_the_sampled_codes_are_spread_over_the_whole_tensor_and_its_rows():
    rows, columns = 512, 1536
    packed = (torch.arange(rows * columns) % columns * 256 // columns).to(torch.uint8).view(-1, 1)
    in_column = bytearray(sample_codes(packed))
    in_row = bytearray(sample_codes((torch.arange(rows * columns) // columns * 256 // rows).to(torch.uint8).view(-1, 1)))
    for places in (in_column, in_row):
        per_quarter = torch.tensor(list(places)).div(64, rounding_mode="floor").bincount()
        assert per_quarter.tolist() == pytest.approx([SAMPLED_BYTES / 4] * 4, abs=8)
    assert len(set(zip(in_column, in_row, strict=True))) > 0.95 * SAMPLED_BYTES


def test_of_a_tensor_with_few_codes_all_are_the_sample():
    parameter = quantize_here(torch.randn(8, 64), double_quant=True)
    assert tensor_record(parameter)["sampled_codes"] == parameter.data.numpy().tobytes().hex()


def test_every_4bit_weight_is_kept_under_its_name_in_the_checkpoint(tmp_path, folder):
    model = load_tiny(folder)
    save_quantized(model, tmp_path / "saved")
    stored = open_weights(tmp_path / "saved")
    live = quantized_weights(model)
    assert len(live) == 8
    assert "model.layers.0.self_attn.qkv_proj.weight" in live
    for name, weight in live.items():
        assert torch.equal(read_tensor(stored, name), weight.data)
        assert torch.equal(read_tensor(stored, f"{name}.absmax"), weight.quant_state.absmax)
        assert torch.equal(read_tensor(stored, f"{name}.quant_map"), weight.quant_state.code)  # of every layer, though shared


def test_a_large_base_is_kept_in_several_files(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(quantize_module, "FILE_BYTES", 40_000)
    model = load_tiny(folder)
    save_quantized(model, tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    stored = open_weights(tmp_path / "saved")
    assert all(torch.equal(read_tensor(stored, name), weight.data) for name, weight in quantized_weights(model).items())


def test_a_full_disk_leaves_what_was_there(tmp_path, folder, monkeypatch):
    model = load_tiny(folder)
    save_quantized(model, tmp_path / "saved")

    def fill_up(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantize_module, "save_torch_state_dict", fill_up)
    with pytest.raises(RunError, match="No space left on device"):
        save_quantized(model, tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    assert "model.layers.0.self_attn.qkv_proj.weight" in open_weights(tmp_path / "saved").info
