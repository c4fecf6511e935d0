"""The files and folders that a recipe names: where they are looked for, and which are missing."""

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_phi3.errors import RecipeError, UserError
from qlora_phi3.family import read_architecture
from qlora_phi3.recipe.load import candidate_paths, check_model_limits, find_path, is_local_data, load_recipe, resolve_paths

SMALL = {"max_position_embeddings": 256, "num_hidden_layers": 2}


@pytest.fixture
def problems_of(tmp_path, monkeypatch):
    """The problems of a recipe in one folder, read from another."""
    (tmp_path / "recipes" / "base").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    for name in ("recipes/chats.jsonl", "here/more.csv"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "here")

    def read(text, *overrides):
        path = tmp_path / "recipes" / "mine.toml"
        path.write_text(text, encoding="utf-8")
        try:
            load_recipe(path, overrides, check_files=True)
        except RecipeError as error:
            return str(error).replace(f"{path}", "mine.toml")
        return ""

    return read


def recipe(model="./base", train="'chats.jsonl'", more=""):
    return f"[model]\nname = '{model}'\n[data]\ntrain = {train}\n{more}"


@pytest.mark.parametrize(
    "text",
    [
        recipe(),
        # in the recipe's directory, in the working directory, on the hub
        recipe(train="['chats.jsonl', 'more.csv', 'someone/chats']"),
        recipe(model="someone/model"),
        recipe(more="eval = 'nowhere.jsonl'\n[training]\ndo_eval = false"),
    ],
)
def test_a_file_that_exists_or_may_be_on_the_hub_is_no_problem(problems_of, text):
    assert problems_of(text) == ""


def test_every_missing_file_is_reported_together_with_the_other_problems(problems_of, tmp_path):
    text = recipe("../nowhere", "['chat.jsonl', 'gone/x.csv']", "eval = 'nowhere.parquet'\n[lora]\nrnk = 4")
    dirs = f"{tmp_path / 'recipes'} or {tmp_path / 'here'}."
    lines = problems_of(text, "data.eval=gone.csv").replace("/recipes/../", "/").splitlines()
    assert lines[0] == "mine.toml has 5 problems:"
    starts = [
        "mine.toml: [lora] has no key 'rnk'. ",
        "mine.toml: [model] name: There is no model folder ../nowhere. ",
        f"mine.toml: [data] train: There is no data file 'chat.jsonl' in {dirs} Did you mean chats.jsonl?",
        f"mine.toml: [data] train: There is no data file 'gone/x.csv' in {tmp_path / 'recipes/gone'} or {tmp_path}/here/gone.",
        f"--set data.eval=gone.csv: [data] eval: There is no data file 'gone.csv' in {dirs}",
    ]
    assert [line[: len(start)] for line, start in zip(lines[1:], starts, strict=True)] == starts


def test_a_missing_adapter_is_a_problem_and_a_hub_id_of_a_model_is_not(problems_of):
    assert "[model] adapter: There is no folder gone" in problems_of(recipe(more="[model.x]"), "model.adapter=gone")
    assert "[model] name" not in problems_of(recipe(model="someone/model"))


@pytest.mark.parametrize("text", ["model = 3\ndata = 4", "[model]\nname = 3\n[data]\ntrain = [1, '']\neval = {}"])
def test_a_value_of_a_wrong_type_is_not_looked_for(problems_of, text):
    assert "There is no" not in problems_of(text)


def test_without_check_files_nothing_is_looked_for(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(recipe(train="'nowhere.jsonl'"), encoding="utf-8")
    assert load_recipe(path).data.train == "nowhere.jsonl"


def test_a_relative_path_is_looked_for_in_the_recipes_directory_first(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert candidate_paths("a.csv", tmp_path / "recipes") == (tmp_path / "recipes" / "a.csv", Path("a.csv"))
    assert candidate_paths("~/a.csv", tmp_path / "recipes") == (tmp_path / "a.csv",)
    path = tmp_path / "recipes" / "mine.toml"
    path.write_text(recipe(model="base", train="['a.csv', 'b.csv', 'someone/c']"), encoding="utf-8")
    for name in ("recipes/a.csv", "here/a.csv", "here/b.csv", "here/base"):
        (tmp_path / name).touch()
    resolved = resolve_paths(load_recipe(path), path.parent)
    assert resolved.data.train == [str(tmp_path / "recipes/a.csv"), str(tmp_path / "here/b.csv"), "someone/c"]
    assert (resolved.model.name, resolved.model.adapter, resolved.data.eval) == (
        str(tmp_path / "here/base"),
        None,
        None,
    )


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "data/sub/gone", "~/gone", "C:\\gone", "gone.txt", "/gone"])
def test_a_name_that_looks_like_a_file_is_local_data(tmp_path, name):
    assert is_local_data(name, tmp_path)


@pytest.mark.parametrize("name", ["HuggingFaceH4/ultrachat_200k", "teknium/OpenHermes-2.5", "imdb"])
def test_a_hub_id_is_local_data_only_where_it_exists(tmp_path, name):
    assert not is_local_data(name, tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert is_local_data(name, tmp_path)


@pytest.mark.parametrize(("key", "value"), [("training.max_length", 512), ("memory.checkpoint_every_n_layers", 3)])
def test_what_the_model_does_not_have_is_refused_with_its_own_value(shop, key, value):
    architecture = read_architecture(str(shop.base))
    check_model_limits(load_recipe(shop.write()), architecture)
    with pytest.raises(UserError, match=f"{value}") as caught:
        check_model_limits(load_recipe(shop.path / "mine.toml", [f"{key}={value}"]), replace(architecture, **SMALL))
    assert caught.value.exit_code == 2


def test_a_file_below_an_unreadable_directory_is_not_called_missing(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    assert find_path("chats.jsonl", tmp_path) == tmp_path / "chats.jsonl"
