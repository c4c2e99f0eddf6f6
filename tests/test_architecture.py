"""Imports go down only, and the public names are a sorted promise."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import squall

PACKAGE = Path(squall.__file__).parent

FLOORS = [
    {"_process", "_types"},
    {"grid", "integrators", "losses"},
    {"data", "models", "systems"},
    {"evaluation", "training"},
    {"runs"},
    {"adapters", "study"},
    {"report"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py" and path.parent.name != "_moved"
)


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of squall that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "squall":
            names = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
            found |= set(names)
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("squall.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_the_floors_below(path):
    own = part(path)
    assert own in FLOOR, f"{own} has no floor: give it one here and in docs/architecture.md"
    for other in imported(path) - {own}:
        assert FLOOR[other] < FLOOR[own], f"{own} (floor {FLOOR[own]}) imports {other} (floor {FLOOR[other]})"


def test_the_lowest_floors_import_torch_and_numpy_only():
    for path in MODULES:
        if part(path) in ("integrators", "losses"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom | ast.Import):
                    roots = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                    assert not {str(root).split(".")[0] for root in roots} & {"scipy", "h5py", "matplotlib", "rich"}


def test_the_architecture_page_names_every_part():
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    for name in FLOOR:
        assert f"`{name}`" in page


def test_public_names_exist_and_are_sorted():
    """Constants, then classes, then functions, each in alphabetical order."""
    assert squall.__all__ == sorted(squall.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    for name in squall.__all__:
        assert getattr(squall, name) is not None


def test_every_public_name_of_a_module_exists():
    for path in MODULES:
        name = ".".join(("squall", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        module = __import__(name, fromlist=["_"])
        for public in getattr(module, "__all__", []):
            assert hasattr(module, public), f"{name}.{public}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("_moved/*.py")), ids=lambda path: path.stem)
def test_import_paths_of_earlier_versions_work_and_name_the_new_one(path):
    with pytest.warns(DeprecationWarning, match=f"squall.{path.stem} has moved to"):
        importlib.reload(importlib.import_module(f"squall.{path.stem}"))


def test_the_core_imports_torch_numpy_and_jaxtyping_only():
    program = "import squall, sys; squall.ImbalanceAwareLoss(); print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    heavy = "scipy h5py matplotlib plotly jinja2 rich yaml jsonargparse lightning_fabric safetensors"
    assert not {*loaded} & {*heavy.split()}
