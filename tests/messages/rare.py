"""Messages about states that are hard to reach: another program's fault, a signal, a file that is damaged meanwhile."""

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from message_table import Message
from peft import LoraConfig, get_peft_model
from torch import nn
from trained_run import leave_trained

from messages import adapters, export
from qlora_phi3.adapters.convert import _read_grouped, compare
from qlora_phi3.adapters.loralib import Spec, build_loralib_layers
from qlora_phi3.adapters.start import start_from
from qlora_phi3.cli.docs import docs
from qlora_phi3.cli.eval import eval as evaluate
from qlora_phi3.cli.export import export as export_command
from qlora_phi3.cli.vram_check import _write_fit
from qlora_phi3.data.sources import open_file
from qlora_phi3.data.tokenizer import load_tokenizer
from qlora_phi3.errors import DataError, ExportError, Interrupted, ModelError, RunError, UserError
from qlora_phi3.export import run as export_run
from qlora_phi3.export.base import RecordedBase
from qlora_phi3.export.gguf import tensors
from qlora_phi3.export.inputs import _read_rows, find_base
from qlora_phi3.family import read_architecture
from qlora_phi3.recipe.schema import Model
from qlora_phi3.runfolder import create_run_folder
from qlora_phi3.training.trainer import Phi3Trainer
from qlora_phi3.ui.live import open_console

X = adapters.X


def fused_and_split(shop):
    tensors = {
        f"model.layers.0.self_attn.{name}.lora_{part}.weight": matrix
        for name in ("qkv_proj", "q_proj")
        for part, matrix in (("A", torch.ones(4, 128)), ("B", torch.ones(256, 4)))
    }
    return _read_grouped(adapters.folder(shop, **tensors), adapters.LORA, None, fused=True)


def convolution_with_groups(_):
    pair = {f"{X}lora_A.weight": torch.ones(4, 8, 3, 3), f"{X}lora_B.weight": torch.ones(6, 4, 1, 1)}
    return build_loralib_layers(adapters.read_peft_pair(pair), Spec(enable={"": (True, False)}), "here")


def stopped(command, where, *words):
    with patch(where, side_effect=KeyboardInterrupt):
        command.main(list(words), standalone_mode=False)


def stop_an_evaluation(shop):
    leave_trained(shop.path / "a-run", shop.base)
    stopped(evaluate, "qlora_phi3.inference.load_for_inference", "a-run", "--no-generate")


def stop_an_export(shop):
    stopped(export_command, "qlora_phi3.export.run.export_run", str(export.finished_run(shop)))


def fit_on_a_full_disk(shop):
    check = SimpleNamespace(path=shop.write(), recipe=None, overrides=())
    with patch("qlora_phi3.memory.suggestions.write_fitted", side_effect=OSError(28, "No space left on device")):
        _write_fit(check, SimpleNamespace(fits=True), Path("fit.toml"))


def zero_bytes(shop):
    (shop.path / "a.jsonl").write_bytes(b'{"a": \x00 1}')
    return open_file("a.jsonl", shop.path)


def slow_tokenizer(_):
    with patch("transformers.AutoTokenizer.from_pretrained", return_value=SimpleNamespace(is_fast=False)):
        load_tokenizer(Model(name="me/slow"))


def quantizer_that_fails(shop):
    with (
        patch.object(tensors, "find_library", return_value=Path("libllama.so")),
        patch.object(tensors, "QUANTIZER_PROGRAM", "print('bad magic'); raise SystemExit(1)"),
    ):
        tensors.quantize_file(shop.path / "a.gguf", shop.path / "b.gguf", "q4_k_m", lambda *_: None)


def damaged_held_out_rows(shop):
    return _read_rows(export.put(shop.path / "held_out.jsonl", '{"input_ids": [1]}\n'))


def nf4_of_a_run_in_16_bit(shop):
    sources = SimpleNamespace(can_merge=lambda _: False)
    with patch.object(export_run, "open_sources", return_value=sources), patch.object(export_run.inputs, "check_memory"):
        export_run._export_merged(export.request(shop, onto="nf4"), shop.path / "draft", None)


def hub_answers(error):
    def trigger(_):
        with patch("huggingface_hub.hf_hub_download", side_effect=error):
            read_architecture("me/my-phi3")

    return trigger


def base_not_downloaded(_):
    with patch("qlora_phi3.export.inputs.snapshot_download", side_effect=OSError("the connection broke")):
        find_base(SimpleNamespace(name="me/my-phi3", revision="abc123"), lambda *_: None)


def export_out_of_memory(shop):
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with (
        patch.object(export_run, "_export_merged", side_effect=error),
        patch.object(export_run.inputs, "check_adapter"),
        pytest.MonkeyPatch.context() as changed,
    ):
        changed.setenv("XDG_STATE_HOME", str(shop.path / "state"))
        export_run.export_run(export.request(shop), MagicMock())


def stopped_before_a_checkpoint(_):
    with open_console(quiet=True) as view:
        view._total, view.step_number = 10, 3
        raise view.interruption(None)


#: The name of the directory of a run that starts at the second below, in any time zone.
SECOND = "2026-01-02_03-04-05"


def runs_of_one_second(shop):
    for number in range(1, 100):
        (shop.path / "runs" / "my" / (SECOND if number == 1 else f"{SECOND}-{number}")).mkdir(parents=True)
    create_run_folder(shop.path / "runs", "my", datetime(2026, 1, 2, 3, 4, 5).astimezone())


def run_folder_is_a_file(shop):
    export.put(shop.path / "runs" / "my" / SECOND)
    create_run_folder(shop.path / "runs", "my", datetime(2026, 1, 2, 3, 4, 5).astimezone())


