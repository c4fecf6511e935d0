"""A whole export: base and adapter -> merged weights -> proof -> a folder people can use.

Everything is written into a hidden neighbour of the target, which gets its name at the very end: a half model never looks whole.
"""

import json
import shutil
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
from qlora_phi3.export.bundle import Companions, is_measured, render_card, write_companions
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
    tell_kept_bits,
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
    failed_place,
    find_reusable,
    read_existing_report,
    written_files,
)
from qlora_phi3.export.stop import StopTest, measure_stops
from qlora_phi3.export.writer import (
    PROGRESS_NAME,
    check_disk,
    clear_draft,
    disk_errors,
    ensure_dir,
    forget_progress,
    locked,
    missing_bytes,
    plan_shards,
    staging_dir,
    write_shards,
)
from qlora_phi3.model.phi3 import quiet_transformers
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.reporter import Reporter
from qlora_phi3.units import format_gib

#: Room for the files beside the weights.
COMPANION_BYTES = 64 * 2**20


#: Status of a GGUF whose type rounds: what it was made from was proved, and the file itself not measured.
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
    #: The proof failed: `folder` has a name that says so, and nothing was made of it. To be raised, once the figures were shown.
    fault: ProofError | None = None


def export_run(request: Request, reporter: Reporter) -> Exported:
    """Write what a request asks for.

    Raises:
        UserError: anything a person can mend; nothing half stands under the target's name.
    """
    check_adapter(request.run, request.report)
    if request.gguf_file is not None:
        check_quant(request.quant)
    gguf_place = [] if request.gguf_target is None else [request.gguf_target]
    with locked([request.target, *gguf_place]):
        check_targets(request)  # what is there may have changed since
        return _export(request, reporter)


def _export(request: Request, reporter: Reporter) -> Exported:
    """Write what a request asks for into places that nobody else writes to."""
    with ExitStack() as places:
        if request.gguf_target is not None:
            places.enter_context(ensure_dir(request.gguf_target))
        report, fault = _find_reusable(request, reporter), None
        made_before = report is not None
        if report is None:
            draft = request.target.with_name(f".{request.target.name}.partial")
            places.enter_context(staging_dir(draft, kept=[SCORED]))
            report, fault = _merge(request, draft, reporter)
        if fault is not None:
            return Exported(folder=failed_place(request.target), report=report, fault=fault)
        gguf = None if request.gguf_file is None else _convert(request, request.gguf_file, report, reporter)
    if gguf is not None and not made_before:
        size = sum((request.target / name).stat().st_size for name in written_files(report))
        reporter.info(f"Merged model, kept for other exports: {request.target} ({format_gib(size)})")
    folder, names = request.target, written_files(report)
    if gguf is not None:
        folder, names = gguf.path.parent, [gguf.path.name, CARD, MODELFILE, REPORT]
    page = None
    if request.push is not None:
        reporter.info(f"Pushing {folder} to {request.push}")
        page = push(folder, sorted(names), request.push, private=request.private)
    return Exported(folder=folder, report=report, gguf=gguf, page=page)


def _find_reusable(request: Request, reporter: Reporter) -> dict[str, Any] | None:
    """The report of the merged model, where it need not be made."""
    report = find_reusable(request)
    if report is not None:
        if request.gguf_file is not None:
            _check_memory_of_gguf(request)
        reporter.info(f"Merged model: {request.target}, made before")
    return report


