"""The second half of a decoder layer, norm and MLP, in tiles along the tokens.

The MLP's inner tensors are the widest of a layer: in Phi-3-mini 96 KiB a token in the backward pass, of 176. Every position
goes through norm and MLP by itself, so that they can be computed tile by tile, each recomputed when its own backward pass
comes: what is wide then exists for one tile at a time. The norm goes along because its backward pass takes five fp32 copies
of its input, which would be the next to stand in the way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer


def set_mlp_tiles(model: nn.Module, tokens: int) -> None:
    """Compute norm and MLP of every decoder layer in tiles of so many tokens, 0 whole; may be called again at any time."""
    for layer in model.modules():
        if not isinstance(layer, Phi3DecoderLayer):
            continue
        norm, mlp = layer.post_attention_layernorm, layer.mlp
        if isinstance(mlp.forward, _InTiles):
            norm.forward, mlp.forward = mlp.forward.norm, mlp.forward.mlp
        if tokens:
            norm.forward, mlp.forward = _pass_on, _InTiles(norm.forward, mlp.forward, tokens)


def _pass_on(hidden: Tensor) -> Tensor:
    """The forward of a norm that is computed with the MLP."""
    return hidden


@dataclass(frozen=True, slots=True)
class _InTiles:
    """The forward of an MLP: its norm's and its own, tile by tile."""

    norm: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    tokens: int

    def __call__(self, hidden: Tensor) -> Tensor:
        """(rows, length, hidden_size) -> the same shape."""
        tiles = torch.split(hidden.flatten(0, 1), self.tokens)
        return torch.cat([checkpoint(self._compute, tile, use_reentrant=False) for tile in tiles]).view_as(hidden)

    def _compute(self, tile: Tensor) -> Tensor:
        return self.mlp(self.norm(tile))
