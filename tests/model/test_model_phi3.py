"""The base is loaded as the recipe says, or refused in one line."""

import shutil

import bitsandbytes as bnb
import pytest
import torch
from tiny_model import FP32, load_tiny, random_rows

from qlora_phi3.errors import ModelError
from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.family import read_architecture
from qlora_phi3.model.phi3 import PackedPhi3ForCausalLM, choose_precision, load_base, set_checkpointing
from qlora_phi3.objectives import sft
from qlora_phi3.recipe.schema import Model, Quantization
from qlora_phi3.step import collate

CPU = torch.device("cpu")


def load(folder, **quantization):
    return load_base(
        Model(name=str(folder)),
        Quantization(**quantization),
        read_architecture(str(folder)),
        compute_dtype=FP32,
        device=CPU,
        longest_row=100,
    )


def test_the_base_is_nf4_with_double_quantization_and_frozen(folder):
    model = load(folder)
    layer = model.model.layers[0].mlp.down_proj
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.weight.dtype == torch.uint8
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is False


def test_the_head_and_the_embedding_are_not_quantized(folder):
    model = load(folder)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.float32


def test_bitsandbytes_repacking_is_off_in_every_layer_on_a_cpu_that_has_it(folder, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    assert bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu
    layers = [module for module in load(folder).modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(layers) == 8
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_checkpointing_needs_no_gradient_of_the_embedding(folder):
    model = load_tiny(folder)
    set_checkpointing(model, 1)
    model.train()
    seen = []
    model.base_model.model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    ids = torch.randint(3, 512, (1, 30))
    sft(model, {"input_ids": ids, "labels": ids}, 29).loss.backward()
    assert seen[0] is False


@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_a_named_precision_is_taken(wanted):
    assert choose_precision(wanted, None)[0] == getattr(torch, wanted)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bf16_only_where_it_is_native(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_precision("auto", None)[0] == expected


@pytest.mark.parametrize(("capability", "expected"), [((8, 6), torch.bfloat16), ((7, 5), torch.float16)])
def test_a_gpu_computes_in_bf16_from_compute_capability_8(capability, expected):
    assert choose_precision("auto", capability)[0] == expected


def test_weights_cut_short_are_one_clear_error(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "cut")
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError):
        load(copy)


def test_missing_tensors_are_refused_and_never_made_up(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "holes")
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError):
        load(copy)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96 MiB."),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_a_gpu_that_is_too_small_for_the_base_is_one_line(folder, monkeypatch, error):
    def run_out(*_, **__):
        raise error

    monkeypatch.setattr(PackedPhi3ForCausalLM, "from_pretrained", run_out)
    with pytest.raises(ModelError, match=r"ran out while .* was loaded") as caught:
        load(folder)
    assert "vram-check" in caught.value.hint


def test_a_pickle_is_refused_with_the_reason(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "pickle")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load(copy)


@pytest.mark.parametrize("packing", [True, False])
def test_noise_on_the_embeddings_follows_the_tokens_of_each_row_packed_or_padded(folder, packing):
    rows, alpha = random_rows([80, 20]), 5.0  # a pack has the longest first
    plan = MicroBatchPlan(max_tokens=1000, max_rows=2, packing=packing, longrope_boundary=None)
    (micro,) = collate(rows, plan).micro_batches
    model = load_tiny(folder).train()
    base, seen = model.get_base_model(), []
    layer = base.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    sft(model, micro, 1)
    base.neftune_noise_alpha = alpha
    sft(model, micro, 1)
    sft(model.eval(), micro, 1)
    layer.remove()
    plain, noisy, evaluated = seen
    assert torch.equal(plain, evaluated)
    noise = (noisy - plain).abs()
    spans = [noise[0, :80], noise[0, 80:100]] if packing else [noise[0], noise[1, :20]]
    for span, tokens in zip(spans, (80, 20), strict=True):
        most = alpha / (tokens * 128) ** 0.5
        assert 0.99 * most < float(span.max()) <= 1.0001 * most
        assert float(span.mean()) == pytest.approx(most / 2, rel=0.05)


def test_in_a_single_row_the_noise_is_that_of_transformers(folder):
    from transformers.integrations.neftune import neftune_post_forward_hook

    model, ids = load_tiny(folder).train(), torch.randint(3, 512, (1, 30))
    base, losses = model.get_base_model(), []
    base.neftune_noise_alpha = 5.0
    torch.manual_seed(3)
    losses.append(sft(model, {"input_ids": ids, "labels": ids}, 29).loss.item())
    base.neftune_noise_alpha, base.model.embed_tokens.neftune_noise_alpha = None, torch.tensor(5.0)
    base.model.embed_tokens.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(3)
    losses.append(sft(model, {"input_ids": ids, "labels": ids}, 29).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
