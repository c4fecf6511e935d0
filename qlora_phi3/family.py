"""Everything specific to the phi3 family: supported names, reading config.json, and the shapes of the linear layers.

No torch and no weights. The configs of Microsoft's own models ship with the package (`architectures.json`), so that planning for
them needs no network.
"""

import difflib
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from qlora_phi3.errors import ModelError, first_line
from qlora_phi3.files import read_json_object

SUPPORTED = (
    "Supported is every model_type 'phi3': Phi-3-mini and -medium, Phi-3.5-mini, Phi-4, Phi-4-mini, and their variants."
)
#: Microsoft's models with a similar name and another architecture, in lower case, and their model_type on the hub.
OTHERS = {
    "microsoft/phi-1": "phi",
    "microsoft/phi-1_5": "phi",
    "microsoft/phi-2": "phi",
    "microsoft/phi-3-small-8k-instruct": "phi3small",
    "microsoft/phi-3-small-128k-instruct": "phi3small",
    "microsoft/phi-3-vision-128k-instruct": "phi3_v",
    "microsoft/phi-3.5-vision-instruct": "phi3_v",
    "microsoft/phi-3.5-moe-instruct": "phimoe",
    "microsoft/phi-mini-moe-instruct": "phimoe",
    "microsoft/phi-tiny-moe-instruct": "phimoe",
    "microsoft/phi-4-multimodal-instruct": "phi4mm",
    "microsoft/phi-4-mini-flash-reasoning": "phi4flash",
}
#: Keys of config.json that must be positive integers.
SIZES = (
    "num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", flags=re.ASCII)
#: Fused linear layers and their parts, in the order of their rows; and the fused layer of each part.
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED = {part: fused for fused, parts in PARTS.items() for part in parts}


class OtherModelError(ModelError):
    """The model has another architecture."""


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
    #: Tokens that a position can look back; None where attention is full.
    sliding_window: int | None
    tie_word_embeddings: bool


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
    completions = [
        model
        for model in known
        if model.rpartition("/")[2].lower().startswith(f"{short}-") or model.lower().endswith(f"/{short}")
    ]
    similar = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return min(completions, key=len, default=None) or next(iter(similar), None)


def _read_shipped() -> Any:
    return json.loads((files("qlora_phi3") / "architectures.json").read_text(encoding="utf-8"))


def read_config(name: str, revision: str | None = None, *, prefer_shipped: bool = False) -> dict[str, Any]:
    """Read the config.json of a local directory or of a model on the hub.

    Args:
        name: a directory, or a hub id.
        revision: of the hub's model.
        prefer_shipped: use `known_config` where there is one and no directory has that name; for plans, not for training.

    Raises:
        OtherModelError: the name is that of a model with another architecture; nothing is downloaded.
        ModelError: there is none, it cannot be downloaded, or it is not JSON.
    """
    directory = Path(name)
    if directory.is_dir():
        path = directory / "config.json"
        if not path.is_file():
            raise ModelError(f"The model folder {name} has no config.json.", "Set [model] name to a full checkpoint.")
    elif other := OTHERS.get(name.lower()):
        raise _other_model(name, other)
    elif prefer_shipped and (shipped := known_config(name)):
        return shipped
    else:
        path = _fetch_config(name, revision)
    return read_json_object(path, ModelError, "Download the checkpoint again.")


def _other_model(name: str, model_type: object) -> OtherModelError:
    return OtherModelError(f"{name} is a model of type '{model_type}', not phi3.", SUPPORTED)


def _fetch_config(name: str, revision: str | None) -> Path:
    if not is_hub_id(name):
        example = nearest_known(name) or "microsoft/Phi-3-mini-4k-instruct"
        raise ModelError(
            f"There is no model folder {name}.", f"Give an existing folder or a hub id, such as {example}."
        )
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
    """Read and check the architecture of a directory or hub id; the arguments are those of `read_config`.

    Raises:
        OtherModelError: it is not a phi3 model; the message lists the supported ones.
        ModelError: config.json cannot be read or is incomplete.
    """
    return parse_architecture(read_config(name, revision, prefer_shipped=prefer_shipped), name)


def parse_architecture(config: dict[str, Any], name: str) -> Architecture:
    """Check the contents of a config.json and take the shapes from it; `name` is the model's, for the messages.

    Raises:
        OtherModelError: `model_type` is not phi3.
        ModelError: a size is missing or not a positive integer.
    """
    if config.get("model_type") != "phi3":
        raise _other_model(name, config.get("model_type"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    boundary = config.get("original_max_position_embeddings")
    sizes: dict[str, Any] = {key: config.get(key) for key in SIZES}
    sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
    # Phi-3's first configs call it "su"; transformers reads both names as longrope.
    if (rope.get("rope_type") or rope.get("type")) in ("longrope", "su") and boundary:
        sizes["longrope_boundary"] = boundary
    for key, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            hint = "Download the checkpoint again."
            raise ModelError(f"The config.json of {name} has {key} = {value!r}, which is not a positive integer.", hint)
    tied = bool(config.get("tie_word_embeddings", False))
    return Architecture(**sizes, sliding_window=config.get("sliding_window"), tie_word_embeddings=tied)


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
