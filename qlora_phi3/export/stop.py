"""A test of whether the exported model ends its turns.

If the exported model fits in memory, it answers held-out prompts greedily until a stop id of its own generation_config.json, or a
limit. Otherwise the proof's count is used: how often a stop id is the most likely token at the end of a held-out turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import Phi3Config

from qlora_phi3.execution import IGNORE_INDEX
from qlora_phi3.export.inputs import free_ram
from qlora_phi3.export.proof import LIVE, Proof
from qlora_phi3.inference import generate_batch, load_for_inference
from qlora_phi3.model.weights import open_weights
from qlora_phi3.reporter import Progress
from qlora_phi3.units import format_count

#: Prompts that are answered, at most, and tokens of a prompt with its answer.
MAX_PROMPTS, MAX_LENGTH = 16, 1024
#: New tokens of an answer: this many times the row's own answer, within these bounds. Rows with longer answers are skipped.
ANSWER_FACTOR, MIN_NEW_TOKENS, MAX_NEW_TOKENS = 2, 32, 256
#: Tokens in the cache of one batch, prompts and answers; Phi-3-mini's take 384 KiB each in 16 bit.
CACHED_TOKENS = 2048
#: With fewer turns the number of those that ended means nothing.
MIN_TURNS = 4
#: Memory for loading and for activations, as a factor on the weights.
OVERHEAD = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class StopTest:
    """How many turns the model ended by itself."""

    method: Literal["generated", "most likely token"]
    turns: int
    stopped: int
    live_share: float | None  # the live model's share, 0 to 1, if the method is the proof's count
    empty: int = 0  # of the generated answers: those that are a stop id alone

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and the share of turns that ended, 0 to 1 (None if no turn was tested)."""
        return {**asdict(self), "share": self.stopped / self.turns if self.turns else None}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to an assistant's first turn, and the most new tokens of its answer."""

    ids: list[int]
    limit: int

    @property
    def length(self) -> int:
        """Tokens with the longest answer."""
        return len(self.ids) + self.limit


def runaway_warning(stops: Mapping[str, Any]) -> str | None:
    """The warning about a model that answers nothing, or rarely ends its turns (`StopTest.as_dict`); None if there is no reason,
    or there are too few turns.
    """
    turns, stopped, empty = stops["turns"], stops["stopped"], stops.get("empty", 0)
    if turns >= MIN_TURNS and 2 * empty >= turns:
        return f"{empty} of {turns} answers are empty: the model ends its turn at once. It was trained too little for an answer."
    if turns < MIN_TURNS or 2 * stopped >= turns:
        return None
    reason = "It was trained too little for that, or on answers whose end was cut off (max_length)."
    if not stopped:
        return f"The model never ended its turn by itself: answers will run on until a limit. {reason}"
    few = f"The model ended its turn by itself in only {stopped} of {turns} answers: the others will run on until a limit."
    return f"{few} {reason}"


def measure_stops(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    proof: Proof,
    name: str,
    *,
    device: torch.device | None = None,
    max_ram_bytes: int | None = None,
    progress: Progress,
) -> StopTest:
    """Let an exported model answer held-out prompts; if it does not fit in memory, use the proof's count.

    Args:
        folder: a finished export; `name` is the name of its score in the proof.
        rows: `input_ids` and `labels` (unshifted, -100 where not supervised).
        max_ram_bytes: all that the process may hold, see `free_ram`.
    """
    device, prompts = device or torch.device("cpu"), choose_prompts(rows)
    dtype = choose_dtype(folder, device, max_ram_bytes) if prompts else None
    if dtype is None:
        share, live_share = proof.of(name).stop_share, proof.of(LIVE).stop_share
        stopped = round((share or 0) * proof.turns)
        return StopTest(method="most likely token", turns=proof.turns, stopped=stopped, live_share=live_share)
    inference = load_for_inference(folder, device=device, dtype=dtype)
    batches: list[list[Prompt]] = [[]]
    for prompt in prompts:
        if batches[-1] and (len(batches[-1]) + 1) * prompt.length > CACHED_TOKENS:
            batches.append([])
        batches[-1].append(prompt)
    total, done, stopped, empty = sum(max(prompt.limit for prompt in batch) for batch in batches), 0, 0, 0

    answering = f"Answering {format_count(len(prompts), 'held-out prompt')}, tokens"

    def report(new_ids: Tensor) -> None:
        progress(answering, done + new_ids.shape[1], total)

    for batch in batches:
        limits = [prompt.limit for prompt in batch]
        answers = generate_batch(inference, [prompt.ids for prompt in batch], limits, after_token=report)
        stopped += sum(answer[-1] in inference.stop_ids for answer in answers)
        empty += sum(len(answer) == 1 and answer[0] in inference.stop_ids for answer in answers)
        done += max(limits)
    progress(answering, total, total)
    return StopTest(method="generated", turns=len(prompts), stopped=stopped, live_share=None, empty=empty)


def choose_prompts(rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """The shortest conversations, up to where the assistant's first turn begins; shortest first."""
    prompts = []
    for row in rows:
        supervised = [*(label != IGNORE_INDEX for label in row["labels"]), False]
        if not any(supervised[1:]):
            continue
        first = supervised.index(True, 1)
        answer = supervised.index(False, first) - first
        prompt = Prompt(list(row["input_ids"][:first]), max(MIN_NEW_TOKENS, answer * ANSWER_FACTOR))
        if prompt.limit <= MAX_NEW_TOKENS and prompt.length <= MAX_LENGTH:
            prompts.append(prompt)
    return sorted(prompts, key=lambda prompt: prompt.length)[:MAX_PROMPTS]


def choose_dtype(folder: Path, device: torch.device, max_ram_bytes: int | None) -> torch.dtype | None:
    """The dtype in which an exported model fits in memory: on a CPU fp32, else its own; None if it fits in neither."""
    config = Phi3Config.from_pretrained(folder)
    num_weights = sum(prod(info.shape) for info in open_weights(folder).info.values())
    head_size = config.hidden_size // config.num_attention_heads
    num_cached = CACHED_TOKENS * config.num_hidden_layers * 2 * config.num_key_value_heads * head_size
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_ram(max_ram_bytes)
    for dtype in [torch.float32, config.dtype] if device.type == "cpu" else [config.dtype]:
        if (OVERHEAD * num_weights + num_cached) * dtype.itemsize <= free_bytes:
            return cast(torch.dtype, dtype)
    return None
