"""Messages about the model's architecture."""

from message_table import Message

from qlora_phi3.errors import ModelError
from qlora_phi3.family import OtherModelError, read_architecture


def write_config(text):
    """A trigger that reads a config.json of this text."""

    def trigger(shop):
        (shop.path / "config.json").write_text(text, encoding="utf-8")
        read_architecture(str(shop.path))

    return trigger


MESSAGES = [
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
