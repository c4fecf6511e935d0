"""The files beside the weights: the base's own, byte for byte, and the two that must change.

The model card: what was trained, on what, how well, and what the export's proof says.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from qlora_phi3.adapters.peft_io import TOKENIZER_FILES
from qlora_phi3.errors import ExportError
from qlora_phi3.files import sha256_file
from qlora_phi3.inference import stop_ids
from qlora_phi3.recipe.load import as_list
from qlora_phi3.recipe.messages import format_toml
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.units import format_count

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
        copied[name] = sha256_file(base / name)
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
    hint = "give the folder of the right base with --base."
    if not trained.is_file():
        raise ExportError(f"{file} was not there when the run was trained.", f"Move it away, or {hint}")
    if sha256_file(trained) != sha256_file(file):
        raise ExportError(
            f"{file} is not the file that was trained with; that one lies in {trained.parent}.",
            f"Put it back, or {hint}",
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
    stops = list(stop_ids(stops, end_of_turn))
    if config.get("eos_token_id") == stops:
        shutil.copyfile(source, target)
        return []
    target.write_text(json.dumps({**config, "eos_token_id": stops}, indent=2) + "\n", encoding="utf-8", newline="\n")
    return [f"{GENERATION_CONFIG}: eos_token_id = {stops}"]


#: Tables whose keys say what was learned; [memory] and paths are nobody's business.
TOLD_TABLES = ("quantization", "lora", "training")


PRIVATE_KEYS = ("output_dir", "report_to", "run_name")


#: A GGUF type -> dtype of the merged model that it holds to the bit; f32 holds every one.
EXACT = {"f16": "float16", "bf16": "bfloat16"}


ROWS = {"live": "4-bit base and adapter", "nf4": "merged onto NF4", "original": "merged onto the original"}


def render_card(recipe: Recipe, run: Mapping[str, Any], export: Mapping[str, Any], *, base: Path) -> str:
    """README.md of an export: YAML front matter for the hub, then Markdown.

    Args:
        run: contents of the run's report.json.
        export: contents of export_report.json.
        base: the base's folder; its own card says the licence.
            For a GGUF the merged model's, whose card states it too; `export["gguf"]` then names the file and its quantization.
    """
    name = public_name(recipe.model.name)
    licence = read_licence(base)
    data = ModelCardData(
        base_model=name if "/" in name else None,
        license=licence,
        library_name=None if "gguf" in export else "transformers",
        pipeline_tag="text-generation",
        datasets=[source for source in as_list(recipe.data.train) if _is_hub_id(source)] or None,
        tags=["phi3", "qlora", "qlora-phi3", *(["gguf"] if "gguf" in export else [])],
    )
    parts = (
        f"# {name.rpartition('/')[2]}, fine-tuned with qlora-phi3",
        _about_base(name, export, licence),
        _about_data(recipe, run),
        _about_result(recipe, run),
        _about_proof(run, export),
        _about_recipe(recipe),
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def is_measured(quant: str, dtype: str) -> bool:
    """Whether what was measured of a merged model of that dtype holds for a GGUF of that type: it has the same weights."""
    return quant == "f32" or EXACT.get(quant) == dtype


def public_name(name: str) -> str:
    """A hub id as it is; of a folder the last part only, as the rest is nobody's business."""
    return name if _is_hub_id(name) else Path(name).name


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def read_licence(base: Path) -> str | None:
    """The licence in the front matter of the base's own card; None where it has none."""
    card = base / "README.md"
    if not card.is_file():
        return None
    try:
        licence = (metadata_load(card) or {}).get("license")
    except (ValueError, YAMLError):
        return None
    return licence if isinstance(licence, str) else None


def _about_base(name: str, export: Mapping[str, Any], licence: str | None) -> str:
    base = export["base"]
    at = f" at commit `{base['revision']}`" if base.get("revision") else ""
    under = (
        f"Its licence, `{licence}`, holds for this model too."
        if licence
        else "Its licence holds for this model too; its folder does not state it."
    )
    onto = "the 4-bit weights it was trained on" if export["onto"] == "nf4" else "the base's own weights"
    return f"Base: `{name}`{at}. {under} The adapter is merged onto {onto} ({export['dtype']})."


