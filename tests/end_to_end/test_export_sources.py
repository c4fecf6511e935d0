"""An export by the real command line of a base, a config or a template that is not, or not quite, what was trained on."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from workshop import Workshop, build_base, call, read_json

from qlora_phi3.data.template import TEMPLATE_DIR
from qlora_phi3.runfolder import RunFolder, write_report

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def done(tmp_path_factory, base):
    """A finished run of a few steps; read only."""
    shop = Workshop(tmp_path_factory.mktemp("exported"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.path)
        shop.write(training={"max_steps": 2, "eval_steps": 80, "save_steps": 80})
        result = shop.run()
    assert result.exit_code == 0, result.stderr
    (folder,) = shop.runs()
    return folder


@pytest.fixture
def run(done, tmp_path):
    """A copy of the run to export and to spoil."""
    return Path(shutil.copytree(done, tmp_path / "run"))


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def change_base(base, folder, change):
    """A copy of the base with other weights in place of some linear layer's."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN] = change(tensors[DOWN])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def drop_small(weight):
    """Weights below 0.4 of their block's largest become 0: 60 % of the codes change, and no block's scale."""
    blocks = weight.view(-1, 64)
    return torch.where(blocks.abs() < 0.4 * blocks.abs().amax(1, keepdim=True), 0, blocks).view_as(weight)


def turn_rows(weight):
    """Rows in another order: every code occurs as often as before."""
    return weight.flip(0).clone()


def spoil_weights(change):
    """Give every tensor of an adapter another value."""

    def spoil(adapter):
        path = adapter / "adapter_model.safetensors"
        tensors = {name: change(tensor).contiguous() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def edit_alpha(adapter):
    path = adapter / "adapter_config.json"
    write_json(path, {**read_json(path), "lora_alpha": 99})


def forget_adapter(run):
    """The run as an older version left it."""
    report = read_json(run / "report.json")
    write_report(RunFolder(run), {key: value for key, value in report.items() if key != "adapter"})


def test_a_run_notes_down_the_checksums_of_the_adapter_it_wrote(done):
    names = ("adapter_model.safetensors", "adapter_config.json")
    noted = {name: hashlib.sha256((done / "adapter" / name).read_bytes()).hexdigest() for name in names}
    assert read_json(done / "report.json")["adapter"] == noted


@pytest.mark.parametrize(
    ("spoil", "file"),
    [
        (spoil_weights(torch.zeros_like), "adapter_model.safetensors"),
        (spoil_weights(torch.randn_like), "adapter_model.safetensors"),
        (spoil_weights(torch.neg), "adapter_model.safetensors"),
        (edit_alpha, "adapter_config.json"),
    ],
    ids=["zeroed", "random", "signs flipped", "another alpha"],
)
def test_an_adapter_that_is_not_the_one_the_run_wrote_is_refused_by_the_file(run, spoil, file):
    spoil(run / "adapter")
    result = call("export", str(run))
    assert result.exit_code == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert str(run / "adapter" / file) in line
    assert f"qlora-phi3 run {run / 'recipe.toml'}" in line
    assert not (run / "merged").exists()


def test_the_checkpoint_that_holds_the_adapter_is_named_and_with_it_the_export_goes_on(run):
    (kept,) = (run / "checkpoints").glob("*/adapter_model.safetensors")
    spoil_weights(torch.neg)(run / "adapter")
    assert str(kept) in call("export", str(run), "--no-verify").stderr
    shutil.copyfile(kept, run / "adapter" / "adapter_model.safetensors")
    assert call("export", str(run), "--no-verify").exit_code == 0


def test_a_run_that_noted_nothing_of_its_adapter_is_exported_without_a_word(run):
    forget_adapter(run)
    edit_alpha(run / "adapter")
    result = call("export", str(run))
    assert result.exit_code == 0, result.stderr


def rename_token(base):
    path = base / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"content": "<|end|>"', '"content": "<|ende|>"'), encoding="utf-8")
    return path


def add_line(base):
    path = base / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8") + "\n{{ 'more' }}\n", encoding="utf-8")
    return path


def break_json(base):
    path = base / "tokenizer_config.json"
    path.write_text("{", encoding="utf-8")
    return path


@pytest.mark.parametrize("spoil", [rename_token, add_line, break_json])
def test_a_tokenizer_file_that_was_changed_is_named_before_it_is_parsed(run, base, tmp_path, spoil):
    path = spoil(Path(shutil.copytree(base, tmp_path / "other")))
    result = call("export", str(run), "--no-verify", "--base", str(path.parent))
    assert result.exit_code == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert str(path) in line
    assert str(run / "adapter") in line


@pytest.mark.parametrize("in_run", [True, False])
def test_the_hint_for_a_base_without_its_tokenizer_is_an_option_of_export(run, base, tmp_path, in_run):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    for folder in (other,) if in_run else (other, run / "adapter"):
        (folder / "tokenizer.json").unlink()
    result = call("export", str(run), "--no-verify", "--base", str(other))
    assert result.exit_code == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert str(other) in line
    assert "--base" in line
    assert "[model]" not in line


def test_leaving_out_the_proof_is_offered_only_where_it_needs_less_memory(run, monkeypatch):
    result = call("export", str(run), "--max-ram", "200MiB")
    assert "--no-verify" not in result.stderr
    monkeypatch.setattr("qlora_phi3.export.inputs.PROOF_BYTES", 2**30)
    assert "--no-verify" in call("export", str(run), "--max-ram", "200MiB").stderr


def flip_one_sign(weight):
    weight[0, 5] *= -1
    return weight


@pytest.mark.parametrize("change", [drop_small, turn_rows])
def test_other_weights_whose_scales_have_the_same_mean_are_another_base(run, base, tmp_path, change):
    other = change_base(base, tmp_path / "other", change)
    result = call("export", str(run), "--no-verify", "--base", str(other))
    assert result.exit_code == 2, result.stderr
    assert f"at least 1 of 15 tensors differ from the run's record, first {DOWN}" in result.stderr


@pytest.mark.parametrize("codes", [True, False], ids=["another code", "another scale"])
def test_weights_rounded_otherwise_are_reported_once_and_in_the_status_of_the_export(run, base, tmp_path, codes):
    command = ["export", str(run), "--onto", "nf4"]
    if codes:
        command += ["--base", str(change_base(base, tmp_path / "other", flip_one_sign))]
    else:
        record = read_json(run / "base.json")
        record["tensors"][DOWN]["sha256"] = "0" * 64
        write_json(run / "base.json", record)
    result = call(*command)
    assert result.exit_code == 0, result.stderr
    line = f"1 of 15 tensors of the base quantize to other bits here than where the run was trained ({int(codes)} to other codes)"
    assert (result.stdout + result.stderr).count("quantize to other bits") == 1
    assert line in result.stdout + result.stderr
    report, card = read_json(run / "merged-nf4" / "export_report.json"), (run / "merged-nf4" / "README.md")
    assert report["status"] == "proved_on_other_bits"
    assert line in card.read_text(encoding="utf-8")
    assert "save_quantized = true" in result.stdout + result.stderr


def test_a_run_that_noted_no_sample_of_its_codes_is_held_to_the_rest(run):
    record = read_json(run / "base.json")
    for tensor in record["tensors"].values():
        tensor.pop("sampled_codes", None)
    write_json(run / "base.json", record)
    assert call("export", str(run), "--no-verify").exit_code == 0


def change_config(base, folder, **changes):
    """A copy of the base with other values in its config.json."""
    shutil.copytree(base, folder)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rms_norm_eps": 0.1}, "rms_norm_eps is 0.1, and was 1e-05"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            "rope_parameters.rope_theta is 500.0, and was 10000.0",
        ),
        ({"sliding_window": 64}, "sliding_window is 64, and was None"),
    ],
)
def test_a_config_that_computes_otherwise_is_refused_by_the_key(run, base, tmp_path, changes, told):
    result = call("export", str(run), "--no-verify", "--base", str(change_config(base, tmp_path / "other", **changes)))
    assert result.exit_code == 2, result.stderr
    assert f"{told}." in result.stderr


