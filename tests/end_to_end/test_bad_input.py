"""What a person can get wrong: one line on stderr, exit code 2, no traceback, nothing written."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny_model
from workshop import call, read_json, read_lines, write_chats

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ALPACA = {"instruction": "a", "output": "b"}


def write_rows(shop, *rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (shop.path / "rows.jsonl").write_text(text + "\n", encoding="utf-8")
    return {"data": {"train": "rows.jsonl"}}


def spoil_config(shop, **changes):
    folder = shop.copy_base()
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return {"model": {"name": "copy"}}


def without(shop, name):
    (shop.copy_base() / name).unlink()
    return {"model": {"name": "copy"}}


def config_that_is_no_json(shop):
    (shop.copy_base() / "config.json").write_text("{'model_type': 'phi3'}", encoding="utf-8")
    return {"model": {"name": "copy"}}


def weights_cut_short(shop):
    path = shop.copy_base() / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return {"model": {"name": "copy"}}


def weights_missing_a_tensor(shop):
    path = shop.copy_base() / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    return {"model": {"name": "copy"}}


def only_a_pickle(shop):
    folder = shop.copy_base()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return {"model": {"name": "copy"}}


def one_shard_missing(shop):
    folder = shop.copy_base()
    (folder / "model.safetensors").unlink()
    save_tiny_model(shop.path / "sharded", vocab_size=832)
    from transformers import Phi3ForCausalLM

    Phi3ForCausalLM.from_pretrained(shop.path / "sharded").save_pretrained(folder, max_shard_size="600KB")
    shutil.rmtree(shop.path / "sharded")
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()
    return {"model": {"name": "copy"}}


def a_folder_in_the_way(shop):
    (shop.path / "taken").write_text("mine", encoding="utf-8")
    return {"training": {"output_dir": "taken"}}


def a_file_for_the_recipe_name(shop):
    (shop.path / "runs").mkdir()
    (shop.path / "runs" / "mine").write_text("mine", encoding="utf-8")
    return {}


#: What is wrong -> (how it is made, as tables of the recipe; the places and values that the line must name).
CASES = {
    "unknown key": (lambda shop: {"lora": {"rnk": 4}}, ["mine.toml", "rnk"]),
    "wrong type": (lambda shop: {"training": {"learning_rate": "2e-4"}}, ["mine.toml", "learning_rate"]),
    "missing data file": (lambda shop: {"data": {"train": "nowhere.jsonl"}}, ["nowhere.jsonl"]),
    "missing evaluation file": (lambda shop: {"data": {"eval": "nowhere.jsonl"}}, ["nowhere.jsonl"]),
    "empty data file": (lambda shop: write_rows(shop, ""), ["rows.jsonl"]),
    "bad JSON line": (lambda shop: write_rows(shop, CHAT, CHAT, '{"messages": [}'), ["rows.jsonl:3"]),
    "rows of mixed shape": (lambda shop: write_rows(shop, CHAT, ALPACA), ["rows.jsonl:2", "rows.jsonl:1"]),
    "unknown role": (
        lambda shop: write_rows(shop, CHAT, {"messages": [{"role": "wizard", "content": "a"}, *CHAT["messages"]]}),
        ["rows.jsonl:2", "wizard"],
    ),
    "no supervised token": (
        lambda shop: write_rows(shop, {"messages": CHAT["messages"][:1]}, {"messages": CHAT["messages"][:1]}), ["2 rows"],
    ),
    "everything cut off": (lambda shop: write_rows(shop, {"instruction": "word " * 300, "output": "b"}), ["128"]),
    "nothing left to train on": (lambda shop: {"data": {"eval_size": 48}}, ["48"]),
    "no such template": (lambda shop: {"data": {"chat_template": "chatml"}}, ["chatml"]),
    "no such model directory": (lambda shop: {"model": {"name": "./nowhere"}}, ["./nowhere"]),
    "hub out of reach": (lambda shop: {"model": {"name": "owner/nowhere"}}, ["owner/nowhere"]),
    "no config": (lambda shop: without(shop, "config.json"), ["copy", "config.json"]),
    "config that is no JSON": (config_that_is_no_json, ["config.json"]),
    "config without a value": (lambda shop: spoil_config(shop, hidden_size=None), ["copy", "hidden_size"]),
    "not phi3": (lambda shop: spoil_config(shop, model_type="llama"), ["llama"]),
    "no tokenizer": (lambda shop: without(shop, "tokenizer.json"), ["copy"]),
    "weights cut short": (weights_cut_short, ["copy"]),
    "weights missing a tensor": (weights_missing_a_tensor, ["model.layers.1.mlp.down_proj.weight"]),
    "a shard missing": (one_shard_missing, ["copy", "model-0000"]),
    "only a pickle": (only_a_pickle, ["pytorch_model.bin"]),
    "no weights": (lambda shop: without(shop, "model.safetensors"), ["copy"]),
    "weights of another shape": (lambda shop: spoil_config(shop, intermediate_size=512), ["copy"]),
    "Llama's layer names": (lambda shop: {"lora": {"target_modules": ["q_proj", "o_proj"]}}, ["q_proj", "qkv_proj"]),
    "a pattern that matches nothing": (lambda shop: {"lora": {"target_modules": ".*q_proj"}}, ["q_proj"]),
    "the output head as a target": (lambda shop: {"lora": {"target_modules": ["lm_head"]}}, ["lm_head"]),
    "everything excluded": (lambda shop: {"lora": {"exclude_modules": ".*"}}, ["exclude_modules"]),
    "a module to save that is not there": (lambda shop: {"lora": {"modules_to_save": ["nose"]}}, ["nose"]),
    "a layer that is not there": (lambda shop: {"lora": {"layers_to_transform": [7]}}, ["layers_to_transform", "7"]),
    "a rank pattern that matches nothing": (lambda shop: {"lora": {"rank_pattern": {"nose": 4}}}, ["nose"]),
    "longer rows than positions": (lambda shop: {"training": {"max_length": 513}}, ["513", "512"]),
    "a tracker that is not installed": (lambda shop: {"training": {"report_to": "neptune"}}, ["neptune"]),
    "a scheduler's unknown setting": (lambda shop: {"training": {"lr_scheduler_kwargs": {"nose": 1}}}, ["nose"]),
    "output directory is a file": (a_folder_in_the_way, ["taken"]),
    "the recipe's directory is a file": (a_file_for_the_recipe_name, ["runs/mine"]),
}  # fmt: skip


def snapshot(folder):
    """Every file with its content, so that nothing new and nothing overwritten goes unseen."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(result, *words):
    """The one line on stderr, which holds all of these; exit code 2."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    for word in words:
        assert word in line
    return line


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_line_and_nothing_is_written(shop, case):
    make, words = CASES[case]
    shop.default_tables()
    shop.write(**make(shop))
    before = snapshot(shop.path)
    assert refused(shop.run(), *words)
    assert snapshot(shop.path) == before
    assert shop.runs() == [] or case == "the recipe's directory is a file"


def test_a_recipe_that_is_not_toml(shop):
    shop.write("[model\nname = 1")
    assert refused(shop.run(), "mine.toml", "line 1")


def test_every_problem_of_a_recipe_is_listed_at_once(shop):
    shop.write(lora={"rnk": 4}, training={"batch_size": "many", "warmup_ratio": 0.1})
    result = shop.run()
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 4


def test_debug_shows_the_traceback(shop):
    shop.write(lora={"rnk": 4})
    command = [sys.executable, "-m", "qlora_phi3", "run", "mine.toml", "--debug"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    assert "Traceback" in ended.stderr
    assert "RecipeError: mine.toml: " in ended.stderr


def test_an_output_folder_that_is_not_writable(shop, monkeypatch):
    """The operating system's refusal, as for a user without the rights; these tests may run as root, who has all."""
    make = Path.mkdir

    def refuse(path, *args, **kwargs):
        if "runs" in path.parts:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *args, **kwargs)

    shop.write()
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert refused(shop.run(), "runs/mine", "Permission denied")


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
#: The libraries' own words where the disk is full.
FULL_TO_TORCH = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nmore\nlines")


