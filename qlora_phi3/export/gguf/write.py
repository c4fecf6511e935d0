"""A finished export as one .gguf file, for llama.cpp and Ollama; written tensor by tensor, a few rows at a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_phi3.data.tokenizer import load_tokenizer
from qlora_phi3.errors import ExportError
from qlora_phi3.export.gguf.prompt import Prompting, plan_prompting
from qlora_phi3.export.gguf.tensors import TensorPlan, encode, plan_tensors, quantize_file
from qlora_phi3.export.gguf.vocab import LIMITS, Vocabulary, read_vocabulary
from qlora_phi3.export.request import QUANTIZED
from qlora_phi3.export.writer import check_disk
from qlora_phi3.family import parse_architecture, read_config
from qlora_phi3.files import atomic_file, disk_errors
from qlora_phi3.model.weights import TensorInfo, Weights, open_weights
from qlora_phi3.recipe.schema import Model
from qlora_phi3.reporter import Progress
from qlora_phi3.units import MIB

#: Bytes on the disk for what is not a tensor: header, vocabulary, padding.
HEADER_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPlan:
    """A .gguf file before it is written; `num_bytes` are needed on the disk meanwhile."""

    folder: Path
    config: Phi3Config
    vocabulary: Vocabulary
    prompting: Prompting
    tensors: Sequence[TensorPlan]
    file_type: str  #: Of the file written first: the quant, or 16 bit for llama.cpp's quantizer.
    num_bytes: int


def plan_gguf(folder: Path, info: Mapping[str, TensorInfo], *, quant: str, name: str) -> GgufPlan:
    """Plan a .gguf file from shapes and dtypes; what llama.cpp cannot hold is found here. Else as `convert_to_gguf`."""
    stored = read_config(str(folder))
    parse_architecture(stored, str(folder))
    if (activation := stored.get("hidden_act", "silu")) != "silu":
        message = f"The config.json of {folder} has hidden_act = {activation!r}; llama.cpp's phi3 models have 'silu'."
        raise ExportError(message, "Export a Phi-3 with that activation.")
    config = Phi3Config.from_dict(stored)
    tokenizer = load_tokenizer(Model(name=str(folder)))
    tensors = plan_tensors(config, info, None if quant in QUANTIZED else quant)
    num_weights = sum(math.prod(tensor.shape) for tensor in tensors)
    quantized_bytes = int(num_weights * QUANTIZED.get(quant, 0) / 8)
    return GgufPlan(
        folder=folder,
        config=config,
        vocabulary=read_vocabulary(folder, tokenizer, config.vocab_size),
        prompting=plan_prompting(tokenizer, name),
        tensors=tensors,
        file_type="f16" if quant in QUANTIZED else quant,
        num_bytes=sum(plan.num_bytes for plan in tensors) + quantized_bytes + HEADER_BYTES,
    )


def convert_to_gguf(folder: Path, target: Path, *, quant: str, name: str, progress: Progress) -> tuple[str, ...]:
    """Write a checkpoint as a .gguf file, completely or not at all; return what llama.cpp does differently from training, for a
    person to read. ExportError where llama.cpp's quantizer is missing, the disk is too small, or llama.cpp cannot hold this model
    or its vocabulary; ModelError where the checkpoint is not complete.

    Args:
        folder: a Phi-3 checkpoint in safetensors with its tokenizer files.
        quant: that `check_quant` accepts.
        name: of the model; see `plan_prompting`.
        progress: called after every few rows.
    """
    weights = open_weights(folder)
    plan = plan_gguf(folder, weights.info, quant=quant, name=name)
    with disk_errors(target, ExportError):
        target.parent.mkdir(parents=True, exist_ok=True)
        check_disk(target.parent, plan.num_bytes)
        with atomic_file(target) as staging:
            if quant in QUANTIZED:
                unquantized = staging.with_suffix(".unquantized")
                try:
                    _write(unquantized, plan, weights, progress)
                    quantize_file(unquantized, staging, quant, progress)
                finally:
                    unquantized.unlink(missing_ok=True)
            else:
                _write(staging, plan, weights, progress)
    notes, config = [*plan.prompting.notes, *LIMITS.get(plan.vocabulary.pre, ())], plan.config
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        window = f"{config.sliding_window:,}"
        notes.append(f"llama.cpp does not apply the sliding window: past {window} tokens it attends to everything.")
    if config.rope_parameters["rope_type"] == "longrope":
        original = config.rope_parameters["original_max_position_embeddings"]
        notes.append(
            f"llama.cpp takes the long rotary factors as soon as its context (-c, num_ctx) is larger than {original:,}, "
            "however short the prompt; transformers decides by the prompt."
        )
    return tuple(notes)


def _write(path: Path, plan: GgufPlan, weights: Weights, progress: Progress) -> None:
    import gguf

    writer = gguf.GGUFWriter(path=None, arch=gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.PHI3])
    _add_architecture(writer, plan)
    _add_vocabulary(writer, plan)
    for tensor in plan.tensors:
        raw_dtype = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.num_bytes, raw_dtype=raw_dtype)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    done, total = 0, sum(tensor.num_bytes for tensor in plan.tensors)
    with path.open("ab") as file:
        for tensor in plan.tensors:
            writer.write_padding(file, file.tell())
            for chunk in encode(tensor, weights):
                file.write(chunk)
                done += len(chunk)
                progress("Writing the .gguf file", done, total)
        writer.write_padding(file, file.tell())


def _add_architecture(writer: Any, plan: GgufPlan) -> None:
    import gguf

    config, rope = plan.config, plan.config.rope_parameters
    head_size = config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(plan.prompting.name)
    file_type = "ALL_F32" if plan.file_type == "f32" else f"MOSTLY_{plan.file_type.upper()}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
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
    # 0 means that there is none: without the key, llama.cpp of 2024 guesses a window from the context length.
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))[1])


def _add_vocabulary(writer: Any, plan: GgufPlan) -> None:
    import gguf

    vocabulary, prompting = plan.vocabulary, plan.prompting
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    special = gguf.SpecialVocab(
        plan.folder,
        load_merges=vocabulary.model == "gpt2",
        special_token_types=vocabulary.special,  # gguf takes the id of a token that the tokenizer lacks from config.json
        n_vocab=plan.config.vocab_size,
    )
    # The rest of what gguf reads does not fit a fine-tuned Phi-3: its chat template decides whether a conversation begins with
    # bos and which token ends a turn, and `plan_prompting` changes the template so that llama.cpp reads the ids of the training.
    special.add_special_token = {"bos": prompting.add_bos, "eos": False}  # a prompt is continued, so it has no eos
    special.chat_template = prompting.template
    if prompting.end_of_turn is not None:
        special.special_token_ids["eot"] = prompting.end_of_turn
    special.add_to_gguf(writer, quiet=True)
