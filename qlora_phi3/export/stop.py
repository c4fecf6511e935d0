"""What a chat template puts before, between and after the words of a conversation, found by rendering it.

Does the exported model end its turns by itself? Held-out prompts, answered greedily.

Where the exported folder fits in memory it is loaded as people will load it, by plain transformers, and generates until a stop
id of its own generation_config.json or a limit. Where it does not fit, the proof's count stands in: at the ends of held-out
turns, how often a stop id is the most likely token.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoModelForCausalLM, Phi3Config, StoppingCriteria, StoppingCriteriaList

from qlora_phi3.export.inputs import free_ram
from qlora_phi3.export.proof import LIVE, Proof
from qlora_phi3.export.streamed import Progress
from qlora_phi3.model.loss import IGNORE_INDEX
from qlora_phi3.model.weights import open_weights

#: A special token of the family, and the white space after it.
ENDING = re.compile(r"<\|[^|>\s]+\|>\s*")


Message = dict[str, str]


def chat(*turns: str) -> list[Message]:
    """A conversation of turns such as `user How are you?`."""
    return [{"role": role, "content": content} for role, _, content in (turn.partition(" ") for turn in turns)]


#: Conversations that a reading of a template is held against.
PROBES = (
    chat("user one"),
    chat("system be kind", "user one"),
    chat("user one", "assistant two", "user three"),
    chat("system be kind", "user one", "assistant two", "user three", "assistant four", "user five"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """The fixed text around the words of each turn.

    Args:
        opening: in front of the first user turn where there is no system turn; a system prompt of the template's own.
        system: before and after a system turn's words; None where the template has no such turn.
        user: before a user's words, and after them up to where the assistant's begin.
        after_assistant: the end of turn, and what else stands before the next turn.
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
        """The prompt of a conversation that ends with the user's turn."""
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
    """Read a chat template; None where it cannot be told in fixed pieces, each checked on `PROBES`.

    A begin-of-text token that the template itself writes is left out.
    """
    render = _renderer(tokenizer, template)
    try:
        before_user, between, after_answer, _ = _cut(
            render(chat("user (1)", "assistant (2)", "user (3)")), "(1)", "(2)", "(3)"
        )
        with_system = render(chat("system (1)", "user (2)"))
        ending = ENDING.match(after_answer)
        user = after_answer[ending.end() :] if ending else after_answer
        if ending is None or not before_user.endswith(user):
            return None
        system = None
        if "(1)" in with_system and "(2)" in with_system:
            before_system, after_system, _ = _cut(with_system, "(1)", "(2)")
            system = (before_system, after_system.removesuffix(user))
        turns = Turns(
            opening=before_user.removesuffix(user),
            system=system,
            user=(user, between),
            after_assistant=ending.group(),
        )
        said = [probe for probe in PROBES if system is not None or probe[0]["role"] != "system"]
        return turns if all(turns.render(probe) == render(probe) for probe in said) else None
    except (TemplateError, TypeError, ValueError):
        return None


def _renderer(tokenizer: Any, template: str) -> Any:
    def render(messages: list[Message]) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return text.removeprefix(tokenizer.bos_token or "")

    return render


def _cut(text: str, *words: str) -> list[str]:
    """The text before, between and after words that stand in it in this order; ValueError where one does not."""
    parts = []
    for word in words:
        at = text.index(word)
        parts.append(text[:at])
        text = text[at + len(word) :]
    return [*parts, text]


#: Prompts that are answered, at most, and tokens of a prompt with its answer.
MAX_PROMPTS, MAX_LENGTH = 16, 1024


#: New tokens: so many times the row's own answer, within these bounds. A row whose answer leaves no such room is passed over.
ROOM, LEAST_NEW_TOKENS, MOST_NEW_TOKENS = 2, 32, 256


#: Tokens that one batch holds in its cache, prompts and answers; Phi-3-mini's are 384 KiB each in 16 bit.
CACHED_TOKENS = 2048


#: Turns below which a count of those that ended says nothing.
FEWEST_TURNS = 4


#: What loading and the activations take beside weights and cache.
OVERHEAD = 1.1


WHAT = "Answering held-out prompts"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopTest:
    """How many turns ended by themselves.

    `live_share`: of the live model; known where turns were looked up in the proof.
    """

    method: Literal["generated", "most likely token"]
    turns: int
    stopped: int
    live_share: float | None

    @property
    def share(self) -> float | None:
        """0 to 1; None where there was no turn to test."""
        return self.stopped / self.turns if self.turns else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to an assistant's first turn, and how many new tokens it may take to answer."""

    ids: list[int]
    limit: int

    @property
    def length(self) -> int:
        """Tokens with the longest answer."""
        return len(self.ids) + self.limit


class _Limits(StoppingCriteria):  # type: ignore[misc]
    """Ends each answer of a batch at its own limit, and tells how far it is."""

    def __init__(self, batch: Sequence[Prompt], start: int, tell: Callable[[int], None]) -> None:
        self.limits = torch.tensor([prompt.limit for prompt in batch])
        self.start, self.tell = start, tell

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        new = input_ids.shape[1] - self.start
        self.tell(new)
        return (self.limits <= new).to(input_ids.device)


