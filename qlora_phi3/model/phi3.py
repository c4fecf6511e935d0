"""The 4-bit base, its adapter, and what must hold for both: precision, coverage, no cache, no repacking."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, BitsAndBytesConfig, Phi3ForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging as transformers_logging

from qlora_phi3.errors import ModelError
from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES, ExecutionPlan
from qlora_phi3.family import Architecture
from qlora_phi3.model.attention import BY_DOCUMENT, build_window_masks, register_attention, without_mask
from qlora_phi3.model.loss import chunked_cross_entropy, select_supervised
from qlora_phi3.model.mlp import set_mlp_tiles
from qlora_phi3.recipe.schema import Model, Quantization


@dataclass
class Phi3Output(CausalLMOutputWithPast):  # type: ignore[misc]
    """A forward's output; with labels, `loss` and `num_correct` are set and `logits` is not."""

    num_correct: Tensor | None = None


class Phi3ForChunkedLoss(Phi3ForCausalLM):  # type: ignore[misc]
    """Phi-3 whose forward, given labels, returns the chunked loss and never the logits."""

    #: fp32 logits alive at once in the loss.
    logits_tile_bytes = DEFAULT_LOGITS_TILE_BYTES

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        num_items_in_batch: int | None = None,
        document_lengths: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `Phi3ForCausalLM.forward`; `labels` are unshifted, and the summed loss is divided by `num_items_in_batch`.

        Without `num_items_in_batch` the loss is the mean over the supervised positions. `document_lengths` says where the
        documents of a packed sequence end.
        """
        if labels is None:
            return super().forward(input_ids, **kwargs)
        if document_lengths is not None and self.config._attn_implementation == BY_DOCUMENT:
            kwargs |= self._by_document(document_lengths)
        hidden = self.model(input_ids, **{**kwargs, "use_cache": False}).last_hidden_state
        hidden, targets = select_supervised(hidden, labels)
        loss, num_correct = chunked_cross_entropy(
            hidden,
            _trained_weight(self.lm_head),
            targets,
            normalizer=num_items_in_batch or max(1, len(targets)),
            tile_bytes=self.logits_tile_bytes,
        )
        return Phi3Output(loss=loss, num_correct=num_correct)

    def _by_document(self, lengths: tuple[int, ...]) -> dict[str, Any]:
        """What attention over documents laid end to end is told."""
        device = self.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.model.embed_tokens.weight.dtype
        masks = build_window_masks(lengths, self.config.sliding_window, device=device, dtype=dtype)
        return {"document_lengths": lengths, "attention_mask": without_mask(device), "window_masks": masks}


def _trained_weight(head: nn.Module) -> Tensor:
    """The output head's weight; PEFT's trained copy where `modules_to_save` names the head."""
    chosen = head.modules_to_save[head.active_adapters[0]] if isinstance(head, ModulesToSaveWrapper) else head
    return cast(Tensor, chosen.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """In which dtype the matmuls run, and the one line that says why."""

    compute_dtype: torch.dtype
    reason: str


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """The compute dtype for a device: what the recipe asks for, or for "auto" bf16 where it is native.

    `torch.cuda.is_bf16_supported()` is True under emulation, so the compute capability is asked for. On CPU bf16 is native
    with AVX512-BF16 or AMX.
    """
    if wanted != "auto":
        return Precision(compute_dtype=getattr(torch, wanted), reason="the recipe asks for it")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return Precision(compute_dtype=torch.bfloat16, reason=f"compute capability {major}.{minor} has bf16")
        return Precision(compute_dtype=torch.float16, reason=f"compute capability {major}.{minor} has no bf16")
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return Precision(compute_dtype=torch.bfloat16, reason="this processor computes bf16 natively")
    return Precision(compute_dtype=torch.float32, reason="this processor has no native bf16")


def load_tokenizer(config: Model) -> PreTrainedTokenizerBase:
    """The base's own fast tokenizer.

    Raises:
        ModelError: there is none, or its files cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name, revision=config.revision)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(" :.")
        raise ModelError(
            f"The tokenizer of {config.name} cannot be read: {reason}.",
            "Point [model] name at a whole checkpoint, its tokenizer files among it.",
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"{config.name} has no fast tokenizer (tokenizer.json).", "Use a checkpoint that has one.")
    return tokenizer


