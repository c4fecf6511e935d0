"""The wheel has every module and every file that is read, and recipes that ship are found by name from any directory."""

import shutil
import tomllib
from pathlib import Path

import pytest
from workshop import call

from qlora_phi3.cli import options
from qlora_phi3.cli.options import find_recipe, shipped_files

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
SHIPPED = {path.stem for path in (ROOT / "recipes").glob("*.toml")}


def test_the_wheel_lists_every_directory_with_modules():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "qlora_phi3").rglob("*.py")}
    assert set(SETTINGS["packages"]) == found | {"qlora_phi3.recipes", "qlora_phi3.docs"}


def test_the_wheel_has_every_file_that_is_no_module():
    package = ROOT / "qlora_phi3"
    listed = {path for pattern in SETTINGS["package-data"]["qlora_phi3"] for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert listed == others
    assert SETTINGS["package-dir"] == {"qlora_phi3.recipes": "recipes", "qlora_phi3.docs": "docs"}
    assert SETTINGS["package-data"]["qlora_phi3.docs"] == ["*.md"]
    assert {
        path.stem for pattern in SETTINGS["package-data"]["qlora_phi3.recipes"] for path in (ROOT / "recipes").glob(pattern)
    } == SHIPPED


def test_a_recipe_that_ships_is_found_by_name_from_any_directory(shop):
    assert shipped_files("recipes", "toml").keys() == SHIPPED
    assert find_recipe(Path("chat")) == ROOT / "recipes" / "chat.toml"
    assert '"HuggingFaceH4/ultrachat_200k"' in call("recipe", "check", "chat").stdout


def test_the_recipes_inside_an_installed_package_come_first(tmp_path, monkeypatch):
    inside = tmp_path / "qlora_phi3" / "recipes"
    inside.mkdir(parents=True)
    (inside / "own.toml").touch()
    monkeypatch.setattr(options, "__file__", str(tmp_path / "qlora_phi3" / "cli" / "options.py"))
    assert find_recipe(Path("own")) == inside / "own.toml"


@pytest.mark.parametrize("name", ["chat", "chat.toml", "recipes/chat", "./chat"])
def test_a_path_wins_over_a_name(shop, name):
    (shop.path / "chat").touch()
    assert find_recipe(Path(name)) == Path(name)


def test_a_recipe_that_ships_and_whose_data_is_missing_gets_the_usual_error(shop, monkeypatch):
    (shop.path / "installed").mkdir()  # as a wheel has it: in a checkout the demo may have made the data
    copied = shutil.copy(shipped_files("recipes", "toml")["demo"], shop.path / "installed" / "demo.toml")
    monkeypatch.setattr("qlora_phi3.cli.options.shipped_files", lambda *_: {"demo": copied})
    result = call("run", "demo")
    assert (result.exit_code, "There is no data file" in result.stderr) == (2, True)


def test_fit_writes_into_the_working_directory_what_it_fits_of_a_recipe_that_ships(shop, monkeypatch):
    from qlora_phi3.cli.vram_check import NEXT_TO_RECIPE, _fit_target
    from qlora_phi3.hardware.gpu import gpu_of_size

    target = _fit_target(find_recipe(Path("chat")), gpu_of_size(12 * 2**30), NEXT_TO_RECIPE)
    assert target == Path("chat-12gb.toml")
