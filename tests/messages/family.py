"""Messages about the model's architecture."""

import json

from message_table import Message

from qlora_phi3.errors import ModelError
from qlora_phi3.family import OtherModelError, read_architecture


def write_config(text):
    """A trigger that reads a config.json of this text."""

    def trigger(shop):
        (shop.path / "config.json").write_text(text, encoding="utf-8")
        read_architecture(str(shop.path))

    return trigger


def change_config(**changes):
    """A trigger that reads the tiny base's config.json with these changes."""

    def trigger(shop):
        config = json.loads((shop.base / "config.json").read_text(encoding="utf-8"))
        (shop.path / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
        read_architecture(str(shop.path))

    return trigger


def of_key(name, key, value, says=(), **more):
    """A row for a value of config.json that is refused."""
    return Message(
        name=f"model-config-{name}",
        trigger=change_config(**{key: value}, **more),
        error=ModelError,
        exit_code=2,
        says=says or (f"{key} = {value!r}",),
        hint="config.json",
    )


def quantized(name, settings, says, key="quantization_config"):
    """A row for a base that is already quantized in a way that no adapter can be trained on."""
    return Message(
        name=f"model-quantized-{name}",
        trigger=change_config(**{key: settings}),
        error=ModelError,
        exit_code=2,
        says=says,
        hint="such as microsoft/",
    )


def touch(name):
    def trigger(shop):
        (shop.path / name).touch()
        read_architecture(str(shop.path))

    return trigger


FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LONG = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1.0] * 16}

MESSAGES = [
    of_key("heads", "num_attention_heads", 3, ("hidden_size = 128", "num_attention_heads = 3")),
    of_key("key-value-heads", "num_key_value_heads", 3),
    of_key("head-size", "head_dim", 48),
    of_key("absurd-size", "num_hidden_layers", 10**9),
    of_key("size-is-text", "vocab_size", "832"),
    of_key("window-0", "sliding_window", 0),
    of_key("window-negative", "sliding_window", -1),
    of_key("null-number", "rms_norm_eps", None),
    of_key("null-switch", "tie_word_embeddings", None),
    of_key("switch-is-text", "tie_word_embeddings", "false"),
    of_key("activation", "hidden_act", "swiglu"),
    of_key("dtype-auto", "dtype", "auto"),
    of_key("padding-beyond-the-vocabulary", "pad_token_id", 832, ("pad_token_id = 832", "vocab_size = 832")),
    of_key("end-beyond-the-vocabulary", "eos_token_id", [2, 900]),
    of_key("rope-yarn", "rope_scaling", {"type": "yarn", "factor": 4.0}, ("rope_scaling.type = 'yarn'",)),
    of_key("rope-linear", "rope_scaling", {"type": "linear", "factor": 4.0}, ("rope_scaling.type = 'linear'",)),
    of_key("rope-dynamic", "rope_scaling", {"rope_type": "dynamic"}, ("rope_scaling.rope_type = 'dynamic'",)),
    of_key("rope-llama3", "rope_scaling", {"rope_type": "llama3"}, ("rope_scaling.rope_type = 'llama3'",)),
    of_key("rope-is-text", "rope_scaling", "longrope"),
    of_key("rope-twice", "rope_scaling", LONG, ("rope_scaling", "beside it")),
    of_key(
        "rope-factors",
        "rope_scaling",
        {**LONG, "long_factor": [1.0] * 9},
        ("rope_scaling.long_factor", "16"),
        rope_parameters=None,
    ),
    of_key("rope-boundary", "original_max_position_embeddings", -4, rope_scaling=LONG, rope_parameters=None),
    of_key("rope-share", "partial_rotary_factor", 1.5, rope_parameters=None),
    of_key("rope-theta-twice", "rope_theta", 5000.0, ("rope_theta",)),
    of_key("quantized-head", "quantization_config", {**FOUR_BIT, "llm_int8_skip_modules": ["o_proj"]}, ("skip_modules",)),
    of_key("quant-storage", "quantization_config", {**FOUR_BIT, "bnb_4bit_quant_storage": "bfloat16"}, ("quant_storage",)),
    quantized("gptq", {"quant_method": "gptq", "bits": 4}, ("gptq",)),
    quantized("awq", {"quant_method": "awq"}, ("awq",)),
    quantized("fp8", {"quant_method": "fp8"}, ("fp8",)),
    quantized("compressed-tensors", {"quant_method": "compressed-tensors"}, ("compressed-tensors",), "compression_config"),
    quantized("8-bit", {"quant_method": "bitsandbytes", "load_in_8bit": True}, ("8-bit bitsandbytes",)),
    quantized("mlx", {"group_size": 64, "bits": 4}, ("MLX",), "quantization"),
    quantized("unknown", {"quant_method": "quark"}, ("quark",)),
    Message(
        name="model-is-gguf",
        trigger=touch("phi-4-q4.gguf"),
        error=ModelError,
        exit_code=2,
        says=("GGUF",),
        hint="such as microsoft/",
    ),
    Message(
        name="model-is-a-split-phi3",
        trigger=change_config(model_type="llama", vocab_size=32064),
        error=OtherModelError,
        exit_code=2,
        says=("'llama'", "split into q, k, v"),
        hint="such as microsoft/",
    ),
    Message(
        name="model-config-is-a-git-lfs-pointer",
        trigger=write_config("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"),
        error=ModelError,
        exit_code=2,
        says=("config.json is a Git LFS pointer",),
        hint="git lfs pull",
    ),
    Message(
        name="model-directory-without-config",
        trigger=lambda shop: read_architecture(str(shop.path)),
        error=ModelError,
        exit_code=2,
        says=("config.json",),
        hint="[model] name",
    ),
    Message(
        name="model-directory-missing",
        trigger=lambda shop: read_architecture("./phi-4"),
        error=ModelError,
        exit_code=2,
        says=("./phi-4",),
        hint="microsoft/phi-4",
    ),
    Message(
        name="model-file-for-its-folder",
        trigger=lambda shop: read_architecture(str(shop.base / "config.json")),
        error=ModelError,
        exit_code=2,
        says=("config.json is a file of a model",),
        hint="Give its folder: ",
    ),
    Message(
        name="model-config-not-json",
        trigger=write_config("{"),
        error=ModelError,
        exit_code=2,
        says=("config.json is not JSON", "line 1"),
        hint="Download",
    ),
    Message(
        name="model-config-without-a-size",
        trigger=write_config('{"model_type": "phi3", "num_attention_heads": 0}'),
        error=ModelError,
        exit_code=2,
        says=("num_attention_heads = 0",),
        hint="Download",
    ),
    Message(
        name="model-of-another-architecture",
        trigger=lambda shop: read_architecture("microsoft/phi-2"),
        error=OtherModelError,
        exit_code=2,
        says=("microsoft/phi-2", "'phi'"),
        hint="phi3",
    ),
]
