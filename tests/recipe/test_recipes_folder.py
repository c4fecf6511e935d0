"""Every recipe that ships can be read, and says what its source says."""

from pathlib import Path

import pytest

from qlora_phi3.recipe.load import describe_unusual, load_recipe
from qlora_phi3.recipe.schema import Recipe

FOLDER = Path(__file__).parents[2] / "recipes"

#: r, alpha, dropout | max length, packing | rate, schedule, warm-up | epochs, batch x accumulation | save, log, seed
FIGURES = {
    "microsoft-sample-finetune": (16, 32, 0.05, 2048, True, 5e-6, "cosine", 0.2, 1, 4, 1, 100, 20, 0),
    "microsoft-lora-notebook": (16, 16, 0.05, 512, False, 1e-4, "linear", 0.1, 3, 8, 4, "epoch", 100, 42),
    "microsoft-qlora-notebook": (16, 16, 0.05, 512, False, 5e-6, "cosine", 0.2, 1, 4, 1, 100, 20, 1234),
    "microsoft-qlora-notebook-first": (16, 16, 0.05, 512, False, 1e-4, "linear", 0.1, 3, 8, 4, "epoch", 100, 42),
    "microsoft-inference-notebook": (16, 16, 0.0, 128, False, 1e-4, "linear", 0, 3, 7, 4, "epoch", 10, 42),
}


def figures(recipe: Recipe) -> tuple[object, ...]:
    lora, run = recipe.lora, recipe.training
    return (
        *(lora.r, lora.lora_alpha, lora.lora_dropout, run.max_length, run.packing),
        *(run.learning_rate, run.lr_scheduler_type, run.warmup_steps, run.num_train_epochs),
        *(run.per_device_train_batch_size, run.gradient_accumulation_steps),
        *(run.save_steps if run.save_strategy == "steps" else run.save_strategy, run.logging_steps, run.seed),
    )


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_adapts_all_linear_layers(path: Path):
    assert load_recipe(path).lora.target_modules == "all-linear"
    assert describe_unusual(load_recipe(path)) is None


@pytest.mark.parametrize("name", FIGURES)
def test_a_microsoft_recipe_has_the_figures_of_its_sample(name: str):
    assert figures(load_recipe(FOLDER / f"{name}.toml")) == FIGURES[name]


def test_the_original_qlora_recipe_has_the_papers_figures():
    recipe = load_recipe(FOLDER / "original-qlora.toml")
    run = recipe.training
    assert (recipe.lora.r, recipe.lora.lora_alpha, run.optim) == (64, 16, "paged_adamw_32bit")
    assert (run.lr_scheduler_type, run.learning_rate, run.warmup_steps) == ("constant", 2e-4, 0)
    assert (run.max_grad_norm, run.adam_beta2, run.micro_batch_size, run.batch_size) == (0.3, 0.999, 1, 16)
