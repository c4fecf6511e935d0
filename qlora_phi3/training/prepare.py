"""What comes before the first step: data, tokenizer and device (`prepare`), the execution plan (`plan_run`), model and adapter.

Everything that can fail cheaply is in `prepare`, before any weight is read.
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, get_scheduler
from transformers.trainer_utils import set_seed

from qlora_phi3.adapters.start import check_start, start_from
from qlora_phi3.data.prepare import PreparedData, prepare_recipe_data, row_lengths
from qlora_phi3.data.template import ChatTemplate
from qlora_phi3.data.tokenizer import check_token_ids
from qlora_phi3.errors import DeviceError, RecipeError
from qlora_phi3.execution import ExecutionPlan
from qlora_phi3.family import Architecture, find_config, parse_architecture, read_config
from qlora_phi3.hardware.gpu import Gpu, read_cpu, read_gpu
from qlora_phi3.memory.allocator import ALLOCATOR_SETTINGS, uses_expandable_segments
from qlora_phi3.memory.cost import count_steps
from qlora_phi3.memory.device import build_predictor, limits_of, read_gpu_by_torch
from qlora_phi3.memory.margin import budget_of, read_margin
from qlora_phi3.memory.plan import Plan, RowLengths, describe_plan, read_lengths
from qlora_phi3.memory.search import find_plan
from qlora_phi3.model.checkpoint import check_checkpoint
from qlora_phi3.model.kernels import why_unavailable
from qlora_phi3.model.lora import attach_adapter, measure_coverage, start_from_quantization_error
from qlora_phi3.model.phi3 import choose_precision, load_base
from qlora_phi3.model.quantized import describe_device
from qlora_phi3.model.weights import open_weights
from qlora_phi3.recipe.load import check_model_limits
from qlora_phi3.recipe.schema import Memory, Recipe, Training
from qlora_phi3.reporter import EvalRecord, Reporter, RunOutline
from qlora_phi3.training.callbacks import cap_to_free_memory
from qlora_phi3.training.processes import count_processes, from_first, gather
from qlora_phi3.training.trackers import check_trackers
from qlora_phi3.units import format_gib, format_percent


@dataclass(frozen=True, slots=True)
class RunContext:
    """All that is known of a run before any weight is read."""

    recipe: Recipe
    config: dict[str, Any]  #: The contents of the model's config.json.
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    data: PreparedData
    device: torch.device
    #: The GPU before this process used any of its memory; None on a CPU.
    gpu: Gpu | None
    compute_dtype: torch.dtype
    dtype_reason: str
    reporter: Reporter

    @property
    def row_lengths(self) -> RowLengths:
        """Tokens of the rows that are trained on and evaluated, with the most rows of a step that one process gets."""
        held_out = [] if self.data.evaluation is None else row_lengths(self.data.evaluation).tolist()
        share = -(-self.recipe.training.batch_size // count_processes())
        lengths = read_lengths(row_lengths(self.data.train).tolist(), held_out, share)
        return replace(lengths, evaluation_tokens=lengths.evaluation_tokens // count_processes())


def prepare(recipe: Recipe, recipe_dir: Path, reporter: Reporter) -> RunContext:
    """Check the recipe against the libraries and the model, choose the device, and tokenize the data. UserError where something
    of them cannot be used.

    The recipe has absolute paths; in messages the data's files are named relative to `recipe_dir`.
    """
    check_trackers(recipe.training)
    check_schedule(recipe.training)
    config = read_config(recipe.model.name, recipe.model.revision)
    architecture = parse_architecture(config, recipe.model.name)
    check_model_limits(recipe, architecture)
    check_checkpoint(recipe.model.name, architecture)
    if recipe.model.adapter is not None:
        check_start(Path(recipe.model.adapter), recipe.lora, architecture)
    gpu, device = None, torch.device("cpu")
    if torch.cuda.is_available():
        with suppress(DeviceError):
            gpu = read_gpu()  # before this process uses any of its memory
        prepare_cuda()
        device = torch.device("cuda", torch.cuda.current_device())
        gpu = gpu or read_gpu_by_torch(device)
    compute_dtype, reason = choose_precision(recipe.compute_dtype, None if gpu is None else gpu.compute_capability)
    data, tokenizer, template = prepare_recipe_data(recipe, recipe_dir, reporter.progress)
    check_token_ids(filter(None, (data.train, data.evaluation)), tokenizer, architecture, recipe.model.name)
    for line in data.report.summary_lines():
        reporter.info(line)
    for line in data.report.warning_lines():
        reporter.warning(line)
    return RunContext(recipe, config, architecture, tokenizer, template, data, device, gpu, compute_dtype, reason, reporter)


def check_schedule(training: Training) -> None:
    """Raise RecipeError for settings that the learning rate's schedule lacks: it is built for an optimizer without a model."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    settings = dict(training.lr_scheduler_kwargs)
    try:
        get_scheduler(training.lr_scheduler_type, optimizer, 0, 10**6, scheduler_specific_kwargs=settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f'[training] lr_scheduler_kwargs does not fit lr_scheduler_type = "{training.lr_scheduler_type}": {error}.',
            "Correct or delete it.",
        ) from error


