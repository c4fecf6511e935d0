"""What a run saves: checkpoints, the adapter with a tokenizer that gives the ids it was trained on, and the inputs of an export.

transformers writes a checkpoint file by file. A kill in between leaves one that fails when it is resumed, or, if only the
optimizer is missing, is resumed silently with a new optimizer. So a manifest of file sizes is written last, and only a checkpoint
that matches its manifest is resumed.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_phi3.adapters.base_files import TOKENIZER_FILES, copy_portable
from qlora_phi3.adapters.peft_io import ADAPTER_CONFIG
from qlora_phi3.data.prepare import PreparedData
from qlora_phi3.errors import RunError
from qlora_phi3.files import atomic_dir, atomic_write, disk_errors, flush_to_disk, read_json_object
from qlora_phi3.model.quantized import tensor_record
from qlora_phi3.recipe.schema import Model, Quantization
from qlora_phi3.runfolder import RunFolder

#: The manifest of a checkpoint.
MANIFEST = "sealed.json"
#: The hint where base.json cannot be read.
START_NEW = "Start a new run."
#: Rows whose ids are computed again with the copied tokenizer.
CHECKED_ROWS = 20
#: Held-out rows that are saved, and their tokens: enough for a held-out loss, little on the disk.
KEPT_ROWS, KEPT_TOKENS = 64, 16_384


def write_manifest(checkpoint: Path) -> None:
    """Flush every file of a checkpoint to the disk, then write their sizes."""
    flush_to_disk(checkpoint)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    atomic_write(checkpoint / MANIFEST, json.dumps(sizes, indent=2))


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has a manifest and all its files have the sizes of the manifest."""
    try:
        sizes: dict[str, int] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def find_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest complete checkpoint, or None; and the newer ones that are incomplete, the newest first."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    incomplete: list[Path] = []
    for path in sorted(numbered, key=step_of, reverse=True):
        if is_complete(path):
            return path, incomplete
        incomplete.append(path)
    return None, incomplete


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    base: Model,
    folder: RunFolder,
    *,
    sample: Sequence[Any],
    template: str | None = None,
) -> None:
    """Write adapter and tokenizer files; an earlier adapter stands until the new one is complete.

    Args:
        base: the recipe's [model]; its tokenizer files are copied from the commit that base.json records.
        sample: rows that were trained on; their text must give the same ids through the copied tokenizer.
        template: the chat template that was trained with, without marks; None for the base's own.

    Raises:
        RunError: the disk is full, or the copied tokenizer gives other ids.
    """
    source = Path(base.name)
    if not source.is_dir():
        revision = read_json_object(folder.base, RunError, START_NEW).get("revision") or base.revision
        source = Path(snapshot_download(base.name, revision=revision, allow_patterns=list(TOKENIZER_FILES)))
    hint = "{cause}, then go on with --resume; earlier checkpoints remain."
    with disk_errors(folder.adapter, hint=hint), atomic_dir(folder.adapter) as staging:
        model.save_pretrained(staging)
        (staging / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
        # PEFT 0.21 writes sets, whose order differs from process to process.
        config_file = staging / ADAPTER_CONFIG
        config = json.loads(config_file.read_text(encoding="utf-8"))
        for key in ("target_modules", "exclude_modules"):
            if isinstance(config.get(key), list):
                config[key].sort()
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        copy_portable(source, staging, template=template)
        copied = AutoTokenizer.from_pretrained(staging)
        for index in range(min(CHECKED_ROWS, len(sample))):
            text = tokenizer.decode(sample[index]["input_ids"])
            if copied(text).input_ids != tokenizer(text).input_ids:
                raise RunError(
                    f"The tokenizer copied to {staging} gives other ids than the one that was trained with.",
                    "Use the base's own tokenizer files with the adapter.",
                )


def record_base(
    model: PeftModel, folder: RunFolder, *, name: str, quantization: Quantization, compute_dtype: torch.dtype
) -> None:
    """Write base.json; where the run has one already, compare the loaded base with it.

    `name` is the recipe's; the weights had `compute_dtype` when they were quantized. Raises RunError where the base is another.
    """
    base = model.get_base_model()
    four_bit = {"quant_type": quantization.bnb_4bit_quant_type, "double_quant": quantization.bnb_4bit_use_double_quant}
    record = {
        "name": name,
        "revision": getattr(base.config, "_commit_hash", None),
        "dtype": str(compute_dtype).removeprefix("torch."),
        "quantization": four_bit if quantization.load_in_4bit else None,
        "device": base.device.type,
        "tensors": {tensor_name: tensor_record(parameter) for tensor_name, parameter in base_parameters(model)},
    }
    if not folder.base.is_file():
        atomic_write(folder.base, json.dumps(record, indent=1) + "\n")
        return
    was = read_json_object(folder.base, RunError, START_NEW)
    if (was["device"], was["dtype"]) != (record["device"], record["dtype"]):
        return  # other hardware may quantize to other bits
    # Of a 4-bit tensor compare the codes: the mean of its scales depends on the number of threads.
    before, now = (
        {key: tensor.get("codes", tensor.get("sha256")) for key, tensor in tensors.items()}
        for tensors in (was["tensors"], record["tensors"])
    )
    differing = [key for key in before if before[key] != now.get(key)]
    if differing:
        raise RunError(
            f"The base {name} is not the one {folder.path} started with: {len(differing)} of {len(before)} tensors differ, "
            f"first {differing[0]}.",
            "Restore the former weights, or start a new run.",
        )


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
    atomic_write(folder.held_out, "\n".join(lines) + "\n")
