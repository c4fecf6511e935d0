"""PEFT's LoRA on the disk: adapter_config.json and its tensors, read as `LoraDelta`s and written from them.

Ranks and alphas are read with their patterns and use_rslora resolved, and written as plain ones: the scaling stays the same.
Pickles are read without running what they hold.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError
from reprlib import repr
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from qlora_phi3.adapters.delta import Adapter, Kind, LoraDelta, LowRankBlock, last_name, stack
from qlora_phi3.errors import ExportError
from qlora_phi3.files import check_no_pointer, foreign_errors, read_json_object, sha256_file
from qlora_phi3.model.weights import open_file, read_tensor
from qlora_phi3.recipe.schema import check_regex

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
#: PEFT writes it before every name of the base.
PREFIX = "base_model.model."
LORA_TENSOR = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)")
#: The hint for a file that is no state dict of LoRA tensors.
SAVE_STATE_DICT = "Save the state dict alone: torch.save(loralib.lora_state_dict(model), path)."
#: Where training scripts put the state dict in what they save; the first is that of loralib's own GPT-2 example.
NESTED_KEYS = ("model_state_dict", "state_dict")
#: Values of init_lora_weights that leave the base unchanged; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it.
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", None)
#: Keys of LoraConfig (PEFT 0.21) that are read here or do not change what is added to the base.
UNDERSTOOD_KEYS = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "init_lora_weights", "bias", "modules_to_save", "use_dora", "eva_config",
}  # fmt: skip
#: Files in which other tools keep an adapter, and the tools.
FOREIGN_FILES = {
    "adapters.safetensors": "MLX", "adapters.npz": "MLX", "*_adapters.safetensors": "MLX", "lit_model*.pth*": "litgpt",
    "adapter_[0-9]*": "torchtune", "*.gguf": "llama.cpp (GGUF)",
}  # fmt: skip
Rank = Annotated[int, Field(gt=0, lt=2**16)]
Alpha = Annotated[float, Field(gt=0, lt=1e9)]
Names = Annotated[str | list[str], AfterValidator(check_regex)]  # a regular expression, or names


class AdapterValues(BaseModel):
    """The keys of adapter_config.json that are read here. All may be left out, and all but r, lora_alpha and bias be null."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    r: Rank = 8
    lora_alpha: Alpha = 8
    rank_pattern: Annotated[dict[str, Rank], AfterValidator(check_regex)] | None = None
    alpha_pattern: Annotated[dict[str, Alpha], AfterValidator(check_regex)] | None = None
    target_modules: Names | None = None
    exclude_modules: Names | None = None
    modules_to_save: list[str] | None = None
    layers_pattern: Names | None = None
    layers_to_transform: int | list[int] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    base_model_name_or_path: Annotated[str, Field(pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")] | None = None
    revision: str | None = None


def find_adapter(path: Path) -> Path:
    """The PEFT directory that is meant: `path`, or the `adapter` of a run; ExportError where there is none, or another tool's."""
    if not path.exists():
        raise ExportError(f"There is no file, directory or run {path}.", "Check the name.")
    names = [path.name] if path.is_file() else sorted(file.name for file in path.iterdir())
    foreign = ((name, tool) for name in names for pattern, tool in FOREIGN_FILES.items() if fnmatch(name, pattern))
    for name, tool in foreign if not {ADAPTER_WEIGHTS, ADAPTER_PICKLE} & {*names} else ():
        other_format = f"Write it in PEFT's format ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}) with that tool first."
        raise ExportError(f"{path} is an adapter of {tool} ({name}), which is not read here.", other_format)
    if path.is_file():
        hint = "From loralib: qlora-phi3 adapter convert FILE NEW --to peft --alpha ALPHA"
        raise ExportError(f"{path} is a file, and a PEFT adapter is a directory.", hint)
    is_run = not (path / ADAPTER_CONFIG).is_file() and (path / "adapter" / ADAPTER_CONFIG).is_file()
    return path / "adapter" if is_run else path


def adapter_record(folder: Path) -> dict[str, str]:
    """SHA-256 of the adapter's files by name; a run records it so that an export can verify the adapter."""
    return {name: sha256_file(folder / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)}


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a PEFT directory; ExportError where there is none or a value in it has not its key's type."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise ExportError(f"{folder} holds no {ADAPTER_CONFIG}.", "Give the directory of a PEFT adapter, or of a run.")
    config = read_json_object(path, ExportError, "Copy the adapter again.")
    try:
        AdapterValues.model_validate(config)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        problem = f"{path} has {key} = {repr(config[key])}, which PEFT never writes."
        raise ExportError(problem, "Copy the adapter again.") from error
    return config


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse an adapter that does more than add a low-rank matrix to weights of an unchanged base; `where` is its place, for the
    messages. ExportError where it is not a LoRA, for a start that changed the base, and for a setting that is not understood.
    """
    from peft import LoraConfig

    if "peft_type" not in config and not config.keys().isdisjoint(("fine_tune_type", "lora_parameters", "lora_layers")):
        raise ExportError(f"{where} has a config of MLX, not of PEFT.", "Write the adapter in PEFT's format first.")
    if str(config.get("peft_type")) != "LORA":
        raise ExportError(f"{where} is a {config.get('peft_type')} adapter.", "Only LoRA can be converted or merged.")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        message = f"{where}: init_lora_weights = {config['init_lora_weights']!r} changed the base that the adapter is for."
        raise ExportError(message, "Save it with PEFT's path_initial_model_for_weight_conversion first.")
    defaults = LoraConfig().to_dict()
    for key in sorted(config.keys() - UNDERSTOOD_KEYS):
        if config[key] and config[key] != defaults.get(key):
            raise ExportError(
                f"{where}: {key} = {repr(config[key])} is not a plain LoRA, and can be neither converted, merged nor trained on.",
                "Use the adapter with PEFT.",
            )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT directory, as `read_tensors`; safetensors are preferred to an old adapter_model.bin."""
    pickled = (folder / ADAPTER_PICKLE).is_file() and not (folder / ADAPTER_WEIGHTS).is_file()
    return read_tensors(folder / (ADAPTER_PICKLE if pickled else ADAPTER_WEIGHTS))


def read_shapes(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT directory on "meta", without values. Of safetensors only the header is read."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        return {name: tensor.to("meta") for name, tensor in read_weights(folder).items()}
    stored = open_file(path, error=ExportError)
    return {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in stored.info.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a file that torch.save wrote: floating-point and finite, on the CPU, of the file's
    dtypes, by name. ExportError where there is no such file, it is incomplete, or it holds anything else.
    """
    if not path.is_file():
        raise ExportError(f"There is no file {path}.", "Check the name.")
    if path.suffix == ".safetensors":
        stored = open_file(path, error=ExportError)
        tensors: dict[str, Any] = {name: read_tensor(stored, name) for name in stored.info}
    else:
        tensors = _read_pickle(path)
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ExportError(f"{path}: '{name}' is of type {type(tensor).__name__}, not a tensor.", SAVE_STATE_DICT)
        if not tensor.is_floating_point():
            raise ExportError(f"{path}: '{name}' holds {tensor.dtype}, not floating-point numbers.", "Save it again.")
        if not torch.isfinite(tensor).all():
            raise ExportError(f"{path}: '{name}' holds NaN or infinity.", "Take an earlier checkpoint.")
    return tensors


def _read_pickle(path: Path) -> dict[str, Any]:
    check_no_pointer(path, ExportError)
    with foreign_errors(ExportError, f"{path} cannot be read: {{reason}}.", "Copy it again; it may be incomplete."):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise ExportError(
                f"{path} holds more than tensors, or is not a pickle; opening such a file could run any program.", SAVE_STATE_DICT
            ) from error
    if isinstance(content, dict):
        content = next((content[key] for key in NESTED_KEYS if key in content), content)
    if not isinstance(content, dict):
        raise ExportError(f"{path} holds a {type(content).__name__}, not a state dict.", SAVE_STATE_DICT)
    return content


def read_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: object) -> Adapter:
    """The deltas of a PEFT LoRA, from its tensors and adapter_config.json; `where` is its place, for the messages. ExportError
    names a tensor or a setting that is not understood, or shapes that do not fit each other.
    """
    check_config(config, where)
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    others = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise ExportError(f"{where}: '{key}' is not a name that PEFT writes.", f"They begin with {PREFIX}")
        if match := LORA_TENSOR.fullmatch(name):
            layers[match[1]][match[2]] = tensor
        else:
            others[name] = tensor
    if not layers:
        raise ExportError(f"{where} holds no LoRA matrix.", "Give the directory of a trained LoRA.")
    deltas = {layer: _read_layer(layer, parts, config, where) for layer, parts in layers.items()}
    full_tensors = {}
    for name, tensor in others.items():
        own = name.replace(".base_layer.", ".")
        layer = own.rpartition(".")[0]
        is_bias = own.endswith(".bias") and config.get("bias", "none") != "none"
        # PEFT adds a copy of the base's embedding to an adapter of the embedding.
        is_copy = own.endswith(".weight") and layer in deltas and deltas[layer].kind == "embedding"
        is_saved = any(f"{module}." in name for module in config.get("modules_to_save") or ())  # PEFT compares ends of names
        if not (is_bias or is_copy or is_saved):
            hint = "Save the adapter with PEFT again, without copies of the base's layers (save_embedding_layers=False)."
            raise ExportError(f"{where}: '{PREFIX}{name}' is not known.", hint)
        full_tensors[own] = tensor
    return Adapter(deltas=deltas, full_tensors=full_tensors)


def _read_layer(layer: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], where: object) -> LoraDelta:
    from peft.utils.other import get_pattern_key

    is_embedding = not parts.keys().isdisjoint(("lora_embedding_A", "lora_embedding_B"))
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    for name in (*names, "lora_magnitude_vector") if config.get("use_dora") else names:
        if name not in parts:
            raise ExportError(f"{where}: {layer} has no {name}.", "Copy the adapter again.")
    lora_A, lora_B, magnitude = *(parts[name] for name in names), parts.get("lora_magnitude_vector")
    shapes = f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}"
    if magnitude is not None:
        shapes = f"lora_magnitude_vector {tuple(magnitude.shape)}, {shapes}"
    fits = lora_A.dim() == lora_B.dim() in (2, 4) and lora_B.shape[1:] == (len(lora_A), *[1] * (lora_B.dim() - 2))
    if not fits or (magnitude is not None and magnitude.numel() != len(lora_B)):
        raise ExportError(f"{where}: {layer} has {shapes}, which do not fit each other.", "Copy the adapter again.")
    kind: Kind = "embedding" if is_embedding else "linear" if lora_A.dim() == 2 else "conv2d"
    if kind == "conv2d" and lora_A.shape[2] != lora_A.shape[3]:
        raise ExportError(f"{where}: {layer} has a kernel that is not square.", "loralib cannot hold it.")

    def resolve(patterns_key: str, key: str) -> Any:
        patterns = config.get(patterns_key) or {}
        return patterns.get(get_pattern_key(list(patterns), layer), config.get(key, 8))

    if (r := resolve("rank_pattern", "r")) != (rank := len(lora_A)):
        raise ExportError(f"{where}: r = {r} of {layer}, which has {shapes}.", f"Correct {ADAPTER_CONFIG}.")
    scaling = resolve("alpha_pattern", "lora_alpha") / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraDelta(
        out_features=len(lora_B),
        in_features=lora_A[0].numel(),
        blocks=(LowRankBlock(lora_A=lora_A.flatten(1), lora_B=lora_B.flatten(1), scaling=scaling),),
        kind=kind,
        kernel_size=lora_A.shape[-1] if kind == "conv2d" else 1,
        magnitude=magnitude,
    )


def build_peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of an adapter as PEFT names and shapes them: the magnitudes (out,), the tensors stored in full, and of each
    layer lora_A (r, in) and lora_B (out, r), for a Conv2d (r, in, k, k) and (out, r, 1, 1). The dtypes stay, see `stack`.
    """
    tensors: dict[str, Tensor] = {}
    for layer, delta in adapter.deltas.items():
        lora_A, lora_B, _ = stack(delta)
        prefix = f"{PREFIX}{layer}."
        if delta.kind == "conv2d":
            lora_A = lora_A.reshape(len(lora_A), -1, delta.kernel_size, delta.kernel_size)
            lora_B = lora_B[:, :, None, None]
        name = "lora_embedding_{}" if delta.kind == "embedding" else "lora_{}.weight"
        tensors |= {prefix + name.format("A"): lora_A, prefix + name.format("B"): lora_B}
        if delta.magnitude is not None:
            tensors[f"{prefix}lora_magnitude_vector"] = delta.magnitude
    for name, tensor in adapter.full_tensors.items():
        layer, _, kind = name.rpartition(".")
        tensors[f"{PREFIX}{layer}.base_layer.{kind}" if layer in adapter.deltas else PREFIX + name] = tensor
    return tensors


def build_peft_config(adapter: Adapter, *, all_layers: Iterable[str] = ()) -> dict[str, Any]:
    """The keys of adapter_config.json that follow from the adapter itself.

    With `all_layers`, every layer of the base that could have a delta, target_modules names the layers by their last name where
    all layers of that name have one. Without it every layer is listed.
    """
    ranks, alphas = {}, {}
    for layer, delta in adapter.deltas.items():
        lora_A, _, scaling = stack(delta)
        ranks[layer] = len(lora_A)
        alphas[layer] = snap_to_integer(scaling * len(lora_A))
    (r, rank_pattern), (alpha, alpha_pattern) = _split_pattern(ranks), _split_pattern(alphas)
    targets, by_last = set(), defaultdict(set)
    for layer in all_layers:
        by_last[last_name(layer)].add(layer)
    for layer in adapter.deltas:
        alike = by_last[last_name(layer)]
        targets.add(last_name(layer) if alike and alike <= adapter.deltas.keys() else layer)
    biased = {name.rpartition(".")[0] for name in adapter.full_tensors if name.endswith(".bias")}
    return {
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "use_rslora": False,
        "use_dora": any(delta.magnitude is not None for delta in adapter.deltas.values()),
        "target_modules": sorted(targets),
        "bias": "none" if not biased else "lora_only" if adapter.deltas.keys() >= biased else "all",
        "init_lora_weights": True,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
    }


def _split_pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and the others by last name where all layers of that name agree, else by layer."""
    common = Counter(values.values()).most_common(1)[0][0]
    by_last = defaultdict(set)
    for layer, value in values.items():
        by_last[last_name(layer)].add(value)
    return common, {
        last_name(layer) if len(by_last[last_name(layer)]) == 1 else re.escape(layer): value
        for layer, value in values.items()
        if value != common
    }


def snap_to_integer(value: float) -> float:
    """16 for 16.0 and for a number that differs from 16 by rounding only."""
    near = round(value)
    return near if abs(value - near) <= 1e-12 * abs(value) else value
