"""Messages of `qlora-phi3 export`: the options, the run, the targets, the base, the merge, the disk and the hub."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from message_table import Message
from workshop import Workshop

from qlora_phi3.cli.export import create_in_ollama, export
from qlora_phi3.errors import ExportError, ProofError, RunError, UserError
from qlora_phi3.export import hub, run, writer
from qlora_phi3.export.base import BaseRecord, Compared, RecordedBase, read_record
from qlora_phi3.export.bundle import check_trained_with
from qlora_phi3.export.inputs import check_adapter, check_memory, find_base
from qlora_phi3.export.merge import _cast
from qlora_phi3.export.proof import choose_rows
from qlora_phi3.export.request import ExportOptions, Request, make_request
from qlora_phi3.model.weights import TensorInfo
from qlora_phi3.runfolder import RunFolder

EXPORT_REPORT = "export_report.json"


def put(path: Path, value: Any = "") -> Path:
    """A file and its directory; a value that is not text is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def finished_run(shop: Workshop, without: str = "", **report: Any) -> Path:
    """The files of a finished run, most of them empty."""
    folder, base = shop.path / "run", shop.path / "base"
    base.mkdir()
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "recipe.toml", "held_out.jsonl"):
        put(folder / name)
    put(folder / "base.json", {"name": str(base)})
    put(folder / "report.json", {"status": "done", "name": "chat", **report})
    if without:
        (folder / without).unlink()
    return folder


def request(shop: Workshop, **options: Any) -> Request:
    return make_request(finished_run(shop), ExportOptions(**options))


def exported(shop: Workshop, *files: str, **report: Any) -> Path:
    """A directory that an export wrote, with these files in it."""
    folder = shop.path / "out"
    for name in files:
        put(folder / name)
    put(folder / EXPORT_REPORT, {"files": {"written": [EXPORT_REPORT, *files]}, **report})
    return folder


def changed_adapter(shop: Workshop) -> None:
    folder = RunFolder(finished_run(shop))
    check_adapter(folder, {"adapter": {"adapter_config.json": "0" * 64}})


def other_weights(shop: Workshop) -> None:
    compared = {"lm_head.weight": Compared(differs=True, other_weights=True)}
    base: Any = SimpleNamespace(compared=compared, record=SimpleNamespace(tensors={"lm_head.weight": {}}))
    RecordedBase.check_weights(base, shop.path / "base")


def record_of(name: str, revision: str | None) -> BaseRecord:
    return BaseRecord(name=name, revision=revision, dtype=torch.float32, scheme=None, tensors={})


def tokenizer_file(shop: Workshop, base: str | None, adapter: str | None) -> None:
    for folder, text in (("base", base), ("adapter", adapter)):
        if text is not None:
            put(shop.path / folder / "tokenizer.json", text)
    check_trained_with(shop.path / "base", shop.path / "adapter")


def little_memory(shop: Workshop) -> None:
    info = {"w": TensorInfo((64, 64), torch.float32)}
    sources: Any = SimpleNamespace(base=SimpleNamespace(info=info), deltas=SimpleNamespace(targets={}))
    check_memory(2**20, sources)


def lock_twice(shop: Workshop) -> None:
    with writer.locked([shop.path]), writer.locked([shop.path]):
        pass


def publish(shop: Workshop, fault: str | None) -> None:
    draft, checked = shop.path / "draft", request(shop, dtype="bf16")
    draft.mkdir()
    if fault is None:
        put(checked.target / EXPORT_REPORT, {"files": {"written": [EXPORT_REPORT]}})
    error = run._publish(checked, draft, fault)
    if error is not None:
        raise error


def push_with(shop: Workshop, token: str | None, **calls: Any) -> None:
    with patch.object(hub, "get_token", lambda: token), patch.object(hub, "HfApi", lambda: SimpleNamespace(**calls)):
        hub.check_push("me/phi", private=True)


def no_network() -> None:
    raise OSError("Name or service not known")


def command(*words: str) -> Any:
    return export.main(["run", *words], standalone_mode=False)


