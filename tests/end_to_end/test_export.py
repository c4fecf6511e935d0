"""`qlora-phi3 export` by the real command line, from runs of a tiny model."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import hub_template
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template
from workshop import Workshop, build_base, call, read_json, read_lines

from qlora_phi3.data.template import choose_template
from qlora_phi3.data.tokenizer import load_tokenizer
from qlora_phi3.family import read_architecture
from qlora_phi3.model.phi3 import load_base
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.recipe.schema import Model
from qlora_phi3.runfolder import RunFolder, write_report
from qlora_phi3.units import format_gib


@pytest.fixture(scope="module")
def done(tmp_path_factory, base):
    """A finished run that learned its few answers by heart; read only."""
    shop = Workshop(tmp_path_factory.mktemp("exported"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.path)
        shop.write(training={"num_train_epochs": 8, "eval_steps": 80, "save_steps": 80})
        result = shop.run()
    assert result.exit_code == 0, result.stderr
    (folder,) = shop.runs()
    return folder


@pytest.fixture
def run(done, tmp_path):
    """A copy of the run to export and to spoil."""
    return Path(shutil.copytree(done, tmp_path / "run"))


@pytest.fixture(autouse=True)
def state(tmp_path_factory, monkeypatch):
    """Where locks are kept."""
    folder = tmp_path_factory.mktemp("state")
    for variable in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(folder))
    return folder


@pytest.fixture
def pushed(monkeypatch):
    """A hub that takes everything: folder and names of what was pushed."""
    import qlora_phi3.export.hub as hub
    import qlora_phi3.export.run as export

    taken = []
    monkeypatch.setattr(hub, "check_push", lambda *_, **__: None)
    monkeypatch.setattr(export, "push", lambda folder, names, *_, **__: taken.append((folder, names)) or "the page")
    return taken


@pytest.fixture(scope="module")
def exported(done, tmp_path_factory):
    """What the command said, and the folder it wrote."""
    target = tmp_path_factory.mktemp("out") / "model"
    result = call("export", str(done), "--out", str(target))
    assert result.exit_code == 0, result.stderr
    return result, target


def live_model(run):
    """The 4-bit base with the trained adapter, loaded whole."""
    from tiny_model import FP32

    recipe = load_recipe(run / "recipe.toml")
    base = load_base(
        recipe.model,
        recipe.quantization,
        read_architecture(recipe.model.name),
        compute_dtype=FP32,
        device=torch.device("cpu"),
        longest_row=128,
    )
    return PeftModel.from_pretrained(base, run / "adapter").eval()


def test_the_export_gives_the_live_models_words_with_plain_transformers(done, exported):
    _, target = exported
    model, live = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32), live_model(done)
    tokenizer = AutoTokenizer.from_pretrained(target)
    for question in ("What is red, number 100?", "What is white, number 7?", "Is the sea blue?"):
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        stops = model.generation_config.eos_token_id
        answers = [
            each.generate(**ids, max_new_tokens=24, do_sample=False, use_cache=True, eos_token_id=stops) for each in (model, live)
        ]
        assert answers[0].tolist() == answers[1].tolist()


def test_the_folder_is_a_whole_checkpoint_in_fp16_with_the_bases_own_tokenizer(base, exported):
    _, target = exported
    assert sorted(path.name for path in target.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "export_report.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    weights, own = load_file(target / "model.safetensors"), load_file(base / "model.safetensors")
    assert weights.keys() == own.keys()
    assert {name for name, tensor in weights.items() if tensor.dtype == torch.float16} == {
        name for name in own if name.endswith("_proj.weight")
    }
    assert torch.equal(weights["model.embed_tokens.weight"], own["model.embed_tokens.weight"])
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (base / name).read_bytes()
    config = read_json(target / "config.json")
    assert config.get("torch_dtype", config.get("dtype")) == "float16"


def test_the_proof_is_shown_and_kept(exported):
    result, target = exported
    report = read_json(target / "export_report.json")
    assert report["status"] == "proved"
    scores = {score["name"]: score for score in report["proof"]["scores"]}
    assert scores.keys() == {"live", "nf4", "original"}
    assert scores["nf4"]["mean_kl"] < 1e-6 < scores["original"]["mean_kl"]
    assert scores["nf4"]["loss"] == pytest.approx(scores["live"]["loss"], abs=1e-4)
    assert report["proof"]["trained"] is False
    for words in ("merged onto NF4", "merged onto the original", "is the trained one (--onto nf4)", "Stop test: 8 of 8 answers"):
        assert words in result.stdout
    assert re.search(r"^Written: the model merged onto (NF4|the original)\.$", result.stdout, flags=re.MULTILINE)
    assert str(target) in result.stdout


def test_it_stops_at_the_end_of_a_turn(exported):
    _, target = exported
    end = AutoTokenizer.from_pretrained(target).convert_tokens_to_ids("<|end|>")
    assert end in read_json(target / "generation_config.json")["eos_token_id"]


def test_onto_the_original_is_held_against_the_unquantized_base(run):
    result = call("export", str(run), "--onto", "original", "--dtype", "fp32")
    assert result.exit_code == 0, result.stderr
    report = read_json(run / "merged-original-fp32" / "export_report.json")
    original = next(score for score in report["proof"]["scores"] if score["name"] == "original")
    assert (report["onto"], report["dtype"]) == ("original", "float32")
    assert original["fault_max_kl"] < 1e-8 < original["mean_kl"]


def write_held_out(run, labels):
    """One held-out row whose supervised tokens are chosen; the model's input stays."""
    ids = read_lines(run / "held_out.jsonl")[0]["input_ids"]
    row = {"input_ids": ids, "labels": [-100] * (len(ids) - len(labels)) + labels}
    (run / "held_out.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def test_auto_merges_onto_the_original_only_where_it_is_better_by_more_than_two_standard_errors(run):
    """The held-out tokens are those that the merge onto the original likes better; of the last two, one hardly."""
    log_probabilities = {}
    for onto in ("nf4", "original"):
        folder = run.parent / onto
        assert call("export", str(run), "--onto", onto, "--no-verify", "--out", str(folder)).exit_code == 0
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.tensor([read_lines(run / "held_out.jsonl")[0]["input_ids"]])
        with torch.no_grad():
            log_probabilities[onto] = model(ids).logits[0, :-1].log_softmax(dim=-1)
    gain = log_probabilities["original"] - log_probabilities["nf4"]
    hardly = torch.where(gain > 0, gain, torch.inf).argmin(dim=-1)
    for labels, expected, words in (
        (gain.argmax(dim=-1).tolist(), "original", "more than two standard errors"),
        ([int(gain[-2].argmax()), int(hardly[-1])], "nf4", "less than two standard errors"),
    ):
        write_held_out(run, labels)
        result = call("export", str(run), "--force")
        assert result.exit_code == 0, result.stderr
        report = read_json(run / "merged" / "export_report.json")
        difference = report["proof"]["loss_difference"]
        assert report["onto"] == expected
        assert difference["tokens"] == len(labels)
        assert difference["mean"] > 0
        assert (difference["mean"] > 2 * difference["standard_error"]) is (expected == "original")
        assert words in result.stdout
        written, wanted = (load_file(path / "model.safetensors") for path in (run / "merged", run.parent / expected))
        assert_same(written, wanted)


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_interrupted_export_leaves_nothing_and_is_made_again(run, monkeypatch):
    import qlora_phi3.export.merge as merge

    def stop_late(self, name, rows=merge.MergedWeights.iter_row_chunks):
        if name == "model.layers.1.mlp.down_proj.weight":
            raise KeyboardInterrupt
        return rows(self, name)

    command = ("export", str(run), "--shard-size", "1MiB", "--no-verify")
    with monkeypatch.context() as patch:
        patch.setattr(merge.MergedWeights, "iter_row_chunks", stop_late)
        result = call(*command)
    assert result.exit_code == 130
    assert not (run / "merged").exists()
    assert not (run / ".merged.partial").exists()
    result = call(*command)
    assert result.exit_code == 0, result.stderr
    whole = run.parent / "whole"
    assert call(*command, "--out", str(whole)).exit_code == 0
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (run / "merged" / path.name).read_bytes()
    assert read_json(run / "merged" / "export_report.json")["base"]["compared"]["num_tensors"] == 15


def test_what_stands_at_the_target_is_replaced_only_by_force_and_nothing_that_no_export_wrote(run, tmp_path):
    target, link = run / "merged", tmp_path / "link"
    assert call("export", str(run), "--no-verify").exit_code == 0
    written = sorted(path.name for path in target.iterdir())
    assert read_json(target / "export_report.json")["files"]["written"] == written
    result = call("export", str(run), "--no-verify")
    assert result.exit_code == 2
    assert f"{target} exists" in result.stderr
    link.symlink_to(target)
    (target / "mine.txt").write_text("mine", encoding="utf-8")
    for words in ((), ("--out", str(link))):
        result = call("export", str(run), "--no-verify", "--force", *words)
        assert result.exit_code == 2
        assert f"{target} holds mine.txt" in result.stderr
    assert (target / "mine.txt").read_text(encoding="utf-8") == "mine"
    (target / "mine.txt").unlink()
    assert call("export", str(run), "--no-verify", "--force").exit_code == 0
    assert sorted(path.name for path in target.iterdir()) == written
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []


def test_a_file_that_comes_to_the_target_during_the_export_stays(run, monkeypatch):
    import qlora_phi3.export.writer as writer

    def put_beside(weights, folder, shard, *rest, write=writer._write_shard):
        write(weights, folder, shard, *rest)
        (run / "merged" / "mine.txt").write_text("mine", encoding="utf-8")

    assert call("export", str(run), "--no-verify").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_shard", put_beside)
        result = call("export", str(run), "--no-verify", "--force")
    assert result.exit_code == 2
    assert "merged holds mine.txt" in result.stderr
    (run / "merged" / "mine.txt").rename(run / "mine.txt")
    again = call("export", str(run), "--no-verify", "--force")
    assert again.exit_code == 0, again.stderr


def test_a_second_export_into_the_same_place_is_refused_and_the_first_goes_on(run, state, monkeypatch):
    pytest.importorskip("gguf")
    import qlora_phi3.export.writer as writer

    others = []

    def export_at_once(weights, folder, shard, *rest, write=writer._write_shard):
        if not others:
            before = sorted(path.name for path in folder.iterdir())
            others.extend(call("export", str(run), "--no-verify", *words) for words in ((), ("--format", "gguf")))
            assert sorted(path.name for path in folder.iterdir()) == before
        write(weights, folder, shard, *rest)

    monkeypatch.setattr(writer, "_write_shard", export_at_once)
    result = call("export", str(run), "--no-verify")
    assert result.exit_code == 0, result.stderr
    assert (run / "merged" / "model.safetensors").is_file()
    for other in others:
        assert other.exit_code == 2
        (line,) = other.stderr.strip().splitlines()
        assert str(run / "merged") in line
    assert len(others) == 2
    assert [*state.rglob("*.lock")]
    assert [*run.rglob("*.lock")] == []


def test_a_ggufs_own_folder_is_held_too(run, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from qlora_phi3.export.writer import locked

    with locked([tmp_path / "files"]):
        result = call("export", str(run), "--no-verify", "--format", "gguf", "--out", str(tmp_path / "files"))
    assert result.exit_code == 2
    assert str(tmp_path / "files") in result.stderr
    assert not (tmp_path / "files").exists()
    assert not (run / "merged").exists()


def test_what_was_exported_is_pushed_as_it_is_without_what_lies_beside_it(done, exported, tmp_path, pushed):
    _, model = exported
    target = Path(shutil.copytree(model, tmp_path / "model"))
    written = sorted(path.name for path in target.iterdir())
    (target / "secret.txt").write_text("secret", encoding="utf-8")
    weights = (target / "model.safetensors").stat().st_mtime_ns
    result = call("export", str(done), "--out", str(target), "--push", "me/x")
    assert result.exit_code == 0, result.stderr
    assert f"{target}, made before" in result.stdout
    assert "On the hub: the page" in result.stdout
    assert pushed == [(target, written)]
    assert (target / "model.safetensors").stat().st_mtime_ns == weights


def test_without_a_network_a_push_is_refused_in_one_line_before_anything_is_written(run, monkeypatch):
    import qlora_phi3.export.hub as hub

    class NoNetwork:
        def whoami(self):
            raise hub.TransportError("[Errno -2] Name or service not known")

    monkeypatch.setattr(hub, "HfApi", NoNetwork)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_verysecret")
    before = sorted(path.name for path in run.iterdir())
    result = call("export", str(run), "--push", "me/x")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "[Errno -2] Name or service not known" in line
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder in which nobody can make one")
@pytest.mark.parametrize("words", [(), ("--format", "gguf")], ids=["hf", "gguf"])
def test_a_place_that_cannot_be_made_is_told_before_the_base_is_read(run, words, monkeypatch):
    import qlora_phi3.export.run as export

    def never(*_):
        raise AssertionError("read")

    monkeypatch.setattr(export, "open_sources", never)
    result = call("export", str(run), "--no-verify", "--out", "/proc/x", *words)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "/proc/" in line


def test_a_refused_export_leaves_no_draft_and_no_folder(run, tmp_path, monkeypatch):
    import qlora_phi3.export.writer as writer

    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**20, 0, 2**20))
        result = call("export", str(run), "--no-verify", "--out", str(tmp_path / "deep" / "down"))
    assert result.exit_code == 2
    assert "1 MiB" in result.stderr
    assert not (tmp_path / "deep").exists()
    (run / "held_out.jsonl").write_text("[1]", encoding="utf-8")
    assert call("export", str(run)).exit_code == 2
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_is_no_export_is_never_replaced_and_a_link_stays_one(run, tmp_path):
    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.mkdir()
    link.symlink_to(mine)
    for _ in range(2):
        result = call("export", str(run), "--no-verify", "--force", "--out", str(link))
        assert result.exit_code == 0, result.stderr
        assert link.is_symlink()
        assert (mine / "model.safetensors").is_file()
    (mine / "export_report.json").unlink()
    result = call("export", str(run), "--no-verify", "--force", "--out", str(link))
    assert result.exit_code == 2
    assert "README.md" in result.stderr
    assert (mine / "model.safetensors").is_file()


