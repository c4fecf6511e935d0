"""The proof of an export, made before its weights are written and kept until they are; and the files held against it."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from qlora_phi3.architecture import parse_architecture
from qlora_phi3.errors import ExportError
from qlora_phi3.export.candidates import live_model, make_candidates
from qlora_phi3.export.files import GENERATION_CONFIG, read_object
from qlora_phi3.export.merge import Onto
from qlora_phi3.export.proof import CPU_TOKENS, CUDA_TOKENS, Proof, Score, find_difference, find_fault, prove
from qlora_phi3.export.request import Request
from qlora_phi3.export.sources import Sources, check_base
from qlora_phi3.export.weights import open_weights
from qlora_phi3.export.writer import writing
from qlora_phi3.runfolder import write_atomically
from qlora_phi3.training.listener import Listener

#: In the draft: the finished proof.
SCORED = ".scored.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The proof, and checksums of the tensors that were scored, by what they are merged onto."""

    proof: Proof
    checksums: Mapping[str, Mapping[str, str]]


def score_all(request: Request, sources: Sources, draft: Path, key: str, onto: Onto, listener: Listener) -> Scored:
    """Score the live model and what can be merged, computed on the way; or take up the scores of an interrupted export."""
    key = f"{key} {request.onto} {sources.device.type}"
    if (scored := _read_scored(draft / SCORED, key, sources)) is not None:
        listener.say("The proof was made before the interruption; it is taken up")
        return scored
    ontos: list[Onto] = [each for each in ("nf4", "original") if sources.can_merge(each)]
    candidates = make_candidates(
        sources.base,
        sources.updates,
        sources.config,
        sources.adapter,
        dtype=getattr(torch, request.dtype),
        ontos=ontos,
        checked=ontos if request.onto == "auto" else (onto,),
    )
    proof = prove(
        live_model(sources.base, sources.config, sources.adapter),
        candidates,
        sources.rows,
        parse_architecture(sources.config, str(sources.folder)),
        stop_ids=read_object(draft / GENERATION_CONFIG)["eos_token_id"],
        max_tokens=CUDA_TOKENS if sources.device.type == "cuda" else CPU_TOKENS,
        progress=listener.progress,
        check=partial(refuse_other_base, sources, draft),
    )
    scored = Scored(proof=proof, checksums={each.onto: dict(each.checksums) for each in candidates})
    notes = sources.base.notes(list(sources.base.compared))
    with writing(draft):
        write_atomically(draft / SCORED, json.dumps({"key": key, **asdict(scored), "notes": notes}))
    return scored


def refuse_other_base(sources: Sources, draft: Path) -> None:
    """Leave nothing of an export that began with weights the run did not train on; raises as `check_base`."""
    try:
        check_base(sources)
    except ExportError:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _read_scored(path: Path, key: str, sources: Sources) -> Scored | None:
    """The scores that an interrupted export kept under this key."""
    held = read_object(path) if path.is_file() else {}
    if held.get("key") != key:
        return None
    sources.base.recall(held["notes"])
    scores = tuple(Score(**score) for score in held["proof"]["scores"])
    return Scored(proof=Proof(**{**held["proof"], "scores": scores}), checksums=held["checksums"])


def find_fault_of(request: Request, scored: Scored, draft: Path, onto: Onto, listener: Listener) -> str | None:
    """Why what was written is not what was trained."""
    if (name := find_difference(scored.checksums[onto], open_weights(draft), listener.progress)) is not None:
        return f"{name} in the files is not what was scored"
    return find_fault(scored.proof.of(onto), getattr(torch, request.dtype))
