"""The files next to the exported weights: the base's tokenizer and licence unchanged, two configs with changes, the model card.

The model card describes what was trained, on what, with which result, and what the export's proof found.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from jinja2 import Environment, PackageLoader
from yaml import YAMLError

from qlora_phi3.adapters import base_files
from qlora_phi3.errors import ExportError
from qlora_phi3.export.base import onto_label
from qlora_phi3.export.request import DTYPES
from qlora_phi3.family import is_hub_id
from qlora_phi3.files import read_json_object, sha256_file
from qlora_phi3.inference import EndOfTurn, stop_ids
from qlora_phi3.recipe.edit import format_toml
from qlora_phi3.recipe.load import as_list
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.units import format_count

#: The licence of a base applies to the export.
LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE.md", "NOTICE")
#: What the directory of a base may hold in addition to its weights.
COMPANIONS = (*base_files.TOKENIZER_FILES, *LICENCES)
#: Keys of a config.json that do not describe the export: auto_map names Python files of the hub's repository, which are not
#: copied and which transformers does not need; layer_types is not a key of phi3, but other programs read it for every model.
NOT_EXPORTED = ("auto_map", "quantization_config", "layer_types")
#: Tables of the recipe that the model card shows; [memory], paths and run names are private.
PUBLIC_TABLES = ("quantization", "lora", "training")
PRIVATE_KEYS = ("output_dir", "report_to", "run_name")


def write_companions(base: Path, target: Path, *, dtype: str, untied: bool, ending: EndOfTurn) -> dict[str, Any]:
    """Copy the base's tokenizer, licence and configs into a directory. ExportError where a config is not a JSON object.

    Args:
        dtype: of the exported weights, as torch names it.
        untied: the output head has weights of its own, and the base's had not.
        ending: its id is added to the stop ids of the generation config; its chat template replaces the base's.

    Returns:
        "copied": file -> SHA-256, of those that are the base's own bytes; "changed": file and what was changed, one line each.
    """
    copied: dict[str, str] = {}
    changed: list[str] = []
    for name, file in base_files.portable_files(base, template=ending.template).items():
        if name in (base_files.CONFIG, base_files.GENERATION_CONFIG):
            continue
        (target / name).write_bytes(file.content)
        changed += [f"{name}: {change}" for change in file.changes]
        if not file.changes:
            copied[name] = sha256_file(target / name)
    for name in LICENCES:
        if (base / name).is_file():
            copied[name] = sha256_file(base / name)
            shutil.copyfile(base / name, target / name)
    changed += _write_config(base / base_files.CONFIG, target / base_files.CONFIG, dtype=dtype, untied=untied)
    changed += _write_generation_config(base, target / base_files.GENERATION_CONFIG, ending.token_id)
    return {"copied": copied, "changed": changed}


def check_trained_with(base: Path, adapter: Path, template: str | None = None) -> None:
    """Raise ExportError for a tokenizer file of a base that is missing, additional, or another one than the run's copy.

    The two configs only have to exist: other versions write the same settings in another form, and `inputs` compares those. Runs
    of older versions have copies byte for byte. `template` is as in `portable_files`.
    """
    try:
        portable = base_files.portable_files(base, template=template)
    except ExportError:  # a file that cannot be read is not the one that was trained with
        portable = {}
    for name in base_files.TOKENIZER_FILES:
        file, trained = base / name, adapter / name
        if trained.is_file() and not file.is_file() and name not in portable:
            hint = f"Copy {trained} there, or give the right base with --base."
            raise ExportError(f"{file} is missing, and the run trained with it.", hint)
        if name in (base_files.CONFIG, base_files.GENERATION_CONFIG) or not file.is_file():
            continue
        if not trained.is_file():
            hint = "Move it away, or give the folder of the right base with --base."
            raise ExportError(f"{file} was not there when the run was trained.", hint)
        if trained.read_bytes() not in (file.read_bytes(), portable[name].content if portable else None):
            hint = "Put it back, or give the folder of the right base with --base."
            raise ExportError(f"{file} is not the file that was trained with, which is in {trained.parent}.", hint)


def _write_config(source: Path, target: Path, *, dtype: str, untied: bool) -> list[str]:
    """Write config.json as `portable_config`; the dtype of the weights, and what is no longer true, are changed."""
    stored = read_json_object(source, ExportError, base_files.DOWNLOAD_AGAIN)
    changes: dict[str, Any] = {"architectures": ["Phi3ForCausalLM"], "dtype": dtype, "torch_dtype": dtype}
    if untied and stored.get("tie_word_embeddings", False):
        changes["tie_word_embeddings"] = False
    config = {**base_files.portable_config(stored, source), **changes}
    config = {key: value for key, value in config.items() if key not in NOT_EXPORTED}
    target.write_bytes(base_files.to_json(config))
    return [f"{base_files.CONFIG}: {change}" for change in base_files.describe_changes(stored, config)]


def _write_generation_config(base: Path, target: Path, end_of_turn: int) -> list[str]:
    """Copy generation_config.json; its stop ids become a list that contains the end of a turn."""
    source = base / base_files.GENERATION_CONFIG
    config = read_json_object(source, ExportError, base_files.DOWNLOAD_AGAIN) if source.is_file() else {}
    model_config = read_json_object(base / base_files.CONFIG, ExportError, base_files.DOWNLOAD_AGAIN)
    stops = list(stop_ids(config.get("eos_token_id", model_config.get("eos_token_id")), end_of_turn))
    if config.get("eos_token_id") == stops:
        shutil.copyfile(source, target)
        return []
    target.write_text(json.dumps({**config, "eos_token_id": stops}, indent=2) + "\n", encoding="utf-8", newline="\n")
    return [f"{base_files.GENERATION_CONFIG}: eos_token_id = {stops}"]


def render_card(recipe: Recipe, run: Mapping[str, Any], export: Mapping[str, Any], *, base: Path) -> str:
    """README.md of an export: YAML front matter for the hub, then Markdown.

    Args:
        run: contents of the run's report.json.
        export: contents of export_report.json; for a GGUF its "gguf" names the file and its type.
        base: directory whose own model card states the licence: the base's, or for a GGUF the merged model's.
    """
    name, gguf, licence = public_name(recipe.model.name), export.get("gguf"), read_licence(base)
    sources = as_list(recipe.data.train)
    data = ModelCardData(
        base_model=name if "/" in name else None,
        license=licence,
        library_name=None if gguf else "transformers",
        pipeline_tag="text-generation",
        datasets=[source for source in sources if "/" in public_name(source)] or None,
        tags=["phi3", "qlora", "qlora-phi3", *(["gguf"] if gguf else [])],
    )
    tables = {}
    for table in PUBLIC_TABLES:
        keys = getattr(recipe, table).model_dump(mode="json", exclude_defaults=True, exclude_none=True)
        tables[table] = {key: format_toml(value) for key, value in keys.items() if key not in PRIVATE_KEYS}
    loader = PackageLoader("qlora_phi3", "pages")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.get_template("model_card.md.jinja").render(
        front_matter=data.to_yaml(),
        name=name,
        licence=licence,
        sources=[public_name(source) for source in sources],
        start=recipe.model.adapter and public_name(recipe.model.adapter),
        tables=tables,
        run={"eval_loss_before": None, "eval_loss_after": None, **run},
        export=export,
        gguf=gguf,
        proof=export.get("proof"),
        is_measured=gguf is None or is_measured(gguf["quant"], export["dtype"]),
        warning=other_bits_warning(export) if export.get("proof") else None,
        label=score_label,
        count=format_count,
    )


def public_name(name: str) -> str:
    """A hub id as it is; of a path only the last part, because the rest is private."""
    return name if is_hub_id(name) and not Path(name).exists() else Path(name).name


def read_licence(base: Path) -> str | None:
    """The licence in the front matter of the base's model card; None where it states none."""
    card = base / "README.md"
    try:
        licence = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (ValueError, YAMLError):
        return None
    return licence if isinstance(licence, str) else None


def score_label(name: str, report: Mapping[str, Any]) -> str:
    """What people read for the name of a score in the proof of an export_report.json."""
    quant = (report["base"].get("quantization") or {}).get("quant_type")
    if name == "live":
        return "base + adapter" if quant is None else "4-bit base + adapter"
    return "merged onto the original" if name == "original" else f"merged onto {onto_label(name, quant)}"


def is_measured(quant: str, dtype: str) -> bool:
    """Whether a GGUF of that type has the very weights of a merged model of that dtype, so that its figures apply."""
    return quant == "f32" or (dtype, quant) in DTYPES.values()


def other_bits_warning(report: Mapping[str, Any]) -> str | None:
    """The warning of an export_report.json whose 4-bit base does not have all bits that were trained on; None where it has."""
    compared = report["base"]["compared"]
    bits, codes, total = len(compared["differing"]), len(compared["codes_differing"]), compared["num_tensors"]
    if not bits:
        return None
    return (
        f"{bits} of {total} tensors of the base quantize to other bits here than where the run was trained ({codes} to other "
        f"codes), and the export is made of these ({report['status']}). A run with [model] save_quantized = true saves its own."
    )
