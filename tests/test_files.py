"""Files and directories that are complete or absent, whatever fails while they are written."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qlora_phi3 import files
from qlora_phi3.errors import ExportError, ModelError, RunError
from qlora_phi3.files import (
    atomic_dir,
    atomic_file,
    atomic_write,
    disk_errors,
    flush_to_disk,
    read_json_object,
    remove,
    replace_dir,
    sha256_file,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def refuse(*arguments, **options):
    raise FULL


def test_a_file_is_replaced_at_the_end_and_nothing_else_is_left(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old", encoding="utf-8")
    with atomic_file(target) as staging:
        staging.write_text("new", encoding="utf-8")
        assert target.read_text(encoding="utf-8") == "old"
    assert target.read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_a_file_that_fails_leaves_the_old_one(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old", encoding="utf-8")

    def write_half():
        with atomic_file(target) as staging:
            staging.write_text("half", encoding="utf-8")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert (target.read_text(encoding="utf-8"), names(tmp_path)) == ("old", ["a.txt"])


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files, "flush_to_disk", lambda path: seen.append((path.name, (tmp_path / "a.txt").exists())))
    monkeypatch.setattr(files, "flush_directory", lambda path: seen.append((path, (tmp_path / "a.txt").exists())))
    atomic_write(tmp_path / "a.txt", "new")
    assert seen == [(f".a.txt.{os.getpid()}.partial", False), (tmp_path, True)]


def test_text_is_written_in_utf_8_with_the_line_ends_it_has(tmp_path):
    atomic_write(tmp_path / "a.txt", "é\nb\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\nb\n".encode()


def test_a_directory_is_replaced_at_the_end_and_nothing_else_is_left(tmp_path):
    target = tmp_path / "adapter"
    for text in ("first", "second"):
        with atomic_dir(target) as staging:
            (staging / text).touch()
            assert not (target / text).exists()
        assert (names(target), names(tmp_path)) == ([text], ["adapter"])


def test_an_old_directory_is_not_deleted_before_the_new_one_is_in_place(tmp_path, monkeypatch):
    target, staging = tmp_path / "adapter", tmp_path / "new"
    for path in (target, staging):
        path.mkdir()
        (path / "weights").write_text(path.name, encoding="utf-8")
    rename = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: refuse() if self == staging else rename(self, to))
    with pytest.raises(OSError, match="No space"):
        replace_dir(staging, target)
    assert (target / "weights").read_text(encoding="utf-8") == "adapter"
    assert names(tmp_path) == ["adapter", "new"]


def test_a_directory_that_fails_leaves_the_old_one(tmp_path):
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "weights").touch()

    def write_half():
        with atomic_dir(target) as staging:
            (staging / "half").touch()
            raise FULL

    with pytest.raises(OSError, match="No space"):
        write_half()
    assert (names(target), names(tmp_path)) == (["weights"], ["adapter"])


def test_what_a_killed_process_left_is_not_in_the_next_directory(tmp_path):
    (tmp_path / ".adapter.partial").mkdir()
    (tmp_path / ".adapter.partial" / "half").touch()
    with atomic_dir(tmp_path / "adapter") as staging:
        assert names(staging) == []


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (FULL, "Free disk space, or choose another directory."),
        (SafetensorError("Error while serializing: I/O error"), "Free disk space, or choose another directory."),
        (
            RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0"),
            "Free disk space, or choose another directory.",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "Check that the directory exists and that you may write to it, or choose another directory.",
        ),
    ],
)
def test_a_disk_error_is_one_line_with_the_path_and_a_hint_for_its_cause(error, hint):
    with (
        pytest.raises(ExportError, match=r"^out/model cannot be written: ") as caught,
        disk_errors(Path("out/model"), ExportError),
    ):
        raise error
    assert caught.value.hint == hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("expected scalar type Float"), NotImplementedError(), ValueError("x")])
def test_another_error_while_saving_is_not_called_a_full_disk(error):
    with pytest.raises(type(error)) as caught, disk_errors(Path("out")):
        raise error
    assert caught.value is error


def test_a_full_disk_leaves_the_old_text_and_says_how_to_continue(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old", encoding="utf-8")
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(RunError) as caught:
        atomic_write(tmp_path / "a.txt", "new")
    assert caught.value.hint == "Free disk space, then continue with --resume."
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"


def test_every_file_of_a_directory_is_flushed_and_no_link_is_followed(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").touch()
    (tmp_path / "inner" / "b").touch()
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    flush_to_disk(tmp_path)
    wanted = [tmp_path, tmp_path / "a", tmp_path / "inner", tmp_path / "inner" / "b"]
    assert sorted(flushed) == sorted(path.stat().st_ino for path in wanted)


def test_remove_takes_files_directories_and_links_but_not_what_a_link_points_to(tmp_path):
    (tmp_path / "full" / "inner").mkdir(parents=True)
    (tmp_path / "full" / "inner" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "full", target_is_directory=True)
    for name in ("link", "full/inner/file", "missing"):
        remove(tmp_path / name)
    assert (names(tmp_path), names(tmp_path / "full")) == (["full"], ["inner"])
    remove(tmp_path / "full")
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000, None])
def test_what_is_no_json_object_is_refused_with_the_class_and_hint_of_the_caller(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        read_json_object(path, ModelError, "Download it again.")
    assert caught.value.hint == "Download it again."


def test_a_json_object_and_a_checksum_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "é"}', encoding="utf-8")
    assert read_json_object(tmp_path / "a.json", ModelError, "") == {"a": "é"}
    (tmp_path / "empty").touch()
    assert sha256_file(tmp_path / "empty").startswith("e3b0c44298fc1c149afbf4c8996fb924")
