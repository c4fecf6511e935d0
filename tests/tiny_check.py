"""A `VramChecker` of a tiny recipe, and GPUs of any size for it."""

import json
from dataclasses import replace
from typing import Any

from tiny_model import build_config

from qlora_phi3.family import parse_architecture
from qlora_phi3.hardware.gpu import Gpu, find_gpu
from qlora_phi3.memory.margin import LEAST_BYTES
from qlora_phi3.memory.plan import assume_lengths
from qlora_phi3.memory.vram_check import RecipeContext, VramChecker
from qlora_phi3.recipe.schema import Recipe
from qlora_phi3.units import MIB

GPU = find_gpu("RTX 3070")
#: Shapes whose weights are large enough that a change of the recipe shows.
WIDE = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 8}


def build_recipe(**tables: Any) -> Recipe:
    """Four rows a step of at most 256 tokens; `tables` change it."""
    training = {"batch_size": 4, "max_length": 256, **tables.pop("training", {})}
    required = {"model": {"name": "tiny"}, "data": {"train": "rows.jsonl"}}
    return Recipe.model_validate({**required, "training": training, **tables})


def tiny_config(**shape: Any) -> dict[str, Any]:
    """The config.json of a tiny model, as a program reads it."""
    return json.loads(json.dumps(build_config(**shape).to_dict(), default=str))


def build_checker(shape: dict[str, Any] | None = None, **tables: Any) -> VramChecker:
    """A checker of `build_recipe(**tables)`, whose rows are assumed."""
    recipe = build_recipe(**tables)
    config = tiny_config(**{"vocab_size": 2048, **(shape or {})})
    lengths = assume_lengths(recipe.training.max_length, recipe.training.batch_size)
    context = RecipeContext(
        recipe=recipe,
        config=config,
        architecture=parse_architecture(config, "tiny"),
        lengths=replace(lengths, origin="assumed"),
    )
    return VramChecker(context, lambda _: None)


def gpu_with(checker: VramChecker, mib: int) -> Gpu:
    """A GPU that leaves a run so much in addition to the CUDA context and the margin."""
    num_bytes = checker.predictor(GPU).on_gpu_bytes(mib * MIB) + LEAST_BYTES
    return replace(GPU, total_bytes=num_bytes, free_bytes=num_bytes)
