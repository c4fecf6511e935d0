"""A finished export as one .gguf file, for llama.cpp and Ollama; tensor by tensor, a few rows at a time."""

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_phi3.errors import ExportError
from qlora_phi3.export.gguf.prompt import Prompting, plan_prompting
from qlora_phi3.export.gguf.quantizer import PLAIN, QUANTIZED, check_quantizer, quantize_file
from qlora_phi3.export.gguf.tensors import TensorPlan, encode, plan_tensors
from qlora_phi3.export.gguf.vocab import LIMITS, Vocabulary, read_vocabulary
from qlora_phi3.family import parse_architecture, read_config
from qlora_phi3.model.phi3 import load_tokenizer
from qlora_phi3.model.weights import TensorInfo, Weights, open_weights
from qlora_phi3.recipe.schema import Model
from qlora_phi3.units import format_gib

QUANTS = (*PLAIN, *QUANTIZED)


#: Room on the disk for what is not a tensor: header, vocabulary, padding.
HEADER_BYTES = 32 * 2**20


Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufResult:
    """What was written.

    Args:
        name: `general.name`, which decides how llama.cpp reads prompts.
        notes: what llama.cpp does differently from training, for a person to read.
    """

    path: Path
    num_bytes: int
    num_tensors: int
    quant: str
    name: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPlan:
    """A .gguf file before it is written."""

    config: Phi3Config
    tokenizer: Any
    vocabulary: Vocabulary
    prompting: Prompting
    tensors: Sequence[TensorPlan]
    #: Of the file written first: what was asked for, or 16 or 32 bit for llama.cpp's quantizer.
    file_type: str
    #: Of disk, while it is written.
    num_bytes: int


def plan_gguf(folder: Path, info: Mapping[str, TensorInfo], *, quant: str, name: str) -> GgufPlan:
    """What is to be written; all that llama.cpp has no way to hold shows here.

    Args:
        folder: with the checkpoint's config and tokenizer files; its weights need not be there yet.
        info: of those weights.

    Raises:
        ExportError, ModelError: as `convert_to_gguf`.
    """
    config = read_phi3_config(folder)
    tokenizer = load_tokenizer(Model(name=str(folder)))
    tensors = plan_tensors(config, info, None if quant in QUANTIZED else quant)
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return GgufPlan(
        config=config,
        tokenizer=tokenizer,
        vocabulary=read_vocabulary(folder, tokenizer, config.vocab_size),
        prompting=plan_prompting(tokenizer, name),
        tensors=tensors,
        file_type="f16" if quant in QUANTIZED else quant,
        num_bytes=sum(plan.num_bytes for plan in tensors) + int(weights * QUANTIZED.get(quant, 0) / 8) + HEADER_BYTES,
    )


