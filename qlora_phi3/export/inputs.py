"""How much of the computer's memory this process may still take.

What ends an assistant's turn in a trained model, and the chat template it must be given where the base has another.

Where the base of a run lies: the folder it was trained on, or the hub's very commit.

What an export is made from: the run, its base and its adapter, held against one another.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, StrictDataclassError
from transformers import Phi3Config

from qlora_phi3.adapters.adapter_deltas import EMBEDDING, HEAD, AdapterDeltas, read_deltas
from qlora_phi3.errors import ExportError, ModelError
from qlora_phi3.export.base import BaseRecord, RecordedBase, read_record, summarise
from qlora_phi3.export.bundle import COMPANIONS, CONFIG, check_trained_with, public_name, read_object
from qlora_phi3.export.merge import MergedWeights, Onto
from qlora_phi3.export.request import Request
from qlora_phi3.family import parse_architecture
from qlora_phi3.files import sha256_file
from qlora_phi3.inference import EndOfTurn, read_end_of_turn
from qlora_phi3.model.phi3 import load_tokenizer
from qlora_phi3.model.quantized import is_stored_quantized
from qlora_phi3.model.weights import TensorInfo, open_weights
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.recipe.schema import Model, Recipe
from qlora_phi3.reporter import Reporter
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.units import MIB, format_count, format_gib

#: Left to others, and for what an estimate misses.
MARGIN_BYTES = 512 * MIB


#: Where Linux says which control groups a process is in, and what those may take: a container's limit is one of theirs.
MEMBERSHIP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


#: By version of control groups: files of the limit and of what is taken, and what of that is only cached files.
_V2 = ("memory.max", "memory.current", "inactive_file")


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_ram(max_ram_bytes: int | None = None) -> int:
    """Bytes that this process may take beside what it holds: what is free, within its control groups' limits and its own.

    Args:
        max_ram_bytes: all that the process may hold; None for no such limit.
    """
    free = min((int(psutil.virtual_memory().available), *_free_in_groups())) - MARGIN_BYTES
    if max_ram_bytes is not None:
        free = min(free, max_ram_bytes - int(psutil.Process().memory_info().rss))
    return max(0, free)


def _free_in_groups() -> Iterator[int]:
    """What each control group of this process that has a limit may still take; nothing where there are none."""
    try:
        memberships = [line.split(":", 2) for line in MEMBERSHIP.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    for number, controllers, path in memberships:
        if number == "0":
            root, files = GROUPS, _V2
        elif "memory" in controllers.split(","):
            root, files = GROUPS / "memory", _V1
        else:
            continue
        group = root / path.lstrip("/")
        # A container sees its own group as the root, be it named by its path on the host.
        for place in [group, *(parent for parent in group.parents if parent.is_relative_to(root))]:
            if (free := _free_in(place, files)) is not None:
                yield free


def _free_in(group: Path, files: tuple[str, str, str]) -> int | None:
    limit, taken, cached = files
    try:
        most, held = int((group / limit).read_text(encoding="utf-8")), int((group / taken).read_text(encoding="utf-8"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        return most - held + int(statistics.get(cached, 0))
    except (OSError, ValueError):  # no such group, or "max"
        return None


#: README.md: its front matter states the licence.
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "README.md", *COMPANIONS)


def find_base(record: BaseRecord, progress: Callable[[str, int, int | None], None]) -> Path:
    """The folder of a run's base; of a hub's model, fetched where it is not in the cache.

    Raises:
        ExportError: the folder is gone, or the hub cannot be reached or has that commit no longer.
    """
    if Path(record.name).is_dir():
        return Path(record.name)
    if record.revision is None:
        raise ExportError(
            f"The base was trained on in {record.name}, which is not there.", "Give its folder with --base."
        )
    progress("Fetching the base", 0, None)
    try:
        folder = snapshot_download(record.name, revision=record.revision, allow_patterns=list(PATTERNS))
    except LocalEntryNotFoundError as error:
        raise ExportError(
            f"The base {record.name} at commit {record.revision} is not on this computer, and the hub cannot be reached.",
            "Check the connection, or give its folder with --base.",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ExportError(
            f"The base {record.name} at commit {record.revision} cannot be fetched: {reason}.",
            "Give its folder with --base.",
        ) from error
    progress("Fetching the base", 1, 1)
    return Path(folder)


#: See `check_memory`.
MERGE_BYTES, PROOF_BYTES = 300 * MIB, 300 * MIB


#: What an export that passed is called in its report.
PROVED, PROVED_ON_OTHER_BITS = "proved", "proved_on_other_bits"


#: Keys of a config.json that change how a model is loaded, and nothing of what it computes.
LOADING_KEYS = frozenset(
    ("architectures", "auto_map", "dtype", "torch_dtype", "quantization_config", "transformers_version", "use_cache")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What an export is made from, all checked and none of it in memory."""

    recipe: Recipe
    folder: Path
    #: Contents of the base's config.json.
    config: dict[str, Any]
    base: RecordedBase
    adapter: Path
    deltas: AdapterDeltas
    rows: Sequence[dict[str, Any]]
    ending: EndOfTurn
    device: torch.device

    def merged(self, onto: Onto, dtype: str) -> MergedWeights:
        """The tensors of the export; `dtype` as torch names it."""
        return MergedWeights(self.base, self.deltas, onto=onto, dtype=getattr(torch, dtype))

    def trained_matrices(self) -> list[TensorInfo]:
        """The base's tensors between embedding and head."""
        return [info for name, info in self.base.info.items() if name not in (EMBEDDING, HEAD)]

    def can_merge(self, onto: Onto) -> bool:
        """Whether there are such weights: a base that was not quantized has one kind, one stored in 4 bit no original."""
        if onto == "nf4":
            return self.base.record.scheme is not None
        return not any(is_stored_quantized(self.base.stored, name) for name in self.base.info)


