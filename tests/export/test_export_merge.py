"""The merged tensors are the live model, and the base they are made from is held against the one that was trained on."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from tiny_model import build_config, random_rows, save_tiny_model
from tiny_run import TinyRun, leave_run
from transformers import Phi3ForCausalLM

from qlora_phi3.adapters.adapter_deltas import EMBEDDING, HEAD
from qlora_phi3.errors import ExportError
from qlora_phi3.export.base import RecordedBase, read_record, summarise
from qlora_phi3.export.merge import MergedWeights
from qlora_phi3.model import weights as weights_module
from qlora_phi3.model.quantized import save_quantized
from qlora_phi3.model.weights import open_weights, read_tensor
from qlora_phi3.recipe.schema import Lora, Quantization

DOWN = "model.layers.0.mlp.down_proj.weight"
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> TinyRun:
    return leave_run(tmp_path_factory.mktemp("run"), base)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "ROW_CHUNK_BYTES", 64 * 256 * 4)


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([random_rows([48])[0]["input_ids"]])
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def dense(merged: MergedWeights, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Phi3ForCausalLM:
    """A plain model of the merged tensors."""
    model = Phi3ForCausalLM(build_config(tie_word_embeddings=tied)).to(dtype)
    tensors = {name: read_tensor(merged, name) for name in merged.info}
    if tied:
        tensors[HEAD] = tensors[EMBEDDING]
    model.load_state_dict(tensors)
    return model


def spoil_base(base: Path, to: Path, name: str, change: Any) -> Path:
    """A copy of a base with one tensor changed."""
    shutil.copytree(base, to)
    tensors = load_file(to / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize(
    "lora",
    [
        Lora(r=8),
        Lora(r=8, use_dora=True),
        Lora(r=8, use_rslora=True, rank_pattern={"qkv_proj": 4}, alpha_pattern={"down_proj": 64}),
        Lora(r=8, target_modules=["qkv_proj"]),
        Lora(r=8, modules_to_save=["lm_head", "norm"]),
    ],
    ids=["plain", "dora", "patterns", "one layer", "trained modules"],
)
@pytest.mark.parametrize("four_bit", [True, False])
def test_the_merged_model_has_the_logits_of_the_live_one(tmp_path, base, lora, four_bit):
    run = leave_run(tmp_path, base, lora=lora, quantization=Quantization(load_in_4bit=four_bit))
    merged = run.merged()
    live, exported = logits(run.live), logits(dense(merged))
    assert float((live - exported).abs().max() / live.abs().max()) < 1e-5
    assert summarise(merged.base.compared).differing == ()


@pytest.mark.parametrize(("modules", "unties"), [(None, False), (["lm_head"], True), (["embed_tokens"], True)])
def test_a_tied_model_keeps_its_logits_and_comes_apart_only_where_it_must(tmp_path, modules, unties):
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    run = leave_run(tmp_path, base, lora=Lora(r=4, modules_to_save=modules))
    merged = run.merged()
    assert merged.deltas.unties is unties
    assert (HEAD in merged.info) is unties
    live, exported = logits(run.live), logits(dense(merged, tied=not unties))
    assert float((live - exported).abs().max() / live.abs().max()) < 1e-5


def test_weights_are_rounded_to_the_runs_dtype_before_the_update_is_added(tmp_path, base):
    """As training saw them: a merge of unrounded values would be another model."""
    run = leave_run(tmp_path, base, compute_dtype=BF16)
    merged = run.merged()
    layer = run.live.get_base_model().model.layers[0].mlp.down_proj
    weight = layer.base_layer.weight
    rounded = dequantize_4bit(weight.data, weight.quant_state)
    assert rounded.dtype is torch.bfloat16
    update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(read_tensor(merged, DOWN), rounded.float() + update, rtol=0, atol=1e-6)


def test_onto_the_original_a_weight_is_the_files_own_number_plus_the_update(run):
    merged = run.merged(onto="original")
    layer = run.live.get_base_model().model.layers[0].mlp.down_proj
    update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    stored = load_file(run.base / "model.safetensors")[DOWN]
    torch.testing.assert_close(read_tensor(merged, DOWN), stored + update, rtol=0, atol=1e-6)


def test_what_was_neither_quantized_nor_trained_keeps_its_bytes(tmp_path, base):
    half = tmp_path / "half"
    Phi3ForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    merged = leave_run(tmp_path, half, lora=Lora(r=4, target_modules=["qkv_proj"])).merged(dtype=torch.float16)
    stored = load_file(half / "model.safetensors")
    for name in merged.info:
        quantized = "_proj" in name
        assert merged.info[name].dtype is (torch.float16 if quantized else torch.bfloat16)
        assert read_tensor(merged, name).dtype is merged.info[name].dtype
        if not quantized:
            assert torch.equal(read_tensor(merged, name), stored[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_cast_once_from_fp32(run, dtype):
    in_fp32, cast = run.merged(), run.merged(dtype=dtype)
    assert torch.equal(read_tensor(cast, DOWN), read_tensor(in_fp32, DOWN).to(dtype))


def test_a_value_beyond_the_dtype_is_named_with_its_size(tmp_path, base):
    large = spoil_base(base, tmp_path / "large", DOWN, lambda weight: weight * 0 + 70_000)
    run = leave_run(tmp_path, large)
    with pytest.raises(ExportError, match=rf"{re.escape(DOWN)} .* \d+.*float16 .* 65504"):
        read_tensor(run.merged(dtype=torch.float16), DOWN)
    assert read_tensor(run.merged(dtype=torch.bfloat16), DOWN).isfinite().all()


@pytest.mark.parametrize("onto", ["nf4", "original"])
def test_a_base_without_a_number_is_named(tmp_path, base, onto):
    def put_nan(weight: torch.Tensor) -> torch.Tensor:
        weight[0, 0] = float("nan")
        return weight

    run = leave_run(tmp_path, spoil_base(base, tmp_path / "nan", DOWN, put_nan))
    with pytest.raises(ExportError, match=re.escape(DOWN)):
        read_tensor(run.merged(onto=onto), DOWN)


def test_another_base_is_refused_by_its_plain_tensors_before_anything_is_merged(run, tmp_path):
    other = RecordedBase(open_weights(save_tiny_model(tmp_path, seed=1)), read_record(run.record))
    other.compare_plain()
    assert set(summarise(other.compared).other_weights) == {EMBEDDING, HEAD}  # norms are ones in both
    with pytest.raises(ExportError, match=f"2 of 15 tensors .*first {EMBEDDING}"):
        other.check_weights(tmp_path)
    merged = run.merged(other)
    for name in merged.info:
        read_tensor(merged, name)
    comparison = summarise(other.compared)
    assert len(comparison.codes_differing) == 8
    assert set(comparison.other_weights) == {EMBEDDING, HEAD, *comparison.codes_differing}
    assert comparison.different_codes is None


def test_the_same_base_differs_nowhere(run):
    merged = run.merged()
    for name in merged.info:
        read_tensor(merged, name)
    comparison = summarise(merged.base.compared)
    assert (comparison.num_tensors, comparison.differing, comparison.other_weights) == (15, (), ())
    merged.base.check_weights(run.base)


def test_bits_that_come_out_otherwise_are_taken_from_the_kept_base_and_counted(run, tmp_path, base):
    """As another device's quantizer might round: one weight of the file moved to the next code."""
    save_quantized(run.live, tmp_path / "kept")

    def nudge(weight: torch.Tensor) -> torch.Tensor:
        weight[0, 5] = -weight[0, 5]
        return weight

    nudged = spoil_base(base, tmp_path / "nudged", DOWN, nudge)
    cached = open_weights(tmp_path / "kept")
    with_kept = RecordedBase(open_weights(nudged), read_record(run.record), cached=cached)
    without = RecordedBase(open_weights(nudged), read_record(run.record))
    want = read_tensor(run.merged(), DOWN)
    assert torch.equal(read_tensor(run.merged(with_kept), DOWN), want)
    assert not torch.equal(read_tensor(run.merged(without), DOWN), want)
    kept, made = summarise(with_kept.compared), summarise(without.compared)
    assert (kept.differing, kept.from_cache, kept.different_codes) == ((), (DOWN,), 1)
    assert (made.differing, made.codes_differing, made.different_codes) == ((DOWN,), (DOWN,), None)
    assert kept.other_weights == made.other_weights == ()


