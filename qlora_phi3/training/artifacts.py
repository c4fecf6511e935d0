"""What a run saves: checkpoints, the adapter with a tokenizer that gives the ids it was trained on, and the inputs of an export.

transformers writes a checkpoint file by file. A kill in between leaves one that fails when it is resumed, or, if only the
optimizer is missing, is resumed silently with a new optimizer. So a manifest with the checksum of every file is written last, and
only a checkpoint that matches its manifest is resumed.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, TrainerState
from transformers.trainer_pt_utils import safe_globals

from qlora_phi3 import files
from qlora_phi3.adapters.base_files import TOKENIZER_FILES, copy_portable
from qlora_phi3.adapters.peft_io import ADAPTER_CONFIG
from qlora_phi3.data.prepare import PreparedData
from qlora_phi3.errors import RunError, first_line
from qlora_phi3.inference import template_to_save
from qlora_phi3.model.quantized import describe_device, tensor_record
from qlora_phi3.recipe.schema import Model, Quantization
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.training.prepare import RunContext

#: The manifest of a checkpoint.
MANIFEST = "sealed.json"
TRAINER_STATE = "trainer_state.json"
#: What a checkpoint must hold: the adapter, the optimizer, the schedule, the random numbers, the trainer's state, the metrics.
REQUIRED = (
    "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", TRAINER_STATE,
    "metrics.jsonl",
)  # fmt: skip
#: The hint where base.json cannot be read.
START_NEW = "Start a new run."
#: Rows whose ids are computed again with the copied tokenizer.
CHECKED_ROWS = 20
#: Held-out rows that are saved, and their tokens: enough for a held-out loss, little on the disk.
KEPT_ROWS, KEPT_TOKENS = 64, 16_384


def write_manifest(checkpoint: Path) -> None:
    """Flush every file of a checkpoint to the disk, then write their checksums."""
    files.flush_to_disk(checkpoint)
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
    checksums = {path.relative_to(checkpoint).as_posix(): files.sha256_file(path) for path in paths}
    files.atomic_write(checkpoint / MANIFEST, json.dumps(checksums, indent=2))
    files.flush_directory(checkpoint.parent)


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed: what is missing, was changed, or cannot be loaded; None where it can."""
    try:
        checksums = files.read_json_object(checkpoint / MANIFEST, RunError, "")
    except RunError as error:
        return error.message.rstrip(".") if (checkpoint / MANIFEST).exists() else f"it has no {MANIFEST}"
    for name in sorted({*REQUIRED, *checksums}):
        path = checkpoint / name
        if name not in checksums:
            return f"{MANIFEST} does not name {name}"
        if not path.is_file():
            return f"{name} is missing"
        try:
            if files.sha256_file(path) != checksums[name]:
                return f"the SHA-256 of {name} is not the one in {MANIFEST}"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    try:
        for name in REQUIRED:
            if name.endswith((".pt", ".pth")):
                with safe_globals():
                    torch.load(checkpoint / name, map_location="cpu", weights_only=True, mmap=True)
            elif name.endswith(".safetensors"):
                with safe_open(checkpoint / name, framework="pt") as file:
                    file.keys()
        step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE)).global_step
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, UnpicklingError, SafetensorError) as error:
        return f"{name} cannot be loaded: {first_line(error)}"
    return None if step == step_of(checkpoint) else f"{TRAINER_STATE} is of step {step}"


def find_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest complete checkpoint, or None; and why the newer ones cannot be used, the newest first."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    refused: dict[Path, str] = {}
    for path in sorted(numbered, key=step_of, reverse=True):
        reason = damage(path)
        if reason is None:
            return path, refused
        refused[path] = reason
    return None, refused


def set_aside(checkpoint: Path) -> Path | None:
    """Remove what a kill left of a checkpoint; give a damaged one a name that nothing reads or deletes, and return that."""
    if not (checkpoint / MANIFEST).exists():
        files.remove(checkpoint)
        return None
    target = checkpoint.with_name(f"damaged-{checkpoint.name}")
    with files.disk_errors(target):
        files.remove(target)
        checkpoint.replace(target)
        files.flush_directory(target.parent)
    return target


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def base_directory(base: Model, revision: str | None) -> Path:
    """The directory with the base's configuration and tokenizer files: its own, or that of its commit in the hub's cache."""
    if (source := Path(base.name)).is_dir():
        return source
    revision = revision or base.revision
    return Path(snapshot_download(base.name, revision=revision, allow_patterns=list(TOKENIZER_FILES)))


