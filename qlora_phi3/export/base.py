"""The base as a run recorded it (base.json), and the comparison of a copy of that base with the record.

A tensor is compared while it is read for the merge or the proof; nothing is read only to be compared, except `compare_plain`.
"""

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_phi3.errors import ExportError, first_line
from qlora_phi3.model import quantized as four_bit
from qlora_phi3.model.quantized import Quantized, Scheme, is_stored_quantized, quantized_record
from qlora_phi3.model.weights import StoredWeights, TensorInfo

CPU = torch.device("cpu")
#: Two means of the same absmax, summed in other orders, differ in fp32's last bits (6e-8 each); 1 and 2 threads gave 1e-7.
MEAN_TOLERANCE = 2e-6
#: Share of a tensor's codes that another quantizer may give for the same weights. On normal weights of 4096 x 3072, bitsandbytes
#: 0.50: none with other threads or a reciprocal for a division, 0.04 % in fp16, 0.2 to 0.6 % in bf16 arithmetic. Weights moved
#: by 1 % of their standard deviation give 3 %, by 5 % 15 %; how often each code occurs hardly changes then (0.03 %).
MAX_ROUNDED_SHARE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecord:
    """base.json: the base as a run loaded it."""

    name: str  # hub id or directory
    revision: str | None  # commit on the hub
    dtype: torch.dtype  # the base was loaded in it, before 4-bit weights were quantized
    scheme: Scheme | None  # None where nothing was quantized
    #: Tensor -> `quantized.tensor_record`, by the base's own names; without a tied head.
    tensors: Mapping[str, Mapping[str, Any]]

    def is_quantized(self, name: str) -> bool:
        """Whether the run held that tensor in 4 bit."""
        return bool(self.tensors.get(name, {}).get("kind") == "4bit")

    def label(self, onto: str) -> str:
        """What people read for "nf4" and "original"."""
        return onto_label(onto, None if self.scheme is None else self.scheme.quant_type)


def onto_label(onto: str, quant_type: str | None) -> str:
    """The name of the weights that an adapter is merged onto: "NF4", "FP4" or "original"; "nf4" stands for either 4-bit type."""
    return (quant_type or onto).upper() if onto == "nf4" else onto


