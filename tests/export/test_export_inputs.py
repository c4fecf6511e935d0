"""The memory that an export may take is what is free, within --max-ram."""

from types import SimpleNamespace

import psutil

from qlora_phi3.export.inputs import MARGIN_BYTES, free_ram
from qlora_phi3.units import GIB


def test_free_memory_is_what_is_available_less_a_margin_and_within_the_limit_what_the_process_has_not_taken(
    monkeypatch,
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * GIB))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=3 * GIB)))
    assert free_ram() == 20 * GIB - MARGIN_BYTES
    assert free_ram(8 * GIB) == 5 * GIB
    assert free_ram(2 * GIB) == 0
    assert free_ram(99 * GIB) == 20 * GIB - MARGIN_BYTES
