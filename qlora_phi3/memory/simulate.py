"""A phi3 model in the making: every module of the real one in its place, on the meta device, waiting for its tensors.

`fill_without_storage` gives it tensors of the right shape and type that hold nothing, for the simulation;
`scripts/bench_memory.py` fills the same skeleton with random weights, to measure what the simulation predicts.

The memory of one optimizer step, found by running the real code on tensors that have shape and type but no storage.

Model, adapter, loss, checkpointing and optimizer are the ones that train; `meter.py` follows every storage. By default the
CUDA path is followed, on fake CPU tensors (a CPU build of torch aborts on fake CUDA ones): `kernels.py` stands in where the
two paths part. `path="cpu"` follows the CPU's own, which can be measured on any machine: that is how the figures are checked.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft import PeftModel
from peft.tuners.lora import dora
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from transformers import Phi3Config
from transformers.initialization import no_init_weights
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from qlora_phi3.execution import ExecutionPlan
from qlora_phi3.family import Architecture
from qlora_phi3.memory.cuda_path import following_cuda
from qlora_phi3.memory.report import MemoryReport
from qlora_phi3.memory.tracker import ROUNDING, MemoryTracker, NullTracker
from qlora_phi3.model.attention import register_attention
from qlora_phi3.model.lora import attach_adapter
from qlora_phi3.model.optimizer import build_optimizer
from qlora_phi3.model.phi3 import (
    PackedPhi3ForCausalLM,
    apply_execution_plan,
    attention_name,
    configure_base,
)
from qlora_phi3.model.quantized import quantization_config
from qlora_phi3.objectives import Objective, sft
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.step import Batch, collate, evaluate, forward_backward

BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256  # bitsandbytes' own for 4 bit, and of the scales' scales


def build_skeleton(
    config: dict[str, Any], architecture: Architecture, recipe: Recipe, *, compute_dtype: torch.dtype, longest_row: int
) -> PackedPhi3ForCausalLM:
    """The base as `load_base` makes it, without a single weight.

    Args:
        config: the contents of a config.json.
    """
    register_attention()
    with no_init_weights(), torch.device("meta"):
        settings = Phi3Config(**{**config, "dtype": compute_dtype})
        settings._attn_implementation = attention_name(recipe.model)
        model: PackedPhi3ForCausalLM = PackedPhi3ForCausalLM(settings).to(compute_dtype)
    kind = quantization_config(recipe.quantization, compute_dtype)
    if kind is not None:
        replace_with_bnb_linear(model, ["lm_head"], kind)
        model.is_loaded_in_4bit = True
    configure_base(model, architecture, longest_row=longest_row)
    return model


def fill_without_storage(model: PackedPhi3ForCausalLM) -> None:
    """Put tensors without storage into a skeleton, in the order in which the real weights are read; under FakeTensorMode."""
    tied = model.lm_head if model.config.tie_word_embeddings else None
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            _quantize_without_storage(module)
        if isinstance(module, bnb.nn.Linear4bit) or module is tied:
            continue
        for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            new = torch.empty(old.shape, dtype=old.dtype)
            setattr(module, name, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
    model.tie_weights()


def _quantize_without_storage(layer: bnb.nn.Linear4bit) -> None:
    """The tensors of `Params4bit` after loading, and for a moment the 16-bit weight they were made from."""
    numel = layer.in_features * layer.out_features
    blocks = -(-numel // BLOCKSIZE)
    dtype = layer.compute_dtype  # load_base reads the checkpoint in the compute type
    whole = torch.empty((layer.out_features, layer.in_features), dtype=dtype)
    scales = torch.empty(blocks)
    packed = nn.Parameter(torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8), requires_grad=False)
    nested = None
    if layer.weight.compress_statistics:
        nested = QuantState(
            absmax=torch.empty(-(-blocks // NESTED_BLOCKSIZE)),
            blocksize=NESTED_BLOCKSIZE,
            code=torch.empty(256),
            dtype=torch.float32,
        )
    packed.quant_state = QuantState(  # type: ignore[attr-defined]
        absmax=torch.empty(blocks, dtype=torch.uint8) if nested else scales,
        shape=whole.shape,
        dtype=dtype,
        blocksize=BLOCKSIZE,
        code=torch.empty(16),
        quant_type=layer.weight.quant_type,
        offset=torch.empty(()) if nested else None,
        state2=nested,
    )
    del whole, scales
    for name in ("compress_statistics", "quant_type"):  # PEFT reads them
        setattr(packed, name, getattr(layer.weight, name))
    layer.weight = packed  # a plain parameter: under FakeTensorMode no Params4bit can be made
    layer.quant_state = packed.quant_state  # type: ignore[attr-defined]


@contextmanager
def four_bit_known_to_dora() -> Iterator[None]:
    """Let PEFT 0.21's DoRA read 4-bit weights without storage: it knows them by their class, which is `FakeTensor` here."""
    usual = dora.dequantize_module_weight
    dora.dequantize_module_weight = _dequantize
    try:
        yield
    finally:
        dora.dequantize_module_weight = usual


