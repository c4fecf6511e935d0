"""The six tables of a recipe as frozen models: every key with its type, default and meaning.

Names are those of the libraries: `[lora]` has peft's LoraConfig, `[training]` has TrainingArguments and SFTConfig. Types are
strict: "16" is not a number and `true` is not 1; only an integer may stand for a float. The checks need no model, data or device.
"""

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qlora_phi3.units import parse_size


def _check_share_or_count(value: float) -> float:
    if value < 0 or (isinstance(value, float) and value >= 1):  # 1.0 could be a share of all or a count of one
        raise ValueError("must be a share below 1 or a whole number")
    return value


def _check_size(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f'has no unit: write "{value}GiB" or "{value}MiB"' if value else "must be more than zero")
    if isinstance(value, str) and value != "auto":
        try:
            parse_size(value)
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"'{value}' ")) from None
    return value


def _check_logits_tile(value: str) -> str:
    if value != "auto" and not parse_size("1MiB") <= parse_size(value) <= parse_size("16GiB"):
        raise ValueError('must be "1MiB" to "16GiB"')
    return value


def _check_place(value: str) -> str:
    """Refuse what no file system takes as a name; `Path.exists` raises for it."""
    if "\0" in value or any(len(os.fsencode(part)) > 255 for part in re.split(r"[/\\]", value)):
        raise ValueError("is no name of a file or folder: it has a NUL, or a part of more than 255 bytes")
    return value


def check_regex(value: object) -> object:
    """Refuse what is no regular expression: a text, or the keys of a table; a list of names passes."""
    for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
    return value


ComputeDtype = Literal["auto", "bfloat16", "float16", "float32"]
Text = Annotated[str, Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1)]
Place = Annotated[Text, AfterValidator(_check_place)]
Places = Place | Annotated[list[Place], Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Index = Annotated[int, Field(ge=0, le=2**31)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # the limit of numpy
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0, le=2**31)] | Annotated[float, Field(gt=0, le=2**31)]
#: A number of steps or rows; below 1 a share of all of them.
ShareOrCount = Annotated[int | float, AfterValidator(_check_share_or_count)]
#: "auto", or a number with its unit.
Size = Annotated[str, BeforeValidator(_check_size)]
Tracker = Literal[  # transformers.integrations.INTEGRATION_TO_CALLBACK, plus its two words for everything and nothing
    "all", "none", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow",
    "neptune", "swanlab", "tensorboard", "trackio", "wandb",
]  # fmt: skip
Scheduler = Literal[  # transformers.SchedulerType
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
]  # fmt: skip
Optimizer = Literal[
    "auto", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_bnb_8bit", "adamw_torch", "adamw_torch_fused",
]  # fmt: skip
Interval = Literal["no", "steps", "epoch"]
#: Schedules that ignore warmup_steps (transformers.optimization.get_scheduler, 5.23).
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
#: Schedules that follow the evaluation loss.
NEEDS_EVALUATION = ("reduce_lr_on_plateau", "greedy")
#: Names of which lr_scheduler_kwargs must have one.
NEEDS_KWARGS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}


class Table(BaseModel):
    """A table of the recipe: frozen, with strict types and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def contradictions(self) -> Iterator[str]:
        """Yield one sentence for each combination of keys that cannot work; called when every key is valid by itself."""
        yield from ()

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        if problems := "\n".join(self.contradictions()):
            raise ValueError(problems)
        return self


class Model(Table):
    """The base model."""

    name: Place
    """Hub id or folder of a checkpoint with model_type phi3 in its config.json."""
    revision: Text | None = None
    """Branch, tag or commit of the hub repository."""
    adapter: Place | None = None
    """Trained adapter to start from, with the same settings as [lora]: a PEFT folder or a run folder; unset: a new adapter."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Implementation of attention."""
    save_quantized: bool = False
    """Save the 4-bit base in the run folder (2.1 GB for Phi-3-mini), so that an export on another computer has the same bits."""


class Quantization(Table):
    """Storage of the frozen base; names of BitsAndBytesConfig."""

    load_in_4bit: bool = True
    """Store the linear layers in 4 bit (QLoRA); false: in 16 bit (LoRA). A base whose files are in 4 bit is used as they are."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the scales as well: 4.127 instead of 4.5 bit a weight."""
    bnb_4bit_compute_dtype: ComputeDtype = "auto"
    """Data type of the computation; auto: bfloat16 where it is native, else float16 (GPU) or float32 (CPU)."""


