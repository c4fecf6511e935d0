"""What stands before the first step: data, tokenizer, device, and the model with its adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from qlora_phi3.adapters.start import check_start, start_from
from qlora_phi3.architecture import Architecture, parse_architecture, read_config
from qlora_phi3.dataset.prepare import PreparedData
from qlora_phi3.dataset.template import ChatTemplate, choose_template
from qlora_phi3.device import Device, read_device
from qlora_phi3.errors import DeviceError
from qlora_phi3.lora import attach_adapter, measure_coverage
from qlora_phi3.memory.lengths import prepare_data
from qlora_phi3.memory.limits import check_limits
from qlora_phi3.model import Precision, choose_precision, load_base, load_tokenizer
from qlora_phi3.recipe.load import Recipe
from qlora_phi3.sizes import format_gib
from qlora_phi3.training.arguments import check_schedule, check_trackers
from qlora_phi3.training.cuda import prepare_cuda
from qlora_phi3.training.listener import Listener
from qlora_phi3.training.planning import Chosen, choose_setup
from qlora_phi3.training.report import describe_device
from qlora_phi3.training.spill import cap_to_free_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Everything that can be known without a weight."""

    #: The contents of the model's config.json.
    config: dict[str, Any]
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    data: PreparedData
    device: torch.device
    #: The card before this process took anything of it; None on a CPU.
    card: Device | None
    precision: Precision


def prepare(recipe: Recipe, base_folder: Path, listener: Listener) -> Ready:
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
    data = prepare_data(recipe, base_folder, tokenizer, template, listener.progress)
    for line in data.report.summary_lines():
        listener.say(line)
    for line in data.report.warning_lines():
        listener.warn(line)
    return Ready(
        config=config,
        architecture=architecture,
        tokenizer=tokenizer,
        template=template,
        data=data,
        device=device,
        card=card,
        precision=precision,
    )


def read_card() -> Device | None:
    """The card as NVML shows it; None where NVML cannot tell, and the usual set-up must do."""
    try:
        return read_device()
    except DeviceError:
        return None


def load_model(recipe: Recipe, ready: Ready, listener: Listener, *, begins: bool = True) -> PeftModel:
    """The base and its adapter.

    Args:
        begins: whether the run is at its first step; else a checkpoint fills the adapter.
    """
    room = cap_to_free_memory(ready.device)
    if room is not None:
        listener.say(f"Memory: at most {format_gib(room)}, what is free on the card; more would spill and crawl")
    listener.progress("Loading the base model", 0, None)
    base = load_base(
        recipe.model,
        recipe.quantization,
        ready.architecture,
        precision=ready.precision,
        device=ready.device,
        longest_row=ready.data.report.longest_row,
    )
    set_seed(recipe.training.seed)
    model = attach_adapter(base, recipe.lora)
    if begins and recipe.model.adapter is not None:
        trained_on = start_from(model, Path(recipe.model.adapter))
        listener.say(f"Starting from the adapter {recipe.model.adapter}")
        if Path(trained_on).name not in ("", Path(recipe.model.name).name):
            listener.warn(f"That adapter says it was trained on {trained_on}, and this run is on {recipe.model.name}.")
    coverage = measure_coverage(model)
    listener.progress("Loading the base model", 1, 1)
    kind = recipe.quantization.bnb_4bit_quant_type.upper() if recipe.quantization.load_in_4bit else "unquantized"
    dtype = str(ready.precision.compute_dtype).removeprefix("torch.")
    listener.say(
        f"Model: {recipe.model.name}, {kind}, computing in {dtype} on {describe_device(ready.device)} ({ready.precision.reason})"
    )
    listener.say(
        f"Adapter: {coverage.trainable_parameters:,} parameters in fp32 on {', '.join(coverage.targets)}; "
        f"covers {coverage.share:.0%} of the linear weights"
    )
    return model


def choose(recipe: Recipe, ready: Ready, listener: Listener) -> Chosen:
    """How the run is laid out on its device."""
    return choose_setup(
        recipe,
        ready.config,
        ready.architecture,
        ready.data,
        ready.card,
        device=ready.device,
        compute_dtype=ready.precision.compute_dtype,
        listener=listener,
    )