def start(shop, rows=4, names="AB", **config):
    """Start the adapter of a layer `x`, of rank 4 and lora_alpha 16, from one with these matrices."""
    matrices = {"A": torch.ones(rows, 8), "B": torch.ones(6, rows)}
    place = adapters.folder(
        shop, {**adapters.LORA, "lora_alpha": 16, **config}, **{f"x.lora_{n}.weight": matrices[n] for n in names}
    )
    start_from(get_peft_model(nn.ModuleDict({"x": nn.Linear(8, 6)}), LoraConfig(r=4, lora_alpha=16, target_modules=["x"])), place)


def record_without_a_scheme(_):
    record = SimpleNamespace(is_quantized=lambda _: True, tensors={"x": {}}, dtype=torch.float16, scheme=None)
    with patch("qlora_phi3.export.base.is_stored_quantized", return_value=False):
        RecordedBase.quantized(SimpleNamespace(record=record, stored=None), "x")


def checkpoint_of_8_bit_adamw(_):
    trainer = Phi3Trainer.__new__(Phi3Trainer)
    trainer.args = SimpleNamespace(optim=SimpleNamespace(value="adamw_torch"))
    trainer.optimizer = SimpleNamespace(state={"a parameter": {"state1": 1}})
    with patch("transformers.Trainer._load_optimizer_and_scheduler"):
        trainer._load_optimizer_and_scheduler("checkpoint-4")


def row(name, trigger, *says, hint, error=ExportError, exit_code=2):
    return Message(name=name, trigger=trigger, error=error, exit_code=exit_code, says=says, hint=hint)


MESSAGES = [
    row(
        "adapter-config-that-peft-refuses",
        lambda shop: adapters.resolve(shop, adapters.TRAINED, layers_pattern="layers"),
        "adapter_config.json cannot be read",
        hint="Save the adapter again",
    ),
    row("fused-and-split-layers", fused_and_split, "has qkv_proj and q_proj", hint="No model has both"),
    row(
        "conversion-lost-a-tensor",
        lambda _: compare(adapters.read_peft_pair(), adapters.read_phi3()),
        "differ from those read",
        hint="Nothing was saved",
    ),
    row("loralib-groups-of-a-convolution", convolution_with_groups, "here: x is not linear", hint="--enable"),
    row("start-lacks-a-matrix", lambda shop: start(shop, names="A"), "x.lora_B.weight of shape none", hint="lora_alpha = 16"),
    row("start-of-another-shape", lambda shop: start(shop, rows=2), "of shape (2, 8), [lora] has (4, 8)", hint="r = 4"),
    row("start-scaled-otherwise", lambda shop: start(shop, lora_alpha=32), "by 8, [lora] by 4", hint="lora_alpha = 32"),
    row("record-without-quantization-type", record_without_a_scheme, "x as 4-bit", hint="Train the run again"),
    row(
        "checkpoint-of-another-optimizer",
        checkpoint_of_8_bit_adamw,
        "checkpoint-4",
        "adamw_torch",
        hint="where the run began",
        error=RunError,
    ),
    row("base-not-downloaded", base_not_downloaded, "me/my-phi3 at commit abc123", "connection broke", hint="--base"),
    row("export-out-of-memory", export_out_of_memory, "ran out in the export: CUDA out of memory", hint="--no-verify"),
    row(
        "run-stopped-before-a-checkpoint",
        stopped_before_a_checkpoint,
        "after step 3 of 10, before any checkpoint",
        hint="same command",
        error=Interrupted,
        exit_code=130,
    ),
    row(
        "docs-without-page",
        lambda _: docs.main(["dta"], standalone_mode=False),
        "no page 'dta'",
        hint="data",
        error=UserError,
    ),
    row("eval-stopped", stop_an_evaluation, "nothing was written", hint="same command", error=Interrupted, exit_code=130),
    row("export-stopped", stop_an_export, "begins anew", hint="same command", error=Interrupted, exit_code=130),
    row("fit-on-a-full-disk", fit_on_a_full_disk, "fit.toml cannot be written: No space", hint="another file", error=UserError),
    row("data-with-zero-bytes", zero_bytes, "a.jsonl", "zero bytes", hint="UTF-8", error=DataError),
    row("tokenizer-slow", slow_tokenizer, "me/slow has no fast tokenizer", hint="checkpoint that has one", error=ModelError),
    row("gguf-quantizer-fails", quantizer_that_fails, "a.gguf: bad magic", hint="llama-cpp"),
    row("held-out-rows-damaged", damaged_held_out_rows, "held_out.jsonl", "it has no 'labels'", hint="--no-verify"),
    row("onto-nf4-of-a-run-in-16-bit", nf4_of_a_run_in_16_bit, "--onto nf4", hint="Leave --onto out"),
    row(
        "model-is-a-gguf-on-the-hub",
        lambda _: read_architecture("me/phi3-gguf"),
        "me/phi3-gguf is a GGUF file",
        hint="unquantized original",
        error=ModelError,
    ),
    row(
        "model-name-the-hub-refuses",
        hub_answers(HFValidationError("bad")),
        "'me/my-phi3' is neither a folder nor a hub id",
        hint="owner/name",
        error=ModelError,
    ),
    row(
        "model-not-on-the-hub",
        hub_answers(HfHubHTTPError("404 Client Error", response=MagicMock())),
        "me/my-phi3",
        "404 Client Error",
        hint="hf auth login",
        error=ModelError,
    ),
    row("run-folder-99-of-a-second", runs_of_one_second, "99 runs of this second", hint="Try again", error=RunError),
    row("run-folder-is-a-file", run_folder_is_a_file, f"{SECOND} is a file", hint="output_dir", error=RunError),
]