class Lora(Table):
    """The adapter; names of peft's LoraConfig."""

    r: Count = 16
    """Rank of the two matrices that are added to each layer."""
    lora_alpha: Positive = 16
    """Scale of the update, which is multiplied by lora_alpha / r."""
    lora_dropout: Share = 0.0
    """Dropout on the inputs of the adapter, in training."""
    target_modules: Annotated[Texts, AfterValidator(check_regex)] = "all-linear"
    """Layers that get an adapter: all-linear, a list of names, or a regular expression."""
    exclude_modules: Annotated[Texts, AfterValidator(check_regex)] | None = None
    """Layers that get no adapter: a list of names or a regular expression."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained as well."""
    use_rslora: bool = False
    """Multiply the update by lora_alpha / sqrt(r) instead, so that large ranks stay effective."""
    use_dora: bool = False
    """Train magnitude and direction of each weight separately (DoRA); slower."""
    modules_to_save: list[Text] | None = None
    """Modules that are trained in full and saved with the adapter."""
    layers_to_transform: Index | list[Index] | None = None
    """Decoder layers, counted from 0, that get an adapter; unset: all."""
    rank_pattern: Annotated[dict[str, Count], AfterValidator(check_regex)] = {}
    """Another rank for layers whose name matches."""
    alpha_pattern: Annotated[dict[str, Positive], AfterValidator(check_regex)] = {}
    """Another lora_alpha for layers whose name matches."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "loftq"] = True
    """Initialization of the two matrices; true: the adapter starts without any effect; loftq: with what 4 bit lost, at rank r."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """Task; text generation is the only one."""

    def contradictions(self) -> Iterator[str]:
        if self.init_lora_weights == "orthogonal" and self.r % 2:
            yield f'r = {self.r} must be even for init_lora_weights = "orthogonal".'
        if self.init_lora_weights == "loftq" and self.use_dora:
            yield 'init_lora_weights = "loftq" and use_dora = true each set how the adapter starts: delete one.'


class Data(Table):
    """Training and evaluation data."""

    train: Places
    """Training data: a hub id, or one or several .json, .jsonl, .csv, .parquet files."""
    eval: Places | None = None
    """Evaluation data, named as train is; unset: rows held out of train."""
    eval_size: ShareOrCount = 0.05
    """Share (below 1) or number of the rows held out for evaluation where eval is unset."""
    split_seed: Seed = 42
    """Seed of the random choice of held-out rows."""
    split: Text = "train"
    """Split of the hub data set for training."""
    eval_split: Text | None = None
    """Split of the hub data set for evaluation."""
    subset: Text | None = None
    """Configuration of the hub data set, where it has several."""
    revision: Text | None = None
    """Branch, tag or commit of the hub data set."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """Format of a row; auto: recognized by its columns."""
    fields: dict[str, Text] = {}
    """Names of the format's columns in your data: { instruction = "question" }; needs format to be set."""
    ignore_columns: list[Text] = []
    """Columns, and keys of messages, that are left out on purpose, also those of preference data."""
    allow_special_tokens: bool = False
    """Read special tokens that rows hold as text as such tokens: for text that is rendered already."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Supervised tokens: those of the assistant's turns with their end of turn, or all."""
    max_rows: Count | None = None
    """Largest number of training rows that are read, held-out rows included."""
    max_eval_rows: Count | None = None
    """Largest number of evaluation rows."""
    chat_template: Place = "auto"
    """Chat template by name or file; auto: the one of the model's family."""

    def contradictions(self) -> Iterator[str]:
        if not self.eval_size:
            yield (
                "eval_size = 0 holds no rows out: to train on every row, delete it, write [training] do_eval = false, "
                "and delete eval_strategy, early_stopping_patience and load_best_model_at_end where they are set."
            )
        if self.fields and self.format == "auto":
            yield 'fields needs the format whose columns it maps: add for example format = "alpaca".'


class CheckpointingKwargs(Table):
    """Options of torch's checkpointing."""

    use_reentrant: Literal[False] = False
    """Always false."""


def _default_batch_size(data: dict[str, Any]) -> int:
    micro, accumulation = data.get("per_device_train_batch_size"), data.get("gradient_accumulation_steps")
    return micro * accumulation if isinstance(micro, int) and isinstance(accumulation, int) else 16


