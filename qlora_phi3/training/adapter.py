"""The folder people take away: adapter, and a tokenizer that gives the very ids that were trained on."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_phi3.adapters.files import TOKENIZER_FILES
from qlora_phi3.errors import RunError
from qlora_phi3.recipe.load import Recipe
from qlora_phi3.training.checkpoint import whole_or_gone

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
    with whole_or_gone(draft):
        shutil.rmtree(draft, ignore_errors=True)
        model.save_pretrained(draft)
        (draft / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
        _sort_names(draft / "adapter_config.json")
        for path in _tokenizer_files(recipe):
            shutil.copyfile(path, draft / path.name)
    _check_ids(tokenizer, draft, sample)
    with whole_or_gone(draft):
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
