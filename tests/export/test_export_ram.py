"""What may still be taken is the least of what is free, what the container allows, and what was asked for."""

from types import SimpleNamespace

import psutil
import pytest

from qlora_phi3.export import inputs as ram
from qlora_phi3.export.inputs import MARGIN_BYTES, free_ram
from qlora_phi3.units import GIB

V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.fixture(autouse=True)
def computer(monkeypatch, tmp_path):
    """One with 20 GiB free, on which this process holds 3, in no control group."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * GIB))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=3 * GIB)))
    monkeypatch.setattr(ram, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(ram, "GROUPS", tmp_path / "groups")


def put_group(folder, names, *, limit, taken, cached=0):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, taken), strict=False):
        (folder / name).write_text(f"{value}\n", encoding="utf-8")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n", encoding="utf-8")


def test_without_any_limit_it_is_what_is_free_less_a_margin():
    assert free_ram() == 20 * GIB - MARGIN_BYTES


def test_of_a_limit_on_the_process_what_it_holds_is_taken_off():
    assert free_ram(8 * GIB) == 5 * GIB
    assert free_ram(2 * GIB) == 0
    assert free_ram(99 * GIB) == 20 * GIB - MARGIN_BYTES


@pytest.mark.parametrize("membership", ["0::/", "0::/docker/c0ffee"], ids=["own root", "named as on the host"])
def test_a_containers_limit_counts_and_files_that_are_only_cached_are_free(tmp_path, membership):
    (tmp_path / "cgroup").write_text(membership + "\n", encoding="utf-8")
    put_group(tmp_path / "groups", V2, limit=8 * GIB, taken=6 * GIB, cached=4 * GIB)
    assert free_ram() == 6 * GIB - MARGIN_BYTES


def test_the_tightest_of_nested_groups_counts_and_max_is_no_limit(tmp_path):
    (tmp_path / "cgroup").write_text("0::/slice/job\n", encoding="utf-8")
    put_group(tmp_path / "groups" / "slice", V2, limit=4 * GIB, taken=1 * GIB)
    put_group(tmp_path / "groups" / "slice" / "job", V2, limit="max", taken=1 * GIB)
    assert free_ram() == 3 * GIB - MARGIN_BYTES


def test_the_first_version_of_control_groups_is_read_too(tmp_path):
    (tmp_path / "cgroup").write_text("5:devices:/x\n4:memory:/job\n0::/\n", encoding="utf-8")
    put_group(tmp_path / "groups" / "memory" / "job", V1, limit=5 * GIB, taken=2 * GIB, cached=1 * GIB)
    assert free_ram() == 4 * GIB - MARGIN_BYTES
