"""Held-out prompts that the base and the tuned model answer at the end of a run: samples.json.

The run is finished and on the disk before it starts. Nothing here may make it fail: memory that runs out halves the batch, an
estimate that exceeds the allowed time ends it, and so does Ctrl-C.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qlora_phi3.data.batching import IGNORE_INDEX
from qlora_phi3.errors import RunError, is_out_of_memory
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
#: A row that is learned from its first token on, as raw text is, is continued from half of it, at most from so many tokens.
TEXT_TOKENS = 64
#: Tokens in the cache of one batch, prompts and answers; Phi-3-mini's take 384 KiB each in 16 bit.
CACHED_TOKENS = 2048
#: The answers may take so many seconds, or this share of the run if that is more. The estimate begins after a few tokens.
ALLOWED_SECONDS, ALLOWED_SHARE, FIRST_TOKENS = 60.0, 0.05, 8


@dataclass(frozen=True, slots=True)
class Prompt:
    """A held-out row up to its first supervised token; `expected` are the row's own tokens after it."""

    row: str
    ids: list[int]
    expected: list[int]


def save_samples(model: PeftModel, context: RunContext, folder: RunFolder, run_seconds: float) -> None:
    """Write samples.json: held-out prompts, answered greedily by the base and by the tuned model.

    Nothing is written where the recipe wants no samples, nothing is held out, or the answers would take too long; the reporter
    says why. Ctrl-C skips them.
    """
    prompts, reporter = choose_prompts(context, context.recipe.training.report_samples), context.reporter
    if not prompts:
        return
    clock = Clock(max(ALLOWED_SECONDS, ALLOWED_SHARE * run_seconds), len(prompts), reporter.progress)
    try:
        with foreign_errors(RunError, "The answers to held-out prompts failed: {reason}.", "The run itself is complete."):
            answers = _answer_with_both(model, context, prompts, clock)
        atomic_write(folder.samples, json.dumps({"max_new_tokens": MAX_NEW_TOKENS, "samples": answers}, ensure_ascii=False))
    except KeyboardInterrupt:
        reporter.warning("Ctrl-C: held-out prompts are not answered; the run itself is complete.")
    except (RunError, MemoryError) as error:
        reporter.warning(str(error) or "Held-out prompts are not answered: memory ran out. The run itself is complete.")
    finally:
        clock.close()


