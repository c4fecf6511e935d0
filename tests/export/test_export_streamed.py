"""A model that is filled layer by layer is the model that is loaded whole."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_model import FP32, random_rows, save_tiny_model
from tiny_run import TinyRun, leave_run
from transformers import Phi3ForCausalLM

from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.export.streamed import StreamedModel, stream_live, stream_plain, trained_base
from qlora_phi3.family import parse_architecture, read_config
from qlora_phi3.model.loss import select_supervised
from qlora_phi3.model.phi3 import find_base, load_base
from qlora_phi3.model.weights import open_weights, read_tensor
from qlora_phi3.objectives import compute_supervised
from qlora_phi3.recipe.schema import Lora, Model, Quantization
from qlora_phi3.step import Batch, collate, evaluating

CPU = torch.device("cpu")
LONGROPE = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16},
    "original_max_position_embeddings": 64,
}


def lay_out(lengths: list[int], boundary: int | None = None, max_tokens: int = 1024) -> Batch:
    plan = MicroBatchPlan(max_tokens=max_tokens, max_rows=len(lengths), packing=True, longrope_boundary=boundary)
    return collate(random_rows(lengths), plan)


def whole_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits of the supervised positions, from a model that is loaded whole."""
    head = find_base(model).lm_head
    with evaluating(model), torch.no_grad():
        return torch.cat([head(compute_supervised(model, micro)[0]) for micro in batch.micro_batches])


def streamed_logits(model: StreamedModel, batch: Batch) -> torch.Tensor:
    final = model.run(batch, lambda _: None)
    return final.hidden @ torch.cat([piece.float() for piece in final.head()]).T


def load_run(run: TinyRun) -> Any:
    """The model of a run, loaded whole, with PEFT's own forward instead of this project's fused one."""
    architecture = parse_architecture(read_config(str(run.base)), "tiny")
    whole = load_base(Model(name=str(run.base)), Quantization(), architecture, compute_dtype=FP32, device=CPU, longest_row=512)
    return PeftModel.from_pretrained(whole, run.adapter)


def stream_run(run: TinyRun) -> StreamedModel:
    return stream_live(trained_base(run.open_base()), read_config(str(run.base)), run.adapter)


@pytest.mark.parametrize(
    ("lora", "config"),
    [
        (Lora(r=8), {}),
        (Lora(r=8, use_dora=True), {}),
        (Lora(r=8, use_rslora=True, rank_pattern={"o_proj": 4}, alpha_pattern={"down_proj": 3}), {}),
        (Lora(r=8, modules_to_save=["lm_head", "embed_tokens", "norm"]), {}),
        (Lora(r=8), {"tie_word_embeddings": True}),
        (Lora(r=8, modules_to_save=["lm_head"]), {"tie_word_embeddings": True}),
        (Lora(r=8), {"sliding_window": 50}),
        (Lora(r=8), LONGROPE),
        (
            Lora(r=8),
            {
                **LONGROPE,
                "partial_rotary_factor": 0.5,
                "rope_scaling": {**LONGROPE["rope_scaling"], "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
            },
        ),
        (Lora(r=8, modules_to_save=["embed_tokens"]), {"tie_word_embeddings": True}),
        (Lora(r=8, target_modules=["o_proj"], layers_to_transform=[1]), {"num_key_value_heads": 1}),
    ],
    ids=[
        "lora",
        "dora",
        "patterns",
        "saved",
        "tied",
        "tied, head saved",
        "window",
        "longrope",
        "partial rotary",
        "tied, embedding saved",
        "one layer",
    ],
)
def test_the_streamed_live_model_gives_the_very_logits_of_the_loaded_one(tmp_path, lora, config):
    base = save_tiny_model(tmp_path / "base", **config)
    run = leave_run(tmp_path, base, lora=lora)
    batch = lay_out([90, 70, 33, 12], boundary=64 if "rope_scaling" in config else None)
    expected = whole_logits(load_run(run), batch)
    assert expected.std() > 0.1
    assert torch.equal(streamed_logits(stream_run(run), batch), expected)


def test_a_plain_model_gives_the_very_logits_of_the_loaded_one(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    loaded = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = random_rows([90])
    batch = collate(rows, MicroBatchPlan(max_tokens=90, max_rows=1, packing=True, longrope_boundary=None))
    with torch.no_grad():
        hidden = loaded(torch.tensor([rows[0]["input_ids"]])).logits
    expected = select_supervised(hidden, torch.tensor([rows[0]["labels"]]))[0]
    found = streamed_logits(stream_plain(open_weights(base), read_config(str(base))), batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_base_trained_in_bf16_is_scored_with_its_bf16_values(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    run = leave_run(tmp_path, base, compute_dtype=torch.bfloat16)
    loaded, trained = run.live.get_base_model(), trained_base(run.open_base())
    layer = loaded.model.layers[1].mlp.down_proj.base_layer
    as_computed = layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T
    assert torch.equal(read_tensor(trained, "model.layers.1.mlp.down_proj.weight"), as_computed)
    assert torch.equal(read_tensor(trained, "lm_head.weight"), loaded.lm_head.weight)


def test_at_most_one_layers_weights_are_there_at_a_time(tmp_path, monkeypatch):
    base = save_tiny_model(tmp_path / "base")
    model = stream_plain(open_weights(base), read_config(str(base)))
    seen = []
    forward = torch.nn.Linear.forward

    def spying(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        real = [p for p in model.model.parameters() if p.device.type != "meta" and p.untyped_storage().nbytes() > 4]
        seen.append((len(real), real[-1] is module.weight))
        return forward(module, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", spying)
    model.run(lay_out([20]), lambda _: None)
    assert seen == [(1, True)] * 8


def test_a_trained_embedding_and_head_are_read_in_pieces_and_never_stand_in_memory(tmp_path):
    """Those of Phi-4-mini are 2.3 GiB each."""
    base = save_tiny_model(tmp_path / "base")
    run = leave_run(tmp_path, base, lora=Lora(r=8, modules_to_save=["lm_head", "embed_tokens", "norm"]))
    model = stream_run(run)
    held = {name: p for name, p in model.model.named_parameters() if p.device.type != "meta" and p.stride() != (0, 0)}
    assert "model.norm.modules_to_save.default.weight" in held
    assert not [name for name in held if "embed_tokens" in name or "lm_head" in name]


def test_progress_counts_the_layers_of_every_micro_batch(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    counted = []
    model = stream_plain(open_weights(base), read_config(str(base)))
    model.run(lay_out([40, 40], max_tokens=40), counted.append)
    assert counted == [1, 2, 3, 4]
