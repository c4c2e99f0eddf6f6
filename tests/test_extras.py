"""The core alone, and what each missing extra answers."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from processes import run_program

import squall
from squall._process.extras import EXTRAS, MissingExtraError, explain_missing_extra

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
MODULE_OF = {  # where it differs from the name to install
    "anemoi-training": "anemoi",
    "basemap-data": "basemap_data",
    "lightning-fabric": "lightning_fabric",
    "neuraloperator": "neuralop",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "torch-harmonics": "torch_harmonics",
}
PACKAGE = Path(squall.__file__).parent

WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *place):
        return None if name.partition(".")[0] in MISSING else self.finder.find_spec(name, *place)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def python(program: str, missing: tuple[str, ...]) -> subprocess.CompletedProcess:
    """Run the program where these packages cannot be imported; torch is, unless it is one of them."""
    modules = () if "torch" in missing else ("torch",)
    return run_program(f"MISSING = {missing}\n{WITHOUT}\n{program}", modules=modules)


def test_torch_brings_no_package_of_an_extra():
    """Else the programs below would find what they are to miss."""
    packages = {name for names in EXTRAS.values() for name in names}
    result = run_program("import sys; print(*{name.partition('.')[0] for name in sys.modules})")
    assert not packages & {*result.stdout.split()}
    assert "torch" in result.stdout.split()


def requirements(extra: str) -> set[str]:
    names = {re.split(r"[\[<>=!]", text)[0] for text in PROJECT["optional-dependencies"][extra]}
    return {MODULE_OF.get(name, name) for name in names}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_holds_what_the_project_says(extra):
    assert set(EXTRAS[extra]) == requirements(extra)


def test_malicious_releases_are_excluded():
    for extra, name in (("train", "lightning-fabric"), ("lightning", "lightning")):
        (text,) = [text for text in PROJECT["optional-dependencies"][extra] if text.startswith(name)]
        assert "!=2.6.2,!=2.6.3" in text


def test_a_package_of_another_version_is_named_with_the_one_that_is_needed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: PROJECT["optional-dependencies"]["ray"])
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").touch()
    (tmp_path / "ray-2.0.0.dist-info").mkdir()
    (tmp_path / "ray-2.0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.0.0\n")
    (tmp_path / "ray-2.0.0.dist-info" / "top_level.txt").write_text("ray\n")
    for program in ("import ray; ray.remote", "from ray import remote", "import ray.actors"):
        message = r"ray 2\.0\.0 is installed, but squall needs ray >=2\.40; run: pip install 'squall\[ray\]'"
        with pytest.raises(MissingExtraError, match=message), explain_missing_extra():
            exec(program, {})
        sys.modules.pop("ray", None)


def test_every_import_is_of_the_core_or_of_an_extra():
    core = {"squall", "torch", "numpy", "jaxtyping", "packaging"}  # the last where it is there
    known = {*core, *sys.stdlib_module_names}.union(*EXTRAS.values())
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] in known, f"{path} imports {name}, which no extra installs"


def test_what_stands_beside_the_tests_imports_the_core_alone():
    """A test file whose package is missing is skipped; a conftest.py would end the collection."""
    core = {"squall", "squall.losses", "squall._process.extras", "torch", "numpy", "jaxtyping"}
    known = core | {"pytest", "hypothesis", "shortcuts", *sys.stdlib_module_names}
    for path in Path(__file__).parent.rglob("conftest.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= known, path
            elif isinstance(node, ast.ImportFrom):
                assert {node.module, str(node.module).partition(".")[0]} & known, path
                assert not str(node.module).startswith("squall.") or node.module in core, path


NEEDS = {
    "train": [
        "squall.train",
        "squall.evaluate",
        "squall.open_run",
        "squall.data.open",
        "squall.CahnHilliard().simulate(__import__('torch').zeros(1, 1, 50), 1)",
    ],
    "report": ["squall.report"],
}


@pytest.mark.parametrize("extra", NEEDS)
def test_a_name_whose_extra_is_missing_answers_with_the_command(extra):
    program = (
        "import importlib, squall\n"
        f"for name in {NEEDS[extra]}:\n"
        "    try:\n"
        "        importlib.import_module(name) if name == 'squall.report' else eval(name)\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    lines = python(program, EXTRAS[extra]).stdout.splitlines()
    assert len(lines) == len(NEEDS[extra])
    for line in lines:
        assert re.fullmatch(rf"\w+ is not installed; run: pip install 'squall\[{extra}\]'", line)


@pytest.mark.parametrize("package", [package for package in EXTRAS["train"] if package != "scipy"])
def test_a_training_names_the_one_package_that_is_missing(package):
    """Also one that is imported by a function only."""
    program = (
        "import torch, squall\n"
        "settings = squall.TrainingSettings(steps=1, batch=2)\n"
        "data = squall.data.Transitions(squall.data.InMemory(torch.zeros(2, 4, 1, 8), dt=0.1))\n"
        "squall.train(torch.nn.Identity(), data, settings)\n"
    )
    if package in ("h5py", "lightning_fabric"):
        error = python(program, (package,)).stderr.splitlines()[-1]
        assert error.endswith(f"{package} is not installed; run: pip install 'squall[train]'")
    result = python("import squall.cli; sys.exit(squall.cli.main(['train', '--data.path', 'a.hdf5']))", (package,))
    assert result.returncode == 2
    assert result.stderr == f"squall: {package} is not installed; run: pip install 'squall[train]'\n"


@pytest.mark.parametrize("words", [["simulate", "--help"], ["compare", "a"], ["evaluate", "a"]])
def test_a_command_whose_extra_is_missing_answers_with_the_command(words):
    extra = "train" if "--help" in words else "report"
    result = python(f"import squall.cli; sys.exit(squall.cli.main({words}))", EXTRAS[extra])
    assert result.returncode == 2
    assert re.fullmatch(rf"squall: \w+ is not installed; run: pip install 'squall\[{extra}\]'\n", result.stderr)


@pytest.mark.parametrize(("where", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_study_elsewhere_whose_extra_is_missing_answers_with_the_command(where, package, tmp_path):
    words = ["study", "run", "smoke", "--out", str(tmp_path / "out"), "--on", where]
    result = python(f"import squall.cli; sys.exit(squall.cli.main({words}))", (package,))
    assert result.returncode == 2
    assert result.stderr == f"squall: {package} is not installed; run: pip install 'squall[{where}]'\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_the_command_describes_itself_without_pytorch(words):
    missing = ("torch", "numpy", *EXTRAS["train"])
    result = python(f"import squall.cli; sys.exit(squall.cli.main({words}))", missing)
    assert (result.returncode, result.stderr) == (0, "")
    assert "squall" in result.stdout


def test_the_loss_needs_no_extra():
    program = (
        "import torch, squall\n"
        "x = torch.linspace(-1, 1, 64, requires_grad=True)\n"
        "loss = squall.ImbalanceAwareLoss()\n"
        "loss(x, torch.zeros(64)).backward()\n"
        "print(x.grad.isfinite().all().item(), 'temperature' in loss.report())\n"
    )
    result = python(program, tuple(package for packages in EXTRAS.values() for package in packages))
    assert result.stdout == "True True\n", result.stderr
