"""The files of a base that go along with an adapter or an export, in a form that all programs read alike.

transformers 5 writes settings under other names than those that transformers 4, vLLM and llama.cpp's converter read, and these
take a default for a name that they do not find: another model, without a message. So the files are copied byte for byte, except
for settings that have several names: those are written under each.
"""

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import isclose, log, sqrt
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from qlora_phi3.errors import ExportError, first_line
from qlora_phi3.family import normalize_config
from qlora_phi3.files import read_json_object

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_CONFIG, SPECIAL_TOKENS, TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
#: Copied wherever an adapter or an export goes. config.json is one of them: without it in the same directory transformers 5 reads
#: the tokenizer files as another class, which gives other ids.
TOKENIZER_FILES = (
    CONFIG, GENERATION_CONFIG, "tokenizer.json", "tokenizer.model", TEMPLATE, SPECIAL_TOKENS, TOKENIZER_CONFIG,
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
#: Hint for a base whose JSON files cannot be read.
DOWNLOAD_AGAIN = "Download the checkpoint again."
#: Tokens that a tokenizer has one of each.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: Classes for which transformers 4 does not read the post_processor of tokenizer.json.
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
#: A mark of the assistant's words in a chat template, which only training reads.
MARK = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True, slots=True)
class BaseFile:
    """The contents of a file, and one line for each change to the base's own, none for a copy byte for byte."""

    content: bytes
    changes: tuple[str, ...] = ()


def portable_files(folder: Path, *, template: str | None = None) -> dict[str, BaseFile]:
    """The `TOKENIZER_FILES` of a base, readable by transformers 4 and 5, vLLM and llama.cpp's converter alike. `template` is the
    chat template that was trained with; None for the base's own. ExportError where a JSON file cannot be read, or config.json is
    not that of a model.
    """
    files = {name: BaseFile((folder / name).read_bytes()) for name in TOKENIZER_FILES if (folder / name).is_file()}
    names = [name for name in (CONFIG, TOKENIZER_CONFIG, SPECIAL_TOKENS) if name in files]
    stored = {name: read_json_object(folder / name, ExportError, DOWNLOAD_AGAIN) for name in names}
    portable = deepcopy(stored)
    if CONFIG in stored:
        portable[CONFIG] = portable_config(stored[CONFIG], folder / CONFIG)
    _agree_on_tokens(portable.get(TOKENIZER_CONFIG, {}), portable.get(SPECIAL_TOKENS, {}))
    if portable.get(TOKENIZER_CONFIG, {}).get("tokenizer_class") in LLAMA_CLASSES and "tokenizer.json" in files:
        processor = read_json_object(folder / "tokenizer.json", ExportError, DOWNLOAD_AGAIN).get("post_processor")
        portable[TOKENIZER_CONFIG] |= _added_tokens(portable[TOKENIZER_CONFIG], processor)
    try:
        own = (folder / TEMPLATE).read_text(encoding="utf-8") if TEMPLATE in files else None
        saved = template or strip_marks(own or _default_template(stored.get(TOKENIZER_CONFIG, {})))
        if saved is not None and saved != own and (template or own):
            change = "the template that was trained with" if template else "marks of the assistant's words removed"
            files[TEMPLATE] = BaseFile(saved.encode(), (change,))
    except UnicodeError as error:
        raise ExportError(f"The chat template in {folder} is not UTF-8: {error}.", DOWNLOAD_AGAIN) from error
    if saved is not None and TOKENIZER_CONFIG in portable:  # some programs read only this one, and some only the other
        portable[TOKENIZER_CONFIG]["chat_template"] = saved
    for name, settings in portable.items():
        if changes := describe_changes(stored[name], settings):
            files[name] = BaseFile(to_json(settings), changes)
    return files


def copy_portable(folder: Path, target: Path, *, template: str | None = None) -> None:
    """Write `portable_files` into a directory."""
    for name, file in portable_files(folder, template=template).items():
        (target / name).write_bytes(file.content)


def to_json(settings: Mapping[str, Any]) -> bytes:
    """The contents of a JSON file."""
    return (json.dumps(settings, indent=2) + "\n").encode()


def describe_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """A line for each key that was set or removed."""
    values = {key: json.dumps(value, ensure_ascii=False) for key, value in after.items() if before.get(key, ...) != value}
    lines = [f"{key} = {text if len(text) <= 60 else text[:57] + '...'}" for key, text in values.items()]
    return (*lines, *(f"{key} removed" for key in before if key not in after))


