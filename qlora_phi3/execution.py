"""How a recipe is executed on a device: everything that decides memory and speed, and nothing that decides what is learned."""

from dataclasses import dataclass

#: fp32 logits alive at once in the loss: 261 positions of Phi-3's 32,064 tokens. On CPU (Zen 5, 49,152 tokens, torch 2.13) 16 and
#: 32 MiB were 15 % faster than 64 MiB, whose buffers are new from the system each time, and 2.6 x as fast as 2 MiB.
DEFAULT_LOGITS_TILE_BYTES = 32 * 2**20
#: Tiles of the MLP where complete rows do not fit; each tile dequantizes its weights again. Predicted for one row of Phi-3-mini
#: (offloaded): of 4,096 tokens, tiles of 1,024 save 257 MiB, 512 270; of 16,384 tokens, 4,096 save 1,223 MiB and 2,048 1,383.
SMALLEST_MLP_TILE_TOKENS, MOST_MLP_TILES = 1024, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchPlan:
    """How the rows of a batch become tensors."""

    #: Tokens of a micro-batch, padding included; a single longer row is a micro-batch of its own.
    max_tokens: int
    #: Rows of a padded micro-batch; a packed one is bounded by its tokens only.
    max_rows: int
    #: Concatenate rows in one sequence (block-diagonal attention) instead of padding them.
    packing: bool
    #: Rows longer than this never share a micro-batch with shorter ones (longrope switches its factors for the entire batch).
    longrope_boundary: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionPlan:
    """All that the memory plan may choose."""

    #: How the rows of an optimizer step become tensors; `evaluation`: the same for held-out rows.
    micro_batch: MicroBatchPlan
    evaluation: MicroBatchPlan
    #: Every n-th decoder layer is recomputed in the backward pass; 1: all of them, 0: none.
    checkpoint_every: int
    #: Move the inputs of recomputed layers to CPU memory until the backward pass.
    activation_offloading: bool
    #: transformers' name of the optimizer.
    optim: str
    #: Bytes of fp32 logits alive at once in the loss.
    logits_tile_bytes: int = DEFAULT_LOGITS_TILE_BYTES
    #: Tokens that go through a layer's norm and MLP at once, recomputed tile by tile in the backward pass; 0: all.
    mlp_tile_tokens: int = 0


def smaller_mlp_tile(tokens: int) -> int:
    """Tile size, in tokens, for the MLPs of a micro-batch of `tokens` tokens; smaller tiles would hardly save more."""
    return max(SMALLEST_MLP_TILE_TOKENS, -(-tokens // MOST_MLP_TILES))
