"""What an export is made from: the run, its base and its adapter, each checked against the run's records.

Nothing is in memory but headers; `Sources.merged` reads the tensors when they are needed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from reprlib import repr
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from qlora_phi3.adapters.adapter_deltas import EMBEDDING, HEAD, AdapterDeltas, read_deltas
from qlora_phi3.adapters.base_files import CONFIG, DOWNLOAD_AGAIN, portable_config
from qlora_phi3.data.tokenizer import load_tokenizer
from qlora_phi3.errors import DataError, ExportError, ModelError, first_line
from qlora_phi3.export.base import BaseRecord, RecordedBase, read_record
from qlora_phi3.export.bundle import COMPANIONS, check_trained_with
from qlora_phi3.export.merge import MergedWeights, Onto
from qlora_phi3.export.request import Request
from qlora_phi3.family import Architecture, normalize_config, parse_architecture
from qlora_phi3.files import read_json_object, sha256_file
from qlora_phi3.inference import EndOfTurn, read_end_of_turn
from qlora_phi3.model.checkpoint import check_checkpoint
from qlora_phi3.model.quantized import is_stored_quantized, stored_scheme
from qlora_phi3.model.weights import open_weights
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.recipe.schema import Model
from qlora_phi3.reporter import Progress, Reporter
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.units import MIB, format_count, format_gib

#: Memory left free for other processes, and for what an estimate misses.
MARGIN_BYTES = 512 * MIB
#: Above the process after its imports, a merge of Phi-3-mini took at most this much, and a proof of 1,024 tokens this much plus
#: twice the largest matrix in fp32 (with DoRA four times): measured were 533 to 681 MiB for Phi-3-mini, 1,058 with DoRA, 1,465
#: for Phi-3-medium. A conversion to GGUF took 119 to 224 MiB.
MERGE_BYTES, PROOF_BYTES = 300 * MIB, 300 * MIB
#: Files of the base that are fetched from the hub; README.md states the licence in its front matter.
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "README.md", *COMPANIONS)
#: Keys of a config.json that change how a model is loaded, and nothing of what it computes.
LOADING_KEYS = frozenset(
    ("architectures", "auto_map", "dtype", "torch_dtype", "quantization_config", "transformers_version", "use_cache")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What an export is made from."""

    folder: Path  # of the base
    config: dict[str, Any]  # contents of its config.json
    architecture: Architecture
    base: RecordedBase
    adapter: Path
    deltas: AdapterDeltas
    rows: Sequence[dict[str, Any]]  # the held-out rows; empty without a proof
    ending: EndOfTurn
    device: torch.device

    def merged(self, onto: Onto, dtype: str) -> MergedWeights:
        """The tensors of the export; `dtype` as torch names it."""
        return MergedWeights(self.base, self.deltas, onto=onto, dtype=getattr(torch, dtype))

    def can_merge(self, onto: Onto) -> bool:
        """Whether the run quantized its base ("nf4"), or the base is not stored in 4 bit ("original")."""
        if onto == "nf4":
            return self.base.record.scheme is not None
        return not any(is_stored_quantized(self.base.stored, name) for name in self.base.info)


def open_sources(request: Request, reporter: Reporter) -> Sources:
    """Find and check the base, the adapter and the held-out rows of a run. UserError where the base is not the one that was
    trained on, or a part of the run is missing or damaged.
    """
    run = request.run
    recipe, record = load_recipe(run.recipe), read_record(run.base)
    folder = request.options.base or find_base(record, reporter.progress)
    config = normalize_config(read_json_object(folder / CONFIG, ExportError, DOWNLOAD_AGAIN))
    architecture = parse_architecture(config, str(folder))
    _check_config(folder, config, run.adapter)
    check_checkpoint(str(folder), architecture)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cached = open_weights(run.quantized_base) if run.quantized_base.is_dir() else None
    stored = open_weights(folder)
    if (scheme := stored_scheme(stored)) is not None:  # transformers loads these weights as they are, whatever the recipe says
        record = replace(record, scheme=scheme)
        kind = f"{scheme.quant_type.upper()}, {'double' if scheme.double_quant else 'single'} quantization"
        reporter.info(f"The base is stored in 4 bit ({kind}): the adapter is merged onto these weights")
    base = RecordedBase(stored, record, cached=cached, device=device)
    reporter.progress("Comparing the base with the run's record", 0, None)
    base.compare_plain()
    reporter.progress("Comparing the base with the run's record", 1, 1)
    base.check_weights(folder)
    if base.left_out:
        count = format_count(len(base.left_out), "tensor")
        reporter.info(f"Left out, because the model does not read it: {count} of the base, first {base.left_out[0]}")
    ending = _read_ending(run, folder, recipe.data.chat_template)
    check_trained_with(folder, run.adapter, ending.template)
    return Sources(
        folder=folder,
        config=config,
        architecture=architecture,
        base=base,
        adapter=run.adapter,
        deltas=read_deltas(run.adapter, architecture),
        rows=_read_rows(run.held_out) if request.options.verify else (),
        ending=ending,
        device=device,
    )


