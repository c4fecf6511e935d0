"""A phi3 model that never stands in memory as a whole: each layer's weights are read just before it runs, and let go after it.

It is the real model class with the real PEFT layers, in fp32, whatever the weights are stored in: what differs between two models
is then their weights, and nothing of the arithmetic's noise. The largest layer and the activations are alive at once; embedding
and head are read in pieces. accelerate's hooks do the like for 16-bit models, but they take whole tensors from a map by name, and
empty the layer under a DoRA before PEFT has read its weight.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import Phi3Config
from transformers.initialization import no_init_weights

from qlora_phi3.adapters.adapter_deltas import EMBEDDING, HEAD, load_lora_config
from qlora_phi3.adapters.peft_io import ADAPTER_WEIGHTS, PREFIX
from qlora_phi3.errors import ExportError, ModelError
from qlora_phi3.export.base import RecordedBase
from qlora_phi3.model.attention import BY_DOCUMENT, build_window_masks, register_attention, without_mask
from qlora_phi3.model.loss import select_supervised
from qlora_phi3.model.phi3 import PackedPhi3ForCausalLM
from qlora_phi3.model.weights import StoredWeights, TensorInfo, Weights, open_file, read_tensor, split_rows
from qlora_phi3.step import Batch, evaluating

#: What is being done, how much of it is done, and out of how much (None: unknown).
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """What a model made of the supervised positions: all that is needed to make their logits, tile by tile."""

    #: (positions, hidden_size), fp32.
    hidden: Tensor
    #: The output head, some rows of the vocabulary at a time.
    head: Callable[[], Iterator[Tensor]]


@dataclass(frozen=True, slots=True)
class _Slot:
    """A parameter of the model, and the base's tensor that belongs there."""

    module: nn.Module
    attribute: str
    name: str


class StreamedModel:
    """The real model, filled layer by layer from `weights` while it runs."""

    def __init__(
        self, model: PackedPhi3ForCausalLM, slots: Sequence[_Slot], weights: Weights, device: torch.device
    ) -> None:
        self.model, self.weights, self.device = model, weights, device
        # One for all layers: where a page fault is dear, fresh memory for each took as long as the layer's own matmul.
        self._buffer = torch.empty(0)
        self._room_size = max(prod(weights.info[slot.name].shape) for slot in slots)
        around = {layer.get_base_layer(): layer for layer in model.modules() if isinstance(layer, LoraLayer)}
        for slot in slots:
            owner = around.get(slot.module, slot.module)  # DoRA reads the weight after its base layer has run
            owner.register_forward_pre_hook(partial(self._fill, slot))
            owner.register_forward_hook(partial(_empty, slot, getattr(slot.module, slot.attribute)))

    def run(self, batch: Batch, what: str, progress: Progress) -> Final:
        """Take a batch of packed micro-batches to the final hidden states of its supervised positions.

        The weights are read once for each micro-batch.
        """
        layers = self.model.model.layers
        done, total = 0, len(layers) * len(batch.micro_batches)

        def tell(*_: Any) -> None:
            nonlocal done
            done += 1
            progress(what, done, total)

        telling = [layer.register_forward_hook(tell) for layer in layers]
        self._buffer = torch.empty(self._room_size, device=self.device)
        try:
            with evaluating(self.model), torch.no_grad():
                hidden = torch.cat([self._run(micro) for micro in batch.micro_batches])
        finally:
            self._buffer = torch.empty(0)
            for hook in telling:
                hook.remove()
        return Final(hidden=hidden, head=self.head())

    def _fill(self, slot: _Slot, *_: Any) -> None:
        shape, start = self.weights.info[slot.name].shape, 0
        whole = self._buffer[: prod(shape)].view(shape)
        for piece in self.weights.iter_row_chunks(slot.name):
            whole[start : start + len(piece)] = piece
            start += len(piece)
        setattr(slot.module, slot.attribute, nn.Parameter(whole, requires_grad=False))

    def _run(self, micro: Mapping[str, Any]) -> Tensor:
        lengths, config = micro["document_lengths"], self.model.config
        masks = build_window_masks(lengths, config.sliding_window, device=self.device, dtype=torch.float32)
        output = self.model.model(
            inputs_embeds=self._embed(micro["input_ids"]),
            position_ids=micro["position_ids"].to(self.device),
            attention_mask=without_mask(self.device),
            document_lengths=lengths,
            window_masks=masks,
            use_cache=False,
        )
        return select_supervised(output.last_hidden_state, micro["labels"].to(self.device))[0]

    def _embed(self, ids: Tensor) -> Tensor:
        """(1, length) -> (1, length, hidden_size): the embedding's rows of these ids; the rest of it is read and dropped."""
        embedded = torch.empty((*ids.shape, self.model.config.hidden_size))
        start = 0
        for piece in self.weights.iter_row_chunks(EMBEDDING):
            here = (ids >= start) & (ids < start + len(piece))
            embedded[here] = piece.cpu()[ids[here] - start].float()
            start += len(piece)
        return embedded.to(self.device)

    def head(self) -> Callable[[], Iterator[Tensor]]:
        """Reads the head; holds the model no longer."""
        return partial(self.weights.iter_row_chunks, HEAD if HEAD in self.weights.info else EMBEDDING)


def stream_plain(weights: Weights, config: dict[str, Any], *, device: torch.device | None = None) -> StreamedModel:
    """A model of plain linear layers.

    Args:
        weights: the tensors of a whole checkpoint.
        config: the contents of its config.json.

    Raises:
        ModelError: a tensor is missing or has not the shape that the config says.
    """
    device = device or torch.device("cpu")
    model = _build_hollow(config, device)
    return StreamedModel(model, _find_slots(model, weights), weights, device)


