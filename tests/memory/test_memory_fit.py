"""The recipe that `vram-check --fit` writes."""

from dataclasses import replace

import pytest
from tiny_check import GPU

from qlora_phi3.memory.fit import write_fitted
from qlora_phi3.memory.vram_check import VramChecker
from qlora_phi3.recipe.load import load_recipe

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