def _read_ending(run: RunFolder, folder: Path, chat_template: str) -> EndOfTurn:
    """What ends a turn, by the base in `folder`; ExportError where its tokenizer is another one, or cannot be read."""
    try:
        template = str(run.chat_template) if run.chat_template.is_file() else chat_template
        return read_end_of_turn(load_tokenizer(Model(name=str(folder))), template)
    except (ModelError, DataError) as error:
        check_trained_with(folder, run.adapter)  # names the file, where one was changed
        if isinstance(error, DataError):
            raise
        # Its hint names the recipe, which is not what an export can change.
        raise ExportError(error.message, "Give the complete base that was trained on with --base.") from error


def find_base(record: BaseRecord, progress: Progress) -> Path:
    """The directory of a run's base; a model of the hub that is not in the cache is downloaded at the recorded commit."""
    if Path(record.name).is_dir():
        return Path(record.name)
    if record.revision is None:
        raise ExportError(f"{record.name}, the base that was trained on, is missing.", "Give its folder with --base.")
    progress("Downloading the base", 0, None)
    try:
        folder = snapshot_download(record.name, revision=record.revision, allow_patterns=list(PATTERNS))
    except LocalEntryNotFoundError as error:
        message = f"The base {record.name} at commit {record.revision} is not on this computer, and the hub cannot be reached."
        raise ExportError(message, "Check the connection, or give its folder with --base.") from error
    except (HfHubHTTPError, OSError) as error:
        message = f"The base {record.name} at commit {record.revision} cannot be downloaded: {first_line(error)}."
        raise ExportError(message, "Give its folder with --base.") from error
    progress("Downloading the base", 1, 1)
    return Path(folder)


def _check_config(folder: Path, config: dict[str, Any], adapter: Path) -> None:
    """Compare a base's config.json with the run's copy, which older runs do not have, as the model reads both."""
    if not (adapter / CONFIG).is_file():
        return
    trained = read_json_object(adapter / CONFIG, ExportError, DOWNLOAD_AGAIN)
    settings: list[dict[str, Any]] = []
    for path, stored in ((adapter / CONFIG, trained), (folder / CONFIG, config)):
        flat: dict[str, Any] = {}
        for key, value in portable_config(stored, path).items():  # one form for every version of transformers that wrote it
            if key not in LOADING_KEYS and not key.startswith("_"):
                flat |= {f"{key}.{part}": v for part, v in value.items()} if isinstance(value, dict) else {key: value}
        settings.append(flat)
    was, now = settings
    for key in sorted(was | now):
        if was.get(key) != now.get(key):
            path, value, trained_value = folder / CONFIG, repr(now.get(key)), repr(was.get(key))
            message = f"{path} is not what was trained with: {key} is {value}, and was {trained_value}."
            raise ExportError(message, "Put it back, or give the folder of the right base with --base.")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{**row, "input_ids": list(row["input_ids"]), "labels": list(row["labels"])} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"The held-out rows in {path} cannot be read: {first_line(error)}."
        raise ExportError(message, "Export with --no-verify.") from error


def check_adapter(run: RunFolder, report: Mapping[str, Any]) -> None:
    """Raise ExportError for an adapter file that has not the checksum in the run's report; older runs have none."""
    for name, recorded in (report.get("adapter") or {}).items():
        if sha256_file(path := run.adapter / name) == recorded:
            continue
        message = f"{path} is not the file that the run wrote: its SHA-256 is not the one in {run.report.name}."
        copies = [copy for copy in sorted(run.checkpoints.glob(f"*/{name}")) if sha256_file(copy) == recorded]
        if copies:
            raise ExportError(message, f"Copy {copies[0]} there, or train again: qlora-phi3 run {run.recipe}")
        raise ExportError(message, f"Put the run's own back, or train again: qlora-phi3 run {run.recipe}")


def free_ram(max_ram_bytes: int | None = None) -> int:
    """Bytes of memory that this process may take in addition to what it has, if it may have `max_ram_bytes` in all.

    psutil does not know the memory limit of a container (control group): give it with --max-ram.
    """
    free = int(psutil.virtual_memory().available) - MARGIN_BYTES
    if max_ram_bytes is not None:
        free = min(free, max_ram_bytes - int(psutil.Process().memory_info().rss))
    return max(0, free)


def check_memory(max_ram_bytes: int | None, proved: Sources | None = None) -> None:
    """Raise ExportError for an export that needs more memory than --max-ram; `proved` are the sources of one with a proof."""
    if max_ram_bytes is None:
        return
    used = psutil.Process().memory_info().rss
    merge = needed = used + MERGE_BYTES
    if proved is not None:
        info = proved.base.info
        largest = max(prod(info[name].shape) for name in info if name not in (EMBEDDING, HEAD))
        copies = 2 if all(delta.magnitude is None for delta in proved.deltas.targets.values()) else 4
        needed = max(merge, used + copies * 4 * largest + PROOF_BYTES)
    if max_ram_bytes >= needed:
        return
    message = f"--max-ram {format_gib(max_ram_bytes)} is too little: this export needs about {format_gib(needed)}."
    if merge < 0.9 * needed:  # an estimate is not exact to the MiB
        raise ExportError(message, f"Give that much, or --no-verify, which needs {format_gib(merge)}.")
    raise ExportError(message, "Give that much.")
