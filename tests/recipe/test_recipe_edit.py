"""Setting keys in the text of a recipe: comments and order stay, and the text gives the recipe that was chosen."""

import tomllib

import pytest

from qlora_phi3.errors import RecipeError
from qlora_phi3.recipe import edit
from qlora_phi3.recipe.edit import Choice, fit_recipe
from qlora_phi3.recipe.schema import Recipe

SECTIONS = """# Mine
[model]
name = "tiny"  # the base
[data]
train = "a#b.jsonl" # optim = "auto"

# how it is trained
[training]
batch_size = 4
  optim="auto"       # mine

# which layers
[lora]
target_modules = [ # the layers
  "qkv_proj",
  "o_proj",
] # both
# end of lora

[lora.rank_pattern]
o_proj = 4 # more

# the end"""
CHOICES = [
    Choice("training", "optim", "adamw_8bit", "why"),
    Choice("training", "batch_size", 8, "rows"),
    Choice("training", "packing", False, ""),
    Choice("lora", "target_modules", ["qkv_proj"], "fewer"),
    Choice("lora", "rank_pattern", {"o_proj": 2, "a.b": 3}, "ranks"),
    Choice("lora", "use_dora", True, "dora"),
    Choice("data", "max_rows", 7, "few"),
    Choice("memory", "budget", "11GiB", "enough"),
]


def fit(text, choices, heading="Why"):
    """The edited text without the heading; it must give the recipe that was chosen."""
    recipe = Recipe.model_validate(tomllib.loads(text.removeprefix("\ufeff")))
    chosen, written = fit_recipe(recipe, text, choices, heading)
    assert Recipe.model_validate(tomllib.loads(written)) == chosen
    for choice in choices:
        value = getattr(getattr(chosen, choice.table), choice.key)
        assert value == choice.value
    assert written.startswith(f"# {heading}\n\n")
    return written.removeprefix(f"# {heading}\n\n")


def test_values_change_and_every_other_line_stays_where_it_was():
    assert (
        fit(SECTIONS, CHOICES)
        == """# Mine
[model]
name = "tiny"  # the base
[data]
train = "a#b.jsonl" # optim = "auto"
max_rows = 7                        # few

# how it is trained
[training]
batch_size = 8                      # rows
# why
  optim="adamw_8bit"       # mine
packing = false

# which layers
[lora]
# fewer
target_modules = ["qkv_proj"] # both
# end of lora
use_dora = true                     # dora

[lora.rank_pattern] # ranks
o_proj = 2 # more

# the end
"a.b" = 3

[memory]
budget = "11GiB"                    # enough
"""
    )


def test_dotted_keys_and_inline_tables_stay_what_they_are():
    text = """model = { name = "tiny" } # the base
data.train = "rows.jsonl"  # mine
training = { batch_size = 4, max_length = 256 } # short
lora.r = 4 # small
lora.rank_pattern.o_proj = 4
"""
    written = fit(text, CHOICES)
    for line in ('model = { name = "tiny" } # the base', 'data.train = "rows.jsonl"  # mine', "lora.r = 4 # small"):
        assert line in written.splitlines()
    lines = written.splitlines()
    training = next(number for number, line in enumerate(lines) if line.startswith("training = { batch_size = 8"))
    assert lines[training - 2 : training] == ["# optim: why", "# batch_size: rows"]
    assert lines[training].endswith("} # short")
    assert "[training]" not in written


def test_one_dotted_key_does_not_rewrite_the_recipe():
    text = SECTIONS.replace("[data]\ntrain", "[lora]\nr = 2\n[data]\ntrain").replace("\n# which layers\n[lora]", "")
    text = text.partition("target_modules")[0] + "lr_scheduler_kwargs.num_cycles = 0.5 # half\n"
    written = fit(text, [Choice("training", "optim", "adamw_8bit", "why")])
    assert written.splitlines() == text.replace('  optim="auto"', '# why\n  optim="adamw_8bit"').splitlines()


def test_a_table_whose_section_comes_before_it_is_edited_in_place():
    text = "[lora.rank_pattern]\no_proj = 4\n[model]\nname = 't'\n[data]\ntrain = 'x'\n[lora] # here\nr = 8"
    written = fit(text, [Choice("lora", "r", 4, "small"), Choice("lora", "use_dora", True, "dora")])
    assert "[lora] # here\nr = 4                               # small\nuse_dora = true" in written


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_text_of_a_windows_editor_gets_unix_line_ends_and_no_mark(end):
    text = "\ufeff[model]\r\nname = 't' # the base\r\n[data]\r\ntrain = 'x'" + end
    written = fit(text, [Choice("data", "max_rows", 7, "few")])
    assert written == "[model]\nname = 't' # the base\n[data]\ntrain = 'x'\nmax_rows = 7                        # few\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('optim = "auto"', ['optim = "adamw_8bit"                # why']),
        ("optim = 'auto'", ['optim = "adamw_8bit"                # why']),
        ('optim = "auto" # mine', ["# why", 'optim = "adamw_8bit" # mine']),
        ('optim = """auto"""', ['optim = "adamw_8bit"                # why']),
        ("", ['optim = "adamw_8bit"                # why']),
    ],
)
def test_the_reason_stands_behind_the_value_or_above_the_authors_comment(line, expected):
    start = "[model]\nname = 't'\n[data]\ntrain = 'x'\n[training]\n"
    assert fit(f"{start}{line}", [Choice("training", "optim", "adamw_8bit", "why")]) == start + "\n".join(expected) + "\n"


def test_of_two_choices_for_a_key_the_last_counts():
    start = "[model]\nname = 't'\n[data]\ntrain = 'x'\n"
    recipe = Recipe.model_validate(tomllib.loads(start))
    choices = [Choice("lora", "r", 4, "first"), Choice("lora", "r", 8, "second")]
    chosen, written = fit_recipe(recipe, start, choices, "Why")
    assert chosen.lora.r == 8
    assert written.endswith("[lora]\nr = 8                               # second\n")


def test_an_edit_that_would_give_another_recipe_is_refused(monkeypatch):
    monkeypatch.setattr(edit, "_set", lambda document, choice: None)
    recipe = Recipe.model_validate(tomllib.loads(SECTIONS))
    with pytest.raises(RecipeError) as caught:
        fit_recipe(recipe, SECTIONS, CHOICES, "Why")
    assert caught.value.exit_code == 2
