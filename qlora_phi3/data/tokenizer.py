"""The base's own tokenizer, loaded and tried; without importing torch itself, so that rows can be looked at soon."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute  # type: ignore[import-untyped]

from qlora_phi3.errors import ModelError
from qlora_phi3.family import Architecture
from qlora_phi3.files import foreign_errors, read_json_object
from qlora_phi3.recipe.schema import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
#: Text that a tokenizer must turn into ids when it is loaded.
PROBE = "A probe, with <|end|> in it.\n"


def load_tokenizer(config: Model) -> "PreTrainedTokenizerBase":
    """Load the base's own fast tokenizer; ModelError where the base has none, or its files cannot be read."""
    hint = "Point [model] name at a complete checkpoint that includes its tokenizer files."
    try:
        return _read_tokenizer(config, hint)
    except ModelError:
        for name in TOKENIZER_JSON:  # the library does not say which file it is
            if (path := Path(config.name, name)).is_file():
                read_json_object(path, ModelError, hint)
        raise


def _read_tokenizer(config: Model, hint: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    with foreign_errors(ModelError, f"The tokenizer of {config.name} cannot be read: {{reason}}.", hint):
        tokenizer = AutoTokenizer.from_pretrained(config.name, revision=config.revision)
        if not tokenizer.is_fast:
            raise ModelError(f"{config.name} has no fast tokenizer (tokenizer.json).", "Use a checkpoint that has one.")
        # What is damaged without being refused shows in use.
        ids = tokenizer(PROBE, add_special_tokens=True).input_ids
        tokenizer.decode([*ids, *tokenizer.all_special_ids])
        if not all(isinstance(token, str) for token in tokenizer.all_special_tokens) or not ids:
            raise ValueError("it gives no ids, or special tokens that are no text")
        if tokenizer.chat_template is not None:
            tokenizer.get_chat_template()
    return tokenizer


def check_token_ids(rows: Iterable[Any], tokenizer: "PreTrainedTokenizerBase", architecture: Architecture, name: str) -> None:
    """Refuse rows with a token that has no row in the embedding: ModelError with the token, its id and the number of its rows.

    `rows` are data sets of `prepare_datasets`; their `input_ids` are read a column at a time. `name` is for the message.
    """
    for dataset in rows:
        for batch in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000):
            largest = pyarrow.compute.max(batch["input_ids"].combine_chunks().flatten()).as_py()
            if largest is not None and largest >= architecture.vocab_size:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise ModelError(
                    f"The data have the token {token!r} with id {largest:,}, and the embedding of {name} has "
                    f"{architecture.vocab_size:,} rows (vocab_size).",
                    "Use the tokenizer that belongs to the weights, or remove that token from tokenizer.json.",
                )
