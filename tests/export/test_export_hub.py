"""Publishing: what can fail is known before the work, and the token is nowhere to be seen."""

import pytest
from hub_server import ConnectError, FakeHub
from huggingface_hub.utils import filter_repo_objects

import qlora_phi3.export.hub as hub
from qlora_phi3.errors import ExportError

TOKEN = "hf_verysecret"


@pytest.fixture
def api(monkeypatch):
    api = FakeHub()
    monkeypatch.setattr(hub, "HfApi", api)
    monkeypatch.setattr(hub, "get_token", lambda: TOKEN)
    return api


@pytest.mark.parametrize("name", ["me/--x", "justme", "a/b/c", "me/my model"])
def test_a_name_that_is_no_hub_id_is_refused_before_anything(api, name):
    with pytest.raises(ExportError, match=f"--push {name}"):
        hub.check_push(name, private=False)
    assert api.calls == []


def test_without_a_token_it_says_how_to_get_one(api, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ExportError, match="hf auth login"):
        hub.check_push("me/phi", private=False)


def test_a_token_that_the_hub_refuses_is_not_shown(api):
    api.refuses = "whoami"
    with pytest.raises(ExportError) as caught:
        hub.check_push("me/phi", private=False)
    assert TOKEN not in str(caught.value)


def test_no_network_is_an_export_error_in_every_call_to_the_hub(api, tmp_path):
    assert not issubclass(ConnectError, OSError)
    api.unreachable = "whoami"
    with pytest.raises(ExportError, match=r"\[Errno -2\] Name or service not known\. "):
        hub.check_push("me/phi", private=False)
    api.unreachable = "repo_info"
    with pytest.raises(ExportError, match=r"me/phi .*\[Errno -2\] Name or service not known\. "):
        hub.check_push("me/phi", private=True)
    for step in ("create_repo", "repo_info", "upload_folder"):
        api.unreachable, api.private = step, True
        with pytest.raises(ExportError, match=r"me/phi .*\[Errno -2\] Name or service not known\. "):
            hub.push(tmp_path, ["README.md"], "me/phi", private=True)


def test_what_is_pushed_are_the_files_that_the_export_wrote(api, tmp_path):
    assert hub.push(tmp_path, ["README.md", "a[1]*.gguf"], "me/phi", private=True) == "the page"
    assert api.calls == ["create_repo", "repo_info", "upload_folder"]
    assert (api.options["repo_id"], api.options["folder_path"]) == ("me/phi", tmp_path)
    there = ["README.md", "a[1]*.gguf", "a1b.gguf", "secret.txt", "sub/README.md"]
    assert [*filter_repo_objects(there, allow_patterns=api.options["allow_patterns"])] == ["README.md", "a[1]*.gguf"]
    assert TOKEN not in str(api.options)


def test_private_is_refused_for_a_repository_that_is_public(tmp_path, monkeypatch):
    api = FakeHub(private=False)
    monkeypatch.setattr(hub, "HfApi", api)
    monkeypatch.setattr(hub, "get_token", lambda: TOKEN)
    with pytest.raises(ExportError, match="--private: me/phi"):
        hub.check_push("me/phi", private=True)
    with pytest.raises(ExportError, match="--private: me/phi"):
        hub.push(tmp_path, ["README.md"], "me/phi", private=True)
    assert "upload_folder" not in api.calls
    hub.check_push("me/phi", private=False)


def test_private_is_fine_for_a_new_repository_and_for_one_that_is_private(api, tmp_path):
    hub.check_push("me/phi", private=True)
    api.private = True
    hub.check_push("me/phi", private=True)
    assert hub.push(tmp_path, ["README.md"], "me/phi", private=True) == "the page"


def test_the_hint_of_a_push_that_failed_is_the_command_that_uploads_the_same_files(api, tmp_path):
    api.refuses = "upload_folder"
    with pytest.raises(ExportError) as caught:
        hub.push(tmp_path, ["README.md"], "me/phi", private=True)
    assert "403" in str(caught.value)
    assert str(caught.value).endswith(f"hf upload me/phi {tmp_path} . --include 'README.md' --private")
