"""A phi3 model whose weights are read from files layer by layer: at no time are all of them in memory.

It is the real model class with the real PEFT layers, computed in fp32: two such models differ by their weights alone. The largest
layer and the activations are in memory at once. accelerate's hooks do this for 16-bit models, but take complete tensors by name,
and empty the layer under a DoRA before PEFT has read its weight.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import Phi3Config
from transformers.initialization import no_init_weights

from qlora_phi3.adapters.adapter_deltas import EMBEDDING, HEAD, load_lora_config
from qlora_phi3.adapters.peft_io import ADAPTER_WEIGHTS, PREFIX
from qlora_phi3.errors import ExportError
from qlora_phi3.export.base import CPU, RecordedBase
from qlora_phi3.model.attention import BY_DOCUMENT, build_window_masks, register_attention, without_mask
from qlora_phi3.model.loss import select_supervised
from qlora_phi3.model.phi3 import PackedPhi3ForCausalLM
from qlora_phi3.model.weights import ComputedWeights, TensorInfo, Weights, open_file, read_tensor, split_rows
from qlora_phi3.step import Batch, evaluating


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """The output of a model before its head, for the supervised positions: enough to compute their logits in tiles."""

    hidden: Tensor  # (positions, hidden_size), fp32
    head: Callable[[], Iterator[Tensor]]  # reads the head: chunks (words, hidden_size), in the dtype of the weights


#: Tensor -> the module, and the attribute of it, where it belongs.
_Slots = Mapping[str, tuple[nn.Module, str]]


class StreamedModel:
    """The real model; hooks read each layer's weights before the layer runs, and drop them after it."""

    def __init__(self, model: PackedPhi3ForCausalLM, slots: _Slots, weights: Weights, device: torch.device) -> None:
        self.model, self.weights, self.device = model, weights, device
        # One buffer for all layers: where page faults are slow, new memory for each layer took as long as its matmul.
        self._buffer = torch.empty(0)
        self._buffer_size = max(prod(weights.info[name].shape) for name in slots)
        owners = {layer.get_base_layer(): layer for layer in model.modules() if isinstance(layer, LoraLayer)}
        for name, (module, attribute) in slots.items():
            owner = owners.get(module, module)  # DoRA reads the weight after its base layer has run
            owner.register_forward_pre_hook(partial(self._fill, name, module, attribute))
            owner.register_forward_hook(partial(_set_parameter, module, attribute, getattr(module, attribute)))

    def run(self, batch: Batch, report: Callable[[int], None]) -> Final:
        """Compute the final hidden states of the supervised positions of a batch; `report` is called with the layers done.

        The weights are read once for each of the packed micro-batches.
        """
        layers, done = self.model.model.layers, 0

        def count_layer(*_: Any) -> None:
            nonlocal done
            done += 1
            report(done)

        hooks = [layer.register_forward_hook(count_layer) for layer in layers]
        self._buffer = torch.empty(self._buffer_size, device=self.device)
        try:
            with evaluating(self.model), torch.no_grad():
                hidden = torch.cat([self._run_micro_batch(micro) for micro in batch.micro_batches])
        finally:
            self._buffer = torch.empty(0)
            for hook in hooks:
                hook.remove()
        name = HEAD if HEAD in self.weights.info else EMBEDDING
        return Final(hidden=hidden, head=partial(self.weights.iter_row_chunks, name))  # which does not hold the model

    def _run_micro_batch(self, micro: Mapping[str, Any]) -> Tensor:
        """(1, length) ids of packed rows -> (supervised positions, hidden_size), fp32."""
        lengths, window = micro["document_lengths"], self.model.config.sliding_window
        masks = build_window_masks(lengths, window, device=self.device, dtype=torch.float32)
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
        """(1, length) ids -> (1, length, hidden_size), fp32: the embedding is read in chunks, and other rows dropped."""
        embedded = torch.empty((*ids.shape, self.model.config.hidden_size))
        start = 0
        for chunk in self.weights.iter_row_chunks(EMBEDDING):
            inside = (ids >= start) & (ids < start + len(chunk))
            embedded[inside] = chunk.cpu()[ids[inside] - start].float()
            start += len(chunk)
        return embedded.to(self.device)

    def _fill(self, name: str, module: nn.Module, attribute: str, *_: Any) -> None:
        """A forward pre-hook: read a tensor into the buffer, as fp32, and make it the parameter of a module."""
        shape, start = self.weights.info[name].shape, 0
        tensor = self._buffer[: prod(shape)].view(shape)
        for chunk in self.weights.iter_row_chunks(name):
            tensor[start : start + len(chunk)] = chunk
            start += len(chunk)
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))


