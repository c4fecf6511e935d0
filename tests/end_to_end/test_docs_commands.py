"""Every command of the docs is run, in the order of the docs, on a tiny base with files of the names that they use."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hub_server import FakeHub
from test_docs import LINES, ROOT
from workshop import Workshop, write_chats

from qlora_phi3.cli.main import main
from qlora_phi3.export import hub
from qlora_phi3.recipe.load import load_recipe

#: Commands in the order in which they are run, each with the words that a tiny base needs. `RUN` is a finished run, `HUB` a hub
#: id, in the working directory the folder of the tiny base.
SETTINGS = "--rows 500 --max-new-tokens 256 --temperature 0.3 --top-k 50 --top-p 0.95"
RUN, HUB = "runs/chat/2026-11-21_10-00-00", "microsoft/Phi-3-mini-4k-instruct"
COMMANDS = {
    "qlora-phi3 doctor": "",
    "qlora-phi3 init my-chats.jsonl": "--yes --model base",
    "qlora-phi3 inspect my-chats.toml": "",
    "qlora-phi3 run my-chats.toml": "--set training.max_steps=4 --set training.report_samples=0",
    "qlora-phi3 chat my-chats --compare": "--max-new-tokens 4",
    "qlora-phi3 eval my-chats": "--max-new-tokens 4",
    "qlora-phi3 export my-chats --ollama my-phi3": "",
    "qlora-phi3 chat runs/chat/latest": "--max-new-tokens 4",
    "qlora-phi3 chat chat --compare": "--max-new-tokens 4",
    'qlora-phi3 chat chat --prompt "What is a mutex?"': "--max-new-tokens 4",
    "qlora-phi3 chat chat --temperature 0.7 --top-p 0.95 --seed 1": "--max-new-tokens 4",
    "qlora-phi3 eval chat --data test.jsonl": "--max-new-tokens 4",
    "qlora-phi3 eval chat --no-generate": "",
    f"qlora-phi3 eval chat {SETTINGS}": "--rows 2 --max-new-tokens 4",
    "qlora-phi3 eval runs/chat/latest": "--max-new-tokens 4",
    f"qlora-phi3 export {RUN}": "--force",
    f"qlora-phi3 export {RUN} --format gguf --quant q8_0": "",
    f"qlora-phi3 export {RUN} --push me/phi3-chat": "",
    "qlora-phi3 export runs/my/latest --ollama my-phi3": "",
    f"qlora-phi3 adapter convert {RUN} lora.pt --to loralib": "",
    f"qlora-phi3 adapter convert lora.pt my-adapter --to peft --alpha 16 --base {HUB}": "",
    f"qlora-phi3 adapter convert lora.pt my-adapter --to peft --alpha 16 --enable q,v --base {HUB}": "--force",
    "qlora-phi3 adapter convert my-adapter for-unsloth --to split": "",
    f"qlora-phi3 adapter convert unsloth-adapter my-adapter --to fused --base {HUB}": "--force",
    "qlora-phi3 recipe check my.toml": "",
    "qlora-phi3 recipe import axolotl.yml": "",
    "qlora-phi3 recipe import sample_finetune.py --out my.toml": "--out imported.toml",
    "qlora-phi3 vram-check chat --vram 8GB": "--set training.max_length=128",
    "qlora-phi3 vram-check my.toml --vram 12GB --processes 2": "",
    "qlora-phi3 vram-check recipes/chat.toml --vram 12GB": "--set training.max_length=128",
    "qlora-phi3 cache": "",
    "qlora-phi3 cache clean bases": "--yes",
}
#: Of the tensors of a loralib file for the tiny base, with groups q and v.
QV_SHAPES = {"A": (6, 128), "B": (192, 2)}
SYSTEM = "You name colours."
AXOLOTL = f"base_model: {HUB}\nadapter: qlora\nlora_r: 8\ndatasets:\n  - path: my-chats.jsonl\n    type: chat_template\n"
SAMPLE = f"""
training_config = {{"learning_rate": 5.0e-06, "num_train_epochs": 1}}
peft_config = {{"r": 8, "lora_alpha": 32}}
checkpoint_path = "{HUB}"
raw_dataset = load_dataset("HuggingFaceH4/ultrachat_200k")
"""


def test_every_command_of_the_docs_is_run():
    assert sorted(COMMANDS) == LINES


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    path = tmp_path_factory.mktemp("docs")
    for name in ("base", HUB):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).symlink_to(base)
    (path / "recipes").symlink_to(ROOT / "recipes")
    chats = write_chats(path / "my-chats.jsonl", rows=48)
    rows = [json.loads(line)["messages"] for line in chats.read_text(encoding="utf-8").splitlines()]
    system = [{"role": "system", "content": SYSTEM}]
    chats.write_text("".join(json.dumps({"messages": system + row}) + "\n" for row in rows), encoding="utf-8")
    write_chats(path / "test.jsonl", rows=4, seed=1)
    (path / "axolotl.yml").write_text(AXOLOTL, encoding="utf-8")
    (path / "sample_finetune.py").write_text(SAMPLE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        Workshop(path, base).write(name="my.toml")
        patch.setattr("qlora_phi3.cli.export.shutil.which", lambda _: None)
        patch.setattr(hub, "HfApi", FakeHub())
        patch.setattr(hub, "get_token", lambda: "hf_none")
        for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "LOCALAPPDATA"):
            patch.setenv(variable, str(path / "state"))
        yield path


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_docs_works(line, folder):
    if "--enable q,v" in line:  # a file of two groups of a MergedLinear, of rank 2
        shapes = {f"{layer}.self_attn.qkv_proj.lora_{end}": shape for layer in "01" for end, shape in QV_SHAPES.items()}
        torch.save({f"model.layers.{name}": torch.ones(shape) for name, shape in shapes.items()}, "lora.pt")
    if " unsloth-adapter " in line:
        shutil.copytree("for-unsloth", "unsloth-adapter")
    result = CliRunner().invoke(main, [*shlex.split(line)[1:], *shlex.split(COMMANDS[line])], input="What is red?\n/quit\n")
    assert result.exit_code == 0, result.output
    if line == "qlora-phi3 run my-chats.toml":  # the docs name two more runs
        (made,) = (path for path in Path("runs", "my-chats").iterdir())
        for copy in (RUN, "runs/my/1"):
            shutil.copytree(made, copy)
    if " --to loralib" in line:
        assert len(torch.load("lora.pt")) == 16  # A and B of four layers in two blocks
    if " my-chats --ollama" in line:
        (modelfile,) = Path("runs", "my-chats").glob("*/gguf-*/Modelfile")
        assert f'\nSYSTEM """{SYSTEM}"""\n' in modelfile.read_text(encoding="utf-8")
    if " --push " in line:
        assert hub.HfApi.options["repo_id"] == "me/phi3-chat"
        assert "model.safetensors" in hub.HfApi.options["allow_patterns"]
    if " import " in line:
        assert load_recipe(Path("axolotl.toml" if "axolotl" in line else "imported.toml")).lora.r == 8