def convert_to_gguf(
    folder: Path, target: Path, *, quant: str, name: str, progress: Progress, force: bool = False
) -> GgufResult:
    """Write a checkpoint as a .gguf file; it stands under its name only when it is whole.

    Args:
        folder: a Phi-3 checkpoint in safetensors with its tokenizer files.
        quant: of `QUANTS`.
        name: of the model; see `GgufResult.name` for what became of it.
        progress: told what is done, the bytes so far and those in all, where they are known.
        force: replace a file that is there.

    Raises:
        ExportError: no such quant, a library is missing, the target exists, the disk is too small, or llama.cpp has no way
            to hold this model or its vocabulary.
        ModelError: the folder is no whole checkpoint.
    """
    check_quant(quant)
    if target.exists() and not force:
        raise ExportError(f"{target} exists.", "Give another place, or --force.")
    weights = open_weights(folder)
    plan = plan_gguf(folder, weights.info, quant=quant, name=name)
    part, whole = (target.with_name(f"{target.name}.{ending}") for ending in ("part", "whole.part"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_disk(target.parent, plan.num_bytes)
        _write(part, plan, weights, progress)
        if quant in QUANTIZED:
            quantize_file(part, whole, quant, progress)
            whole.replace(part)
        part.replace(target)
    except OSError as error:
        raise ExportError(
            f"{target} cannot be written: {error}.", "Give another place, or make room on the disk."
        ) from error
    finally:
        for path in (part, whole):
            with suppress(FileNotFoundError):
                path.unlink()
    return GgufResult(
        path=target,
        num_bytes=target.stat().st_size,
        num_tensors=len(plan.tensors),
        quant=quant,
        name=plan.prompting.name,
        notes=(*plan.prompting.notes, *describe_limits(plan.config), *LIMITS.get(plan.vocabulary.pre, ())),
    )


def check_quant(quant: str) -> None:
    """Raise ExportError for a type that nobody knows, or whose library is not installed."""
    if quant not in QUANTS:
        raise ExportError(f"There is no --quant '{quant}'.", f"The names: {', '.join(QUANTS)}.")
    if importlib.util.find_spec("gguf") is None:
        raise ExportError("A .gguf file needs the gguf package.", "Install it: pip install 'qlora-phi3[gguf]'")
    if quant in QUANTIZED:
        check_quantizer(quant)


def read_phi3_config(folder: Path) -> Phi3Config:
    """The config of a checkpoint whose arithmetic llama.cpp's phi3 models can do.

    Raises:
        ExportError: they cannot; ModelError: there is no config of a phi3 model.
    """
    config = read_config(str(folder))
    parse_architecture(config, str(folder))
    head_size = config["hidden_size"] // config["num_attention_heads"]
    for key, value, wanted in (
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("head_dim", config.get("head_dim") or head_size, head_size),
        ("quantization_config", config.get("quantization_config"), None),
    ):
        if value != wanted:
            raise ExportError(
                f"The config.json of {folder} has {key} = {value!r}; llama.cpp's phi3 models have {wanted!r}.",
                "Convert a plain 16- or 32-bit checkpoint of the Phi-3 family.",
            )
    return Phi3Config.from_dict(config)


def describe_limits(config: Phi3Config) -> tuple[str, ...]:
    """What llama.cpp does differently with a model of this config."""
    notes = []
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        notes.append(
            f"llama.cpp does not apply the sliding window: past {config.sliding_window:,} tokens it attends to everything."
        )
    if _is_longrope(config):
        original = config.rope_parameters["original_max_position_embeddings"]
        notes.append(
            f"llama.cpp takes the long rotary factors as soon as its context (-c, num_ctx) is larger than {original:,}, "
            "however short the prompt; transformers goes by the prompt."
        )
    return tuple(notes)


def _is_longrope(config: Phi3Config) -> bool:
    return bool(config.rope_parameters["rope_type"] == "longrope")


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"The .gguf file needs {format_gib(needed)}, and {folder} has {format_gib(free)} free.",
            "Free some, choose a smaller --quant, or write it elsewhere.",
        )


def _fill_header(plan: GgufPlan) -> Any:
    """A GGUFWriter that knows all but the tensors."""
    import gguf

    writer = gguf.GGUFWriter(path=None, arch=gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.PHI3])
    writer.add_type("model")
    writer.add_name(plan.prompting.name)
    writer.add_file_type(
        gguf.LlamaFileType["ALL_F32" if plan.file_type == "f32" else f"MOSTLY_{plan.file_type.upper()}"]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_architecture(writer, plan.config)
    _add_vocabulary(writer, plan.vocabulary)
    _add_prompting(writer, plan.prompting, plan.tokenizer)
    return writer


def _add_architecture(writer: Any, config: Phi3Config) -> None:
    rope = config.rope_parameters
    head_size = config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(head_size * rope["partial_rotary_factor"]))
    writer.add_rope_freq_base(rope["rope_theta"])
    # 0 says that there is none: without the key, llama.cpp of 2024 guesses a window from the context length.
    writer.add_sliding_window(config.sliding_window or 0)
    if _is_longrope(config):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))[1])


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges is not None:
        writer.add_token_merges(list(vocabulary.merges))


def _add_prompting(writer: Any, prompting: Prompting, tokenizer: Any) -> None:
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_eot_token_id, prompting.end_of_turn),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(prompting.add_bos)
    writer.add_add_eos_token(False)  # a prompt is there to be gone on with
    if prompting.template is not None:
        writer.add_chat_template(prompting.template)


def _write(path: Path, whole: GgufPlan, weights: Weights, progress: Progress) -> None:
    """Header, then every tensor; `path` is written over."""
    writer, plans = _fill_header(whole), whole.tensors
    for plan in plans:
        writer.add_tensor_info(plan.name, plan.shape, None, plan.num_bytes, raw_dtype=_type(plan))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    total = sum(plan.num_bytes for plan in plans)
    done = 0
    with path.open("ab") as file:
        for plan in plans:
            writer.write_padding(file, file.tell())
            for piece in encode(plan, weights):
                file.write(piece)
                done += len(piece)
                progress("Writing the .gguf file", done, total)
        writer.write_padding(file, file.tell())
        file.flush()
        os.fsync(file.fileno())


def _type(plan: TensorPlan) -> Any:
    import gguf

    return gguf.GGMLQuantizationType[plan.type]
