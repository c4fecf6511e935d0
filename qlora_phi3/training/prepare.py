"""How a CUDA device is set up before its first allocation.

The set-up a run takes, and what it should need: planned for the card, or the usual one of a CPU.

What stands before the first step: data, tokenizer, device, and the model with its adapter.
"""

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, get_scheduler
from transformers.integrations import get_available_reporting_integrations, is_flytekit_available
from transformers.trainer_utils import set_seed

from qlora_phi3.adapters.start import check_start, start_from
from qlora_phi3.data.prepare import PreparedData
from qlora_phi3.data.template import ChatTemplate, choose_template
from qlora_phi3.errors import DeviceError, RecipeError
from qlora_phi3.execution import DEFAULT_LOGITS_TILE_BYTES, ExecutionPlan, MicroBatchPlan
from qlora_phi3.family import Architecture, parse_architecture, read_config
from qlora_phi3.hardware.gpu import Gpu, read_gpu
from qlora_phi3.memory.allocator import expandable_segments_work
from qlora_phi3.memory.margin import budget_of, read_margin
from qlora_phi3.memory.plan import GpuLimits, Plan, RowLengths, read_lengths, step_shape
from qlora_phi3.memory.predict import Predictor
from qlora_phi3.memory.report import MemoryReport
from qlora_phi3.memory.search import find_plan
from qlora_phi3.memory.simulate import simulate
from qlora_phi3.memory.vram_check import prepare_data
from qlora_phi3.model.lora import attach_adapter, measure_coverage
from qlora_phi3.model.phi3 import Precision, choose_precision, load_base, load_tokenizer
from qlora_phi3.recipe.load import check_limits
from qlora_phi3.recipe.schema import Recipe, Training
from qlora_phi3.reporter import Reporter
from qlora_phi3.training.callbacks import cap_to_free_memory
from qlora_phi3.training.report import describe_device
from qlora_phi3.units import format_gib, parse_size


def check_trackers(training: Training) -> None:
    """Refuse a tracker whose library is not installed, before a model is loaded for it.

    Raises:
        RecipeError: with its name.
    """
    asked = [training.report_to] if isinstance(training.report_to, str) else training.report_to
    installed = {*get_available_reporting_integrations(), *(["flyte"] if is_flytekit_available() else [])}
    for name in asked:
        if name not in ("all", "none") and name not in installed:
            raise RecipeError(
                f"[training] report_to names {name}, which is not installed.",
                "Install it beside qlora-phi3, or delete it: metrics.jsonl holds every figure.",
            )


