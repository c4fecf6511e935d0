"""`qlora-phi3 adapter convert` as a person types it: what it prints, what it refuses, and what it leaves on the disk."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
import torch
from adapter_models import build_pair, save_trained
from safetensors.torch import load_file, save_file
from workshop import call

from qlora_phi3.adapters import peft_io
from qlora_phi3.adapters.delta import Adapter
from qlora_phi3.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
QKV = "model.layers.{}.self_attn.qkv_proj.lora_{}"


@pytest.fixture
def place(tmp_path, monkeypatch, base):
    """A folder to work in, with a loralib file, a fused and a split adapter; `base` has 4 heads and 2 key-value heads."""
    monkeypatch.chdir(tmp_path)
    fused, apart = build_pair(vocab_size=832)
    torch.manual_seed(0)
    shapes = {"A": (8, 128), "B": (192, 2)}  # rank 2; two groups of q, and v
    names = [(number, letter) for number in (0, 1) for letter in "AB"]
    tensors = {QKV.format(number, letter): torch.randn(shapes[letter]) for number, letter in names}
    tensors = {name: torch.randn(6, 128) if "_A" in name else tensor for name, tensor in tensors.items()}
    torch.save(tensors, tmp_path / "lora.pt")
    save_trained(fused, tmp_path / "fused", target_modules=["qkv_proj"])
    save_trained(apart, tmp_path / "split", target_modules=["q_proj", "v_proj"])
    return tmp_path


def refused(*words: str) -> str:
    """What is printed by a conversion that must fail with one line and exit code 2, and leave nothing behind."""
    before = sorted(Path.cwd().rglob("*"))
    result = call("adapter", "convert", *words)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert sorted(Path.cwd().rglob("*")) == before
    return result.stderr


def converted(*words: str) -> str:
    result = call("adapter", "convert", *words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("given", ["base", "./base/", "../{0}/base", "owner/base"])
def test_a_relative_base_is_stored_as_the_folder_it_is(place, base, given):
    """PEFT looked for it in whatever folder the adapter was loaded from."""
    folder = place / ("owner/base" if given == "owner/base" else "base")
    shutil.copytree(base, folder)
    given = given.format(place.name)

    def stored(name):
        return json.loads((place / name / "adapter_config.json").read_text())["base_model_name_or_path"]

    converted("lora.pt", "peft", "--to", "peft", "--alpha", "16", "--enable", "q,v", "--base", given)
    assert stored("peft") == str(folder)
    converted("peft", "apart", "--to", "split")
    converted("apart", "whole", "--to", "fused", "--base", given)
    assert stored("whole") == str(folder)
    config = json.loads((place / "apart" / "adapter_config.json").read_text())
    (place / "apart" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": given}))
    converted("apart", "again", "--to", "fused")
    assert stored("again") == str(folder)


def test_a_loralib_file_becomes_a_peft_adapter_and_again_a_loralib_file(place, base):
    shown = converted("lora.pt", "peft", "--to", "peft", "--alpha", "16", "--enable", "q,v", "--base", str(base))
    number = re.search(r"of 2 layers, as read and as written: largest relative difference (\S+) \(model.layers", shown)
    assert float(number[1]) < 1e-6
    assert "With alpha 16 for every layer, as given: the file holds none to check it against.\n" in shown
    assert shown.endswith("Written: peft\n")
    assert json.loads((place / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    shown = converted("peft", "back.pt", "--to", "loralib", "--enable", "q,v")
    assert (
        "qkv_proj: lora.MergedLinear(128, 256, r=2, lora_alpha=16, enable_lora=[True, True, False, True])   (2 of them)" in shown
    )
    first, second = (torch.load(place / name, weights_only=True) for name in ("lora.pt", "back.pt"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    converted("peft", "again.pt", "--to", "loralib", "--enable", "q,v")
    assert (place / "again.pt").read_bytes() == (place / "back.pt").read_bytes()


def test_alphas_given_by_name_are_printed_by_name(place):
    words = ("--alpha", "16", "--alpha", "layers.1.self_attn.qkv_proj=32", "--enable", "qkv_proj=1,1,0,1")
    shown = converted("lora.pt", "peft", "--to", "peft", *words)
    assert "With alpha 16 for every other layer, 32 for layers.1.self_attn.qkv_proj, as given:" in shown


def test_layers_of_one_name_that_are_not_alike_are_printed_by_their_full_names(place):
    model, _ = build_pair(vocab_size=832)
    targets = {"target_modules": ["qkv_proj", "down_proj"], "r": 4, "rank_pattern": {"layers.1.mlp.down_proj": 2}}
    save_trained(model, place / "mixed", **targets)
    lines = converted("mixed", "back.pt", "--to", "loralib").splitlines()
    alpha = json.loads((place / "mixed" / "adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"]
    sizes = {number: f"lora.Linear(256, 128, r={r}, lora_alpha={alpha})" for number, r in ((0, 4), (1, 2))}
    shown = [line.strip() for line in lines if "down_proj: " in line]
    assert shown == [f"model.layers.{number}.mlp.down_proj: {text}" for number, text in sizes.items()]
    assert sum("qkv_proj: " in line and line.endswith("(2 of them)") for line in lines) == 1


def test_the_adapter_of_a_real_run_travels_apart_and_back_with_its_tokenizer(shop):
    shop.write(training={"max_steps": 2, "eval_strategy": "no", "save_strategy": "no"})
    assert shop.run().exit_code == 0
    (run,) = shop.runs()
    (run / "adapter" / "training_args.bin").write_bytes(b"no adapter's")
    shown = converted(str(run), "apart", "--to", "split")
    assert f"It names no base: {shop.base} has q, k and v, and gate and up, as one layer each." in shown
    for number, name in enumerate((f"runs/{run.parent.name}/latest", run.parent.name)):
        assert f"Written: named-{number}" in converted(name, f"named-{number}", "--to", "split")
        assert (Path(f"named-{number}") / "adapter_model.safetensors").read_bytes() == (
            Path("apart") / "adapter_model.safetensors"
        ).read_bytes()
    names = {path.name for path in (run / "adapter").iterdir()} - {"training_args.bin"}
    assert {path.name for path in Path("apart").iterdir()} == names
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} < names
    assert (Path("apart") / "tokenizer.json").read_bytes() == (shop.base / "tokenizer.json").read_bytes()
    converted("apart", "again", "--to", "fused")  # the config.json next to it has the heads
    converted(str(run), "lora.pt", "--to", "loralib")
    converted("lora.pt", "third", "--to", "peft", "--alpha", "16", "--base", str(shop.base))
    first, *others = (
        load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", Path("again"), Path("third"))
    )
    assert all(other.keys() == first.keys() for other in others)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_a_target_is_replaced_only_with_force(place, base):
    command = ["split", "new", "--to", "fused", "--base", str(base)]
    converted(*command)
    (place / "new" / "adapter_model.safetensors").write_bytes(b"old")
    assert "--force" in refused(*command)
    converted(*command, "--force")
    assert load_file(place / "new" / "adapter_model.safetensors")
    assert sorted(path.name for path in place.iterdir()) == ["fused", "lora.pt", "new", "split"]
    assert "lora.pt" in refused("fused", "lora.pt", "--to", "loralib")


def test_places_where_something_else_would_be_lost_are_refused(place, base):
    options = ["--to", "fused", "--base", str(base), "--force"]
    refused("split", "split/inside", *options)
    refused("split", "split", *options)
    (place / "home").mkdir()
    (place / "home" / "letter.txt").write_text("dear")
    assert "home" in refused("split", "home", *options)
    (place / "home" / "adapter_config.json").write_text("{}")
    refused("fused", "lora.pt", "--to", "split", "--force")
    refused("fused", "split", "--to", "loralib", "--force")
    (place / "split").rename(place / "home" / "split")
    refused("home/split", "home", *options)
    refused("fused", ".", "--to", "split", "--force")


@pytest.mark.parametrize("command", ["split new --to fused --base BASE", "fused new --to loralib"])
def test_a_failed_write_leaves_the_old_adapter(place, base, monkeypatch, command):
    words = command.replace("BASE", str(base)).split()
    converted(*words)
    path = place / "new"
    before = (path / "adapter_model.safetensors" if path.is_dir() else path).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_phi3.files.flush_to_disk", full)
    assert "No space left on device" in refused(*words, "--force")
    assert (path / "adapter_model.safetensors" if path.is_dir() else path).read_bytes() == before


def test_what_differs_from_what_was_read_is_not_saved(place, base, monkeypatch):
    honest = peft_io.build_peft_tensors

    def slightly_other(adapter: Adapter) -> dict[str, torch.Tensor]:
        return {name: tensor * (1 + 3e-6) for name, tensor in honest(adapter).items()}

    monkeypatch.setattr(peft_io, "build_peft_tensors", slightly_other)
    assert "6.0e-06" in refused("split", "new", "--to", "fused", "--base", str(base))


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harm",)


def spoil(place: Path, kind: str) -> None:
    """Make bad.pt."""
    good, path = torch.load(place / "lora.pt", weights_only=True), place / "bad.pt"
    if kind == "pickle":
        torch.save({"x": Harmful()}, path)
    elif kind == "text":
        path.write_text("no adapter at all")
    elif kind == "cut":
        path.write_bytes((place / "lora.pt").read_bytes()[:3000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "list":
        torch.save([torch.ones(2)], path)
    elif kind == "nan":
        good[QKV.format(1, "B")][3, 1] = float("nan")
        torch.save(good, path)
    elif kind == "number":
        torch.save({**good, "r": 16}, path)
    elif kind == "integers":
        torch.save({**good, QKV.format(0, "A"): torch.ones(6, 128, dtype=torch.int8)}, path)


@pytest.mark.parametrize("kind", ["missing", "pickle", "text", "cut", "empty", "list", "nan", "number", "integers"])
def test_a_file_that_cannot_be_used_is_refused_in_one_line(place, kind):
    spoil(place, kind)
    assert "bad.pt" in refused("bad.pt", "new", "--to", "peft", "--alpha", "16")
    assert not (place / "harm").exists()


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("lora.pt new --to peft --enable qkv_proj=1,1,0,1", "lora_alpha"),
        ("lora.pt new --to peft --alpha 16", "--enable qkv_proj="),
        ("lora.pt new --to peft --alpha 16 --enable q,v", "--base"),
        ("lora.pt new --to peft --alpha 16 --enable 1,0,1", "--enable 1,0,1"),
        ("lora.pt new --to peft --alpha 0", "--alpha 0 "),
        ("lora.pt new --to peft --alpha much", "--alpha much "),
        ("lora.pt new --to peft --alpha nan", "--alpha nan "),
        ("lora.pt new --to peft --alpha 16 --conv2d 3", "--conv2d conv1=3"),
        ("lora.pt new --to peft --alpha x=16 --enable qkv_proj=1,1,0,1", "'x'"),
        ("lora.pt new --to fused", "lora.pt"),
        ("nothing new --to fused", "nothing"),
        ("fused new --to split --alpha 3", "--alpha has no meaning for --to split"),
        ("fused new.safetensors --to loralib", "new.safetensors"),
        ("fused new --to peft --alpha 3", "fused"),
        ("fused new --to split", "--base"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(place, words, value):
    assert value in refused(*words.split())


@pytest.mark.parametrize("groups", ["1,0,1,1,1", "1,0,1,1,0,0"])
def test_groups_that_do_not_fit_the_base_are_refused(place, base, groups):
    words = ["--alpha", "16", "--enable", f"qkv_proj={groups}", "--base", str(base)]
    assert "qkv_proj" in refused("lora.pt", "new", "--to", "peft", *words)


def test_an_embedding_that_the_file_does_not_have_may_be_named(place, base):
    words = ["--alpha", "16", "--enable", "q,v", "--embedding", "nobody", "--base", str(base)]
    assert "Written: new" in converted("lora.pt", "new", "--to", "peft", *words)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", None),
        ("adapter_model.safetensors", None),
        ("adapter_model.safetensors", b"\0" * 20),
    ],
)
def test_a_broken_peft_directory_is_refused_in_one_line(place, base, name, content):
    path = place / "split" / name
    path.unlink() if content is None else path.write_bytes(content)
    assert name in refused("split", "new", "--to", "fused", "--base", str(base))


def test_an_old_adapter_model_bin_is_read_without_running_it(place, base):
    tensors = load_file(place / "split" / "adapter_model.safetensors")
    (place / "split" / "adapter_model.safetensors").unlink()
    torch.save(tensors, place / "split" / "adapter_model.bin")
    converted("split", "new", "--to", "fused", "--base", str(base))
    torch.save(Harmful(), place / "split" / "adapter_model.bin")
    assert "adapter_model.bin" in refused("split", "other", "--to", "fused", "--base", str(base))
    assert not (place / "harm").exists()


def test_a_nan_in_a_peft_adapter_is_refused_by_name(place, base):
    path = place / "split" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, path)
    assert f"'{name}'" in refused("split", "new", "--to", "fused", "--base", str(base))


@pytest.mark.parametrize("line", re.findall(r"^qlora-phi3 .*", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
def test_a_command_of_the_page_is_one_the_program_takes(line):
    arguments, command = shlex.split(line)[1:], main
    while isinstance(command, click.Group):
        command = command.get_command(None, arguments.pop(0))
    command.make_context("page", arguments, resilient_parsing=False, **main.context_settings)


def test_the_python_of_the_page_runs(place, base, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    options = ("--alpha", "16", "--enable", "q,v", "--base", str(base))
    assert call("adapter", "convert", "lora.pt", "my-adapter", "--to", "peft", *options).exit_code == 0
    exec(code.replace("microsoft/Phi-3-mini-4k-instruct", base.as_posix()), {})
    assert "trainable params: 4,608 " in capsys.readouterr().out