def prepare_cuda() -> None:
    """Configure CUDA before its first allocation: expandable segments, and only attention kernels whose memory is known.

    A setting of the user in PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF has priority. cuDNN's attention, which torch prefers on
    compute capability 9 and 10, is off: its workspace is not documented.
    """
    if uses_expandable_segments() and not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    torch.backends.cuda.enable_cudnn_sdp(False)


def wants_dry_run(memory: Memory, device: torch.device) -> bool:
    """Whether the heaviest step runs once before the first; `[memory] rehearsal = "auto"`: on a GPU."""
    return device.type == "cuda" if memory.rehearsal == "auto" else memory.rehearsal


def plan_run(context: RunContext) -> Plan:
    """Plan the execution: the fastest plan that fits the GPU, or the CPU's share of the free memory.

    Several processes have one plan: for the GPU with the least memory, or for a CPU whose memory they share.
    """
    gpus = [gpu for gpu in gather(context.gpu) if gpu is not None]
    smallest = min(gpus, key=lambda gpu: budget_of(context.recipe.memory, gpu), default=None)
    fused_kernels = all(gather(_can_fuse(context)))
    return from_first(lambda: _plan(replace(context, gpu=smallest), fused_kernels))


def _can_fuse(context: RunContext) -> bool:
    """Whether the layers use the fused kernels; one line where they cannot."""
    if context.recipe.memory.kernels == "plain" or context.device.type != "cuda":
        return False
    reason = why_unavailable(context.device, context.compute_dtype)
    if reason is not None:
        context.reporter.info(f"Kernels: PyTorch's own, without fused ones: {reason}")
    return reason is None


def _plan(context: RunContext, fused_kernels: bool) -> Plan:
    """The fastest plan that fits, in one line, or a warning."""
    recipe, reporter, processes = context.recipe, context.reporter, count_processes()
    device = context.gpu
    if device is None:
        device = read_cpu()
        if recipe.memory.budget != "auto":
            reporter.warning("[memory] budget is for GPUs; a run on a CPU ignores it.")
    model, compute_dtype = (recipe, context.config, context.architecture), context.compute_dtype
    predictor = build_predictor(device, *model, compute_dtype=compute_dtype, fused_kernels=fused_kernels)
    limit_bytes = read_margin(device.name).limit(budget_of(recipe.memory, device, processes=processes))
    limits = limits_of(device, limit_bytes, compute_dtype)
    reporter.progress("Planning the memory", 0, None)
    plan = find_plan(predictor, context.row_lengths, limits, progress=lambda _: None)
    reporter.progress("Planning the memory", 1, 1)
    needed = f"{format_gib(plan.memory.on_gpu_bytes)} of {format_gib(limits.limit_bytes)} {device.where}"
    if device.is_cpu:
        shared = f", for each of {processes} processes" if processes > 1 else ""
        needed = f"{needed}: tensors, in half of what is free{shared}"
    reporter.info(f"Plan: {describe_plan(plan.execution)}; {needed}")
    if not plan.fits:
        where = " in memory" if device.is_cpu else ""
        reporter.warning(f"This should not fit{where}; qlora-phi3 vram-check suggests what to change. The run tries it anyway.")
    return replace(plan, memory=replace(plan.memory, trace=()))


