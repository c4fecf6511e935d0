"""Held-out prompts that the base and the tuned model answer at the end of a run: samples.json.

The run is complete and on the disk before this starts, and nothing here makes it fail: where memory runs out the batches are
halved, and Ctrl-C or an estimate of too much time ends it.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qlora_phi3.errors import RunError, is_out_of_memory
from qlora_phi3.execution import IGNORE_INDEX
from qlora_phi3.files import atomic_write, foreign_errors
from qlora_phi3.inference import GREEDY, stop_ids
from qlora_phi3.reporter import Progress
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.step import evaluating
from qlora_phi3.training.prepare import RunContext
from qlora_phi3.training.report import row_name
from qlora_phi3.units import format_duration

#: New tokens of an answer, and tokens of a prompt; rows with a longer prompt are passed over.
MAX_NEW_TOKENS, MAX_PROMPT_TOKENS = 128, 512
#: A row that is learned from its first token on, as raw text is, is continued from its half, or from so many tokens.
TEXT_TOKENS = 64
#: Tokens in the cache of one batch, prompts and answers; Phi-3-mini's take 384 KiB each in 16 bit.
CACHED_TOKENS = 2048
#: The answers may take so many seconds, or this share of the run if that is more. The estimate begins after FIRST_TOKENS.
ALLOWED_SECONDS, ALLOWED_SHARE, FIRST_TOKENS = 60.0, 0.05, 8
PROGRESS = "Answering held-out prompts"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A held-out row up to its first supervised token; `expected` are the row's own tokens after it."""

    row: str
    ids: list[int]
    expected: list[int]


def save_samples(model: PeftModel, context: RunContext, folder: RunFolder, run_seconds: float) -> None:
    """Write samples.json: held-out prompts, answered greedily by the base and by the tuned model.

    Where there is none, the reporter says why, unless the recipe wants no samples or nothing is held out.
    """
    prompts, reporter = choose_prompts(context, context.recipe.training.report_samples), context.reporter
    if not prompts:
        return
    allowed_seconds = max(ALLOWED_SECONDS, ALLOWED_SHARE * run_seconds)
    reporter.progress(PROGRESS, 0, None)
    try:
        with foreign_errors(RunError, "Held-out prompts are not answered: {reason}.", "The run itself is complete."):
            samples = _answer_with_both(model, context, prompts, allowed_seconds)
        atomic_write(folder.samples, json.dumps({"max_new_tokens": MAX_NEW_TOKENS, "samples": samples}, ensure_ascii=False))
    except KeyboardInterrupt:
        reporter.warning("Ctrl-C: held-out prompts are not answered. The run itself is complete.")
    except MemoryError:
        reporter.warning("Held-out prompts are not answered: memory ran out. The run itself is complete.")
    except RunError as error:
        reporter.warning(str(error))
    finally:
        reporter.progress(PROGRESS, 1, 1)


