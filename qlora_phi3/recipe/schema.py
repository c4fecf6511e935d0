"""The six tables of a recipe, as frozen values: every key with its type, default and meaning.

Names are the ecosystem's: `[lora]` has those of peft's LoraConfig, `[training]` those of TrainingArguments and
SFTConfig. Types are strict ("16" is no number, `true` is no 1); only a whole number may stand for a float. What a table
checks here needs no model, no data and no device. Reading files and wording errors is left to others.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qlora_phi3.units import parse_size

ComputeDtype = Literal["auto", "bfloat16", "float16", "float32"]


Text = Annotated[str, Field(min_length=1)]


Texts = Text | Annotated[list[Text], Field(min_length=1)]


Count = Annotated[int, Field(ge=1)]


Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # numpy takes no larger one


Share = Annotated[float, Field(ge=0, lt=1)]


Positive = Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0)]


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


def _share_or_count(value: float) -> float:
    """Refuse what is neither a share nor a whole number; 1.0 could be either, so it is neither."""
    if value < 0 or (isinstance(value, float) and value >= 1):
        raise ValueError("must be a share below 1 or a whole number")
    return value


#: A number of steps or rows; below 1 it is a share of all of them.
ShareOrCount = Annotated[int | float, AfterValidator(_share_or_count)]


class Table(BaseModel):
    """One table: frozen, strict, unknown keys refused, and all its contradictions named at once."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def contradictions(self) -> Iterator[str]:
        """Yield one sentence for each pair of keys that cannot both hold; called when every key alone is sound."""
        yield from ()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if problems := "\n".join(self.contradictions()):
            raise ValueError(problems)
        return self


class Model(Table):
    """The base model."""

    name: Text
    """Hub id or folder of a checkpoint whose config.json says model_type phi3."""
    revision: Text | None = None
    """Branch, tag or commit of the hub repository."""
    adapter: Text | None = None
    """A trained adapter to begin with, of the same settings as [lora]: a PEFT folder or a run's; unset: a fresh one."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """How attention is computed."""
    save_quantized: bool = False
    """Keep the 4-bit base in the run folder (2.1 GB for Phi-3-mini): an export then has its very bits on any computer."""


class Quantization(Table):
    """How the frozen base is held in memory; names of BitsAndBytesConfig."""

    load_in_4bit: bool = True
    """Hold the linear layers in 4 bit (QLoRA); false: 16 bit (plain LoRA)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit code."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the scales too: 4.127 instead of 4.5 bit a weight."""
    bnb_4bit_compute_dtype: ComputeDtype = "auto"
    """Type of the arithmetic; auto: bfloat16 where it is native, else float16 (GPU) or float32 (CPU)."""


class Lora(Table):
    """The adapter; names of peft's LoraConfig."""

    r: Count = 16
    """Rank of the two matrices added to each layer."""
    lora_alpha: Positive = 16
    """Strength: the update is scaled by lora_alpha / r."""
    lora_dropout: Share = 0.0
    """Share of the adapter's inputs dropped at random while training."""
    target_modules: Texts = "all-linear"
    """Layers that get an adapter: all-linear, a list of names, or a regular expression."""
    exclude_modules: Texts | None = None
    """Layers left out: a list of names or a regular expression."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained as well."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r), which keeps large ranks effective."""
    use_dora: bool = False
    """Learn each weight's size apart from its direction (DoRA); slower."""
    modules_to_save: list[Text] | None = None
    """Modules trained in full and saved with the adapter."""
    layers_to_transform: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] | None = None
    """Only these decoder layers, counted from 0, get an adapter."""
    rank_pattern: dict[str, Count] = {}
    """Another rank for layers whose name matches."""
    alpha_pattern: dict[str, Positive] = {}
    """Another lora_alpha for layers whose name matches."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """How the two matrices start; true: the adapter begins as no change at all."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """What is trained; only text generation here."""

    def contradictions(self) -> Iterator[str]:
        """An orthogonal start cuts the rank in two halves."""
        if self.init_lora_weights == "orthogonal" and self.r % 2:
            yield f'r = {self.r} must be even for init_lora_weights = "orthogonal".'


class Data(Table):
    """The conversations."""

    train: Texts
    """Training rows: a hub id, or one or several .json, .jsonl, .csv, .parquet files."""
    eval: Texts | None = None
    """Rows to measure on, named as train is; unset: held out of train."""
    eval_size: ShareOrCount = 0.05
    """Share (below 1) or number of rows held out where eval names none."""
    split_seed: Seed = 42
    """Seed of the draw that holds rows out; recorded with the run."""
    split: Text = "train"
    """Split of the hub data set that is trained on."""
    eval_split: Text | None = None
    """Split of the hub data set that is measured on."""
    subset: Text | None = None
    """Configuration of the hub data set, where it has several."""
    revision: Text | None = None
    """Branch, tag or commit of the hub data set."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """Shape of a row; auto: read off the columns."""
    fields: dict[str, Text] = {}
    """The format's column names and yours: { instruction = "question" }; needs a format by name."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Words that are learned: the assistant's and its end of turn, or every word."""
    max_rows: Count | None = None
    """Use at most this many rows to train on."""
    max_eval_rows: Count | None = None
    """Use at most this many rows to measure on."""
    chat_template: Text = "auto"
    """Chat template by name; auto: the one of the model's family."""

    def contradictions(self) -> Iterator[str]:
        """Something must be held out, and a field map must know whose fields it maps."""
        if not self.eval_size:
            yield "eval_size = 0 holds nothing out: to train on every row write [training] do_eval = false."
        if self.fields and self.format == "auto":
            yield 'fields needs to know the format it maps: add e.g. format = "alpaca".'