def test_a_config_that_only_loads_otherwise_is_taken_and_so_is_a_run_that_kept_none(run, base, tmp_path):
    older = {
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "torch_dtype": "float16",
        "use_cache": False,
    }
    changed = change_config(base, tmp_path / "other", **older, auto_map={"AutoConfig": "x.y"}, transformers_version="4.40.2")
    assert call("export", str(run), "--no-verify", "--base", str(changed)).exit_code == 0
    (run / "adapter" / "config.json").unlink()
    assert call("export", str(run), "--no-verify", "--force").exit_code == 0


@pytest.mark.parametrize("later", ["edited", "gone"])
def test_a_chat_template_of_a_file_is_exported_as_it_was_trained_with(shop, later):
    marked = (TEMPLATE_DIR / "phi3.jinja").read_text(encoding="utf-8")
    (shop.path / "own.jinja").write_text(marked.replace("<|user|>", "<|user|> Q:"), encoding="utf-8")
    shop.write(data={"chat_template": "own.jinja"}, training={"max_steps": 1})
    assert shop.run().exit_code == 0
    (run,) = shop.runs()
    (shop.path / "own.jinja").unlink()
    if later == "edited":
        (shop.path / "own.jinja").write_text(marked.replace("<|user|>", "<|user|> another:"), encoding="utf-8")
    result = call("export", str(run), "--no-verify")
    assert result.exit_code == 0, result.stderr
    exported = AutoTokenizer.from_pretrained(run / "merged")
    asked = exported.apply_chat_template([{"role": "user", "content": "one"}], tokenize=False)
    assert "<|user|> Q:" in asked
    assert "generation" not in exported.chat_template.replace("add_generation_prompt", "")


