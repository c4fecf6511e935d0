"""Files and folders that a recipe names and that are not there."""

import pytest

from qlora_phi3.errors import RecipeError
from qlora_phi3.recipe.load import is_local_data, load_recipe


@pytest.fixture
def problems_of(tmp_path, monkeypatch):
    """What is told of a recipe in one folder, read from another."""
    (tmp_path / "recipes" / "base").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    for name in ("recipes/chats.jsonl", "here/more.csv"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "here")

    def tell(text, *overrides):
        path = tmp_path / "recipes" / "mine.toml"
        path.write_text(text, encoding="utf-8")
        try:
            load_recipe(path, overrides, is_file=is_local_data)
        except RecipeError as error:
            return str(error).replace(f"{path}", "mine.toml")
        return ""

    return tell


def recipe(model="./base", train="'chats.jsonl'", more=""):
    return f"[model]\nname = '{model}'\n[data]\ntrain = {train}\n{more}"


@pytest.mark.parametrize(
    "text",
    [
        recipe(),
        recipe(train="['chats.jsonl', 'more.csv', 'someone/chats']"),  # beside the recipe, here, and on the hub
        recipe(model="someone/model"),
        recipe(more="eval = 'nowhere.jsonl'\n[training]\ndo_eval = false"),
    ],
)
def test_what_is_there_or_may_be_on_the_hub_is_no_problem(problems_of, text):
    assert problems_of(text) == ""


def test_everything_missing_is_told_at_once_with_the_other_problems(problems_of, tmp_path):
    text = recipe("../nowhere", "['chat.jsonl', 'gone/x.csv']", "eval = 'nowhere.parquet'\n[lora]\nrnk = 4")
    places = f"{tmp_path / 'recipes'} or {tmp_path / 'here'}."
    told = problems_of(text, "data.eval=gone.csv").replace("/recipes/../", "/")
    assert told.splitlines() == [
        "mine.toml has 5 problems:",
        "mine.toml: [lora] has no key 'rnk'. Did you mean 'r'?",
        "mine.toml: [model] name: There is no model folder ../nowhere. Give a folder that exists, or a hub id such as "
        "microsoft/Phi-3-mini-4k-instruct.",
        f"mine.toml: [data] train: There is no file chat.jsonl in {places} Did you mean chats.jsonl?",
        f"mine.toml: [data] train: There is no file gone/x.csv in {tmp_path / 'recipes/gone'} or {tmp_path / 'here/gone'}.",
        f"--set data.eval=gone.csv: [data] eval: There is no file gone.csv in {places}",
    ]


@pytest.mark.parametrize("text", ["model = 3\ndata = 4", "[model]\nname = 3\n[data]\ntrain = [1, '']\neval = {}"])
def test_values_of_a_wrong_type_are_left_to_their_own_message(problems_of, text):
    assert "There is no" not in problems_of(text)


def test_nothing_is_looked_for_where_nobody_asks(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(recipe(train="'nowhere.jsonl'"), encoding="utf-8")
    assert load_recipe(path).data.train == "nowhere.jsonl"