def stream_live(
    base: Weights, config: dict[str, Any], adapter: Path, *, device: torch.device | None = None
) -> StreamedModel:
    """A base with PEFT's own layers and the trained adapter around it.

    Args:
        base: as the run held it (`TrainedBase`), which makes it the model that was trained; or as its files hold it.
        config: the contents of the base's config.json.

    Raises:
        ModelError: as `stream_plain`.
        ExportError: the adapter does not fit the model.
    """
    device = device or torch.device("cpu")
    model = _build_hollow(config, device)
    slots = _find_slots(model, base)
    weights = _WithSaved(base, open_file(adapter / ADAPTER_WEIGHTS, error=ExportError))
    adapted = _attach(model, weights, adapter)
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.to(device)
    for module in (model.model.embed_tokens, model.lm_head):
        if isinstance(module, LoraLayer):
            raise ExportError("The adapter has a LoRA on the embedding or on the output head, which is not handled.")
    return StreamedModel(model, slots, weights, device)


class _WithSaved:
    """A base with the embedding and the head that an adapter has in their place (`modules_to_save`); a `Weights`.

    Phi-4-mini's are 2.3 GiB each in fp32: they are read from the adapter's file in pieces, and PEFT hears nothing of them.
    """

    def __init__(self, base: Weights, adapter: StoredWeights) -> None:
        self.base, self.adapter = base, adapter
        self.saved = {name: PREFIX + name for name in (EMBEDDING, HEAD) if PREFIX + name in adapter.info}
        info = dict(base.info)
        info.setdefault(HEAD, info[EMBEDDING])  # a tied head stays the base's own embedding
        self.info = info | {name: adapter.info[key] for name, key in self.saved.items()}

    def iter_row_chunks(self, name: str) -> Iterator[Tensor]:
        """As `Weights.pieces`."""
        if name in self.saved:
            return self.adapter.iter_row_chunks(self.saved[name])
        return self.base.iter_row_chunks(name if name in self.base.info else EMBEDDING)


def _attach(model: PackedPhi3ForCausalLM, weights: _WithSaved, adapter: Path) -> PeftModel:
    """PEFT's layers around a hollow model, with the adapter's weights but those that `weights` reads in pieces."""
    settings, stored = load_lora_config(adapter), weights.adapter
    read_here = [name.removesuffix(".weight") for name in weights.saved]
    settings.modules_to_save = [
        name for name in settings.modules_to_save or () if not any(path.endswith(name) for path in read_here)
    ] or None
    tensors = {key: read_tensor(stored, key).float() for key in stored.info if key not in weights.saved.values()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice is for those who train
            adapted = get_peft_model(model, settings, low_cpu_mem_usage=True)
            result = set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ExportError(f"The adapter {adapter} does not fit the model: {reason}.") from error
    wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if ".lora_" in key)]
    if wrong:
        raise ExportError(f"The adapter {adapter} does not fit the model: {wrong[0]} has no counterpart.")
    return adapted


class TrainedBase:
    """A base's weights as the run held them: 4-bit ones dequantized, everything in the run's dtype; a `Weights`.

    bitsandbytes dequantizes to the dtype of the layer's input, which in training was the run's. A `Linear4bit` that is given
    fp32 dequantizes to fp32: to other values than the trained ones. So here it is the run's, and what is computed fp32.
    """

    def __init__(self, base: RecordedBase) -> None:
        self.base = base
        self.info = {name: TensorInfo(info.shape, base.record.dtype) for name, info in base.info.items()}

    def iter_row_chunks(self, name: str) -> Iterator[Tensor]:
        """As `Weights.pieces`; bitsandbytes' own kernel dequantizes the tensor whole, where a merge does it in pieces."""
        quantized = self.base.quantized(name)
        if quantized is None:
            return (piece.to(self.base.record.dtype) for piece in self.base.iter_row_chunks(name))
        return split_rows(dequantize_4bit(quantized.packed, quantized.state))


def _build_hollow(config: dict[str, Any], device: torch.device) -> PackedPhi3ForCausalLM:
    """The model with parameters that have shape and no weight."""
    register_attention()
    with no_init_weights(), torch.device("meta"):
        settings = Phi3Config(**{**config, "dtype": torch.float32})
        settings._attn_implementation = BY_DOCUMENT
        model = PackedPhi3ForCausalLM(settings)
    model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(device)  # computed from the config, not stored
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            module.weight = nn.Parameter(_placeholder(module.weight.shape, device))
    model.requires_grad_(False)
    return model


def _placeholder(shape: torch.Size, device: torch.device) -> Tensor:
    """One NaN, shown at every place. PEFT moves the adapter to where the base layer's weight is: on "meta" it would be lost."""
    return torch.tensor(float("nan"), device=device).expand(shape)


def _find_slots(model: PackedPhi3ForCausalLM, weights: Weights) -> list[_Slot]:
    """The parameters between embedding and head; must be asked before PEFT moves them about."""
    slots = []
    for path, module in model.model.named_modules(prefix="model"):
        if module is model.model.embed_tokens:
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}"
            if name not in weights.info:
                raise ModelError(f"The weights hold no {name}.", "Use a whole checkpoint.")
            if weights.info[name].shape != tuple(parameter.shape):
                shape = weights.info[name].shape
                raise ModelError(
                    f"{name} is of shape {shape}, and the config says {tuple(parameter.shape)}.",
                    "Use a whole checkpoint.",
                )
            slots.append(_Slot(module, attribute, name))
    return slots


def _empty(slot: _Slot, hollow: nn.Parameter, *_: Any) -> None:
    setattr(slot.module, slot.attribute, hollow)