def test_what_a_base_holds_beside_its_weights_is_left_out_and_told(shop):
    """A buffer, as old checkpoints have them: the proof read only what a model reads."""
    base, buffer = shop.copy_base(), "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, buffer: torch.ones(16)}, base / "model.safetensors", metadata={"format": "pt"})
    shop.write(model={"name": str(base)}, training={"max_steps": 1})
    assert shop.run().exit_code == 0
    (run,) = shop.runs()
    result = call("export", str(run))
    assert result.exit_code == 0, result.stderr
    assert f"1 tensor of the base, first {buffer}" in result.stdout
    assert load_file(run / "merged" / "model.safetensors").keys() == tensors.keys()


def test_the_report_says_no_path_of_this_computer(run, base):
    assert call("export", str(run), "--no-verify").exit_code == 0
    assert read_json(run / "merged" / "export_report.json")["base"]["name"] == base.name
    assert str(base.parent) not in (run / "merged" / "export_report.json").read_text(encoding="utf-8")


def test_with_the_4bit_base_that_the_run_kept_the_trained_bits_are_proved(shop, tmp_path):
    shop.write(model={"name": str(shop.base), "save_quantized": True}, training={"max_steps": 1})
    assert shop.run().exit_code == 0
    (run,) = shop.runs()
    other = change_base(shop.base, tmp_path / "other", flip_one_sign)
    result = call("export", str(run), "--onto", "nf4", "--base", str(other))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("4-bit base that the run saved: 1 tensor, of which 1 code came out otherwise") == 1
    assert "other bits" not in result.stdout + result.stderr
    assert read_json(run / "merged-nf4" / "export_report.json")["status"] == "proved"


def test_a_second_copy_of_a_tied_head_is_left_out(shop, tmp_path):
    base = build_base(tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(both, base / "model.safetensors", metadata={"format": "pt"})
    shop.write(model={"name": str(base)}, training={"max_steps": 1})
    assert shop.run().exit_code == 0
    (run,) = shop.runs()
    result = call("export", str(run))
    assert result.exit_code == 0, result.stderr
    assert load_file(run / "merged" / "model.safetensors").keys() == tensors.keys()


def test_a_base_that_lost_a_tensor_is_refused_by_its_name(run, base, tmp_path):
    other, norm = Path(shutil.copytree(base, tmp_path / "other")), "model.norm.weight"
    tensors = {name: tensor for name, tensor in load_file(base / "model.safetensors").items() if name != norm}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    result = call("export", str(run), "--no-verify", "--base", str(other))
    assert result.exit_code == 2, result.stderr
    assert f"{other} are incomplete: 1 tensor missing or of another shape or type, first {norm}." in result.stderr


def test_longropes_boundary_is_the_one_that_was_trained_with_also_where_transformers_ignores_it(shop, tmp_path):
    """Inside rope_scaling: the export had transformers' default, 4096."""
    base = build_base(tmp_path / "longrope")
    config = {key: value for key, value in read_json(base / "config.json").items() if key != "rope_parameters"}
    del config["original_max_position_embeddings"]
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    scaling = {"type": "longrope", **factors, "original_max_position_embeddings": 64}
    write_json(base / "config.json", {**config, "rope_scaling": scaling})
    shop.write(model={"name": str(base)}, training={"max_steps": 1})
    trained = shop.run()
    assert trained.exit_code == 0, trained.stderr
    (run,) = shop.runs()
    result = call("export", str(run))
    assert result.exit_code == 0, result.stderr
    assert read_json(run / "merged" / "config.json")["original_max_position_embeddings"] == 64


@pytest.mark.parametrize("recorded", [None, {"quant_type": "nf4", "double_quant": True}], ids=["not 4 bit", "as the recipe"])
@pytest.mark.parametrize(("quant_type", "double_quant"), [("fp4", True), ("nf4", False)])
def test_an_export_says_what_a_base_that_is_stored_in_4_bit_truly_is(shop, quant_type, double_quant, recorded):
    """Runs record what the recipe says: an FP4 base was called NF4, and where load_in_4bit = false no export was possible."""
    options = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double_quant}
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)
    base = shutil.copytree(shop.base, shop.path / "packed")
    AutoModelForCausalLM.from_pretrained(shop.base, quantization_config=quantized).save_pretrained(base)
    shop.write(model={"name": str(base)}, quantization=options, training={"max_steps": 2, "save_steps": 2})
    assert shop.run().exit_code == 0
    (run,) = shop.runs()
    (run / "base.json").write_text(json.dumps({**read_json(run / "base.json"), "quantization": recorded}), encoding="utf-8")
    for words in ((), ("--onto", "nf4")):
        result = call("export", str(run), "--no-verify", *words)
        assert result.exit_code == 0, result.stderr
        kind = f"{quant_type.upper()}, {'double' if double_quant else 'single'} quantization"
        assert f"The base is stored in 4 bit ({kind})" in result.output
    report = read_json(run / "merged" / "export_report.json")
    assert report["base"]["quantization"] == {"quant_type": quant_type, "double_quant": double_quant}
    assert f"merged onto {quant_type.upper()} weights" in (run / "merged" / "README.md").read_text(encoding="utf-8")
    assert "quantization_config" not in read_json(run / "merged" / "config.json")
    result = call("export", str(run), "--no-verify", "--onto", "original")
    assert result.exit_code == 2
    assert "in 4 bit only" in result.stderr