def tell_runaway(stops: Mapping[str, Any]) -> str | None:
    """For people: that a model seldom ends its turns, so that answers run on; None where it does, or too few were tested.

    Args:
        stops: `StopTest.as_dict`.
    """
    turns, stopped = stops["turns"], stops["stopped"]
    if turns < FEWEST_TURNS or 2 * stopped >= turns:
        return None
    ended = f"ended its turn by itself in only {stopped} of {turns}" if stopped else "never ended its turn by itself"
    return (
        f"The model {ended}: answers will run on until a limit. It was trained too little for that, or on answers whose end was "
        "cut off (max_length)."
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
    """Let an exported model answer held-out prompts; where it does not fit in memory, look its turns' ends up in the proof.

    Args:
        folder: a finished export.
        rows: `input_ids`, `labels` (unshifted, -100 where not supervised).
        name: of the export's score in the proof.
        max_ram_bytes: all that the process may hold, see `free_ram`.
    """
    device = device or torch.device("cpu")
    prompts = choose_prompts(rows)
    dtype = choose_dtype(folder, device, max_ram_bytes) if prompts else None
    if dtype is None:
        return _look_up(proof, name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, use_safetensors=True)
    batches = list(_batches(prompts))
    steps = [max(prompt.limit for prompt in batch) for batch in batches]
    stopped = 0
    for number, batch in enumerate(batches):
        tell = partial(_tell, progress, sum(steps[:number]), sum(steps))
        stopped += _answer(model.eval(), batch, tell)
    progress(WHAT, sum(steps), sum(steps))
    return StopTest(method="generated", turns=len(prompts), stopped=stopped, live_share=None)


def _tell(progress: Progress, before: int, total: int, new: int) -> None:
    progress(WHAT, before + new, total)


def _look_up(proof: Proof, name: str) -> StopTest:
    share = proof.of(name).stop_share
    return StopTest(
        method="most likely token",
        turns=proof.turns,
        stopped=round((share or 0) * proof.turns),
        live_share=proof.of(LIVE).stop_share,
    )


def choose_prompts(rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """The shortest conversations, cut where the assistant's first turn begins; shortest first."""
    prompts = []
    for row in rows:
        supervised = [label != IGNORE_INDEX for label in row["labels"]]
        if not any(supervised[1:]):
            continue
        first = supervised.index(True, 1)
        answer = next((end for end in range(first, len(supervised)) if not supervised[end]), len(supervised)) - first
        if answer * ROOM <= MOST_NEW_TOKENS:
            prompt = Prompt(list(row["input_ids"][:first]), max(LEAST_NEW_TOKENS, answer * ROOM))
            prompts.append(prompt)
    return sorted((prompt for prompt in prompts if prompt.length <= MAX_LENGTH), key=_length)[:MAX_PROMPTS]


def _length(prompt: Prompt) -> int:
    return prompt.length


def _batches(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    batch: list[Prompt] = []
    for prompt in prompts:
        if batch and (len(batch) + 1) * prompt.length > CACHED_TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    yield batch


def choose_dtype(folder: Path, device: torch.device, max_ram_bytes: int | None) -> torch.dtype | None:
    """The dtype in which an exported model fits in memory: on a CPU fp32, then its own; None where it fits in none."""
    config = Phi3Config.from_pretrained(folder)
    weights = sum(prod(info.shape) for info in open_weights(folder).info.values())
    head_size = config.hidden_size // config.num_attention_heads
    cached = CACHED_TOKENS * config.num_hidden_layers * 2 * config.num_key_value_heads * head_size
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_ram(max_ram_bytes)
    for dtype in [torch.float32, config.dtype] if device.type == "cpu" else [config.dtype]:
        if (OVERHEAD * weights + cached) * dtype.itemsize <= room:
            return cast(torch.dtype, dtype)
    return None


def _answer(model: Any, batch: Sequence[Prompt], tell: Callable[[int], None]) -> int:
    """Answer the prompts of a batch greedily; how many of the answers came to a stop id within their limit."""
    start = max(len(prompt.ids) for prompt in batch)
    stops = _as_list(model.generation_config.eos_token_id)
    ids = torch.full((len(batch), start), stops[0])
    for row, prompt in zip(ids, batch, strict=True):
        row[start - len(prompt.ids) :] = torch.tensor(prompt.ids)
    mask = torch.tensor([[0] * (start - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch])
    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        max_new_tokens=max(prompt.limit for prompt in batch),
        pad_token_id=stops[0],
        stopping_criteria=StoppingCriteriaList([_Limits(batch, start, tell)]),
    )
    answers = [row[start : start + prompt.limit] for row, prompt in zip(output.cpu(), batch, strict=True)]
    return sum(bool(torch.isin(answer, torch.tensor(stops)).any()) for answer in answers)


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]