class Training(Table):
    """The training run; names of TrainingArguments and SFTConfig, and `batch_size`."""

    per_device_train_batch_size: Count | Literal["auto"] = "auto"
    """Rows of a micro-batch (packed: rows of max_length tokens); auto: planned for the GPU (on a CPU 512 tokens or one row)."""
    gradient_accumulation_steps: Count | None = None
    """Micro-batches of an optimizer step; unset: follows from batch_size."""
    batch_size: Annotated[int, Field(ge=1, le=2**16)] = Field(default_factory=_default_batch_size)
    """Rows of an optimizer step, packed or not; unset: the product of the two keys above where both are set, else 16."""
    per_device_eval_batch_size: Count | Literal["auto"] = "auto"
    """Rows of a micro-batch in evaluation; auto: planned for the GPU."""
    max_length: Annotated[int, Field(ge=8, le=2**31)] = 2048
    """Tokens of the longest row; longer rows are truncated."""
    packing: bool = True
    """Concatenate the rows of a micro-batch instead of padding them; changes speed, not what is learned."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training data."""
    max_steps: Literal[-1] | Count = -1
    """Optimizer steps; -1: as many as num_train_epochs needs."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Highest learning rate."""
    lr_scheduler_type: Scheduler = "cosine"
    """Learning rate schedule."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """More settings of the schedule, such as min_lr_rate."""
    warmup_steps: ShareOrCount = Field(
        default_factory=lambda data: 0 if data.get("lr_scheduler_type") in WITHOUT_WARMUP else 0.03
    )
    """Warm-up steps; below 1 a share of all steps; unset: 0.03, or 0 for a schedule without warm-up."""
    optim: Optimizer = "auto"
    """Optimizer; auto: 8-bit AdamW on a GPU, paged where memory is short, and adamw_torch on a CPU."""
    adam_beta1: Share = 0.9
    """Decay rate of Adam's average of the gradient."""
    adam_beta2: Share = 0.999
    """Decay rate of Adam's average of the squared gradient."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to Adam's denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the adapter."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient clipping: the largest norm; 0: no clipping."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+: the learning rate of the matrix lora_B as a multiple of learning_rate; unset: 1."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune: noise on the embeddings in training, at most alpha / sqrt(tokens of the row x hidden size); unset: none."""
    recover_from_divergence: bool = True
    """Go back to the last good adapter when a step diverges (see below); false: a loss that is not finite ends the run."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass instead of storing them; auto: planned from the free memory."""
    gradient_checkpointing_kwargs: CheckpointingKwargs = CheckpointingKwargs()
    """Kind of checkpointing; non-reentrant is the only one."""
    activation_offloading: bool | Literal["auto"] = "auto"
    """Move the inputs of recomputed layers to CPU memory; auto: planned for the GPU (on a CPU false)."""
    bf16: bool | None = None
    """true: the same as bnb_4bit_compute_dtype = "bfloat16"."""
    fp16: bool | None = None
    """true: the same as bnb_4bit_compute_dtype = "float16"."""
    seed: Seed = 42
    """Seed of the adapter's initialization, of dropout and of the order of the rows."""
    data_seed: Seed | None = None
    """Seed of the order of the rows, where it is not seed."""
    do_eval: bool = True
    """Hold rows out and evaluate on them; false: train on all rows."""
    eval_strategy: Interval = Field(default_factory=lambda data: "no" if data.get("do_eval") is False else "steps")
    """When to evaluate in training; no: only before and after."""
    eval_steps: ShareOrCount = 0.2
    """Steps between evaluations; below 1 a share of all steps."""
    early_stopping_patience: Count | None = None
    """Evaluations in a row without a lower loss, after which training ends; the adapter of the lowest is saved; unset: off."""
    save_strategy: Interval = "steps"
    """When to save a checkpoint."""
    save_steps: ShareOrCount = 0.2
    """Steps between checkpoints; below 1 a share of all steps."""
    save_minutes: Annotated[float, Field(ge=0)] = Field(
        default_factory=lambda data: 0.0 if data.get("save_strategy") == "no" else 10.0
    )
    """Save a checkpoint also when so many minutes have passed since the last one; 0: never; unset: 10."""
    save_total_limit: Count = 3
    """Number of checkpoints that are not deleted: the newest."""
    load_best_model_at_end: bool = False
    """Save the adapter with the lowest evaluation loss, not the last one."""
    logging_strategy: Interval = "steps"
    """When to print metrics in plain lines; metrics.jsonl has every step."""
    logging_steps: ShareOrCount = 1
    """Steps between printed metrics; below 1 a share of all steps."""
    log_level: Literal["debug", "info", "warning", "error", "critical", "passive"] = "passive"
    """Log level of the libraries; passive: their default."""
    disable_tqdm: bool = False
    """Print plain lines instead of a progress bar."""
    report_to: Tracker | list[Tracker] = "none"
    """Experiment trackers that receive the metrics; extras of this package: tensorboard, wandb, mlflow, trackio."""
    report_samples: Annotated[int, Field(ge=0, le=64)] = 8
    """Held-out prompts that base and tuned model answer at the end, for report.html; 0: none. They take 1 min or 5 % at most."""
    remove_unused_columns: Literal[True] = True
    """Only token ids reach the model; always true."""
    output_dir: Annotated[Place, AfterValidator(os.path.expanduser)] = "runs"
    """Folder of the run folders: <output_dir>/<recipe>/<time>; ~ is the home folder."""

    @property
    def micro_batch_size(self) -> int | None:
        """Rows of a micro-batch where the recipe sets them; None where they are planned."""
        if isinstance(self.per_device_train_batch_size, int):
            return self.per_device_train_batch_size
        return self.batch_size // self.gradient_accumulation_steps if self.gradient_accumulation_steps else None

    def contradictions(self) -> Iterator[str]:
        yield from self._batch_contradictions()
        if self.activation_offloading is True and self.gradient_checkpointing is False:
            yield "activation_offloading = true needs gradient_checkpointing, whose layer inputs it moves: delete one."
        yield from self._schedule_contradictions()
        yield from self._interval_contradictions()
        if self.bf16 and self.fp16:
            yield "bf16 and fp16 cannot both be true: delete one."
        elif (self.bf16 is False or self.fp16 is False) and not (self.bf16 or self.fp16):
            name = "bf16" if self.bf16 is False else "fp16"
            yield f'{name} = false sets no type: delete it, or set [quantization] bnb_4bit_compute_dtype = "float32".'

    def _batch_contradictions(self) -> Iterator[str]:
        rows, times = self.batch_size, self.gradient_accumulation_steps
        micro = None if self.per_device_train_batch_size == "auto" else self.per_device_train_batch_size
        alone = micro or times
        if alone and not (micro and times) and "batch_size" not in self.model_fields_set:
            name = "per_device_train_batch_size" if micro else "gradient_accumulation_steps"
            example = alone * max(1, 16 // alone)
            yield f"{name} = {alone} alone does not set the rows of a step: add batch_size, for example {example}."
        elif micro and times and micro * times != rows:
            yield (
                f"batch_size = {rows} is not per_device_train_batch_size x gradient_accumulation_steps = "
                f"{micro} x {times} = {micro * times}: delete one of the three."
            )
        elif micro and rows % micro:
            yield f"per_device_train_batch_size = {micro} does not divide batch_size = {rows}."
        elif times and rows % times:
            yield f"gradient_accumulation_steps = {times} does not divide batch_size = {rows}."

    def _schedule_contradictions(self) -> Iterator[str]:
        name = self.lr_scheduler_type
        if self.warmup_steps and name in WITHOUT_WARMUP:
            other = ', or lr_scheduler_type = "constant_with_warmup"' if name == "constant" else ""
            yield (f'lr_scheduler_type = "{name}" ignores warmup_steps = {self.warmup_steps}: write warmup_steps = 0{other}.')
        if name in NEEDS_EVALUATION and self.eval_strategy == "no":
            yield f'lr_scheduler_type = "{name}" follows the evaluation loss: write eval_strategy = "steps".'
        needed = NEEDS_KWARGS.get(name, ())
        if needed and not any(key in self.lr_scheduler_kwargs for key in needed):
            yield f'lr_scheduler_type = "{name}" needs lr_scheduler_kwargs with {" or ".join(needed)}.'

    def _interval_contradictions(self) -> Iterator[str]:
        for name in ("eval", "save", "logging"):
            if getattr(self, f"{name}_strategy") == "steps" and not getattr(self, f"{name}_steps"):
                yield f'{name}_steps = 0 is not an interval: write at least 1, or {name}_strategy = "no".'
        if self.save_minutes and self.save_strategy == "no":
            yield f'save_strategy = "no" and save_minutes = {self.save_minutes:g} contradict each other: delete one.'
        keys = [f"early_stopping_patience = {self.early_stopping_patience}"] if self.early_stopping_patience else []
        keys += ["load_best_model_at_end = true"] if self.load_best_model_at_end else []
        if not self.do_eval:
            keys = [f'eval_strategy = "{self.eval_strategy}"', *keys] if self.eval_strategy != "no" else keys
            if keys:
                yield f"do_eval = false and {' and '.join(keys)} contradict each other: delete do_eval, or the rest."
        elif keys and self.eval_strategy == "no":
            verb, what = ("needs", "it") if len(keys) == 1 else ("need", "them")
            yield f'{" and ".join(keys)} {verb} evaluations: delete {what}, or write eval_strategy = "steps".'


class Memory(Table):
    """What the memory plan may use and choose; nothing here changes what is learned."""

    gpu: Index | Text = "auto"
    """GPU of the run: its number in nvidia-smi, or (part of) its name; auto: the GPU with the most free memory."""
    budget: Size = "auto"
    """GPU memory that the run may use, such as "11GiB"; auto: what is free."""
    micro_batch_tokens: Count | Literal["auto"] = "auto"
    """Tokens of a micro-batch (a longer row is a micro-batch of its own); auto: planned."""
    checkpoint_every_n_layers: Count | Literal["auto"] = "auto"
    """Recompute only every n-th decoder layer; 1: all layers; auto: planned."""
    keep_attention: bool | Literal["auto"] = "auto"
    """Keep the results of attention in recomputed layers, so that it is computed once; auto: planned (on a CPU false)."""
    logits_tile: Annotated[Size, AfterValidator(_check_logits_tile)] = "auto"
    """Logits in memory at once in the loss, such as "16MiB"; auto: 32MiB."""
    mlp_tile_tokens: Literal[0] | Annotated[int, Field(ge=128, le=2**31)] | Literal["auto"] = "auto"
    """Tokens that go through a layer's MLP at once, 0: all; auto: 0 unless memory is short."""
    kernels: Literal["auto", "plain"] = "auto"
    """auto: the layers' fused kernels where the GPU runs them; plain: PyTorch's own."""
    rehearsal: bool | Literal["auto"] = "auto"
    """Run the heaviest step once before the first; auto: on a GPU."""


class Recipe(Table):
    """Everything that decides a run: the same recipe with the same data gives the same adapter."""

    model: Model
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    data: Data
    training: Training = Training()
    memory: Memory = Memory()

    @property
    def compute_dtype(self) -> ComputeDtype:
        """Data type of the computation, from `bf16`, `fp16` or `bnb_4bit_compute_dtype`."""
        if self.training.bf16:
            return "bfloat16"
        return "float16" if self.training.fp16 else self.quantization.bnb_4bit_compute_dtype

    def contradictions(self) -> Iterator[str]:
        if self.memory.micro_batch_tokens != "auto" and self.training.micro_batch_size is not None:
            yield (
                f"[memory] micro_batch_tokens = {self.memory.micro_batch_tokens} and a fixed "
                "[training] per_device_train_batch_size both set the micro-batch: delete one."
            )
        for key in ("checkpoint_every_n_layers", "keep_attention"):
            if self.training.gradient_checkpointing is False and getattr(self.memory, key) not in ("auto", False):
                yield f"[memory] {key} needs [training] gradient_checkpointing: delete one."
        if self.lora.init_lora_weights == "loftq" and not self.quantization.load_in_4bit:
            yield '[lora] init_lora_weights = "loftq" needs [quantization] load_in_4bit = true, whose errors it corrects.'
        if self.lora.init_lora_weights == "orthogonal" and self.quantization.load_in_4bit:
            yield '[lora] init_lora_weights = "orthogonal" needs [quantization] load_in_4bit = false: PEFT fails with 4 bit.'
        if self.lora.init_lora_weights == "loftq" and self.model.adapter:
            yield '[lora] init_lora_weights = "loftq" and [model] adapter each set how the adapter starts: delete one.'
        named = self.quantization.bnb_4bit_compute_dtype
        if named not in ("auto", self.compute_dtype):
            key = "bf16" if self.training.bf16 else "fp16"
            yield f'[training] {key} = true and [quantization] bnb_4bit_compute_dtype = "{named}" differ: delete one.'


TABLES: dict[str, type[Table]] = {
    "model": Model,
    "quantization": Quantization,
    "lora": Lora,
    "data": Data,
    "training": Training,
    "memory": Memory,
}