def load_base(
    config: Model,
    quantization: Quantization,
    architecture: Architecture,
    *,
    precision: Precision,
    device: torch.device,
    longest_row: int,
) -> Phi3ForChunkedLoss:
    """Load the frozen base, in 4-bit where the recipe says so.

    Args:
        longest_row: tokens of the longest row the model will see; the sliding window is dropped where no row reaches it,
            which is the same model without an explicit attention mask.

    Raises:
        ModelError: weights missing, cut short, of the wrong shape, or given only as a pickle.
    """
    register_attention()
    with quiet_transformers():
        try:
            model, info = Phi3ForChunkedLoss.from_pretrained(
                config.name,
                revision=config.revision,
                dtype=precision.compute_dtype,
                quantization_config=quantization_config(quantization, precision),
                attn_implementation=attention_name(config),
                device_map={"": device},
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, SafetensorError, EOFError, RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelError(
                _why_not_loaded(config.name, error), "Download the checkpoint again, whole, as safetensors."
            ) from error
    absent = [*sorted(info["missing_keys"]), *sorted(map(str, info["mismatched_keys"]))] or _of_another_shape(model)
    if absent:
        raise ModelError(
            f"The weights of {config.name} are incomplete: {len(absent)} tensors are missing or of another shape, "
            f"first {absent[0]}.",
            "Download the checkpoint again.",
        )
    configure_base(model, architecture, longest_row=longest_row)
    return cast(Phi3ForChunkedLoss, model)


def configure_base(model: Phi3ForChunkedLoss, architecture: Architecture, *, longest_row: int) -> None:
    """What every loaded base gets: frozen, no cache, no window that no row reaches, no repacking."""
    model.config.use_cache = False
    if architecture.sliding_window is not None and longest_row <= architecture.sliding_window:
        model.config.sliding_window = None
        for module in model.modules():
            if getattr(module, "sliding_window", None) is not None:
                module.sliding_window = None
    _disable_cpu_repacking(model)
    model.requires_grad_(False)


def attention_name(config: Model) -> str:
    """The attention's name in transformers."""
    return BY_DOCUMENT if config.attn_implementation == "sdpa" else config.attn_implementation


def quantization_config(config: Quantization, precision: Precision) -> BitsAndBytesConfig | None:
    """The recipe's [quantization] as transformers reads it; None where the base stays in 16 or 32 bit."""
    if not config.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=precision.compute_dtype,
    )


def _why_not_loaded(name: str, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    pickles = sorted(Path(name).glob("*.bin")) if Path(name).is_dir() else []
    if pickles and not list(Path(name).glob("*.safetensors")):
        return f"{name} holds its weights only as a pickle ({pickles[0].name}), which can run code when it is read."
    return f"The weights of {name} cannot be read: {first_line.rstrip('.')}."


def _of_another_shape(model: nn.Module) -> list[str]:
    """The 4-bit layers whose weights have not the shape of the config; transformers 5.23 compares only unquantized ones."""
    return [
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, bnb.nn.Linear4bit)
        and tuple(layer.weight.quant_state.shape) != (layer.out_features, layer.in_features)
    ]


def _disable_cpu_repacking(model: nn.Module) -> None:
    """Stop bitsandbytes 0.50 from repacking 4-bit weights in place at the first evaluation on CPUs with AVX512-BF16.

    It never undoes that, and training afterwards is silently wrong: the first layer's gradient norm fell to 15 %. To be
    removed when bitsandbytes restores the weights in `train()`.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings and bars while its loading report is read from the return value instead."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def set_checkpointing(model: PeftModel, every: int, *, offload: bool = False) -> None:
    """Recompute every `every`-th decoder layer in the backward pass, 0 none; may be called again at any time.

    transformers makes the embedding's output need a gradient, for the reentrant kind; the non-reentrant one does without,
    and saves the backward pass through the first layer's own input.

    Args:
        offload: keep what recomputation starts from in the computer's memory.
    """
    base = model.get_base_model()
    if every:
        base.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every, offload=offload)
        base.disable_input_require_grads()
    else:
        base.activation_checkpointing_disable()


def apply_execution_plan(model: PeftModel, execution: ExecutionPlan) -> None:
    """Give the model what a plan chose: recomputation, offloading, the tiles of the MLP and of the loss."""
    set_checkpointing(model, execution.checkpoint_every, offload=execution.activation_offloading)
    set_mlp_tiles(model, execution.mlp_tile_tokens)
    model.get_base_model().logits_tile_bytes = execution.logits_tile_bytes
