"""How an assistant's turn ends: the fixed text of a chat template, and a test of whether the exported model ends its turns.

The test answers held-out prompts greedily. If the exported model fits in memory, it generates until a stop id of its own
generation_config.json, or a limit. Otherwise the proof's count is used: how often a stop id is the most likely token at the end
of a held-out turn.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import Phi3Config

from qlora_phi3.data.batching import IGNORE_INDEX
from qlora_phi3.export.inputs import free_ram
from qlora_phi3.export.proof import LIVE, Proof
from qlora_phi3.export.streamed import Progress
from qlora_phi3.inference import InferenceModel, load_for_inference
from qlora_phi3.model.weights import open_weights

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

STAGE = "Answering held-out prompts"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopTest:
    """How many turns the model ended by itself.

    Args:
        live_share: the live model's share, 0 to 1, if the method is the proof's count; else None.
    """

    method: Literal["generated", "most likely token"]
    turns: int
    stopped: int
    live_share: float | None

    @property
    def share(self) -> float | None:
        """Share of turns that ended, 0 to 1; None if no turn was tested."""
        return self.stopped / self.turns if self.turns else None

    def as_dict(self) -> dict[str, Any]:
        """The fields and `share`, for JSON."""
        return {**asdict(self), "share": self.share}


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
    """The warning about a model that rarely ends its turns; None if it does, or if too few turns were tested.

    Args:
        stops: the result of `StopTest.as_dict`.
    """
    turns, stopped = stops["turns"], stops["stopped"]
    if turns < MIN_TURNS or 2 * stopped >= turns:
        return None
    if not stopped:
        return (
            "The model never ended its turn by itself: answers will run on until a limit. It was trained too little for that, or "
            "on answers whose end was cut off (max_length)."
        )
    return (
        f"The model ended its turn by itself in only {stopped} of {turns} answers: the others will run on until a limit. It was "
        "trained too little for that, or on answers whose end was cut off (max_length)."
    )


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
        folder: a finished export.
        rows: `input_ids` and `labels` (unshifted, -100 where not supervised).
        name: the name of the export's score in the proof.
        max_ram_bytes: all that the process may hold, see `free_ram`.
    """
    device = device or torch.device("cpu")
    prompts = choose_prompts(rows)
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
    total, done, stopped = sum(max(prompt.limit for prompt in batch) for batch in batches), 0, 0

    def report(new: int) -> None:
        progress(STAGE, done + new, total)

    for batch in batches:
        stopped += _count_stopped(inference, batch, report)
        done += max(prompt.limit for prompt in batch)
    report(0)
    return StopTest(method="generated", turns=len(prompts), stopped=stopped, live_share=None)


def choose_prompts(rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """The shortest conversations, up to where the assistant's first turn begins; shortest first."""
    prompts = []
    for row in rows:
        supervised = [label != IGNORE_INDEX for label in row["labels"]]
        if not any(supervised[1:]):
            continue
        first = supervised.index(True, 1)
        answer = next((end for end in range(first, len(supervised)) if not supervised[end]), len(supervised)) - first
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


def _count_stopped(inference: InferenceModel, batch: Sequence[Prompt], report: Callable[[int], None]) -> int:
    """Answer a batch of prompts greedily; count the answers that reach a stop id within their own limit."""
    model, stops = inference.model, list(inference.stop_ids)
    start, limits = max(len(prompt.ids) for prompt in batch), torch.tensor([prompt.limit for prompt in batch])
    ids, mask = torch.full((len(batch), start), stops[0]), torch.zeros((len(batch), start), dtype=torch.int64)
    for row, prompt in enumerate(batch):
        ids[row, start - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, start - len(prompt.ids) :] = 1

    def at_limit(all_ids: Tensor, _: Tensor, **__: Any) -> Tensor:
        new = all_ids.shape[1] - start
        report(new)
        return (limits <= new).to(all_ids.device)

    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        max_new_tokens=int(limits.max()),
        eos_token_id=stops,
        pad_token_id=stops[0],
        stopping_criteria=[at_limit],
    )
    answers = [row[start : start + prompt.limit] for row, prompt in zip(output.cpu(), batch, strict=True)]
    return sum(bool(torch.isin(answer, torch.tensor(stops)).any()) for answer in answers)


#: A special token of the family, and the white space after it.
ENDING = re.compile(r"<\|[^|>\s]+\|>\s*")

Message = dict[str, str]


def chat(*turns: str) -> list[Message]:
    """A conversation of turns such as `user How are you?`."""
    return [{"role": role, "content": content} for role, _, content in (turn.partition(" ") for turn in turns)]


#: Conversations on which the pieces of a template are checked.
PROBES = (
    chat("user one"),
    chat("system be kind", "user one"),
    chat("user one", "assistant two", "user three"),
    chat("system be kind", "user one", "assistant two", "user three", "assistant four", "user five"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """The fixed text around the content of each turn.

    Args:
        opening: before the first user turn if there is no system turn; a system prompt of the template's own.
        system: before and after a system turn's content; None if the template has no such turn.
        user: before a user's content, and after it up to the assistant's content.
        after_assistant: the end of turn, and other text before the next turn.
    """

    opening: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    after_assistant: str

    @property
    def end_of_turn(self) -> str:
        """The token that ends a turn: `<|end|>` or `<|im_end|>`."""
        return self.after_assistant.rstrip()

    def render(self, messages: list[Message]) -> str:
        """Render the prompt of a conversation that ends with the user's turn."""
        text = self.opening if messages[0]["role"] != "system" else ""
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": ("", self.after_assistant)}
        for message in messages:
            if message["role"] == "system" and self.system is None:
                text += self.opening
                continue
            before, after = around[message["role"]]
            text += before + message["content"] + after
        return text


def read_turns(tokenizer: Any, template: str) -> Turns | None:
    """Split a chat template into fixed pieces by rendering it; None if that fails on one of `PROBES`.

    A begin-of-text token that the template itself writes is left out.
    """

    def render(messages: list[Message]) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return text.removeprefix(tokenizer.bos_token or "")

    try:
        before_user, between, after_answer, _ = _split(
            render(chat("user (1)", "assistant (2)", "user (3)")), "(1)", "(2)", "(3)"
        )
        with_system = render(chat("system (1)", "user (2)"))
        ending = ENDING.match(after_answer)
        user = after_answer[ending.end() :] if ending else after_answer
        if ending is None or not before_user.endswith(user):
            return None
        system = None
        if "(1)" in with_system and "(2)" in with_system:
            before_system, after_system, _ = _split(with_system, "(1)", "(2)")
            system = (before_system, after_system.removesuffix(user))
        turns = Turns(
            opening=before_user.removesuffix(user),
            system=system,
            user=(user, between),
            after_assistant=ending.group(),
        )
        probes = [probe for probe in PROBES if system is not None or probe[0]["role"] != "system"]
        return turns if all(turns.render(probe) == render(probe) for probe in probes) else None
    except (TemplateError, TypeError, ValueError):
        return None


def _split(text: str, *contents: str) -> list[str]:
    """The text before, between and after contents that occur in it in this order; ValueError if one does not."""
    pieces = []
    for content in contents:
        at = text.index(content)
        pieces.append(text[:at])
        text = text[at + len(content) :]
    return [*pieces, text]
