"""The shapes of a phi3 model, read from its config.json; no weights, no torch.

Those of the hub's own models come with the package (`architectures.json`), so that a plan for them needs no network.
"""

import difflib
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from qlora_phi3.errors import ModelError

SUPPORTED = (
    "Supported is every model_type 'phi3': Phi-3-mini and -medium, Phi-3.5-mini, Phi-4, Phi-4-mini, and their variants."
)


#: Microsoft's models of a like name that are of another architecture, in lower case, and their model_type on the hub.
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


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", flags=re.ASCII)


class OtherModelError(ModelError):
    """The model is of another architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What the rest of the program needs to know of a phi3 `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    #: Rows longer than this use longrope's long factors; None where one set of factors serves all lengths.
    longrope_boundary: int | None
    #: Tokens a position can look back; None where attention is full.
    sliding_window: int | None
    tie_word_embeddings: bool


def known_config(name: str) -> dict[str, Any] | None:
    """The shipped config of one of the hub's own phi3 models, whatever the case of its name; None for any other.

    It decides shapes and memory and nothing else: longrope's factors are all 1.0. Plan with it, never train.
    """
    shipped = _read_shipped()
    config = {key.lower(): model for key, model in shipped["models"].items()}.get(name.lower())
    if config is None:
        return None
    config = {**shipped["shared"], **config}
    if config["rope_scaling"] == "longrope":
        head_size = config["hidden_size"] // config["num_attention_heads"]
        factors = [1.0] * int(head_size * config.get("partial_rotary_factor", 1.0) / 2)
        config["rope_scaling"] = {"type": "longrope", "short_factor": factors, "long_factor": list(factors)}
    return config


def nearest_known(name: str) -> str | None:
    """The hub id, of the models whose shapes are shipped, that was probably meant."""
    known, short = list(_read_shipped()["models"]), name.rpartition("/")[2].lower()
    begun = [
        each
        for each in known
        if each.rpartition("/")[2].lower().startswith(f"{short}-") or each.lower().endswith(f"/{short}")
    ]
    return min(begun, key=len, default=None) or next(iter(difflib.get_close_matches(name, known, cutoff=0.8)), None)


def _read_shipped() -> Any:
    return json.loads((files("qlora_phi3") / "architectures.json").read_text(encoding="utf-8"))


def read_config(name: str, revision: str | None = None, *, prefer_shipped: bool = False) -> dict[str, Any]:
    """The config.json of a local folder or of a model on the hub.

    Args:
        name: a folder, or a hub id.
        revision: of the hub's model.
        prefer_shipped: take `known_config` where there is one and no folder has that name; for plans, not for training.

    Raises:
        OtherModelError: it is known by its name to be of another architecture; nothing is fetched.
        ModelError: there is none, it cannot be fetched, or it is not JSON.
    """
    other = OTHERS.get(name.lower())
    if other and not Path(name).is_dir():
        raise _other_model(name, other)
    if prefer_shipped and not Path(name).is_dir() and (shipped := known_config(name)):
        return shipped
    path = Path(name) / "config.json" if Path(name).is_dir() else _fetch_config(name, revision)
    if not path.is_file():
        raise ModelError(f"The model folder {name} has no config.json.", "Point [model] name at a whole checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}.", "Download the checkpoint again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object.", "Download the checkpoint again.")
    return config


def is_hub_id(name: str, *, needs_owner: bool = True) -> bool:
    """Whether a name can be an id on the hub; a directory of the same name may still exist.

    Args:
        name: a hub id or a path, as a recipe has it.
        needs_owner: only `owner/name` counts; data sets also have old ids without an owner, such as `imdb`.
    """
    found = HUB_ID.fullmatch(name)
    return found is not None and (found[1] is not None or not needs_owner)


def _other_model(name: str, model_type: object) -> OtherModelError:
    return OtherModelError(f"{name} is a model of type '{model_type}', not phi3.", SUPPORTED)


def _fetch_config(name: str, revision: str | None) -> Path:
    if not is_hub_id(name):
        raise ModelError(
            f"There is no model folder {name}.",
            f"Give a folder that exists, or a hub id such as {nearest_known(name) or 'microsoft/Phi-3-mini-4k-instruct'}.",
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except HFValidationError as error:
        raise ModelError(f"'{name}' is neither a folder nor a hub id.", "Hub ids look like owner/name.") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"There is no folder {name}, and the hub could not be reached for the model {name}.",
            "Check the connection, or download the model and give its folder.",
        ) from error
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise ModelError(
            f"There is no folder {name}, and the hub has no such model or needs a login: {str(error).splitlines()[0]}",
            "Check the name; for gated models run: hf auth login",
        ) from error
    except OSError as error:
        raise ModelError(
            f"There is no folder {name}, and the hub could not be reached: {error}.",
            "Check the connection, or give a local folder.",
        ) from error


def read_architecture(name: str, revision: str | None = None, *, prefer_shipped: bool = False) -> Architecture:
    """Read and check the architecture of a folder or hub id; the arguments are those of `read_config`.

    Raises:
        OtherModelError, ModelError: not a phi3 model (named, with what is supported), or the config is incomplete.
    """
    return parse_architecture(read_config(name, revision, prefer_shipped=prefer_shipped), name)


def parse_architecture(config: dict[str, Any], name: str) -> Architecture:
    """Check a config.json's contents and take the shapes from it; `name` is for the messages."""
    model_type = config.get("model_type")
    if model_type != "phi3":
        raise _other_model(name, model_type)

    def size(key: str, usual: Any = None) -> int:
        value = config.get(key) or usual
        if not isinstance(value, int) or value < 1:
            raise ModelError(
                f"The config.json of {name} has {key} = {value!r}, which is no size.", "Download the checkpoint again."
            )
        return value

    heads, original = size("num_attention_heads"), "original_max_position_embeddings"
    return Architecture(
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", heads),
        vocab_size=size("vocab_size"),
        max_position_embeddings=size("max_position_embeddings"),
        longrope_boundary=size(original) if _uses_longrope(config) and config.get(original) else None,
        sliding_window=config.get("sliding_window"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _uses_longrope(config: dict[str, Any]) -> bool:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # Phi-3's first configs call it "su"; both are longrope to transformers.
    return (scaling.get("rope_type") or scaling.get("type")) in ("longrope", "su")


PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


FUSED = {part: fused for fused, parts in PARTS.items() for part in parts}


def part_rows(architecture: Architecture) -> dict[str, int]:
    """Rows of every part: k and v have those of the key-value heads."""
    head_size = architecture.hidden_size // architecture.num_attention_heads
    kv_rows, rows = head_size * architecture.num_key_value_heads, architecture.intermediate_size
    return {
        "q_proj": head_size * architecture.num_attention_heads,
        "k_proj": kv_rows,
        "v_proj": kv_rows,
        "gate_proj": rows,
        "up_proj": rows,
    }


def linear_shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the linear layers of one decoder layer; those with parts are fused."""
    rows = part_rows(architecture)
    return {
        "qkv_proj": (rows["q_proj"] + rows["k_proj"] + rows["v_proj"], architecture.hidden_size),
        "o_proj": (architecture.hidden_size, rows["q_proj"]),
        "gate_up_proj": (rows["gate_proj"] + rows["up_proj"], architecture.hidden_size),
        "down_proj": (architecture.hidden_size, architecture.intermediate_size),
    }


def layer_shapes(architecture: Architecture, *, fused: bool) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every layer of the base that can have an update, by name."""
    hidden, rows = architecture.hidden_size, part_rows(architecture)
    names = {"self_attn": ("qkv_proj", "o_proj"), "mlp": ("gate_up_proj", "down_proj")}
    shapes = {"model.embed_tokens": (hidden, architecture.vocab_size), "lm_head": (architecture.vocab_size, hidden)}
    for number in range(architecture.num_hidden_layers):
        for module, layers in names.items():
            for layer in layers:
                parts = PARTS.get(layer, ())
                place = f"model.layers.{number}.{module}"
                if parts and not fused:
                    shapes |= {f"{place}.{part}": (rows[part], hidden) for part in parts}
                elif parts:
                    shapes[f"{place}.{layer}"] = (sum(rows[part] for part in parts), hidden)
        shapes[f"model.layers.{number}.self_attn.o_proj"] = (hidden, rows["q_proj"])
        shapes[f"model.layers.{number}.mlp.down_proj"] = (hidden, architecture.intermediate_size)
    return shapes
