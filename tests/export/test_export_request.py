"""An export is checked before torch starts; above all, nothing that no export wrote is replaced."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from qlora_phi3.cli.export import describe_stop, export
from qlora_phi3.errors import ExportError
from qlora_phi3.export.request import DTYPES, SCORED, ExportOptions, find_reusable, make_request, staging_path


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
    report = {"status": "done", "name": "chat", "started": "2026-11-21T12:29:29+0000"}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    name_base(folder, str(base))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def name_base(run, name):
    (run / "base.json").write_text(json.dumps({"name": name}), encoding="utf-8")


def make_export(folder, *more, **told):
    folder.mkdir(parents=True, exist_ok=True)
    names = ["export_report.json", *more]
    for name in more:
        (folder / name).write_text("{}", encoding="utf-8")
    report = json.dumps({"files": {"written": names}, **told})
    (folder / "export_report.json").write_text(report, encoding="utf-8")
    return folder


def ask(run, **options):
    return make_request(run, ExportOptions(**options))


def test_usual_targets_lie_in_the_run_and_tell_what_was_asked_for(run):
    def targets(**asked):
        request = ask(run, **asked)
        return [path and path.relative_to(run).as_posix() for path in (request.target, request.gguf_file)]

    assert targets() == ["merged", None]
    assert targets(onto="nf4", dtype="bf16") == ["merged-nf4-bf16", None]
    assert targets(kind="gguf") == ["merged", "gguf-f16/chat-f16.gguf"]
    assert targets(kind="gguf", quant="Q4_K_M", dtype="fp32") == ["merged-fp32", "gguf-fp32-q4_k_m/chat-q4_k_m.gguf"]


@pytest.mark.parametrize(("dtype", "quant"), [("fp16", "f16"), ("bf16", "bf16"), ("fp32", "f32")])
def test_a_gguf_is_of_the_type_of_the_merged_model_where_none_is_asked_for(run, dtype, quant):
    request = ask(run, kind="gguf", dtype=dtype)
    assert (request.quant, request.gguf_file.name) == (quant, f"chat-{quant}.gguf")
    assert request.gguf_file.parent.name == f"gguf-{'' if dtype == 'fp16' else f'{dtype}-'}{request.quant}"
    other = ask(run, kind="gguf", dtype=dtype, quant="q8_0").gguf_file
    assert other.parent.name == ("gguf-q8_0" if dtype == "fp16" else f"gguf-{dtype}-q8_0")


def test_the_model_is_named_by_what_the_run_was_filed_under_wherever_it_lies_now(run, tmp_path):
    assert ask(run).name == "chat"
    moved = (tmp_path / "home" / "jane").joinpath("run")
    moved.parent.mkdir(parents=True)
    run.rename(moved)
    assert ask(moved).name == "chat"
    report = json.loads((moved / "report.json").read_text(encoding="utf-8"))
    del report["name"]
    (moved / "report.json").write_text(json.dumps(report), encoding="utf-8")
    assert ask(moved).name == "phi3-2026-11-21"


@pytest.mark.parametrize("kind", ["hf", "gguf"])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("inside", ["", "merged", "deep/down"])
def test_nothing_is_written_into_the_base_that_the_run_names(run, base, inside, force, kind):
    make_export(base)  # one can train on an export
    with pytest.raises(ExportError, match=r"--out .* is inside .*base,"):
        ask(run, out=base / inside, force=force, kind=kind)


def test_a_target_that_holds_the_base_is_not_replaced_but_may_take_a_gguf(run, base):
    make_export(base.parent, "config.json")
    with pytest.raises(ExportError, match=r"--out .*models .*base,"):
        ask(run, out=base.parent, force=True)
    assert ask(run, out=base.parent, force=True, kind="gguf").gguf_file == base.parent / "chat-f16.gguf"


def test_a_base_of_the_hub_is_safe_with_all_its_folder_in_the_cache(run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    name_base(run, "me/phi")
    for inside in ("snapshots/abc", "snapshots/abc/merged", "blobs", "."):
        with pytest.raises(ExportError, match="models--me--phi,"):
            ask(run, out=tmp_path / "hub" / "models--me--phi" / inside)
    assert ask(run, out=tmp_path / "hub" / "models--me--other")


def test_only_what_an_export_wrote_is_replaced_even_by_force(run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    assert ask(run, out=mine, force=True).target == mine
    make_export(mine, "model.safetensors")
    assert ask(run, out=mine, force=True).target == mine
    with pytest.raises(ExportError, match=r"mine exists\."):
        ask(run, out=mine)
    (mine / "thesis.txt").touch()
    for force in (False, True):
        with pytest.raises(ExportError, match=r"mine holds thesis\.txt"):
            ask(run, out=mine, force=force)
    (mine / "thesis.txt").unlink()
    (mine / "model.safetensors").unlink()
    (mine / "model.safetensors").mkdir()
    with pytest.raises(ExportError, match=r"mine holds model\.safetensors"):
        ask(run, out=mine, force=True)
    (mine / "export_report.json").unlink()
    with pytest.raises(ExportError, match=r"mine holds model\.safetensors"):
        ask(run, out=mine, force=True)


@pytest.mark.parametrize("others", [[], ["thesis.txt"]])
def test_the_report_of_a_gguf_is_no_licence_to_put_a_model_in_its_place(run, tmp_path, others):
    folder = make_export(tmp_path / "g2", "chat-f16.gguf", gguf={"file": "chat-f16.gguf"}, key=ask(run).key)
    for name in others:
        (folder / name).touch()
    told = r"g2 holds thesis\.txt" if others else "g2 holds a GGUF"
    for asked in ({"force": True}, {"force": True, "verify": False}, {"verify": False}):
        with pytest.raises(ExportError, match=told):
            ask(run, out=folder, **asked)


def test_what_lies_beside_a_model_whose_proof_failed_stays(run):
    failed = make_export(run / "merged.failed-proof", "model.safetensors")
    assert ask(run)
    (failed / "notes.txt").touch()
    with pytest.raises(ExportError, match=r"merged\.failed-proof holds notes\.txt"):
        ask(run)
    assert ask(run, verify=False)


def test_a_ggufs_model_is_replaced_by_force_only_where_an_export_wrote_all_of_it(run):
    merged = make_export(run / "merged", "model.safetensors")
    with pytest.raises(ExportError, match=r"merged, .* is not a merged model of this run"):
        ask(run, kind="gguf")
    assert ask(run, kind="gguf", force=True)
    (merged / "notes.txt").touch()
    with pytest.raises(ExportError, match=r"merged holds notes\.txt"):
        ask(run, kind="gguf", force=True)
    make_export(merged, "model.safetensors", key=ask(run, out=run / "else").key, proof={"rows": 1})
    for force in (False, True):
        assert ask(run, kind="gguf", force=force)  # it is as wanted, and only read


@pytest.fixture
def hub_calls(monkeypatch):
    """What the hub was asked, which takes every name and token."""
    import qlora_phi3.export.hub as hub

    calls = []
    monkeypatch.setattr(hub, "check_push", lambda name, *, private: calls.append((name, private)))
    return calls


def test_a_model_that_is_there_and_proved_may_be_pushed_as_it_is(run, hub_calls):
    merged = make_export(run / "merged", "model.safetensors", key=ask(run).key, proof={"rows": 1}, fault=None)
    request = ask(run, push="me/x", private=True)
    assert find_reusable(request)["proof"] == {"rows": 1}
    assert hub_calls == [("me/x", True)]
    assert find_reusable(ask(run, push="me/x", force=True)) is None
    (merged / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"merged exists and lacks model\.safetensors"):
        ask(run, push="me/x")


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"key": "another"}, "is not a merged model of this run"),
        ({"proof": None}, "was written with --no-verify"),
        ({"fault": "astray"}, "differs from what was trained"),
        ({"files": {}}, r"holds export_report\.json"),
    ],
)
def test_another_model_is_not_pushed_in_the_place_of_this_one(run, hub_calls, told, why):
    make_export(run / "merged", **{"key": ask(run, out=run / "else").key, "proof": {"rows": 1}, "fault": None, **told})
    with pytest.raises(ExportError, match=why):
        ask(run, push="me/x")


def test_a_hub_that_would_not_take_it_is_told_before_what_stands_at_the_target(run, monkeypatch):
    import qlora_phi3.export.hub as hub

    make_export(run / "merged")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ExportError, match="token"):
        ask(run, push="me/x")
    with pytest.raises(ExportError, match="--push justme"):
        ask(run, push="justme")


@pytest.mark.parametrize("out", [".", "..", "../work"])
def test_the_folder_one_works_in_stays(run, out):
    make_export(Path(out))
    with pytest.raises(ExportError, match="--out"):
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
    for force in (False, True):
        with pytest.raises(ExportError, match=f"{name} exists, and no export wrote it"):
            ask(run, **asked, force=force)
    make_export(asked["out"], name)
    with pytest.raises(ExportError, match=r"exists\."):
        ask(run, **asked)
    assert ask(run, **asked, force=True)


def test_another_type_of_the_same_model_joins_a_gguf_unasked(run, tmp_path):
    wrote = ("chat-q8_0.gguf", "README.md", "Modelfile")
    folder = make_export(tmp_path / "g", *wrote, gguf={"file": wrote[0]}, key=ask(run).key)
    assert ask(run, out=folder, kind="gguf", quant="q4_0")
    with pytest.raises(ExportError, match=r"chat-q8_0\.gguf exists\."):
        ask(run, out=folder, kind="gguf", quant="q8_0")
    make_export(folder, *wrote, gguf={"file": wrote[0]}, key="another's")
    with pytest.raises(ExportError, match=r"Modelfile exists\."):
        ask(run, out=folder, kind="gguf", quant="q4_0")
    assert ask(run, out=folder, kind="gguf", quant="q4_0", force=True)


@pytest.mark.parametrize("inside", ["merged", "merged/gguf", "adapter", ""])
def test_a_gguf_does_not_go_into_what_it_is_made_from(run, inside):
    with pytest.raises(ExportError, match="--out"):
        ask(run, out=run / inside, kind="gguf", force=True)


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "base.json", "recipe.toml"])
def test_a_part_of_the_run_that_is_missing_is_named(run, name):
    (run / name).unlink()
    with pytest.raises(ExportError, match=f"{name} is missing"):
        ask(run, verify=False)


def test_the_held_out_rows_are_needed_for_the_proof_alone(run):
    (run / "held_out.jsonl").unlink()
    with pytest.raises(ExportError, match=r"held_out\.jsonl is missing.* --no-verify"):
        ask(run)
    assert ask(run, verify=False)


def test_an_interrupted_export_says_what_is_used_again(run):
    request = ask(run, kind="gguf", quant="q8_0")
    anew = "Stopped: nothing was written, and the next export begins anew. Start again with the same command."
    draft = staging_path(request.target)
    draft.mkdir()
    for key, says in ((None, anew), ("of another model", anew), (request.key, "The proof is complete and is used again.")):
        if key is not None:
            (draft / SCORED).write_text(json.dumps({"key": f"{key} state auto cpu"}), encoding="utf-8")
        assert says in str(describe_stop(request))
    (draft / SCORED).write_text("[]", encoding="utf-8")
    assert str(describe_stop(request)) == anew
    make_export(request.target, key=request.key, proof={"rows": 1})
    assert "The merged model is used again" in str(describe_stop(request))


def test_the_command_line_offers_every_dtype_and_has_the_defaults_of_a_request():
    options = {option.name: option for option in export.params}
    assert list(options["dtype"].type.choices) == list(DTYPES)
    assert (options["dtype"].default, options["onto"].default) == (ExportOptions().dtype, ExportOptions().onto)
