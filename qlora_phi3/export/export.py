"""A whole export: base and adapter -> merged weights -> proof -> a folder people can use.

Everything is written into a hidden neighbour of the target, which gets its name at the very end: a half model never looks whole.
"""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlora_phi3.architecture import parse_architecture
from qlora_phi3.errors import ExportError, ProofError
from qlora_phi3.export.adapter import ADAPTER_NAME
from qlora_phi3.export.candidates import live_model, make_candidates
from qlora_phi3.export.card import render_card
from qlora_phi3.export.files import Companions, read_object, write_companions
from qlora_phi3.export.gguf import GgufResult, check_quant, convert_to_gguf
from qlora_phi3.export.hub import check_push, push
from qlora_phi3.export.merge import Onto
from qlora_phi3.export.modelfile import write_modelfile
from qlora_phi3.export.proof import (
    CPU_TOKENS,
    CUDA_TOKENS,
    Proof,
    choose_onto,
    find_difference,
    find_fault,
    prove,
)
from qlora_phi3.export.request import Request
from qlora_phi3.export.sources import Sources, check_base, check_memory, describe_base, open_sources
from qlora_phi3.export.stop import StopTest, measure_stops
from qlora_phi3.export.weights import open_weights
from qlora_phi3.export.writer import check_disk, forget_progress, missing_bytes, plan_shards, write_shards
from qlora_phi3.model import only_errors
from qlora_phi3.training.listener import Listener

