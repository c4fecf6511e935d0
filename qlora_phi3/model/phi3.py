"""The base model: loading it, its precision, and the model class whose forward accepts packed documents.

Every loaded base is frozen, has no cache, and never repacks its 4-bit weights (`configure_base`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import transformers.modeling_utils
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging as transformers_logging

from qlora_phi3.errors import ModelError, memory_errors
from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES, ExecutionPlan
from qlora_phi3.family import Architecture, find_config, read_config
from qlora_phi3.files import foreign_errors
from qlora_phi3.hardware.gpu_table import NATIVE_BFLOAT16
from qlora_phi3.model.attention import BY_DOCUMENT, KeptKernels, build_window_masks, register_attention, takes_packs, without_mask
from qlora_phi3.model.base_cache import find_base_cache
from qlora_phi3.model.checkpoint import check_checkpoint
from qlora_phi3.model.layer import LeanDecoderLayer
from qlora_phi3.model.quantized import disable_cpu_repacking, quantization_config
from qlora_phi3.model.weights import download_weights
from qlora_phi3.recipe.schema import Model, Quantization
from qlora_phi3.reporter import Progress


class PackedPhi3ForCausalLM(Phi3ForCausalLM):  # type: ignore[misc]
    """Phi-3 that accepts packed documents, and can return its final hidden states in place of logits."""

    def __init__(self, config: Phi3Config) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.__class__ = LeanDecoderLayer  # the same modules and parameters, another forward

    #: Bytes of fp32 logits that an objective may hold at once.
    logits_tile_bytes = DEFAULT_LOGITS_TILE_BYTES
    #: NEFTune's alpha, of the noise on the embeddings in training; None: no noise.
    neftune_noise_alpha: float | None = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        document_lengths: tuple[int, ...] | None = None,
        document_starts: Tensor | None = None,
        return_final_hidden: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | BaseModelOutputWithPast:
        """As `Phi3ForCausalLM.forward`.

        Args:
            input_ids: (rows, length), int64.
            document_lengths: tokens of each document of a packed sequence, in order; they sum to length.
            document_starts: (documents + 1,) int32, their sums, which the GPU's kernel for packs reads.
            return_final_hidden: return (rows, length, hidden_size) as `last_hidden_state`, without computing logits.
        """
        if self.training and self.neftune_noise_alpha and input_ids is not None:
            mask, embedded = kwargs.get("attention_mask"), self.model.embed_tokens(input_ids)
            lengths = document_lengths or (torch.ones_like(input_ids) if mask is None else mask).sum(1, True)
            kwargs["inputs_embeds"], input_ids = _add_noise(embedded, lengths, self.neftune_noise_alpha), None
        if document_lengths is not None and self.config._attn_implementation == BY_DOCUMENT:
            device, window = self.device, self.config.sliding_window
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else self.model.embed_tokens.weight.dtype
            is_plain = len(document_lengths) == 1 and (window is None or window >= document_lengths[0])
            has_dropout = self.training and self.config.attention_dropout
            head_size = self.model.layers[0].self_attn.head_dim
            if is_plain or has_dropout or document_starts is None or not takes_packs(device, dtype, head_size):
                document_starts = None
                kwargs["window_masks"] = build_window_masks(document_lengths, window, device=device, dtype=dtype)
            kwargs |= {"document_lengths": document_lengths, "document_starts": document_starts}
            kwargs["attention_mask"] = without_mask(device)
        if not return_final_hidden:
            return super().forward(input_ids, **kwargs)
        kwargs.pop("labels", None)  # PeftModelForCausalLM always passes it
        return self.model(input_ids, **{**kwargs, "use_cache": False})

    @property
    def head_weight(self) -> Tensor:
        """The output head (vocabulary, hidden_size); PEFT's trained copy if `modules_to_save` names the head and the adapter is
        not disabled.
        """
        head = self.lm_head
        if isinstance(head, ModulesToSaveWrapper):
            head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
        return cast(Tensor, head.weight)


def _add_noise(embedded: Tensor, lengths: tuple[int, ...] | Tensor, alpha: float) -> Tensor:
    """NEFTune: add noise between -1 and 1 times alpha / sqrt(tokens of the row x hidden_size) to embeddings.

    transformers takes the tokens of the padded batch; with those of each row, packing and micro-batches change no scale.

    Args:
        embedded: (rows, length, hidden_size).
        lengths: of the documents of one packed row, or (rows, 1) int64 of padded rows.
    """
    if isinstance(lengths, tuple):
        lengths = torch.cat([torch.full((1, length), length) for length in lengths], dim=1)
    scale = alpha * (lengths.to(embedded.device) * embedded.shape[-1]).rsqrt()
    return torch.addcmul(embedded, torch.empty_like(embedded).uniform_(-1, 1), scale[..., None].to(embedded.dtype))


def find_base(model: nn.Module) -> PackedPhi3ForCausalLM:
    """Find the base inside its wrappers: PEFT's, DistributedDataParallel, or none."""
    return next(module for module in model.modules() if isinstance(module, PackedPhi3ForCausalLM))


