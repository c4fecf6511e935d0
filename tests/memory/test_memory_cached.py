"""Saved results of `vram-check`: found while what they depend on is unchanged, and never a reason to fail."""

import os
from pathlib import Path

import pytest

from qlora_phi3.files import user_cache_dir, user_state_dir
from qlora_phi3.memory import cached


def test_a_result_is_found_while_the_files_it_was_read_from_are_unchanged(tmp_path):
    path, read, absent = tmp_path / "cache" / "key.json", tmp_path / "config.json", tmp_path / "tokenizer.json"
    read.write_text("{}", encoding="utf-8")
    cached.save_cached(path, {"a": 1}, [read, absent])
    assert cached.find_cached(path) == {"a": 1}
    assert cached.find_cached(tmp_path / "another.json") is None
    absent.write_text("{}", encoding="utf-8")
    assert cached.find_cached(path) is None
    absent.unlink()
    assert cached.find_cached(path) == {"a": 1}
    read.write_text("{ }", encoding="utf-8")
    assert cached.find_cached(path) is None


TEXTS = ("", "{", "[]", "null", "[" * 100_000, '{"result": 1}', '{"result": 1, "files": 3, "sha256": ""}')


@pytest.mark.parametrize("content", [*(text.encode() for text in TEXTS), b"\xff", os.mkdir, os.mkfifo])
def test_a_damaged_file_of_the_cache_is_no_result_and_is_replaced(tmp_path, content):
    path = tmp_path / "key.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    assert cached.find_cached(path) is None
    cached.save_cached(path, 2, [])
    assert cached.find_cached(path) == 2


def test_a_result_with_one_changed_bit_is_no_result(tmp_path):
    path = tmp_path / "key.json"
    cached.save_cached(path, [{"gib": 5.25}], [])
    content = path.read_bytes()
    for position in range(len(content) * 8):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        assert cached.find_cached(path) in (None, [{"gib": 5.25}])


def test_the_key_changes_with_the_question_and_with_a_library(monkeypatch):
    key = cached.cache_key({"recipe": "a"})
    assert key == cached.cache_key({"recipe": "a"}) != cached.cache_key({"recipe": "b"})
    monkeypatch.setattr(cached, "read_versions", lambda: {"torch": "9.9"})
    assert cached.cache_key({"recipe": "a"}) != key


def test_the_oldest_results_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(cached, "MAX_RESULTS", 2)
    for number in range(4):
        path = tmp_path / "cache" / f"{number}.json"
        cached.save_cached(path, number, [])
        os.utime(path, (number, number))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["2.json", "3.json"]


def test_a_cache_that_cannot_be_written_is_ignored(tmp_path):
    path = tmp_path / "cache" / "key.json"
    path.parent.write_text("a file", encoding="utf-8")
    cached.save_cached(path, 1, [])
    assert cached.find_cached(path) is None


def test_state_and_cache_are_in_the_directories_of_the_system(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr("sys.platform", "linux")
    assert user_state_dir() == tmp_path / "state" / "qlora-phi3"
    assert user_cache_dir().name == "qlora-phi3"
