"""The proof that the exported model is the model that was trained: both are scored on the same held-out rows.

Everything is computed in fp32, so that the figures show the difference of the weights. Losses and divergences are in nats, over
the supervised positions and the full distribution of the next token. The proof is made before the weights are written; the files
are then compared with what was scored.
"""

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import TypeAdapter
from torch import Tensor

from qlora_phi3.adapters.base_files import DOWNLOAD_AGAIN, GENERATION_CONFIG
from qlora_phi3.errors import ExportError
from qlora_phi3.execution import IGNORE_INDEX, MicroBatchPlan
from qlora_phi3.export.base import Compared
from qlora_phi3.export.inputs import Sources
from qlora_phi3.export.merge import Onto, ScoredModel, build_models
from qlora_phi3.export.request import SCORED, Request
from qlora_phi3.export.streamed import Final
from qlora_phi3.export.writer import DISK_HINT
from qlora_phi3.family import Architecture
from qlora_phi3.files import atomic_file, disk_errors, read_json_object, remove
from qlora_phi3.model.quantized import checksum_of
from qlora_phi3.model.weights import Weights
from qlora_phi3.reporter import Progress, Reporter
from qlora_phi3.step import collate

#: Most tokens that are scored, prompts included.
CPU_TOKENS, CUDA_TOKENS = 1024, 16384
#: Where a GPU's memory does not suffice for more. A layer of Phi-3-mini takes 0.27 MiB of it a token, its weights apart.
LEAST_CUDA_TOKENS = 256
#: A tile of logits: words of the vocabulary, and positions; 8 MiB in float64, of which about four exist for each model.
TILE_VOCABULARY, TILE_POSITIONS = 2048, 512
#: Name of the model as it was trained, in scores and `build_models`.
LIVE = "live"
#: Largest KL divergence of a merge from base and adapter unmerged, nats, by the export's dtype: mean, and at the worst position.
#: A faithful merge was off by 7e-7 to 2e-6 on average in fp16, and by less than 1e-9 in fp32 (SmolLM2-135M as a Phi-3, run in
#: bf16, LoRA r = 16, 511 positions). bf16 loses updates of less than half its step, 1/512 of their weight, and they all point
#: where the adapter points: 3e-4 after 60 steps of training; after 12 steps 8e-3, and 0.04 nats of loss, which is not faithful.
#: There the distance between both merges was 0.2 to 0.3, and of a base without its adapter 1.1.
TOLERANCES = {torch.float32: (1e-6, 1e-4), torch.float16: (1e-4, 1e-2), torch.bfloat16: (1e-3, 1e-1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One model on the held-out rows."""

    name: str  # "live", or what it is merged onto ("nf4", "original")
    loss: float  # mean negative log-likelihood of the supervised tokens
    mean_kl: float  # KL(live || this), mean and largest over the positions
    max_kl: float
    top_agreement: float  # share of the positions where its most likely token is the live model's
    stop_share: float | None  # share of the ends of turns where its most likely token is a stop id; None without ends
    fault_mean_kl: float | None  # KL(base and adapter unmerged || this); None where that was not computed
    fault_max_kl: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossDifference:
    """Loss of the merge onto the 4-bit weights minus that of the merge onto the original, paired token by token, nats."""

    mean: float  # more than 0 where the original is better
    standard_error: float | None  # of the mean: sample standard deviation / sqrt(tokens); None for a single token
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The scores of all models on the same rows, the live model's first."""

    rows: int
    tokens: int  # supervised positions scored
    turns: int  # ends of turns among them
    trained: bool  # whether the rows were trained on, because the run had no others
    scores: tuple[Score, ...]
    loss_difference: LossDifference | None = None  # None where only one merge was scored

    def of(self, name: str) -> Score:
        """The score of that name."""
        return next(score for score in self.scores if score.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The proof, onto -> tensor -> SHA-256 of the merged tensors that were scored, and how the base's tensors compared."""

    proof: Proof
    checksums: Mapping[str, Mapping[str, str]]
    compared: Mapping[str, Compared]


def score_all(request: Request, sources: Sources, draft: Path, key: str, onto: Onto, reporter: Reporter) -> Scored:
    """Score the live model and the possible merges, and save the scores in `draft` under `key`, for an interrupted export.
    ExportError for a base with other weights than the run's, or held-out rows without a supervised token.
    """
    ontos: list[Onto] = [each for each in ("nf4", "original") if sources.can_merge(each)]
    models = build_models(
        *(sources.base, sources.deltas, sources.config, sources.adapter),
        dtype=getattr(torch, request.dtype),
        ontos=ontos,
        checked=ontos if request.options.onto == "auto" else [onto],
    )
    stop_ids = read_json_object(draft / GENERATION_CONFIG, ExportError, DOWNLOAD_AGAIN)["eos_token_id"]
    proof, max_tokens = None, CUDA_TOKENS if sources.device.type == "cuda" else CPU_TOKENS
    shared = {"stop_ids": stop_ids, "progress": reporter.progress, "check": partial(refuse_other_base, sources, draft)}
    while proof is None:
        try:
            proof = prove(models, sources.rows, sources.architecture, max_tokens=max_tokens, **shared)
        except torch.OutOfMemoryError:
            if max_tokens <= LEAST_CUDA_TOKENS:
                raise
        if proof is None:  # here the error is released, and with it every tensor that its traceback held
            gc.collect()
            torch.cuda.empty_cache()
            max_tokens //= 4
            reporter.info(f"The GPU's memory ran out: the proof is made again with {max_tokens:,} tokens")
    checksums = {model.name: dict(model.checksums) for model in models if model.checksums is not None}
    scored = Scored(proof=proof, checksums=checksums, compared=sources.base.compared)
    with disk_errors(draft, ExportError, hint=DISK_HINT), atomic_file(draft / SCORED) as staging:
        staging.write_text(json.dumps({"key": key, **asdict(scored)}), encoding="utf-8")
    return scored


def read_scored(draft: Path, sources: Sources, key: str) -> Scored | None:
    """The scores that an interrupted export saved in `draft`; None where there are none for this export."""
    try:
        saved = json.loads((draft / SCORED).read_text(encoding="utf-8"))
        if saved["key"] != key:
            return None
        scored = TypeAdapter(Scored).validate_python(saved)
        sources.base.compared |= scored.compared
        return scored
    except (OSError, ValueError, KeyError, TypeError):  # absent, damaged, or of another version: scored again
        return None


def refuse_other_base(sources: Sources, draft: Path) -> None:
    """As `RecordedBase.check_weights`; removes the draft, of which nothing can be used with the right base."""
    try:
        sources.base.check_weights(sources.folder)
    except ExportError:
        remove(draft)
        raise


def prove(
    models: Sequence[ScoredModel],
    rows: Sequence[Mapping[str, Any]],
    architecture: Architecture,
    *,
    stop_ids: Sequence[int],
    max_tokens: int = CPU_TOKENS,
    progress: Progress,
    check: Callable[[], None] = lambda: None,
) -> Proof:
    """Score models one after the other; ExportError where no row has a supervised token.

    Args:
        rows: `input_ids`, `labels` (unshifted, -100 where not supervised); "trained": true in rows that were trained on.
        max_tokens: of the rows together; see `choose_rows`.
        check: called after each model has run; raises where the rest would be in vain.
    """
    chosen, boundary = choose_rows(rows, max_tokens), architecture.longrope_boundary
    plan = MicroBatchPlan(max_tokens=max_tokens, max_rows=len(chosen), packing=True, longrope_boundary=boundary)
    batch = collate(chosen, plan)
    targets = torch.cat([micro["labels"][micro["labels"] != IGNORE_INDEX] for micro in batch.micro_batches])
    finals, all_layers = {}, len(models) * architecture.num_hidden_layers * len(batch.micro_batches)
    for number, model in enumerate(models):

        def report(done: int, before: int = number * all_layers // len(models)) -> None:
            progress(f"Proof: running {len(models)} models, layer by layer", before + done, all_layers)

        streamed = model.open()
        finals[model.name] = streamed.run(batch, report)
        streamed.model.to("meta")  # frees the adapter now: modules and their hooks refer to each other
        del streamed
        check()
    reported = {model.name: model.origin for model in models if model.name == LIVE or model.checksums is not None}
    pairs = {(origin, name) for name, own in reported.items() for origin in (LIVE, own) if origin is not None}
    found = _score_tokens(finals, pairs, targets, architecture.vocab_size, progress)
    ends = torch.isin(targets, torch.tensor(list(stop_ids), dtype=targets.dtype))
    both = {"nf4", "original"} <= reported.keys()
    return Proof(
        rows=len(chosen),
        tokens=len(targets),
        turns=int(ends.sum()),
        trained=any(bool(row.get("trained")) for row in chosen),
        scores=tuple(_score(name, origin, found, ends, stop_ids) for name, origin in reported.items()),
        loss_difference=compare_losses(found.losses["nf4"], found.losses["original"]) if both else None,
    )


def choose_rows(rows: Sequence[Mapping[str, Any]], max_tokens: int) -> list[Mapping[str, Any]]:
    """The first rows that fit `max_tokens` together; of the first that does not, its end, which is supervised in every chat."""
    chosen, left = list[Mapping[str, Any]](), max_tokens
    for row in rows:
        cut = {**row, "input_ids": row["input_ids"][-left:], "labels": row["labels"][-left:]}
        if left > 1 and any(label != IGNORE_INDEX for label in cut["labels"][1:]):
            chosen.append(cut)
            left -= len(cut["input_ids"])
    if not chosen:
        message = f"None of the {len(rows)} held-out rows has a supervised token to score."
        raise ExportError(message, "Export with --no-verify.")
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenScores:
    """What is computed at every position, (positions,) each, losses and divergences in float64."""

    losses: Mapping[str, Tensor]  # by model: negative log-likelihood of the target
    top: Mapping[str, Tensor]  # by model: the most likely token
    divergence: Mapping[tuple[str, str], Tensor]  # (origin, name) -> KL(origin || name)


def _score_tokens(
    finals: Mapping[str, Final], pairs: Iterable[tuple[str, str]], targets: Tensor, vocab_size: int, progress: Progress
) -> _TokenScores:
    """Compare the next-token distributions of models, in tiles of the vocabulary, so that no head is read more than once.

    A KL divergence of 1e-9 is the difference of sums of size 10, which fp32 cannot hold. The logits themselves may be fp32: their
    rounding is a difference like that of the weights, and enters squared.
    """
    device, start = next(iter(finals.values())).hidden.device, 0
    targets = targets.to(device)
    zeros = torch.zeros(len(targets), dtype=torch.float64, device=device)
    max_logits = {name: torch.full_like(zeros, float("-inf")) for name in finals}
    sum_exp, target_logits = ({name: zeros.clone() for name in finals} for _ in range(2))
    top = {name: torch.zeros_like(targets) for name in finals}
    weighted = {pair: zeros.clone() for pair in pairs}  # sum of exp(origin's logit) * (origin's logit - name's)
    for tiles in zip(*(_tiles(final.head()) for final in finals.values()), strict=True):
        heads = {name: tile.to(device=device, dtype=torch.float32) for name, tile in zip(finals, tiles, strict=True)}
        for row in range(0, len(targets), TILE_POSITIONS):
            rows = slice(row, row + TILE_POSITIONS)
            logits = {name: (finals[name].hidden[rows] @ head.T).double() for name, head in heads.items()}
            index = targets[rows, None] - start
            for name, tile in logits.items():
                before, (highest, best) = max_logits[name][rows], tile.max(dim=1)
                top[name][rows] = torch.where(highest > before, best + start, top[name][rows])
                now = torch.maximum(before, highest)
                exp = (tile - now[:, None]).exp_()
                rescale, max_logits[name][rows] = (before - now).exp_(), now
                sum_exp[name][rows] = sum_exp[name][rows] * rescale + exp.sum(dim=1)
                target = tile.gather(1, index.clamp(0, tile.shape[1] - 1))
                target_logits[name][rows] += torch.where((index >= 0) & (index < tile.shape[1]), target, 0)[:, 0]
                for (origin, other), sums in weighted.items():
                    if origin == name:
                        sums[rows] = sums[rows] * rescale + exp.mul(tile - logits[other]).sum(dim=1)
        start += len(tiles[0])
        progress("Comparing the next tokens, words", start, vocab_size)
    log_sum_exp = {name: max_logits[name] + sum_exp[name].log() for name in finals}
    divergence = {
        (origin, name): (sums / sum_exp[origin] - log_sum_exp[origin] + log_sum_exp[name]).clamp_min(0)
        for (origin, name), sums in weighted.items()
    }
    losses = {name: log_sum_exp[name] - target_logits[name] for name in finals}
    return _TokenScores(losses=losses, top={name: ids.cpu() for name, ids in top.items()}, divergence=divergence)


def _tiles(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The rows of consecutive chunks (rows, hidden_size) in tiles of `TILE_VOCABULARY` rows."""
    pending = next(chunks)
    for chunk in chunks:
        pending = torch.cat([pending, chunk])
        while len(pending) >= TILE_VOCABULARY:
            yield pending[:TILE_VOCABULARY]
            pending = pending[TILE_VOCABULARY:]
    if len(pending):
        yield from torch.split(pending, TILE_VOCABULARY)


def _score(name: str, origin: str | None, found: _TokenScores, ends: Tensor, stop_ids: Sequence[int]) -> Score:
    divergence, fault = found.divergence[LIVE, name], None if origin is None else found.divergence[origin, name]
    top = found.top[name]
    stops = torch.isin(top[ends], torch.tensor(list(stop_ids), dtype=top.dtype))
    return Score(
        name=name,
        loss=float(found.losses[name].mean()),
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
        top_agreement=float((top == found.top[LIVE]).double().mean()),
        stop_share=float(stops.double().mean()) if len(stops) else None,
        fault_mean_kl=None if fault is None else float(fault.mean()),
        fault_max_kl=None if fault is None else float(fault.max()),
    )


def compare_losses(quantized: Tensor, original: Tensor) -> LossDifference:
    """Compare the losses (tokens,), nats, float64, of the merges onto the 4-bit weights and onto the original."""
    difference, tokens = quantized - original, len(quantized)
    error = float(difference.std(correction=1)) / tokens**0.5 if tokens > 1 else None
    return LossDifference(mean=float(difference.mean()), standard_error=error, tokens=tokens)


def choose_onto(proof: Proof) -> Onto:
    """What `--onto auto` merges onto: the original only where its loss is lower by more than two standard errors.

    The 4-bit weights are what was trained on. In the demo of the README the merge onto the original was better by 0.025 nats over
    494 tokens, and had another most likely token than the trained model at 18 % of the positions.
    """
    difference = proof.loss_difference
    if difference is None:  # there is only one merge
        return cast(Onto, next(score.name for score in proof.scores if score.name != LIVE))
    error = difference.standard_error
    return "original" if error is not None and difference.mean > 2 * error else "nf4"


def find_difference(scored: Mapping[str, str], written: Weights, progress: Progress) -> str | None:
    """Why the files are not what was scored (`ScoredModel.checksums`), with the first such tensor; None where they are."""
    names = sorted({*scored, *written.info})
    for done, name in enumerate(names, 1):
        if name not in written.info or checksum_of(written.iter_row_chunks(name)) != scored.get(name):
            return f"{name} in the files is not what was scored"
        progress("Reading the files back", done, len(names))
    return None


def find_fault(score: Score, dtype: torch.dtype) -> str | None:
    """Why a merge is not what it was made of; None where it is, within the tolerance of its dtype.

    A merge onto the original differs from the live model by what quantization changed, which is shown and is not a fault. It is
    compared with the adapter on the unquantized base instead.
    """
    values = {"mean": score.fault_mean_kl, "largest": score.fault_max_kl}
    for (what, value), most in zip(values.items(), TOLERANCES[dtype], strict=True):
        if value is not None and not value <= most:  # so that NaN is a fault
            return f"the {what} KL divergence from base and adapter unmerged is {value:.1e}, and {most:.0e} is allowed"
    return None
