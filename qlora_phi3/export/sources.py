"""What an export is made from: the run, its base and its adapter, held against one another."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_phi3.architecture import parse_architecture
from qlora_phi3.errors import ExportError
from qlora_phi3.export.adapter import Updates, read_updates
from qlora_phi3.export.base import RecordedBase, read_record, summarise
from qlora_phi3.export.files import read_object
from qlora_phi3.export.locate import find_base
from qlora_phi3.export.merge import MergedWeights, Onto
from qlora_phi3.export.quantize import is_stored_quantized
from qlora_phi3.export.request import Request
from qlora_phi3.export.template import EndOfTurn, read_end_of_turn
from qlora_phi3.export.weights import open_weights
from qlora_phi3.recipe.load import Recipe, load_recipe
from qlora_phi3.training.listener import Listener


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

    The same kind of device quantizes to the same bits: where it does not, it is another base.

    Raises:
        ExportError: it is.
    """
    record, compared = sources.base.record, summarise(sources.base.compared)
    if compared.codes_differing and not compared.from_cache:
        if record.device == sources.device.type:
            raise _other_base(sources.folder, compared.codes_differing, len(record.tensors))
        listener.warn(
            f"{len(compared.codes_differing)} of {len(record.tensors)} tensors quantize to other codes on this "
            f"{sources.device.type} than on the {record.device} that trained. [model] save_quantized = true keeps them."
        )
    if compared.from_cache:
        listener.say(
            f"{compared.different_codes:,} codes of {len(compared.from_cache)} tensors quantize otherwise here; "
            "taken from the 4-bit base that the run kept"
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
