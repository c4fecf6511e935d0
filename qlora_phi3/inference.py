"""Load a run, an adapter or an export for generation, and generate text with it.

`stop_ids` and `read_end_of_turn` decide where generation stops; the export writes the same ids into its files.
"""

import threading
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
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
from qlora_phi3.family import read_architecture
from qlora_phi3.files import read_json_object
from qlora_phi3.model.lora import fuse_lora_forward
from qlora_phi3.model.phi3 import choose_precision, find_base, load_base, quiet_transformers
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.recipe.schema import Model, Quantization
from qlora_phi3.runfolder import RunFolder

#: The tokens that end a turn in the family's templates.
ENDS_OF_TURN = ("<|end|>", "<|im_end|>")
#: transformers' settings for the most likely token at each step, whatever generation_config.json says.
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True, slots=True)
class InferenceModel:
    """A model that can generate; `stop_ids` are the ids of its end-of-text and end-of-turn tokens."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """What a directory says about the model in it; `dtype` is a torch dtype's name, or "auto"."""

    base: Model
    quantization: Quantization
    dtype: str
    adapter: Path | None
    chat_template: str = "auto"


def load_for_inference(
    run_or_export: Path, *, device: torch.device | None = None, dtype: torch.dtype | Literal["auto"] = "auto"
) -> InferenceModel:
    """Load a model for generation, in 4-bit if it was trained in 4-bit.

    Args:
        run_or_export: the directory of a run (its base, its adapter and its chat template are loaded), of a PEFT adapter (its
            base is loaded in 4-bit), or of an export.
        device: None for the GPU if there is one.
        dtype: of the matmuls. "auto": for a run the dtype of its recipe, for an adapter bf16 if the device has it, for an export
            the dtype of its files.

    Raises:
        UserError: the directory holds none of the three, or something in it is missing, damaged, or does not fit the rest.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = _read_source(run_or_export)
    config, adapter = source.base, source.adapter
    architecture = read_architecture(config.name, config.revision)
    # A copy of the tokenizer without config.json gives other ids in transformers 5.
    has_tokenizer = adapter and (adapter / "config.json").is_file() and (adapter / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(Model(name=str(adapter)) if has_tokenizer else config)
    precision = choose_precision(source.dtype if dtype == "auto" else str(dtype).removeprefix("torch."), device)
    longest = architecture.max_position_embeddings
    model: Any = load_base(config, source.quantization, architecture, precision=precision, device=device, longest_row=longest)
    eos_token_id, end_of_turn = model.generation_config.eos_token_id, None
    if adapter is not None:
        ending = _read_ending(tokenizer, source)
        end_of_turn, tokenizer.chat_template = ending.token_id, ending.template or tokenizer.chat_template
        model = _load_adapter(model, adapter)
    return InferenceModel(model.eval(), tokenizer, stop_ids(eos_token_id, end_of_turn))


def _read_source(path: Path) -> _Source:
    run = RunFolder(path.parent if path.name == "adapter" and RunFolder(path.parent).recipe.is_file() else path)
    if run.recipe.is_file():
        if not (run.adapter / "adapter_config.json").is_file():
            raise ModelError(f"The run {run.path} has no adapter.", "Finish its training first, with --resume.")
        recipe = load_recipe(run.recipe)
        record = read_json_object(run.base, ModelError, "Train the run again.") if run.base.is_file() else {}
        base = recipe.model.model_copy(update={"revision": record.get("revision") or recipe.model.revision})
        template = str(run.chat_template) if run.chat_template.is_file() else recipe.data.chat_template
        return _Source(base, recipe.quantization, recipe.compute_dtype, run.adapter, template)
    if (path / "adapter_config.json").is_file():
        config = read_json_object(path / "adapter_config.json", ModelError, "Copy the adapter again.")
        name = config.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            hint = "Set base_model_name_or_path in it to the base's folder or hub id."
            raise ModelError(f"{path / 'adapter_config.json'} names no base model.", hint)
        return _Source(Model(name=name, revision=config.get("revision")), Quantization(), "auto", path)
    if not (path / "config.json").is_file():
        hint = "Give a run, such as runs/<recipe>/<time>, or the directory that an export or an adapter was written to."
        raise ModelError(f"{path} is not the directory of a run, of a PEFT adapter, or of an exported model.", hint)
    config = read_json_object(path / "config.json", ModelError, "Export the model again.")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "auto")
    return _Source(Model(name=str(path)), Quantization(load_in_4bit=False), dtype, adapter=None)


def _load_adapter(base: Any, adapter: Path) -> PeftModel:
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
    """Read what ends a turn from the template that a run was trained with.

    Args:
        tokenizer: the base's own.
        chat_template: the recipe's [data] chat_template, or the path of the run's copy of that file.

    Raises:
        DataError: there is no such template, or the end of its turn is not a single token.
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


