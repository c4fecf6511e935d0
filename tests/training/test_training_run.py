"""What may differ between a run and its continuation, and complete runs that are equal where they must be."""

import pytest

from qlora_phi3.errors import RunError
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.runfolder import RunFolder, write_report
from qlora_phi3.training.report import run_versions
from qlora_phi3.training.run import check_resumable


class Warnings(list):
    """A reporter that collects warnings."""

    warning = list.append


@pytest.fixture
def check(shop):
    """Write the report of an interrupted run whose recipe, by table, is changed; check a continuation."""
    recipe = load_recipe(shop.write(lora={"r": 8}))

    def check(change=lambda tables: None, versions=None, status="interrupted"):
        tables = recipe.model_dump(mode="json")
        change(tables)
        folder, warnings = RunFolder(shop.path), Warnings()
        write_report(folder, {"status": status, "recipe": tables, "versions": versions or run_versions()})
        check_resumable(folder, recipe, warnings)
        return warnings

    return check


def test_the_same_recipe_is_resumed_without_a_word(check):
    assert check() == []


def test_a_key_that_a_newer_version_added_counts_as_its_default(check):
    def drop(*keys):
        def change(tables):
            for table, key in keys:
                del tables[table][key]

        return change

    check(drop(("training", "adam_beta1"), ("training", "gradient_checkpointing_kwargs"), ("lora", "use_dora")))
    with pytest.raises(RunError, match=r"\[lora\] r\.") as raised:  # the recipe says 8, the default is 16
        check(drop(("lora", "r")))
    assert "adam_beta1" not in raised.value.message


def test_a_table_that_a_newer_version_added_counts_as_its_defaults(check):
    check(lambda tables: tables.pop("memory"))
    with pytest.raises(RunError, match="bnb_4bit_compute_dtype"):
        check(lambda tables: tables.pop("quantization"))


def test_a_key_that_this_version_does_not_know_is_ignored(check):
    check(lambda tables: tables["lora"].update(unknown_key=3))
    check(lambda tables: tables.update(preferences={"beta": 0.1}))


def test_only_memory_may_differ(check):
    check(lambda tables: tables["memory"].update(micro_batch_tokens=64))
    with pytest.raises(RunError, match=r"\[lora\] lora_alpha, \[training\] seed"):
        check(lambda tables: (tables["lora"].update(lora_alpha=99), tables["training"].update(seed=1)))


def test_a_saved_value_that_this_version_refuses_is_named(check):
    with pytest.raises(RunError, match=r"lora\.r"):
        check(lambda tables: tables["lora"].update(r="many"))


def test_other_library_versions_are_reported_and_do_not_stop_a_resumed_run(check):
    (line,) = check(versions={**run_versions(), "transformers": "4.0.0", "gone": "1.0"})
    assert "transformers 4.0.0 -> " in line
    assert "gone" not in line
    assert check(versions={"python": run_versions()["python"]}) == []


def test_a_run_that_is_done_is_not_resumed(check):
    with pytest.raises(RunError, match="done"):
        check(status="done")