class CheckpointingKwargs(Table):
    """What torch's checkpointing is told."""

    use_reentrant: Literal[False] = False
    """Always false."""


def _rows_of_a_step(data: dict[str, Any]) -> int:
    micro, accumulation = data.get("per_device_train_batch_size"), data.get("gradient_accumulation_steps")
    return micro * accumulation if isinstance(micro, int) and isinstance(accumulation, int) else 16


def _usual_warmup(data: dict[str, Any]) -> float:
    return 0 if data.get("lr_scheduler_type") in WITHOUT_WARMUP else 0.03


def _usual_eval_strategy(data: dict[str, Any]) -> Literal["no", "steps"]:
    return "no" if data.get("do_eval") is False else "steps"


#: Schedules that ignore warmup_steps (transformers.optimization.get_scheduler, 5.23).
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")


#: Schedules that move when the held-out loss does.
NEEDS_EVALUATION = ("reduce_lr_on_plateau", "greedy")


#: What lr_scheduler_kwargs must hold: one of these names.
NEEDS_KWARGS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}


class Training(Table):
    """The run; names of TrainingArguments and SFTConfig, and `batch_size`."""

    per_device_train_batch_size: Count | Literal["auto"] = "auto"
    """Rows (packed: rows of max_length tokens) in one forward pass; auto: the plan decides (CPU: 512 tokens or one row)."""
    gradient_accumulation_steps: Count | None = None
    """Forward passes in one optimizer step; follows from batch_size when unset."""
    batch_size: Annotated[int, Field(ge=1, le=2**16)] = Field(default_factory=_rows_of_a_step)
    """Rows of an optimizer step, packed or not; 16, or the product of the two keys above."""
    per_device_eval_batch_size: Count | Literal["auto"] = "auto"
    """Rows in one forward pass of an evaluation."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest row in tokens; longer ones are cut."""
    packing: bool = True
    """Lay the rows of a step end to end instead of padding; changes speed, never what is learned."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """How often every row is seen."""
    max_steps: Literal[-1] | Count = -1
    """Stop after this many optimizer steps; -1: by epochs."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Highest learning rate."""
    lr_scheduler_type: Scheduler = "cosine"
    """Course of the learning rate."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Further settings of that course, such as min_lr_rate."""
    warmup_steps: ShareOrCount = Field(default_factory=_usual_warmup)
    """Steps up to the learning rate; below 1 a share of all steps. 0.03, or 0 without warm-up."""
    optim: Optimizer = "auto"
    """Optimizer; auto: 8-bit AdamW on CUDA, paged where memory is tight, adamw_torch on a CPU."""
    adam_beta1: Share = 0.9
    """Adam's memory of the gradient."""
    adam_beta2: Share = 0.999
    """Adam's memory of the squared gradient."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Keeps Adam from dividing by zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Pull of the adapter towards zero."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Longer gradients are shortened to this; 0: never."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Compute activations twice instead of keeping them; auto: the plan decides (on a CPU: true)."""
    gradient_checkpointing_kwargs: CheckpointingKwargs = CheckpointingKwargs()
    """Kind of checkpointing; the non-reentrant one is the only one."""
    activation_offloading: bool | Literal["auto"] = "auto"
    """Keep what recomputation starts from in the computer's memory; auto: the plan decides (on a CPU: false)."""
    bf16: bool | None = None
    """true: compute in bfloat16, as bnb_4bit_compute_dtype says it."""
    fp16: bool | None = None
    """true: compute in float16, as bnb_4bit_compute_dtype says it."""
    seed: Seed = 42
    """Seed of the adapter's start, of dropout and of the order of the rows."""
    data_seed: Seed | None = None
    """Another seed for the order of the rows."""
    do_eval: bool = True
    """Hold rows out and measure on them; false: train on all of them."""
    eval_strategy: Literal["no", "steps", "epoch"] = Field(default_factory=_usual_eval_strategy)
    """When to measure while training; no: only before and after."""
    eval_steps: ShareOrCount = 0.2
    """Steps between evaluations; below 1 a share of all steps."""
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When to write a checkpoint."""
    save_steps: ShareOrCount = 0.2
    """Steps between checkpoints; below 1 a share of all steps."""
    save_total_limit: Count = 3
    """Keep only the newest checkpoints, this many, and the best where load_best_model_at_end asks for it."""
    load_best_model_at_end: bool = False
    """Hand out the checkpoint with the lowest held-out loss."""
    logging_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When to show figures as plain lines; metrics.jsonl has every step."""
    logging_steps: ShareOrCount = 1
    """Steps between figures; below 1 a share of all steps."""
    log_level: Literal["debug", "info", "warning", "error", "critical", "passive"] = "passive"
    """How much the libraries tell on the terminal; passive: their default."""
    disable_tqdm: bool = False
    """Plain lines instead of a progress bar."""
    report_to: Tracker | list[Tracker] = "none"
    """Trackers that get the figures as well."""
    remove_unused_columns: Literal[True] = True
    """Columns that are no text are never kept."""
    output_dir: Text = "runs"
    """Folder of the run folders: <output_dir>/<recipe>/<time>."""

    @property
    def micro_batch_size(self) -> int | None:
        """Rows of one forward pass where the recipe fixes them; None leaves them to the plan."""
        if isinstance(self.per_device_train_batch_size, int):
            return self.per_device_train_batch_size
        return self.batch_size // self.gradient_accumulation_steps if self.gradient_accumulation_steps else None

    def contradictions(self) -> Iterator[str]:
        """Batch sizes that do not multiply, schedules without what they need, evaluations that are switched off."""
        yield from self._batch_contradictions()
        if self.activation_offloading is True and self.gradient_checkpointing is False:
            yield "activation_offloading = true needs gradient_checkpointing, whose starting points it moves: keep one."
        yield from self._schedule_contradictions()
        yield from self._interval_contradictions()
        if self.bf16 and self.fp16:
            yield "bf16 and fp16 cannot both be true: keep one."
        elif (self.bf16 is False or self.fp16 is False) and not (self.bf16 or self.fp16):
            name = "bf16" if self.bf16 is False else "fp16"
            yield f'{name} = false names no type: delete it, or set [quantization] bnb_4bit_compute_dtype = "float32".'

    def _batch_contradictions(self) -> Iterator[str]:
        rows, times = self.batch_size, self.gradient_accumulation_steps
        micro = None if self.per_device_train_batch_size == "auto" else self.per_device_train_batch_size
        alone = micro or times
        if alone and not (micro and times) and "batch_size" not in self.model_fields_set:
            name = "per_device_train_batch_size" if micro else "gradient_accumulation_steps"
            usual = alone * max(1, 16 // alone)
            yield f"{name} = {alone} alone leaves the optimizer's batch open: add batch_size, for example {usual}."
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
            yield (
                f'lr_scheduler_type = "{name}" ignores warmup_steps = {self.warmup_steps}: '
                f"write warmup_steps = 0{other}."
            )
        if name in NEEDS_EVALUATION and self.eval_strategy == "no":
            yield f'lr_scheduler_type = "{name}" follows the held-out loss: write eval_strategy = "steps".'
        needed = NEEDS_KWARGS.get(name, ())
        if needed and not any(key in self.lr_scheduler_kwargs for key in needed):
            yield f'lr_scheduler_type = "{name}" needs lr_scheduler_kwargs with {" or ".join(needed)}.'

    def _interval_contradictions(self) -> Iterator[str]:
        for name in ("eval", "save", "logging"):
            if getattr(self, f"{name}_strategy") == "steps" and not getattr(self, f"{name}_steps"):
                yield f'{name}_steps = 0 is no interval: write at least 1, or {name}_strategy = "no".'
        if not self.do_eval and self.eval_strategy != "no":
            yield f'do_eval = false and eval_strategy = "{self.eval_strategy}" contradict each other: keep one.'
        if self.load_best_model_at_end and not self._saves_what_it_measures():
            yield (
                "load_best_model_at_end needs a measured loss at every checkpoint: eval_strategy and save_strategy the "
                "same (steps or epoch), and save_steps a multiple of eval_steps."
            )

    def _saves_what_it_measures(self) -> bool:
        """The rule of TrainingArguments.__post_init__ (transformers 5.23), told before torch is imported."""
        if self.eval_strategy != self.save_strategy or self.eval_strategy == "no":
            return False
        if self.eval_strategy == "epoch":
            return True
        if not self.eval_steps or (self.eval_steps < 1) != (self.save_steps < 1):
            return False
        return round(self.save_steps * 10**6) % round(self.eval_steps * 10**6) == 0


def _with_unit(value: object) -> object:
    """Refuse a bare number, which TOML allows and which is no size."""
    if value == 0 and not isinstance(value, bool):
        raise ValueError("must be more than zero, with its unit")
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f'has no unit: write "{value}GiB" or "{value}MiB"')
    return value