def fail_at(place, function, error):
    """A stand-in for `function` that raises once it is to write into `place`."""

    def write(*args, **kwargs):
        if any(place in str(part) for part in (*args, *kwargs.values()) if isinstance(part, str | os.PathLike)):
            raise error
        return function(*args, **kwargs)

    return write


@pytest.mark.parametrize(
    ("error", "words"),
    [(FULL, "No space left on device"), (FULL_TO_TORCH, "fewer bytes")],
    ids=["OSError", "RuntimeError"],
)
def test_a_full_disk_at_a_checkpoint_ends_the_run_and_leaves_the_earlier_ones(shop, monkeypatch, error, words):
    shop.write()
    monkeypatch.setattr(torch, "save", fail_at("checkpoint-6", torch.save, error))
    assert refused(shop.run(), "checkpoint-6", words)
    (folder,) = shop.runs()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert not (folder / "adapter").exists()
    report = read_json(folder / "report.json")
    assert (report["status"], "checkpoint-6" in report["error"]) == ("failed", True)
    monkeypatch.undo()
    monkeypatch.chdir(shop.path)
    assert shop.run("--resume").exit_code == 0
    assert read_json(folder / "report.json")["status"] == "done"


def test_a_full_disk_at_the_adapter_keeps_the_checkpoints_and_resuming_writes_it(shop, monkeypatch):
    import peft.peft_model

    shop.write(training={"save_steps": 10})
    writer = fail_at(".adapter.partial", peft.peft_model.safe_save_file, FULL)
    monkeypatch.setattr(peft.peft_model, "safe_save_file", writer)
    assert refused(shop.run(), "adapter", "No space left on device")
    (folder,) = shop.runs()
    assert sorted(path.name for path in folder.iterdir()) == [
        "base.json",
        "checkpoints",
        "held_out.jsonl",
        "metrics.jsonl",
        "recipe.toml",
        "report.html",
        "report.json",
    ]
    monkeypatch.undo()
    monkeypatch.chdir(shop.path)
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    steps = [record["step"] for record in read_lines(folder / "metrics.jsonl") if record["kind"] == "eval"]
    assert steps == [0, 5, 10]


