"""What a run noted down of its base (base.json), and how another reading of that base compares with it."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isclose
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_phi3.errors import ExportError
from qlora_phi3.model.quantized import (
    Quantized,
    Scheme,
    add_bytes,
    count_different_codes,
    is_stored_quantized,
    logical_info,
    quantize,
    quantized_record,
    read_quantized,
    sample_codes,
)
from qlora_phi3.model.weights import StoredWeights, TensorInfo

#: Two means of the same absmax, summed in other orders, differ in fp32's last bits (6e-8 each); 1 and 2 threads gave 1e-7.
_MEAN_TOLERANCE = 2e-6


#: Share of a tensor's codes that another quantizer may give for the same weights. On normal weights of 4096 x 3072, bitsandbytes
#: 0.50: none with other threads or a reciprocal for a division, 0.04 % in fp16, 0.2 to 0.6 % in bf16 arithmetic. Weights moved
#: by 1 % of their standard deviation give 3 %, by 5 % 15 %; how often each code occurs hardly changes then (0.03 %).
_MOST_ROUNDED = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecord:
    """base.json: the base as a run loaded it.

    `dtype` is the dtype it was loaded in, before 4-bit weights were quantized; `scheme` is None where nothing was. `tensors`
    holds what `checksum.tensor_record` gives, by the base's own names; a tied head is left out.
    """

    name: str
    revision: str | None
    dtype: torch.dtype
    scheme: Scheme | None
    device: str
    tensors: Mapping[str, Mapping[str, Any]]

    def is_quantized(self, name: str) -> bool:
        """Whether the run held that tensor in 4 bit."""
        return bool(self.tensors.get(name, {}).get("kind") == "4bit")


def read_record(path: Path) -> BaseRecord:
    """Read base.json.

    Raises:
        ExportError: it is missing or no such record.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        scheme = held["quantization"]
        return BaseRecord(
            name=held["name"],
            revision=held["revision"],
            dtype=getattr(torch, held["dtype"]),
            scheme=None if scheme is None else Scheme(**scheme),
            device=held["device"],
            tensors={name: _check_noted(tensor) for name, tensor in held["tensors"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{path} does not say what the run was trained on: {error!r}.", "Export a run that this version trained."
        ) from error


def _check_noted(tensor: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tensor's record with nothing missing, else a KeyError; older ones have no sample."""
    if tensor["kind"] != "4bit":
        return {part: tensor[part] for part in ("kind", "sha256")}
    sample = bytes.fromhex(tensor.get("sampled_codes", ""))
    return {part: tensor[part] for part in ("kind", "sha256", "codes", "mean_absmax")} | {"sampled_codes": sample}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One tensor held against the record.

    `differs`: the bits in use are not those that were trained on. `codes_differ`: the 4-bit codes that the base's files gave are
    other ones; `different_codes`: how many, where the run kept its own (`from_cache`). `other_weights`: the files hold other
    weights than the run's, and not the same ones that were only rounded otherwise.
    """

    kind: str
    differs: bool
    other_weights: bool
    codes_differ: bool = False
    from_cache: bool = False
    different_codes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All tensors held against the record, by the base's own names; the fields of `Compared`.

    `codes_differing` came out with other codes when they were quantized again, whether or not the trained ones were then taken
    from the 4-bit base that the run kept; `different_codes` of those, None where it kept none.
    """

    num_tensors: int
    differing: tuple[str, ...]
    other_weights: tuple[str, ...]
    codes_differing: tuple[str, ...]
    from_cache: tuple[str, ...]
    different_codes: int | None


def summarise(compared: Mapping[str, Compared]) -> Comparison:
    """Count what `RecordedBase.compared` holds."""

    def names(holds: Callable[[Compared], bool]) -> tuple[str, ...]:
        return tuple(name for name, tensor in compared.items() if holds(tensor))

    counts = [tensor.different_codes for tensor in compared.values() if tensor.different_codes is not None]
    return Comparison(
        num_tensors=len(compared),
        differing=names(lambda tensor: tensor.differs),
        other_weights=names(lambda tensor: tensor.other_weights),
        codes_differing=names(lambda tensor: tensor.codes_differ),
        from_cache=names(lambda tensor: tensor.from_cache),
        different_codes=sum(counts) if counts else None,
    )


def _are_others(found: Quantized, noted: Mapping[str, Any]) -> bool:
    """Whether these are other weights than the noted ones, and not the same ones, only rounded otherwise."""
    if not isclose(found.mean_absmax, noted["mean_absmax"], rel_tol=_MEAN_TOLERANCE):
        return True
    was, now = noted["sampled_codes"], sample_codes(found.packed)
    changed = [one ^ other for one, other in zip(was, now, strict=False)]
    return sum(bool(byte & 0x0F) + bool(byte & 0xF0) for byte in changed) > _MOST_ROUNDED * 2 * len(was)


class RecordedBase:
    """The files of a base, each tensor held against what the run noted; a `Weights` of the files' own values.

    Tensors that the trained model did not have are left out of it.
    """

    def __init__(
        self,
        stored: StoredWeights,
        record: BaseRecord,
        *,
        cached: StoredWeights | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Nothing but headers is read.

        Args:
            cached: the 4-bit base that the run kept (`quantized.save_quantized`); its bits are taken where quantizing again
                gives others.
            device: where weights are quantized; None for the CPU. The run's own kind of device gives the run's own bits.

        Raises:
            ExportError: the files lack a tensor that the run was trained on.
        """
        self.stored, self.record, self.cached = stored, record, cached
        self.device = device or torch.device("cpu")
        #: How each tensor compares, once it has been read to its end.
        self.compared: dict[str, Compared] = {}
        held = logical_info(stored)
        self.info: Mapping[str, TensorInfo] = {name: info for name, info in held.items() if name in record.tensors}
        #: What the files hold and the trained model did not: the buffers of old checkpoints, a second copy of a tied head.
        self.left_out = tuple(sorted(held.keys() - record.tensors.keys()))
        for name in record.tensors:
            if name not in self.info:
                raise ExportError(
                    f"The base has no {name}, which {record.name} had when the run was trained.",
                    "Give the base that the run names.",
                )

    def iter_row_chunks(self, name: str) -> Iterator[Tensor]:
        """As `Weights.pieces`: the values in the files; a plain tensor is held against the record on the way.

        Raises:
            ExportError: the base holds this tensor in 4 bit only.
        """
        if is_stored_quantized(self.stored, name):
            raise ExportError(
                f"{self.record.name} holds {name} in 4 bit only: there is no original to merge onto.",
                "Export with --onto nf4.",
            )
        noted = self.record.tensors.get(name)
        pieces = self.stored.iter_row_chunks(name)
        return pieces if noted is None or noted["kind"] != "plain" else self._checked(name, noted["sha256"], pieces)

    def _checked(self, name: str, noted: str, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        digest = hashlib.sha256()
        for piece in pieces:
            add_bytes(digest, piece.to(self.record.dtype))
            yield piece
        differs = digest.hexdigest() != noted  # a cast, which all hardware does alike
        self.compared[name] = Compared(kind="plain", differs=differs, other_weights=differs)

    def quantized(self, name: str) -> Quantized | None:
        """A tensor as the run held it in 4 bit; None for one that it did not quantize.

        Raises:
            ExportError: the kept 4-bit base is not the one that was noted.
        """
        if not self.record.is_quantized(name):
            return None
        noted, again = self.record.tensors[name], self._quantize(name)
        made = quantized_record(again.packed, again.state)
        found = Compared(
            kind="4bit",
            differs=made["sha256"] != noted["sha256"],
            codes_differ=made["codes"] != noted["codes"],
            other_weights=_are_others(again, noted),
        )
        used = again
        if found.differs and self.cached is not None:
            used = self._kept(self.cached, name, noted["sha256"])
            count = count_different_codes(used, again)
            found = replace(found, differs=False, from_cache=True, different_codes=count)
        self.compared[name] = found
        return used

    def _kept(self, cached: StoredWeights, name: str, noted: str) -> Quantized:
        kept = read_quantized(cached, name, self.device)
        if quantized_record(kept.packed, kept.state)["sha256"] != noted:
            raise ExportError(
                f"The 4-bit base that the run kept holds another {name} than the run noted.",
                "Remove the run's folder quantized_base; weights are then quantized again.",
            )
        return kept

    def _quantize(self, name: str) -> Quantized:
        if is_stored_quantized(self.stored, name):
            found = read_quantized(self.stored, name, self.device)
            found.state.dtype = self.record.dtype  # bitsandbytes dequantizes to the dtype of a layer's input
            return found
        scheme, offset = self.record.scheme, self.record.tensors[name]["mean_absmax"]
        if scheme is None:
            raise ExportError(f"The run noted {name} as 4-bit, and not of which kind.", "Train the run again.")
        return quantize(self.stored, name, dtype=self.record.dtype, scheme=scheme, device=self.device, offset=offset)

    def notes(self, names: Sequence[str]) -> dict[str, Any]:
        """How these tensors compare, as JSON keeps it; for `writer.write_shards`."""
        return {name: asdict(self.compared[name]) for name in names if name in self.compared}

    def recall(self, notes: Mapping[str, Any]) -> None:
        """Take up notes of tensors that an earlier attempt compared."""
        self.compared |= {name: Compared(**noted) for name, noted in notes.items()}

    def compare_plain(self) -> tuple[str, ...]:
        """Hold every tensor that the run did not quantize against the record: a second or two for a whole Phi-3.

        Returns:
            The names of those that differ. If there is one, these are other weights than the run's.
        """
        plain = [name for name, noted in self.record.tensors.items() if noted["kind"] == "plain"]
        for name in plain:
            deque(self.iter_row_chunks(name), maxlen=0)
        return tuple(name for name in plain if self.compared[name].differs)