def outline_run(
    context: RunContext,
    plan: Plan,
    execution: ExecutionPlan,
    metrics: Sequence[Mapping[str, Any]],
    checkpoint: Path | None,
) -> RunOutline:
    """What the reporter learns of a run before its first step; `metrics` are the records of earlier sessions."""
    data, training, gpu = context.data, context.recipe.training, context.gpu
    first_step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    steps, epochs, evaluations = count_steps(
        training, len(data.train), evaluates=data.evaluation is not None, first_step=first_step
    )
    measured = [record["seconds"] for record in metrics if record["kind"] == EvalRecord.kind]
    return RunOutline(
        total_steps=steps,
        epochs=epochs,
        first_step=first_step,
        evaluations=evaluations,
        device=describe_device(context.device),
        plan=f"{describe_plan(execution)}, {training.batch_size} rows a step",
        predicted_bytes=plan.memory.on_gpu_bytes,
        budget_bytes=0 if gpu is None else budget_of(context.recipe.memory, gpu),
        step_seconds=plan.step_seconds,
        evaluation_seconds=[plan.evaluation_seconds, *measured][-1],
        earlier=metrics,
    )


def return_freed_memory() -> None:
    """Return to the system what the C library keeps of freed memory: after a model was quantized on a CPU, 180 to 350 MiB."""
    with suppress(AttributeError, OSError, TypeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def load_model(context: RunContext, *, is_first_session: bool = True) -> PeftModel:
    """Load the base, in 4-bit where the recipe says so, and attach its adapter. ModelError where the weights cannot be read, or
    the adapter does not fit them.

    In a run's first session the adapter starts with the weights of `[model] adapter` if there is one; later a checkpoint
    provides them.
    """
    recipe, reporter = context.recipe, context.reporter
    limit_bytes = cap_to_free_memory(context.device)
    if limit_bytes is not None:
        limit = format_gib(limit_bytes)
        reporter.info(f"Memory: at most {limit}, what is free on the GPU; with more the driver would spill")
    reporter.progress("Loading the base model", 0, None)
    base = load_base(
        recipe.model,
        recipe.quantization,
        context.architecture,
        compute_dtype=context.compute_dtype,
        device=context.device,
        longest_row=context.data.report.longest_row,
        progress=reporter.progress,
        note=reporter.info,
    )
    set_seed(recipe.training.seed)
    base.neftune_noise_alpha = recipe.training.neftune_noise_alpha
    model = attach_adapter(base, recipe.lora)
    if is_first_session and recipe.lora.init_lora_weights == "loftq":
        start_from_quantization_error(model, open_weights(find_config(recipe.model.name, recipe.model.revision).parent))
    if is_first_session and recipe.model.adapter is not None:
        trained_on = start_from(model, Path(recipe.model.adapter))
        reporter.info(f"Starting from the adapter {recipe.model.adapter}")
        if Path(trained_on).name not in ("", Path(recipe.model.name).name):
            reporter.warning(f"That adapter was trained on {trained_on}, and this run is on {recipe.model.name}.")
    return_freed_memory()
    share, targets = measure_coverage(model)
    reporter.progress("Loading the base model", 1, 1)
    kind = recipe.quantization.bnb_4bit_quant_type.upper() if recipe.quantization.load_in_4bit else "unquantized"
    dtype = str(context.compute_dtype).removeprefix("torch.")
    if (stored := context.architecture.stored) is not None:
        kind = f"{stored.label}, as its files store it"
        if stored.compute_dtype != dtype:
            reporter.info(f"Its config.json asks for {stored.compute_dtype} arithmetic, and this run computes in {dtype}.")
    device = f"{describe_device(context.device)} ({context.dtype_reason})"
    reporter.info(f"Model: {recipe.model.name}, {kind}, computing in {dtype} on {device}")
    reporter.info(
        f"Adapter: {model.get_nb_trainable_parameters()[0]:,} parameters in fp32 on {', '.join(targets)}; "
        f"covers {format_percent(share)} of the linear weights"
    )
    return model