def choose_precision(wanted: str, capability: tuple[int, int] | None) -> tuple[torch.dtype, str]:
    """Choose the dtype of the matmuls on a device: the recipe's, or for "auto" bf16 where the hardware has it; and say why.

    `torch.cuda.is_bf16_supported()` is True under emulation, so the compute capability of a GPU decides. A CPU (None) has bf16
    with AVX512-BF16 or AMX.
    """
    if wanted != "auto":
        return getattr(torch, wanted), "the recipe asks for it"
    if capability is not None:
        name = f"compute capability {capability[0]}.{capability[1]}"
        if capability >= NATIVE_BFLOAT16:
            return torch.bfloat16, f"{name} has bf16"
        return torch.float16, f"{name} has no bf16"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "this processor computes bf16 natively"
    return torch.float32, "this processor has no native bf16"


def build_config(config: Mapping[str, Any], name: str, **changes: Any) -> Phi3Config:
    """transformers' reading of a config.json; ModelError, with the model's `name`, for a type or a size that it refuses."""
    with foreign_errors(ModelError, f"The config.json of {name} cannot be used: {{reason}}.", "Download it again."):
        return Phi3Config(**{**config, **changes})


MEMORY_HINT = "Close other programs that use it; qlora-phi3 vram-check says what a run needs."


