"""Files of The Well's layout that others wrote: vectors, repeated axes, packed chunks, blurred times."""

import pickle

import h5py
import numpy as np
import pytest
import torch

import squall.data
from squall.data import DataError, Transitions

from .conftest import trajectories


def empty_file(path, space, times, batch=3):
    """The skeleton that The Well's files have, with no field yet."""
    file = h5py.File(path, "w")
    axes = ["x", "y", "z"][: len(space)]
    file.attrs.update(dataset_name="foreign", grid_type="cartesian", n_spatial_dims=len(space), n_trajectories=batch)
    dimensions = file.create_group("dimensions")
    dimensions.attrs["spatial_dims"] = axes
    dimensions["time"] = times
    for axis, points in zip(axes, space, strict=True):
        dimensions[axis] = np.linspace(0, 1, points, endpoint=False, dtype=np.float32)
    for name in dimensions:
        dimensions[name].attrs.update(sample_varying=np.ndim(times) == 2 and name == "time", time_varying=False)
    for group in ("boundary_conditions", "scalars", "t0_fields", "t1_fields", "t2_fields"):
        file.create_group(group).attrs["field_names"] = np.array([], dtype=h5py.string_dtype())
    return file


def add(file, order, name, values, dim_varying, sample=True, time=True, **storage):
    group = file[f"t{order}_fields"]
    group.attrs["field_names"] = np.array([*group.attrs["field_names"], name], dtype=h5py.string_dtype())
    dataset = group.create_dataset(name, data=values, **storage)
    dataset.attrs.update(dim_varying=dim_varying, sample_varying=sample, time_varying=time)


@pytest.fixture(params=["dropped", "length 1"])
def everything(tmp_path, request):
    """All that the layout allows in one file, and the states that it means."""
    path = tmp_path / "everything.hdf5"
    file = empty_file(path, (4, 5), np.arange(6, dtype=np.float32) * np.float32(0.1))
    scalar = trajectories(3, 6, 4, 5, dtype=np.float32, seed=1)
    flat = trajectories(3, 6, 4, dtype=np.float32, seed=2)
    shared = trajectories(6, 5, dtype=np.float64, seed=3)
    vector = trajectories(3, 6, 4, 5, 2, dtype=np.float32, seed=4)
    matrix = trajectories(6, 4, 2, 2, dtype=np.float32, seed=5)
    add(file, 0, "scalar", scalar, [True, True], chunks=(1, 4, 4, 5), compression="gzip")
    short = request.param == "dropped"  # an axis that does not vary: The Well's readers know it in two ways
    add(file, 0, "flat", flat if short else flat[..., None], [True, False])
    packed = {"chunks": (2, 5) if short else (2, 1, 5)}
    add(file, 0, "shared", shared if short else shared[:, None], [False, True], sample=False, **packed)
    add(file, 0, "floor", np.zeros((4, 5), np.float32), [True, True], sample=False, time=False)
    add(file, 1, "velocity", vector, [True, True])
    add(file, 2, "stress", matrix if short else matrix[:, :, None], [True, False], sample=False)
    file.close()
    full = np.empty((3, 6, 9, 4, 5))
    full[:, :, 0] = scalar
    full[:, :, 1] = flat[..., None]
    full[:, :, 2] = shared[None, :, None, :]
    full[:, :, 3:5] = np.moveaxis(vector, -1, 2)
    full[:, :, 5:] = np.moveaxis(matrix.reshape(6, 4, 4), -1, 1)[None, ..., None]
    return path, full


def test_every_kind_of_field_is_read(everything):
    path, full = everything
    source = squall.data.open(path)
    assert source.fields == (
        "scalar", "flat", "shared", "velocity_x", "velocity_y",
        "stress_xx", "stress_xy", "stress_yx", "stress_yy",
    )  # fmt: skip
    assert source.constant_fields == ("floor",)
    assert source.dtype == torch.float64
    assert np.array_equal(source.read(), full)
    picked = source.windows([2, 0, 2], [3, 0, 1], 3)
    assert np.array_equal(picked, np.stack([full[2, 3:6], full[0, 0:3], full[2, 1:4]]))
    again = pickle.loads(pickle.dumps(source))
    assert np.array_equal(again.windows([1], [2], 2)[0], full[1, 2:4])
    source.check()