def _merge(request: Request, draft: Path, reporter: Reporter) -> tuple[dict[str, Any], ProofError | None]:
    """Make the merged model at the request's target; its report, and why it is not what was trained if it is not."""
    started = time.perf_counter()
    sources = open_sources(request, reporter)
    if request.max_ram_bytes is not None:
        check_memory(sources, request.max_ram_bytes, verify=request.verify)
    onto = _first_onto(request, sources)
    key_of_draft = f"{request.key} {_state_of(sources.folder)}"
    with disk_errors(draft):
        companions = _write_companions(request, sources, draft)
    _check_room(request, sources, draft, f"{key_of_draft} {onto}", onto)
    scored, stops, fault = None, None, None
    if request.verify:
        scored = score_all(request, sources, draft, key_of_draft, onto, reporter)
        if request.onto == "auto" and (better := choose_onto(scored.proof)) != onto:
            reporter.info("The merge onto the original base has the lower held-out loss: writing that")
            onto = better
    elif request.onto == "auto" and onto == "nf4":
        reporter.info("Without the proof nothing tells which merge is better: onto NF4, which was trained")
    _write_weights(request, sources, draft, f"{key_of_draft} {onto}", onto, reporter)
    if scored is not None:
        fault = find_fault_of(request, scored, draft, onto, reporter)
    if scored is not None and fault is None:
        stops = _test_stops(request, sources, draft, scored.proof, onto, reporter)
    tell_kept_bits(sources, reporter)
    report = {
        "key": request.key,
        "status": "unproved" if scored is None else "failed" if fault else proved_status(sources),
        "fault": fault,
        "run": request.run.path.name,
        "base": describe_base(sources),
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
    with disk_errors(draft):
        _describe(draft, render_card(sources.recipe, request.report, report, base=sources.folder), report)
        return report, _hand_out(request, draft, fault)


def _write_companions(request: Request, sources: Sources, draft: Path) -> Companions:
    """The files beside the weights, in a draft that holds nothing else but what can be gone on with."""
    clear_draft(draft, kept=[SCORED])
    return write_companions(
        sources.folder,
        sources.adapter,
        draft,
        dtype=request.dtype,
        untied=sources.deltas.unties,
        end_of_turn=sources.ending.token_id,
        template=sources.ending.template,
    )


def _first_onto(request: Request, sources: Sources) -> Onto:
    """Of "auto", the weights that were trained on: they win nearly always."""
    if not sources.can_merge("nf4"):
        if request.onto == "nf4":
            raise ExportError("--onto nf4: the run did not quantize its base.", "Leave --onto out.")
        return "original"
    return "original" if request.onto == "original" else "nf4"


def _check_room(request: Request, sources: Sources, draft: Path, key: str, onto: Onto) -> None:
    """Refuse what the disk cannot hold, and what llama.cpp cannot, before hours are spent on it."""
    weights = sources.merged(onto, request.dtype)
    merge = missing_bytes(plan_shards(weights.info, request.shard_bytes), draft, key) + COMPANION_BYTES
    check_disk(draft.parent, merge)
    if request.gguf_file is not None:
        gguf = plan_gguf(draft, weights.info, quant=request.quant, name=request.name).num_bytes
        folder = next(path for path in request.gguf_file.parents if path.is_dir())
        check_disk(folder, gguf + (merge if folder.stat().st_dev == draft.stat().st_dev else 0))


def _write_weights(request: Request, sources: Sources, draft: Path, key: str, onto: Onto, reporter: Reporter) -> None:
    weights = sources.merged(onto, request.dtype)
    shards = plan_shards(weights.info, request.shard_bytes)
    written = write_shards(
        weights,
        draft,
        shards,
        key=key,
        progress=partial(_tell_megabytes, reporter, f"Merging onto {onto}"),
        notes=sources.base.notes,
    )
    if written.num_resumed:
        reporter.info(f"Went on after {written.num_resumed} of {len(shards)} files that stood already")
    sources.base.recall(written.notes)
    if not request.verify:  # else it was looked at before
        refuse_other_base(sources, draft)


def _tell_megabytes(reporter: Reporter, what: str, done: int, total: int | None) -> None:
    megabytes = None if total is None else max(1, total // 10**6)
    most = None if megabytes is None else megabytes if done == total else megabytes - 1  # so that only the end ends it
    reporter.progress(f"{what}, MB", done // 10**6 if most is None else min(done // 10**6, most), megabytes)


def _test_stops(
    request: Request, sources: Sources, draft: Path, proof: Proof, onto: Onto, reporter: Reporter
) -> StopTest:
    with quiet_transformers():
        return measure_stops(
            draft,
            sources.rows,
            proof,
            onto,
            device=sources.device,
            max_ram_bytes=request.max_ram_bytes,
            progress=reporter.progress,
        )


def _state_of(base: Path) -> str:
    """Tells a base's files from others and from the same ones once mended: a draft goes on with those it was begun with."""
    files = ((path.name, path.stat()) for path in sorted(base.glob("*.safetensors")))
    return str([str(base.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)])


def _describe(folder: Path, card: str, report: Mapping[str, Any]) -> None:
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8", newline="\n")
    (folder / CARD).write_text(card, encoding="utf-8", newline="\n")


def _hand_out(request: Request, draft: Path, fault: str | None) -> ProofError | None:
    """Give the draft its name; what stood there goes only now.

    Returns:
        The proof failed; the name says so, and what stood at the target stays.
    """
    target = request.target
    if fault is not None:
        hint = "bf16 rounds small updates away: try --dtype fp16. " if request.dtype == "bfloat16" else ""
        failed = failed_place(target)
        check_replaceable(failed)
        shutil.rmtree(failed, ignore_errors=True)
        _name(draft, failed)
        return ProofError(f"The export is not what was trained: {fault}.", f"{hint}It is kept in {failed} for a look.")
    former = target.with_name(f".{target.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        check_replaceable(target)
        if not request.force and any(target.iterdir()):
            raise ExportError(f"{target} came to be in the meantime.", "Move it away and give the same command again.")
        target.replace(former)
    _name(draft, target)
    shutil.rmtree(former, ignore_errors=True)
    return None


def _name(draft: Path, place: Path) -> None:
    forget_progress(draft)
    (draft / SCORED).unlink(missing_ok=True)
    draft.replace(place)


def _check_memory_of_gguf(request: Request) -> None:
    """As `sources.check_memory`; measured for a conversion were 119 to 224 MiB."""
    needed = psutil.Process().memory_info().rss + MERGE_BYTES
    if request.max_ram_bytes is not None and request.max_ram_bytes < needed:
        raise ExportError(
            f"--max-ram {format_gib(request.max_ram_bytes)} is too little: a .gguf file needs about {format_gib(needed)}.",
            "Give that much.",
        )


def _convert(request: Request, target: Path, report: Mapping[str, Any], reporter: Reporter) -> GgufResult:
    """The merged model as a GGUF with its Modelfile, card and report, which replace those of a GGUF made before."""
    result = convert_to_gguf(
        request.target,
        target,
        quant=request.quant,
        name=request.name,
        progress=partial(_tell_megabytes, reporter),
        force=request.force,
    )
    folder = target.parent
    with disk_errors(folder):
        report = _report_gguf(request, target, report)
        card = render_card(load_recipe(request.run.recipe), request.report, report, base=request.target)
        _describe(folder, card, report)
        write_modelfile(request.target, target, folder / MODELFILE, force=True)
    return result


def _report_gguf(request: Request, target: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a GGUF, which is of the merged model but for what became of it; written files are all that are there."""
    before = [name for name in written_files(read_existing_report(target.parent)) if (target.parent / name).is_file()]
    written = sorted({*before, target.name, CARD, MODELFILE, REPORT})
    measured = is_measured(request.quant, report["dtype"]) or not report["status"].startswith(PROVED)
    return {
        **report,
        "status": report["status"] if measured else PROVED_BEFORE_QUANTIZATION,
        "gguf": {"file": target.name, "quant": request.quant},
        "files": {**report["files"], "written": written},
    }
