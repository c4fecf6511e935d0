"""What a run keeps for its export: the base to the bit, and rows to prove it with."""

import json

import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_model import load_tiny, save_tiny_model
from workshop import build_base, read_json, read_lines

from qlora_phi3.data.prepare import PreparedData
from qlora_phi3.model.quantized import tensor_record
from qlora_phi3.recipe.schema import Lora
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.training.artifacts import KEPT_ROWS, KEPT_TOKENS, base_parameters, save_held_out


def test_the_record_names_every_tensor_of_the_base_and_no_other(shop):
    shop.write(lora={"modules_to_save": ["lm_head"]})
    assert shop.run().exit_code == 0
    record = read_json(shop.runs()[0] / "base.json")
    stored = load_file(shop.base / "model.safetensors")
    assert record["tensors"].keys() == stored.keys()
    assert record["quantization"] == {"quant_type": "nf4", "double_quant": True}
    assert (record["dtype"], record["device"], record["revision"]) == ("float32", "cpu", None)
    kinds = {name: entry["kind"] for name, entry in record["tensors"].items()}
    assert {name for name, kind in kinds.items() if kind == "4bit"} == {
        name for name in stored if name.endswith("_proj.weight")
    }
    plain = "model.embed_tokens.weight"
    assert record["tensors"][plain]["sha256"] == tensor_record(stored[plain])["sha256"]


def test_a_run_is_not_resumed_on_another_base(shop):
    base = shop.copy_base()
    shop.write(model={"name": str(base)}, training={"save_steps": 2, "max_steps": 4})
    assert shop.run().exit_code == 0
    (run,) = shop.runs()
    report = read_json(run / "report.json")
    (run / "report.json").write_text(json.dumps({**report, "status": "interrupted"}), encoding="utf-8")
    build_base(base, seed=1)
    result = shop.run("--resume")
    assert result.exit_code == 2
    assert "is not the one" in result.stderr
    assert "tensors differ, first" in result.stderr


def test_a_run_is_resumed_with_another_number_of_threads_whose_means_differ(shop):
    shop.write(training={"save_steps": 2, "max_steps": 4})
    assert shop.run().exit_code == 0
    (run,) = shop.runs()
    record, report = read_json(run / "base.json"), read_json(run / "report.json")
    for tensor in record["tensors"].values():
        if tensor["kind"] == "4bit":
            tensor.update(sha256="other", mean_absmax=tensor["mean_absmax"] * (1 + 1e-7))
    (run / "base.json").write_text(json.dumps(record), encoding="utf-8")
    (run / "report.json").write_text(json.dumps({**report, "status": "interrupted"}), encoding="utf-8")
    assert shop.run("--resume").exit_code == 0


def test_a_base_that_is_adapted_by_dora_is_named_as_in_its_checkpoint(tmp_path):
    model = load_tiny(save_tiny_model(tmp_path), lora=Lora(r=4, use_dora=True, modules_to_save=["embed_tokens"]))
    assert {name for name, _ in base_parameters(model)} == load_file(tmp_path / "model.safetensors").keys()


def test_held_out_rows_are_kept_spread_over_all_and_bounded(tmp_path):
    rows = [{"input_ids": [number] * 10, "labels": [-100] + [number] * 9} for number in range(1000)]
    data = PreparedData(train=Dataset.from_list(rows[:1]), evaluation=Dataset.from_list(rows), report=None)
    save_held_out(data, RunFolder(tmp_path))
    kept = read_lines(tmp_path / "held_out.jsonl")
    assert len(kept) == KEPT_ROWS
    assert kept[-1]["input_ids"][0] > 900
    assert "trained" not in kept[0]


def test_where_nothing_is_held_out_training_rows_are_kept_and_marked(tmp_path):
    rows = [{"input_ids": [1] * 10_000, "labels": [1] * 10_000} for _ in range(5)]
    save_held_out(PreparedData(train=Dataset.from_list(rows), evaluation=None, report=None), RunFolder(tmp_path))
    kept = read_lines(tmp_path / "held_out.jsonl")
    assert 1 <= len(kept) <= KEPT_TOKENS / 10_000
    assert all(row["trained"] for row in kept)


def test_the_same_bits_give_the_same_checksum_wherever_they_lie_and_one_bit_another():
    tensor = torch.arange(12.0).reshape(3, 4)
    assert tensor_record(tensor) == tensor_record(tensor.T.contiguous().T)
    changed = tensor.clone()
    changed[2, 3] += 1e-6
    assert tensor_record(changed) != tensor_record(tensor)