def _readable_size(value: str) -> str:
    """Refuse what is neither "auto" nor a size; the key and the value are told before."""
    if value != "auto":
        try:
            parse_size(value)
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"'{value}' ")) from None
    return value


def _useful_tile(value: str) -> str:
    """Refuse a tile of logits smaller than one position's may be, or larger than it can matter."""
    if value != "auto" and not SMALLEST_TILE <= parse_size(value) <= LARGEST_TILE:
        raise ValueError('must be "1MiB" to "16GiB"')
    return value


SMALLEST_TILE, LARGEST_TILE = 2**20, 16 * 2**30


Size = Annotated[str, AfterValidator(_readable_size), BeforeValidator(_with_unit)]


class Memory(Table):
    """What the plan may use and choose; nothing here changes what is learned."""

    budget: Size = "auto"
    """Memory the run may take on the card, such as "11GiB"; auto: what is free on it."""
    micro_batch_tokens: Count | Literal["auto"] = "auto"
    """Tokens of one forward pass (a longer row stands alone); auto: the plan decides."""
    checkpoint_every_n_layers: Count | Literal["auto"] = "auto"
    """Recompute only every n-th decoder layer; 1: all of them."""
    logits_tile: Annotated[Size, AfterValidator(_useful_tile)] = "auto"
    """Logits alive at once in the loss, such as "16MiB"; auto: 32MiB."""
    mlp_tile_tokens: Literal[0] | Annotated[int, Field(ge=128)] | Literal["auto"] = "auto"
    """Tokens that go through a layer's MLP at once, 0: all of them; auto: 0 unless room is short."""
    gpu: Annotated[int, Field(ge=0)] | Text = "auto"
    """GPU of the run: its number in nvidia-smi, or its name; auto: the one with the most free memory."""
    rehearsal: bool | Literal["auto"] = "auto"
    """Try the heaviest step before the first; auto: on a GPU."""