REPORT = "export_report.json"
#: Room for the files beside the weights.
COMPANION_BYTES = 64 * 2**20
LIBRARIES = ("qlora-phi3", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written."""

    folder: Path
    #: Contents of export_report.json.
    report: dict[str, Any]
    gguf: GgufResult | None
    #: Address on the hub.
    page: str | None


def export_run(request: Request, listener: Listener) -> Exported:
    """Write what a request asks for.

    Raises:
        ProofError: it is written, under a name that says so, and is not what was trained.
        UserError: anything a person can mend; nothing half stands under the target's name.
    """
    if request.push is not None:
        check_push(request.push)
    if request.gguf_target is not None:
        check_quant(request.quant)
    report = _merge(request, listener)
    gguf = _convert(request, listener) if request.gguf_target is not None else None
    folder = request.gguf_target or request.target
    page = None
    if request.push is not None:
        listener.say(f"Pushing {folder} to {request.push}")
        page = push(folder, request.push, private=request.private)
    return Exported(folder=folder, report=report, gguf=gguf, page=page)


def _merge(request: Request, listener: Listener) -> dict[str, Any]:
    """The merged model at the request's target; a finished one that the same request made is taken as it is, for a GGUF."""
    key = _key(request)
    if request.target.exists() and not request.force:
        if request.gguf_target is None:
            raise ExportError(f"{request.target} exists.", "Give --out another folder, or --force to replace it.")
        report = _made_before(request, key)
        listener.say(f"Merged model: {request.target}, made before")
        return report
    started = time.perf_counter()
    sources = open_sources(request, listener)
    if request.max_ram_bytes is not None:
        check_memory(sources, request.max_ram_bytes, verify=request.verify)
    draft = request.target.with_name(f".{request.target.name}.partial")
    onto, companions = _write(request, sources, draft, key, listener)
    proof, stops, fault = None, None, None
    if request.verify:
        proof, onto, fault = _prove(request, sources, draft, key, onto, listener)
    if proof is not None and fault is None:
        stops = _test_stops(request, sources, draft, proof, onto, listener)
    report = {
        "key": key,
        "status": "unproved" if proof is None else "failed" if fault else "proved",
        "fault": fault,
        "run": request.run.path.name,
        "base": describe_base(sources),
        "onto": onto,
        "onto_asked": request.onto,
        "dtype": request.dtype,
        "proof": proof and proof.as_dict(),
        "stop_test": stops and stops.as_dict(),
        "files": {"copied": dict(companions.copied), "changed": list(companions.changed)},
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": time.perf_counter() - started,
        "versions": {name: version(name) for name in LIBRARIES},
    }
    card = render_card(sources.recipe, request.report, report, base=sources.folder)
    (draft / "README.md").write_text(card, encoding="utf-8", newline="\n")
    (draft / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8", newline="\n")
    _hand_out(draft, request.target, fault, request.dtype)
    return report


def _made_before(request: Request, key: str) -> dict[str, Any]:
    """The report of the merged model that a GGUF is made from.

    Raises:
        ExportError: it was made of something else, or never held against the trained model.
    """
    made = request.target / REPORT
    report = read_object(made) if made.is_file() else {}
    cure = "--force makes it anew; or move it away."
    if report.get("key") != key:
        raise ExportError(f"{request.target}, from which a GGUF is made, is no export of this run as it is now.", cure)
    if request.verify and report.get("status") != "proved":
        raise ExportError(f"{request.target}, from which a GGUF is made, was written with --no-verify.", cure)
    return report


def _write(request: Request, sources: Sources, draft: Path, key: str, listener: Listener) -> tuple[Onto, Companions]:
    """Fill the draft: files beside the weights, then the weights onto what is most likely wanted."""
    onto = _first_onto(request, sources)
    weights = sources.merged(onto, request.dtype)
    shards = plan_shards(weights.info, request.shard_bytes)
    check_disk(draft.parent, missing_bytes(shards, draft, f"{key} {onto}") + COMPANION_BYTES)
    draft.mkdir(parents=True, exist_ok=True)
    companions = write_companions(
        sources.folder,
        sources.adapter,
        draft,
        dtype=request.dtype,
        untied=weights.updates.unties,
        end_of_turn=sources.ending.token_id,
        template=sources.ending.template,
    )
    _write_weights(request, sources, draft, key, onto, listener)
    return onto, companions


def _first_onto(request: Request, sources: Sources) -> Onto:
    """Of "auto", the weights that were trained on: they win nearly always."""
    if sources.base.record.scheme is None:
        if request.onto == "nf4":
            raise ExportError("--onto nf4: the run did not quantize its base.", "Leave --onto out.")
        return "original"
    return "original" if request.onto == "original" else "nf4"


def _write_weights(request: Request, sources: Sources, draft: Path, key: str, onto: Onto, listener: Listener) -> None:
    weights = sources.merged(onto, request.dtype)
    shards = plan_shards(weights.info, request.shard_bytes)
    written = write_shards(
        weights,
        draft,
        shards,
        key=f"{key} {onto}",
        progress=partial(_tell_bytes, listener, f"Merging onto {onto}, MB"),
        notes=sources.base.notes,
    )
    if written.num_resumed:
        listener.say(f"Went on after {written.num_resumed} of {len(shards)} files that stood already")
    sources.base.recall(written.notes)
    check_base(sources, listener)


def _tell_bytes(listener: Listener, what: str, done: int, total: int) -> None:
    megabytes = max(1, total // 10**6)
    listener.progress(what, megabytes if done == total else min(done // 10**6, megabytes - 1), megabytes)


def _prove(
    request: Request, sources: Sources, draft: Path, key: str, onto: Onto, listener: Listener
) -> tuple[Proof, Onto, str | None]:
    """Score the live model, the merge that is written, and the other one; where that is better and the choice is ours, write it.

    Returns:
        The scores, what the draft is merged onto now, and what is wrong with it, if anything is.
    """
    others: list[Onto] = [other for other in ("nf4", "original") if other != onto and sources.can_merge(other)]
    candidates = make_candidates(
        sources.base,
        sources.updates,
        sources.config,
        sources.adapter,
        dtype=getattr(torch, request.dtype),
        written={onto: open_weights(draft)},
        ontos=(onto, *others),
        checked=(onto, *(others if request.onto == "auto" else ())),
    )
    proof = prove(
        live_model(sources.base, sources.config, sources.adapter),
        candidates,
        sources.rows,
        parse_architecture(sources.config, str(sources.folder)),
        stop_ids=read_object(draft / "generation_config.json")["eos_token_id"],
        max_tokens=CUDA_TOKENS if sources.device.type == "cuda" else CPU_TOKENS,
        progress=listener.progress,
    )
    check_base(sources, listener)
    if request.onto == "auto" and (better := choose_onto(proof)) != onto:
        listener.say(f"Onto {better} the held-out loss is lower: writing that")
        _write_weights(request, sources, draft, key, better, listener)
        onto = better
    scored = next(candidate.checksums for candidate in candidates if candidate.onto == onto)
    if (name := find_difference(scored, open_weights(draft), listener.progress)) is not None:
        return proof, onto, f"{name} in the files is not what was scored"
    return proof, onto, find_fault(proof.of(onto), getattr(torch, request.dtype))


def _test_stops(
    request: Request, sources: Sources, draft: Path, proof: Proof, onto: Onto, listener: Listener
) -> StopTest:
    with only_errors():
        return measure_stops(
            draft,
            sources.rows,
            proof,
            onto,
            device=sources.device,
            max_ram_bytes=request.max_ram_bytes,
            progress=listener.progress,
        )


def _key(request: Request) -> str:
    """Names everything that decides the bytes of the export."""
    digest = hashlib.sha256()
    for path in (request.run.base, request.run.adapter / "adapter_config.json", request.run.adapter / ADAPTER_NAME):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    asked = f"{request.dtype} {request.onto} {version('qlora-phi3')}"
    return hashlib.sha256(digest.digest() + asked.encode()).hexdigest()


def _hand_out(draft: Path, target: Path, fault: str | None, dtype: str) -> None:
    """Give the draft its name; what stood there goes only now.

    Raises:
        ProofError: the proof failed; the name says so, and what stood there stays.
    """
    forget_progress(draft)
    if fault is not None:
        cure = "bf16 rounds small updates away: try --dtype fp16. " if dtype == "bfloat16" else ""
        failed = target.with_name(f"{target.name}.failed-proof")
        shutil.rmtree(failed, ignore_errors=True)
        draft.replace(failed)
        raise ProofError(f"The export is not what was trained: {fault}.", f"{cure}It is kept in {failed} for a look.")
    former = target.with_name(f".{target.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        target.replace(former)
    draft.replace(target)
    shutil.rmtree(former, ignore_errors=True)


def _convert(request: Request, listener: Listener) -> GgufResult:
    """The merged model as a GGUF with its Modelfile."""
    folder = request.gguf_target
    if folder is None:
        raise ValueError("no GGUF was asked for")
    name = request.run.path.resolve().parent.name
    target = folder / f"{name}-{request.quant}.gguf"
    result = convert_to_gguf(
        request.target, target, quant=request.quant, name=name, progress=listener.progress, force=request.force
    )
    write_modelfile(request.target, target, folder / "Modelfile", force=True)
    for companion in ("README.md", REPORT):
        shutil.copyfile(request.target / companion, folder / companion)
    return result
