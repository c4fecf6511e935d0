"""The table of floors (docs/architecture.md), held against every import of the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qlora_phi3"
FLOORS = {
    "errors": 0,
    "sizes": 0,
    "cards": 0,
    "recipe": 1,
    "architecture": 1,
    "runfolder": 1,
    "dataset": 1,
    "device": 1,
    "setup": 1.1,
    "loss": 2.0,
    "attention": 2.1,
    "mlp": 2.1,
    "model": 2.2,
    "lora": 2.25,
    "step": 2.3,
    "checksum": 2.4,
    "quantized": 2.4,
    "adapters": 2.4,
    "memory": 3.0,
    "training": 3.1,
    "export": 3.5,
    "show": 4,
    "cli": 5,
    "__main__": 6,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
LIGHT = [path for path in FILES if FLOORS[path.relative_to(PACKAGE).parts[0].removesuffix(".py")] < 2]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("qlora_phi3.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_from_lower_floors_and_its_own_folder(path):
    own = room(path)
    too_high = {other for other in imported_rooms(path) if other != own and FLOORS[other] >= FLOORS[own]}
    assert not too_high


def test_every_room_stands_on_a_floor():
    assert {room(path) for path in FILES} == FLOORS.keys()


def test_init_files_define_nothing():
    for path in PACKAGE.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), path


def test_the_rooms_of_the_ground_floors_start_without_torch():
    modules = [path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".") for path in LIGHT]
    code = "; ".join(["import sys", *(f"import {name}" for name in modules), "print('torch' in sys.modules)"])
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_command_line_starts_without_anything_heavy():
    heavy = ["torch", "transformers", "trl", "peft", "pydantic", "rich", "numpy", "datasets", "bitsandbytes"]
    code = (
        "import sys; sys.argv = ['qlora-phi3', '--help']\n"
        "from qlora_phi3.cli.main import main\n"
        "main(standalone_mode=False)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("[]\n")
    assert "qlora-phi3 run recipes/chat.toml" in shown
