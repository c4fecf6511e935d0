"""The arithmetic of deltas, compared with the full matrices."""

import pytest
import torch

from qlora_phi3.adapters.delta import LoraDelta, LowRankBlock, relative_difference, stack


def random_delta(draw: torch.Generator, *scalings: float) -> LoraDelta:
    """Three blocks one below the other, of ranks 1, 2 and 3."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    blocks = [
        LowRankBlock(lora_A=random(rank, 7), lora_B=random(4, rank), scaling=scaling, first_row=4 * (rank - 1))
        for rank, scaling in zip((1, 2, 3), scalings, strict=True)
    ]
    return LoraDelta(out_features=12, in_features=7, blocks=tuple(blocks))


def test_the_printed_difference_is_that_of_the_full_matrices():
    draw = torch.Generator().manual_seed(0)
    first, second = random_delta(draw, 1.0, 0.5, 3.0), random_delta(draw, 2.0, 1.0, 0.25)
    dense = [
        torch.cat([block.scaling * block.lora_B.double() @ block.lora_A.double() for block in delta.blocks])
        for delta in (first, second)
    ]
    expected = float((dense[0] - dense[1]).norm() / dense[0].norm())
    assert relative_difference(first, second) == pytest.approx(expected, rel=1e-12)


def test_stacked_blocks_are_the_same_delta_and_different_scalings_are_folded():
    delta = random_delta(torch.Generator().manual_seed(0), 1.0, 0.3, 3.0)
    lora_A, lora_B, scaling = stack(delta)
    assert (lora_A.shape, lora_B.shape, scaling) == ((6, 7), (12, 6), 3.0)
    stacked = LoraDelta(out_features=12, in_features=7, blocks=(LowRankBlock(lora_A=lora_A, lora_B=lora_B, scaling=scaling),))
    assert 0 < relative_difference(delta, stacked) < 1e-7
