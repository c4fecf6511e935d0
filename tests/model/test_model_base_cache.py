"""A 4-bit base from the cache is, to the bit, the one that was quantized; what is damaged or of something else is not used."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tiny_model import save_tiny_model
from transformers import GenerationConfig, Phi3Config

from qlora_phi3.family import parse_architecture
from qlora_phi3.model import base_cache
from qlora_phi3.model.phi3 import load_base
from qlora_phi3.model.quantized import tensor_record
from qlora_phi3.recipe.schema import Model, Quantization

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """An empty cache that takes tiny bases too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(base_cache, "MIN_CHECKPOINT_BYTES", 0)
    return tmp_path / "cache" / "qlora-phi3" / "bases"


@pytest.fixture
def base(tmp_path, folder):
    """A copy with a generation_config.json of its own."""
    copy = Path(shutil.copytree(folder, tmp_path / "base"))
    GenerationConfig(eos_token_id=[2, 7], pad_token_id=0).save_pretrained(copy)
    return copy


def load(base, *, compute_dtype=BF16, **quantization):
    """The base, and the lines about the cache."""
    notes, config = [], Phi3Config.from_pretrained(base).to_dict()
    model = load_base(
        Model(name=str(base)),
        Quantization(**quantization),
        parse_architecture(config, str(base)),
        compute_dtype=compute_dtype,
        device=torch.device("cpu"),
        longest_row=64,
        note=notes.append,
    )
    return model, notes


def entries(cache_dir):
    return sorted(path for path in cache_dir.glob("*") if path.is_dir())


def records(model):
    return {name: tensor_record(parameter) for name, parameter in model.named_parameters()}


def states(model):
    """Everything of the 4-bit weights that their checksums leave out."""
    return {
        name: (weight.shape, weight.dtype, weight.quant_type, weight.blocksize, weight.compress_statistics, weight.requires_grad)
        + (state.shape, state.dtype, state.blocksize, state.quant_type, state.nested, state.code.tolist())
        + ((state.state2.code.tolist(), state.state2.blocksize, state.state2.dtype) if state.nested else ())
        for name, weight in model.named_parameters()
        if (state := getattr(weight, "quant_state", None)) is not None
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "double", "dtype"), [("nf4", True, "bfloat16"), ("fp4", False, "float32")])
def test_the_second_start_has_every_bit_of_the_first(tmp_path, kind, double, dtype, tied):
    base = save_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    GenerationConfig(eos_token_id=[2, 7], pad_token_id=0).save_pretrained(base)
    compute_dtype = getattr(torch, dtype)
    settings = {"compute_dtype": compute_dtype, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    (first, before), (second, after) = load(base, **settings), load(base, **settings)
    assert before == []
    assert [note.partition(":")[0] for note in after] == ["The 4-bit base is read from the cache"]
    assert records(second) == records(first)
    assert states(second) == states(first)
    assert len(states(first)) == 8
    assert all(parameter.dtype is compute_dtype for name, parameter in second.named_parameters() if "norm" in name)
    assert (second.lm_head.weight is second.model.embed_tokens.weight) == tied
    assert {name: buffer.tolist() for name, buffer in second.named_buffers()} == {
        name: buffer.tolist() for name, buffer in first.named_buffers()
    }
    assert second.generation_config.to_dict() == first.generation_config.to_dict()
    assert second.generation_config.eos_token_id == [2, 7]
    assert second.name_or_path == second.config.name_or_path == first.name_or_path == str(base)
    assert second.config.to_dict() == first.config.to_dict()
    assert (second.training, second.is_loaded_in_4bit, second.is_quantized) == (False, True, True)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(second(ids).logits, first(ids).logits)


def test_each_setting_that_changes_the_bits_has_an_entry_of_its_own(base, cache_dir, monkeypatch):
    def count(**settings):
        _, notes = load(base, **settings)
        assert notes == []  # made anew
        return len(entries(cache_dir))

    monkeypatch.setattr(base_cache, "MAX_ENTRIES", 9)
    fp16 = torch.float16
    assert [count(), count(bnb_4bit_quant_type="fp4"), count(bnb_4bit_use_double_quant=False), count(compute_dtype=fp16)] == [
        1,
        2,
        3,
        4,
    ]
    monkeypatch.setattr(base_cache, "version", lambda library: "9" if library == "bitsandbytes" else "1")
    assert count() == 5
    monkeypatch.setattr(base_cache, "describe_device", lambda _: "another processor")
    assert count() == 6
    weights = base / "model.safetensors"
    content, times = bytearray(weights.read_bytes()), weights.stat()
    content[-1] ^= 0x40
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times
    assert count() == 7


def damage_a_byte(entry):
    file = entry / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "the checksum of model.safetensors differs": damage_a_byte,
    "checksum": lambda entry: os.truncate(entry / "model.safetensors", 5000),
    "No such file": lambda entry: (entry / "model.safetensors").unlink(),
    "entry.json is not JSON": lambda entry: (entry / "entry.json").write_text("{", encoding="utf-8"),
    "it has 0 tensors": lambda entry: (entry / "entry.json").write_text('{"files": {}, "tensors": 0}', encoding="utf-8"),
    "entry.json cannot be read": lambda entry: (entry / "entry.json").unlink(),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_entry_is_made_again(base, cache_dir, reason):
    first, _ = load(base)
    (entry,) = entries(cache_dir)
    DAMAGES[reason](entry)
    second, (note,) = load(base)
    assert note.startswith(f"The cached 4-bit base {entry} is damaged (")
    assert reason in note
    assert records(second) == records(first)
    assert load(base)[1] == [f"The 4-bit base is read from the cache: {entry}"]


def test_a_disk_without_room_for_the_reserve_is_left_alone(base, cache_dir, monkeypatch):
    model, _ = load(base)
    size = sum(file.stat().st_size for file in entries(cache_dir)[0].glob("*.safetensors"))
    shutil.rmtree(cache_dir)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, base_cache.RESERVE_BYTES + size // 2))
    again, (note,) = load(base)
    assert note.startswith(f"The 4-bit base is not cached: {cache_dir} has 10.00 GiB free; it needs")
    assert entries(cache_dir) == []
    assert records(again) == records(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, base_cache.RESERVE_BYTES + size))
    assert load(base)[1] == []
    assert len(entries(cache_dir)) == 1


