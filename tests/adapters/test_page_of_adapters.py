"""The programs of the page about the trainers of others, each with the real package."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the packages

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
PROGRAMS = dict(re.findall(r"^## ([^\n]+)$(?:(?!^## ).)*?```python\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE))
PACKAGES = {
    "neuraloperator": "neuralop",
    "The Well": "the_well tqdm wandb",
    "PINA": "pina",
    "anemoi": "anemoi",
    "Lightning": "lightning",
    "accelerate": "accelerate",
    "DeepXDE": "deepxde",
    "physicsnemo": "physicsnemo",
}


def test_every_host_of_the_page_has_a_program():
    assert list(PROGRAMS) == list(PACKAGES)
    assert PAGE.count("```python") == len(PROGRAMS)


@pytest.mark.parametrize("host", PACKAGES)
def test_its_program_runs_as_it_stands(host, tmp_path, monkeypatch):
    for package in PACKAGES[host].split():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDE_BACKEND", "pytorch")  # which the program sets for good
    monkeypatch.setattr(sys, "argv", ["program"])
    before = set(sys.modules)
    try:
        exec(compile(PROGRAMS[host], "page", "exec"), {"__name__": "__main__"})
    finally:
        for name in [name for name in sys.modules if name.startswith("timm") and name not in before]:
            del sys.modules[name]  # that of physicsnemo's program is empty
