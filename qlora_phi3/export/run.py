"""An export from start to end: base and adapter -> proof -> merged weights -> a directory that other programs load.

Everything is written into a hidden staging directory next to the target, in which the proof of an interrupted export stays, and
which is renamed at the very end: an incomplete model never has the target's name.
"""

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlora_phi3.errors import ExportError, ProofError, memory_errors
from qlora_phi3.export import inputs, writer
from qlora_phi3.export import proof as proofs
from qlora_phi3.export import request as requests
from qlora_phi3.export.base import summarise
from qlora_phi3.export.bundle import is_measured, public_name, render_card, write_companions
from qlora_phi3.export.gguf.prompt import write_modelfile
from qlora_phi3.export.gguf.tensors import check_quant
from qlora_phi3.export.gguf.write import convert_to_gguf, plan_gguf
from qlora_phi3.export.hub import push
from qlora_phi3.export.inputs import Sources, open_sources
from qlora_phi3.export.merge import Onto
from qlora_phi3.export.proof import Proof
from qlora_phi3.export.request import CARD, MODELFILE, REPORT, SCORED, Request, check_replaceable, find_reusable
from qlora_phi3.export.stop import measure_stops
from qlora_phi3.export.writer import DISK_HINT
from qlora_phi3.files import disk_errors, file_state, replace_dir
from qlora_phi3.model.phi3 import quiet_transformers
from qlora_phi3.model.weights import open_weights
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.reporter import Reporter
from qlora_phi3.units import format_count, format_gib

