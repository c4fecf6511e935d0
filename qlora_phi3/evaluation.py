"""Compare a trained model with its base on rows that it was not trained on: loss, token accuracy, and the answers it generates.

The base is the same model with its adapter disabled. Every figure is kept by row, so that the interval of a difference comes
from pairs: both models on the same row.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from qlora_phi3.data.batching import IGNORE_INDEX, split_plan
from qlora_phi3.data.prepare import PreparedData, prepare_datasets
from qlora_phi3.data.report import FEW_ROWS
from qlora_phi3.data.template import choose_template
from qlora_phi3.errors import DataError, ModelError, RunError, first_line, is_out_of_memory
from qlora_phi3.execution import MicroBatchPlan
from qlora_phi3.files import sha256_file
from qlora_phi3.inference import InferenceModel, Sampling, generate_batch
from qlora_phi3.model.loss import tiled_cross_entropy
from qlora_phi3.model.phi3 import find_base
from qlora_phi3.objectives import ObjectiveOutput, compute_supervised
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.recipe.schema import Data
from qlora_phi3.reporter import Progress
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.step import MicroBatchMemoryError, collate, evaluate
from qlora_phi3.units import format_count

#: Rows that are read at once; those of a micro-batch are among them. And tokens of a micro-batch, unless a row is longer.
GROUP_ROWS, MICRO_BATCH_TOKENS = 16, 2048
#: Prompts that are answered at once, at most, and the share of the free memory that their caches may take.
BATCH_PROMPTS, CACHE_SHARE = 64, 0.5
#: Resamples of an interval, and its percentiles.
RESAMPLES, PERCENTILES = 2000, (2.5, 97.5)
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
MEMORY_HINT = "Close other programs that use the memory."

#: One figure of every row, and the weight of each row in the mean; float64 of shape (rows,) both.
Measured = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class EvalRows:
    """Tokenized rows to evaluate on: a sequence of mappings with `input_ids` and `labels`."""

    rows: Any
    name: str
    sha256: str | None = None
    packing: bool = True
    notes: tuple[str, ...] = ()  #: What the reader must know about these rows.


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """What is generated: `rows` answers at most, 0 for none; `seed` chooses them, draws tokens, and resamples."""

    rows: int
    max_new_tokens: int
    sampling: Sampling
    seed: int


@dataclass(frozen=True, slots=True)
class Question:
    """The ids of a conversation up to its first answer, and that answer as the row has it."""

    ids: list[int]
    reference: str


def read_own_rows(inference: InferenceModel, run: RunFolder, progress: Progress) -> EvalRows:
    """The rows that a run evaluated on, read and split again; where its data are gone, those that it keeps for its exports.

    Raises:
        RunError: the run held no rows out, or has no report.
        DataError: its data cannot be read, and it kept no rows.
    """
    recipe, report = load_recipe(run.recipe), run.read_report()
    if not recipe.training.do_eval:
        message = f"{run.path} held no rows out of its data ([training] do_eval = false)."
        raise RunError(message, "Name rows to evaluate on: --data FILE")
    try:
        prepared = _prepare(inference, recipe.data, recipe.training.max_length, progress, evaluate=True)
    except DataError as error:
        if not run.held_out.is_file():
            raise
        rows = [json.loads(line) for line in run.held_out.read_text(encoding="utf-8").splitlines()]
        note = f"The run's data cannot be read: {error.message} The rows are the {len(rows)} that the run kept for its exports."
        return EvalRows(rows, run.held_out.name, sha256_file(run.held_out), recipe.training.packing, (note,))
    now, recorded = prepared.report.sha256, str(report.get("data", {}).get("sha256"))
    note = f"The data changed since the run (sha256 {recorded[:12]} -> {now[:12]}): these may not be the rows that it held out."
    return EvalRows(prepared.evaluation, "held-out rows", now, recipe.training.packing, () if now == recorded else (note,))


def read_other_rows(inference: InferenceModel, run: RunFolder | None, name: str, progress: Progress) -> EvalRows:
    """The rows of a file, or of a data set of the hub, in any format; in that of a run's recipe where it names one that fits.

    Raises:
        DataError: they cannot be read, or none of them can be evaluated on.
    """
    recipe, max_length = None if run is None else load_recipe(run.recipe), inference.max_positions
    by_columns: dict[str, Any] = {"train": name, "format": "auto", "fields": {}, "eval": None, "max_rows": None}
    choices = [Data(train=name)]
    if recipe is not None:
        max_length, choices = recipe.training.max_length, [recipe.data.model_copy(update=by_columns)]
        if recipe.data.format != "auto":
            same = {"format": recipe.data.format, "fields": recipe.data.fields}
            choices.insert(0, recipe.data.model_copy(update=by_columns | same))
    for number, data in enumerate(choices, start=1):
        try:
            prepared = _prepare(inference, data, max_length, progress, evaluate=False)
            break
        except DataError:
            if number == len(choices):
                raise
    left_out, cut = prepared.report.rows_read - prepared.report.rows_kept, prepared.report.truncated
    note = f"{left_out:,} of {prepared.report.rows_read:,} rows were left out, and {cut:,} cut at {max_length:,} tokens."
    return EvalRows(prepared.train, name, prepared.report.sha256, notes=(note,) if left_out or cut else ())


def _prepare(inference: InferenceModel, data: Data, max_length: int, progress: Progress, *, evaluate: bool) -> PreparedData:
    template, tokenizer = choose_template(inference.tokenizer, inference.chat_template), inference.tokenizer
    options = {"tokenizer": tokenizer, "template": template, "base_dir": Path(), "progress": progress}
    return prepare_datasets(data, max_length=max_length, evaluate=evaluate, **options)


def evaluate_model(inference: InferenceModel, data: EvalRows, settings: EvalSettings, *, progress: Progress) -> dict[str, Any]:
    """Evaluate a model and, if it has an adapter, its base.

    Returns:
        For JSON: `metrics`, a mapping of each figure's name to `base`, `tuned`, `difference`, and the ends `low` and `high` of
        its 95 % interval (None where there is none); `verdict` in one line; `answers`; and what was evaluated on, and how.
        Without an adapter base and tuned are the same figures.

    Raises:
        ModelError: a single row does not fit in memory.
    """
    has_adapter, tokenizer = isinstance(inference.model, PeftModel), inference.tokenizer
    sides = ("base", "tuned") if has_adapter else ("tuned",)
    questions = choose_questions(inference, data.rows, settings)
    measured: dict[str, dict[str, Measured]] = {}
    shown: list[dict[str, Any]] = [{"prompt": tokenizer.decode(each.ids), "reference": each.reference} for each in questions]
    for number, side in enumerate(sides):
        with inference.model.disable_adapter() if side == "base" else nullcontext():
            measured[side] = score_rows(inference, data, _part(progress, "Measuring the loss", number, len(sides)))
    for number, side in enumerate(sides if questions else ()):
        with inference.model.disable_adapter() if side == "base" else nullcontext():
            answers = answer_questions(inference, questions, settings, _part(progress, "Answering", number, len(sides)))
        scores, texts = score_answers(inference, questions, answers)
        measured[side] |= scores
        for row, text in zip(shown, texts, strict=True):
            row[side] = text
    metrics = compare(measured[sides[0]], measured["tuned"], settings.seed)
    counts, notes = {"rows": len(data.rows), "questions": len(questions)}, list(data.notes)
    if len(data.rows) < FEW_ROWS:
        notes.append(f"With {format_count(len(data.rows), 'row')} these are rough figures.")
    if settings.rows and not questions:
        notes.append("Nothing was generated: no row has a prompt and a complete answer.")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": judge(metrics, has_adapter=has_adapter),
        "has_adapter": has_adapter,
        "data": {"name": data.name, "sha256": data.sha256, **counts, "notes": notes},
        "settings": asdict(settings),
        "metrics": metrics,
        "answers": shown,
    }


def _part(progress: Progress, what: str, number: int, count: int) -> Callable[[int, int], None]:
    """Report the progress of one of `count` equal parts as that of all."""
    return lambda done, total: progress(what, number * total + done, count * total)


def score_rows(inference: InferenceModel, data: EvalRows, report: Callable[[int, int], None]) -> dict[str, Measured]:
    """Loss and token accuracy by row, weighted by the supervised tokens, so that the means are those that a run reports.

    Where memory runs out, this and later micro-batches have fewer tokens. `report` is called with the rows done and their number.
    ModelError where a single row does not fit.
    """
    plan = MicroBatchPlan(
        max_tokens=MICRO_BATCH_TOKENS,
        max_rows=GROUP_ROWS,
        packing=data.packing,
        longrope_boundary=inference.longrope_boundary,
    )
    scores = np.zeros((len(data.rows), 3))
    done = 0
    while done < len(data.rows):
        rows = [data.rows[number] for number in range(done, min(done + GROUP_ROWS, len(data.rows)))]
        batch, found = collate(rows, plan), list[Tensor]()

        def objective(model: nn.Module, micro_batch: Mapping[str, Any], _: int, found: list[Tensor] = found) -> ObjectiveOutput:
            found.append(_score_micro_batch(model, micro_batch))
            return ObjectiveOutput(loss=found[-1][:, 0].sum(), metrics={})

        try:
            list(evaluate(inference.model, [batch], objective=objective, compute_dtype=inference.dtype))
        except MicroBatchMemoryError as error:
            failed, reason = batch.row_indices[error.micro_batch], error.reason
        else:
            for indices, each in zip(batch.row_indices, found, strict=True):
                scores[[done + index for index in indices]] = each[: len(indices)].cpu().numpy()
            done += len(rows)
            report(done, len(data.rows))
            continue
        # Here the error is released, and with it every tensor that its traceback held.
        lengths = [len(rows[index]["input_ids"]) for index in failed]
        plan = _smaller_plan(plan, lengths, reason)
    nll, correct, tokens = scores.T
    return {"loss": (nll, tokens), "token_accuracy": (correct, tokens)}


def _smaller_plan(plan: MicroBatchPlan, lengths: Sequence[int], reason: str) -> MicroBatchPlan:
    if len(lengths) == 1:
        raise ModelError(f"A row of {lengths[0]:,} tokens does not fit in memory: {reason}.", MEMORY_HINT)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return split_plan(plan, lengths)


def _score_micro_batch(model: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor:
    """Summed negative log-likelihood, correct tokens and supervised tokens of each row, (rows, 3) float64; the padding of a
    packed micro-batch may be a last row of zeros.
    """
    base, labels = find_base(model), micro_batch["labels"]
    rows = torch.split(labels[0], micro_batch["document_lengths"]) if "document_lengths" in micro_batch else labels
    counts = [int((row != IGNORE_INDEX).sum()) for row in rows]
    hidden, targets = compute_supervised(model, micro_batch)
    scores = []
    for of_row, wanted in zip(torch.split(hidden, counts), torch.split(targets, counts), strict=True):
        nll, correct = tiled_cross_entropy(of_row, base.head_weight, wanted, normalizer=1, tile_bytes=base.logits_tile_bytes)
        scores.append(torch.stack([nll.double(), correct.double()]))
    return torch.cat([torch.stack(scores), torch.tensor(counts, device=labels.device)[:, None]], dim=1)


def choose_questions(inference: InferenceModel, rows: Any, settings: EvalSettings) -> list[Question]:
    """Up to `settings.rows` rows, drawn with its seed, each up to its first answer.

    Rows without a prompt (raw text), and rows whose answer was cut at max_length, are passed over.
    """
    questions: list[Question] = []
    for number in np.random.default_rng(settings.seed).permutation(len(rows)):
        if len(questions) >= settings.rows:
            break
        ids, labels = rows[int(number)]["input_ids"], np.asarray(rows[int(number)]["labels"])
        supervised = np.append(labels != IGNORE_INDEX, False)
        start = int(supervised[1:].argmax()) + 1
        end = start + int((~supervised[start:]).argmax())
        if start > 1 and (end < len(ids) or ids[-1] in inference.stop_ids):
            questions.append(Question(list(ids[:start]), _decode(inference, ids[start:end])))
    return questions


def _decode(inference: InferenceModel, ids: Sequence[int]) -> str:
    return str(inference.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def answer_questions(
    inference: InferenceModel, questions: Sequence[Question], settings: EvalSettings, report: Callable[[int, int], None]
) -> list[list[int]]:
    """The ids of an answer to each question; questions of similar length are answered at once, the longest first.

    As many share a batch as have room for their caches (`_cache_tokens`); where memory runs out nevertheless, half as many.
    `report` is called with the questions answered, in part too, and their number. ModelError where one alone does not fit.
    """
    torch.manual_seed(settings.seed)
    order = sorted(range(len(questions)), key=lambda number: -len(questions[number].ids))
    answers: list[list[int]] = [[] for _ in questions]
    budget, most, done = _cache_tokens(inference), BATCH_PROMPTS, 0
    while done < len(order):
        longest = len(questions[order[done]].ids) + settings.max_new_tokens
        batch = order[done : done + max(1, min(most, budget // longest))]
        prompts = [questions[number].ids for number in batch]
        limits = [min(settings.max_new_tokens, inference.max_positions - len(ids)) for ids in prompts]

        def after_token(new_ids: Tensor, done: int = done, size: int = len(batch)) -> bool:
            report(done + min(size * new_ids.shape[1] // settings.max_new_tokens, size - 1), len(order))
            return False

        try:
            new_ids = generate_batch(inference, prompts, limits, sampling=settings.sampling, after_token=after_token)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise ModelError(
                    f"An answer to {len(prompts[0]):,} tokens does not fit in memory: {first_line(error)}.", MEMORY_HINT
                ) from error
            most = len(batch) // 2
        else:
            for number, ids in zip(batch, new_ids, strict=True):
                answers[number] = ids
            done += len(batch)
            report(done, len(order))
    return answers


def _cache_tokens(inference: InferenceModel) -> int:
    """Tokens whose keys and values fit in `CACHE_SHARE` of the memory that is free; the rest is for activations and logits."""
    config, device = find_base(inference.model).config, inference.model.device
    head_size = config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * inference.dtype.itemsize
    free: int = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(CACHE_SHARE * free / token_bytes)


def score_answers(
    inference: InferenceModel, questions: Sequence[Question], answers: Sequence[Sequence[int]]
) -> tuple[dict[str, Measured], list[str]]:
    """Compare answers, as ids, with the references, without white space around either.

    Returns:
        By row: exact match and whether it ended by itself, 0 or 1; ROUGE, F x 100 with a stemmer; tokens without the stop id.
        And the answers as text.
    """
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    scorer, texts, rows = RougeScorer(list(ROUGE), use_stemmer=True), list[str](), list[list[float]]()
    for question, ids in zip(questions, answers, strict=True):
        text, ended = _decode(inference, ids), ids[-1] in inference.stop_ids
        found = scorer.score(question.reference, text)
        rows.append([text == question.reference, *(100 * found[name].fmeasure for name in ROUGE), ended, len(ids) - ended])
        texts.append(text)
    names, weights = ("exact_match", *ROUGE, "ended_by_itself", "answer_tokens"), np.ones(len(rows))
    return {name: (column, weights) for name, column in zip(names, np.array(rows, dtype=float).T, strict=True)}, texts


def compare(base: Mapping[str, Measured], tuned: Mapping[str, Measured], seed: int) -> dict[str, dict[str, float | None]]:
    """The mean of each figure for both models, the difference tuned - base, and its 95 % interval; and the perplexities."""
    metrics: dict[str, dict[str, float | None]] = {}
    for name, (values, weights) in tuned.items():
        before, after = (float(each.sum() / weights.sum()) for each in (base[name][0], values))
        low, high = bootstrap_interval(values - base[name][0], weights, seed)
        metrics[name] = {"base": before, "tuned": after, "difference": after - before, "low": low, "high": high}
        if name == "loss":
            before, after = (math.exp(min(loss, 700)) for loss in (before, after))
            metrics["perplexity"] = {"base": before, "tuned": after, "difference": after - before, "low": None, "high": None}
    return metrics


def bootstrap_interval(differences: NDArray[np.float64], weights: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """The 95 % interval of sum(differences) / sum(weights) by the paired bootstrap: rows are drawn again, with replacement.

    Args:
        differences: of each row's sum, tuned - base.
        weights: of each row, such as its supervised tokens.
    """
    generator, count = np.random.default_rng(seed), len(differences)
    means = np.empty(RESAMPLES)
    for sample in range(RESAMPLES):
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        means[sample] = (times @ differences) / (times @ weights)
    low, high = np.percentile(means, PERCENTILES)
    return float(low), float(high)


def judge(metrics: Mapping[str, Mapping[str, Any]], *, has_adapter: bool) -> str:
    """The result in one line. The loss and ROUGE-L decide, each where its interval has no zero in it."""
    loss, rouge, ends = metrics["loss"], metrics.get("rougeL"), metrics.get("ended_by_itself")
    ended = f"; {ends['tuned']:.0%} of the answers end by themselves" if ends else ""
    if not has_adapter:
        return f"No adapter, so base = tuned: loss {loss['tuned']:.2f}{ended}."
    is_better = loss["high"] < 0 or (rouge is not None and rouge["low"] > 0)
    is_worse = loss["low"] > 0 or (rouge is not None and rouge["high"] < 0)
    word = ("Mixed" if is_worse else "Better") if is_better else "Worse" if is_worse else "No clear difference"
    answers = f"; ROUGE-L {rouge['difference']:+.1f} ({rouge['low']:+.1f} to {rouge['high']:+.1f})" if rouge else ""
    return f"{word}: held-out loss {loss['tuned']:.2f} against {loss['base']:.2f}{answers}{ended}."
