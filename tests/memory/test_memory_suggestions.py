"""What `vram-check` suggests for a recipe that does not fit, and the recipe that `vram-check --fit` writes."""

import re
from dataclasses import replace

import pytest
from tiny_check import GPU, WIDE, build_checker, gpu_with

from qlora_phi3.hardware.gpu import GpuProcess
from qlora_phi3.memory.suggestions import write_fitted
from qlora_phi3.memory.vram_check import VramChecker
from qlora_phi3.recipe.load import load_recipe
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
    report = report_on(checker, gpu_with(checker, 100))
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
    report = report_on(checker, gpu_with(checker, 75))
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


TEXT = """# Mine
[model]
name = "tiny"  # the base

[data]
train = "rows.jsonl"
[training]
optim = "auto"     # let it choose
batch_size = 4
max_length = 256
"""


def write_fit(tmp_path, report, text=TEXT, overrides=(), target="fit.toml"):
    source, target = tmp_path / "mine.toml", tmp_path / target
    source.write_text(text, encoding="utf-8")
    target.parent.mkdir(exist_ok=True)
    recipe = load_recipe(source, overrides)
    return recipe, write_fitted(recipe, text, overrides, report, source=source, target=target), target


def test_the_fitted_recipe_has_its_authors_lines_and_gives_the_same_plan(tmp_path, checker, report):
    _, fitted, target = write_fit(tmp_path, report)
    text = target.read_text(encoding="utf-8")
    for line in ("# Mine", 'name = "tiny"  # the base', "batch_size = 4", "# let it choose"):
        assert line in text
    assert "RTX 3070 8GB by qlora-phi3" in text
    assert load_recipe(target) == fitted
    again = VramChecker(replace(checker.context, recipe=load_recipe(target)), lambda _: None)
    ignored = {"created": "", "reasons": {}}
    assert replace(again.report(GPU, GPU.free_bytes), **ignored) == replace(report, **ignored)


def test_a_recipe_of_inline_tables_and_dotted_keys_is_fitted(tmp_path, report):
    text = 'model = { name = "tiny" }\ndata.train = "rows.jsonl"\ntraining = { batch_size = 4, max_length = 256 }\n'
    recipe, fitted, target = write_fit(tmp_path, report, text)
    assert load_recipe(target) == fitted
    assert fitted.training.optim == report.optim
    assert fitted.training.max_length == recipe.training.max_length


def test_what_the_command_line_changed_is_in_the_fitted_recipe(tmp_path, report):
    recipe, _, target = write_fit(tmp_path, report, overrides=("lora.r=8", "training.optim=adamw_torch"))
    assert load_recipe(target).lora.r == recipe.lora.r == 8
    assert load_recipe(target).training.optim == "adamw_torch"


def test_files_are_found_from_the_fitted_recipes_directory(tmp_path, report):
    (tmp_path / "rows.jsonl").write_text("{}", encoding="utf-8")
    _, _, target = write_fit(tmp_path, report, target="other/fit.toml")
    train = load_recipe(target).data.train
    assert train == "../rows.jsonl"
    assert (target.parent / train).is_file()


def test_a_file_that_exists_is_not_overwritten(tmp_path, report):
    (tmp_path / "fit.toml").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError):
        write_fit(tmp_path, report)
    assert (tmp_path / "fit.toml").read_text(encoding="utf-8") == "mine"