def test_what_another_export_left_in_the_draft_is_not_shipped(run):
    draft = run / ".merged.partial"
    (draft / "figures").mkdir(parents=True)
    for name in ("tokenizer.model", "LICENSE"):
        (draft / name).write_text("another's", encoding="utf-8")
    assert call("export", str(run), "--no-verify").exit_code == 0
    names = {path.name for path in (run / "merged").iterdir()}
    assert names.isdisjoint({"tokenizer.model", "LICENSE", "figures"})


def test_after_a_try_with_a_wrong_base_the_right_one_is_taken(run, tmp_path, monkeypatch):
    """Wrong only where the run quantized, which shows when all is read."""
    import qlora_phi3.export.writer as writer

    def stop_after_one(weights, folder, shard, *rest, write=writer._write_shard):
        if any(folder.glob("model-*")):
            raise KeyboardInterrupt
        write(weights, folder, shard, *rest)

    own = Path(load_recipe(run / "recipe.toml").model.name)
    wrong = Path(shutil.copytree(own, tmp_path / "wrong"))
    tensors = load_file(own / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] += 0.1
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    for words in (("--no-verify",), ()):
        result = call("export", str(run), *words, "--base", str(wrong))
        assert result.exit_code == 2
        assert str(wrong) in result.stderr
    assert not (run / ".merged.partial").exists() or not any((run / ".merged.partial").glob("*.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_shard", stop_after_one)
        resumed = ("--shard-size", "1MiB", "--base", str(wrong), "--out", str(tmp_path / "corrected"))
        assert call("export", str(run), *resumed, "--no-verify").exit_code == 130
    corrected = tmp_path / "wrong" / "model.safetensors"
    corrected.write_bytes((own / "model.safetensors").read_bytes())
    for words in (resumed, ("--no-verify",), ("--force",)):
        result = call("export", str(run), *words)
        assert result.exit_code == 0, result.stderr


def test_a_proof_outlives_an_interruption_and_only_the_winner_is_written(run, monkeypatch):
    import qlora_phi3.export.proof as scored
    import qlora_phi3.export.writer as writer

    written = []

    def stop_at_the_second(weights, folder, shard, *rest, write=writer._write_shard):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append((weights.onto, shard.file_name))
        write(weights, folder, shard, *rest)

    def never(*_, **__):
        raise AssertionError("scored again")

    def choose_original(proof):
        return "original"

    monkeypatch.setattr("qlora_phi3.export.proof.choose_onto", choose_original)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_shard", stop_at_the_second)
        assert call("export", str(run), "--shard-size", "1MiB").exit_code == 130
    assert [onto for onto, _ in written] == ["original"]
    with monkeypatch.context() as patch:
        patch.setattr(scored, "prove", never)
        result = call("export", str(run), "--shard-size", "1MiB")
    assert result.exit_code == 0, result.stderr
    assert "merged onto the original" in result.stdout
    report = read_json(run / "merged" / "export_report.json")
    assert (report["status"], report["onto"], report["proof"]["rows"]) == ("proved", "original", 8)
    assert report["base"]["compared"]["num_tensors"] == 15
    assert [path.name for path in (run / "merged").iterdir() if path.name.startswith(".")] == []


def test_a_proof_that_an_interruption_left_is_used_also_where_none_is_asked_for(run, monkeypatch):
    import qlora_phi3.export.writer as writer

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_phi3.export.proof.choose_onto", lambda proof: "original")
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_shard", stop)
        assert call("export", str(run)).exit_code == 130
    result = call("export", str(run), "--no-verify")
    assert result.exit_code == 0, result.stderr
    assert "it is not known" not in result.stdout
    report = read_json(run / "merged" / "export_report.json")
    assert (report["status"], report["onto"], report["proof"]["rows"]) == ("proved", "original", 8)
    assert report["stop_test"] is None


def test_scores_of_other_held_out_rows_are_not_taken_up(run, monkeypatch):
    import qlora_phi3.export.writer as writer

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_shard", stop)
        assert call("export", str(run)).exit_code == 130
    rows = (run / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    (run / "held_out.jsonl").write_text("\n".join(rows[:3]) + "\n", encoding="utf-8")
    assert call("export", str(run)).exit_code == 0
    assert read_json(run / "merged" / "export_report.json")["proof"]["rows"] == 3


def test_files_that_do_not_hold_what_was_scored_fail_the_proof(run, monkeypatch):
    import qlora_phi3.export.writer as writer

    def off_by_a_bit(write, data, write_all=writer._write_all):
        if not isinstance(data, bytes):  # the bytes of a tensor, not of the header
            data = data.copy()
            data[0] ^= 1
        write_all(write, data)

    monkeypatch.setattr(writer, "_write_all", off_by_a_bit)
    result = call("export", str(run))
    assert result.exit_code == 5
    assert "lm_head.weight" in result.stderr


@pytest.mark.parametrize("spoilt", ["", '{"input_ids": [1, 2', "[1]", '{"labels": [1]}'])
def test_held_out_rows_that_are_cut_are_told_and_only_where_they_are_needed(run, spoilt):
    (run / "held_out.jsonl").write_text(spoilt, encoding="utf-8")
    result = call("export", str(run))
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "--no-verify" in line
    if not spoilt:
        (run / "held_out.jsonl").unlink()
    assert call("export", str(run), "--no-verify").exit_code == 0


def test_a_folder_that_cannot_be_made_is_one_line(run, tmp_path):
    (tmp_path / ".merged.partial").write_text("in the way", encoding="utf-8")
    result = call("export", str(run), "--no-verify", "--out", str(tmp_path / "merged"))
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "File exists" in line


def test_each_way_to_merge_has_a_folder_of_its_own_and_a_gguf_is_made_from_the_one_like_it(run, tmp_path):
    pytest.importorskip("gguf")
    assert call("export", str(run), "--no-verify").exit_code == 0
    words = ("--format", "gguf", "--quant", "f32", "--dtype", "fp32", "--onto", "nf4")
    assert call("export", str(run), *words, "--no-verify").exit_code == 0
    folders = {"merged", "merged-nf4-fp32", "gguf-nf4-fp32-f32"}
    assert folders <= {path.name for path in run.iterdir()}
    again = call("export", str(run), *words, "--no-verify", "--out", str(tmp_path / "again"))
    assert again.exit_code == 0, again.stderr
    assert "made before" in again.stdout
    unproved = call("export", str(run), *words, "--out", str(tmp_path / "proved"))
    assert unproved.exit_code == 2
    assert "--no-verify" in unproved.stderr
    assert "--force" in unproved.stderr
    (adapter,) = (run / "adapter").glob("adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in load_file(adapter).items()}, adapter)
    changed = call("export", str(run), *words, "--no-verify", "--out", str(tmp_path / "changed"))
    assert changed.exit_code == 2
    assert "not a merged model of this run" in changed.stderr


def test_a_gguf_leaves_what_lies_beside_it_alone_and_pushes_its_own_files_only(run, tmp_path, pushed):
    pytest.importorskip("gguf")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "secret.txt").write_text("secret", encoding="utf-8")
    words = ("--format", "gguf", "--no-verify", "--push", "me/phi", "--out", str(mine))
    result = call("export", str(run), *words)
    assert result.exit_code == 0, result.stderr
    name = "mine-f16.gguf"
    assert pushed == [(mine, sorted(["Modelfile", "README.md", "export_report.json", name]))]
    assert read_json(mine / "export_report.json")["gguf"] == {"file": name, "quant": "f16"}
    card = (mine / "README.md").read_text(encoding="utf-8")
    assert f"The merged model from which `{name}` was made as f16 was not compared" in card
    again = call("export", str(run), *words)
    assert again.exit_code == 2
    assert f"{name} exists" in again.stderr
    hf = call("export", str(run), "--no-verify", "--out", str(mine), "--force")
    assert hf.exit_code == 2
    assert "mine holds secret.txt" in hf.stderr
    merged = (run / "merged" / "model.safetensors").stat().st_mtime_ns
    forced = call("export", str(run), *words, "--force")
    assert forced.exit_code == 0, forced.stderr
    assert (run / "merged" / "model.safetensors").stat().st_mtime_ns == merged  # it is what the GGUF needs
    assert (mine / "secret.txt").read_text(encoding="utf-8") == "secret"


def test_several_types_share_a_folder_and_one_that_rounds_is_not_called_proved(done, exported, run, tmp_path):
    pytest.importorskip("gguf")
    shutil.copytree(exported[1], run / "merged")
    for quant, status in (("f16", "proved"), ("q8_0", "proved_before_quantization")):
        result = call("export", str(run), "--quant", quant, "--out", str(tmp_path / "all"))
        assert f"--quant {quant}: a GGUF is written" in result.stdout
        assert result.exit_code == 0, result.stderr
        assert "which other exports can use" not in result.stdout  # it was there before
        report = read_json(tmp_path / "all" / "export_report.json")
        assert (report["status"], report["gguf"]["quant"]) == (status, quant)
    written = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert len(written) == 5
    assert report["files"]["written"] == written
    modelfile = (tmp_path / "all" / "Modelfile").read_text(encoding="utf-8")
    assert modelfile.startswith(f"FROM ./{report['gguf']['file']}\n")
    forced = ("--format", "gguf", "--quant", "f16", "--out", str(tmp_path / "all"), "--force")
    assert call("export", str(run), *forced).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == written


def test_the_merged_model_that_a_gguf_leaves_is_told_with_its_size(run):
    pytest.importorskip("gguf")
    result = call("export", str(run), "--no-verify", "--format", "gguf", "--dtype", "bf16")
    assert result.exit_code == 0, result.stderr
    merged = run / "merged-bf16"
    size = sum(path.stat().st_size for path in merged.iterdir())
    assert f"Merged model, which other exports can use: {merged} ({format_gib(size)})" in result.stdout
    (gguf,) = (run / "gguf-bf16-bf16").glob("*.gguf")
    assert gguf.stem.endswith("-bf16")
    assert read_json(run / "gguf-bf16-bf16" / "export_report.json")["status"] == "unproved"


def test_memory_and_disk_are_looked_at_before_a_gguf_is_begun(run, monkeypatch):
    pytest.importorskip("gguf")
    import qlora_phi3.export.writer as writer

    free = 70 * 2**20  # for the merge with what lies beside it, and not for the GGUF too
    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
        result = call("export", str(run), "--no-verify", "--format", "gguf")
    assert result.exit_code == 2
    assert re.search(r" 9\d\d? MiB .* 70 MiB ", result.stderr), result.stderr
    assert not (run / "merged").exists()
    assert call("export", str(run), "--no-verify").exit_code == 0
    result = call("export", str(run), "--no-verify", "--format", "gguf", "--max-ram", "200MiB")
    assert result.exit_code == 2
    assert "--max-ram 200 MiB" in result.stderr


def test_a_proof_that_fails_keeps_the_files_under_a_name_that_says_so(run, monkeypatch):
    import qlora_phi3.export.merge as merge

    def doubled(self, name, rows=merge.MergedWeights.iter_row_chunks):
        for chunk in rows(self, name):
            yield chunk * 2 if "down_proj" in name else chunk

    monkeypatch.setattr(merge.MergedWeights, "iter_row_chunks", doubled)
    result = call("export", str(run), "--onto", "nf4")
    assert result.exit_code == 5
    assert re.search(r"^merged onto NF4 ", result.stdout, flags=re.MULTILINE)
    assert "is the trained one" not in result.stdout
    assert "Done" not in result.stdout
    assert not (run / "merged-nf4").exists()
    assert read_json(run / "merged-nf4.failed-proof" / "export_report.json")["status"] == "failed"


def test_a_run_on_unquantized_weights_is_exported_too(shop):
    shop.write(quantization={"load_in_4bit": False, "bnb_4bit_compute_dtype": "float32"})
    assert shop.run().exit_code == 0
    result = call("export", str(shop.runs()[0]))
    assert result.exit_code == 0, result.stderr
    report = read_json(shop.runs()[0] / "merged" / "export_report.json")
    assert [score["name"] for score in report["proof"]["scores"]] == ["live", "original"]
    assert report["proof"]["scores"][1]["mean_kl"] < 1e-6


def other_base(run, tmp_path):
    return (
        "--base",
        str(build_base(tmp_path / "other", seed=1)),
    ), "at least 2 of 15"


def smaller_base(run, tmp_path):
    return (
        "--base",
        str(build_base(tmp_path / "small", hidden_size=64)),
    ), "down_proj|q_proj|is not|shape|was trained on"


def cut_base(run, tmp_path):
    base = Path(shutil.copytree(load_recipe(run / "recipe.toml").model.name, tmp_path / "cut"))
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return ("--base", str(base)), "no complete safetensors file"


def pickled_base(run, tmp_path):
    base = Path(shutil.copytree(load_recipe(run / "recipe.toml").model.name, tmp_path / "pickled"))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    return ("--base", str(base)), "can run code"


def unfinished(run, tmp_path):
    report = read_json(run / "report.json")
    write_report(RunFolder(run), {**report, "status": "interrupted"})
    return (), "interrupted.*--resume"


def no_run(run, tmp_path):
    (run / "report.json").unlink()
    return (), "report.json"


def spoilt_adapter(run, tmp_path):
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    report = read_json(run / "report.json")
    report.pop("adapter", None)  # older runs noted no checksum, by which it would be told
    write_report(RunFolder(run), report)
    return (), r"lora_\w\.weight holds NaN"


def target_inside_the_base(run, tmp_path):
    base = Path(shutil.copytree(load_recipe(run / "recipe.toml").model.name, tmp_path / "base"))
    return ("--base", str(base), "--out", str(base / "merged")), "--out .* is inside "


def target_inside_the_runs_own_base(run, tmp_path):
    own = load_recipe(run / "recipe.toml").model.name
    base = shutil.copytree(own, tmp_path / "own")
    for name in ("base.json", "recipe.toml"):
        text = (run / name).read_text(encoding="utf-8")
        assert own in text
        (run / name).write_text(text.replace(own, str(base)), encoding="utf-8")
    (base / "export_report.json").write_text("{}", encoding="utf-8")
    return ("--out", str(base), "--force"), "--out .* is inside .*own"


def target_is_the_run(run, tmp_path):
    return ("--out", str(run)), "--out .*run"


def unknown_quantization(run, tmp_path):
    return ("--format", "gguf", "--quant", "q9_z"), "q9_z.*q8_0"


def two_quantizations(run, tmp_path):
    return ("--format", "gguf", "--quant", "f16", "--quant", "q8_0"), r"--quant .*f16, q8_0"


def gguf_beside_a_model(run, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"somebody's")
    return ("--format", "gguf", "--out", str(tmp_path / "model"), "--force"), "--out .*model"


def no_base(run, tmp_path):
    return ("--base", str(tmp_path / "nowhere")), "--base .*nowhere"


def empty_base(run, tmp_path):
    return ("--base", str(tmp_path)), "config.json"


def quantization_without_gguf(run, tmp_path):
    return ("--quant", "q8_0", "--format", "hf"), "--format hf writes none"


def unreadable_size(run, tmp_path):
    return ("--shard-size", "big"), "--shard-size 'big'"


def too_little_memory(run, tmp_path):
    return ("--max-ram", "200MiB"), "--max-ram 200 MiB"


def another_tokenizer(run, tmp_path):
    base = Path(shutil.copytree(load_recipe(run / "recipe.toml").model.name, tmp_path / "base"))
    config = read_json(base / "tokenizer_config.json")
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|end|>"}), encoding="utf-8")
    return ("--base", str(base)), "tokenizer_config.json"


CAUSES = [
    other_base, smaller_base, cut_base, pickled_base, unfinished, no_run, spoilt_adapter, target_inside_the_base,
    target_inside_the_runs_own_base, target_is_the_run, unknown_quantization, quantization_without_gguf, unreadable_size,
    too_little_memory, another_tokenizer, two_quantizations, gguf_beside_a_model, no_base, empty_base,
]  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.__name__)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_that_looks_whole(cause, run, tmp_path):
    words, expected = cause(run, tmp_path)
    before = sorted(path.name for path in run.iterdir())
    result = call("export", str(run), "--no-verify", *words)
    assert result.exit_code == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert re.search(expected, line), line
    assert sorted(path.name for path in run.iterdir()) == before


def test_of_a_folder_of_runs_the_newest_is_taken_also_two_levels_deep(run, tmp_path):
    (tmp_path / "deep" / "mine").mkdir(parents=True)
    shutil.move(run, tmp_path / "deep" / "mine" / "2026-01-01_00-00-00")
    result = call("export", str(tmp_path / "deep"), "--no-verify")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "deep" / "mine" / "2026-01-01_00-00-00" / "merged" / "config.json").is_file()
    assert "Without the proof it is not known which merge is better: merging onto NF4" in result.stdout


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    result = call("export", str(tmp_path / "nowhere"))
    assert result.exit_code == 2
    assert "nowhere" in result.stderr


