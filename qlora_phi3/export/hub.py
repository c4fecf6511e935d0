"""Publish an export on the hub. The token comes from the environment or the hub's own store, and is sent to the hub only."""

from collections.abc import Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from qlora_phi3.errors import ExportError, first_line

#: Raised when the hub refuses or cannot be reached; the errors of its HTTP library (httpx, then httpx2) are not OSErrors.
HUB_ERRORS = (TransportError, OSError)


def check_push(repository: str, *, private: bool) -> None:
    """Raise ExportError for what can be known before hours of work: the name, the token, who could read the repository."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ExportError(f"--push {repository} is not a hub id: {error}", "Write --push user/name.") from error
    if repository.count("/") != 1:
        raise ExportError(f"--push {repository} names no owner.", "Write --push user/name.")
    if get_token() is None:
        raise ExportError("There is no token for the hub.", "Run `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    try:
        api.whoami()
    except HfHubHTTPError as error:
        raise ExportError("The hub refuses your token.", "Run `hf auth login` again.") from error
    except HUB_ERRORS as error:
        raise ExportError(f"The hub cannot be reached: {first_line(error)}.", "Export without --push.") from error
    try:
        with suppress(RepositoryNotFoundError):  # it will be created
            _check_private(api, repository, private=private)
    except HUB_ERRORS as error:
        raise ExportError(f"{repository} cannot be looked up: {first_line(error)}.", "Try again later.") from error


def push(folder: Path, names: Sequence[str], repository: str, *, private: bool) -> str:
    """Upload the files of these names from a finished export; return the address of its page. ExportError where the hub refuses
    or cannot be reached; the export stays where it is.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        _check_private(api, repository, private=private)  # an existing repository keeps its setting
        info = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[escape(name) for name in names],
            commit_message="Exported with qlora-phi3",
        )
    except HUB_ERRORS as error:
        options = "".join(f" --include '{name}'" for name in names) + (" --private" if private else "")
        hint = f"The export is complete in {folder}; push it with: hf upload {repository} {folder} .{options}"
        raise ExportError(f"{repository} could not be pushed: {first_line(error)}.", hint) from error
    return str(info.repo_url)


def _check_private(api: HfApi, repository: str, *, private: bool) -> None:
    if private and not api.repo_info(repository).private:
        hint = "Push to another name, or make it private in its settings."
        raise ExportError(f"--private: {repository} exists and is public.", hint)
