"""An export from start to end: base and adapter -> proof -> merged weights -> a directory that other programs load.

Everything is written into a hidden staging directory next to the target, which is renamed at the very end: an incomplete model
never has the target's name. An interrupted export continues there.
"""

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from qlora_phi3.errors import ExportError, ProofError
from qlora_phi3.export.bundle import is_measured, render_card, write_companions
from qlora_phi3.export.gguf.prompt import write_modelfile
from qlora_phi3.export.gguf.write import GgufResult, check_quant, convert_to_gguf, plan_gguf
from qlora_phi3.export.hub import push
from qlora_phi3.export.inputs import (
    MERGE_BYTES,
    PROVED,
    Sources,
    check_adapter,
    check_memory,
    describe_base,
    open_sources,
    proved_status,
)
from qlora_phi3.export.merge import Onto
from qlora_phi3.export.proof import SCORED, Proof, choose_onto, find_fault_of, refuse_other_base, score_all
from qlora_phi3.export.request import (
    CARD,
    MODELFILE,
    REPORT,
    Request,
    check_replaceable,
    check_targets,
    failed_path,
    find_reusable,
    read_existing_report,
    written_files,
)
from qlora_phi3.export.stop import measure_stops
from qlora_phi3.export.writer import (
    DISK_HINT,
    PROGRESS_NAME,
    check_disk,
    clear_draft,
    ensure_dir,
    forget_progress,
    locked,
    missing_bytes,
    plan_shards,
    staging_dir,
    write_shards,
)
from qlora_phi3.files import disk_errors, replace_dir
from qlora_phi3.model.phi3 import quiet_transformers
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.reporter import Reporter
from qlora_phi3.units import format_count, format_gib

