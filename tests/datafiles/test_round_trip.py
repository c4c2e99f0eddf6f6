"""What is written is what is read, bit for bit, by us and by the reader of The Well."""

import json

import h5py
import numpy as np
import pytest
import torch

import squall.data

from .conftest import trajectories

SHAPES = [(4, 6, 1, 9), (3, 5, 2, 8), (3, 4, 1, 6, 5), (2, 3, 3, 4, 5), (2, 3, 2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_states_come_back_bit_for_bit(tmp_path, shape, dtype, library):
    numbers = trajectories(*shape, dtype=dtype)
    given = torch.from_numpy(numbers) if library == "torch" else numbers
    source = squall.data.open(squall.data.write(tmp_path / "a.hdf5", given, dt=0.5))
    assert source.shape == shape
    assert source.dtype == torch.from_numpy(numbers).dtype
    assert source.read().numpy().tobytes() == numbers.tobytes()
    source.check()


def test_states_that_do_not_lie_in_order_in_memory_are_written_in_order(tmp_path):
    numbers = trajectories(3, 8, 4, 5)
    turned = np.asfortranarray(numbers)
    strided = torch.from_numpy(trajectories(3, 8, 4, 10))[..., ::2].requires_grad_()
    assert np.array_equal(squall.data.open(squall.data.write(tmp_path / "a", turned, dt=1.0)).read(), numbers)
    again = squall.data.open(squall.data.write(tmp_path / "b", strided, dt=1.0)).read()
    assert torch.equal(again, strided.detach())
    swapped = numbers.astype(">f8")
    assert np.array_equal(squall.data.open(squall.data.write(tmp_path / "c", swapped, dt=1.0)).read(), numbers)


def test_description_comes_back_exactly(tmp_path):
    provenance = {"version": "0.1.0", "seed": 3, "protocol": "paper", "long": "x" * 100_000, "list": [1, 2.5]}
    parameters = {"gamma": 5e-4, "alpha": -6, "scheme": "implicit"}
    path = squall.data.write(
        tmp_path / "a.hdf5",
        trajectories(3, 501, 2, 50, 4),
        dt=1e-4,
        fields=("density", "velocity"),
        lengths=(1 / 3, 2.0),
        boundary=("periodic", "wall"),
        name="mixing",
        parameters=parameters,
        provenance=provenance,
    )
    source = squall.data.open(path)
    assert source.dt == 1e-4
    assert source.steps == 500
    assert np.array_equal(source.times, 1e-4 * np.arange(501))
    assert source.fields == ("density", "velocity")
    assert source.spacing == (1 / 3 / 50, 2.0 / 3)
    assert source.space == (50, 4)
    assert np.array_equal(source.coordinates[1], 2.0 / 3 * np.arange(4))
    assert source.boundary == ("periodic", "wall")
    assert source.name == "mixing"
    assert source.parameters == {"gamma": 5e-4, "alpha": -6.0, "scheme": "implicit"}
    assert source.provenance == provenance
    assert source.attributes["n_trajectories"] == 3


def test_names_of_axes_come_back(tmp_path):
    points = [np.linspace(-67.5, 67.5, 4), 45.0 * np.arange(8)]
    names = ("latitude", "longitude")
    path = squall.data.write(tmp_path / "a.hdf5", np.zeros((1, 3, 1, 4, 8)), dt=1.0, axes=names, coordinates=points)
    assert squall.data.open(path).description.axes == names


def test_unequal_coordinates_have_no_spacing(tmp_path):
    points = np.cos(np.pi * np.arange(8) / 7)[::-1].copy()
    source = squall.data.open(
        squall.data.write(tmp_path / "a", trajectories(1, 2, 1, 8), dt=1.0, coordinates=points, boundary="wall")
    )
    assert source.spacing == (None,)
    assert np.allclose(source.coordinates[0], points, atol=1e-7)


def test_pieces_make_the_same_file_as_the_whole(tmp_path):
    numbers = trajectories(7, 6, 2, 9, dtype=np.float32)
    whole = squall.data.write(tmp_path / "whole.hdf5", numbers, dt=0.1, fields=("a", "b"))
    with squall.data.create(
        tmp_path / "pieces.hdf5", numbers.shape, dtype=torch.float32, dt=0.1, fields=("a", "b")
    ) as file:
        for start in (0, 3, 4):
            file.append(numbers[start : {0: 3, 3: 4, 4: 7}[start]])
    pieces = squall.data.open(tmp_path / "pieces.hdf5")
    assert torch.equal(pieces.read(), squall.data.open(whole).read())
    assert pieces.fields == ("a", "b")


def test_file_has_the_layout_of_the_well(path):
    with h5py.File(path) as file:
        assert set(file) == {
            "dimensions",
            "boundary_conditions",
            "scalars",
            "t0_fields",
            "t1_fields",
            "t2_fields",
        }
        assert file["dimensions/time"].dtype == file["dimensions/x"].dtype == np.float32
        assert list(file["dimensions"].attrs["spatial_dims"]) == ["x"]
        assert list(file["t0_fields"].attrs["field_names"]) == ["u", "v"]
        assert len(file["t2_fields"].attrs["field_names"]) == 0
        field = file["t0_fields/u"]
        assert field.shape == (5, 12, 7)
        assert list(field.attrs["dim_varying"]) == [True]
        assert field.attrs["sample_varying"]
        assert field.attrs["time_varying"]
        assert list(file["boundary_conditions/x_periodic/mask"]) == [True, *[False] * 5, True]
        json.loads(file.attrs["provenance"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_well_reads_our_numbers(tmp_path, shape, dtype):
    the_well = pytest.importorskip("the_well.data")
    numbers = trajectories(*shape, dtype=dtype)
    parameters = {"gamma": 5e-4}
    squall.data.write(
        tmp_path / "waves/data/train/a.hdf5",
        numbers,
        dt=0.5,
        name="waves",
        lengths=2.0,
        parameters=parameters,
    )
    dataset = the_well.WellDataset(path=str(tmp_path / "waves"), well_split_name="train")
    assert dataset.metadata.dataset_name == "waves"
    assert dataset.metadata.spatial_resolution == shape[3:]
    steps = shape[1] - 1
    assert len(dataset) == shape[0] * steps
    for index in range(len(dataset)):
        sample = dataset[index]
        trajectory, time = divmod(index, steps)
        now, after = np.moveaxis(numbers[trajectory, time : time + 2], 1, -1)
        assert sample["input_fields"].numpy().tobytes() == now.tobytes()
        assert sample["output_fields"].numpy().tobytes() == after.tobytes()
        assert sample["input_fields"].dtype == torch.from_numpy(numbers).dtype
    assert torch.equal(sample["boundary_conditions"], torch.full((len(shape) - 3, 2), 2.0))  # periodic
    assert sample["space_grid"].shape == (*shape[3:], len(shape) - 3)
    assert float(sample["space_grid"].max()) == pytest.approx(2.0 * (1 - 1 / max(shape[3:])))
    assert float(sample["output_time_grid"] - sample["input_time_grid"]) == pytest.approx(0.5)


def test_the_well_reads_a_folder_of_files(tmp_path, states):
    the_well = pytest.importorskip("the_well.data")
    for part in range(2):
        squall.data.write(tmp_path / f"{part}.hdf5", states + part, dt=0.1, boundary="wall")
    dataset = the_well.WellDataset(path=str(tmp_path), full_trajectory_mode=True, n_steps_input=1)
    assert len(dataset) == 10
    assert np.array_equal(dataset[7]["output_fields"], np.moveaxis((states + 1)[2, 1:], 1, -1))
    assert (dataset[0]["boundary_conditions"] == 0).all()  # wall
