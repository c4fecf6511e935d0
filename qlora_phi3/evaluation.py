"""Compare a trained model with its base on rows that it was not trained on: loss, token accuracy, and the answers it generates.

The base is the same model with its adapter disabled. Every figure is kept by row, so that the interval of a difference comes
from pairs: both models on the same row.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from qlora_phi3.data.prepare import PreparedData, prepare_datasets
from qlora_phi3.data.report import FEW_ROWS
from qlora_phi3.data.sources import open_local
from qlora_phi3.data.template import choose_template
from qlora_phi3.errors import DataError, ModelError, RunError, first_line, is_out_of_memory
from qlora_phi3.execution import IGNORE_INDEX, MicroBatchPlan
from qlora_phi3.inference import InferenceModel, decode, generate_batch
from qlora_phi3.model.loss import tiled_cross_entropy
from qlora_phi3.model.phi3 import find_base
from qlora_phi3.objectives import ObjectiveOutput, compute_supervised
from qlora_phi3.recipe.load import is_local_data, load_recipe
from qlora_phi3.recipe.schema import Data
from qlora_phi3.reporter import Progress
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.step import MicroBatchMemoryError, collate, evaluate
from qlora_phi3.units import format_count, format_percent

#: Rows that are read at once, and tokens that are computed at once: training the same rows takes more memory.
GROUP_ROWS, MICRO_BATCH_TOKENS = 16, 1024
#: Prompts that are answered at once, at most, and the share of the free memory that their keys and values may take.
BATCH_PROMPTS, CACHE_SHARE = 64, 0.5
#: Resamples of an interval, and its percentiles.
RESAMPLES, PERCENTILES = 2000, (2.5, 97.5)
#: Rows, or answers, of which there is an interval: the bootstrap of fewer is too narrow.
LEAST_ROWS = 20
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
MEMORY_HINT = "Close other programs that use the memory."

Result = TypeVar("Result")
#: One figure of every row, and the weight of each row in the mean; float64 of shape (rows,) both.
Measured = tuple[NDArray[np.float64], NDArray[np.float64]]
#: The ids of a conversation up to its first answer, and that answer as the row has it.
Question = tuple[list[int], str]
#: Called with the rows done, the one that is being answered in part, and their number.
Report = Callable[[float, int], None]


@dataclass(frozen=True, slots=True)
class EvalRows:
    """Tokenized rows to evaluate on, each with `input_ids` and `labels`; and what the reader must know about them."""

    rows: Any
    name: str
    sha256: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """What is generated: `rows` answers at most, 0 for none; `seed` chooses the rows, draws tokens, and resamples."""

    rows: int
    max_new_tokens: int
    sampling: Mapping[str, Any]
    seed: int


def read_own_rows(inference: InferenceModel, run: RunFolder, progress: Progress) -> EvalRows:
    """The rows that a run evaluated on, read and split again; where its data are gone, those that it keeps for its exports.
    RunError where it held none out or has no report, DataError where its data cannot be read and it kept no rows.
    """
    recipe, recorded = load_recipe(run.recipe), str(run.read_report().get("data", {}).get("sha256"))
    if not recipe.training.do_eval:
        message = f"{run.path} held no rows out of its data ([training] do_eval = false)."
        raise RunError(message, "Name rows to evaluate on: --data FILE")
    try:
        prepared = _prepare(inference, recipe.data, recipe.training.max_length, progress, evaluate=True)
    except DataError as error:
        if not run.held_out.is_file():
            raise
        rows = [json.loads(line) for line in run.held_out.read_text(encoding="utf-8").splitlines()]
        note = f"The run's data cannot be read, and these are only the rows that it kept for its exports. {error.message}"
        return EvalRows(rows, run.held_out.name, notes=(note,))
    now = prepared.report.sha256
    note = f"The data changed since the run (sha256 {recorded[:12]} -> {now[:12]}): these may not be the rows that it held out."
    return EvalRows(prepared.evaluation, "held-out rows", now, () if now == recorded else (note,))


def read_other_rows(inference: InferenceModel, run: RunFolder | None, name: str, progress: Progress) -> EvalRows:
    """The rows of a file, or of a data set of the hub, in any format; in that of the run's recipe where it maps columns
    ([data] fields) that the first row has. DataError where they cannot be read, or none of them can be evaluated on.
    """
    data, max_length = Data(train=name), inference.max_positions
    if run is not None:
        recipe = load_recipe(run.recipe)
        changes: dict[str, Any] = {"train": name, "eval": None, "max_rows": None}
        if not _has_columns(name, recipe.data.fields.values()):
            changes |= {"fields": {}, "format": "auto"}
        data, max_length = recipe.data.model_copy(update=changes), recipe.training.max_length
    prepared = _prepare(inference, data, max_length, progress, evaluate=False)
    report = prepared.report
    left_out = report.rows_read - report.rows_kept
    notes = [f"{left_out:,} of {report.rows_read:,} rows are left out."] if left_out else []
    if report.truncated:
        notes.append(f"{report.truncated:,} of {report.rows_read:,} rows are cut at {max_length:,} tokens.")
    return EvalRows(prepared.train, name, report.sha256, notes=tuple(notes))


def _has_columns(name: str, columns: Iterable[str]) -> bool:
    """Whether the first row of a file has one of these columns; of the hub none is read, and it is True."""
    if not (wanted := set(columns)) or not is_local_data(name, Path()):
        return bool(wanted)
    rows = (row for source in open_local(name, Path()) for _, row in source.rows())
    return any(not wanted.isdisjoint(row) for row in islice(filter(lambda row: isinstance(row, Mapping), rows), 1))


def _prepare(inference: InferenceModel, data: Data, max_length: int, progress: Progress, *, evaluate: bool) -> PreparedData:
    tokenizer = inference.tokenizer
    options = {"tokenizer": tokenizer, "template": choose_template(tokenizer, inference.chat_template), "base_dir": Path()}
    return prepare_datasets(data, max_length=max_length, evaluate=evaluate, progress=progress, **options)


def evaluate_model(inference: InferenceModel, data: EvalRows, settings: EvalSettings, *, progress: Progress) -> dict[str, Any]:
    """Evaluate a model and, if it has an adapter, its base. ModelError where memory ran out in the smallest batch too.

    Returns:
        For JSON: `metrics`, a mapping of each figure's name to `base`, `tuned`, `difference`, and the ends `low` and `high` of
        its 95 % interval (None where there is none); `verdict` in one line; `answers`; and what was evaluated on, and how.
        Without an adapter base and tuned are the same figures.
    """
    model, notes = inference.model, list(data.notes)
    questions = choose_questions(inference, data.rows, settings)
    progress("Measuring the loss", 0, None)
    measured = for_each_side(model, partial(score_rows, inference, data), partial(progress, "Measuring the loss"))
    answers: dict[str, list[list[int]]] = {}
    if questions:
        progress("Answering", 0, None)
        answers = for_each_side(model, partial(answer_questions, inference, questions, settings), partial(progress, "Answering"))
    for side in answers:
        measured[side] |= score_answers(inference, questions, answers[side])
    shown = []
    for number, (ids, reference) in enumerate(questions):
        texts = {side: decode(inference, answers[side][number]).strip() for side in answers}
        shown.append({"prompt": str(inference.tokenizer.decode(ids)), "reference": reference, **texts})
    has_adapter = "base" in measured
    if len(data.rows) < FEW_ROWS:
        notes.append("With so few rows these are rough figures.")
    if line := describe_unanswered(len(questions), len(data.rows), settings):
        notes.append(line)
    empty = sum(not row["tuned"] for row in shown)
    if empty:
        notes.append(f"{empty} of {len(shown)} answers are empty: the model ends its turn at once.")
    same = sum(row["base"] == row["tuned"] for row in shown) if has_adapter else 0
    if 2 * same > len(shown):
        notes.append(
            f"{same} of {len(shown)} answers are the base's, word for word: train longer, or with a larger learning_rate."
        )
    metrics = compare(measured.get("base", measured["tuned"]), measured["tuned"], settings.seed)
    is_same, is_empty = 0 < same == len(shown), 2 * empty > len(shown)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": judge(metrics, has_adapter=has_adapter, same_answers=is_same, mostly_empty=is_empty),
        "has_adapter": has_adapter,
        "data": {"name": data.name, "sha256": data.sha256, "rows": len(data.rows), "questions": len(questions), "notes": notes},
        "settings": asdict(settings),
        "metrics": metrics,
        "answers": shown,
    }


def for_each_side(model: Any, work: Callable[[Report], Result], report: Report) -> dict[str, Result]:
    """What `work` returns for the base, which is the model with its adapter disabled, and for the tuned model; for a model
    without an adapter as "tuned" alone. `report` counts the rows of both.
    """
    sides = ("base", "tuned") if isinstance(model, PeftModel) else ("tuned",)
    results: dict[str, Result] = {}
    for number, side in enumerate(sides):

        def report_both(done: float, total: int, before: int = number) -> None:
            report(before * total + done, len(sides) * total)

        with model.disable_adapter() if side == "base" else nullcontext():
            results[side] = work(report_both)
    return results


def score_rows(inference: InferenceModel, data: EvalRows, report: Report) -> dict[str, Measured]:
    """Loss and token accuracy by row, weighted by the supervised tokens, so that the means are those that a run reports.
    ModelError where memory runs out.
    """
    boundary, count = inference.longrope_boundary, len(data.rows)
    plan = MicroBatchPlan(max_tokens=MICRO_BATCH_TOKENS, max_rows=GROUP_ROWS, packing=True, longrope_boundary=boundary)
    groups = [range(start, min(start + GROUP_ROWS, count)) for start in range(0, count, GROUP_ROWS)]
    batches = (collate([data.rows[row] for row in group], plan) for group in groups)
    scores, found = np.empty((count, 3)), list[list[list[float]]]()

    def objective(model: nn.Module, micro_batch: Mapping[str, Any], _: int) -> ObjectiveOutput:
        labels, head = torch.split(micro_batch["labels"][0], micro_batch["document_lengths"]), find_base(model).head_weight
        counts = [int((row != IGNORE_INDEX).sum()) for row in labels]
        by_row = zip(*(torch.split(part, counts) for part in compute_supervised(model, micro_batch)), strict=True)
        sums = [tiled_cross_entropy(hidden, head, targets, normalizer=1) for hidden, targets in by_row]
        found.append([[float(nll), float(correct), tokens] for (nll, correct), tokens in zip(sums, counts, strict=True)])
        return ObjectiveOutput(loss=head.new_zeros(()), metrics={})

    try:
        results = evaluate(inference.model, batches, objective=objective, compute_dtype=inference.dtype)
        for group, (batch, _) in zip(groups, results, strict=True):
            for indices, sums in zip(batch.row_indices, found, strict=True):  # sums may end with the padding's
                scores[[group[index] for index in indices]] = sums[: len(indices)]
            found.clear()
            report(group.stop, count)
    except MicroBatchMemoryError as error:
        raise ModelError(f"Memory ran out while the loss was measured: {error.reason}.", MEMORY_HINT) from error
    nll, correct, weights = scores.T
    return {"loss": (nll, weights), "token_accuracy": (correct, weights)}


def choose_questions(inference: InferenceModel, rows: Any, settings: EvalSettings) -> list[Question]:
    """Up to `settings.rows` rows, drawn with its seed, each up to its first answer. Rows without a prompt (raw text), and rows
    whose answer was cut at max_length, are left out.
    """
    questions: list[Question] = []
    for number in np.random.default_rng(settings.seed).permutation(len(rows)) if settings.rows else ():
        ids, labels = (rows[int(number)][name] for name in ("input_ids", "labels"))
        supervised = np.append(np.asarray(labels[1:]) != IGNORE_INDEX, False)
        start = 1 + int(supervised.argmax())
        end = start + int((~supervised[start - 1 :]).argmax())
        if start > 1 and (end < len(ids) or ids[-1] in inference.stop_ids):
            questions.append((list(ids[:start]), decode(inference, ids[start:end]).strip()))
        if len(questions) == settings.rows:
            break
    return questions


def describe_unanswered(num_questions: int, num_rows: int, settings: EvalSettings) -> str | None:
    """Why fewer rows are answered than the settings want; None where they are not fewer."""
    if num_questions >= min(settings.rows, num_rows):
        return None
    return (
        f"{num_questions} of {format_count(num_rows, 'row')} can be answered: "
        "the answer of the others is cut at max_length, or they have no prompt."
    )


def answer_questions(
    inference: InferenceModel, questions: Sequence[Question], settings: EvalSettings, report: Report
) -> list[list[int]]:
    """The ids of an answer to each question; questions of similar length share a batch, the longest come first.

    As many share one as have room for their keys and values (`_cache_tokens`); where memory runs out nevertheless, half as many.
    `report` counts answers in part. ModelError where one alone does not fit.
    """
    torch.manual_seed(settings.seed)
    order = sorted(range(len(questions)), key=lambda number: -len(questions[number][0]))
    answers: list[list[int]] = [[] for _ in questions]
    budget, most, done, limit = _cache_tokens(inference), BATCH_PROMPTS, 0, settings.max_new_tokens
    expected = limit  # tokens of the longest answer of a batch: the limit, and then as many as the batch before it had
    while done < len(order):
        batch = order[done:][: max(1, min(most, budget // (len(questions[order[done]][0]) + limit)))]
        prompts = [questions[number][0] for number in batch]
        limits = [min(limit, inference.max_positions - len(ids)) for ids in prompts]

        def after_token(new_ids: Tensor, done: int = done, size: int = len(batch), expected: int = expected) -> None:
            report(done + size * min(new_ids.shape[1] / expected, 0.99), len(order))

        try:
            new_ids = generate_batch(inference, prompts, limits, sampling=settings.sampling, after_token=after_token)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                message = f"Memory ran out in the answer to a prompt of {len(prompts[0]):,} tokens: {first_line(error)}."
                raise ModelError(message, MEMORY_HINT) from error
            most = len(batch) // 2
            continue
        for number, ids in zip(batch, new_ids, strict=True):
            answers[number] = ids
        done, expected = done + len(batch), max(map(len, new_ids))
        report(done, len(order))
    return answers


def _cache_tokens(inference: InferenceModel) -> int:
    """Tokens whose keys and values fit in `CACHE_SHARE` of the memory that is free; the rest is for activations and logits."""
    config, device = find_base(inference.model).config, inference.model.device
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    free: int = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(CACHE_SHARE * free / (2 * config.num_hidden_layers * width * inference.dtype.itemsize))


def score_answers(inference: InferenceModel, questions: Sequence[Question], answers: Sequence[list[int]]) -> dict[str, Measured]:
    """Compare answers, as ids, with the references, without white space around either. By row: exact match and whether it ended
    by itself, 0 or 1; ROUGE, F x 100 with a stemmer; tokens without the stop id.
    """
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    scorer, rows = RougeScorer(list(ROUGE), use_stemmer=True), list[list[float]]()
    for (_, reference), ids in zip(questions, answers, strict=True):
        text, ended = decode(inference, ids).strip(), ids[-1] in inference.stop_ids
        found = scorer.score(reference, text)
        rows.append([text == reference, *(100 * found[name].fmeasure for name in ROUGE), ended, len(ids) - ended])
    names, weights = ("exact_match", *ROUGE, "ended_by_itself", "answer_tokens"), np.ones(len(rows))
    return {name: (column, weights) for name, column in zip(names, np.array(rows, dtype=float).T, strict=True)}


def compare(base: Mapping[str, Measured], tuned: Mapping[str, Measured], seed: int) -> dict[str, dict[str, float | None]]:
    """The mean of each figure for both models, the difference tuned - base, and its 95 % interval; and the perplexities.

    Fewer than `LEAST_ROWS` rows have no interval.
    """
    metrics: dict[str, dict[str, float | None]] = {}
    for name, (values, weights) in tuned.items():
        before, after = (float(each.sum() / weights.sum()) for each in (base[name][0], values))
        is_enough = len(values) >= LEAST_ROWS
        low, high = bootstrap_interval(values - base[name][0], weights, seed) if is_enough else (None, None)
        metrics[name] = {"base": before, "tuned": after, "difference": after - before, "low": low, "high": high}
        if name == "loss":
            before, after = (math.exp(min(loss, 700)) for loss in (before, after))
            metrics["perplexity"] = {"base": before, "tuned": after, "difference": after - before, "low": None, "high": None}
    return metrics


def bootstrap_interval(differences: NDArray[np.float64], weights: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """The 95 % interval of sum(differences) / sum(weights) by the paired bootstrap: rows are drawn again, with replacement.

    `differences` are those of each row's sum, tuned - base; `weights` of each row, such as its supervised tokens.
    """
    generator, count, means = np.random.default_rng(seed), len(differences), np.empty(RESAMPLES)
    for sample in range(RESAMPLES):
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        means[sample] = (times @ differences) / (times @ weights)
    low, high = np.percentile(means, PERCENTILES)
    return float(low), float(high)


def judge(
    metrics: Mapping[str, Mapping[str, Any]], *, has_adapter: bool, same_answers: bool = False, mostly_empty: bool = False
) -> str:
    """The result in one line. Loss and ROUGE-L decide, each where its interval has no zero, unless all answers are the base's, or
    most are empty.
    """
    loss, rouge, ends = metrics["loss"], metrics.get("rougeL"), metrics.get("ended_by_itself")
    ended = f"; {format_percent(ends['tuned'])} of the answers end by themselves" if ends else ""
    if not has_adapter:
        return f"No adapter, so base = tuned: loss {loss['tuned']:.2f}{ended}."
    if (rouge or loss)["low"] is None:
        word = f"Too few {'answers' if rouge else 'rows'} for a verdict ({LEAST_ROWS} are needed)"
    else:
        is_better = loss["high"] < 0 or (rouge is not None and rouge["low"] > 0)
        is_worse = loss["low"] > 0 or (rouge is not None and rouge["high"] < 0)
        word = ("Mixed" if is_worse else "Better") if is_better else "Worse" if is_worse else "No clear difference"
    word = "The same answers as the base's" if same_answers else "Most answers are empty" if mostly_empty else word
    answers = f"; ROUGE-L {rouge['difference']:+.1f}" if rouge else ""
    answers += f" ({rouge['low']:+.1f} to {rouge['high']:+.1f})" if rouge and rouge["low"] is not None else ""
    answers = "; ROUGE-L the same in every row" if rouge and rouge["low"] == rouge["high"] == 0 else answers
    return f"{word}: held-out loss {loss['tuned']:.2f} against {loss['base']:.2f}{answers}{ended}."