def open_sources(request: Request, reporter: Reporter) -> Sources:
    """Find and check the base, the adapter and the rows of a run.

    Raises:
        UserError: the base is not the one that was trained on, or something of the run is missing or damaged.
    """
    run = request.run
    recipe = load_recipe(run.recipe)
    record = read_record(run.base)
    folder = request.base or find_base(record, reporter.progress)
    config = read_object(folder / "config.json")
    parse_architecture(config, str(folder))
    _check_config(folder, config, run.adapter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cached = open_weights(run.quantized_base) if run.quantized_base.is_dir() else None
    base = RecordedBase(open_weights(folder), record, cached=cached, device=device)
    reporter.progress("Comparing the base with the run's record", 0, None)
    differing = base.compare_plain()
    reporter.progress("Comparing the base with the run's record", 1, 1)
    if differing:
        raise _other_base(folder, differing, len(record.tensors))
    check_trained_with(folder, run.adapter)
    if base.left_out:
        count = format_count(len(base.left_out), "tensor")
        reporter.info(f"Left out, as the model reads none of them: {count} of the base, first {base.left_out[0]}")
    return Sources(
        recipe=recipe,
        folder=folder,
        config=config,
        base=base,
        adapter=run.adapter,
        deltas=read_deltas(run.adapter, config),
        rows=_read_rows(run.held_out) if request.verify else (),
        ending=_read_ending(folder, run, recipe),
        device=device,
    )


def check_adapter(run: RunFolder, report: Mapping[str, Any]) -> None:
    """Hold the adapter's files against the checksums in the run's report; older runs have none.

    Raises:
        ExportError: one of them is not what the run wrote.
    """
    for name, noted in (report.get("adapter") or {}).items():
        path = run.adapter / name
        if sha256_file(path) == noted:
            continue
        whole = [other for other in sorted(run.checkpoints.glob(f"*/{name}")) if sha256_file(other) == noted]
        own = f"Copy {whole[0]} there" if whole else "Put the run's own back"
        raise ExportError(
            f"{path} is not the file that the run wrote: its SHA-256 is not the one in {run.report.name}.",
            f"{own}, or train again: qlora-phi3 run {run.recipe}",
        )


def _read_ending(folder: Path, run: RunFolder, recipe: Recipe) -> EndOfTurn:
    """As `read_end_of_turn`, with a cure for those who export."""
    kept = run.chat_template
    try:
        tokenizer = load_tokenizer(Model(name=str(folder)))
        return read_end_of_turn(tokenizer, str(kept) if kept.is_file() else recipe.data.chat_template)
    except ModelError as error:
        raise ExportError(
            error.message, "Give the folder of the whole base that was trained on with --base."
        ) from error


def _check_config(folder: Path, config: dict[str, Any], adapter: Path) -> None:
    """Hold a base's config.json against the one that was trained with, which older runs did not keep.

    Raises:
        ExportError: another value of a key that the computation may depend on.
    """
    if not (adapter / CONFIG).is_file():
        return
    was, now = (
        _settings(*kept) for kept in ((adapter / CONFIG, read_object(adapter / CONFIG)), (folder / CONFIG, config))
    )
    for key in sorted(was | now):
        if was.get(key) != now.get(key):
            raise ExportError(
                f"{folder / CONFIG} is not what was trained with: {key} is {repr(now.get(key))}, and was {repr(was.get(key))}.",
                "Put it back, or give the folder of the right base with --base.",
            )


def _settings(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as the model reads it, whichever version wrote it, with parts as in `rope_parameters.rope_theta`.

    Loading alone depends on the keys that are left out.
    """
    try:
        read = Phi3Config(**config).to_dict()
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ExportError(f"{path} cannot be read: {error!r}.", "Put the base's own back.") from error
    settings: dict[str, Any] = {}
    for key, value in read.items():
        parts = {f"{key}.{part}": each for part, each in value.items()} if isinstance(value, dict) else {key: value}
        if key not in LOADING_KEYS and not key.startswith("_"):
            settings |= parts
    return settings


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{**row, "input_ids": list(row["input_ids"]), "labels": list(row["labels"])} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{path} does not hold the run's held-out rows whole: {error!r}.", "Export with --no-verify."
        ) from error


def _other_base(folder: Path, differing: Sequence[str], total: int) -> ExportError:
    return ExportError(
        f"{folder} is not the base that was trained on: at least {len(differing)} of {total} tensors differ from the "
        f"run's record, first {differing[0]}.",
        "Give the folder of the right one with --base.",
    )


def check_base(sources: Sources) -> None:
    """Hold the tensors read so far against the run's record.

    Raises:
        ExportError: they are other weights, and not the same ones that another kind of device rounds otherwise.
    """
    others = summarise(sources.base.compared).other_weights
    if others:
        raise _other_base(sources.folder, others, len(sources.base.record.tensors))


def proved_status(sources: Sources) -> str:
    """How the report calls an export that passed: the live model it was held against has the trained bits, or not all of them."""
    return PROVED_ON_OTHER_BITS if summarise(sources.base.compared).differing else PROVED


def tell_kept_bits(sources: Sources, reporter: Reporter) -> None:
    """Say, once all is read, what was taken from the 4-bit base that the run kept."""
    compared = summarise(sources.base.compared)
    if compared.from_cache:
        tensors, codes = len(compared.from_cache), compared.different_codes or 0
        reporter.info(
            f"Taken from the 4-bit base that the run kept: {format_count(tensors, 'tensor')}, "
            f"of which {format_count(codes, 'code')} came out otherwise here"
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
    uses_dora = any(target.magnitude for target in sources.deltas.targets.values())
    now = psutil.Process().memory_info().rss
    merge, proof = now + MERGE_BYTES, now + (4 if uses_dora else 2) * 4 * largest + PROOF_BYTES
    needed = max(merge, proof) if verify else merge
    if max_ram_bytes < needed:
        needs_less = merge < 0.9 * needed  # an estimate is not as exact as its MiB
        without = f", or --no-verify, which needs {format_gib(merge)}" if needs_less else ""
        raise ExportError(
            f"--max-ram {format_gib(max_ram_bytes)} is too little: this export needs about {format_gib(needed)}.",
            f"Give that much{without}.",
        )


def describe_base(sources: Sources) -> dict[str, Any]:
    """For the report: the base, and how its tensors compare with the run's record."""
    record = sources.base.record
    return {
        "name": public_name(record.name),
        "revision": record.revision,
        "quantization": record.scheme and asdict(record.scheme),
        "compared": asdict(summarise(sources.base.compared)),
    }
