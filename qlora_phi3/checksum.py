"""Checksums of a base's tensors as a run holds them, so that an export can tell whether it works on the same ones."""

import hashlib
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

#: Bytes brought from a card at once.
_PIECE_BYTES = 16 * 2**20


def tensor_checksum(parameter: Tensor) -> str:
    """SHA-256, in hex, of a parameter's bytes.

    Args:
        parameter: any shape and device; of a 4-bit one (it carries a `quant_state`) the packed codes, then absmax, then, where
            it is quantized itself, its own absmax and offset are read.
    """
    state = getattr(parameter, "quant_state", None)
    return checksum_of([parameter]) if state is None else quantized_checksum(parameter, state)


def quantized_checksum(packed: Tensor, state: Any) -> str:
    """The checksum of a 4-bit tensor given as its packed codes, (n / 2, 1), and its bitsandbytes `QuantState`."""
    return checksum_of([packed, *state_tensors(state)])


def state_tensors(state: Any) -> list[Tensor]:
    """What a bitsandbytes `QuantState` holds beside the codes: absmax, and with double quantization its absmax and offset."""
    return [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]


def checksum_of(pieces: Iterable[Tensor]) -> str:
    """The checksum of tensors one after the other; of all pieces of a tensor it is the tensor's own."""
    digest = hashlib.sha256()
    for piece in pieces:
        raw = piece.detach().contiguous().view(-1).view(torch.uint8)
        for start in range(0, len(raw), _PIECE_BYTES):
            digest.update(memoryview(cast(Any, raw[start : start + _PIECE_BYTES].cpu().numpy())))
    return digest.hexdigest()
