"""The files beside the weights: the base's own, byte for byte, and the two that must change."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_phi3.adapters.files import TOKENIZER_FILES, file_checksum
from qlora_phi3.errors import ExportError

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
#: Copied where the base has them: a licence goes with what is made of its work.
LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE.md", "NOTICE")
#: What a base's folder may hold beside its weights.
COMPANIONS = (*TOKENIZER_FILES, *LICENCE_FILES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """What was written beside the weights."""

    #: File -> SHA-256 of those that are the base's own bytes.
    copied: Mapping[str, str]
    #: File and what was changed in it, one line each.
    changed: tuple[str, ...]


def write_companions(
    base: Path, adapter: Path, target: Path, *, dtype: str, untied: bool, end_of_turn: int, template: str | None
) -> Companions:
    """Copy the base's tokenizer, licence and configs into a folder.

    Args:
        base: the base's folder.
        adapter: the run's, with copies of the tokenizer files that were trained with.
        dtype: of the exported weights, `float16` say.
        untied: the output head got weights of its own.
        end_of_turn: id that ends an assistant's turn; generation stops at it too.
        template: chat template that was trained with, where it is not the base's own.

    Raises:
        ExportError: a tokenizer file of the base is not the one that was trained with, or a config is no JSON object.
    """
    check_trained_with(base, adapter)
    copied = {}
    for name in COMPANIONS:
        if name in (CONFIG, GENERATION_CONFIG) or not (base / name).is_file():
            continue
        copied[name] = file_checksum(base / name)
        shutil.copyfile(base / name, target / name)
    changed = [
        *_write_config(base / CONFIG, target / CONFIG, dtype=dtype, untied=untied),
        *_write_generation_config(base, target / GENERATION_CONFIG, end_of_turn),
    ]
    if template is not None:
        (target / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")
        copied.pop("chat_template.jinja", None)
        changed.append("chat_template.jinja: the template that the recipe names")
    return Companions(copied=copied, changed=tuple(changed))


def check_trained_with(base: Path, adapter: Path) -> None:
    """Hold the tokenizer files of a base, none of which is parsed, against the run's copies; raises as `write_companions`."""
    for name in TOKENIZER_FILES:
        _check_file(base / name, adapter / name)


def _check_file(file: Path, trained: Path) -> None:
    """A tokenizer file must be the run's; of the configs only that it is there, as they may be written in other words."""
    if trained.is_file() and not file.is_file():
        raise ExportError(
            f"{file} is missing, and the run trained with one.",
            f"Copy {trained} there, or give the right base with --base.",
        )
    if file.name in (CONFIG, GENERATION_CONFIG) or not file.is_file():
        return
    cure = "give the folder of the right base with --base."
    if not trained.is_file():
        raise ExportError(f"{file} was not there when the run was trained.", f"Move it away, or {cure}")
    if file_checksum(trained) != file_checksum(file):
        raise ExportError(
            f"{file} is not the file that was trained with; that one lies in {trained.parent}.",
            f"Put it back, or {cure}",
        )


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; ExportError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}.", "Download the checkpoint again.") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} holds no JSON object.", "Download the checkpoint again.")
    return value


def _write_config(source: Path, target: Path, *, dtype: str, untied: bool) -> list[str]:
    """Copy config.json; the type of the weights, and what no longer holds, are changed."""
    config = read_object(source)
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
    changes: dict[str, Any] = {key: dtype for key in keys if config.get(key) != dtype}
    if untied and config.get("tie_word_embeddings", False):
        changes["tie_word_embeddings"] = False
    # auto_map names Python files of the hub's repository, which do not come along; transformers has the model itself.
    gone = [key for key in ("auto_map", "quantization_config") if key in config]
    config = {key: value for key, value in {**config, **changes}.items() if key not in gone}
    target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    return [
        *(f"{CONFIG}: {key} = {json.dumps(value)}" for key, value in changes.items()),
        *(f"{CONFIG}: {key} removed" for key in gone),
    ]


def _write_generation_config(base: Path, target: Path, end_of_turn: int) -> list[str]:
    """Copy generation_config.json; the ids it stops at become a list that has the end of a turn."""
    source = base / GENERATION_CONFIG
    config = read_object(source) if source.is_file() else {}
    stops = config.get("eos_token_id", read_object(base / CONFIG).get("eos_token_id"))
    stops = [] if stops is None else list(stops) if isinstance(stops, list) else [stops]
    if end_of_turn not in stops:
        stops.append(end_of_turn)
    if config.get("eos_token_id") == stops:
        shutil.copyfile(source, target)
        return []
    target.write_text(json.dumps({**config, "eos_token_id": stops}, indent=2) + "\n", encoding="utf-8", newline="\n")
    return [f"{GENERATION_CONFIG}: eos_token_id = {stops}"]
