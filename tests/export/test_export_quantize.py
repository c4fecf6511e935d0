"""Quantizing a file again, in pieces, gives the very bits that loading it gave."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from tiny_model import save_tiny_model
from transformers import Phi3Config, Phi3ForCausalLM

from qlora_phi3.errors import ModelError
from qlora_phi3.family import parse_architecture
from qlora_phi3.model import quantized as quantize_module
from qlora_phi3.model import weights as weights_module
from qlora_phi3.model.phi3 import Precision, load_base
from qlora_phi3.model.quantized import (
    Scheme,
    count_different_codes,
    dequantize,
    logical_info,
    quantize,
    quantized_record,
    quantized_weights,
    read_quantized,
    save_quantized,
    tensor_record,
)
from qlora_phi3.model.weights import TensorInfo, open_weights
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
    monkeypatch.setattr(weights_module, "PIECE_BYTES", 64 * 192 * 2)
    monkeypatch.setattr(quantize_module, "CHUNK_WEIGHTS", 64 * 53)


def load(folder: Path, dtype: torch.dtype, kind: str = "nf4", double: bool = True) -> Any:
    return load_base(
        Model(name=str(folder)),
        Quantization(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double),
        parse_architecture(Phi3Config.from_pretrained(folder).to_dict(), str(folder)),
        precision=Precision(compute_dtype=dtype, reason="the test asks for it"),
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
    save_quantized(model, tmp_path / "kept")
    stored = open_weights(tmp_path / "kept")
    for name, parameter in quantized_weights(model).items():
        kept = read_quantized(stored, name, CPU)
        assert quantized_record(kept.packed, kept.state) == tensor_record(parameter)
        assert kept.state.dtype is torch.bfloat16
        assert torch.equal(kept.state.code, parameter.quant_state.code)
        assert logical_info(stored)[name] == TensorInfo(tuple(parameter.quant_state.shape), torch.bfloat16)


def test_a_kept_4bit_base_that_misses_a_part_is_refused(base, tmp_path):
    save_quantized(load(base, torch.bfloat16), tmp_path / "kept")
    stored = open_weights(tmp_path / "kept")
    name = "model.layers.0.mlp.down_proj.weight"
    stored.info = {key: info for key, info in stored.info.items() if key != f"{name}.absmax"}
    with pytest.raises(ModelError, match=r"down_proj\.weight is not stored whole in 4 bit"):
        read_quantized(stored, name, CPU)


def test_codes_that_differ_are_counted_one_by_one(base):
    weights, name = open_weights(base), "model.layers.0.mlp.down_proj.weight"
    scheme = Scheme(quant_type="nf4", double_quant=True)
    first, second = (quantize(weights, name, dtype=FLOAT, scheme=scheme, device=CPU) for _ in range(2))
    assert count_different_codes(first, second) == 0
    second.packed[3] ^= 0x11
    second.packed[4] ^= 0x80
    assert count_different_codes(first, second) == 3
