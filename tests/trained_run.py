"""A run directory as training leaves it, as far as it is loaded for generation."""

import shutil

from tiny_run import leave_run

from qlora_phi3.adapters.base_files import TOKENIZER_FILES
from qlora_phi3.model.phi3 import choose_precision
from qlora_phi3.recipe.load import recipe_as_toml
from qlora_phi3.recipe.schema import Recipe


def leave_trained(folder, base, *, chat_template="auto", **quantization):
    """A run folder of an adapter that changes the base, and the live model."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(base)},
            "data": {"train": "rows.jsonl", "chat_template": chat_template},
            "quantization": {"bnb_4bit_compute_dtype": "float32", **quantization},
        }
    )
    compute_dtype, _ = choose_precision(recipe.compute_dtype, None)
    run = leave_run(folder, base, quantization=recipe.quantization, compute_dtype=compute_dtype)
    (folder / "recipe.toml").write_text(recipe_as_toml(recipe), encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, run.adapter / name)
    return run
