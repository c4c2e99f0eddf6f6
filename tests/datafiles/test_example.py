"""The example of own data simulates what it says, and writes it. The page about it runs as it stands."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

import squall.data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location("write_own_data", ROOT / "examples/write_own_data.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_example_writes_two_fields_in_the_plane(example, tmp_path, capsys):
    path = tmp_path / "vortex.hdf5"
    example.main([str(path), "--trajectories", "3", "--points", "16", "--steps", "20"])
    assert "vortex" in capsys.readouterr().out
    source = squall.data.open(path)
    source.check()
    assert source.shape == (3, 21, 2, 16, 16)
    assert source.fields == ("dye", "heat")
    assert source.dt == 0.02
    assert source.spacing == pytest.approx((2 * np.pi / 16,) * 2)
    states = source.read().double().numpy()
    means = states.mean((-2, -1))
    assert np.allclose(means, means[:, :1], atol=1e-6)  # the vortex neither makes nor takes
    squares = (states - means[..., None, None]).__pow__(2).mean((-2, -1))
    assert (np.diff(squares, axis=1) < 0).all()  # and all that spreads, fades
    assert (squares[:, -1, 1] / squares[:, 0, 1] < squares[:, -1, 0] / squares[:, 0, 0]).all()  # heat the faster


def test_example_solves_its_equation(example):
    """Without a gradient across the flow, a field c(ψ) is carried nowhere; and the scheme is of fourth order."""
    x = np.arange(32) * 2 * np.pi / 32
    along = np.cos(x)[:, None] + np.cos(x)[None, :]
    rate = example.vortex(32)(np.stack([along, along]))
    assert np.allclose(rate, -np.array([0.01, 0.05])[:, None, None] * along, atol=1e-13)
    start = example.blobs(1, 16, seed=0)
    ends = [example.simulate(start, steps, 1.6 / steps)[:, -1] for steps in (20, 40, 80, 160)]
    errors = [np.abs(end - ends[-1]).max() for end in ends[:2]]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.3)


def test_page_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/own_data.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks[0].strip().splitlines()) <= 10
    for path in tmp_path.glob("*.hdf5"):
        squall.data.open(path).check()
    assert len(list(tmp_path.glob("*.hdf5"))) == 3
