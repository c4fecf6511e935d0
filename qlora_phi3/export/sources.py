"""What an export is made from: the run, its base and its adapter, held against one another."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from qlora_phi3.architecture import parse_architecture
from qlora_phi3.errors import ExportError
from qlora_phi3.export.adapter import EMBEDDING, HEAD, Updates, read_updates
from qlora_phi3.export.base import RecordedBase, read_record, summarise
from qlora_phi3.export.files import read_object
from qlora_phi3.export.locate import find_base
from qlora_phi3.export.merge import MergedWeights, Onto
from qlora_phi3.export.quantize import is_stored_quantized
from qlora_phi3.export.request import Request
from qlora_phi3.export.template import EndOfTurn, read_end_of_turn
from qlora_phi3.export.weights import TensorInfo, open_weights
from qlora_phi3.recipe.load import Recipe, load_recipe
from qlora_phi3.sizes import MIB, format_gib
from qlora_phi3.training.listener import Listener

#: See `check_memory`.
MERGE_BYTES, PROOF_BYTES = 300 * MIB, 300 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What an export is made from, all checked and none of it in memory."""

    recipe: Recipe
    folder: Path
    #: Contents of the base's config.json.
    config: dict[str, Any]
    base: RecordedBase
    adapter: Path
    updates: Updates
    rows: Sequence[dict[str, Any]]
    ending: EndOfTurn
    device: torch.device

    def merged(self, onto: Onto, dtype: str) -> MergedWeights:
        """The tensors of the export; `dtype` as torch names it."""
        return MergedWeights(self.base, self.updates, onto=onto, dtype=getattr(torch, dtype))

    def trained_matrices(self) -> list[TensorInfo]:
        """The base's tensors between embedding and head."""
        return [info for name, info in self.base.info.items() if name not in (EMBEDDING, HEAD)]

    def can_merge(self, onto: Onto) -> bool:
        """Whether there are such weights: a base that was not quantized has one kind, one stored in 4 bit no original."""
        if onto == "nf4":
            return self.base.record.scheme is not None
        return not any(is_stored_quantized(self.base.stored, name) for name in self.base.info)


def open_sources(request: Request, listener: Listener) -> Sources:
    """Find and check the base, the adapter and the rows of a run.

    Raises:
        UserError: the base is not the one that was trained on, or something of the run is missing or damaged.
    """
    run = request.run
    recipe = load_recipe(run.recipe)
    record = read_record(run.base)
    folder = request.base or find_base(record, listener.progress)
    config = read_object(folder / "config.json")
    parse_architecture(config, str(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cached = open_weights(run.quantized_base) if run.quantized_base.is_dir() else None
    base = RecordedBase(open_weights(folder), record, cached=cached, device=device)
    listener.progress("Comparing the base with the run's record", 0, None)
    differing = base.compare_plain()
    listener.progress("Comparing the base with the run's record", 1, 1)
    if differing:
        raise _other_base(folder, differing, len(record.tensors))
    rows = [json.loads(line) for line in run.held_out.read_text(encoding="utf-8").splitlines()]
    return Sources(
        recipe=recipe,
        folder=folder,
        config=config,
        base=base,
        adapter=run.adapter,
        updates=read_updates(run.adapter, config),
        rows=rows,
        ending=read_end_of_turn(folder, recipe.data.chat_template),
        device=device,
    )


def _other_base(folder: Path, differing: Sequence[str], total: int) -> ExportError:
    return ExportError(
        f"{folder} is not the base that was trained on: at least {len(differing)} of {total} tensors differ from the "
        f"run's record, first {differing[0]}.",
        "Give the folder of the right one with --base.",
    )


def check_base(sources: Sources, listener: Listener) -> None:
    """Look at how the tensors read so far compare with the run's record.

    Raises:
        ExportError: they are other weights, and not the same ones that another kind of device rounds otherwise.
    """
    record, compared = sources.base.record, summarise(sources.base.compared)
    if compared.other_weights:
        raise _other_base(sources.folder, compared.other_weights, len(record.tensors))
    if compared.codes_differing and not compared.from_cache:
        listener.warn(
            f"{len(compared.codes_differing)} of {len(record.tensors)} tensors quantize to other codes on this "
            f"{sources.device.type} than on the {record.device} that trained; [model] save_quantized = true keeps those."
        )
    if compared.from_cache:
        listener.say(
            f"{compared.different_codes:,} codes of {len(compared.from_cache)} tensors quantize otherwise here; "
            "taken from the 4-bit base that the run kept"
        )


def check_memory(sources: Sources, max_ram_bytes: int, *, verify: bool) -> None:
    """Refuse what would need more memory than it may take.

    Over the process after its imports a merge takes at most MERGE_BYTES, and a proof of 1,024 tokens twice the largest matrix in
    fp32 (with DoRA four times) and PROOF_BYTES: measured were 533 to 681 MiB for Phi-3-mini, 1,058 with DoRA, 1,465 for
    Phi-3-medium.

    Raises:
        ExportError: with what would do.
    """
    largest = max(info.num_bytes // info.dtype.itemsize for info in sources.trained_matrices())
    uses_dora = any(target.magnitude for target in sources.updates.targets.values())
    now = psutil.Process().memory_info().rss
    merge, proof = now + MERGE_BYTES, now + (4 if uses_dora else 2) * 4 * largest + PROOF_BYTES
    needed = max(merge, proof) if verify else merge
    if max_ram_bytes < needed:
        without = f", or --no-verify, which needs {format_gib(merge)}" if verify and merge < needed else ""
        raise ExportError(
            f"--max-ram {format_gib(max_ram_bytes)} is too little: this export needs about {format_gib(needed)}.",
            f"Give that much{without}.",
        )


def describe_base(sources: Sources) -> dict[str, Any]:
    """For the report: the base, and how its tensors compare with the run's record."""
    record = sources.base.record
    return {
        "name": record.name,
        "revision": record.revision,
        "quantization": record.scheme and asdict(record.scheme),
        "compared": asdict(summarise(sources.base.compared)),
    }
