"""What is asked for is checked before torch starts: above all, that nothing is written over what is not an export."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from qlora_phi3.errors import ExportError
from qlora_phi3.export.request import make_request

USUAL = {
    "out": None,
    "kind": "hf",
    "quant": None,
    "dtype": "fp16",
    "onto": "auto",
    "base": None,
    "shard_size": "5GB",
    "max_ram": None,
    "verify": True,
    "force": False,
    "push": None,
    "private": False,
}


@pytest.fixture
def base(tmp_path):
    """The folder that the run names."""
    folder = tmp_path / "models" / "base"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def run(tmp_path, base, monkeypatch):
    """All files of a finished run, empty but for what is read here."""
    folder = tmp_path / "runs" / "chat" / "first"
    (folder / "adapter").mkdir(parents=True)
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "recipe.toml", "held_out.jsonl"):
        (folder / name).touch()
    (folder / "report.json").write_text(json.dumps({"status": "done"}), encoding="utf-8")
    name_base(folder, str(base))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def name_base(run, name):
    (run / "base.json").write_text(json.dumps({"name": name}), encoding="utf-8")


def make_export(folder, *more):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("export_report.json", *more):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def ask(run, **asked):
    return make_request(run, **{**USUAL, **asked})


def test_usual_targets_lie_in_the_run_and_tell_what_was_asked_for(run):
    def targets(**asked):
        request = ask(run, **asked)
        return [path and path.relative_to(run).as_posix() for path in (request.target, request.gguf_file)]

    assert targets() == ["merged", None]
    assert targets(onto="nf4", dtype="bf16") == ["merged-nf4-bf16", None]
    assert targets(kind="gguf") == ["merged", "gguf/chat-f16.gguf"]
    assert targets(kind="gguf", quant="Q4_K_M", dtype="fp32") == ["merged-fp32", "gguf-fp32-q4_k_m/chat-q4_k_m.gguf"]


@pytest.mark.parametrize("kind", ["hf", "gguf"])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("inside", ["", "merged", "deep/down"])
def test_nothing_is_written_into_the_base_that_the_run_names(run, base, inside, force, kind):
    make_export(base)  # one can train on an export
    with pytest.raises(ExportError, match=r"is inside .*base, which is read"):
        ask(run, out=base / inside, force=force, kind=kind)


def test_a_target_that_holds_the_base_is_not_replaced_but_may_take_a_gguf(run, base):
    make_export(base.parent, "config.json")
    with pytest.raises(ExportError, match=r"models holds .*base, which is read\. Choose a folder of its own"):
        ask(run, out=base.parent, force=True)
    assert ask(run, out=base.parent, force=True, kind="gguf").gguf_file == base.parent / "chat-f16.gguf"


def test_a_base_of_the_hub_is_safe_with_all_its_folder_in_the_cache(run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    name_base(run, "me/phi")
    for inside in ("snapshots/abc", "snapshots/abc/merged", "blobs", "."):
        with pytest.raises(ExportError, match="models--me--phi, which is read"):
            ask(run, out=tmp_path / "hub" / "models--me--phi" / inside)
    assert ask(run, out=tmp_path / "hub" / "models--me--other")


def test_only_an_export_is_replaced_even_by_force(run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    assert ask(run, out=mine, force=True).target == mine
    (mine / "mine.txt").touch()
    for force in (False, True):
        with pytest.raises(ExportError, match="mine exists and is no export, so that --force does not replace it"):
            ask(run, out=mine, force=force)
    make_export(mine)
    assert ask(run, out=mine, force=True).target == mine
    with pytest.raises(ExportError, match=r"mine exists\. Give --out another folder, or --force to replace it"):
        ask(run, out=mine)


@pytest.mark.parametrize("out", [".", "..", "../work"])
def test_the_folder_one_works_in_stays(run, out):
    make_export(Path(out))
    with pytest.raises(ExportError, match=r"is the folder you work in|holds"):
        ask(run, out=Path(out), force=True)


def test_a_gguf_may_go_where_one_works(run):
    assert ask(run, out=Path(), kind="gguf").gguf_file == Path.cwd() / "chat-f16.gguf"


def test_a_target_below_a_file_is_told(run, tmp_path):
    (tmp_path / "file").touch()
    for out in ("file", "file/x", "file/x/y"):
        with pytest.raises(ExportError, match="file is a file"):
            ask(run, out=tmp_path / out)


def test_a_link_stays_and_what_it_leads_to_is_written(run, tmp_path):
    export = make_export(tmp_path / "export")
    (tmp_path / "link").symlink_to(export)
    assert ask(run, out=tmp_path / "link", force=True).target == export
    (tmp_path / "gone").symlink_to(tmp_path / "not there")
    assert ask(run, out=tmp_path / "gone").target == tmp_path / "not there"


@pytest.mark.parametrize("name", ["README.md", "export_report.json", "Modelfile", "chat-q8_0.gguf"])
def test_what_stands_in_a_ggufs_folder_is_replaced_only_by_force(run, tmp_path, name):
    asked = {"out": tmp_path / "mine", "kind": "gguf", "quant": "q8_0"}
    asked["out"].mkdir()
    (asked["out"] / "secret.txt").touch()
    assert ask(run, **asked)
    (asked["out"] / name).touch()
    with pytest.raises(ExportError, match=rf"{name} exists\. Give --out another folder, or --force"):
        ask(run, **asked)
    assert ask(run, **asked, force=True)


@pytest.mark.parametrize("inside", ["merged", "merged/gguf", "adapter", ""])
def test_a_gguf_does_not_go_into_what_it_is_made_from(run, inside):
    with pytest.raises(ExportError, match=r"which is read|is the run itself"):
        ask(run, out=run / inside, kind="gguf", force=True)


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "base.json", "recipe.toml"])
def test_a_part_of_the_run_that_is_missing_is_named(run, name):
    (run / name).unlink()
    with pytest.raises(ExportError, match=f"{name} is missing"):
        ask(run, verify=False)


def test_the_held_out_rows_are_needed_for_the_proof_alone(run):
    (run / "held_out.jsonl").unlink()
    with pytest.raises(ExportError, match=r"held_out\.jsonl is missing, .* Export with --no-verify"):
        ask(run)
    assert ask(run, verify=False)