def test_a_disk_that_refuses_costs_a_note_and_leaves_nothing(base, cache_dir, monkeypatch):
    def fill_up(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(base_cache, "save_torch_state_dict", fill_up)
    model, (note,) = load(base)
    assert note.startswith("The 4-bit base is not cached: ")
    assert "No space left on device" in note
    assert [path.suffix for path in cache_dir.iterdir()] == [".lock"]
    assert len(states(model)) == 8


def test_an_entry_that_another_process_writes_is_left_to_it(base, cache_dir):
    load(base)
    (entry,) = entries(cache_dir)
    shutil.rmtree(entry)
    with FileLock(entry.with_suffix(".lock")):
        model, notes = load(base)
    assert (notes, entries(cache_dir)) == ([], [])
    assert len(states(model)) == 8


def test_the_entry_that_was_not_used_for_longest_gives_way(base, cache_dir, monkeypatch):
    monkeypatch.setattr(base_cache, "MAX_ENTRIES", 2)
    load(base)
    (oldest,) = entries(cache_dir)
    load(base, bnb_4bit_quant_type="fp4")
    (other,) = set(entries(cache_dir)) - {oldest}
    os.utime(oldest / "entry.json", (1, 1))
    os.utime(other / "entry.json", (2, 2))
    load(base)  # the oldest is used
    load(base, bnb_4bit_use_double_quant=False)
    assert oldest in entries(cache_dir)
    assert other not in entries(cache_dir)
    assert len(entries(cache_dir)) == 2


def test_small_and_unquantized_bases_are_not_cached(base, cache_dir, monkeypatch):
    load(base, load_in_4bit=False)
    monkeypatch.setattr(base_cache, "MIN_CHECKPOINT_BYTES", (base / "model.safetensors").stat().st_size + 1)
    load(base)
    assert not cache_dir.exists()


def test_an_entry_says_what_it_holds(base, cache_dir):
    load(base)
    record = json.loads((entries(cache_dir)[0] / "entry.json").read_text(encoding="utf-8"))
    assert record["description"].startswith(f"{base}, NF4 double, bfloat16, ")
    assert record["description"].endswith(" CPU, 1 thread")