def test_an_interrupted_gguf_leaves_no_empty_folder(run, monkeypatch):
    pytest.importorskip("gguf")

    from qlora_phi3.export import run as export

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "convert_to_gguf", stop)
    assert call("export", str(run), "--no-verify", "--format", "gguf").exit_code == 130
    assert not list(run.glob("gguf*"))
    assert (run / "merged" / "config.json").is_file()


def test_an_fp4_run_is_published_as_fp4(shop):
    """It was called NF4 in the table, the progress and the model card."""
    shop.write(quantization={"bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32"}, training={"max_steps": 1})
    assert shop.run().exit_code == 0
    (run,) = shop.runs()
    result = call("export", str(run), "--onto", "nf4")
    assert result.exit_code == 0, result.stderr
    card = (run / "merged-nf4" / "README.md").read_text(encoding="utf-8")
    for text in (result.stdout, card):
        assert "merged onto FP4" in text
        assert "NF4" not in text.replace("merged-nf4", "")
    report = read_json(run / "merged-nf4" / "export_report.json")
    assert (report["onto"], report["base"]["quantization"]["quant_type"]) == ("nf4", "fp4")
    without_proof = call("export", str(run), "--no-verify")
    assert "onto FP4" in without_proof.stdout


CUSTOM = """{% for m in messages %}
  {%- if m['role'] == 'user' -%}
    {{ '<|user|>' + m['content'] + '<|end|>' }}
  {%- else -%}
    {{ '<|assistant|>' }}
    {%- generation -%}
    {{ m['content'] + '<|end|>' }}
    {%- endgeneration -%}
  {%- endif -%}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


@pytest.mark.parametrize("named", ["auto", "phi4-mini", "custom.jinja", "the base's own, marked"])
def test_every_file_of_a_run_and_its_exports_has_the_template_that_was_trained(named, shop):
    """A run with another template than its base's saved the base's with the adapter."""
    gguf = pytest.importorskip("gguf")
    (shop.path / "custom.jinja").write_text(CUSTOM, encoding="utf-8")
    base, template = shop.base, named
    if named not in ("phi4-mini", "custom.jinja"):
        base, template = shutil.copytree(shop.base, shop.path / "own"), "auto"
        (base / "chat_template.jinja").write_text(CUSTOM if named != "auto" else hub_template("Phi-3-mini-4k-instruct"))
        settings = {**read_json(base / "tokenizer_config.json"), "chat_template": "another that nothing reads"}
        (base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    shop.write(model={"name": str(base)}, data={"chat_template": template}, training={"max_steps": 2, "save_steps": 2})
    assert shop.run().exit_code == 0
    (run,) = shop.runs()
    result = call("export", str(run), "--no-verify", "--format", "gguf")
    assert result.exit_code == 0, result.stderr
    folders = [run / "adapter", run / "merged"]
    assert not list((run / "checkpoints").rglob("*template*"))
    found = {(folder / "chat_template.jinja").read_text(encoding="utf-8") for folder in folders}
    found |= {read_json(folder / "tokenizer_config.json")["chat_template"] for folder in folders}
    (file,) = (run / "gguf-f16").glob("*.gguf")
    found.add(gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents())
    (saved,) = found
    assert "generation -" not in saved
    trained = choose_template(load_tokenizer(Model(name=str(base))), template)
    talk = [{"role": "user", "content": " one "}, {"role": "assistant", "content": "two"}]
    texts = {render_jinja_template([talk], chat_template=each, **trained.variables)[0][0] for each in (saved, trained.source)}
    assert len(texts) == 1


OLLAMA = """#!/bin/sh
echo "arguments: $@"
echo "$(dirname "$4") has"; head -1 "$4"
echo "trouble" >&2
exit CODE
"""


@pytest.fixture(scope="module")
def merged(exported, done, tmp_path_factory):
    """A run with its merged model."""
    run = Path(shutil.copytree(done, tmp_path_factory.mktemp("merged") / "run"))
    shutil.copytree(exported[1], run / "merged")
    return run


def put_ollama(folder, monkeypatch, *, code):
    """A stand-in for the program on an otherwise usual PATH."""
    folder.mkdir()
    (folder / "ollama").write_text(OLLAMA.replace("CODE", str(code)), encoding="utf-8")
    (folder / "ollama").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize("code", [0, 3])
def test_ollama_creates_the_model_from_the_modelfile_or_its_exit_code_is_one_line(merged, tmp_path, monkeypatch, capfd, code):
    pytest.importorskip("gguf")
    put_ollama(tmp_path / "bin", monkeypatch, code=code)
    out = tmp_path / "out"
    result = call("export", str(merged), "--ollama", "me/my-phi3:v1", "--quant", "q8_0", "--out", str(out))
    shown = capfd.readouterr()
    modelfile = out / "Modelfile"
    assert shown.out.splitlines() == [f"arguments: create me/my-phi3:v1 -f {modelfile}", f"{out} has", "FROM ./mine-q8_0.gguf"]
    assert shown.err == "trouble\n"
    assert (out / "mine-q8_0.gguf").is_file()
    assert "ollama create" not in result.stdout
    assert result.exit_code == (2 if code else 0)
    if code:
        error, hint = result.stderr.splitlines()[-1].split(". ", maxsplit=1)
        assert error == "Error: ollama create me/my-phi3:v1 ended with exit code 3"
        assert hint.endswith(f"ollama create me/my-phi3:v1 -f {modelfile}")
    else:
        assert result.stdout.splitlines()[-1] == "Chat with it: ollama run me/my-phi3:v1"


def test_without_ollama_the_lines_to_type_are_printed(merged, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    result = call("export", str(merged), "--ollama", "my-phi3", "--quant", "q8_0", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert sum("ollama create" in line for line in lines) == 1
    assert lines[-3].startswith("Ollama is not on this PATH")
    assert lines[-2:] == [f"ollama create my-phi3 -f {tmp_path / 'out' / 'Modelfile'}", "ollama run my-phi3"]


def test_ollamas_type_is_q4_k_m_and_without_its_quantizer_q8_0(merged, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr("qlora_phi3.export.gguf.tensors.PACKAGES", ())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("LLAMA_CPP_LIB", raising=False)
    result = call("export", str(merged), "--ollama", "my-phi3", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    assert "--quant q4_k_m needs llama.cpp's own quantizer" in result.stderr.splitlines()[0]
    assert "Taking q8_0, 1.7 times as large." in result.stderr.splitlines()[0]
    assert (tmp_path / "out" / "mine-q8_0.gguf").is_file()


def test_without_the_gguf_package_nothing_else_is_looked_for(merged, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = call("export", str(merged), "--ollama", "my-phi3")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "Error: A .gguf file needs the gguf package. Install it: pip install 'qlora-phi3[gguf]'"
    ]


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_a_gguf_of_the_same_run_is_created_in_ollama_without_being_made_again(merged, tmp_path, monkeypatch, capfd):
    pytest.importorskip("gguf")
    out = tmp_path / "out"
    words = ("export", str(merged), "--quant", "q8_0", "--out", str(out))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert call(*words, "--ollama", "a").exit_code == 0
    before = (out / "mine-q8_0.gguf").stat().st_mtime_ns
    put_ollama(tmp_path / "bin", monkeypatch, code=0)
    result = call(*words, "--ollama", "b")
    assert (result.exit_code, (out / "mine-q8_0.gguf").stat().st_mtime_ns) == (0, before), result.stderr
    assert result.stdout.splitlines()[0].startswith(f"{out / 'mine-q8_0.gguf'} was made before")
    assert f"arguments: create b -f {out / 'Modelfile'}" in capfd.readouterr().out
    assert call(*words, "--format", "gguf").exit_code == 2  # nothing is left to do, and nothing is replaced
    report = read_json(out / "export_report.json")
    (out / "export_report.json").write_text(json.dumps({**report, "key": "of another run"}), encoding="utf-8")
    assert call(*words, "--ollama", "b").exit_code == 2


@pytest.mark.parametrize("name", ["-f", "", "a b", "../x", "a/b/c", "x:", "héllo", "a..b", "x" * 81])
def test_a_name_that_ollama_refuses_is_refused_first(name):
    result = call("export", "nowhere", f"--ollama={name}")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert f"--ollama {name} is no name for Ollama." in result.stderr
