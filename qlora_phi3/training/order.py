"""Which rows a step of a run was trained on: their order is drawn again, as the run drew it, from recipe and data."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer

from qlora_phi3.data.prepare import prepare_recipe_data, row_lengths
from qlora_phi3.errors import RunError
from qlora_phi3.execution import IGNORE_INDEX
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.recipe.schema import Training
from qlora_phi3.reporter import Progress
from qlora_phi3.runfolder import RunFolder, read_metrics
from qlora_phi3.training.report import row_name
from qlora_phi3.training.trainer import build_arguments


@dataclass(frozen=True, slots=True)
class TrainedRow:
    """A row of a step: its tokens, those that are learned, its text up to the first of them, and the learned text."""

    name: str
    tokens: int
    supervised: int
    prompt: str
    learned: str


def read_step_rows(folder: RunFolder, steps: Sequence[int], progress: Progress) -> dict[int, list[TrainedRow]]:
    """The rows of some steps, those with most learned tokens first, as they weigh most in the loss.

    Every step of metrics.jsonl must have the number of rows and tokens that it had. RunError where the data changed.
    """
    recipe, report = load_recipe(folder.recipe), folder.read_report()
    template = str(folder.chat_template) if folder.chat_template.is_file() else None
    data, tokenizer, _ = prepare_recipe_data(recipe, folder.path, progress, template)
    hint = "Put the data of the run back; or train again, and ask for the rows of that run."
    was, now = str(report.get("data", {}).get("sha256")), data.report.sha256
    if was != now:
        raise RunError(f"The data of {folder.path} changed since it was trained (sha256 {was[:12]} -> {now[:12]}).", hint)
    records = [record for record in read_metrics(folder.metrics) if record["kind"] == "train"]
    last_step = max([*steps, *(record["step"] for record in records)])
    order, lengths = _draw_order(folder, recipe.training, len(data.train), last_step), row_lengths(data.train)
    rows = {step: [data.train[index] for index in order[step - 1]] for step in steps}
    for record in records:
        step = record["step"]
        found = {"rows": len(order[step - 1]), "tokens": int(lengths[order[step - 1]].sum())}
        if step in rows:
            found["supervised_tokens"] = sum(row["supervised"] for row in rows[step])
        for key in [key for key in found if found[key] != record.get(key)]:
            raise RunError(f"Step {step} of {folder.path} had {record.get(key)} {key}, and the data now give {found[key]}.", hint)

    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = re.compile(rf"(?:{'|'.join(map(re.escape, added))})\s*")  # where a turn begins or ends

    def describe(row: Any) -> TrainedRow:
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE_INDEX]
        prompt = row["input_ids"][: next(at for at, label in enumerate(row["labels"]) if label != IGNORE_INDEX)]
        texts = (special.sub("\n", tokenizer.decode(ids)).strip() for ids in (prompt, learned))
        return TrainedRow(row_name(row, data.report.sources), row["length"], row["supervised"], *texts)

    return {step: sorted(map(describe, rows[step]), key=lambda row: -row.supervised) for step in steps}


def _draw_order(folder: RunFolder, training: Training, num_rows: int, last_step: int) -> list[list[int]]:
    """The indices of the rows of each step up to the last one, from the data loader of the class that trains."""
    cpu = torch.device("cpu")
    arguments = build_arguments(training, folder.checkpoints, device=cpu, fp16=False, optim="adamw_torch", evaluates=True)
    data = {"train_dataset": range(num_rows), "eval_dataset": ()}  # schedules that follow the evaluation need one
    trainer = Trainer(torch.nn.Linear(1, 1), arguments, data_collator=list, **data)
    loader, order = trainer.get_train_dataloader(), list[list[int]]()
    for epoch in range(-(-last_step // len(loader))):
        loader.set_epoch(epoch)
        order += loader
    return order
