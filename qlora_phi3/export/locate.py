"""Where the base of a run lies: the folder it was trained on, or the hub's very commit."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from qlora_phi3.errors import ExportError
from qlora_phi3.export.base import BaseRecord
from qlora_phi3.export.files import COMPANIONS

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
