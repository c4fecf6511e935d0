"""Which module may import which (docs/architecture.md), held against every import statement of the package.

Imports inside functions and under TYPE_CHECKING count: they hide a cycle, they do not remove it.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qlora_phi3"
#: Top-level modules and packages, lowest first. Each imports only from rows above it; a package also from itself.
LAYERS = (
    ("errors", "units"),
    ("files",),
    ("execution", "family", "hardware"),
    ("recipe",),
    ("reporter", "runfolder"),
    ("data",),
    # torch starts here
    ("model",),
    ("objectives",),
    ("step",),
    ("adapters",),
    ("memory", "inference"),
    ("evaluation",),
    ("training", "export"),
    ("ui",),
    ("cli",),
    ("__main__",),
)
FIRST_WITH_TORCH = "model"
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in FILES}


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, without the package's name: `memory.plan`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            module = (node.module or "").removeprefix(PACKAGE.name).lstrip(".")
            names |= {f"{module}.{alias.name}".lstrip(".") for alias in node.names} | {module}
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix(f"{PACKAGE.name}.") for alias in node.names}
    return names & MODULES.keys()


IMPORTS = {module: imported_modules(path) for module, path in MODULES.items()}


def find_cycle(imports: dict[str, set[str]]) -> list[str]:
    """One cycle of modules that import each other, or an empty list."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(imports[module]):
            if cycle := visit(other, [*path, module]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in sorted(imports) if (cycle := visit(module, []))), [])


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_layers_and_its_own_package(module):
    own = module.split(".")[0]
    higher = {name for name in IMPORTS[module] if name.split(".")[0] != own and LEVEL[name.split(".")[0]] >= LEVEL[own]}
    assert not higher


def test_no_modules_import_each_other_in_a_cycle():
    assert find_cycle(IMPORTS) == []


def test_a_cycle_through_three_modules_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_every_module_has_a_layer():
    assert {module.split(".")[0] for module in MODULES} == LEVEL.keys()


def test_init_files_define_nothing():
    for path in PACKAGE.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), path


def test_the_modules_below_model_start_without_torch():
    light = [module for module in MODULES if LEVEL[module.split(".")[0]] < LEVEL[FIRST_WITH_TORCH]]
    imports = (f"import {PACKAGE.name}.{module}" for module in light)
    code = "; ".join(["import sys", *imports, "print('torch' in sys.modules)"])
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
    assert "qlora-phi3 run my-chats.toml" in shown