@pytest.mark.parametrize("everything", ["length 1"], indirect=True)
def test_the_well_agrees_on_every_kind_of_field(everything):
    the_well = pytest.importorskip("the_well.data")
    path, _ = everything
    dataset = the_well.WellDataset(path=str(path.parent))
    names = [
        *dataset.metadata.field_names[0],
        *dataset.metadata.field_names[1],
        *dataset.metadata.field_names[2],
    ]
    assert tuple(names) == squall.data.open(path).fields
    before, after = Transitions(squall.data.open(path)).fetch(range(len(dataset)))
    for index in range(len(dataset)):
        sample = dataset[index]
        assert np.array_equal(sample["input_fields"][0], np.moveaxis(before[index].numpy(), 0, -1))
        assert np.array_equal(sample["output_fields"][0], np.moveaxis(after[index].numpy(), 0, -1))


def test_big_endian_and_half_precision_become_native(tmp_path):
    path = tmp_path / "a.hdf5"
    values = trajectories(3, 6, 4).astype(">f4")
    half = trajectories(3, 6, 4, seed=1).astype(np.float16)
    with empty_file(path, (4,), np.arange(6.0)) as file:
        add(file, 0, "big", values, [True])
        add(file, 0, "half", half, [True])
    source = squall.data.open(path)
    assert source.dtype == torch.float32
    assert np.array_equal(source.read(), np.stack([values, half], axis=2).astype(np.float32))


@pytest.mark.parametrize("dt", [1e-4, 1e-3, 0.25, 0.3, 7.0, 1 / 3])
@pytest.mark.parametrize("way", ["rounded", "multiplied", "linspace"])
def test_step_is_found_in_times_of_single_precision(tmp_path, dt, way):
    """1e-4 is not a number of float32: round steps come back exactly all the same."""
    count = 501
    times = {
        "rounded": (dt * np.arange(count)).astype(np.float32),
        "multiplied": np.arange(count, dtype=np.float32) * np.float32(dt),
        "linspace": np.linspace(0, dt * (count - 1), count, dtype=np.float32),
    }[way]
    with empty_file(tmp_path / "a.hdf5", (4,), times) as file:
        add(file, 0, "u", np.zeros((3, count, 4), np.float32), [True])
    found = squall.data.open(tmp_path / "a.hdf5").dt
    if dt == 1 / 3:
        assert found == pytest.approx(dt, rel=1e-6)
    else:
        assert found == dt


def test_times_of_each_trajectory(tmp_path):
    times = np.array([[0.0], [5.0], [9.0]], np.float32) + np.float32(0.5) * np.arange(6, dtype=np.float32)
    with empty_file(tmp_path / "a.hdf5", (4,), times) as file:
        add(file, 0, "u", trajectories(3, 6, 4), [True])
    source = squall.data.open(tmp_path / "a.hdf5")
    assert source.dt == 0.5
    assert source.shape == (3, 6, 1, 4)
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        file["dimensions/time"][1] *= 2
    with pytest.raises(DataError, match="not equally spaced"):
        squall.data.open(tmp_path / "a.hdf5")


def test_ends_of_different_kind(tmp_path):
    with empty_file(tmp_path / "a.hdf5", (4, 5), np.arange(6.0)) as file:
        add(file, 0, "u", trajectories(3, 6, 4, 5), [True, True])
        for kind, place in (("WALL", 0), ("OPEN", -1)):
            condition = file["boundary_conditions"].create_group(kind)
            condition.attrs.update(associated_dims=["y"], bc_type=kind)
            condition["mask"] = np.arange(5) == place % 5
    assert squall.data.open(tmp_path / "a.hdf5").boundary == ("open", "mixed")