#: Disk for the files next to the weights.
COMPANION_BYTES = 64 * 2**20
#: Status of a GGUF whose type rounds: the model it was made from was proved, and the file itself was not measured.
PROVED_BEFORE_QUANTIZATION = "proved_before_quantization"
LIBRARIES = ("qlora-phi3", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written."""

    folder: Path
    #: Contents of export_report.json.
    report: dict[str, Any]
    gguf: GgufResult | None = None
    #: Address on the hub.
    page: str | None = None
    #: The proof failed: the name of `folder` says so, and nothing was made from it. To be raised after the figures are shown.
    fault: ProofError | None = None


def export_run(request: Request, reporter: Reporter) -> Exported:
    """Write what a request asks for: the merged model, from it a GGUF, and the upload.

    Raises:
        UserError: anything a person can fix; nothing incomplete has the target's name.
    """
    check_adapter(request.run, request.report)
    if request.gguf_file is not None:
        check_quant(request.quant)
    targets = [target for target in (request.target, request.gguf_target) if target is not None]
    with locked(targets), ExitStack() as stack:
        check_targets(request)  # what exists may have changed before the locks were taken
        if request.gguf_target is not None:
            stack.enter_context(ensure_dir(request.gguf_target))
        report, fault = find_reusable(request), None
        is_new = report is None
        if report is not None:
            if request.gguf_file is not None:
                _check_memory_of_gguf(request)
            reporter.info(f"Merged model: {request.target}, made before")
        else:
            draft = request.target.with_name(f".{request.target.name}.partial")
            stack.enter_context(staging_dir(draft, reusable=[SCORED]))
            report, fault = _export_merged(request, draft, reporter)
        if fault is not None:
            return Exported(folder=failed_path(request.target), report=report, fault=fault)
        folder, names, gguf = request.target, written_files(report), None
        if request.gguf_file is not None:
            gguf = _export_gguf(request, request.gguf_file, report, reporter)
            if is_new:
                size = sum((folder / name).stat().st_size for name in names)
                reporter.info(f"Merged model, which other exports can use: {folder} ({format_gib(size)})")
            folder, names = gguf.path.parent, [gguf.path.name, CARD, MODELFILE, REPORT]
        page = None
        if request.push is not None:
            reporter.info(f"Pushing {folder} to {request.push}")
            page = push(folder, sorted(names), request.push, private=request.private)
    return Exported(folder=folder, report=report, gguf=gguf, page=page)


def _export_merged(request: Request, draft: Path, reporter: Reporter) -> tuple[dict[str, Any], ProofError | None]:
    """Write the merged model at the request's target.

    Returns:
        Its report; and where the proof failed, the error to raise.
    """
    started = time.perf_counter()
    sources = open_sources(request, reporter)
    if request.max_ram_bytes is not None:
        check_memory(sources, request.max_ram_bytes, verify=request.verify)
    onto = _first_onto(request, sources)
    key = f"{request.key} {_base_state(sources.folder)}"
    with disk_errors(draft, ExportError, hint=DISK_HINT):
        clear_draft(draft, reusable=[SCORED])
        companions = write_companions(
            sources.folder,
            sources.adapter,
            draft,
            dtype=request.dtype,
            untied=sources.deltas.unties,
            end_of_turn=sources.ending.token_id,
            template=sources.ending.template,
        )
    _check_space(request, sources, draft, f"{key} {onto}", onto)
    scored, stops, fault = None, None, None
    if request.verify:
        scored = score_all(request, sources, draft, key, onto, reporter)
        if request.onto == "auto":
            onto = _choose_onto(sources, scored.proof, onto, reporter)
    elif request.onto == "auto" and onto == "nf4":
        label = sources.base.record.label(onto)
        reporter.info(f"Without the proof it is not known which merge is better: onto {label}, which was trained")
    _write_weights(request, sources, draft, f"{key} {onto}", onto, reporter)
    if scored is not None:
        fault = find_fault_of(request, scored, draft, onto, reporter)
        if fault is None:
            with quiet_transformers():
                stops = measure_stops(
                    draft,
                    sources.rows,
                    scored.proof,
                    onto,
                    device=sources.device,
                    max_ram_bytes=request.max_ram_bytes,
                    progress=reporter.progress,
                )
    base = describe_base(sources)
    if base["compared"]["from_cache"]:
        tensors = format_count(len(base["compared"]["from_cache"]), "tensor")
        codes = format_count(base["compared"]["different_codes"] or 0, "code")
        reporter.info(
            f"Taken from the 4-bit base that the run saved: {tensors}, of which {codes} came out otherwise here"
        )
    report = {
        "key": request.key,
        "status": "unproved" if scored is None else "failed" if fault else proved_status(sources),
        "fault": fault,
        "run": request.run.path.name,
        "base": base,
        "onto": onto,
        "onto_asked": request.onto,
        "dtype": request.dtype,
        "proof": scored and scored.proof.as_dict(),
        "stop_test": stops and stops.as_dict(),
        "files": {
            "written": sorted({path.name for path in draft.iterdir()} - {SCORED, PROGRESS_NAME} | {CARD, REPORT}),
            "copied": dict(companions.copied),
            "changed": list(companions.changed),
        },
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": time.perf_counter() - started,
        "versions": {name: version(name) for name in LIBRARIES},
    }
    with disk_errors(draft, ExportError, hint=DISK_HINT):
        _write_report(draft, render_card(sources.recipe, request.report, report, base=sources.folder), report)
        return report, _publish(request, draft, fault)


def _first_onto(request: Request, sources: Sources) -> Onto:
    """What is merged onto before the proof: for "auto" the 4-bit weights, which are what was trained on."""
    if request.onto == "original":
        return "original"
    if sources.can_merge("nf4"):
        return "nf4"
    if request.onto == "nf4":
        raise ExportError("--onto nf4: the run did not quantize its base.", "Leave --onto out.")
    return "original"


def _choose_onto(sources: Sources, proof: Proof, first: Onto, reporter: Reporter) -> Onto:
    """Decide `--onto auto` by the proof, and print the reason where the original has the lower loss."""
    chosen, difference, label = choose_onto(proof), proof.loss_difference, sources.base.record.label(first)
    if difference is not None and difference.standard_error is not None and difference.mean > 0:
        better, limit = f"{difference.mean:.4f} nats", f"{2 * difference.standard_error:.4f}"
        if chosen == "original":
            reporter.info(f"original is better by {better}, more than two standard errors ({limit}): original")
        else:
            reporter.info(f"original is better by {better}, less than two standard errors ({limit}): {label}")
    return chosen


def _check_space(request: Request, sources: Sources, draft: Path, key: str, onto: Onto) -> None:
    """Refuse what the disk cannot hold, and what llama.cpp cannot, before hours are spent on it."""
    weights = sources.merged(onto, request.dtype)
    merge = missing_bytes(plan_shards(weights.info, request.shard_bytes), draft, key) + COMPANION_BYTES
    check_disk(draft.parent, merge)
    if request.gguf_file is not None:
        gguf = plan_gguf(draft, weights.info, quant=request.quant, name=request.name).num_bytes
        folder = next(path for path in request.gguf_file.parents if path.is_dir())
        check_disk(folder, gguf + (merge if folder.stat().st_dev == draft.stat().st_dev else 0))


def _base_state(base: Path) -> str:
    """The size and time of a base's files: a draft is continued only from the files that it was started from."""
    files = ((path.name, path.stat()) for path in sorted(base.glob("*.safetensors")))
    return str([str(base.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)])


def _write_weights(request: Request, sources: Sources, draft: Path, key: str, onto: Onto, reporter: Reporter) -> None:
    weights = sources.merged(onto, request.dtype)
    shards = plan_shards(weights.info, request.shard_bytes)
    written = write_shards(
        weights,
        draft,
        shards,
        key=key,
        progress=partial(_report_megabytes, reporter, f"Merging onto {sources.base.record.label(onto)}"),
        notes=sources.base.notes,
    )
    if written.num_resumed:
        reporter.info(f"Continued after {written.num_resumed} of {len(shards)} files that were complete")
    sources.base.restore(written.notes)
    if not request.verify:  # the proof has checked it already
        refuse_other_base(sources, draft)


def _report_megabytes(reporter: Reporter, what: str, done: int, total: int | None) -> None:
    megabytes = None if total is None else max(1, total // 10**6)
    if megabytes is None:
        reporter.progress(f"{what}, MB", done // 10**6, None)
    else:  # only the end may equal the total, which ends the progress
        most = megabytes if done == total else megabytes - 1
        reporter.progress(f"{what}, MB", min(done // 10**6, most), megabytes)


def _write_report(folder: Path, card: str, report: Mapping[str, Any]) -> None:
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8", newline="\n")
    (folder / CARD).write_text(card, encoding="utf-8", newline="\n")


def _publish(request: Request, draft: Path, fault: str | None) -> ProofError | None:
    """Rename the staging directory to the target, or where the proof failed to a name that says so; the target then stays.

    Returns:
        The error of the failed proof.
    """
    target = request.target if fault is None else failed_path(request.target)
    check_replaceable(target)
    if fault is None and not request.force and target.exists() and any(target.iterdir()):
        raise ExportError(f"{target} was created during the export.", "Move it away and give the same command again.")
    forget_progress(draft)
    (draft / SCORED).unlink(missing_ok=True)
    replace_dir(draft, target)
    if fault is None:
        return None
    hint = "bf16 rounds small updates away: try --dtype fp16. " if request.dtype == "bfloat16" else ""
    return ProofError(f"The export is not what was trained: {fault}.", f"{hint}It is in {target}, to be examined.")


def _check_memory_of_gguf(request: Request) -> None:
    """As `inputs.check_memory`; a conversion was measured to take 119 to 224 MiB."""
    needed = psutil.Process().memory_info().rss + MERGE_BYTES
    if request.max_ram_bytes is not None and request.max_ram_bytes < needed:
        raise ExportError(
            f"--max-ram {format_gib(request.max_ram_bytes)} is too little: a .gguf file needs about {format_gib(needed)}.",
            "Give that much.",
        )


def _export_gguf(request: Request, target: Path, report: Mapping[str, Any], reporter: Reporter) -> GgufResult:
    """Write the merged model as a GGUF, with Modelfile, model card and report in place of those of an earlier GGUF."""
    result = convert_to_gguf(
        request.target,
        target,
        quant=request.quant,
        name=request.name,
        progress=partial(_report_megabytes, reporter),
        force=request.force,
    )
    folder = target.parent
    earlier = [name for name in written_files(read_existing_report(folder)) if (folder / name).is_file()]
    measured = is_measured(request.quant, report["dtype"]) or not report["status"].startswith(PROVED)
    gguf_report = {
        **report,
        "status": report["status"] if measured else PROVED_BEFORE_QUANTIZATION,
        "gguf": {"file": target.name, "quant": request.quant},
        "files": {**report["files"], "written": sorted({*earlier, target.name, CARD, MODELFILE, REPORT})},
    }
    with disk_errors(folder, ExportError, hint=DISK_HINT):
        recipe = load_recipe(request.run.recipe)
        _write_report(folder, render_card(recipe, request.report, gguf_report, base=request.target), gguf_report)
        write_modelfile(request.target, target, folder / MODELFILE, force=True)
    return result