def portable_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A config.json of a phi3 model with every setting under each of its names; another model's is not changed. ExportError where
    transformers refuses a value; `path` is for the message.

    - transformers 5.23 (`Phi3Config.convert_rope_params_to_dict`) has `rope_parameters`, but `rope_scaling` and `rope_theta` win.
    - transformers 4.57 (`configuration_phi3.py`) reads `rope_theta`, `partial_rotary_factor`, and `rope_scaling` with exactly
      `type`, `short_factor` and `long_factor`; it raises where there are more, and has defaults where they are missing.
    - vLLM 0.33 (`transformers_utils/config.py`, `patch_rope_parameters`) takes both through transformers; before, as 4.57.
    - llama.cpp's converter (`Phi3MiniModel`) reads `rope_theta` and `rope_scaling`, since 2026 `rope_parameters` first, and
      without a default `original_max_position_embeddings`, `num_key_value_heads` and `rms_norm_eps`.
    """
    if config.get("model_type") != "phi3":
        return dict(config)
    from transformers import Phi3Config

    try:
        model = Phi3Config(**deepcopy(normalize_config(config)))
        rope_keys = _rope_keys(model)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ExportError(f"{path} cannot be read: {first_line(error)}.", "Put the base's own back.") from error
    portable = dict(config)
    for key in Phi3Config.__annotations__:
        value = getattr(model, key)
        if portable.get(key) is None and value is not None and key != "rope_parameters":
            portable[key] = value
    portable |= rope_keys
    if (dtype := config.get("dtype") or config.get("torch_dtype")) is not None:
        portable |= {"dtype": dtype, "torch_dtype": dtype}
    return portable


def _rope_keys(model: Any) -> dict[str, Any]:
    """Both forms of the rotary embedding of a Phi3Config.

    A factor that the old form cannot hold is put into it all the same: transformers 4.57 refuses it, and computes nothing else.
    """
    rope = dict(model.rope_parameters)
    theta, share = rope["rope_theta"], rope["partial_rotary_factor"]
    both = {"rope_theta": theta, "partial_rotary_factor": share}
    if rope["rope_type"] != "longrope":
        return {**both, "rope_scaling": None, "rope_parameters": {"rope_type": rope["rope_type"], **both}}
    original = rope["original_max_position_embeddings"]
    ratio = model.max_position_embeddings / original
    attention = sqrt(1 + log(ratio) / log(original)) if ratio > 1 else 1.0
    factors = {"short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    for key, default in (("factor", ratio), ("attention_factor", attention)):
        if rope.get(key) is not None and not isclose(rope[key], default, rel_tol=1e-9):
            factors[key] = rope[key]
    both["original_max_position_embeddings"] = original
    return {
        **both,
        "rope_scaling": {"type": "longrope", **factors},
        "rope_parameters": {"rope_type": "longrope", **both, **factors},
    }


def _agree_on_tokens(config: dict[str, Any], special: dict[str, Any]) -> None:
    """Change tokenizer_config.json and special_tokens_map.json so that both name the same tokens, in words of transformers 4.

    transformers takes the named tokens from the second file where the first has no `added_tokens_decoder`; gguf always takes
    them from the first. In transformers 4 `extra_special_tokens` is a table, and the list of transformers 5 raises.
    """
    for settings in (config, special):
        if isinstance(extra := settings.get("extra_special_tokens"), list):
            del settings["extra_special_tokens"]
            settings["additional_special_tokens"] = extra or settings.get("additional_special_tokens") or []
    if config and config.get("tokenizer_class") in (None, "TokenizersBackend"):  # without one 4.57 takes Llama's for phi3
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    source, other = (config, special) if "added_tokens_decoder" in config else (special, config)
    for key in NAMED_TOKENS:
        if config and key in special and _text_of(source.get(key)) != _text_of(other.get(key)):
            other[key] = _text_of(source.get(key))


def _added_tokens(config: Mapping[str, Any], processor: Any) -> dict[str, bool]:
    """The keys of a Llama tokenizer that say whether it begins a text with bos and ends it with eos, where they are not right.

    transformers 5.23 does what the post_processor of tokenizer.json says; 4.57 builds one of these keys, by default with bos.
    """
    steps = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    parts = [part for step in steps for part in step.get("single", ())]
    first, last = (parts[0], parts[-1]) if parts else ({}, {})
    added = {"add_bos_token": "SpecialToken" in first, "add_eos_token": "SpecialToken" in last}
    usual = {"add_bos_token": True, "add_eos_token": False}
    return {key: value for key, value in added.items() if config.get(key, usual[key]) != value}


def _text_of(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _default_template(config: Mapping[str, Any]) -> str | None:
    """The chat template in a tokenizer_config.json; of several the one named default."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def strip_marks(template: str | None) -> str | None:
    """A chat template without `{% generation %}`, which not every program knows; it renders the same text.

    A comment stands in for a mark, because a mark removes the white space next to it.
    """
    return None if template is None else MARK.sub(r"{#\1 \2#}", template)
