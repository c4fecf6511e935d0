"""Messages about the model's architecture."""

from message_table import Message

from qlora_phi3.errors import ModelError
from qlora_phi3.family import OtherModelError, read_architecture

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
        name="model-of-another-architecture",
        trigger=lambda shop: read_architecture("microsoft/phi-2"),
        error=OtherModelError,
        exit_code=2,
        says=("microsoft/phi-2", "'phi'"),
        hint="phi3",
    ),
]
