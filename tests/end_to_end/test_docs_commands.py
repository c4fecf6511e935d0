"""The commands of the docs are run, in the order of the docs, on a tiny base with files of the names that they use."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_docs import LINES
from workshop import Workshop, write_chats

from qlora_phi3.cli.main import main

#: Commands that are run, in this order, each with the words that a tiny base without a hub needs. `RUN` is a finished run.
SETTINGS = "--rows 500 --max-new-tokens 256 --temperature 0.3 --top-k 50 --top-p 0.95"
RUN = "runs/chat/2026-11-21_10-00-00"
COMMANDS = {
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
    "qlora-phi3 export runs/my/latest --ollama my-phi3": "",
    f"qlora-phi3 adapter convert {RUN} lora.pt --to loralib": "",
    "qlora-phi3 recipe check my.toml": "",
    "qlora-phi3 cache": "",
    "qlora-phi3 cache clean bases": "--yes",
}
#: Those that need the hub, a real model's memory simulated, or another program's adapter: tests of their own run the like.
NOT_RUN = (
    "adapter convert lora.pt",
    "adapter convert my-adapter",
    "adapter convert unsloth",
    "--push",
    "vram-check",
    "doctor",
    "import",
)


def test_every_command_of_the_docs_is_run_or_has_a_reason():
    others = [line for line in LINES if line not in COMMANDS]
    assert [line for line in others if not any(part in line for part in NOT_RUN)] == []
    assert [line for line in COMMANDS if line not in LINES] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    path = tmp_path_factory.mktemp("docs")
    (path / "base").symlink_to(base)
    write_chats(path / "my-chats.jsonl", rows=48)
    write_chats(path / "test.jsonl", rows=4, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        Workshop(path, base).write(name="my.toml")
        patch.setattr("qlora_phi3.cli.export.shutil.which", lambda _: None)
        for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "LOCALAPPDATA"):
            patch.setenv(variable, str(path / "state"))
        yield path


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_docs_works(line, folder):
    result = CliRunner().invoke(main, [*shlex.split(line)[1:], *shlex.split(COMMANDS[line])], input="What is red?\n/quit\n")
    assert result.exit_code == 0, result.output
    if line == "qlora-phi3 run my-chats.toml":  # the docs name two more runs
        (made,) = (path for path in Path("runs", "my-chats").iterdir())
        for copy in (RUN, "runs/my/1"):
            shutil.copytree(made, copy)
    if " --to loralib" in line:
        assert len(torch.load("lora.pt")) == 16  # A and B of four layers in two blocks