def _set_parameter(module: nn.Module, attribute: str, parameter: nn.Parameter, *_: Any) -> None:
    setattr(module, attribute, parameter)


def stream_plain(weights: Weights, config: dict[str, Any], *, device: torch.device = CPU) -> StreamedModel:
    """A model of plain linear layers: all tensors of a checkpoint, in any floating dtype, and the contents of its config.json."""
    model, slots = _build_empty_model(config, device)
    return StreamedModel(model, slots, weights, device)


def stream_live(base: Weights, config: dict[str, Any], adapter: Path, *, device: torch.device = CPU) -> StreamedModel:
    """A base with PEFT's own layers around it, and the adapter, which `read_deltas` has checked.

    `base` is `trained_base` for the model as it was trained, and `RecordedBase` for the base as its files hold it.
    """
    (model, slots), stored = _build_empty_model(config, device), open_file(adapter / ADAPTER_WEIGHTS, error=ExportError)
    # Embedding and head that the adapter trained (`modules_to_save`) take 2.3 GiB each in fp32 in Phi-4-mini: they are read from
    # its file in chunks, and PEFT does not load them. A tied head that it did not train stays the base's own embedding.
    replaced = {name: PREFIX + name for name in (EMBEDDING, HEAD) if PREFIX + name in stored.info}
    sources: dict[str, tuple[Weights, str]] = {HEAD: (base, EMBEDDING), **{name: (base, name) for name in base.info}}
    sources |= {name: (stored, key) for name, key in replaced.items()}
    info = {name: source.info[key] for name, (source, key) in sources.items()}
    weights = ComputedWeights(info, lambda name: sources[name][0].iter_row_chunks(sources[name][1]))
    settings = load_lora_config(adapter)
    paths = [name.removesuffix(".weight") for name in replaced]
    others = [name for name in settings.modules_to_save or () if not any(path.endswith(name) for path in paths)]
    settings.modules_to_save = others or None
    tensors = {key: read_tensor(stored, key).float() for key in stored.info if key not in replaced.values()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice is for training
        adapted = get_peft_model(model, settings, low_cpu_mem_usage=True)
        set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.to(device)
    return StreamedModel(model, slots, weights, device)


def trained_base(base: RecordedBase) -> Weights:
    """The weights of a base as the run held them: 4-bit ones dequantized, everything in the run's dtype, on the base's device.

    bitsandbytes dequantizes to the dtype of the layer's input, which in training was the run's dtype. A `Linear4bit` with fp32
    input would dequantize to fp32, to other values than those trained. So we dequantize to the run's dtype and compute in fp32.
    """
    dtype = base.record.dtype

    def iter_row_chunks(name: str) -> Iterator[Tensor]:
        if (quantized := base.quantized(name)) is None:
            return (chunk.to(dtype) for chunk in base.iter_row_chunks(name))
        return split_rows(dequantize_4bit(quantized.packed, quantized.state))  # at once, not in chunks

    return ComputedWeights({name: TensorInfo(info.shape, dtype) for name, info in base.info.items()}, iter_row_chunks)


def _build_empty_model(config: dict[str, Any], device: torch.device) -> tuple[PackedPhi3ForCausalLM, _Slots]:
    """The model with parameters that have a shape and no storage, and its parameters between embedding and head."""
    register_attention()
    with no_init_weights(), torch.device("meta"):
        settings = Phi3Config(**{**config, "dtype": torch.float32})
        settings._attn_implementation = BY_DOCUMENT
        model = PackedPhi3ForCausalLM(settings)
    model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(device)  # computed from the config, not stored
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            # PEFT moves the adapter to the device of the base layer's weight; on "meta" it would be lost. One NaN, expanded.
            module.weight = nn.Parameter(torch.tensor(float("nan"), device=device).expand(module.weight.shape))
    model.requires_grad_(False)
    slots = {}
    for name, _ in model.model.named_parameters(prefix="model"):
        path, _, attribute = name.rpartition(".")
        if (module := model.get_submodule(path)) is not model.model.embed_tokens:
            slots[name] = (module, attribute)
    return model, slots
