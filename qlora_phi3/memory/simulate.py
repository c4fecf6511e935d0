"""The memory of one optimizer step, found by running the real code on tensors that have shape and dtype but no storage.

Model, adapter, loss, checkpointing and optimizer are the ones that train; `tracker.py` follows every storage. The tensors are
fake CPU tensors, as a CPU build of torch aborts on fake CUDA ones; `cuda_path.py` replaces what CUDA does in another way.
Without a compute capability it follows the CPU's own code, which can be measured on any machine: that is how the figures are
checked.
"""

import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import torch
import transformers.masking_utils
from bitsandbytes.functional import QuantState
from peft import PeftModel
from peft.tuners.lora import dora
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import qlora_phi3.model.loss
from qlora_phi3.execution import ExecutionPlan, MicroBatchPlan
from qlora_phi3.family import Architecture
from qlora_phi3.memory.cuda_path import following_cuda, matmul_workspace_bytes
from qlora_phi3.memory.report import (
    ADAPTER,
    CHECKPOINTED_INPUTS,
    CUBLAS_WORKSPACE,
    GRADIENTS,
    OPTIMIZER_STATE,
    QUANTIZATION_STATE,
)
from qlora_phi3.memory.trace import Trace
from qlora_phi3.memory.tracker import (
    BACKWARD_PHASES,
    FORWARD_PHASES,
    ON_CPU,
    ROUNDING,
    MemoryTracker,
    NullTracker,
    parameter_category,
    quantization_tensors,
)
from qlora_phi3.model.attention import register_attention
from qlora_phi3.model.lora import attach_adapter
from qlora_phi3.model.optimizer import build_optimizer
from qlora_phi3.model.phi3 import (
    PackedPhi3ForCausalLM,
    apply_execution_plan,
    attention_name,
    build_config,
    configure_base,
)
from qlora_phi3.model.quantized import BLOCK, NESTED_BLOCK, quantization_config
from qlora_phi3.objectives import Objective, sft
from qlora_phi3.recipe.schema import Lora, Model, Quantization, Recipe, Training
from qlora_phi3.step import Batch, collate, evaluate, forward_backward

#: Tiles of the loss that are simulated before the last one, of which the first two or three differ from the rest.
FEW_TILES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The heaviest micro-batch of a step, and what surrounds it.

    The micro-batches of a step run longest first (`execution.plan_micro_batches`): on the GPU are no gradients yet in the first.
    """

    #: Tokens of each row.
    lengths: tuple[int, ...]
    #: Tokens of each row of the heaviest evaluation micro-batch; empty without evaluation.
    evaluation_lengths: tuple[int, ...] = ()
    #: Whether the gradients of earlier micro-batches are on the GPU already.
    accumulates: bool = True
    #: Tokens of each row of the heaviest later micro-batch, which finds them there; empty without one.
    later_lengths: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(*self.lengths, *self.evaluation_lengths, 0)


def simulate(
    recipe: Recipe,
    config: dict[str, Any],
    architecture: Architecture,
    execution: ExecutionPlan,
    shape: StepShape,
    *,
    compute_dtype: torch.dtype,
    capability: tuple[int, int] | None,
    fused_rows: Mapping[tuple[int, int], int] = MappingProxyType({}),
    objective: Objective = sft,
) -> Trace:
    """Load, train one step, save and evaluate, without storage.

    Args:
        config: the contents of the model's config.json.
        capability: the GPU's compute capability, which decides the attention kernel; None for a CPU.
        fused_rows: as of `MemoryTracker`.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    skeleton = build_skeleton(
        config, architecture, recipe.model, recipe.quantization, compute_dtype=compute_dtype, longest_row=shape.longest
    )
    batches = [_heaviest(lengths, execution.micro_batch) for lengths in (shape.lengths, shape.later_lengths) if lengths]
    held_out = _heaviest(shape.evaluation_lengths, execution.evaluation) if shape.evaluation_lengths else None
    tracker = MemoryTracker(
        num_supervised=batches[0].num_supervised,
        vocabulary=architecture.vocab_size,
        rounding=1 if capability is None else ROUNDING,
        fused_rows=fused_rows,
    )
    kernels = nullcontext() if capability is None else following_cuda(tracker, capability=capability)
    with _fake_tensors(tracker), tracker, kernels, _no_collector():
        skeleton.neftune_noise_alpha = recipe.training.neftune_noise_alpha
        # One of the forward and one of the backward pass. The row norms of DoRA, while it is attached, are products.
        workspaces = [] if capability is None else [matmul_workspace_bytes(capability)] * 2
        if workspaces and recipe.lora.use_dora:
            tracker.track_bytes(workspaces.pop(), CUBLAS_WORKSPACE)
        model = _load(skeleton, recipe.lora, execution, tracker)
        for num_bytes in workspaces:
            tracker.track_bytes(num_bytes, CUBLAS_WORKSPACE)
        run_one_step(
            model,
            [_without_storage(batch) for batch in batches],
            held_out and _without_storage(held_out),
            recipe.training,
            execution.optim,
            compute_dtype=compute_dtype,
            on_cuda=capability is not None,
            accumulates=shape.accumulates,
            tracker=tracker,
            objective=objective,
        )
    return tracker.trace()