def load_base(
    config: Model,
    quantization: Quantization,
    architecture: Architecture,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    longest_row: int,
    progress: Progress = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> PackedPhi3ForCausalLM:
    """Load the frozen base, in 4-bit if the recipe says so: from the cache, or quantized and then cached. ModelError where its
    weights cannot be read, and as `check_checkpoint`.

    Args:
        longest_row: tokens of the longest row that the model will process. The sliding window is removed if no row reaches it:
            the model is the same, and needs no explicit attention mask.
        progress, note: of the download of what is not here; receives one line where the cache is used or cannot be.
    """
    register_attention()
    path = find_config(config.name, config.revision)
    quantized = None if architecture.stored else quantization_config(quantization, compute_dtype)
    settings = build_config(read_config(config.name, config.revision), config.name)
    # In the hub's cache the folder's name is the commit, which transformers 5.23 no longer records.
    settings._commit_hash = path.parent.name if path.parent.parent.name == "snapshots" else None
    if architecture.stored is not None:
        settings.quantization_config["bnb_4bit_compute_dtype"] = str(compute_dtype).removeprefix("torch.")
    problem = f"The weights of {config.name} cannot be read: {{reason}}."
    hint = "Download the checkpoint again, complete, as safetensors."
    memory = f"The memory of {device} ran out while {config.name} was loaded: {{reason}}."
    revision = settings._commit_hash or config.revision
    with foreign_errors(ModelError, problem, hint):
        folder = download_weights(config.name, revision, progress)
    check_checkpoint(str(folder), architecture)
    cache = None if quantized is None else find_base_cache(config.name, folder, quantized, device, note)
    tensors = None if cache is None else cache.read()
    placed = {"dtype": compute_dtype, "device_map": {"": device}, "attn_implementation": attention_name(config)}
    with quiet_transformers(), foreign_errors(ModelError, problem, hint), memory_errors(ModelError, memory, MEMORY_HINT):
        if tensors is None or quantized is None:
            model = PackedPhi3ForCausalLM.from_pretrained(
                config.name, config=settings, revision=revision, quantization_config=quantized, use_safetensors=True, **placed
            )
        else:
            settings.quantization_config = quantized.to_dict()
            model = PackedPhi3ForCausalLM.from_pretrained(None, config=settings, state_dict=tensors, **placed)
            _name_model(model, config.name, revision)
    if cache is not None and tensors is None:
        cache.write(model)
    _set_compute_dtype(model, compute_dtype)
    configure_base(model, architecture, longest_row=longest_row)
    return cast(PackedPhi3ForCausalLM, model)


def _name_model(model: PackedPhi3ForCausalLM, name: str, revision: str | None) -> None:
    """What `from_pretrained` sets of a model that has a name: the name, which adapters record, and its generation_config.json."""
    model.name_or_path = model.config.name_or_path = name
    places = {"cache_dir": None, "force_download": False, "proxies": None, "local_files_only": False, "token": None}
    model.adjust_generation_fn(None, False, False, name, **places, revision=revision, subfolder="", trust_remote_code=False)


def _set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Of a base stored in 4-bit, transformers 5.23 leaves the files' own dtypes."""
    for parameter in model.parameters():
        if hasattr(parameter, "quant_state"):
            parameter.quant_state.dtype = dtype
        else:
            parameter.data = parameter.data.to(dtype)


def configure_base(model: PackedPhi3ForCausalLM, architecture: Architecture, *, longest_row: int) -> None:
    """Prepare a loaded base: frozen, no cache, no sliding window that no row reaches, no repacking of 4-bit weights."""
    model.config.use_cache = False
    if architecture.sliding_window is not None and longest_row <= architecture.sliding_window:
        model.config.sliding_window = None
        for module in model.modules():
            if getattr(module, "sliding_window", None) is not None:
                module.sliding_window = None
    disable_cpu_repacking(model)
    model.requires_grad_(False)


def attention_name(config: Model) -> str:
    """The name in transformers of the recipe's attention implementation."""
    return BY_DOCUMENT if config.attn_implementation == "sdpa" else config.attn_implementation


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings and progress bars; `check_checkpoint` reports what is missing."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def apply_execution_plan(model: PeftModel, execution: ExecutionPlan) -> None:
    """Apply a plan to the model: recomputation, offloading, the tiles of the MLP and of the loss, the fused kernels."""
    every, offload = execution.checkpoint_every, execution.activation_offloading
    set_checkpointing(model, every, offload=offload, keep_attention=execution.keep_attention)
    set_mlp_tiles(model, execution.mlp_tile_tokens)
    for layer in find_base(model).model.layers:
        layer.fused_kernels = execution.fused_kernels
    model.get_base_model().logits_tile_bytes = execution.logits_tile_bytes


def set_checkpointing(model: PeftModel, every: int, *, offload: bool = False, keep_attention: bool = False) -> None:
    """Recompute every `every`-th decoder layer in the backward pass, 0 none; it may be called again at any time.

    For reentrant checkpointing transformers makes the embedding's output require a gradient. Non-reentrant checkpointing does not
    need this, and without it the backward pass skips the input of the first layer. `offload` stores the inputs of recomputed
    layers in host memory, and their attention where `keep_attention` keeps it (never with dropout in the attention itself).
    """
    base = model.get_base_model()

    def contexts() -> tuple[KeptKernels, KeptKernels]:
        kept = KeptKernels(transformers.modeling_utils.save_on_cpu(pin_memory=True) if offload else None)
        return kept, kept

    if every:
        keeping = {"context_fn": contexts} if keep_attention and not base.config.attention_dropout else {}
        base.activation_checkpointing_enable({"use_reentrant": False, **keeping}, every_n_layers=every, offload=offload)
        base.disable_input_require_grads()
    else:
        base.activation_checkpointing_disable()


def set_mlp_tiles(model: nn.Module, tile_tokens: int) -> None:
    """Compute norm and MLP of every decoder layer in tiles of tokens, 0 for untiled; it may be called again at any time."""
    for layer in find_base(model).model.layers:
        layer.mlp_tile_tokens = tile_tokens
