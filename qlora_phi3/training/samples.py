"""Held-out prompts that the base and the tuned model answer at the end of a run: samples.json.

The run is complete and on the disk before this starts, and nothing here makes it fail: Ctrl-C, memory that runs out, or an
estimate of too much time ends it.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel

from qlora_phi3.errors import ModelError, RunError
from qlora_phi3.evaluation import EvalSettings, answer_questions, choose_questions, describe_unanswered, for_each_side
from qlora_phi3.files import atomic_write, foreign_errors
from qlora_phi3.inference import GREEDY, InferenceModel, decode, stop_ids
from qlora_phi3.reporter import Progress
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.step import evaluating
from qlora_phi3.training.prepare import RunContext
from qlora_phi3.units import format_duration

#: New tokens of an answer.
MAX_NEW_TOKENS = 128
#: The answers may take so many seconds, or this share of the run if that is more. The estimate begins after so many answers.
ALLOWED_SECONDS, ALLOWED_SHARE, FIRST_ANSWERS = 60.0, 0.05, 2
PROGRESS = "Answering held-out prompts"


def save_samples(model: PeftModel, context: RunContext, folder: RunFolder, run_seconds: float) -> None:
    """Write samples.json: held-out prompts, answered greedily by the base and by the tuned model; or why there are
    none or few, which the reporter shows as well. Nothing is written where no samples are wanted, or nothing is held out.
    """
    rows, count, reporter = context.data.evaluation, context.recipe.training.report_samples, context.reporter
    if rows is None or not count:
        return
    reporter.progress(PROGRESS, 0, None)
    saved: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "samples": []}
    show = reporter.info
    try:
        with foreign_errors(RunError, "Held-out prompts are not answered: {reason}.", "The run itself is complete."):
            saved |= _answer_with_both(model, context, max(ALLOWED_SECONDS, ALLOWED_SHARE * run_seconds))
    except KeyboardInterrupt:
        show, saved["reason"] = reporter.warning, "Ctrl-C: held-out prompts are not answered. The run itself is complete."
    except (RunError, ModelError) as error:
        show, saved["reason"] = reporter.warning, str(error)
    finally:
        reporter.progress(PROGRESS, 1, 1)
    if reason := saved.get("reason"):
        show(reason)
    atomic_write(folder.samples, json.dumps(saved, ensure_ascii=False))


def limit_seconds(allowed_seconds: float, progress: Progress) -> Callable[[float, int], None]:
    """A function to call with the number of answers done, and of all; it raises RunError once they will take too many seconds."""
    started = time.perf_counter()

    def report(done: float, total: int) -> None:
        seconds = (time.perf_counter() - started) * total / max(1, done)
        if done >= FIRST_ANSWERS and seconds > allowed_seconds:
            raise RunError(
                f"Held-out prompts are not answered, as it would take {format_duration(seconds)}: the report has no answers.",
                "The run itself is complete; with a smaller [training] report_samples it takes less.",
            )
        progress(PROGRESS, min(done, total - 0.01), total)

    return report


def _answer_with_both(model: PeftModel, context: RunContext, allowed_seconds: float) -> dict[str, Any]:
    """The prompts for samples.json, and why they are few. ModelError where one alone does not fit, RunError if too slow."""
    recipe, tokenizer = context.recipe.training, context.tokenizer
    stops = stop_ids(model.generation_config.eos_token_id, int(tokenizer.convert_tokens_to_ids(context.template.end_of_turn)))
    inference = InferenceModel(model, tokenizer, stops, context.recipe.data.chat_template)
    settings = EvalSettings(rows=recipe.report_samples, max_new_tokens=MAX_NEW_TOKENS, sampling=GREEDY, seed=recipe.seed)
    held_out = context.data.evaluation or []
    questions = choose_questions(inference, held_out, settings)
    if context.device.type == "cuda":
        torch.cuda.empty_cache()  # what the training had reserved is free for answers
    with evaluating(model):
        report = limit_seconds(allowed_seconds, context.reporter.progress)
        answers = for_each_side(model, partial(answer_questions, inference, questions, settings), report)
    samples = []
    for number, (prompt, expected) in enumerate(questions):
        sample: dict[str, Any] = {"prompt": decode(inference, prompt).strip(), "expected": expected}
        for side in answers:
            ids = answers[side][number]
            ended = ids[-1] in stops
            sample[side] = {"text": decode(inference, ids).strip(), "tokens": len(ids) - ended, "ended": ended}
        samples.append(sample)
    few = describe_unanswered(len(samples), len(held_out), settings)
    return {"samples": samples, **({"reason": f"Held-out prompts: {few}"} if few else {})}
