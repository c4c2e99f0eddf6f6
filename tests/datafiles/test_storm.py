"""A real storm: 6-hourly grids of January 1996 from Debian's package libncarg-data, which are not kept here.

`SQUALL_STORM_DATA` names a folder with the `*storm.cdf` files; else they are looked for where the package puts them,
or fetched by apt.
"""

import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import squall.data
from squall.cli import main
from squall.data import Normalization, Transitions

INSTALLED = Path("/usr/share/ncarg/data/cdf")


@pytest.fixture(scope="module")
def storm(tmp_path_factory):
    for folder in (os.environ.get("SQUALL_STORM_DATA"), INSTALLED):
        if folder and (Path(folder) / "Vstorm.cdf").exists():
            return Path(folder)
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip(f"no storm: {INSTALLED} is not there, SQUALL_STORM_DATA is not set, and there is no apt")
    folder = tmp_path_factory.mktemp("ncarg")
    fetched = subprocess.run(["apt-get", "download", "libncarg-data"], cwd=folder, capture_output=True, timeout=120)
    packages = list(folder.glob("*.deb"))
    if fetched.returncode or not packages:
        pytest.skip("no storm: apt-get download libncarg-data failed")
    subprocess.run(["dpkg", "-x", str(packages[0]), str(folder)], check=True, capture_output=True)
    return folder / INSTALLED.relative_to("/")


@pytest.fixture(scope="module")
def raw(storm):
    """Wind as another package reads it (time, latitude, longitude), with NaN."""
    netCDF4 = pytest.importorskip("netCDF4")
    with netCDF4.Dataset(storm / "Vstorm.cdf") as file:
        return np.ma.filled(file["v"][:].astype(float), np.nan)


def test_mask_gaps_and_areas_of_the_storm(storm, raw):
    source = squall.data.open(storm / "Vstorm.cdf")
    assert source.shape == (1, 64, 1, 33, 36)
    assert (source.dt, source.spacing, source.boundary) == (6, (1.25, 2.5), ("open", "open"))
    land = np.isnan(raw).all(0)
    assert np.array_equal(~source.mask[0], land)
    assert land.sum() == 224
    holes = np.isnan(raw[:, ~land]).any(1)
    assert holes.any()
    assert np.array_equal(~source.valid[0], holes)
    edges = np.sin(np.radians(np.arange(20 - 0.625, 61, 1.25)))
    exact = np.repeat(np.diff(edges)[:, None], 36, 1)
    assert np.allclose(source.measure, exact / exact.mean(), rtol=1e-6)


def test_training_pairs_of_the_storm_leave_the_gaps_out(storm, raw):
    source = squall.data.open(storm / "Vstorm.cdf")
    transitions = Transitions(source, unroll=2)
    _, starts = transitions.locate(range(len(transitions)))
    whole = source.valid[0].numpy()
    assert starts.tolist() == [t for t in range(62) if whole[t : t + 3].all()]
    past, future = transitions.fetch(range(len(transitions)))
    assert past.isfinite().all()
    assert future.isfinite().all()
    sea = source.mask[0].numpy()
    assert np.array_equal(past[0, 0].numpy()[sea], raw[starts[0]][sea].astype(np.float32))
    fit = Normalization.fit(source)
    assert fit.mean[0] == pytest.approx(raw[whole][:, sea].mean(), rel=1e-6)
    parts = squall.data.split(source, validation=0.15, test=0.2, gap=2)
    assert sum(part.shape[1] for part in parts) == 64 - 4
    assert len(squall.data.windows(parts.test, length=4, stride=2).read()) >= 2


def test_a_linear_step_is_learned_from_the_storm(storm):
    """A few steps of gradient descent through masked, normalized states lower the error and stay finite."""
    source = squall.data.load(squall.data.open(storm / "Vstorm.cdf"))
    fit, mask = Normalization.fit(source), source.mask
    u, after = (fit.apply(part) for part in Transitions(source).fetch(range(40)))
    weight = torch.zeros(1, 1, 3, 3, requires_grad=True)
    losses = []
    for _ in range(20):
        error = (u + torch.nn.functional.conv2d(u, weight, padding=1) - after).square()
        loss = (error * mask * source.measure).sum() / (mask * source.measure).sum() / len(u)
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = (weight - 0.02 * gradient).detach().requires_grad_()
        losses.append(loss.item())
    assert math.isfinite(losses[-1])
    assert losses[-1] < 0.98 * losses[0]


def test_the_storm_is_described_and_converted(storm, tmp_path, capsys):
    assert main(["data", "describe", str(storm / "Vstorm.cdf")]) == 0
    text = capsys.readouterr().out
    for words in ("NetCDF-3", "224 of 1188 points", "of 64 states", "time step   6", "lat 20 ... 60", "squall train"):
        assert words in text
    assert main(["data", "convert", str(storm / "Vstorm.cdf"), "--out", str(tmp_path / "storm.hdf5")]) == 0
    first, copy = squall.data.open(storm / "Vstorm.cdf"), squall.data.open(tmp_path / "storm.hdf5")
    assert torch.equal(copy.mask, first.mask)
    assert torch.equal(copy.valid, first.valid)
    assert torch.allclose(copy.measure, first.measure)
    assert copy.description.axes == ("lat", "lon")
    pairs = [Transitions(source).fetch([0, 30, 50]) for source in (first, copy)]
    assert torch.equal(pairs[0][0], pairs[1][0])


def test_the_example_of_the_storm_learns_forecasts_and_draws(storm, tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples" / "january_1996.py"
    names: dict = {"__name__": "january_1996"}
    exec(compile(path.read_text(), path, "exec"), names)
    source = names["read"](storm)
    assert source.shape == (1, 32, 4, 33, 36)
    assert (~source.valid).nonzero().tolist() == [[0, 18]]
    names["main"]([str(storm), "--out", str(tmp_path), "--steps", "3"])
    printed = capsys.readouterr().out
    assert "prove no skill" in printed
    assert printed.count("persistence ") == 3
    assert (tmp_path / "blizzard.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="not overwritten"):
        names["main"]([str(storm), "--out", str(tmp_path)])


def test_the_storm_is_trained_rolled_out_and_mapped(storm, tmp_path):
    run, file = tmp_path / "run", storm / "Vstorm.cdf"
    words = ["--data.path", str(file), "--data.validation", "0.2", "--data.test", "0.3", "--model.hidden", "4"]
    assert main(["train", *words, "--training.batch", "4", "--training.steps", "2", "--out", str(run)]) == 0
    assert main(["evaluate", str(run), "--steps", "4", "--stride", "2"]) == 0
    assert (run / "figures" / "rollout_0.png").stat().st_size > 10_000
    with np.load(run / "rollouts.npz") as kept:
        land = ~squall.data.open(file).mask[0].numpy()
        assert np.isnan(kept["truth"][0, 0, 0][land]).all()
        assert np.isfinite(kept["truth"][0, 0, 0][~land]).all()
    predict = ["predict", str(run), "--initial", str(file), "--start", "40", "--steps", "3"]
    assert main([*predict, "--out", str(tmp_path / "p.nc")]) == 0
    assert torch.equal(squall.data.open(tmp_path / "p.nc").mask, squall.data.open(file).mask)