def choose_prompts(context: RunContext, count: int) -> list[Prompt]:
    """The first `count` held-out rows whose prompt is short enough, in the order of the rows."""
    prompts: list[Prompt] = []
    rows: Any = context.data.evaluation if context.data.evaluation is not None and count else ()
    for index in range(len(rows)):
        ids, supervised = rows[index]["input_ids"], [*(label != IGNORE_INDEX for label in rows[index]["labels"]), False]
        start = supervised.index(True)
        end = min(supervised.index(False, start), start + MAX_NEW_TOKENS)
        if start == 1:
            start = min(TEXT_TOKENS, max(1, len(ids) // 2))
        if start <= MAX_PROMPT_TOKENS:
            name = row_name(rows[index], context.data.report.sources)
            prompts.append(Prompt(name, list(ids[:start]), list(ids[start:end])))
        if len(prompts) == count:
            break
    return prompts


def limit_seconds(allowed_seconds: float, total: int, progress: Progress) -> Callable[[int], None]:
    """A function to call with the number of tokens done, of `total`; it raises RunError once they will take too many seconds."""
    started, first = time.perf_counter(), [0.0]

    def count(done: int) -> None:
        now = time.perf_counter()
        if done == 1:  # it takes longer than the others, as the prompts are read
            first[0] = now
        seconds = now - started + (total - done) * (now - first[0]) / max(1, done - 1)
        if done >= FIRST_TOKENS and seconds > allowed_seconds:
            raise RunError(
                f"Held-out prompts are not answered, as it would take {format_duration(seconds)}.",
                "The run itself is complete; with a smaller [training] report_samples it takes less.",
            )
        progress(PROGRESS, min(done, total - 1), total)

    return count


def _answer_with_both(
    model: PeftModel, context: RunContext, prompts: Sequence[Prompt], allowed_seconds: float
) -> list[dict[str, Any]]:
    """What samples.json holds of each prompt. MemoryError where one row does not fit, RunError where it takes too long."""
    tokenizer = context.tokenizer
    stops = stop_ids(model.generation_config.eos_token_id, int(tokenizer.convert_tokens_to_ids(context.template.end_of_turn)))
    rows = max(1, CACHED_TOKENS // (MAX_NEW_TOKENS + max(len(prompt.ids) for prompt in prompts)))
    answers: list[list[list[int]]] = []
    while len(answers) < 2:
        batches, answers = [prompts[at : at + rows] for at in range(0, len(prompts), rows)], []
        count = limit_seconds(allowed_seconds, 2 * len(batches) * MAX_NEW_TOKENS, context.reporter.progress)
        try:
            for number, adapter in enumerate((model.disable_adapter, nullcontext)):
                before = [(number * len(batches) + index) * MAX_NEW_TOKENS for index in range(len(batches))]
                with adapter(), evaluating(model):
                    each = [
                        _answer(model, context, batch, stops, count, done) for batch, done in zip(batches, before, strict=True)
                    ]
                answers.append([ids for batch in each for ids in batch])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or rows == 1:
                raise MemoryError if is_out_of_memory(error) else error from None
            rows //= 2
        if context.device.type == "cuda":
            torch.cuda.empty_cache()

    def as_text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    samples = []
    for prompt, *both in zip(prompts, *answers, strict=True):
        base, tuned = ({"text": as_text(ids), "tokens": len(ids), "ended": ids[-1] in stops} for ids in both)
        texts = {"row": prompt.row, "prompt": as_text(prompt.ids), "expected": as_text(prompt.expected)}
        samples.append({**texts, "base": base, "tuned": tuned})
    return samples


def _answer(
    model: PeftModel, context: RunContext, batch: Sequence[Prompt], stops: Sequence[int], count: Callable[[int], None], done: int
) -> list[list[int]]:
    """The new ids of each prompt up to its first stop id, which is included. `done` is for `count`: tokens of earlier batches."""
    start = max(len(prompt.ids) for prompt in batch)
    ids = torch.tensor([[stops[0]] * (start - len(prompt.ids)) + prompt.ids for prompt in batch], device=context.device)
    mask = torch.tensor([[0] * (start - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch], device=context.device)

    def after_token(all_ids: Tensor, _: Tensor, **__: Any) -> Tensor:
        count(done + all_ids.shape[1] - start)
        return torch.zeros(len(batch), dtype=torch.bool, device=all_ids.device)

    dtype = context.precision.compute_dtype
    with torch.no_grad(), torch.autocast(context.device.type, dtype=dtype, enabled=dtype != torch.float32):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **GREEDY,
            use_cache=True,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=list(stops),
            pad_token_id=stops[0],
            stopping_criteria=[after_token],
        )
    ends = [next((at for at, token in enumerate(new, 1) if token in stops), None) for new in output[:, start:].tolist()]
    return [new[:end] for new, end in zip(output[:, start:].tolist(), ends, strict=True)]
