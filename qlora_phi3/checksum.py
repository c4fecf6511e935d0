"""Checksums of a base's tensors as a run holds them, so that an export can tell whether it works on the same ones.

Double quantization takes the mean of all absmax off as its offset. torch sums it in another order with another number of threads:
1 and 2 threads gave other last bits for Phi-3's larger layers (torch 2.13 on CPU). The codes do not depend on it. So codes have a
checksum of their own, and the mean is kept: with it the rest comes out the same again on any number of threads. Mean and some of
the codes also tell other weights from the same ones quantized on other hardware.
"""

import hashlib
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

#: Bytes brought from a card at once.
_PIECE_BYTES = 16 * 2**20
#: Bytes of two codes each that are kept as they are, of a 4-bit tensor.
SAMPLED_BYTES = 1024
#: 2^32 / the golden ratio: its multiples, modulo 2^32, lie evenly, and in step with no row length.
_GOLDEN = 2_654_435_769


def tensor_checksum(parameter: Tensor) -> str:
    """SHA-256, in hex, of a parameter's bytes.

    Args:
        parameter: any shape and device; of a 4-bit one (it carries a `quant_state`) the packed codes, then absmax, then, where
            it is quantized itself, its own absmax and offset are read.
    """
    return str(tensor_record(parameter)["sha256"])


def tensor_record(parameter: Tensor) -> dict[str, Any]:
    """What a run notes down of a parameter: its kind and checksum; of a 4-bit one that of its codes too, and what tells it apart.

    Returns:
        {"kind": "plain", "sha256": hex} or
        {"kind": "4bit", "sha256": hex, "codes": hex, "mean_absmax": float, "sampled_codes": hex}.
    """
    state = getattr(parameter, "quant_state", None)
    return (
        {"kind": "plain", "sha256": checksum_of([parameter])} if state is None else quantized_record(parameter, state)
    )


def sample_codes(packed: Tensor) -> bytes:
    """`SAMPLED_BYTES` of a tensor's packed codes, spread over it; all of one that has fewer."""
    flat = packed.detach().view(-1)
    places = [(number * _GOLDEN % 2**32) * len(flat) >> 32 for number in range(SAMPLED_BYTES)]
    chosen = flat if len(flat) <= SAMPLED_BYTES else flat[torch.tensor(places, device=flat.device)]
    return bytes(chosen.cpu().numpy())


def quantized_record(packed: Tensor, state: Any) -> dict[str, Any]:
    """`tensor_record` of a 4-bit tensor given as its packed codes, (n / 2, 1), and its bitsandbytes `QuantState`."""
    digest = add_bytes(hashlib.sha256(), packed)
    codes = digest.hexdigest()
    for tensor in (state.absmax, *((state.state2.absmax, state.offset) if state.nested else ())):
        add_bytes(digest, tensor)
    mean = float(state.offset if state.nested else state.absmax.mean())  # of fp32, which JSON keeps to the last bit
    return {
        "kind": "4bit",
        "sha256": digest.hexdigest(),
        "codes": codes,
        "mean_absmax": mean,
        "sampled_codes": sample_codes(packed).hex(),
    }


def checksum_of(pieces: Iterable[Tensor]) -> str:
    """The checksum of tensors one after the other; of all pieces of a plain tensor it is the tensor's own."""
    digest = hashlib.sha256()
    for piece in pieces:
        add_bytes(digest, piece)
    return digest.hexdigest()


def add_bytes(digest: Any, tensor: Tensor) -> Any:
    """Put a tensor's bytes, of any shape and device, into one of hashlib's digests; returns it."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for start in range(0, len(raw), _PIECE_BYTES):
        digest.update(memoryview(cast(Any, raw[start : start + _PIECE_BYTES].cpu().numpy())))
    return digest