def _few_tile_starts(tracker: MemoryTracker, positions: int, tile_rows: int) -> Iterator[int]:
    """The first `FEW_TILES` or one more, and the last: the others find the allocator as the one two before them left it."""
    starts = range(0, positions, tile_rows)
    few = [*starts[: FEW_TILES + len(starts) % 2], starts[-1]] if len(starts) > FEW_TILES + 2 else list(starts)
    for start in few:
        tracker.repeats = 1 + (len(starts) - len(few)) * (start == few[-2]) if len(few) > 1 else 1
        yield start
    tracker.repeats = 1


_aten, _CPU = torch.ops.aten, torch.device("cpu")
#: Operators on one device with a fast C++ kernel for shapes. FakeTensorMode takes two to ten times as long to look them up.
_FAST = {
    _aten.view.default, _aten._unsafe_view.default, _aten.detach.default, _aten.t.default, _aten.slice.Tensor, _aten.mm.default,
    _aten.permute.default, _aten.transpose.int, _aten.unsqueeze.default, _aten.expand.default, _aten.clone.default,
    _aten.alias.default, _aten.copy_.default, _aten.add_.Tensor, _aten.zero_.default,
}  # fmt: skip


class _FakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """All tensors are on one device, "cpu", so that most operators need none of what torch's own mode looks up.

    One mode for all copies: PEFT copies modules (`modules_to_save`), and torch would copy a tensor's mode as well.
    """

    def __deepcopy__(self, memo: Any) -> "_FakeMode":
        return self

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator on shapes."""
        kwargs = kwargs or {}
        if func is _aten.empty.memory_format and str(kwargs.get("device")) in ("None", "cpu"):
            kwargs = {**kwargs, "device": "meta"}
        elif func not in _FAST:
            return super().dispatch(func, types, args, kwargs)
        with in_kernel_invocation_manager(self):
            result = func(*args, **kwargs)
        return result if isinstance(result, FakeTensor) else FakeTensor(self, result, _CPU)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Objects end where their last reference ends, and not where Python's collector happens to run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _fake_tensors(tracker: MemoryTracker) -> Iterator[None]:
    """Tensors without storage, and answers to two questions that libraries ask about them.

    PEFT 0.21's DoRA knows 4-bit weights by their class, which is FakeTensor here. transformers 5.23 takes fake positions of rows
    without padding for those of a pack, and builds a mask; a real pack has a mask of ours.
    """
    no_packs = patch.object(transformers.masking_utils, "find_packed_sequence_indices", lambda _: None)
    few_tiles = patch.object(qlora_phi3.model.loss, "tile_starts", partial(_few_tile_starts, tracker))
    with _FakeMode(), patch.object(dora, "dequantize_module_weight", _dequantize), no_packs, few_tiles:
        yield


def build_skeleton(
    config: dict[str, Any],
    architecture: Architecture,
    base: Model,
    quantization: Quantization,
    *,
    compute_dtype: torch.dtype,
    longest_row: int,
) -> PackedPhi3ForCausalLM:
    """The base as `load_base` makes it, every module in its place on the meta device, without a single weight.

    `scripts/bench_memory.py` fills it with random weights, to measure what the simulation predicts.

    Args:
        config: the contents of a config.json.
        longest_row: tokens.
    """
    from transformers.initialization import no_init_weights
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    register_attention()
    with no_init_weights(), torch.device("meta"):
        settings = build_config(config, base.name, dtype=compute_dtype)
        settings._attn_implementation = attention_name(base)
        model: PackedPhi3ForCausalLM = PackedPhi3ForCausalLM(settings).to(compute_dtype)
    kind = quantization_config(quantization, compute_dtype)
    if kind is not None:
        skip = ("lm_head",) if architecture.stored is None else architecture.stored.skip_modules or ("lm_head",)
        replace_with_bnb_linear(model, list(skip), kind)
        model.is_loaded_in_4bit = True
    configure_base(model, architecture, longest_row=longest_row)
    return model


def _load(skeleton: PackedPhi3ForCausalLM, lora: Lora, execution: ExecutionPlan, tracker: MemoryTracker) -> PeftModel:
    """Fill a skeleton with tensors without storage, in the order in which real weights are read, and attach the adapter."""
    tied = skeleton.lm_head if skeleton.config.tie_word_embeddings else None
    for module in skeleton.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            _quantize_without_storage(module)
        elif module is not tied:
            for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                new = torch.empty(old.shape, dtype=old.dtype)
                setattr(module, name, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
    skeleton.tie_weights()
    # PEFT makes an adapter on the CPU, and `Module.to` moves it; on torch 2.13 that raises for parameters without storage.
    place = nullcontext() if tracker.rounding == 1 else tracker.attribute_to(ON_CPU)
    with (
        patch.object(nn.Module, "to", lambda module, *places, **named: _move(tracker, module, *places, **named)),
        place,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # as copying a module does
        model = attach_adapter(skeleton, lora)
    apply_execution_plan(model, execution)
    for name, parameter in model.named_parameters():
        tracker.tag(parameter, parameter_category(name, parameter))
        for tensor in quantization_tensors(parameter):
            tracker.tag(tensor, QUANTIZATION_STATE)

    def tag_input(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        if tracker.phase in FORWARD_PHASES and layer.gradient_checkpointing:
            tracker.tag(args[0] if args else kwargs["hidden_states"], CHECKPOINTED_INPUTS)

    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(tag_input, with_kwargs=True)
    return model.train()


def _quantize_without_storage(layer: bnb.nn.Linear4bit) -> None:
    """The tensors of `Params4bit` after loading, and for a moment those they are made from, in bitsandbytes' order."""
    numel = layer.in_features * layer.out_features
    blocks = -(-numel // BLOCK)
    dtype = layer.compute_dtype  # load_base reads the checkpoint in the compute dtype
    unquantized = torch.empty((layer.out_features, layer.in_features), dtype=dtype)
    scales = torch.empty(blocks)
    packed = nn.Parameter(torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8), requires_grad=False)
    code = torch.empty(16)
    nested = offset = None
    absmax = scales
    if layer.weight.compress_statistics:
        offset, centered = torch.empty(()), torch.empty(blocks)
        nested_absmax = torch.empty(-(-blocks // NESTED_BLOCK))
        absmax = torch.empty(blocks, dtype=torch.uint8)
        nested = QuantState(absmax=nested_absmax, blocksize=NESTED_BLOCK, code=torch.empty(256), dtype=torch.float32)
        del centered
    packed.quant_state = QuantState(  # type: ignore[attr-defined]
        absmax=absmax,
        shape=unquantized.shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=code,
        quant_type=layer.weight.quant_type,
        offset=offset,
        state2=nested,
    )
    del scales, unquantized
    for name in ("compress_statistics", "quant_type"):  # PEFT reads them
        setattr(packed, name, getattr(layer.weight, name))
    layer.weight = packed  # a plain parameter: under FakeTensorMode no Params4bit can be made
    layer.quant_state = packed.quant_state  # type: ignore[attr-defined]


def _move(tracker: MemoryTracker, module: nn.Module, *places: Any, dtype: torch.dtype | None = None, **_: Any) -> nn.Module:
    """`Module.to` the GPU: PEFT gives an adapter the base's dtype while it is attached."""
    dtype = dtype or next((place for place in places if isinstance(place, torch.dtype)), None)
    for parameter in module.parameters():
        wanted = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        data, is_here = parameter.data, tracker.is_followed(parameter)
        with tracker.attribute_to(ADAPTER):
            parameter.data = data.to(wanted, copy=not is_here)
    return module


def _dequantize(layer: Any) -> Any:
    state = getattr(layer.weight, "quant_state", None)
    return layer.weight if state is None else bnb.functional.dequantize_4bit(layer.weight.data, state)


def _heaviest(lengths: Sequence[int], plan: MicroBatchPlan) -> Batch:
    """The batch of rows of these lengths with its largest micro-batch alone; every token is supervised."""
    batch = collate([{"input_ids": [0] * length, "labels": [0] * length} for length in lengths], plan)
    micro = max(batch.micro_batches, key=lambda micro: micro["input_ids"].numel())
    return replace(batch, micro_batches=(micro,), num_supervised=int((micro["labels"] >= 0).sum()))


def _without_storage(batch: Batch) -> Batch:
    (micro,) = batch.micro_batches
    tensors = {name: value for name, value in micro.items() if isinstance(value, Tensor)}
    fake = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in tensors.items()}
    return replace(batch, micro_batches=({**micro, **fake},))


def run_one_step(
    model: PeftModel,
    batches: Sequence[Batch],
    held_out: Batch | None,
    training: Training,
    optim: str | Optimizer,
    *,
    compute_dtype: torch.dtype,
    on_cuda: bool,
    accumulates: bool,
    tracker: NullTracker,
    objective: Objective = sft,
) -> Optimizer:
    """Everything that a step allocates, once: the update first, as its state stays, then its micro-batches, save, evaluation.

    Args:
        batches: one or two with one micro-batch each, as `held_out` is.
        optim: the optimizer to make, or in a later step the one that the first returned.
        on_cuda: whether CUDA's variants of clipping and of the optimizer are used.
        accumulates: the gradients of earlier micro-batches are there while the first one runs.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tracker.enter("update")
    with tracker.attribute_to(GRADIENTS):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    with tracker.attribute_to(OPTIMIZER_STATE):
        if isinstance(optim, str):
            optim = build_optimizer(optim, model, training, is_cuda=on_cuda)
            tracker.page(optim)
        if training.max_grad_norm:
            clip_grad_norm_(trained, training.max_grad_norm, foreach=on_cuda)
        optim.step()
    if not accumulates:
        optim.zero_grad()
    model.train()

    for forward_phase, backward_phase, batch in zip(FORWARD_PHASES, BACKWARD_PHASES, batches, strict=False):

        def backward(loss: Tensor, phase: str = backward_phase) -> None:
            tracker.enter(phase)
            loss.backward()  # type: ignore[no-untyped-call]

        tracker.num_supervised = batch.num_supervised
        tracker.enter(forward_phase)
        forward_backward(model, batch, objective=objective, compute_dtype=compute_dtype, backward=backward)
        for parameter in trained:
            tracker.tag(parameter.grad, GRADIENTS)
    optim.zero_grad()
    tracker.enter("save")
    if held_out is not None:
        tracker.num_supervised = held_out.num_supervised
        tracker.enter("evaluation")
        list(evaluate(model, [held_out], objective=objective, compute_dtype=compute_dtype))
    tracker.enter("end")
    return optim
