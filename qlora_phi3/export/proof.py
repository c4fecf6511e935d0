"""Is what was written what was trained? Exported models scored against the live one on held-out rows.

Everything is computed in fp32, so that the figures show the difference of the weights. Losses and divergences are nats; they are
taken over the supervised positions, against the next token's whole distribution, whose logits are made in tiles.

The proof of an export, made before its weights are written and kept until they are; and the files held against it.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from qlora_phi3.errors import ExportError
from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.export.bundle import GENERATION_CONFIG, read_object
from qlora_phi3.export.inputs import Sources, check_base
from qlora_phi3.export.merge import Candidate, Onto, Opener, live_model, make_candidates
from qlora_phi3.export.request import Request
from qlora_phi3.export.streamed import Final, Progress
from qlora_phi3.export.writer import disk_errors
from qlora_phi3.family import Architecture, parse_architecture
from qlora_phi3.files import atomic_write
from qlora_phi3.model.loss import IGNORE_INDEX
from qlora_phi3.model.quantized import checksum_of
from qlora_phi3.model.weights import Weights, open_weights
from qlora_phi3.reporter import Reporter
from qlora_phi3.step import Batch, collate

#: Tokens that are scored, at most, prompts included.
CPU_TOKENS, CUDA_TOKENS = 1024, 16384


#: A tile of logits: rows of the vocabulary, and positions; 8 MiB in float64, of which about four are alive for each model.
TILE_VOCABULARY, TILE_POSITIONS = 2048, 512


LIVE = "live"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a merge may be from what it was made of: KL divergence, nats, on average and at the worst position."""

    mean_kl: float
    max_kl: float