def generate(
    inference: InferenceModel,
    messages_or_prompt: str | Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    stream: bool = False,
) -> str | Iterator[str]:
    """Generate text up to a stop id or `max_new_tokens`.

    Args:
        messages_or_prompt: a conversation, rendered with the chat template up to the assistant's turn; or plain text, continued
            as it is.
        temperature: 0 for the most likely token at each step; else tokens are sampled.
        stream: return an iterator of pieces of text, which generates while it is read. Closing it stops the generation. A byte
            token is in it as soon as it is a character, and in the text only if the bytes after it are valid too.

    Raises:
        DataError: the chat template cannot render the messages, or the prompt leaves no position for a new token.
    """
    tokenizer, limit = inference.tokenizer, inference.model.config.max_position_embeddings
    if isinstance(messages_or_prompt, str):
        ids = tokenizer(messages_or_prompt, return_tensors="pt").input_ids
    else:
        try:
            options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
            ids = tokenizer.apply_chat_template(list(messages_or_prompt), **options)["input_ids"]
        except (TemplateError, ValueError, KeyError, TypeError) as error:
            hint = "Give each message a role that the model knows, and a content."
            raise DataError(f"The chat template cannot render these messages: {error}.", hint) from error
    if ids.shape[1] >= limit:
        raise DataError(f"The prompt has {ids.shape[1]:,} tokens, and the model {limit:,} positions.", "Shorten it.")
    sampling = GREEDY
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    texts = _generate(inference, ids, {**sampling, "max_new_tokens": min(max_new_tokens, limit - ids.shape[1])})
    return _pieces(texts) if stream else list(texts)[-1]


def _pieces(texts: Generator[str, None, None]) -> Iterator[str]:
    """What each text adds to those before it, without the first bytes of a character that is not complete."""
    text, sent = "", 0
    with closing(texts):
        for text in texts:
            if len(text) > sent and not text.endswith("\ufffd"):
                yield text[sent:]
                sent = len(text)
        if text[sent:]:
            yield text[sent:]


def _generate(inference: InferenceModel, ids: Tensor, options: Mapping[str, Any]) -> Generator[str, None, None]:
    """Generate in a thread, and yield the whole new text after each token. `ids` is (1, length) int64.

    Each step decodes all new tokens. transformers' TextIteratorStreamer decodes each line alone, and Phi-3's tokenizer then drops
    a space of the line's indentation.
    """
    model, texts, closed = inference.model, Queue[str | None](), threading.Event()
    device, dtype = model.device, find_base(model).model.norm.weight.dtype
    mixed = isinstance(model, PeftModel) and dtype != torch.float32  # an fp32 adapter on a 16-bit base, as in training

    def after_token(all_ids: Tensor, _: Tensor, **__: Any) -> Tensor:
        texts.put(str(inference.tokenizer.decode(all_ids[0, ids.shape[1] :], skip_special_tokens=True)))
        return torch.full((1,), closed.is_set(), device=device)

    def run() -> None:
        try:
            with torch.autocast(device.type, dtype=dtype if mixed else None, enabled=mixed):
                model.generate(
                    input_ids=ids.to(device),
                    attention_mask=torch.ones_like(ids, device=device),
                    eos_token_id=list(inference.stop_ids) or None,
                    pad_token_id=(*inference.stop_ids, 0)[0],
                    use_cache=True,
                    stopping_criteria=[after_token],
                    **options,
                )
        finally:
            texts.put(None)  # also after an error

    with ThreadPoolExecutor(1) as pool:
        generation = pool.submit(run)
        try:
            yield from iter(texts.get, None)
        finally:
            closed.set()
        generation.result()