def ollama_that(does: str) -> None:
    program = Path("ollama").absolute()
    program.write_text(f"#!/bin/sh\n{does}\n" if does else "", encoding="utf-8")
    program.chmod(0o755 if does else 0o644)
    with patch("shutil.which", lambda name: str(program)):
        create_in_ollama("x", Path("Modelfile"))


def row(name: str, trigger: Any, says: tuple[str, ...], hint: str, error: type[UserError] = ExportError) -> Message:
    return Message(name=f"export-{name}", trigger=trigger, error=error, exit_code=error.exit_code, says=says, hint=hint)


MESSAGES = [
    row(
        "quant-without-gguf",
        lambda shop: command("--quant", "q8_0", "--format", "hf"),
        ("--quant q8_0", "--format hf"),
        "Leave --format out",
        UserError,
    ),
    row("unknown-quant", lambda shop: request(shop, kind="gguf", quant="q4_k_x"), ("--quant 'q4_k_x'",), "q4_k_m"),
    row(
        "several-quants",
        lambda shop: command("--format", "gguf", "--quant", "f16", "--quant", "q8_0"),
        ("2 times", "f16, q8_0"),
        "one type",
        UserError,
    ),
    row("private-without-push", lambda shop: command("--private"), ("--private",), "--push user/name", UserError),
    row(
        "name-for-ollama",
        lambda shop: command("--ollama", "my phi"),
        ("--ollama my phi",),
        "--ollama my-phi3",
    ),
    row(
        "ollama-with-safetensors",
        lambda shop: command("--ollama", "my-phi3", "--format", "hf"),
        ("--ollama my-phi3", "--format hf"),
        "Leave --format out",
        UserError,
    ),
    row("ollama-fails", lambda shop: ollama_that("exit 3"), ("ollama create x", "exit code 3"), "ollama create x -f Modelfile"),
    row("ollama-no-program", lambda shop: ollama_that(""), ("ollama cannot be started",), "The export is complete"),
    row(
        "no-directory",
        lambda shop: make_request(shop.path / "nowhere", ExportOptions()),
        ("nowhere",),
        "train one",
        RunError,
    ),
    row(
        "run-not-finished",
        lambda shop: make_request(finished_run(shop, status="interrupted"), ExportOptions()),
        ("run", "interrupted"),
        "--resume",
    ),
    row(
        "run-incomplete",
        lambda shop: make_request(finished_run(shop, without="recipe.toml"), ExportOptions()),
        ("recipe.toml is missing",),
        "train again",
    ),
    row(
        "no-held-out-rows",
        lambda shop: make_request(finished_run(shop, without="held_out.jsonl"), ExportOptions()),
        ("held_out.jsonl is missing",),
        "--no-verify",
    ),
    row(
        "base-option-without-config",
        lambda shop: request(shop, base=shop.path / "other"),
        ("--base", "other", "config.json"),
        "base that was trained on",
    ),
    row("size-unreadable", lambda shop: request(shop, shard_size="big"), ("--shard-size", "'big'"), "5GB"),
    row("size-too-small", lambda shop: request(shop, max_ram="1KiB"), ("--max-ram 1KiB",), "1 MiB"),
    row(
        "target-in-source",
        lambda shop: request(shop, out=shop.path / "base" / "x"),
        ("--out", "base"),
        "another folder",
    ),
    row("target-holds-source", lambda shop: request(shop, out=shop.path), ("--out", "run"), "another folder"),
    row(
        "target-is-a-file",
        lambda shop: request(shop, out=put(shop.path / "file")),
        ("file is a file",),
        "Choose a folder",
    ),
    row("target-exists", lambda shop: request(shop, out=exported(shop)), ("out exists",), "--force"),
    row(
        "target-not-of-an-export",
        lambda shop: request(shop, out=put(shop.path / "out" / "thesis.txt").parent, force=True),
        ("out holds thesis.txt",),
        "--out another folder",
    ),
    row(
        "target-holds-a-gguf",
        lambda shop: request(shop, out=exported(shop, gguf={"file": "x.gguf"}), force=True),
        ("out holds a GGUF",),
        "--out another folder",
    ),
    row(
        "gguf-into-the-run",
        lambda shop: request(shop, out=shop.path / "run", kind="gguf"),
        ("--out", "the run itself"),
        "another folder",
    ),
    row(
        "gguf-next-to-a-model",
        lambda shop: request(shop, out=put(shop.path / "out" / "model.safetensors").parent, kind="gguf"),
        ("out holds a model",),
        "another folder",
    ),
    row(
        "gguf-not-of-an-export",
        lambda shop: request(shop, out=put(shop.path / "out" / "chat-f16.gguf").parent, kind="gguf"),
        ("chat-f16.gguf exists", "no export"),
        "--out another folder",
    ),
    row(
        "gguf-exists",
        lambda shop: request(shop, out=exported(shop, "chat-f16.gguf"), kind="gguf"),
        ("chat-f16.gguf exists",),
        "--force",
    ),
    row("adapter-changed", changed_adapter, ("adapter_config.json", "SHA-256"), "train again"),
    row("record-unreadable", lambda shop: read_record(put(shop.path / "base.json", "{")), ("base.json",), "this version"),
    row("other-base", other_weights, ("base", "1 of 1 tensors", "lm_head.weight"), "--base"),
    row(
        "base-directory-missing",
        lambda shop: find_base(record_of("/gone/base", None), lambda *_: None),
        ("/gone/base",),
        "--base",
    ),
    row(
        "base-not-on-this-computer",
        lambda shop: find_base(record_of("me/not-there", "abc123"), lambda *_: None),
        ("me/not-there", "abc123", "not on this computer"),
        "--base",
    ),
    row("tokenizer-file-missing", lambda shop: tokenizer_file(shop, None, "{}"), ("tokenizer.json is missing",), "Copy"),
    row("tokenizer-file-added", lambda shop: tokenizer_file(shop, "{}", None), ("tokenizer.json",), "Move it away"),
    row("tokenizer-file-changed", lambda shop: tokenizer_file(shop, "{}", "[]"), ("tokenizer.json",), "Put it back"),
    row("no-supervised-token", lambda shop: choose_rows([], 8), ("0 held-out rows",), "--no-verify"),
    row(
        "merge-not-finite",
        lambda shop: _cast("w", torch.tensor([float("nan")]), torch.float16),
        ("w of the merged model", "NaN"),
        "base's files",
    ),
    row(
        "merge-out-of-range",
        lambda shop: _cast("w", torch.tensor([70_000.0]), torch.float16),
        ("w of the merged model", "70000", "float16", "65504"),
        "--dtype bf16",
    ),
    row("memory-too-small", little_memory, ("--max-ram 1 MiB",), "Give that much"),
    row("disk-too-small", lambda shop: writer.check_disk(shop.path, 10**18), ("931322574.62 GiB",), "--out"),
    row("target-locked", lock_twice, ("Another export",), "--out another folder"),
    row("target-appeared", lambda shop: publish(shop, None), ("merged-bf16", "during the export"), "Move it away"),
    row("proof-failed", lambda shop: publish(shop, "w differs"), ("w differs",), "--dtype fp16", ProofError),
    row(
        "push-not-a-hub-id",
        lambda shop: hub.check_push("me/my model", private=False),
        ("--push me/my model",),
        "user/name",
    ),
    row("push-without-owner", lambda shop: hub.check_push("phi", private=False), ("--push phi",), "user/name"),
    row("push-without-token", lambda shop: push_with(shop, None), ("token",), "hf auth login"),
    row(
        "push-without-network",
        lambda shop: push_with(shop, "x", whoami=no_network),
        ("Name or service not known",),
        "--push",
    ),
    row(
        "push-private-to-public",
        lambda shop: push_with(shop, "x", whoami=lambda: None, repo_info=lambda repository: SimpleNamespace(private=False)),
        ("--private: me/phi",),
        "another name",
    ),
]