def read_record(path: Path) -> BaseRecord:
    """Read base.json; ExportError if it, or a part of it, is missing."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        tensors = {}
        for name, tensor in stored["tensors"].items():
            keys = ("kind", "sha256", "codes", "mean_absmax") if tensor["kind"] == "4bit" else ("kind", "sha256")
            tensors[name] = {key: tensor[key] for key in keys}
            tensors[name]["sampled_codes"] = bytes.fromhex(tensor.get("sampled_codes", ""))  # older runs: none
        return BaseRecord(
            name=stored["name"],
            revision=stored["revision"],
            dtype=getattr(torch, stored["dtype"]),
            scheme=None if stored["quantization"] is None else Scheme(**stored["quantization"]),
            tensors=tensors,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} does not describe the base that was trained on: {first_line(error)}."
        raise ExportError(message, "Export a run that this version trained.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One tensor compared with the record."""

    differs: bool  # the bits in use are not those that were trained on
    other_weights: bool  # the files hold other weights, and not the same ones quantized by other hardware
    codes_differ: bool = False  # quantizing the base's files gave other 4-bit codes than the run's
    from_cache: bool = False  # the trained bits were then taken from the 4-bit base that the run saved
    different_codes: int | None = None  # how many codes differ from those of the saved base


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All tensors compared with the record: the names for which each field of `Compared` holds."""

    num_tensors: int
    differing: tuple[str, ...]
    other_weights: tuple[str, ...]
    codes_differing: tuple[str, ...]
    from_cache: tuple[str, ...]
    different_codes: int | None  # sum over `from_cache`; None where the run saved no 4-bit base


def summarise(compared: Mapping[str, Compared]) -> Comparison:
    """Sum up `RecordedBase.compared`."""
    counts = [tensor.different_codes for tensor in compared.values() if tensor.different_codes is not None]
    return Comparison(
        num_tensors=len(compared),
        differing=tuple(name for name, tensor in compared.items() if tensor.differs),
        other_weights=tuple(name for name, tensor in compared.items() if tensor.other_weights),
        codes_differing=tuple(name for name, tensor in compared.items() if tensor.codes_differ),
        from_cache=tuple(name for name, tensor in compared.items() if tensor.from_cache),
        different_codes=sum(counts) if counts else None,
    )


class RecordedBase:
    """The files of a base, each tensor compared with the run's record; a `Weights` of the values in the files.

    Tensors that the trained model did not have are left out.
    """

    def __init__(
        self, stored: StoredWeights, record: BaseRecord, *, cached: StoredWeights | None = None, device: torch.device = CPU
    ) -> None:
        """Read nothing but headers; ExportError where the files lack a tensor that the run was trained on.

        Args:
            cached: the 4-bit base that the run saved; its bits are used where quantizing again gives others.
            device: where weights are quantized; the run's kind of device gives the run's bits.
        """
        self.stored, self.record, self.cached, self.device = stored, record, cached, device
        #: Filled as tensors are read to their end.
        self.compared: dict[str, Compared] = {}
        info = four_bit.logical_info(stored)
        missing = next((name for name in record.tensors if name not in info), None)
        if missing is not None:
            message = f"The base has no {missing}, which {record.name} had when the run was trained."
            raise ExportError(message, "Give the base that the run names.")
        self.info: Mapping[str, TensorInfo] = {name: info[name] for name in info if name in record.tensors}
        #: What the files hold and the trained model did not: the buffers of old checkpoints, a second copy of a tied head.
        self.left_out = tuple(sorted(info.keys() - record.tensors.keys()))

    def iter_row_chunks(self, name: str) -> Iterator[Tensor]:
        """The rows of a tensor: chunks (rows, ...) in the dtype of the file, on the CPU. At its end a plain tensor has been
        compared with the record. The call itself raises ExportError where the base holds this tensor in 4 bit only.
        """
        if is_stored_quantized(self.stored, name):
            message = f"{self.record.name} holds {name} in 4 bit only: there is no original to merge onto."
            raise ExportError(message, "Export with --onto nf4.")
        rows, recorded = self.stored.iter_row_chunks(name), self.record.tensors.get(name, {})

        def compare(sha256: str) -> None:
            differs = sha256 != recorded["sha256"]
            self.compared[name] = Compared(differs=differs, other_weights=differs)

        # A cast gives the same bits on all hardware.
        return four_bit.hash_rows(rows, compare, dtype=self.record.dtype) if recorded.get("kind") == "plain" else rows

    def quantized(self, name: str) -> Quantized | None:
        """A tensor as the run held it in 4 bit, on `device`, compared with the record; None where the run did not quantize it.
        ExportError where the 4-bit base that the run saved is not the one in its record.
        """
        if not self.record.is_quantized(name):
            return None
        recorded, dtype, scheme = self.record.tensors[name], self.record.dtype, self.record.scheme
        if is_stored_quantized(self.stored, name):
            found = four_bit.read_quantized(self.stored, name, self.device)
            found.state.dtype = dtype  # bitsandbytes dequantizes to the dtype of a layer's input
        elif scheme is None:
            raise ExportError(f"The run recorded {name} as 4-bit, but no quantization type.", "Train the run again.")
        else:
            options = {"dtype": dtype, "scheme": scheme, "device": self.device, "offset": recorded["mean_absmax"]}
            found = four_bit.quantize(self.stored, name, **options)
        made = quantized_record(found.packed, found.state)
        compared = Compared(
            differs=made["sha256"] != recorded["sha256"],
            codes_differ=made["codes"] != recorded["codes"],
            other_weights=_are_other_weights(found, recorded),
        )
        if compared.differs and self.cached is not None:
            saved = four_bit.read_quantized(self.cached, name, self.device)
            if quantized_record(saved.packed, saved.state)["sha256"] != recorded["sha256"]:
                hint = "Remove the run's folder quantized_base; weights are then quantized again."
                raise ExportError(f"The 4-bit base that the run saved holds another {name} than its record.", hint)
            count = four_bit.count_different_codes(saved, found)
            compared, found = replace(compared, differs=False, from_cache=True, different_codes=count), saved
        self.compared[name] = compared
        return found

    def compare_plain(self) -> None:
        """Compare every tensor that the run did not quantize: one or two seconds for a full Phi-3."""
        for name, recorded in self.record.tensors.items():
            if recorded["kind"] == "plain":
                deque(self.iter_row_chunks(name), maxlen=0)

    def check_weights(self, folder: Path) -> None:
        """Raise ExportError where a tensor compared so far has other weights than the run's; `folder` is for the message."""
        others, total = summarise(self.compared).other_weights, len(self.record.tensors)
        if others:
            count = f"at least {len(others)} of {total} tensors differ from the run's record, first {others[0]}"
            message = f"{folder} is not the base that was trained on: {count}."
            raise ExportError(message, "Give the folder of the right one with --base.")


def _are_other_weights(found: Quantized, recorded: Mapping[str, Any]) -> bool:
    """Whether these are other weights than the recorded ones, not the same ones rounded by other hardware."""
    if not isclose(found.mean_absmax, recorded["mean_absmax"], rel_tol=MEAN_TOLERANCE):
        return True
    was, now = recorded["sampled_codes"], four_bit.sample_codes(found.packed)
    changed = [one ^ other for one, other in zip(was, now, strict=False)]  # each byte holds two codes
    return sum(bool(byte & 0x0F) + bool(byte & 0xF0) for byte in changed) > MAX_ROUNDED_SHARE * 2 * len(was)