#: By the export's dtype. A faithful merge was off by 7e-7 to 2e-6 on average in fp16, and by less than 1e-9 in fp32 (SmolLM2-135M
#: as a Phi-3, run in bf16, LoRA r = 16, 511 positions). bf16 loses updates of less than half its step, 1/512 of their weight, and
#: they all point where the adapter points: 3e-4 after 60 steps of training; after 12 steps 8e-3, and 0.04 nats of loss, which is
#: not faithful. There the distance between both merges was 0.2 to 0.3, and of a base without its adapter 1.1.
TOLERANCES = {
    torch.float32: Tolerance(mean_kl=1e-6, max_kl=1e-4),
    torch.float16: Tolerance(mean_kl=1e-4, max_kl=1e-2),
    torch.bfloat16: Tolerance(mean_kl=1e-3, max_kl=1e-1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One model on the held-out rows; its name is "live", or what it is merged onto."""

    name: str
    #: Mean negative log-likelihood of the supervised tokens.
    loss: float
    #: KL(live || this) over the positions, and at the worst of them.
    mean_kl: float
    max_kl: float
    #: Share of the positions where its most likely token is the live model's.
    top_agreement: float
    #: Share of the turns' ends where its most likely token is one that stops; None without a turn's end among the rows.
    stop_share: float | None
    #: KL(what it was made of, unmerged || this); None where it was not held against that.
    fault_mean_kl: float | None
    fault_max_kl: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Every model's score on the same rows, the live one's first."""

    rows: int
    #: Supervised positions scored.
    tokens: int
    #: Ends of turns among them.
    turns: int
    #: Whether the rows are ones that were trained on, for want of others.
    trained: bool
    scores: tuple[Score, ...]

    def of(self, name: str) -> Score:
        """The score of that name."""
        return next(score for score in self.scores if score.name == name)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def choose_onto(proof: Proof) -> Onto:
    """The merge with the lower held-out loss; the first, where they are equal."""
    merged = [score for score in proof.scores if score.name != LIVE]
    return cast(Onto, min(merged, key=lambda score: score.loss).name)


def find_fault(score: Score, dtype: torch.dtype) -> str | None:
    """Why a merge is not what it was made of; None where it is, within the tolerance of its dtype.

    One onto the original weights differs from the live model by what quantization changed. That distance is told, and is no
    fault: it is held against the adapter on the unquantized base instead.
    """
    limit = TOLERANCES[dtype]
    for what, value, most in (
        ("mean", score.fault_mean_kl, limit.mean_kl),
        ("largest", score.fault_max_kl, limit.max_kl),
    ):
        if value is not None and not value <= most:  # so that NaN is a fault
            return f"the {what} KL divergence from base and adapter unmerged is {value:.1e}, and {most:.0e} is allowed"
    return None


def find_difference(scored: Mapping[str, str], written: Weights, progress: Progress) -> str | None:
    """The first tensor whose bytes in the files are not those that were scored; None where there is none.

    Args:
        scored: `Candidate.checksums` after the proof.
    """
    names = sorted({*scored, *written.info})
    for done, name in enumerate(names):
        progress("Reading the files back", done, len(names))
        if name not in written.info or checksum_of(written.iter_row_chunks(name)) != scored.get(name):
            return name
    progress("Reading the files back", len(names), len(names))
    return None


def prove(
    live: Opener,
    candidates: Sequence[Candidate],
    rows: Sequence[Mapping[str, Any]],
    architecture: Architecture,
    *,
    stop_ids: Sequence[int],
    max_tokens: int = CPU_TOKENS,
    progress: Progress,
    check: Callable[[], None] = lambda: None,
) -> Proof:
    """Score the live model and the candidates, one after the other.

    Args:
        rows: `input_ids`, `labels` (unshifted, -100 where not supervised); "trained": true in rows that were trained on.
        stop_ids: tokens that end a turn.
        max_tokens: of the rows together; see `choose_rows`.
        check: called after each model was read through, to stop where the rest would be in vain.

    Raises:
        ExportError: no row has a supervised token.
    """
    chosen = choose_rows(rows, max_tokens)
    plan = MicroBatchPlan(
        max_tokens=max_tokens, max_rows=len(chosen), packing=True, longrope_boundary=architecture.longrope_boundary
    )
    batch = collate(chosen, plan)
    targets = torch.cat([micro["labels"][micro["labels"] != IGNORE_INDEX] for micro in batch.micro_batches])
    openers: dict[str, Opener] = {LIVE: live}
    origins = {LIVE: LIVE}
    for candidate in candidates:
        openers[candidate.onto] = candidate.open
        if candidate.checked:
            origins[candidate.onto] = LIVE if candidate.origin is None else f"{candidate.onto}, unmerged"
        if candidate.checked and candidate.origin is not None:
            openers[origins[candidate.onto]] = candidate.origin
    finals = {}
    for number, (name, opener) in enumerate(openers.items(), 1):
        finals[name] = _run(opener, batch, f"Proof {number} of {len(openers)}: scoring {name}, layers", progress)
        check()
    names = [LIVE, *(candidate.onto for candidate in candidates)]
    pairs = {*((LIVE, name) for name in names), *((origin, name) for name, origin in origins.items())}
    sums = _gather(finals, pairs, targets, num_words=architecture.vocab_size, progress=progress)
    ends = torch.isin(targets, torch.tensor(list(stop_ids), dtype=targets.dtype))
    return Proof(
        rows=len(chosen),
        tokens=len(targets),
        turns=int(ends.sum()),
        trained=any(bool(row.get("trained")) for row in chosen),
        scores=tuple(_score(name, origins.get(name), sums, ends, stop_ids) for name in names),
    )


def choose_rows(rows: Sequence[Mapping[str, Any]], max_tokens: int) -> list[Mapping[str, Any]]:
    """The first rows that fit `max_tokens` together; of the first that does not, its end, which is supervised in every chat.

    Raises:
        ExportError: none of them has a supervised token.
    """
    chosen: list[Mapping[str, Any]] = []
    room = max_tokens
    for row in rows:
        cut = {**row, "input_ids": row["input_ids"][-room:], "labels": row["labels"][-room:]}
        if room > 1 and any(label != IGNORE_INDEX for label in cut["labels"][1:]):
            chosen.append(cut)
            room -= len(cut["input_ids"])
    if not chosen:
        raise ExportError(
            f"None of the {len(rows)} held-out rows has a supervised token to score.", "Export with --no-verify."
        )
    return chosen


def _run(opener: Opener, batch: Batch, what: str, progress: Progress) -> Final:
    streamed = opener()
    final = streamed.run(batch, what, progress)
    streamed.model.to("meta")  # lets the adapter go at once: modules and their hooks hold each other
    return final


class _Sums:
    """What is known of each model's next-token distributions, gathered over tiles of the vocabulary, float64.

    A KL divergence of 1e-9 is the difference of sums of size 10: in fp32 it would drown. The logits themselves may be fp32: their
    rounding is a difference like that of the weights, and enters squared.
    """

    def __init__(self, names: Iterable[str], pairs: Iterable[tuple[str, str]], targets: Tensor) -> None:
        zeros = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
        self.targets = targets
        self.highest = {name: torch.full_like(zeros, float("-inf")) for name in names}
        self.mass = {name: zeros.clone() for name in names}
        self.wanted = {name: zeros.clone() for name in names}
        self.top = {name: torch.zeros_like(targets) for name in names}
        self.drift = {pair: zeros.clone() for pair in pairs}

    def add(self, rows: slice, start: int, logits: Mapping[str, Tensor]) -> None:
        """Add the logits, (positions, tokens), of some positions for the tokens from `start` on."""
        for name, tile in logits.items():
            highest, top = tile.max(dim=1)
            before = self.highest[name][rows]
            self.top[name][rows] = torch.where(highest > before, top + start, self.top[name][rows])
            now = torch.maximum(before, highest)
            likely = (tile - now[:, None]).exp_()
            shrunk = (before - now).exp_()
            self.highest[name][rows] = now
            self.mass[name][rows] = self.mass[name][rows] * shrunk + likely.sum(dim=1)
            self._add_wanted(name, rows, start, tile)
            for (origin, other), drift in self.drift.items():
                if origin == name:
                    drift[rows] = drift[rows] * shrunk + likely.mul(tile - logits[other]).sum(dim=1)

    def _add_wanted(self, name: str, rows: slice, start: int, tile: Tensor) -> None:
        place = self.targets[rows, None] - start
        inside = (place >= 0) & (place < tile.shape[1])
        wanted = tile.gather(1, place.clamp(0, tile.shape[1] - 1))
        self.wanted[name][rows] += torch.where(inside, wanted, 0)[:, 0]

    def log_mass(self, name: str) -> Tensor:
        """(positions,): log sum exp of the logits."""
        return self.highest[name] + self.mass[name].log()

    def divergence(self, origin: str, name: str) -> Tensor:
        """(positions,): KL(origin || name)."""
        mean = self.drift[origin, name] / self.mass[origin]
        return (mean - self.log_mass(origin) + self.log_mass(name)).clamp_min(0)


def _gather(
    finals: Mapping[str, Final],
    pairs: Iterable[tuple[str, str]],
    targets: Tensor,
    *,
    num_words: int,
    progress: Progress,
) -> _Sums:
    """Make every model's logits, a tile of the vocabulary at a time, and keep their sums.

    Args:
        num_words: of the vocabulary.
    """
    device = next(iter(finals.values())).hidden.device
    sums = _Sums(finals, pairs, targets.to(device))
    start = 0
    for tiles in zip(*(_tiles(final.head()) for final in finals.values()), strict=True):
        progress("Comparing the next tokens, words", start, num_words)
        heads = [tile.to(device=device, dtype=torch.float32) for tile in tiles]
        for row in range(0, len(targets), TILE_POSITIONS):
            rows = slice(row, row + TILE_POSITIONS)
            logits = {
                name: (final.hidden[rows] @ head.T).double()
                for (name, final), head in zip(finals.items(), heads, strict=True)
            }
            sums.add(rows, start, logits)
        start += len(heads[0])
    progress("Comparing the next tokens, words", start, num_words)
    return sums


def _tiles(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same rows in other pieces: `TILE_VOCABULARY` of them each."""
    held = next(pieces)
    for piece in pieces:
        held = torch.cat([held, piece])
        while len(held) >= TILE_VOCABULARY:
            yield held[:TILE_VOCABULARY]
            held = held[TILE_VOCABULARY:]
    if len(held):
        yield from torch.split(held, TILE_VOCABULARY)


def _score(name: str, origin: str | None, sums: _Sums, ends: Tensor, stop_ids: Sequence[int]) -> Score:
    divergence, fault = sums.divergence(LIVE, name), None if origin is None else sums.divergence(origin, name)
    top = sums.top[name].cpu()
    stops = torch.isin(top[ends], torch.tensor(list(stop_ids), dtype=top.dtype))
    return Score(
        name=name,
        loss=float((sums.log_mass(name) - sums.wanted[name]).mean()),
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
        top_agreement=float((top == sums.top[LIVE].cpu()).double().mean()),
        stop_share=float(stops.double().mean()) if len(stops) else None,
        fault_mean_kl=None if fault is None else float(fault.mean()),
        fault_max_kl=None if fault is None else float(fault.max()),
    )


#: In the draft: the finished proof.
SCORED = ".scored.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The proof, and checksums of the tensors that were scored, by what they are merged onto."""

    proof: Proof
    checksums: Mapping[str, Mapping[str, str]]


def score_all(request: Request, sources: Sources, draft: Path, key: str, onto: Onto, reporter: Reporter) -> Scored:
    """Score the live model and what can be merged, computed on the way; or take up the scores of an interrupted export."""
    key = f"{key} {request.onto} {sources.device.type}"
    if (scored := _read_scored(draft / SCORED, key, sources)) is not None:
        reporter.info("The proof was made before the interruption; it is taken up")
        return scored
    ontos: list[Onto] = [each for each in ("nf4", "original") if sources.can_merge(each)]
    candidates = make_candidates(
        sources.base,
        sources.deltas,
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
        progress=reporter.progress,
        check=partial(refuse_other_base, sources, draft),
    )
    scored = Scored(proof=proof, checksums={each.onto: dict(each.checksums) for each in candidates})
    notes = sources.base.notes(list(sources.base.compared))
    with disk_errors(draft):
        atomic_write(draft / SCORED, json.dumps({"key": key, **asdict(scored), "notes": notes}))
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


def find_fault_of(request: Request, scored: Scored, draft: Path, onto: Onto, reporter: Reporter) -> str | None:
    """Why what was written is not what was trained."""
    if (name := find_difference(scored.checksums[onto], open_weights(draft), reporter.progress)) is not None:
        return f"{name} in the files is not what was scored"
    return find_fault(scored.proof.of(onto), getattr(torch, request.dtype))
