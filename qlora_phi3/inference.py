"""Load a run, an adapter or an export for generation, and generate text with it.

`stop_ids` and `read_end_of_turn` decide where generation stops; the export writes the same ids into its files.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlora_phi3.adapters.base_files import strip_marks
from qlora_phi3.data.template import ChatTemplate, choose_template
from qlora_phi3.data.tokenizer import load_tokenizer
from qlora_phi3.errors import DataError, ModelError, first_line
from qlora_phi3.family import is_hub_id, read_architecture
from qlora_phi3.files import read_json_object
from qlora_phi3.model.lora import fuse_lora_forward
from qlora_phi3.model.phi3 import choose_precision, find_base, load_base, quiet_transformers
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.recipe.schema import Model, Quantization
from qlora_phi3.reporter import Progress
from qlora_phi3.runfolder import RunFolder

#: The tokens that end a turn in the family's templates.
ENDS_OF_TURN = ("<|end|>", "<|im_end|>")


@dataclass(frozen=True, slots=True)
class InferenceModel:
    """A model that can generate; `stop_ids` are the ids of its end-of-text and end-of-turn tokens."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    chat_template: str = "auto"  #: By which `choose_template` finds the marked template that the model was trained with.
    longrope_boundary: int | None = None

    @property
    def max_positions(self) -> int:
        """Tokens of a prompt with its answer, at most."""
        return int(find_base(self.model).config.max_position_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matmuls."""
        dtype: torch.dtype = find_base(self.model).model.norm.weight.dtype
        return dtype


def sampling(temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0) -> dict[str, Any]:
    """transformers' settings, whatever generation_config.json says: at temperature 0 the most likely token; else one is drawn,
    from the `top_k` most likely (0: from all), and from as few as have `top_p` of the probability.
    """
    if not temperature:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


GREEDY = sampling()


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated text, its tokens without a stop id, and whether a stop id ended it, or else the limit."""

    text: str
    num_tokens: int
    ended_by_itself: bool


@dataclass(frozen=True, slots=True)
class _Source:
    """What a directory says about the model in it; `dtype` is a torch dtype's name, or "auto"."""

    base: Model
    quantization: Quantization
    dtype: str
    adapter: Path | None
    chat_template: str = "auto"


def load_for_inference(
    run_or_export: Path,
    *,
    base: Path | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    progress: Progress = lambda *_: None,
) -> InferenceModel:
    """Load a model for generation, in 4-bit if it was trained in 4-bit. UserError where the directory holds none of those below,
    or something in it is missing, damaged, or does not fit the rest.

    Args:
        run_or_export: the directory of a run (its base, its adapter and its chat template are loaded), of a PEFT adapter (its
            base is loaded in 4-bit), of an export or a base; or the hub id of a base, which is loaded in 4-bit.
        base: directory of the base of a run or an adapter, if it has moved.
        device: None for the GPU if there is one.
        dtype: of the matmuls. "auto": for a run the dtype of its recipe, for an adapter bf16 if the device has it, for an export
            the dtype of its files.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = _read_source(run_or_export, base)
    if base is not None:
        if source.adapter is None:
            raise ModelError(f"{run_or_export} has no adapter: it is a complete model and needs no base.", "Leave --base out.")
        source = replace(source, base=Model(name=str(base)))
    if source.adapter is not None and Path(source.base.name).is_absolute() and not Path(source.base.name).is_dir():
        raise ModelError(
            f"The base of {run_or_export} is gone: there is no folder {source.base.name}.",
            "Say where it is now with --base FOLDER; an export of the run needs no base.",
        )
    config, adapter = source.base, source.adapter
    architecture = read_architecture(config.name, config.revision)
    # A copy of the tokenizer without config.json gives other ids in transformers 5.
    has_tokenizer = adapter and (adapter / "config.json").is_file() and (adapter / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(Model(name=str(adapter)) if has_tokenizer else config)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    compute_dtype, _ = choose_precision(source.dtype if dtype == "auto" else str(dtype).removeprefix("torch."), capability)
    longest = architecture.max_position_embeddings
    model: Any = load_base(
        config,
        source.quantization,
        architecture,
        compute_dtype=compute_dtype,
        device=device,
        longest_row=longest,
        progress=progress,
    )
    eos_token_id, end_of_turn = model.generation_config.eos_token_id, None
    if adapter is not None:
        ending = _read_ending(tokenizer, source)
        end_of_turn, tokenizer.chat_template = ending.token_id, ending.template or tokenizer.chat_template
        model = _load_adapter(model, adapter)
    ids, boundary = stop_ids(eos_token_id, end_of_turn), architecture.longrope_boundary
    return InferenceModel(model.eval(), tokenizer, ids, source.chat_template, boundary)


def _read_source(path: Path, moved_base: Path | None) -> _Source:
    run = RunFolder(path.parent if path.name == "adapter" and RunFolder(path.parent).recipe.is_file() else path)
    if run.recipe.is_file():
        run.check_trained()
        recipe = load_recipe(run.recipe)
        record = read_json_object(run.base, ModelError, "Train the run again.") if run.base.is_file() else {}
        base = recipe.model.model_copy(update={"revision": record.get("revision") or recipe.model.revision})
        template = str(run.chat_template) if run.chat_template.is_file() else recipe.data.chat_template
        return _Source(base, recipe.quantization, recipe.compute_dtype, run.adapter, template)
    if (path / "adapter_config.json").is_file():
        config = read_json_object(path / "adapter_config.json", ModelError, "Copy the adapter again.")
        name = config.get("base_model_name_or_path") or (moved_base and str(moved_base))
        if not isinstance(name, str) or not name:
            hint = "Name it with --base FOLDER, or set base_model_name_or_path in it to the base's folder or hub id."
            raise ModelError(f"{path / 'adapter_config.json'} names no base model.", hint)
        return _Source(Model(name=name, revision=config.get("revision")), Quantization(), "auto", path)
    if not path.exists() and is_hub_id(path.as_posix()):
        return _Source(Model(name=path.as_posix()), Quantization(), "auto", adapter=None)
    if not (path / "config.json").is_file():
        hint = "Give a run, such as runs/<recipe>/<time>, or the directory that an export or an adapter was written to."
        raise ModelError(f"{path} is not the directory of a run, of a PEFT adapter, or of an exported model.", hint)
    config = read_json_object(path / "config.json", ModelError, "Export the model again.")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "auto")
    return _Source(Model(name=str(path)), Quantization(load_in_4bit=False), dtype, adapter=None)


def _load_adapter(base: Any, adapter: Path) -> PeftModel:
    if not any((adapter / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):  # PEFT would ask the hub
        raise ModelError(f"{adapter} has no adapter_model.safetensors.", "Copy the adapter again, with all its files.")
    try:
        with warnings.catch_warnings(), quiet_transformers():
            warnings.filterwarnings("error", "Found missing adapter keys")  # PEFT 0.21 only warns
            model = PeftModel.from_pretrained(base, str(adapter))
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, UserWarning) as error:
        raise ModelError(
            f"The adapter {adapter} cannot be loaded onto its base: {first_line(error)}.",
            "Copy the adapter again, or set base_model_name_or_path in its adapter_config.json to the base it was trained on.",
        ) from error
    fuse_lora_forward(model)
    return model


@dataclass(frozen=True, slots=True)
class EndOfTurn:
    """The id that ends an assistant's turn; and the chat template that was trained with, None if it is the tokenizer's own."""

    token_id: int
    template: str | None


def _read_ending(tokenizer: PreTrainedTokenizerBase, source: _Source) -> EndOfTurn:
    """`read_end_of_turn`; for an adapter whose own template has no marks and is none of the family's, the end that it writes."""
    try:
        return read_end_of_turn(tokenizer, source.chat_template)
    except DataError:
        ends = [end for end in ENDS_OF_TURN if end in str(tokenizer.chat_template) and end in tokenizer.get_vocab()]
        if source.chat_template != "auto" or not ends:
            raise
        return EndOfTurn(tokenizer.get_vocab()[ends[0]], None)


def read_end_of_turn(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> EndOfTurn:
    """Read what ends a turn from the template that a run was trained with: the recipe's [data] chat_template, or the path of the
    run's copy of that file; `tokenizer` is the base's own. DataError where there is none, or its end is not a single token.
    """
    trained = choose_template(tokenizer, chat_template)
    token_id = int(tokenizer.convert_tokens_to_ids(trained.end_of_turn))
    return EndOfTurn(token_id, template_to_save(tokenizer, trained, chat_template))


def template_to_save(tokenizer: PreTrainedTokenizerBase, trained: ChatTemplate, chat_template: str) -> str | None:
    """The chat template for the files of an adapter or an export, without marks; None where it is the tokenizer's own.

    `trained` is the one that the recipe's `chat_template` names. One that is named is always saved: the tokenizer's own may be
    another one that renders some conversations alike.
    """
    is_own = chat_template == "auto" and bool(tokenizer.chat_template)
    return None if is_own else strip_marks(trained.source)


def stop_ids(eos_token_id: int | Sequence[int] | None, end_of_turn: int | None = None) -> tuple[int, ...]:
    """The ids at which generation stops: those of a generation config or config.json, and the one that ends a turn."""
    ids = [eos_token_id] if eos_token_id is None or isinstance(eos_token_id, int) else eos_token_id
    return tuple(dict.fromkeys(token_id for token_id in (*ids, end_of_turn) if token_id is not None))


def encode(inference: InferenceModel, conversation: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids of a conversation, rendered with the chat template up to the assistant's turn. A system turn that the template has
    no place for (Phi-3-medium's) is put ahead of the next turn's text, as in training. DataError where it cannot be rendered.
    """
    messages, render = list(conversation), inference.tokenizer.apply_chat_template
    try:
        if len(messages) > 1 and messages[0]["role"] == "system":
            text, probe = messages[0]["content"], [messages[0], {"role": "user", "content": "?"}]
            with suppress(TemplateError):
                text = "" if text.strip() in str(render(probe, tokenize=False)) else text
            messages = [{**messages[1], "content": f"{text}\n\n{messages[1]['content']}"}, *messages[2:]] if text else messages
        return list(render(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    except (TemplateError, ValueError, KeyError, TypeError) as error:
        hint = "Give each message a role that the model knows, and a content."
        raise DataError(f"The chat template cannot render these messages: {error}.", hint) from error


def fit_messages(inference: InferenceModel, messages: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """The newest turns of a conversation that leave positions for an answer of `limit` tokens, or a quarter of all positions.

    A system turn at the start and the last turn always stay; the others are left out in pairs. DataError as in `encode`.
    """
    kept, first, positions = list(messages), int(messages[0]["role"] == "system"), inference.max_positions
    while len(kept) > first + 2 and len(encode(inference, kept)) > positions - min(limit, positions // 4):
        del kept[first : first + 2]
    return kept


def generate(
    inference: InferenceModel,
    messages: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    sampling: Mapping[str, Any] = GREEDY,
    show: Callable[[str], None] = lambda piece: None,
) -> Answer:
    """Generate text up to a stop id or `max_new_tokens`; `show` is called with each piece of it. DataError as in `encode`, or
    where the prompt leaves no position for a new token.

    Each step decodes all new tokens: transformers' streamers decode each line alone, and Phi-3's tokenizer then drops a space of
    the line's indentation. A byte token is in a piece as soon as it is a character, and in the answer only if the bytes after it
    are valid too.
    """
    ids, limit, sent = encode(inference, messages), inference.max_positions, 0
    if len(ids) >= limit:
        raise DataError(f"The prompt has {len(ids):,} tokens, and the model {limit:,} positions.", "Shorten it.")

    def show_more(new_ids: Tensor) -> None:
        nonlocal sent
        text = decode(inference, new_ids[0])
        if len(text) > sent and not text.endswith("\ufffd"):
            show(text[sent:])
            sent = len(text)

    limits = [min(max_new_tokens, limit - len(ids))]
    [new_ids] = generate_batch(inference, [ids], limits, sampling=sampling, after_token=show_more)
    text, ended_by_itself = decode(inference, new_ids), bool(new_ids) and new_ids[-1] in inference.stop_ids
    if text[sent:]:
        show(text[sent:])
    return Answer(text, len(new_ids) - ended_by_itself, ended_by_itself)


def decode(inference: InferenceModel, ids: Any) -> str:
    """Token ids as text, without special tokens."""
    return str(inference.tokenizer.decode(ids, skip_special_tokens=True))


def generate_batch(
    inference: InferenceModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    sampling: Mapping[str, Any] = GREEDY,
    after_token: Callable[[Tensor], None] = lambda _: None,
) -> list[list[int]]:
    """Continue several prompts (token ids) at once, padded at the left: the new ids of each up to its limit, or up to its first
    stop id, which is the last of them.

    `after_token` is called after each step with the new ids until then, (prompts, new) int64.
    """
    model, stops, start = inference.model, list(inference.stop_ids), max(map(len, prompts))
    device, dtype = model.device, inference.dtype
    mixed = isinstance(model, PeftModel) and dtype != torch.float32  # an fp32 adapter on a 16-bit base, as in training
    padding, most = (*stops, 0)[0], torch.tensor(limits, device=device)
    rows = [(padding,) * (start - len(prompt)) + tuple(prompt) for prompt in prompts]
    mask = torch.arange(start) >= torch.tensor([start - len(prompt) for prompt in prompts])[:, None]

    def is_done(all_ids: Tensor, _: Tensor, **__: Any) -> Tensor:
        after_token(all_ids[:, start:])
        return most <= all_ids.shape[1] - start

    with torch.autocast(device.type, dtype=dtype if mixed else None, enabled=mixed):
        output = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=mask.to(device, torch.int64),
            max_new_tokens=max(limits),
            eos_token_id=stops or None,
            pad_token_id=padding,
            use_cache=True,
            stopping_criteria=[is_done],
            **sampling,
        )
    answers = []
    for row, limit in zip(output[:, start:].tolist(), limits, strict=True):
        end = next((place for place, token_id in enumerate(row[:limit], start=1) if token_id in stops), limit)
        answers.append(row[:end])
    return answers