@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_that_a_further_training_changed_are_other_weights_even_where_all_plain_tensors_are_the_same(
    tmp_path, base, double_quant
):
    """As when another adapter was merged into the base: embedding, head and norms are untouched."""
    run = leave_run(tmp_path, base, quantization=Quantization(bnb_4bit_use_double_quant=double_quant))
    generator = torch.Generator().manual_seed(3)

    def train_on(weight: torch.Tensor) -> torch.Tensor:
        return weight + 0.001 * weight.std() * torch.randn(weight.shape, generator=generator)

    other = RecordedBase(open_weights(spoil_base(base, tmp_path / "other", DOWN, train_on)), read_record(run.record))
    same = RecordedBase(open_weights(base), read_record(run.record))
    for each in (other, same):
        each.compare_plain()
        assert summarise(each.compared).differing == ()
        each.quantized(DOWN)
    assert summarise(other.compared).other_weights == (DOWN,)
    assert summarise(same.compared).other_weights == summarise(same.compared).differing == ()


@pytest.mark.parametrize(("share", "others"), [(0.01, ()), (0.05, (DOWN,))])
def test_another_rounding_of_a_few_codes_is_the_same_base_and_of_many_another(run, tmp_path, base, share, others):
    """bf16 arithmetic in a quantizer gives 0.6 % of the codes otherwise."""

    def turn_some(weight: torch.Tensor) -> torch.Tensor:
        chosen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) < share
        return torch.where(chosen, -weight, weight)  # every scale stays

    changed = RecordedBase(open_weights(spoil_base(base, tmp_path / "other", DOWN, turn_some)), read_record(run.record))
    changed.quantized(DOWN)
    comparison = summarise(changed.compared)
    assert comparison.differing == comparison.codes_differing == (DOWN,)
    assert comparison.other_weights == others


