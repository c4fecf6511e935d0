"""The model card: what was trained, on what, how well, and what the export's proof says."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from qlora_phi3.export.proof import tell_other_bits
from qlora_phi3.recipe.load import Recipe
from qlora_phi3.recipe.places import listed
from qlora_phi3.recipe.problems import format_toml
from qlora_phi3.sizes import format_count

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
        datasets=[source for source in listed(recipe.data.train) if _is_hub_id(source)] or None,
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
    names = ", ".join(f"`{public_name(source)}`" for source in listed(recipe.data.train))
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