def test_a_full_disk_at_the_metrics_ends_in_one_line(shop, monkeypatch):
    opened = Path.open

    def full(path, mode="r", *args, **kwargs):
        if mode == "a":
            raise FULL
        return opened(path, mode, *args, **kwargs)

    shop.write()
    monkeypatch.setattr(Path, "open", full)
    assert refused(shop.run(), "metrics.jsonl", "No space left on device")
    assert read_json(shop.runs()[0] / "report.json")["status"] == "failed"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_true_limit_on_file_size_is_reported_in_one_line(shop):
    """As a full disk: the operating system itself refuses the write (EFBIG), in a process of its own."""
    shop.write(lora={"r": 64})
    write_chats(shop.path / "chats.jsonl", rows=48)
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "from qlora_phi3.cli.main import main\n"
        "main(['run', 'mine.toml'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "checkpoint-2" in line
    assert "ulimit -f" in line or "Free disk space" in line  # safetensors passes the reason on as text alone
    (folder,) = shop.runs()
    assert list((folder / "checkpoints").iterdir()) == []
    assert read_json(folder / "report.json")["status"] == "failed"


def test_recipe_check_refuses_in_the_same_words(shop):
    shop.write(lora={"rnk": 4})
    assert refused(call("recipe", "check", "mine.toml")) == refused(shop.run())


def test_recipe_check_names_missing_files_and_otherwise_prints_the_recipe(shop):
    shop.write(data={"train": "nowhere.jsonl"}, model={"name": "./nowhere"})
    result = call("recipe", "check", "mine.toml")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 3)
    assert "./nowhere" in result.stderr
    assert "nowhere.jsonl" in result.stderr
    shop.write()
    result = call("recipe", "check", "mine.toml")
    assert (result.exit_code, len(result.stderr.splitlines())) == (0, 2)
    assert tomllib.loads(result.stdout)["lora"]["r"] == 4


def test_missing_files_are_reported_before_torch_is_imported(shop):
    shop.write(data={"train": "nowhere.jsonl"})
    code = (
        "import sys; from qlora_phi3.cli.main import main\n"
        "try: main(['run', 'mine.toml'])\n"
        "except SystemExit: print({'torch', 'transformers', 'rich'} & sys.modules.keys())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "set()\n"
    assert "nowhere.jsonl" in ended.stderr


def test_one_of_several_processes_that_nothing_connects_is_refused_before_anything_is_read(shop, monkeypatch):
    """Each would train its own model into its own run directory."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = snapshot(shop.path)
    assert refused(shop.run(recipe="no-such-recipe.toml"), "WORLD_SIZE=2")
    assert snapshot(shop.path) == before


def test_a_single_process_of_a_launcher_is_not_refused(shop, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "WORLD_SIZE" not in refused(shop.run(recipe="no-such-recipe.toml"), "no-such-recipe.toml")


def test_the_gpu_is_chosen_and_the_others_hidden_before_torch_is_imported(shop):
    shop.write(memory={"gpu": 1})
    code = (
        "import sys; from qlora_phi3.cli.main import main; from qlora_phi3.errors import DeviceError\n"
        "from qlora_phi3.hardware import gpu\n"
        "def hide(chosen, rank): print(chosen, {'torch', 'transformers'} & sys.modules.keys()); raise DeviceError('stop')\n"
        "gpu.choose_gpu, gpu.hide_other_gpus = (lambda wanted, rank: f'chosen {wanted}'), hide\n"
        "main(['run', 'mine.toml'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "chosen 1 set()\n")
    assert shop.runs() == []


def test_run_without_a_recipe_says_that_it_is_missing(shop):
    for words, says in (((), "Missing argument 'RECIPE'"), (("--resume",), "--resume RUN, or RECIPE --resume")):
        result = call("run", *words)
        assert result.exit_code == 2
        assert says in result.stderr


def test_data_given_as_the_recipe(shop):
    shop.write()
    assert refused(shop.run(recipe="chats.jsonl"), "chats.jsonl")


def test_a_missing_recipe_names_the_one_beside_it(shop):
    shop.write()
    assert refused(shop.run(recipe="mime.toml"), "mime.toml", "mine.toml")