def choose_prompts(context: RunContext, count: int) -> list[Prompt]:
    """The first `count` held-out rows whose prompt is short enough, in the order of the rows."""
    prompts: list[Prompt] = []
    rows: Any = context.data.evaluation if context.data.evaluation is not None and count else ()
    for index in range(len(rows)):
        ids, supervised = rows[index]["input_ids"], [label != IGNORE_INDEX for label in rows[index]["labels"]] + [False]
        start = supervised.index(True)
        end = supervised.index(False, start)
        if start == 1:
            start = min(TEXT_TOKENS, max(1, len(ids) // 2))
        if start <= MAX_PROMPT_TOKENS:
            name = row_name(rows[index], context.data.report.sources)
            prompts.append(Prompt(name, list(ids[:start]), list(ids[start : min(end, start + MAX_NEW_TOKENS)])))
        if len(prompts) == count:
            break
    return prompts


class Clock:
    """Counts the new tokens of all batches, and raises RunError once they are estimated to take more than `allowed_seconds`."""

    def __init__(self, allowed_seconds: float, num_prompts: int, progress: Progress) -> None:
        self._allowed_seconds, self._num_prompts, self._progress = allowed_seconds, num_prompts, progress
        self.done = self.total = 0
        self._started = self._first_token = 0.0

    def start(self, total: int) -> None:
        """Begin to count, also again after memory ran out: `total` is the most tokens that all batches take."""
        self.done, self.total, self._started = 0, total, time.perf_counter()

    def count(self, new: int) -> None:
        """One more token: `new` of the present batch. The first one takes longer than the others, as the prompt is read."""
        done, now = self.done + new, time.perf_counter()
        if done == 1:
            self._first_token = now
        estimate = now - self._started + (self.total - done) * (now - self._first_token) / max(1, done - 1)
        if done >= FIRST_TOKENS and estimate > self._allowed_seconds:
            raise RunError(
                f"Held-out prompts are not answered, as it would take {format_duration(estimate)}.",
                f"With [training] report_samples below {self._num_prompts} it takes less.",
            )
        self._progress("Answering held-out prompts", min(done, self.total - 1), self.total)

    def close(self) -> None:
        """Remove the progress bar."""
        if self.total:
            self._progress("Answering held-out prompts", self.total, self.total)


def _answer_with_both(model: PeftModel, context: RunContext, prompts: Sequence[Prompt], clock: Clock) -> list[dict[str, Any]]:
    """What samples.json holds of each prompt. MemoryError where memory is too small for one row."""
    tokenizer, rows = context.tokenizer, len(prompts)
    turn_end = int(tokenizer.convert_tokens_to_ids(context.template.end_of_turn))
    stops = stop_ids(model.generation_config.eos_token_id, turn_end)
    answers: dict[str, list[list[int]]] = {}
    while not answers:
        batches = list(_batches(prompts, rows))
        clock.start(2 * len(batches) * MAX_NEW_TOKENS)
        try:
            for name, adapter in (("base", model.disable_adapter), ("tuned", nullcontext)):
                with adapter(), evaluating(model):
                    answers[name] = [ids for batch in batches for ids in _answer(model, context, batch, stops, clock)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            answers.clear()
        if not answers:
            rows //= 2
            if not rows:
                raise MemoryError
            if context.device.type == "cuda":
                torch.cuda.empty_cache()

    def as_answer(ids: list[int]) -> dict[str, Any]:
        ended = bool(ids) and ids[-1] in stops
        return {"text": tokenizer.decode(ids, skip_special_tokens=True).strip(), "tokens": len(ids), "ended": ended}

    return [
        {
            "row": prompt.row,
            "prompt": tokenizer.decode(prompt.ids, skip_special_tokens=True).strip(),
            "expected": tokenizer.decode(prompt.expected, skip_special_tokens=True).strip(),
            "base": as_answer(base),
            "tuned": as_answer(tuned),
        }
        for prompt, base, tuned in zip(prompts, answers["base"], answers["tuned"], strict=True)
    ]


def _batches(prompts: Sequence[Prompt], rows: int) -> Iterator[list[Prompt]]:
    """The prompts in order, at most `rows` and CACHED_TOKENS at once."""
    batch: list[Prompt] = []
    for prompt in prompts:
        longest = max(len(each.ids) for each in (*batch, prompt)) + MAX_NEW_TOKENS
        if batch and (len(batch) == rows or (len(batch) + 1) * longest > CACHED_TOKENS):
            yield batch
            batch = []
        batch.append(prompt)
    yield batch


def _answer(
    model: PeftModel, context: RunContext, batch: Sequence[Prompt], stops: Sequence[int], clock: Clock
) -> list[list[int]]:
    """The new ids of each prompt up to its first stop id, which is included. Prompts are padded at the left."""
    start = max(len(prompt.ids) for prompt in batch)
    ids = torch.tensor([[stops[0]] * (start - len(prompt.ids)) + prompt.ids for prompt in batch], device=context.device)
    mask = torch.tensor([[0] * (start - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch], device=context.device)

    def after_token(all_ids: Tensor, _: Tensor, **__: Any) -> Tensor:
        clock.count(all_ids.shape[1] - start)
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
    clock.done += MAX_NEW_TOKENS
    answers = []
    for new in output[:, start:].tolist():
        end = next((index + 1 for index, token in enumerate(new) if token in stops), len(new))
        answers.append(new[:end])
    return answers
