"""What a run keeps for the export that comes later: which base it was trained on, to the bit, and rows to prove it with."""

import json
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qlora_phi3.checksum import tensor_record
from qlora_phi3.dataset.prepare import PreparedData
from qlora_phi3.dataset.template import ChatTemplate
from qlora_phi3.errors import RunError
from qlora_phi3.recipe.tables import Quantization
from qlora_phi3.runfolder import RunFolder, write_atomically

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
        write_atomically(folder.base, json.dumps(record, indent=1) + "\n")


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


def keep_template(template: ChatTemplate, folder: RunFolder) -> None:
    """Write a chat template that the recipe names by its file, which may be changed or gone when the run is exported."""
    if template.name.endswith(".jinja"):
        write_atomically(folder.chat_template, template.source)


def keep_held_out(data: PreparedData, folder: RunFolder) -> None:
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
    write_atomically(folder.held_out, "\n".join(lines) + "\n")
