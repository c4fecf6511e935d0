"""What `vram-check` suggests for a recipe that does not fit."""

import re
from dataclasses import replace

from tiny_check import GPU, WIDE, build_checker, gpu_with

from qlora_phi3.hardware.gpu import GpuProcess
from qlora_phi3.units import GIB, MIB

PINS = {
    "max_length": 512,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
}


def report_on(checker, gpu):
    return checker.report(gpu, gpu.free_bytes)


def test_what_a_recipe_pins_is_given_back_first_and_what_each_change_saves_adds_up():
    checker = build_checker(WIDE, training=PINS)
    report = report_on(checker, gpu_with(checker, 140))
    assert report.verdict == "does_not_fit"
    first, second = report.suggestions
    assert 'gradient_checkpointing = "auto"' in first.text
    assert 'per_device_train_batch_size = "auto" and batch_size = 4' in second.text
    assert [first.fits, second.fits] == [False, True]
    assert report.no_fix_reason == ""


def test_programs_on_the_gpu_are_closed_before_the_recipe_is_changed(checker):
    game = GpuProcess(name="game.exe", pid=1, used_bytes=GIB)
    crowded = replace(GPU, is_local=True, free_bytes=200 * MIB, processes=(game,))
    (suggestion,) = checker.report(crowded, crowded.free_bytes).suggestions
    assert "game.exe" in suggestion.text
    assert suggestion.saved_bytes == GPU.total_bytes - 200 * MIB
    assert suggestion.fits
    assert suggestion.widens


def test_shorter_rows_come_after_everything_that_leaves_the_data_complete():
    changed = {"quantization": {"load_in_4bit": False}, "lora": {"modules_to_save": ["lm_head"]}}
    checker = build_checker(WIDE, training={"max_length": 512}, **changed)
    report = report_on(checker, gpu_with(checker, 80))
    keys = [re.search(r"load_in_4bit|modules_to_save|max_length", each.text)[0] for each in report.suggestions]
    assert keys == ["load_in_4bit", "modules_to_save", "max_length"]
    assert [each.fits for each in report.suggestions] == [False, False, True]
    assert all(each.saved_bytes > 0 for each in report.suggestions)


def test_a_rank_is_lowered_until_it_fits_in_one_line():
    checker = build_checker(WIDE, lora={"r": 512})
    report = report_on(checker, gpu_with(checker, 80))
    (suggestion,) = report.suggestions
    assert suggestion.fits
    rank = int(re.search(r"r = (\d+) instead of 512", suggestion.text)[1])
    assert rank in (8, 32)
    followed, before = (build_checker(WIDE, lora={"r": each}) for each in (rank, rank * 4))
    assert report_on(followed, gpu_with(followed, 80)).fits
    assert not report_on(before, gpu_with(before, 80)).fits


def test_a_row_that_no_change_makes_fit_names_the_size_of_gpu_that_would(checker):
    report = report_on(checker, gpu_with(checker, 1))
    assert report.verdict == "does_not_fit"
    assert not any(each.fits for each in report.suggestions)
    assert "256 tokens needs" in report.no_fix_reason
    assert "4 GB" in report.no_fix_reason