def save_adapter(model: PeftModel, context: RunContext, folder: RunFolder) -> None:
    """Write adapter and tokenizer files; an earlier adapter stands until the new one is complete. The tokenizer's files are those
    of the commit that base.json records. RunError where the disk is full, or they give other ids for rows that were trained on.
    """
    base, tokenizer, rows = context.recipe.model, context.tokenizer, context.data.train
    is_local = Path(base.name).is_dir()
    source = base_directory(base, None if is_local else files.read_json_object(folder.base, RunError, START_NEW).get("revision"))
    hint = "{cause}, then go on with --resume; earlier checkpoints remain."
    with files.disk_errors(folder.adapter, hint=hint), files.atomic_dir(folder.adapter) as staging:
        model.save_pretrained(staging)
        (staging / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
        # PEFT 0.21 writes sets, whose order differs from process to process.
        config_file = staging / ADAPTER_CONFIG
        config = json.loads(config_file.read_text(encoding="utf-8"))
        for key in ("target_modules", "exclude_modules"):
            if isinstance(config.get(key), list):
                config[key].sort()
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        template = template_to_save(tokenizer, context.template, context.recipe.data.chat_template)
        copy_portable(source, staging, template=template)
        copied = AutoTokenizer.from_pretrained(staging)
        for index in range(min(CHECKED_ROWS, len(rows))):
            text = tokenizer.decode(rows[index]["input_ids"])
            if copied(text).input_ids != tokenizer(text).input_ids:
                raise RunError(
                    f"The tokenizer copied to {staging} gives other ids than the one that was trained with.",
                    "Use the base's own tokenizer files with the adapter.",
                )


def input_checksums(context: RunContext, revision: str | None) -> dict[str, str]:
    """SHA-256 of what decides a run beside the recipe and the weights: the base's files, the template, the token ids."""
    folder = base_directory(context.recipe.model, revision)
    checksums = {name: files.sha256_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    config = {key: value for key, value in context.config.items() if key not in ("transformers_version", "_name_or_path")}
    texts = {"config.json": json.dumps(config, sort_keys=True), "the chat template": context.template.source}
    checksums |= {name: sha256(text.encode(errors="surrogatepass")).hexdigest() for name, text in texts.items()}
    digest = sha256(str(context.data.report.eval_indices).encode())
    for rows in (context.data.train, *([] if context.data.report.eval_indices else [context.data.evaluation])):
        # The table that both are drawn from, at 0.6 s for 100,000 rows of 300 tokens; drawn rows one by one take 13 s.
        for name in () if rows is None else ("input_ids", "labels"):
            for chunk in rows.data.column(name).chunks:
                digest.update(chunk.value_lengths().to_numpy())
                digest.update(chunk.flatten().to_numpy(zero_copy_only=False))
    return {**checksums, "the token ids": digest.hexdigest()}


def record_base(
    model: PeftModel,
    folder: RunFolder,
    *,
    name: str,
    quantization: Quantization,
    compute_dtype: torch.dtype,
    inputs: Mapping[str, str] | None = None,
) -> None:
    """Write base.json; where the run has one already, compare the loaded base with it. RunError where the base or
    an input is another.

    `name` is the recipe's, `compute_dtype` that of the weights when they were quantized, `inputs` are `input_checksums`.
    """
    base = model.get_base_model()
    four_bit = {"quant_type": quantization.bnb_4bit_quant_type, "double_quant": quantization.bnb_4bit_use_double_quant}
    record = {
        "name": name,
        "run_started": folder.training_began.isoformat(),  # tells its checkpoints from those of another run
        "revision": getattr(base.config, "_commit_hash", None),
        "dtype": str(compute_dtype).removeprefix("torch."),
        "quantization": four_bit if quantization.load_in_4bit else None,
        "device": base.device.type,
        "computed_on": describe_device(base.device),  # the same one quantizes to the same bits
        "inputs": dict(inputs or {}),
        "tensors": {tensor_name: tensor_record(parameter) for tensor_name, parameter in base_parameters(model)},
    }
    if not os.path.lexists(folder.base):
        files.atomic_write(folder.base, json.dumps(record, indent=1) + "\n")
        return
    was = files.read_json_object(folder.base, RunError, START_NEW)
    try:
        differing = _differing(was, record)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder.base} is damaged: {first_line(error)}.", START_NEW) from error
    if differing:
        raise RunError(
            f"The base {name} or the data are not those {folder.path} started with: {len(differing)} checksums differ, "
            f"first {differing[0]}.",
            "Restore the former files, or start a new run.",
        )


def _differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The inputs and tensors of a recorded base that differ from those of the loaded one."""
    inputs = [key for key in was.get("inputs", {}) if was["inputs"][key] != now["inputs"].get(key)]
    names = sorted(was["tensors"].keys() ^ now["tensors"].keys())
    same = [was[key] == now[key] for key in ("device", "dtype")]
    exact = all(same) and was.get("computed_on") == now["computed_on"]
    for name in was["tensors"].keys() & now["tensors"].keys():
        before, after = was["tensors"][name], now["tensors"][name]
        if ("codes" in before) != ("codes" in after):
            differs = True
        elif exact or "codes" not in before:
            # An unquantized tensor of another dtype has other bits.
            differs = all(same) and any(after.get(key) != value for key, value in before.items())
        else:
            # The mean of the scales depends on the number of threads, and other hardware may quantize to other bits.
            differs = not math.isclose(before["mean_absmax"], after["mean_absmax"], rel_tol=1e-5 if all(same) else 1e-2)
            differs |= all(same) and before["codes"] != after["codes"]
        if differs:
            names.append(name)
    return inputs + names


def base_parameters(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """The frozen parameters of the base under the names they have in its checkpoint; tied ones once."""
    for name, parameter in model.get_base_model().named_parameters():
        if not any(part in name for part in (".lora_", ".modules_to_save.")):
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter


def save_held_out(data: PreparedData, folder: RunFolder) -> None:
    """Write held-out rows for the proof of an export, spread over all of them; where none are held out, marked training rows."""
    rows = data.train if data.evaluation is None else data.evaluation
    step = max(1, len(rows) // KEPT_ROWS)
    lines, tokens = list[str](), 0
    for index in range(0, len(rows), step):
        row = rows[index]
        tokens += len(row["input_ids"])
        if len(lines) == KEPT_ROWS or (lines and tokens > KEPT_TOKENS):
            break
        mark = {} if data.evaluation is not None else {"trained": True}
        lines.append(json.dumps({"input_ids": row["input_ids"], "labels": row["labels"], **mark}))
    files.atomic_write(folder.held_out, "\n".join(lines) + "\n")