def _dequantize(layer: Any) -> Tensor:
    state = getattr(layer.weight, "quant_state", None)
    whole: Tensor = layer.weight if state is None else bnb.functional.dequantize_4bit(layer.weight.data, state)
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The heaviest thing a step must carry: the rows of one micro-batch, and whether others went before it."""

    #: Tokens of each row.
    lengths: tuple[int, ...]
    #: Rows of the heaviest evaluation micro-batch; empty without evaluation.
    evaluation_lengths: tuple[int, ...] = ()
    #: Whether gradients of earlier micro-batches lie on the card already.
    accumulates: bool = True


def simulate(
    recipe: Recipe,
    config: dict[str, Any],
    architecture: Architecture,
    execution: ExecutionPlan,
    load: StepShape,
    *,
    compute_dtype: torch.dtype,
    path: Literal["cuda", "cpu"] = "cuda",
    capability: tuple[int, int] = (8, 6),
    objective: Objective = sft,
) -> MemoryReport:
    """Load, train one step, evaluate and save, without storage.

    Args:
        config: the contents of the model's config.json.
        capability: the card's compute capability, which decides the attention kernel.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    longest = max(*load.lengths, *load.evaluation_lengths, 0)
    skeleton = build_skeleton(config, architecture, recipe, compute_dtype=compute_dtype, longest_row=longest)
    batch = _heaviest(collate(_rows(load.lengths), execution.micro_batch))
    held_out = (
        _heaviest(collate(_rows(load.evaluation_lengths), execution.evaluation)) if load.evaluation_lengths else None
    )
    tracker = MemoryTracker(
        num_supervised=batch.num_supervised,
        vocabulary=architecture.vocab_size,
        rounding=ROUNDING if path == "cuda" else 1,
    )
    with ExitStack() as stack:
        stack.enter_context(_Mode())
        stack.enter_context(tracker)
        stack.enter_context(four_bit_known_to_dora())
        if path == "cuda":
            stack.enter_context(following_cuda(tracker, compute_dtype=compute_dtype, capability=capability))
        model = _load(skeleton, recipe, execution, tracker)
        batch, held_out = _without_storage(batch), held_out and _without_storage(held_out)
        run_one_step(
            model,
            batch,
            held_out,
            recipe,
            execution,
            compute_dtype=compute_dtype,
            on_cuda=path == "cuda",
            accumulates=load.accumulates,
            tracker=tracker,
            objective=objective,
        )
    phase, (peak, at) = max(tracker.peaks.items(), key=lambda item: item[1][0])
    return MemoryReport(
        peak_bytes=peak,
        peak_phase=phase,
        categories=dict(tracker.live_at(at).most_common()),
        phases={name: num_bytes for name, (num_bytes, _) in tracker.peaks.items()},
        resident_bytes=tracker.peaks["save"][0],
        paged_bytes=tracker.paged_bytes,
        host_bytes=tracker.peak_host_bytes,
        trace=tuple(tracker.events),
    )


class _Mode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """One for all: PEFT copies whole modules (`modules_to_save`, DoRA), and torch would copy a tensor's mode along."""

    def __deepcopy__(self, memo: Any) -> "_Mode":
        return self


def _rows(lengths: Sequence[int]) -> list[dict[str, Any]]:
    return [{"input_ids": [0] * length, "labels": [0] * length} for length in lengths]