#: Disk for the files next to the weights.
COMPANION_BYTES = 64 * 2**20
#: Status of an export that passed: the live model of the proof had all the bits that were trained on, or not.
PROVED, PROVED_ON_OTHER_BITS = "proved", "proved_on_other_bits"
#: Status of a GGUF whose type rounds: the model it was made from was proved, and the file itself was not measured.
PROVED_BEFORE_QUANTIZATION = "proved_before_quantization"
MEMORY_HINT = (
    "Close other programs that use it, or export on the CPU (CUDA_VISIBLE_DEVICES=-1) or without the proof (--no-verify)."
)
LIBRARIES = ("qlora-phi3", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufResult:
    """The .gguf file that was written."""

    path: Path
    quant: str
    notes: tuple[str, ...]  # what llama.cpp does differently from training, for a person to read
    system: str  # the system turn of the Modelfile, which llama-cli must be given; empty where there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written. With a `fault`, the name of `folder` says that the proof failed, and nothing was made from it."""

    folder: Path
    report: dict[str, Any]  # contents of export_report.json
    gguf: GgufResult | None = None
    page: str | None = None  # address on the hub
    fault: ProofError | None = None  # to be raised after the figures are shown


def export_run(request: Request, reporter: Reporter) -> Exported:
    """Write what a request asks for: the merged model, from it a GGUF, and the upload. UserError for anything a person can fix;
    nothing incomplete has the target's name.
    """
    inputs.check_adapter(request.run, request.report)
    gguf_file, folder, gguf, page = request.gguf_file, request.target, None, None
    if gguf_file is not None:
        check_quant(request.quant)
    with writer.locked([folder, *([gguf_file.parent] if gguf_file else [])]), ExitStack() as stack:
        requests.check_targets(request)  # what exists may have changed before the locks were taken
        if gguf_file is not None:
            stack.enter_context(writer.ensure_dir(gguf_file.parent))
        report = reused = find_reusable(request)
        if report is not None:
            reporter.info(f"Merged model: {folder}, made before")
            if gguf_file is not None:
                inputs.check_memory(request.max_ram_bytes)
        else:
            draft = requests.staging_path(folder)
            stack.enter_context(writer.staging_dir(draft, SCORED))
            device = "the GPU" if torch.cuda.is_available() else "this computer"
            with memory_errors(ExportError, f"The memory of {device} ran out in the export: {{reason}}.", MEMORY_HINT):
                report, fault = _export_merged(request, draft, reporter)
            if fault is not None:
                return Exported(folder=requests.failed_path(folder), report=report, fault=fault)
        names = report["files"]["written"]
        if gguf_file is not None:
            gguf = _export_gguf(request, gguf_file, report, reporter)
            if reused is None:
                size = format_gib(sum((folder / name).stat().st_size for name in names))
                reporter.info(f"Merged model, which other exports can use: {folder} ({size})")
            folder, names = gguf_file.parent, [gguf_file.name, CARD, MODELFILE, REPORT]
        if request.options.push is not None:
            reporter.info(f"Pushing {folder} to {request.options.push}")
            page = push(folder, sorted(names), request.options.push, private=request.options.private)
    return Exported(folder=folder, report=report, gguf=gguf, page=page)


def _export_merged(request: Request, draft: Path, reporter: Reporter) -> tuple[dict[str, Any], ProofError | None]:
    """Write the merged model into `draft`, prove it, and rename it; return its report, and the error of a failed proof."""
    started, auto = time.perf_counter(), request.options.onto == "auto"
    sources = open_sources(request, reporter)
    inputs.check_memory(request.max_ram_bytes, sources if request.options.verify else None)
    # What is merged onto before the proof: for "auto" the 4-bit weights, which are what was trained on.
    onto: Onto = "nf4" if request.options.onto != "original" and sources.can_merge("nf4") else "original"
    if request.options.onto == "nf4" and onto == "original":
        raise ExportError("--onto nf4: the run did not quantize its base.", "Leave --onto out.")
    # A proof is used again only on the same kind of device, and with the files of the base that it was made from.
    files = [(path.name, file_state(path)) for path in sorted(sources.folder.glob("*.safetensors"))]
    key = f"{request.key} {request.options.onto} {sources.device.type} {sources.folder.resolve()} {files}"
    with disk_errors(draft, ExportError, hint=DISK_HINT):
        untied, ending = sources.deltas.unties, sources.ending
        companions = write_companions(sources.folder, draft, dtype=request.dtype, untied=untied, ending=ending)
    _check_space(request, sources, draft, onto)
    stops = fault = None
    scored = proofs.read_scored(draft, sources, key)
    if scored is not None:
        reporter.info("The proof was made before the interruption and is used again")
    elif request.options.verify:
        scored = proofs.score_all(request, sources, draft, key, onto, reporter)
    if auto and scored is not None:
        onto = _choose_onto(sources, scored.proof, reporter)
    elif auto and onto == "nf4":
        label = sources.base.record.label(onto)
        reporter.info(f"Without the proof it is not known which merge is better: merging onto {label}, as in training")
    _write_weights(request, sources, draft, onto, reporter)
    if scored is not None:
        fault = proofs.find_difference(scored.checksums[onto], open_weights(draft), reporter.progress)
        fault = fault or proofs.find_fault(scored.proof.of(onto), getattr(torch, request.dtype))
    if request.options.verify and scored is not None and fault is None:
        rows, device, ram, progress = sources.rows, sources.device, request.max_ram_bytes, reporter.progress
        with quiet_transformers():
            stops = measure_stops(draft, rows, scored.proof, onto, device=device, max_ram_bytes=ram, progress=progress)
    report: dict[str, Any] = {
        **_describe_export(request, sources, draft, companions),
        "onto": onto,
        "fault": fault,
        "proof": scored and asdict(scored.proof),
        "stop_test": stops and stops.as_dict(),
        "seconds": time.perf_counter() - started,
    }
    if scored is None or fault is not None:
        report["status"] = "unproved" if scored is None else "failed"
    with disk_errors(draft, ExportError, hint=DISK_HINT):
        _write_report(draft, request, report, base=sources.folder)
        return report, _publish(request, draft, fault)


def _describe_export(request: Request, sources: Sources, draft: Path, companions: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the report that does not depend on the proof; the status is that of an export that passed."""
    record, compared = sources.base.record, summarise(sources.base.compared)
    return {
        "key": request.key,
        "status": PROVED_ON_OTHER_BITS if compared.differing else PROVED,
        "run": request.run.path.name,
        "base": {
            "name": public_name(record.name),
            "revision": record.revision,
            "quantization": record.scheme and asdict(record.scheme),
            "compared": asdict(compared),
        },
        "onto_asked": request.options.onto,
        "dtype": request.dtype,
        "files": {
            "written": sorted({path.name for path in draft.iterdir()} - {SCORED} | {CARD, REPORT}),
            **companions,
        },
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _choose_onto(sources: Sources, proof: Proof, reporter: Reporter) -> Onto:
    """Decide `--onto auto` by the proof, and print the reason where the original has the lower loss."""
    chosen, difference = proofs.choose_onto(proof), proof.loss_difference
    if difference is not None and difference.standard_error is not None and difference.mean > 0:
        better, limit = f"{difference.mean:.4f}", f"{2 * difference.standard_error:.4f}"
        how, label = "more" if chosen == "original" else "less", sources.base.record.label(chosen)
        reason = f"the original's loss is lower by {better}, {how} than two standard errors ({limit})"
        reporter.info(f"Merging onto {label}: {reason}.")
    return chosen


def _check_space(request: Request, sources: Sources, draft: Path, onto: Onto) -> None:
    """Refuse what the disk cannot hold, and what llama.cpp cannot, before hours are spent on it."""
    weights = sources.merged(onto, request.dtype)
    shards = writer.plan_shards(weights.info, request.shard_bytes)
    merge = sum(shard.num_bytes for shard in shards) + COMPANION_BYTES
    writer.check_disk(draft.parent, merge)
    if request.gguf_file is not None:
        gguf = plan_gguf(draft, weights.info, quant=request.quant, name=request.name).num_bytes
        folder = next(path for path in request.gguf_file.parents if path.is_dir())
        writer.check_disk(folder, gguf + (merge if folder.stat().st_dev == draft.stat().st_dev else 0))


def _write_weights(request: Request, sources: Sources, draft: Path, onto: Onto, reporter: Reporter) -> None:
    base = sources.base
    progress = partial(_report_megabytes, reporter, f"Merging onto {base.record.label(onto)}")
    writer.write_shards(sources.merged(onto, request.dtype), draft, request.shard_bytes, progress=progress)
    proofs.refuse_other_base(sources, draft)
    compared = summarise(base.compared)
    if compared.from_cache:
        tensors = format_count(len(compared.from_cache), "tensor")
        codes = format_count(compared.different_codes or 0, "code")
        message = f"Taken from the 4-bit base that the run saved: {tensors}, of which {codes} came out otherwise here"
        reporter.info(message)


def _report_megabytes(reporter: Reporter, what: str, done: int, total: int | None) -> None:
    """Show bytes in MB. The last call alone has `done == total`, which ends a progress."""
    if total is None:
        reporter.progress(f"{what}, MB", done / 10**6, None)
    else:
        megabytes = max(1, total // 10**6)
        reporter.progress(f"{what}, MB", megabytes * done / total, megabytes)


def _write_report(folder: Path, request: Request, report: Mapping[str, Any], *, base: Path) -> None:
    """Write report and model card; `base` as in `render_card`."""
    card = render_card(load_recipe(request.run.recipe), request.report, report, base=base)
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8", newline="\n")
    (folder / CARD).write_text(card, encoding="utf-8", newline="\n")


def _publish(request: Request, draft: Path, fault: str | None) -> ProofError | None:
    """Rename the staging directory to the target; if the proof failed, to a name that says so, and return the error."""
    target = request.target if fault is None else requests.failed_path(request.target)
    check_replaceable(target)
    if fault is None and not request.options.force and target.exists() and any(target.iterdir()):
        raise ExportError(f"{target} was created during the export.", "Move it away and give the same command again.")
    (draft / SCORED).unlink(missing_ok=True)
    replace_dir(draft, target)
    if fault is None:
        return None
    hint = f"Examine it in {target}."
    if request.dtype == "bfloat16":
        hint = f"bf16 rounds small updates away: try --dtype fp16. The export is in {target}."
    return ProofError(f"The export is not what was trained: {fault}.", hint)


def _export_gguf(request: Request, target: Path, report: Mapping[str, Any], reporter: Reporter) -> GgufResult:
    """Write the merged model as a GGUF, with Modelfile, model card and report in place of those of an earlier GGUF."""
    progress = partial(_report_megabytes, reporter)
    limits = convert_to_gguf(request.target, target, quant=request.quant, name=request.name, progress=progress)
    folder, earlier = target.parent, requests.read_existing_report(target.parent)["files"]["written"]
    measured = is_measured(request.quant, report["dtype"]) or not report["status"].startswith(PROVED)
    written = {name for name in earlier if (folder / name).is_file()} | {target.name, CARD, MODELFILE, REPORT}
    gguf_report = {
        **report,
        "status": report["status"] if measured else PROVED_BEFORE_QUANTIZATION,
        "gguf": {"file": target.name, "quant": request.quant},
        "files": {**report["files"], "written": sorted(written)},
    }
    with disk_errors(folder, ExportError, hint=DISK_HINT):
        _write_report(folder, request, gguf_report, base=request.target)
        system, notes = write_modelfile(request.target, target, str(request.report.get("data", {}).get("system", "")))
    return GgufResult(path=target, quant=request.quant, notes=(*limits, *notes), system=system)