def check_schedule(training: Training) -> None:
    """Refuse settings the learning rate's schedule does not know, by making one for an optimizer of nothing.

    Raises:
        RecipeError: with what transformers says of them.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=10**6,
            scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f'[training] lr_scheduler_kwargs does not fit lr_scheduler_type = "{training.lr_scheduler_type}": {error}.',
            "Mend or delete it.",
        ) from error


def choose_optimizer(training: Training, device: torch.device) -> str:
    """The optimizer's name in transformers: the recipe's, or 8-bit paged AdamW on CUDA and plain AdamW on a CPU."""
    if training.optim != "auto":
        return training.optim
    return "paged_adamw_8bit" if device.type == "cuda" else "adamw_torch"


def prepare_cuda() -> None:
    """Let segments grow instead of leaving holes, and keep to the attention kernels whose memory is known.

    A setting of the user's in PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF stands. cuDNN's attention, which torch prefers on
    compute capability 9 and 10, takes a workspace that nobody states.
    """
    chosen = any(name in os.environ for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    if not chosen and expandable_segments_work(platform.system(), platform.release()):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    torch.backends.cuda.enable_cudnn_sdp(False)


#: Tokens of a micro-batch where there is no plan and neither the recipe nor a longer row asks for more: enough to keep the
#: matmuls busy beside the dequantization, which costs the same whatever the micro-batch holds. On CPU (SmolLM2-135M, bf16,
#: Zen 5) 512 is as fast as 1,024, at a peak of 1.06-1.10 GiB instead of 1.11-1.35.
DEFAULT_MICRO_BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """How a run is laid out, and what that should need; `predicted` is None where nobody asked."""

    execution: ExecutionPlan
    predicted: MemoryReport | None


def choose_execution_plan(
    recipe: Recipe,
    config: dict[str, Any],
    architecture: Architecture,
    data: PreparedData,
    card: Gpu | None,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    reporter: Reporter,
) -> PlannedRun:
    """The plan for a card; where there is none the usual set-up, simulated if the recipe wants a rehearsal.

    Args:
        card: as it was before this process took anything of it.
    """
    if card is not None:
        plan = plan_for_card(recipe, config, architecture, data, card, compute_dtype=compute_dtype, reporter=reporter)
        return PlannedRun(execution=plan.execution, predicted=replace(plan.prediction.memory, trace=()))
    if device.type == "cpu" and recipe.memory.budget != "auto":
        reporter.warning("[memory] budget is for graphics cards: a run on a CPU does not heed it.")
    execution = default_execution_plan(recipe, architecture, device)
    if not wants_rehearsal(recipe, device) or device.type != "cpu":
        return PlannedRun(execution=execution, predicted=None)
    predicted = predict_on_cpu(recipe, config, architecture, data, execution, compute_dtype=compute_dtype)
    return PlannedRun(execution=execution, predicted=predicted)


def wants_rehearsal(recipe: Recipe, device: torch.device) -> bool:
    """As the recipe says; "auto": on a GPU."""
    wanted = recipe.memory.rehearsal
    return device.type == "cuda" if wanted == "auto" else wanted


def measured_lengths(data: PreparedData, batch_size: int) -> RowLengths:
    """The lengths of the rows a run trains and measures on."""
    held_out = [] if data.evaluation is None else data.evaluation["length"]
    return read_lengths(list(data.train["length"]), list(held_out), batch_size)


def plan_for_card(
    recipe: Recipe,
    config: dict[str, Any],
    architecture: Architecture,
    data: PreparedData,
    device: Gpu,
    *,
    compute_dtype: torch.dtype,
    reporter: Reporter,
) -> Plan:
    """The fastest set-up that fits; told as one line, and as a warning where nothing does."""
    predictor = Predictor(
        recipe, config, architecture, compute_dtype=compute_dtype, capability=device.compute_capability
    )
    card = GpuLimits(
        limit_bytes=read_margin(device.name).limit(budget_of(recipe, device)),
        tflops_16bit=device.tflops_16bit,
        bandwidth_bytes_per_second=device.bandwidth_bytes_per_second,
    )
    lengths = measured_lengths(data, recipe.training.batch_size)
    reporter.progress("Planning the memory", 0, None)
    plan = find_plan(predictor, lengths, card, progress=lambda _: None)
    reporter.progress("Planning the memory", 1, 1)
    needed = format_gib(plan.prediction.memory.on_gpu_bytes)
    reporter.info(f"Plan: {in_words(plan.execution)}; {needed} of {format_gib(card.limit_bytes)} on the card")
    if not plan.fits:
        reporter.warning(
            "That should not fit; qlora-phi3 vram-check says what to change. The run tries it nevertheless: nothing is lost."
        )
    return plan


def in_words(execution: ExecutionPlan) -> str:
    """A set-up as a person reads it."""
    every = execution.checkpoint_every
    recomputed = {0: "nothing recomputed", 1: "every layer recomputed"}.get(every, f"one layer in {every} recomputed")
    offloaded = ", activations offloaded" if execution.activation_offloading else ""
    tiled = f", MLPs in tiles of {execution.mlp_tile_tokens:,} tokens" if execution.mlp_tile_tokens else ""
    return f"{execution.micro_batch.max_tokens:,} tokens at once, {recomputed}{offloaded}{tiled}, {execution.optim}"


def default_execution_plan(recipe: Recipe, architecture: Architecture, device: torch.device) -> ExecutionPlan:
    """The set-up of a CPU, and of a card nothing is known of: all layers recomputed, no more tokens than keep it busy."""
    training, memory = recipe.training, recipe.memory
    every = 1 if memory.checkpoint_every_n_layers == "auto" else memory.checkpoint_every_n_layers
    tile = memory.logits_tile
    return ExecutionPlan(
        micro_batch=_layout(recipe, architecture, training.micro_batch_size),
        evaluation=_layout(recipe, architecture, training.per_device_eval_batch_size),
        checkpoint_every=every if training.gradient_checkpointing else 0,
        activation_offloading=training.activation_offloading is True and device.type != "cpu",  # it is there already
        optim=choose_optimizer(training, device),
        logits_tile_bytes=DEFAULT_LOGITS_TILE_BYTES if tile == "auto" else parse_size(tile),
        mlp_tile_tokens=0 if memory.mlp_tile_tokens == "auto" else memory.mlp_tile_tokens,
    )


def _layout(recipe: Recipe, architecture: Architecture, rows: int | str | None) -> MicroBatchPlan:
    """`rows` a micro-batch where the recipe fixes them, else as many as fit the wanted or usual tokens."""
    training, wanted = recipe.training, recipe.memory.micro_batch_tokens
    usual = max(DEFAULT_MICRO_BATCH_TOKENS, training.max_length) if wanted == "auto" else wanted
    fixed = rows if isinstance(rows, int) else None
    return MicroBatchPlan(
        max_tokens=fixed * training.max_length if fixed else usual,
        max_rows=fixed or training.batch_size,
        packing=training.packing,
        longrope_boundary=architecture.longrope_boundary,
    )


def predict_on_cpu(
    recipe: Recipe,
    config: dict[str, Any],
    architecture: Architecture,
    data: PreparedData,
    execution: ExecutionPlan,
    *,
    compute_dtype: torch.dtype,
) -> MemoryReport:
    """What the tensors of a run on a CPU should hold."""
    load = step_shape(measured_lengths(data, recipe.training.batch_size), execution)
    memory = simulate(recipe, config, architecture, execution, load, compute_dtype=compute_dtype, path="cpu")
    return replace(memory, trace=())


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """Everything that can be known without a weight."""

    #: The contents of the model's config.json.
    config: dict[str, Any]
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    data: PreparedData
    device: torch.device
    #: The card before this process took anything of it; None on a CPU.
    card: Gpu | None
    precision: Precision


def prepare(recipe: Recipe, base_folder: Path, reporter: Reporter) -> RunContext:
    """Everything that can fail cheaply, before any weight is read."""
    check_trackers(recipe.training)
    check_schedule(recipe.training)
    config = read_config(recipe.model.name, recipe.model.revision)
    architecture = parse_architecture(config, recipe.model.name)
    check_limits(recipe, architecture)
    if recipe.model.adapter is not None:
        check_start(Path(recipe.model.adapter), recipe.lora)
    card = read_card() if torch.cuda.is_available() else None  # before this process takes anything of it
    if torch.cuda.is_available():
        prepare_cuda()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    precision = choose_precision(recipe.compute_dtype, device)
    tokenizer = load_tokenizer(recipe.model)
    template = choose_template(tokenizer, recipe.data.chat_template)
    data = prepare_data(recipe, base_folder, tokenizer, template, reporter.progress)
    for line in data.report.summary_lines():
        reporter.info(line)
    for line in data.report.warning_lines():
        reporter.warning(line)
    return RunContext(
        config=config,
        architecture=architecture,
        tokenizer=tokenizer,
        template=template,
        data=data,
        device=device,
        card=card,
        precision=precision,
    )


def read_card() -> Gpu | None:
    """The card as NVML shows it; None where NVML cannot tell, and the usual set-up must do."""
    try:
        return read_gpu()
    except DeviceError:
        return None


def load_model(recipe: Recipe, context: RunContext, reporter: Reporter, *, is_first_session: bool = True) -> PeftModel:
    """The base and its adapter.

    Args:
        begins: whether the run is at its first step; else a checkpoint fills the adapter.
    """
    room = cap_to_free_memory(context.device)
    if room is not None:
        reporter.info(f"Memory: at most {format_gib(room)}, what is free on the card; more would spill and crawl")
    reporter.progress("Loading the base model", 0, None)
    base = load_base(
        recipe.model,
        recipe.quantization,
        context.architecture,
        precision=context.precision,
        device=context.device,
        longest_row=context.data.report.longest_row,
    )
    set_seed(recipe.training.seed)
    model = attach_adapter(base, recipe.lora)
    if is_first_session and recipe.model.adapter is not None:
        trained_on = start_from(model, Path(recipe.model.adapter))
        reporter.info(f"Starting from the adapter {recipe.model.adapter}")
        if Path(trained_on).name not in ("", Path(recipe.model.name).name):
            reporter.warning(
                f"That adapter says it was trained on {trained_on}, and this run is on {recipe.model.name}."
            )
    coverage = measure_coverage(model)
    reporter.progress("Loading the base model", 1, 1)
    kind = recipe.quantization.bnb_4bit_quant_type.upper() if recipe.quantization.load_in_4bit else "unquantized"
    dtype = str(context.precision.compute_dtype).removeprefix("torch.")
    where = f"{describe_device(context.device)} ({context.precision.reason})"
    reporter.info(f"Model: {recipe.model.name}, {kind}, computing in {dtype} on {where}")
    reporter.info(
        f"Adapter: {coverage.trainable_parameters:,} parameters in fp32 on {', '.join(coverage.targets)}; "
        f"covers {coverage.share:.0%} of the linear weights"
    )
    return model


def plan_run(recipe: Recipe, context: RunContext, reporter: Reporter) -> PlannedRun:
    """How the run is laid out on its device."""
    return choose_execution_plan(
        recipe,
        context.config,
        context.architecture,
        context.data,
        context.card,
        device=context.device,
        compute_dtype=context.precision.compute_dtype,
        reporter=reporter,
    )
