"""How a recipe is laid onto a card: all that decides memory and speed, and nothing that decides what is learned."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchPlan:
    """How the rows of a batch are laid out in tensors; it decides memory and speed, never what is learned."""

    #: Tokens of a micro-batch, padding included; a single longer row stands alone.
    max_tokens: int
    #: Rows of a padded micro-batch; a packed one is bounded by its tokens only.
    max_rows: int
    #: Lay rows end to end in one sequence (block-diagonal attention) instead of padding them.
    packing: bool
    #: Rows longer than this never share a micro-batch with shorter ones (longrope switches its factors for the whole batch).
    longrope_boundary: int | None


#: fp32 logits alive at once in the loss: 261 positions of Phi-3's 32,064 tokens. On CPU (Zen 5, 49,152 tokens, torch 2.13) 16 and
#: 32 MiB were 15 % faster than 64, whose buffers come fresh from the system each time, and 2.6 x as fast as 2.
DEFAULT_LOGITS_TILE_BYTES = 32 * 2**20


#: Tiles of the MLP where whole rows do not fit, each of which dequantizes its weights anew. Predicted for one row of Phi-3-mini
#: (offloaded): of 4,096 tokens, tiles of 1,024 save 257 MiB, 512 270; of 16,384 tokens, 4,096 save 1,223 MiB and 2,048 1,383.
SMALLEST_MLP_TILE_TOKENS, MOST_MLP_TILES = 1024, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionPlan:
    """What the plan may choose."""

    #: How the rows of an optimizer step are laid out in tensors; `evaluation` the same for held-out rows.
    micro_batch: MicroBatchPlan
    evaluation: MicroBatchPlan
    #: Every n-th decoder layer is recomputed in the backward pass; 1: all of them, 0: none.
    checkpoint_every: int
    #: Keep what recomputation starts from in the computer's memory instead of the card's.
    activation_offloading: bool
    #: transformers' name of the optimizer.
    optim: str
    #: Bytes of fp32 logits alive at once in the loss.
    logits_tile_bytes: int = DEFAULT_LOGITS_TILE_BYTES
    #: Tokens that go through a layer's norm and MLP at once, recomputed tile by tile in the backward pass; 0: all.
    mlp_tile_tokens: int = 0


def smaller_mlp_tile(tokens: int) -> int:
    """The tile, in tokens, of the MLPs of a micro-batch of so many tokens; smaller ones would hardly save more."""
    return max(SMALLEST_MLP_TILE_TOKENS, -(-tokens // MOST_MLP_TILES))
