"""A checksum is of a tensor's bytes and of nothing else."""

import hashlib

import bitsandbytes as bnb
import pytest
import torch

from qlora_phi3.model.quantized import SAMPLED_BYTES, checksum_of, sample_codes, tensor_checksum, tensor_record


def quantize(weight: torch.Tensor, *, double_quant: bool) -> bnb.nn.Params4bit:
    parameter = bnb.nn.Params4bit(weight.clone(), quant_type="nf4", compress_statistics=double_quant)
    return parameter.to("cpu")


def test_a_plain_tensor_is_summed_over_its_bytes():
    tensor = torch.arange(6, dtype=torch.int32).view(2, 3)
    expected = hashlib.sha256(b"".join(number.to_bytes(4, "little") for number in range(6))).hexdigest()
    assert tensor_record(torch.nn.Parameter(tensor.float()))["kind"] == "plain"
    assert tensor_checksum(tensor) == expected


def test_the_layout_in_memory_does_not_matter():
    tensor = torch.randn(5, 7)
    assert tensor_checksum(tensor.t()) == tensor_checksum(tensor.t().contiguous()) != tensor_checksum(tensor)


def test_pieces_give_the_checksum_of_the_whole():
    tensor = torch.randn(100, 3).bfloat16()
    assert checksum_of(tensor.split(7)) == tensor_checksum(tensor)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_4bit_tensor_is_summed_over_codes_and_scales(double_quant):
    parameter = quantize(torch.randn(64, 64), double_quant=double_quant)
    state = parameter.quant_state
    parts = [parameter.data, state.absmax, *([state.state2.absmax, state.offset] if double_quant else [])]
    record = tensor_record(parameter)
    assert record["kind"] == "4bit"
    assert record["sha256"] == hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    assert record["codes"] == hashlib.sha256(parameter.data.numpy().tobytes()).hexdigest()


def test_the_mean_of_absmax_is_the_one_double_quantization_takes_off():
    weight = torch.randn(64, 64)
    double, single = (tensor_record(quantize(weight, double_quant=double)) for double in (True, False))
    assert double["mean_absmax"] == single["mean_absmax"] == float(weight.view(-1, 64).abs().amax(1).mean())
    assert double["codes"] == single["codes"]
    assert double["sha256"] != single["sha256"]


def test_scales_alone_change_the_checksum_and_not_that_of_the_codes():
    weight = torch.randn(64, 64)
    one, twice = (tensor_record(quantize(factor * weight, double_quant=True)) for factor in (1, 2))
    assert one["codes"] == twice["codes"]
    assert one["sha256"] != twice["sha256"]
    assert twice["mean_absmax"] == 2 * one["mean_absmax"]


def test_the_sampled_codes_are_spread_over_the_whole_tensor_and_its_rows():
    rows, columns = 512, 1536
    packed = (torch.arange(rows * columns) % columns * 256 // columns).to(torch.uint8).view(-1, 1)
    in_column = bytearray(sample_codes(packed))
    in_row = bytearray(
        sample_codes((torch.arange(rows * columns) // columns * 256 // rows).to(torch.uint8).view(-1, 1))
    )
    for places in (in_column, in_row):
        per_quarter = torch.tensor(list(places)).div(64, rounding_mode="floor").bincount()
        assert per_quarter.tolist() == pytest.approx([SAMPLED_BYTES / 4] * 4, abs=8)
    assert len(set(zip(in_column, in_row, strict=True))) > 0.95 * SAMPLED_BYTES


def test_of_a_tensor_with_few_codes_all_are_the_sample():
    parameter = quantize(torch.randn(8, 64), double_quant=True)
    assert tensor_record(parameter)["sampled_codes"] == parameter.data.numpy().tobytes().hex()
