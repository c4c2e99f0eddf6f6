"""`squall data`: what a file holds, in words; and any format written in squall's own layout."""

import time

import numpy as np
import pytest

import squall.data
from squall.cli import main

from .conftest import trajectories

B, T, X, Y = 3, 10, 4, 5


@pytest.fixture
def archive(tmp_path):
    states = trajectories(B, T, X, Y)
    states[..., 0, 0] = np.nan
    states[1, 4] = np.nan
    path = tmp_path / "sea.npz"
    np.savez(path, states=states, viscosity=np.arange(float(B)), depth=trajectories(X, Y), t=np.arange(T) * 0.5)
    return path


def test_all_that_was_understood_is_printed(archive, capsys):
    assert main(["data", "describe", str(archive), "--axes", "batch time x y", "--boundary", "wall", "open"]) == 0
    text = capsys.readouterr().out
    for words in (
        "NumPy .npz",
        "3 trajectories × 10 times × 1 fields on 4 × 5 points, float64",
        "time step   0.5",
        "boundary    x wall, y open",
        "mask        1 of 20 points",
        "gaps        1 of 30 states; 25 pairs of neighbours are whole",
        "depth (static, 1 × 1 × 1 × 4 × 5); viscosity (parameter, 3 × 1 × 1 × 1 × 1)",
        "coordinates: the file has none",
        f"next        squall data convert {archive} --axes 'batch time x y' --boundary wall open --out sea-squall.hdf5",
    ):
        assert words in text, text


def test_the_next_command_of_a_file_that_says_all_is_training(path, capsys):
    assert main(["data", "describe", str(path)]) == 0
    text = capsys.readouterr().out
    assert "The Well, HDF5" in text
    assert f"next        squall train --data.path {path} --out runs/waves" in text
    assert "none declared; NaN would be an error" in text


def test_a_file_is_converted_with_all_that_stands_beside(archive, tmp_path, capsys):
    out = tmp_path / "new" / "sea.hdf5"
    command = ["data", "convert", str(archive), "--axes", "batch time x y", "--out", str(out)]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(out)
    first, copy = squall.data.open(archive, axes="batch time x y"), squall.data.open(out)
    assert np.array_equal(copy.mask, first.mask)
    assert np.array_equal(copy.valid, first.valid)
    assert np.array_equal(copy.read([0, 2]), first.read([0, 2]))
    assert {c.name: c.shape for c in copy.conditions} == {c.name: c.shape for c in first.conditions}
    assert main(command) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert [entry.name for entry in out.parent.iterdir()] == ["sea.hdf5"]


@pytest.mark.parametrize("action", ["describe", "convert"])
def test_mistakes_are_said_in_a_sentence(action, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((2, 9, 16, 16, 3)))
    (tmp_path / "a.csv").write_text("1, 2")
    out = ["--out", str(tmp_path / "out.hdf5")] if action == "convert" else []
    for name, words in (("a.npy", "channels last"), ("a.csv", "unknown layout"), ("none.nc", "no such file")):
        assert main(["data", action, str(tmp_path / name), *out]) == 2
        text = capsys.readouterr().err
        assert words in text
        assert "Traceback" not in text
    assert not (tmp_path / "out.hdf5").exists()


def test_one_long_trajectory_is_converted_in_pieces(tmp_path):
    """A trajectory of more than one piece (16 MiB) is written at the right times."""
    states = trajectories(1, 40, 1, 256, 256)
    np.save(tmp_path / "long.npy", states[0, :, 0])
    source = squall.data.open(tmp_path / "long.npy", axes="time y x", dt=1.0)
    assert len(list(source.chunks())) > 1
    assert np.array_equal(squall.data.open(squall.data.convert(source, tmp_path / "a.hdf5")).read(), states)


def test_a_large_zarr_is_described_from_a_few_states(tmp_path, capsys):
    """10 GB that were never written take no room: only the few chunks looked at are made."""
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "large.zarr", mode="w")
    shape = (2600, 1000, 1000)
    field = group.create_array(
        "t", shape=shape, chunks=(1, 1000, 1000), dtype="float32", dimension_names=("time", "y", "x"), fill_value=np.nan
    )
    group.create_array("time", data=np.arange(2600) * 0.25, dimension_names=("time",))
    for step in np.linspace(0, 2599, 16).astype(int):
        values = np.ones(shape[1:], np.float32)
        values[:10, :10] = np.nan
        values[500, 500] = np.nan if step == 0 else 1
        field[int(step)] = values
    start = time.process_time()
    assert main(["data", "describe", str(tmp_path / "large.zarr")]) == 0
    seconds = time.process_time() - start
    text = capsys.readouterr().out
    assert "mask        100 of 1000000 points, in 16 of 2600 states looked at" in text
    assert "gaps        1 in 16 of 2600 states looked at" in text
    assert seconds < 10  # 0.6 s on a quiet machine
