"""What a recipe may ask of its model: positions and layers that it has."""

from typing import TYPE_CHECKING

from qlora_phi3.errors import UserError

if TYPE_CHECKING:
    from qlora_phi3.architecture import Architecture
    from qlora_phi3.recipe.load import Recipe


def check_limits(recipe: "Recipe", architecture: "Architecture") -> None:
    """Refuse rows longer than the model's positions, and a layer to recompute that it does not have.

    Raises:
        UserError: names the key, its value and the model's.
    """
    asked, most = recipe.training.max_length, architecture.max_position_embeddings
    if asked > most:
        raise UserError(
            f"[training] max_length = {asked}, and {recipe.model.name} has {most} positions.",
            f"Write max_length = {most} or less.",
        )
    every, layers = recipe.memory.checkpoint_every_n_layers, architecture.num_hidden_layers
    if every != "auto" and every > layers:
        raise UserError(
            f"[memory] checkpoint_every_n_layers = {every}, and {recipe.model.name} has {layers} layers.",
            f"Write {layers} or less; to recompute none write [training] gradient_checkpointing = false.",
        )
