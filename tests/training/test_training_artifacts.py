"""What a run leaves behind: its adapter with the base's tokenizer, the base's checksums, and rows for an export's proof."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny_model import FP32, load_tiny, save_tiny_model
from transformers import AutoTokenizer, TrainerState
from workshop import build_base, read_json, read_lines

from qlora_phi3.data.prepare import PreparedData
from qlora_phi3.data.template import choose_template
from qlora_phi3.errors import RunError
from qlora_phi3.model.quantized import tensor_record
from qlora_phi3.recipe.schema import Data, Lora, Model, Quantization
from qlora_phi3.runfolder import RunFolder, write_report
from qlora_phi3.training import artifacts
from qlora_phi3.training.artifacts import (
    KEPT_ROWS,
    KEPT_TOKENS,
    MANIFEST,
    REQUIRED,
    base_parameters,
    damage,
    find_checkpoint,
    record_base,
    save_adapter,
    save_held_out,
    set_aside,
    write_manifest,
)


@pytest.fixture(scope="module")
def model(base):
    return load_tiny(base)


def context_of(tokenizer, base, rows=()):
    """What `save_adapter` reads of a run."""
    recipe, data = SimpleNamespace(model=base, data=Data(train="chats.jsonl")), SimpleNamespace(train=rows)
    return SimpleNamespace(recipe=recipe, tokenizer=tokenizer, template=choose_template(tokenizer), data=data)


@pytest.fixture
def save(model, base, tmp_path):
    """Saves the adapter of the tiny model to the run directory that it returns."""

    def save(name=str(base), **keys):
        folder = RunFolder(tmp_path)
        save_adapter(model, context_of(AutoTokenizer.from_pretrained(base), Model(name=name, **keys)), folder)
        return folder

    return save


def test_an_adapter_stays_when_the_new_one_cannot_take_its_place(save, monkeypatch):
    folder = save()
    (folder.adapter / "mark").write_text("the first", encoding="utf-8")
    rename = Path.replace

    def fail(path, target):
        if path.name == ".adapter.partial":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(RunError):
        save()
    assert (folder.adapter / "mark").read_text(encoding="utf-8") == "the first"
    assert load_file(folder.adapter / "adapter_model.safetensors")
    assert [path.name for path in folder.path.iterdir()] == ["adapter"]


def test_the_tokenizer_files_are_of_the_commit_that_the_run_started_with(save, base, tmp_path, monkeypatch):
    """The hub's main branch may be at another commit when the run ends."""
    revisions = []

    def snapshot_download(name, *, revision, allow_patterns):
        revisions.append(revision)
        return str(base)

    monkeypatch.setattr(artifacts, "snapshot_download", snapshot_download)
    for recorded, wanted in (("0123abc", "main"), (None, "main")):
        RunFolder(tmp_path).base.write_text(json.dumps({"revision": recorded}), encoding="utf-8")
        save("owner/phi3", revision=wanted)
    assert revisions == ["0123abc", "main"]
    assert (tmp_path / "adapter" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_gives_other_ids_is_not_saved_with_the_adapter(model, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    tokenizer = read_json(other / "tokenizer.json")
    tokenizer["normalizer"] = None
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    trained = AutoTokenizer.from_pretrained(base)
    sample = [{"input_ids": trained("two words").input_ids}]
    (tmp_path / "run").mkdir()
    with pytest.raises(RunError, match="other ids"):
        save_adapter(model, context_of(trained, Model(name=str(other)), sample), RunFolder(tmp_path / "run"))
    assert list((tmp_path / "run").iterdir()) == []


def test_the_record_names_the_kind_of_4_bit_that_was_trained_on(model, base, tmp_path):
    quantization = Quantization(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    folder = RunFolder(tmp_path)
    record_base(model, folder, name=str(base), quantization=quantization, compute_dtype=FP32)
    assert read_json(folder.base)["quantization"] == {"quant_type": "fp4", "double_quant": False}


def test_the_record_names_every_tensor_of_the_base_and_no_other(shop):
    shop.write(lora={"modules_to_save": ["lm_head"]})
    assert shop.run().exit_code == 0
    record = read_json(shop.runs()[0] / "base.json")
    stored = load_file(shop.base / "model.safetensors")
    assert record["tensors"].keys() == stored.keys()
    assert record["quantization"] == {"quant_type": "nf4", "double_quant": True}
    assert (record["dtype"], record["device"], record["revision"]) == ("float32", "cpu", None)
    kinds = {name: entry["kind"] for name, entry in record["tensors"].items()}
    assert {name for name, kind in kinds.items() if kind == "4bit"} == {name for name in stored if name.endswith("_proj.weight")}
    plain = "model.embed_tokens.weight"
    assert record["tensors"][plain]["sha256"] == tensor_record(stored[plain])["sha256"]


def test_a_run_is_not_resumed_on_another_base(shop):
    base = shop.copy_base()
    shop.write(model={"name": str(base)}, training={"save_steps": 2, "max_steps": 4})
    assert shop.run().exit_code == 0
    (run,) = shop.runs()
    report = read_json(run / "report.json")
    write_report(RunFolder(run), {**report, "status": "interrupted"})
    build_base(base, seed=1)
    result = shop.run("--resume")
    assert result.exit_code == 2
    assert "10 checksums differ, first " in result.stderr


SCALES = {"kind": "4bit", "sha256": "a", "codes": "b", "mean_absmax": 0.5}


@pytest.mark.parametrize(
    ("where", "changes", "differs"),
    [
        ({}, {}, False),
        ({}, {"sha256": "x", "mean_absmax": 0.5 * (1 + 1e-7)}, True),  # scales, on the same device
        ({"computed_on": "64 threads"}, {"sha256": "x", "mean_absmax": 0.5 * (1 + 1e-7)}, False),
        ({"computed_on": "64 threads"}, {"sha256": "x", "mean_absmax": 1.0}, True),  # scales twice as large
        ({"computed_on": "64 threads"}, {"sha256": "x", "codes": "x"}, True),
        ({"device": "cuda"}, {"sha256": "x", "codes": "x", "mean_absmax": 0.501}, False),
        ({"device": "cuda"}, {"sha256": "x", "codes": "x", "mean_absmax": 0.51}, True),  # other weights
        ({"device": "cuda"}, {"kind": "plain"}, True),
    ],
)
def test_codes_and_scales_are_compared_as_exactly_as_the_devices_allow(where, changes, differs):
    was = {"device": "cpu", "dtype": "float32", "computed_on": "1 thread", "tensors": {"layer": SCALES}}
    entry = {**SCALES, **changes}
    if entry["kind"] == "plain":
        del entry["codes"]
    now = {**was, **where, "inputs": {}, "tensors": {"layer": entry}}
    assert artifacts._differing(was, now) == (["layer"] if differs else [])


def test_an_input_that_an_older_run_did_not_record_is_not_compared_and_a_changed_one_is_named():
    was = {"device": "cpu", "dtype": "float32", "tensors": {}}
    now = {**was, "computed_on": "1 thread", "inputs": {"config.json": "a", "the token ids": "b"}}
    assert artifacts._differing(was, now) == []
    recorded = {**was, "inputs": {"config.json": "x", "the token ids": "b", "vocab.json": "c"}}
    assert artifacts._differing(recorded, now) == ["config.json", "vocab.json"]


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


def make_checkpoint(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, checkpoint / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(2)}, checkpoint / name)
    for name in ("adapter_config.json", "metrics.jsonl"):
        (checkpoint / name).write_text("{}", encoding="utf-8")
    TrainerState(global_step=step).save_to_json(str(checkpoint / "trainer_state.json"))
    write_manifest(checkpoint)
    return checkpoint


@pytest.mark.parametrize("name", [*REQUIRED, MANIFEST])
def test_one_changed_bit_in_any_file_of_a_checkpoint_makes_it_incomplete(tmp_path, name):
    checkpoint = make_checkpoint(tmp_path, 2)
    assert damage(checkpoint) is None
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
    assert name in damage(checkpoint) or name == MANIFEST


@pytest.mark.parametrize("name", REQUIRED)
def test_a_checkpoint_without_a_file_it_must_hold_is_incomplete_whatever_its_manifest_says(tmp_path, name):
    checkpoint = make_checkpoint(tmp_path, 2)
    (checkpoint / name).unlink()
    assert name in damage(checkpoint)
    write_manifest(checkpoint)
    assert damage(checkpoint) == f"{MANIFEST} does not name {name}"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_file_that_was_saved_but_cannot_be_loaded_makes_a_checkpoint_incomplete(tmp_path, name):
    checkpoint = make_checkpoint(tmp_path, 2)
    (checkpoint / name).write_bytes(b"")
    write_manifest(checkpoint)
    assert damage(checkpoint).startswith(f"{name} cannot be loaded")


def test_a_checkpoint_of_another_step_is_incomplete(tmp_path):
    renamed = make_checkpoint(tmp_path, 2).rename(tmp_path / "checkpoint-8")
    assert damage(renamed) == "trainer_state.json is of step 2"


@pytest.mark.parametrize("text", ["{", "{}", "[]", "null", '{"optimizer.pt": 12}', None])
def test_without_a_complete_manifest_no_checkpoint_is_complete(tmp_path, text):
    checkpoint = make_checkpoint(tmp_path, 2)
    (checkpoint / MANIFEST).unlink()
    if text is not None:
        (checkpoint / MANIFEST).write_text(text, encoding="utf-8")
    assert MANIFEST in damage(checkpoint) or "SHA-256" in damage(checkpoint)


def test_a_named_pipe_or_a_directory_in_place_of_a_file_makes_a_checkpoint_incomplete(tmp_path):
    for step, replace in ((2, os.mkfifo), (4, os.mkdir)):
        for name in ("optimizer.pt", MANIFEST):
            checkpoint = make_checkpoint(tmp_path / f"{step}{name}", step)
            (checkpoint / name).unlink()
            replace(checkpoint / name)
            assert name in damage(checkpoint)


def test_the_newest_complete_checkpoint_is_found_by_number_not_by_name(tmp_path):
    make_checkpoint(tmp_path, 9)
    newest, incomplete = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 11)
    (incomplete / MANIFEST).unlink()
    (tmp_path / "checkpoint-other").mkdir()
    assert find_checkpoint(tmp_path) == (newest, {incomplete: f"it has no {MANIFEST}"})
    assert find_checkpoint(tmp_path / "none") == (None, {})


def test_what_a_kill_left_is_removed_and_a_damaged_checkpoint_is_kept_under_another_name(tmp_path):
    unfinished, damaged = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 4)
    (unfinished / MANIFEST).unlink()
    assert set_aside(unfinished) is None
    assert set_aside(damaged) == tmp_path / "damaged-checkpoint-4"
    assert [path.name for path in tmp_path.iterdir()] == ["damaged-checkpoint-4"]
