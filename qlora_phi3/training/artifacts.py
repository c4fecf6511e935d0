"""The folder people take away: adapter, and a tokenizer that gives the very ids that were trained on.

What a run keeps for the export that comes later: which base it was trained on, to the bit, and rows to prove it with.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_phi3.adapters.peft_io import TOKENIZER_FILES
from qlora_phi3.data.prepare import PreparedData
from qlora_phi3.data.template import ChatTemplate
from qlora_phi3.errors import RunError
from qlora_phi3.files import atomic_write
from qlora_phi3.model.quantized import tensor_record
from qlora_phi3.recipe.schema import Quantization, Recipe
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.training.checkpoint import removed_on_error

#: Rows whose ids are made again with the copied tokenizer.
CHECKED_ROWS = 20


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    target: Path,
    *,
    sample: Sequence[dict[str, Any]],
) -> None:
    """Write adapter and tokenizer whole: into a neighbour first, checked, then renamed.

    Args:
        sample: trained rows; their text must give the same ids through the copied tokenizer.

    Raises:
        RunError: the disk is full, or the copied tokenizer gives other ids.
    """
    draft = target.with_name(f".{target.name}.partial")
    with removed_on_error(draft):
        shutil.rmtree(draft, ignore_errors=True)
        model.save_pretrained(draft)
        (draft / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
        _sort_names(draft / "adapter_config.json")
        for path in _tokenizer_files(recipe):
            shutil.copyfile(path, draft / path.name)
    _check_ids(tokenizer, draft, sample)
    with removed_on_error(draft):
        shutil.rmtree(target, ignore_errors=True)
        draft.replace(target)


def _sort_names(path: Path) -> None:
    """Order the names in adapter_config.json: PEFT 0.21 writes sets, whose order is another in every process."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _tokenizer_files(recipe: Recipe) -> list[Path]:
    folder = Path(recipe.model.name)
    if not folder.is_dir():
        folder = Path(
            snapshot_download(recipe.model.name, revision=recipe.model.revision, allow_patterns=list(TOKENIZER_FILES))
        )
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _check_ids(tokenizer: PreTrainedTokenizerBase, folder: Path, sample: Sequence[dict[str, Any]]) -> None:
    copied = AutoTokenizer.from_pretrained(folder)
    for index in range(min(CHECKED_ROWS, len(sample))):
        text = tokenizer.decode(sample[index]["input_ids"])
        if copied(text).input_ids != tokenizer(text).input_ids:
            raise RunError(
                f"The tokenizer copied to {folder} gives other ids than the one that was trained with.",
                "Keep the base's own tokenizer files with the adapter.",
            )


#: Held-out rows that are kept, and their tokens: enough for a held-out loss, little on the disk.
KEPT_ROWS, KEPT_TOKENS = 64, 16_384


def record_base(
    model: PeftModel, folder: RunFolder, *, name: str, quantization: Quantization, compute_dtype: torch.dtype
) -> None:
    """Write base.json; where the run had one, hold the loaded base against it.

    Args:
        compute_dtype: the dtype the weights had when they were quantized.

    Raises:
        RunError: the base is another than the one the run began with.
    """
    base = model.get_base_model()
    record = {
        "name": name,
        "revision": getattr(base.config, "_commit_hash", None),
        "dtype": str(compute_dtype).removeprefix("torch."),
        "quantization": _as_trained(quantization),
        "device": base.device.type,
        "tensors": {tensor_name: tensor_record(parameter) for tensor_name, parameter in base_parameters(model)},
    }
    if folder.base.is_file():
        _compare(json.loads(folder.base.read_text(encoding="utf-8")), record, folder)
    else:
        atomic_write(folder.base, json.dumps(record, indent=1) + "\n")


def base_parameters(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """The frozen parameters of the base under the names they have in its checkpoint; tied ones once."""
    for name, parameter in model.get_base_model().named_parameters():
        if not any(part in name for part in (".lora_", ".modules_to_save.")):
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter


def _as_trained(quantization: Quantization) -> dict[str, Any] | None:
    if not quantization.load_in_4bit:
        return None
    return {"quant_type": quantization.bnb_4bit_quant_type, "double_quant": quantization.bnb_4bit_use_double_quant}


def _compare(was: dict[str, Any], now: dict[str, Any], folder: RunFolder) -> None:
    """Other hardware may quantize to other bits; everything else that differs is another base."""
    if (was["device"], was["dtype"]) != (now["device"], now["dtype"]):
        return
    differing = [
        name for name, tensor in was["tensors"].items() if _bits(tensor) != _bits(now["tensors"].get(name, {}))
    ]
    if differing:
        raise RunError(
            f"The base {now['name']} is not the one {folder.path} began with: {len(differing)} of {len(was['tensors'])} "
            f"tensors differ, first {differing[0]}.",
            "Put the former weights back, or start a new run.",
        )


def _bits(tensor: dict[str, Any]) -> Any:
    """What the same weights give with any number of threads: of a 4-bit tensor the codes, as a mean depends on the threads."""
    return tensor.get("codes", tensor.get("sha256"))


def save_template(template: ChatTemplate, folder: RunFolder) -> None:
    """Write a chat template that the recipe names by its file, which may be changed or gone when the run is exported."""
    if template.name.endswith(".jinja"):
        atomic_write(folder.chat_template, template.source)


def save_held_out(data: PreparedData, folder: RunFolder) -> None:
    """Write rows for the proof of an export, spread over the held-out ones; training rows, marked, where none are held out."""
    rows = data.train if data.evaluation is None else data.evaluation
    step = max(1, len(rows) // KEPT_ROWS)
    lines: list[str] = []
    tokens = 0
    for index in range(0, len(rows), step):
        row = rows[index]
        tokens += len(row["input_ids"])
        if len(lines) == KEPT_ROWS or (lines and tokens > KEPT_TOKENS):
            break
        kept = {"input_ids": row["input_ids"], "labels": row["labels"]}
        lines.append(json.dumps(kept if data.evaluation is not None else {**kept, "trained": True}))
    atomic_write(folder.held_out, "\n".join(lines) + "\n")