def _about_data(recipe: Recipe, run: Mapping[str, Any]) -> str:
    data = run["data"]
    names = ", ".join(f"`{public_name(source)}`" for source in as_list(recipe.data.train))
    return (
        f"Data: {names}, {data['train_rows']:,} rows, {data['supervised_tokens']:,} learned tokens "
        f"(SHA-256 of the content `{data['sha256']}`)."
    )


def _about_result(recipe: Recipe, run: Mapping[str, Any]) -> str:
    before, after = run.get("eval_loss_before"), run.get("eval_loss_after")
    rows = format_count(run["data"]["evaluation_rows"], "held-out row")
    held_out = (
        "" if before is None or after is None else f" Loss on all {rows}: {before:.4f} before, {after:.4f} after."
    )
    start = recipe.model.adapter
    began = f" It began with an adapter that had been trained before (`{public_name(start)}`)." if start else ""
    return f"Trained for {run['steps']:,} steps on {run['device']}.{began}{held_out}"


def _about_proof(run: Mapping[str, Any], export: Mapping[str, Any]) -> str:
    proof, gguf = export.get("proof"), export.get("gguf")
    what = f"The merged model from which `{gguf['file']}` was made as {gguf['quant']}" if gguf else "The export"
    if not proof:
        return f"{what} was not held against the trained model."
    loss, kind, total = "held-out loss", "held-out rows", run["data"]["evaluation_rows"]
    if proof["trained"]:
        loss, kind, total = "loss", "rows that were trained on", run["data"]["train_rows"]
    tokens = f"{proof['tokens']:,} tokens of {proof['rows']:,} of the {total:,} {kind}"
    unmeasured = None if gguf is None or is_measured(gguf["quant"], export["dtype"]) else gguf["quant"]
    mark = " (from which this file was made)" if unmeasured else " (this model)"
    but = f" (the file itself was not measured; what {unmeasured} costs is not in the table)" if unmeasured else ""
    rows = [
        f"| | {loss} | mean KL from the trained model | largest KL | same top token |",
        "|---|--:|--:|--:|--:|",
        *(_proof_row(score, mark if score["name"] == export["onto"] else "") for score in proof["scores"]),
    ]
    return f"{what}, held against the trained model on {tokens}{but}:\n\n" + "\n".join([*rows, *_about_bits(export)])


def _about_bits(export: Mapping[str, Any]) -> list[str]:
    told = tell_other_bits(export)
    return [] if told is None else ["", told]


def _proof_row(score: Mapping[str, Any], mark: str) -> str:
    is_live = score["name"] == "live"  # what the others are held against

    def figure(key: str, form: str) -> str:
        return "" if is_live else format(score[key], form)

    return (
        f"| {ROWS[score['name']]}{mark} | {score['loss']:.4f} | {figure('mean_kl', '.1e')} | {figure('max_kl', '.1e')} "
        f"| {figure('top_agreement', '.2%')} |"
    )


def _about_recipe(recipe: Recipe) -> str:
    lines: list[str] = []
    for table in TOLD_TABLES:
        keys = getattr(recipe, table).model_dump(mode="json", exclude_defaults=True, exclude_none=True)
        told = [f"{key} = {format_toml(value)}" for key, value in keys.items() if key not in PRIVATE_KEYS]
        lines += [f"[{table}]", *told] if told else []
    return _fenced("Recipe, where it differs from qlora-phi3's defaults:", lines)


def _fenced(title: str, lines: Sequence[str]) -> str:
    return "\n".join((title, "", "```toml", *lines, "```"))


def tell_other_bits(report: Mapping[str, Any]) -> str | None:
    """For people: that the 4-bit base of an export has not all the bits that were trained on; None where it has.

    Args:
        report: contents of export_report.json.
    """
    compared = report["base"]["compared"]
    if not compared["differing"]:
        return None
    return (
        f"{len(compared['differing'])} of {compared['num_tensors']} tensors of the base quantize to other bits here than where "
        f"the run trained ({len(compared['codes_differing'])} to other codes): the export is of these ({report['status']}). A "
        "run with [model] save_quantized = true in its recipe keeps its own."
    )
