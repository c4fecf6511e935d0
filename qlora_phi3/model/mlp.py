"""The norm and the MLP of a decoder layer, computed in tiles along the tokens.

The MLP's inner tensors are the widest of a layer: in Phi-3-mini 96 of the 176 KiB a token in the backward pass. Norm and MLP
compute every position independently. Each tile is recomputed in its own backward pass, so the wide tensors exist for one tile at
a time. The norm is part of the tile because its backward pass takes five fp32 copies of its input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer


@dataclass(frozen=True, slots=True)
class _TiledForward:
    """Replaces the forward of an MLP: its norm, then the MLP, tile by tile.

    Args:
        norm, mlp: the original forwards of the norm and the MLP.
        tokens: tokens of a tile.
    """

    norm: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    tokens: int

    def __call__(self, hidden: Tensor) -> Tensor:
        """(rows, length, hidden_size) -> same shape and dtype."""

        def compute(tile: Tensor) -> Tensor:
            return self.mlp(self.norm(tile))

        tiles = torch.split(hidden.flatten(0, 1), self.tokens)
        return torch.cat([checkpoint(compute, tile, use_reentrant=False) for tile in tiles]).view_as(hidden)


def set_mlp_tiles(model: nn.Module, tokens: int) -> None:
    """Compute norm and MLP of every decoder layer in tiles; it may be called again at any time.

    Args:
        model: a Phi-3, with or without an adapter.
        tokens: tokens of a tile; 0 restores the untiled forward.
    """
    for layer in model.modules():
        if not isinstance(layer, Phi3DecoderLayer):
            continue
        norm, mlp = layer.post_attention_layernorm, layer.mlp
        if isinstance(mlp.forward, _TiledForward):
            norm.forward, mlp.forward = mlp.forward.norm, mlp.forward.mlp
        if tokens:
            mlp.forward = _TiledForward(norm.forward, mlp.forward, tokens)
            norm.forward = lambda hidden: hidden  # the tiles compute the norm