def test_a_kept_base_that_is_not_what_was_noted_is_refused(run, tmp_path, base):
    other = leave_run(tmp_path, save_tiny_model(tmp_path / "other", seed=1))
    save_quantized(other.live, tmp_path / "kept")
    cached = open_weights(tmp_path / "kept")
    mixed = RecordedBase(open_weights(other.base), read_record(run.record), cached=cached)
    with pytest.raises(ExportError, match=re.escape(DOWN)):
        mixed.quantized(DOWN)


def test_a_base_that_is_stored_in_4bit_is_merged_from_its_own_bits(run, tmp_path, base):
    plain = leave_run(tmp_path / "plain", base)
    plain.live.unload().save_pretrained(tmp_path / "packed")
    packed = leave_run(tmp_path / "run", tmp_path / "packed")
    merged = packed.merged()
    assert merged.info == run.merged().info
    live, exported = logits(packed.live), logits(dense(merged))
    assert float((live - exported).abs().max() / live.abs().max()) < 1e-5
    assert summarise(merged.base.compared).differing == ()
    with pytest.raises(ExportError, match="in 4 bit only"):
        packed.merged(onto="original")


def test_a_base_of_another_shape_is_told_by_both_shapes(run, tmp_path):
    wider = save_tiny_model(tmp_path, intermediate_size=512)
    with pytest.raises(ExportError, match=r"down_proj\.weight is \(128, 512\) .* \(128, 256\)"):
        MergedWeights(
            RecordedBase(open_weights(wider), read_record(run.record)),
            run.merged().deltas,
            onto="nf4",
            dtype=torch.float16,
        )


def test_a_base_that_lacks_a_tensor_is_told(run, tmp_path):
    shorter = save_tiny_model(tmp_path, num_hidden_layers=1)
    with pytest.raises(ExportError, match=r"model\.layers\.1\."):
        RecordedBase(open_weights(shorter), read_record(run.record))


@pytest.mark.parametrize("text", [None, "{", "[]", '{"name": "x"}'])
def test_a_run_that_did_not_note_its_base_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "base.json").write_text(text, encoding="utf-8")
    with pytest.raises(ExportError, match=r"base\.json"):
        read_record(tmp_path / "base.json")
