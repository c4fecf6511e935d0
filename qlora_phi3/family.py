"""Everything specific to the phi3 family: supported names, reading config.json, and the shapes of the linear layers.

No torch and no weights. The configs of Microsoft's own models ship with the package (`architectures.json`), so that planning for
them needs no network.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from reprlib import repr
from typing import Any

from qlora_phi3.errors import ModelError, first_line
from qlora_phi3.files import is_dir, read_json_object

SUPPORTED = "Supported is every model_type 'phi3': Phi-3-mini and -medium, Phi-3.5-mini, Phi-4, Phi-4-mini, and their variants."
#: Microsoft's models with a similar name and another architecture, in lower case, and their model_type on the hub.
OTHERS = {
    "microsoft/phi-1": "phi", "microsoft/phi-1_5": "phi", "microsoft/phi-2": "phi",
    "microsoft/phi-3-small-8k-instruct": "phi3small", "microsoft/phi-3-small-128k-instruct": "phi3small",
    "microsoft/phi-3-vision-128k-instruct": "phi3_v", "microsoft/phi-3.5-vision-instruct": "phi3_v",
    "microsoft/phi-3.5-moe-instruct": "phimoe", "microsoft/phi-mini-moe-instruct": "phimoe",
    "microsoft/phi-tiny-moe-instruct": "phimoe", "microsoft/phi-4-multimodal-instruct": "phi4mm",
    "microsoft/phi-4-mini-flash-reasoning": "phi4flash",
}  # fmt: skip
#: Keys of config.json that must be positive integers, and their largest value: far above any model, far below what would take
#: hours to plan.
SIZES = {
    "num_attention_heads": 2**12, "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 2**10,
    "num_key_value_heads": 2**12, "vocab_size": 2**22, "max_position_embeddings": 2**24,
}  # fmt: skip
#: Keys that may be left out and are never null: the smallest and the largest value of the numbers; the switches.
RANGES = {
    "rms_norm_eps": (1e-12, 1.0), "initializer_range": (0.0, 1e3), "attention_dropout": (0.0, 0.99),
    "embd_pdrop": (0.0, 0.99), "resid_pdrop": (0.0, 0.99), "rope_theta": (1e-3, 1e12),
}  # fmt: skip
SWITCHES = ("tie_word_embeddings", "use_cache")
#: Where a config.json describes its rotary embedding: transformers reads the first that is there, of an older name.
ROPE_KEYS = ("rope_scaling", "rope_parameters")
#: Where a config.json says that the weights are quantized: transformers, compressed-tensors, MLX.
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
#: Rows longer than this use longrope's long factors.
BOUNDARY = "original_max_position_embeddings"
#: transformers' names of the activations that a phi3 may have; Microsoft's models all have silu.
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
DTYPES = ("bfloat16", "float16", "float32")
#: model_type of the models whose layers an unfused Phi-3 has, and the vocabularies of the phi3 family.
UNFUSED = ("llama", "mistral")
VOCABULARIES = (32064, 100352, 200064)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", flags=re.ASCII)
#: Fused linear layers and their parts, in the order of their rows; and the fused layer of each part.
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED = {part: fused for fused, parts in PARTS.items() for part in parts}


class OtherModelError(ModelError):
    """The model has another architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredQuantization:
    """bitsandbytes' 4-bit format of a checkpoint whose files hold quantized weights."""

    quant_type: str  #: "nf4" or "fp4".
    double_quant: bool
    compute_dtype: str  #: What its config.json asks for. It is no property of the weights: a run chooses its own.
    skip_modules: tuple[str, ...] | None  #: Layers that are not quantized; None: the output head alone.

    @property
    def label(self) -> str:
        """For people: "NF4 without double quantization"."""
        plain = ", ".join(name for name in self.skip_modules or () if name != "lm_head")
        nested = f"{self.quant_type.upper()} with{'' if self.double_quant else 'out'} double quantization"
        return f"{nested} (unquantized: {plain})" if plain else nested


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What the program uses of a phi3 `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    #: Rows longer than this use longrope's long factors; None where one set of factors serves all lengths.
    longrope_boundary: int | None = None
    sliding_window: int | None  #: Tokens that a position can look back; None where attention is full.
    tie_word_embeddings: bool
    stored: StoredQuantization | None = None  #: None where the checkpoint's weights are not quantized.


def is_hub_id(name: str, *, needs_owner: bool = True) -> bool:
    """Whether a name can be an id on the hub; a directory of the same name may still exist.

    With `needs_owner` only `owner/name` counts; data sets also have old ids without an owner, such as `imdb`.
    """
    found = HUB_ID.fullmatch(name)
    return found is not None and (found[1] is not None or not needs_owner)


def known_config(name: str) -> dict[str, Any] | None:
    """The shipped config of one of Microsoft's phi3 models, in any case of its name; None for any other model.

    Use it for planning, never for training: all factors of longrope are 1.0. Shapes and memory do not depend on them.
    """
    shipped = _read_shipped()
    own = {key.lower(): model for key, model in shipped["models"].items()}.get(name.lower())
    if own is None:
        return None
    config: dict[str, Any] = {**shipped["shared"], **own}
    if config["rope_scaling"] == "longrope":
        head_size = config["hidden_size"] // config["num_attention_heads"]
        factors = [1.0] * int(head_size * config.get("partial_rotary_factor", 1.0) / 2)
        config["rope_scaling"] = {"type": "longrope", "short_factor": factors, "long_factor": list(factors)}
    return config


def nearest_known(name: str) -> str | None:
    """The hub id of a shipped config that a misspelt or incomplete name most likely means."""
    known, short = list(_read_shipped()["models"]), name.rpartition("/")[2].lower()
    completions = [model for model in known if f"/{short}-" in f"{model.lower()}-"]
    similar = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return min(completions, key=len, default=None) or next(iter(similar), None)


def _read_shipped() -> Any:
    return json.loads((files("qlora_phi3") / "architectures.json").read_text(encoding="utf-8"))


def read_config(name: str, revision: str | None = None, *, prefer_shipped: bool = False) -> dict[str, Any]:
    """Read the config.json of a local directory or of a model on the hub, of this revision. OtherModelError where the name is
    that of a model with another architecture (nothing is downloaded); ModelError where there is none, it cannot be downloaded, or
    it is not JSON.

    `prefer_shipped`: use `known_config` where there is one and no directory has that name; for plans, not for training.
    """
    if not is_dir(name) and prefer_shipped and (shipped := known_config(name)):
        return shipped
    return normalize_config(read_json_object(find_config(name, revision), ModelError, "Download the checkpoint again."))


def find_config(name: str, revision: str | None = None) -> Path:
    """The path of the config.json of a local directory or of a model on the hub, downloaded; errors as `read_config`."""
    if is_dir(name):
        path = Path(name, "config.json")
        if path.is_file():
            return path
        if next(path.parent.glob("*.gguf"), None):
            raise ModelError(f"{name} holds a GGUF file, which cannot be trained.", _use_original({}, name))
        raise ModelError(f"The model folder {name} has no config.json.", "Set [model] name to a full checkpoint.")
    if other := OTHERS.get(name.lower()):
        raise OtherModelError(f"{name} is a model of type '{other}', not phi3.", SUPPORTED)
    if name.lower().endswith("gguf"):
        raise ModelError(f"{name} is a GGUF file, which cannot be trained.", _use_original({}, name))
    if os.path.isfile(name):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        raise ModelError(f"{name} is a file of a model.", f"Give its folder: {Path(name).absolute().parent}")
    return _fetch_config(name, revision)


def normalize_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model with today's names: rope type `su` is longrope, and its boundary stands at the top. Keys that mean nothing
    as null are left out.

    transformers 5.23 renames `su` too late: its longrope then lacks the boundary, and the first step fails with a KeyError.
    """
    normal = {key: value for key, value in config.items() if value is not None or key not in (*QUANTIZATION_KEYS, "head_dim")}
    for key in ROPE_KEYS:
        rope = normal.get(key)
        if not isinstance(rope, dict) or (rope.get("rope_type") or rope.get("type")) not in ("su", "longrope"):
            continue
        normal[key] = {**rope, "rope_type": "longrope", "type": "longrope"}
        if normal.get(BOUNDARY) is None:
            normal[BOUNDARY] = rope.get(BOUNDARY) or 4096  # transformers' default, which it prefers to the inner value
    return normal


def original_of(config: Mapping[str, Any], name: str) -> str:
    """The hub id of the Microsoft model that a changed copy was most likely made from, by its shapes and its name."""

    def likeness(model: str) -> tuple[int, float]:
        own = _read_shipped()["models"][model]
        same = sum(config.get(key) == own[key] for key in SIZES)
        alike = difflib.SequenceMatcher(None, Path(name).name.lower(), Path(model).name.lower()).ratio()
        return same, alike if alike > 0.5 else 0.0

    return str(max(_read_shipped()["models"], key=likeness))


def _use_original(config: Mapping[str, Any], name: str) -> str:
    return f"Use the unquantized original, such as {original_of(config, name)}."


def _fetch_config(name: str, revision: str | None) -> Path:
    if not is_hub_id(name):
        example = nearest_known(name) or "microsoft/Phi-3-mini-4k-instruct"
        raise ModelError(f"There is no model folder {name}.", f"Give an existing folder or a hub id, such as {example}.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except HFValidationError as error:
        raise ModelError(f"'{name}' is neither a folder nor a hub id.", "Hub ids look like owner/name.") from error
    except OSError as error:
        reason = first_line(error)
        if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
            raise ModelError(
                f"There is no folder {name}, and the hub has no such model or needs a login: {reason}.",
                "Check the name; for gated models run: hf auth login",
            ) from error
        raise ModelError(
            f"There is no folder {name}, and the hub could not be reached for the model {name}: {reason}.",
            "Check the connection, or download the model and give its folder.",
        ) from error


def read_architecture(name: str, revision: str | None = None, *, prefer_shipped: bool = False) -> Architecture:
    """Read and check the architecture of a directory or hub id; arguments and errors are those of `read_config` and
    `parse_architecture`.
    """
    return parse_architecture(read_config(name, revision, prefer_shipped=prefer_shipped), name)


def parse_architecture(config: dict[str, Any], name: str) -> Architecture:
    """Check the contents of a config.json and take the shapes from it; `name` is the model's, for the messages. OtherModelError
    where `model_type` is not phi3, ModelError for a value that no phi3 model has.
    """
    if (model_type := config.get("model_type")) != "phi3":
        if model_type in UNFUSED and (config.get("vocab_size") in VOCABULARIES or "phi" in name.lower()):
            raise OtherModelError(
                f"{name} is of type '{model_type}': a Phi-3 whose qkv_proj and gate_up_proj are split into q, k, v, gate and up.",
                f"Use the original, such as {original_of(config, name)}.",
            )
        raise OtherModelError(f"{name} is a model of type '{model_type}', not phi3.", SUPPORTED)
    _check_values(config, name)
    sizes: dict[str, Any] = {key: config.get(key) for key in SIZES}
    sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
    for key, value in sizes.items():
        if not _is_count(value, SIZES[key]):
            raise _wrong(name, key, value, f"not a whole number from 1 to {SIZES[key]:,}")
    hidden, heads, kv_heads = (sizes[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if hidden % heads or heads % kv_heads:
        key, value = ("hidden_size", hidden) if hidden % heads else ("num_key_value_heads", kv_heads)
        raise _wrong(name, key, value, f"which does not fit num_attention_heads = {heads}")
    if config.get("head_dim") not in (None, hidden // heads):
        raise _wrong(name, "head_dim", config["head_dim"], f"not hidden_size / num_attention_heads = {hidden // heads}")
    window = config.get("sliding_window")
    if window is not None and not _is_count(window, 2**31):
        raise _wrong(name, "sliding_window", window, "neither a number of tokens nor null, which is full attention")
    # transformers' default; a pad_token_id outside the embedding fails when the model is built.
    for key, default in (("pad_token_id", 32000), ("bos_token_id", None), ("eos_token_id", None)):
        ids = config.get(key, default)
        for token_id in ids if isinstance(ids, list) else [ids]:
            if token_id is not None and not _is_count(token_id + 1 if type(token_id) is int else 0, sizes["vocab_size"]):
                raise _wrong(name, key, ids, f"not an id below vocab_size = {sizes['vocab_size']:,}")
    return Architecture(
        **sizes,
        longrope_boundary=_read_rope(normalize_config(config), name, hidden // heads),
        sliding_window=window,
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        stored=_read_stored_quantization(config, name),
    )


def _wrong(name: str, key: str, value: object, reason: str) -> ModelError:
    hint = "Download the checkpoint's own config.json again, or correct that key."
    return ModelError(f"The config.json of {name} has {key} = {repr(value)}, {reason}.", hint)


def _is_count(value: object, largest: int) -> bool:
    return type(value) is int and 1 <= value <= largest


def _is_number(value: object, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= float(str(value)) <= high


def _check_values(config: Mapping[str, Any], name: str) -> None:
    """Refuse the values with which transformers builds no model, or another one than the key says."""
    for key, (low, high) in RANGES.items():
        if key in config and not _is_number(config[key], low, high):
            raise _wrong(name, key, config[key], f"not a number from {low:g} to {high:g}")
    for key in SWITCHES:
        if key in config and type(config[key]) is not bool:
            raise _wrong(name, key, config[key], "neither true nor false")
    if config.get("hidden_act", "silu") not in ACTIVATIONS:
        raise _wrong(name, "hidden_act", config["hidden_act"], f"not one of {', '.join(ACTIVATIONS)}")
    if not _is_count(config.get("num_labels", 1), 2**16):  # transformers writes a label for each
        raise _wrong(name, "num_labels", config["num_labels"], "not a number of labels")
    for key in ("dtype", "torch_dtype"):
        if config.get(key) not in (None, *DTYPES):
            raise _wrong(name, key, config[key], f"not one of {', '.join(DTYPES)}")


def _read_rope(config: Mapping[str, Any], name: str, head_size: int) -> int | None:
    """Check the rotary embedding, and return longrope's boundary; None where one set of factors serves all lengths."""
    given = {key: config[key] for key in ROPE_KEYS if config.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, dict):
            raise _wrong(name, key, value, "neither an object nor null")
    kinds = set()
    for key, value in given.items():
        word = "rope_type" if value.get("rope_type") else "type"
        kind = value.get(word, "default") if value else None
        if kind not in (None, "default", "longrope"):
            raise _wrong(name, f"{key}.{word}", kind, "which phi3 does not have")
        kinds.add(kind)
    # transformers reads the older key first.
    key = next((key for key, value in given.items() if value), ROPE_KEYS[0])
    rope: dict[str, Any] = given.get(key, {})
    if len(kinds - {None}) > 1:
        raise _wrong(name, key, rope, f"of another type than the {ROPE_KEYS[1]} beside it")
    kind = next(iter(kinds - {None}), "default")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if not _is_number(partial, 0.01, 1.0) or int(head_size * partial) % 2 or int(head_size * partial) < 2:
        raise _wrong(name, "partial_rotary_factor", partial, f"of a head of {head_size}, not an even number of dimensions")
    thetas = [each["rope_theta"] for each in (config, *given.values()) if "rope_theta" in each]
    for theta in thetas:
        if not _is_number(theta, *RANGES["rope_theta"]) or theta != thetas[0]:
            raise _wrong(name, f"{key}.rope_theta", theta, "not a positive number, or another one elsewhere in the file")
    if kind == "default":
        return None
    for part in ("short_factor", "long_factor"):
        factors: Any = rope.get(part)
        count = int(head_size * partial) // 2
        is_list = isinstance(factors, list) and len(factors) == count
        if not is_list or not all(_is_number(factor, 1e-6, 1e6) for factor in factors):
            raise _wrong(name, f"{key}.{part}", factors, f"not a list of {count} positive numbers")
    boundary = config.get(BOUNDARY)
    if type(boundary) is not int or not _is_count(boundary, SIZES["max_position_embeddings"]):
        raise _wrong(name, BOUNDARY, boundary, "not a number of positions")
    return boundary


def _read_stored_quantization(config: Mapping[str, Any], name: str) -> StoredQuantization | None:
    """The 4-bit format of a checkpoint, None where its weights are not quantized; ModelError for one that is not read."""
    key = next((key for key in QUANTIZATION_KEYS if config.get(key) is not None), "")
    if not key:
        return None
    settings: Any = config[key]
    if not isinstance(settings, dict):
        raise _wrong(name, key, settings, "not an object")
    method = settings.get("quant_method")
    if settings.get("load_in_4bit") is not True or method not in (None, "bitsandbytes"):
        bits = "8-bit " if settings.get("load_in_8bit") else ""
        method = method or ("MLX" if config.get("quantization") else "bitsandbytes" if bits else "an unknown method")
        message = f"The weights of {name} are quantized with {bits}{method}, on which no adapter can be trained here"
        raise ModelError(f"{message} ({key} in its config.json).", _use_original(config, name))
    skip = settings.get("llm_int8_skip_modules")
    stored = StoredQuantization(
        quant_type=settings.get("bnb_4bit_quant_type", "fp4"),
        double_quant=settings.get("bnb_4bit_use_double_quant", False),
        compute_dtype=str(settings.get("bnb_4bit_compute_dtype", "float32")),
        skip_modules=tuple(map(str, skip)) if isinstance(skip, list) else None,
    )
    right = {
        "bnb_4bit_quant_type": stored.quant_type in ("nf4", "fp4"),
        "bnb_4bit_use_double_quant": type(stored.double_quant) is bool,
        "bnb_4bit_quant_storage": settings.get("bnb_4bit_quant_storage", "uint8") == "uint8",
        # The loss reads the head's weight itself.
        "llm_int8_skip_modules": skip is None or any(module.endswith("lm_head") for module in stored.skip_modules or ()),
    }
    for key, is_right in right.items():
        if not is_right:
            raise _wrong(name, f"quantization_config.{key}", settings.get(key), "which cannot be trained on")
    return stored


def part_rows(architecture: Architecture) -> dict[str, int]:
    """Rows (out_features) of each part of the fused layers; k and v have those of the key-value heads."""
    head_size = architecture.hidden_size // architecture.num_attention_heads
    query, key = (head_size * count for count in (architecture.num_attention_heads, architecture.num_key_value_heads))
    inner = architecture.intermediate_size
    return {"q_proj": query, "k_proj": key, "v_proj": key, "gate_proj": inner, "up_proj": inner}


def linear_shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of each linear layer of a decoder layer, by its last name."""
    hidden, rows = architecture.hidden_size, part_rows(architecture)
    shapes = {name: (sum(rows[part] for part in parts), hidden) for name, parts in PARTS.items()}
    return shapes | {"o_proj": (hidden, rows["q_proj"]), "down_proj": (hidden, architecture.intermediate_size)}


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model by its name in a checkpoint; a tied head has none of its own."""
    layers = layer_shapes(architecture, fused=True)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes["model.embed_tokens.weight"] = shapes["lm_head.weight"]  # rows are tokens in both; LoRA counts them as columns
    norms = ("input_layernorm", "post_attention_layernorm")
    names = [f"layers.{number}.{norm}" for number in range(architecture.num_hidden_layers) for norm in norms]
    shapes |= {f"model.{name}.weight": (architecture.hidden_size,) for name in (*names, "norm")}
    if architecture.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def layer_shapes(architecture: Architecture, *, fused: bool) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every layer of the base that LoRA can adapt, by its full name.

    `fused`: as in phi3, with `qkv_proj` and `gate_up_proj`; else with their parts as layers of their own, as in Llama.
    """
    hidden, rows = architecture.hidden_size, part_rows(architecture)
    shapes = {"model.embed_tokens": (hidden, architecture.vocab_size), "lm_head": (architecture.vocab_size, hidden)}
    for number in range(architecture.num_hidden_layers):
        for layer, shape in linear_shapes(architecture).items():
            module = f"model.layers.{number}.{'self_attn' if layer in ('qkv_proj', 'o_proj') else 'mlp'}"
            if fused or layer not in PARTS:
                shapes[f"{module}.{layer}"] = shape
            else:
                shapes |= {f"{module}.{part}": (rows[part], hidden) for part in PARTS[layer]}
    return shapes