def _heaviest(batch: Batch) -> Batch:
    """The batch with its largest micro-batch alone."""
    micro = max(batch.micro_batches, key=lambda micro: micro["input_ids"].numel())
    return replace(batch, micro_batches=(micro,), num_supervised=int((micro["labels"] >= 0).sum()))


def _without_storage(batch: Batch) -> Batch:
    micro = {
        name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for name, value in batch.micro_batches[0].items()
    }
    return replace(batch, micro_batches=(micro,))


def _load(
    skeleton: PackedPhi3ForCausalLM, recipe: Recipe, execution: ExecutionPlan, tracker: MemoryTracker
) -> PeftModel:
    """The base with its adapter; every lasting storage gets its tenant."""
    fill_without_storage(skeleton)
    with _staying(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # as copying a module does
        model = attach_adapter(skeleton, recipe.lora)
    apply_execution_plan(model, execution)
    for name, parameter in model.named_parameters():
        tracker.tag(parameter, _category_of(name, parameter))
        for scale in _scales(getattr(parameter, "quant_state", None)):
            tracker.tag(scale, "quantization state")
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(_tag_input(tracker), with_kwargs=True)
    return model.train()


def _category_of(name: str, parameter: Tensor) -> str:
    if parameter.requires_grad:
        return "adapter"
    if parameter.dtype == torch.uint8:
        return "4-bit weights"
    return "embedding and head" if "embed_tokens" in name or "lm_head" in name else "other weights"


def _scales(state: Any) -> Iterator[Tensor]:
    if state is not None:
        yield from (value for value in (state.absmax, state.code, state.offset) if value is not None)
        yield from _scales(state.state2)


def _tag_input(tracker: MemoryTracker) -> Any:
    def tag(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        if tracker.phase == "forward" and layer.gradient_checkpointing:
            tracker.tag(args[0] if args else kwargs["hidden_states"], "checkpointed layer inputs")

    return tag


@contextmanager
def _staying() -> Iterator[None]:
    """No module moves: on torch 2.13 `Module.to` raises for parameters without storage, and PEFT calls it on every layer."""
    usual = nn.Module.to
    nn.Module.to = lambda module, *_, **__: module  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = usual  # type: ignore[method-assign]


def run_one_step(
    model: PeftModel,
    batch: Batch,
    held_out: Batch | None,
    recipe: Recipe,
    execution: ExecutionPlan,
    *,
    compute_dtype: torch.dtype,
    on_cuda: bool,
    accumulates: bool,
    tracker: NullTracker,
    objective: Objective = sft,
) -> None:
    """All that a step holds at some time, once: the update first, since its state stays, then a micro-batch, save, evaluation.

    Args:
        batch: with one micro-batch; `held_out` likewise.
        accumulates: gradients of earlier micro-batches lie there while this one runs.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _update(model, trained, recipe, execution, tracker, on_cuda=on_cuda)
    if not accumulates:
        optimizer.zero_grad()
    model.train()

    def backward(loss: Tensor) -> None:
        tracker.enter("backward")
        loss.backward()  # type: ignore[no-untyped-call]

    tracker.enter("forward")
    forward_backward(model, batch, objective=objective, compute_dtype=compute_dtype, backward=backward)
    for parameter in trained:
        tracker.tag(parameter.grad, "gradients")
    optimizer.zero_grad()
    tracker.enter("save")
    if held_out is not None:
        tracker.num_supervised = held_out.num_supervised
        tracker.enter("evaluation")
        list(evaluate(model, [held_out], objective=objective, compute_dtype=compute_dtype))
    tracker.enter("end")


def _update(
    model: PeftModel,
    trained: list[nn.Parameter],
    recipe: Recipe,
    execution: ExecutionPlan,
    tracker: NullTracker,
    *,
    on_cuda: bool,
) -> torch.optim.Optimizer:
    """Clip and update once on gradients of nothing, which makes the optimizer's state."""
    tracker.enter("update")
    with tracker.attribute_to("gradients"):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    with tracker.attribute_to("optimizer state"):
        optimizer = build_optimizer(execution.optim, model, recipe.training, is_cuda=on_cuda)
        tracker.page(optimizer)
        if recipe.training.max_grad_norm:
            clip_grad_norm_(trained, recipe.training.max_grad_norm, foreach=on_cuda)
        optimizer.step()
    return optimizer