class Recipe(Table):
    """What a run does, wholly: the same recipe on the same data gives the same adapter."""

    model: Model
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    data: Data
    training: Training = Training()
    memory: Memory = Memory()

    @property
    def compute_dtype(self) -> ComputeDtype:
        """The type of the arithmetic, from `bnb_4bit_compute_dtype` or a pasted `bf16` or `fp16`."""
        return self._pasted_dtype() or self.quantization.bnb_4bit_compute_dtype

    def contradictions(self) -> Iterator[str]:
        """A pasted bf16 or fp16 against the compute type; two sizes of a micro-batch; checkpointing on and off."""
        if self.memory.micro_batch_tokens != "auto" and self.training.micro_batch_size is not None:
            yield (
                f"[memory] micro_batch_tokens = {self.memory.micro_batch_tokens} and a fixed "
                "[training] per_device_train_batch_size say the same thing twice: keep one."
            )
        if self.memory.checkpoint_every_n_layers != "auto" and self.training.gradient_checkpointing is False:
            yield "[memory] checkpoint_every_n_layers needs [training] gradient_checkpointing: keep one."
        pasted, named = self._pasted_dtype(), self.quantization.bnb_4bit_compute_dtype
        if pasted and named not in ("auto", pasted):
            switch = "bf16" if self.training.bf16 else "fp16"
            yield f'[training] {switch} = true and [quantization] bnb_4bit_compute_dtype = "{named}" differ: keep one.'

    def _pasted_dtype(self) -> ComputeDtype | None:
        return "bfloat16" if self.training.bf16 else "float16" if self.training.fp16 else None


TABLES: dict[str, type[Table]] = {
    "model": Model,
    "quantization": Quantization,
    "lora": Lora,
    "data": Data,
    "training": Training,
    "memory": Memory,
}
