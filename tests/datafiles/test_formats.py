"""Files that other packages wrote come back as they were meant, in every format; the wrong ones say what to do."""

import multiprocessing
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

import squall.data
from squall.data import DataError, Transitions

from .conftest import trajectories

B, T, X, Y = 4, 6, 5, 7
LATITUDE = np.linspace(90, -90, X)
LONGITUDE = np.arange(Y) * (360 / Y)


def dataset(**fields):
    """Fields on a sphere at six-hourly times, as weather files have them."""
    xarray = pytest.importorskip("xarray")
    times = np.datetime64("1996-01-05T00", "ns") + np.arange(T) * np.timedelta64(6, "h")
    coordinates = {"time": times, "latitude": LATITUDE, "longitude": LONGITUDE}
    data = xarray.Dataset(fields, coords=coordinates)
    data.latitude.attrs["units"] = "degrees_north"
    data.longitude.attrs["units"] = "degrees_east"
    return data


def weather():
    names = ("time", "latitude", "longitude")
    data = dataset(
        t2m=(names, trajectories(T, X, Y, dtype=np.float32), {"units": "K"}),
        u10=(names, trajectories(T, X, Y, dtype=np.float32, seed=1), {"units": "m s-1"}),
        orography=(names[1:], trajectories(X, Y, seed=2)),
        co2=("time", np.arange(float(T))),
        note=("time", list("abcdef")),
    )
    return data, np.stack([data.t2m.values, data.u10.values], axis=1)[None]


def write_netcdf3(path, data):
    data.drop_vars("note").to_netcdf(path, engine="scipy")


def write_netcdf4(path, data):
    data.to_netcdf(path, engine="netcdf4", encoding={"t2m": {"chunksizes": (2, X, Y), "zlib": True}})


def write_zarr2(path, data):
    data.drop_vars("note").to_zarr(path, zarr_format=2, consolidated=True)


def write_zarr3(path, data):
    data.drop_vars("note").to_zarr(path, zarr_format=3, consolidated=False)


WEATHER = {"NetCDF-3": write_netcdf3, "NetCDF-4": write_netcdf4, "Zarr v2": write_zarr2, "Zarr v3": write_zarr3}


@pytest.fixture(params=WEATHER, ids=list(WEATHER))
def weather_file(request, tmp_path):
    pytest.importorskip({"NetCDF-4": "netCDF4"}.get(request.param, "zarr"))
    data, states = weather()
    path = tmp_path / "weather"  # without a suffix: the content says what it is
    WEATHER[request.param](path, data)
    return request.param, path, states, data


def test_weather_files_come_back_with_axes_times_units_areas_and_conditions(weather_file):
    format, path, states, data = weather_file
    source = squall.data.open(path)
    assert source.format == format
    assert source.fields == ("t2m", "u10")
    assert source.dt == 6
    assert source.description.units == {"t2m": "K", "u10": "m s-1", "time": "hours"}
    assert source.description.axes == ("latitude", "longitude")
    assert source.boundary == ("open", "periodic")
    assert np.array_equal(source.coordinates[0], LATITUDE)
    assert np.array_equal(source.read(), states)
    assert np.array_equal(source.windows([0, 0], [3, 1], 2), np.stack([states[0, 3:5], states[0, 1:3]]))
    assert source.mask is None
    assert source.valid is None
    edges = np.sin(np.radians([90, 67.5, 22.5, -22.5, -67.5, -90]))
    exact = np.repeat(-np.diff(edges)[:, None], Y, 1)
    assert np.allclose(source.measure, exact / exact.mean(), rtol=1e-12)
    kinds = {condition.name: (condition.kind, condition.shape) for condition in source.conditions}
    assert kinds == {"orography": ("static", (1, 1, 1, X, Y)), "co2": ("forcing", (1, T, 1, 1, 1))}
    assert np.allclose(source.condition("orography", [0], [0], 2)[0, 0, 0], data.orography.values)
    assert source.condition("co2", [0, 0], [1, 3], 2).flatten().tolist() == [1, 2, 3, 4]
    assert any("note" in note for note in source.notes) == (format == "NetCDF-4")


def test_chosen_fields_make_the_state_and_the_others_forcings(weather_file):
    _, path, states, _ = weather_file
    source = squall.data.open(path, fields=["u10"])
    assert np.array_equal(source.read(), states[:, :, 1:])
    assert np.array_equal(source.condition("t2m", [0], [2], 3)[0], states[0, 2:5, :1])
    with pytest.raises(DataError, match=r"no t3m; the fields in time and space are t2m, u10"):
        squall.data.open(path, fields=["t3m"])


def _read_in_worker(source, queue):
    queue.put(source.read([0], 1, 3).numpy().tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_open_the_file_for_themselves(weather_file, method):
    format, path, states, _ = weather_file
    if method == "spawn" and format not in ("NetCDF-3", "Zarr v3"):
        pytest.skip("two formats are enough for what takes seconds")
    source = squall.data.open(path)
    source.read([0], 0, 1)  # now it is open here, too
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_read_in_worker, args=(source, queue))
    worker.start()
    got = queue.get(timeout=60)
    worker.join()
    assert got == states[:, 1:3].tobytes()


def test_levels_become_channels_and_may_be_an_axis(tmp_path):
    pytest.importorskip("netCDF4")
    values = trajectories(T, 3, X, Y)
    data = dataset(z=(("time", "level", "latitude", "longitude"), values))
    data.assign_coords(level=[500.0, 700.0, 850.0]).to_netcdf(tmp_path / "a.nc")
    source = squall.data.open(tmp_path / "a.nc")
    assert source.fields == ("z_500", "z_700", "z_850")
    assert np.array_equal(source.read()[0], values)
    solid = squall.data.open(tmp_path / "a.nc", axes="time z y x")
    assert solid.shape == (1, T, 1, 3, X, Y)
    assert np.array_equal(solid.read()[0, :, 0], values)


def test_packed_numbers_and_fill_values_are_decoded_as_xarray_does(tmp_path):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("netCDF4")
    values = trajectories(T, X, Y, dtype=np.float32)
    values[:, 0, 0] = np.nan
    values[2, 3, 3] = np.nan
    data = dataset(t=(("time", "latitude", "longitude"), values))
    packed = {"dtype": "int16", "scale_factor": 0.001, "add_offset": 1.0, "_FillValue": -9999}
    data.to_netcdf(tmp_path / "a.nc", encoding={"t": packed})
    with xarray.open_dataset(tmp_path / "a.nc") as opened:
        expected = opened.t.values
    source = squall.data.open(tmp_path / "a.nc")
    assert torch.equal(~source.mask[0], torch.from_numpy(np.isnan(expected[0])))
    assert source.valid[0].tolist() == [True, True, False, True, True, True]
    seen = np.nan_to_num(expected, nan=0.0)
    assert np.allclose(source.read([0], 3, 6)[0, :, 0, 1:], seen[3:, 1:], atol=1e-6)


def test_two_time_axes_are_asked_about_and_flags_are_forcings(tmp_path):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("netCDF4")
    names, values = ("time", "step", "y", "x"), trajectories(3, T, X, Y)
    data = xarray.Dataset(
        {"t": (names, values), "flag": (names, np.ones(values.shape, int))}, {"step": np.arange(T) * 6.0}
    )
    data.to_netcdf(tmp_path / "a.nc")
    with pytest.raises(DataError, match=r"two axes look like time: time and step; say what the axes time step y x"):
        squall.data.open(tmp_path / "a.nc")
    source = squall.data.open(tmp_path / "a.nc", axes="batch time y x")
    assert source.fields == ("t",)
    assert source.dt == 6
    assert np.array_equal(source.read()[:, :, 0], values)
    assert [(c.name, c.kind) for c in source.conditions] == [("flag", "forcing")]


def test_areas_of_the_file_come_before_those_of_the_coordinates(tmp_path):
    pytest.importorskip("netCDF4")
    area = np.random.default_rng(0).uniform(1, 2, (X, Y))
    data = dataset(
        t=(("time", "latitude", "longitude"), trajectories(T, X, Y)), cell_area=(("latitude", "longitude"), area)
    )
    data.to_netcdf(tmp_path / "a.nc")
    assert np.allclose(squall.data.open(tmp_path / "a.nc").measure, area / area.mean())


def test_unequal_times_are_refused_and_dt_takes_them_as_equal(tmp_path):
    pytest.importorskip("netCDF4")
    data = dataset(t=(("time", "latitude", "longitude"), trajectories(T, X, Y)))
    months = np.array([f"2000-0{i}-01" for i in range(1, T + 1)], dtype="datetime64[ns]")
    data.assign_coords(time=months).to_netcdf(tmp_path / "a.nc")
    with pytest.raises(DataError, match=r"not equally spaced: neighbours are 696 to 744 apart.*dt="):
        squall.data.open(tmp_path / "a.nc")
    assert squall.data.open(tmp_path / "a.nc", dt=1.0).dt == 1.0


def test_a_file_without_time_says_what_it_has(tmp_path):
    xarray = pytest.importorskip("xarray")
    xarray.Dataset({"relief": (("y", "x"), trajectories(X, Y))}).to_netcdf(tmp_path / "a.nc", engine="scipy")
    with pytest.raises(DataError, match=r"no variable with a time and a space axis; found: relief"):
        squall.data.open(tmp_path / "a.nc")


def test_groups_are_named(tmp_path):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("netCDF4")
    xarray.Dataset({"u": (("time", "x"), trajectories(T, X))}).to_netcdf(tmp_path / "a.nc", group="run1")
    with pytest.raises(DataError, match=r"the fields lie in groups \(run1\)"):
        squall.data.open(tmp_path / "a.nc")


def test_zarr_without_names_of_axes_is_asked_about(tmp_path):
    zarr = pytest.importorskip("zarr")
    values = trajectories(B, T, X)
    zarr.create_array(tmp_path / "a.zarr", data=values)
    with pytest.raises(DataError, match=r"looks like axes='batch time x'"):
        squall.data.open(tmp_path / "a.zarr", dt=0.1)
    source = squall.data.open(tmp_path / "a.zarr", dt=0.1, axes="batch time x")
    assert np.array_equal(source.read()[:, :, 0], values)


@pytest.mark.parametrize("format", [2, 3])
def test_zeros_in_zarr_are_numbers(tmp_path, format):
    """Zarr's own default fill value is 0, which says nothing on missing values."""
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=format)
    names = {"dimension_names": ("time", "x")} if format == 3 else {"attributes": {"_ARRAY_DIMENSIONS": ["time", "x"]}}
    group.create_array("u", data=np.zeros((T, X)), **names)
    clock = {"dimension_names": ("time",)} if format == 3 else {"attributes": {"_ARRAY_DIMENSIONS": ["time"]}}
    group.create_array("time", data=np.arange(T) * 0.5, **clock)
    source = squall.data.open(tmp_path / "a.zarr")
    assert source.mask is None
    assert source.dt == 0.5
    assert torch.equal(source.read(), torch.zeros(1, T, 1, X, dtype=torch.float64))


def write_tensor(path, values):
    with h5py.File(path, "w") as file:
        file["tensor"] = values
        file["x-coordinate"] = (np.arange(X) + 0.5) / X
        file["t-coordinate"] = np.arange(T + 1, dtype=np.float32) * np.float32(0.01)
        file.attrs["beta"] = 0.4


def test_pdebench_tensor(tmp_path):
    values = trajectories(B, T, X, dtype=np.float32)
    write_tensor(tmp_path / "advection.hdf5", values)
    source = squall.data.open(tmp_path / "advection.hdf5")
    assert source.format == "PDEBench, one array a field"
    assert source.dt == 0.01
    assert source.parameters == {"beta": 0.4}
    assert np.array_equal(source.read()[:, :, 0], values)
    before, _ = Transitions(source).fetch([T - 1])
    assert np.array_equal(before[0, 0], values[1, 0])


def test_a_steady_problem_is_no_trajectory(tmp_path):
    write_tensor(tmp_path / "darcy.hdf5", trajectories(B, 1, X))
    with pytest.raises(DataError, match="it has one time; at least two"):
        squall.data.open(tmp_path / "darcy.hdf5")


def test_pdebench_with_an_axis_more_than_points_is_asked_about(tmp_path):
    write_tensor(tmp_path / "a.hdf5", trajectories(B, T, X, 2))
    with pytest.raises(DataError, match=r"this is PDEBench, one array a field. 'tensor' has the shape"):
        squall.data.open(tmp_path / "a.hdf5")
    assert squall.data.open(tmp_path / "a.hdf5", axes="batch time x channel").channels == 2


def test_pdebench_one_array_a_field(tmp_path):
    fields = {name: trajectories(B, T, X, Y, dtype=np.float32, seed=i) for i, name in enumerate(["Vx", "density"])}
    with h5py.File(tmp_path / "flow.hdf5", "w") as file:
        for name, values in fields.items():
            file[name] = values
        for axis, points in (("x", X), ("y", Y), ("t", T + 1)):
            file[f"{axis}-coordinate"] = np.linspace(0, 1, points)
    source = squall.data.open(tmp_path / "flow.hdf5")
    assert source.fields == ("Vx", "density")
    assert np.array_equal(source.read(), np.stack(list(fields.values()), 2))


def test_pdebench_one_group_a_trajectory(tmp_path):
    values = trajectories(B, T, X, Y, 2, dtype=np.float32)
    with h5py.File(tmp_path / "reaction.h5", "w") as file:
        for number in range(B):
            file[f"{number:04}/data"] = values[number]
            for axis, points in (("x", X), ("y", Y), ("t", T)):
                file[f"{number:04}/grid/{axis}"] = np.linspace(0, 1, points, dtype=np.float32)
            file[f"{number:04}"].attrs["config"] = "Du: 0.001"
    source = squall.data.open(tmp_path / "reaction.h5", fields=["activator", "inhibitor"], boundary="wall")
    assert source.fields == ("activator", "inhibitor")
    assert source.provenance == {"config": "Du: 0.001"}
    assert np.array_equal(source.read(), np.moveaxis(values, -1, 2))
    assert np.array_equal(source.windows([3, 0], [1, 4], 2)[0], np.moveaxis(values, -1, 2)[3, 1:3])
    source.close()
    with h5py.File(tmp_path / "reaction.h5", "r+") as file:
        del file["0002/data"]
        file["0002/data"] = values[2, :3]
    with pytest.raises(DataError, match="trajectories differ in shape: 0000"):
        squall.data.open(tmp_path / "reaction.h5")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "packed.npz"])
def test_numpy_arrays_in_three_lines(tmp_path, name):
    values = trajectories(B, T, X)
    save = {"a.npy": np.save, "a.npz": np.savez, "packed.npz": np.savez_compressed}[name]
    save(tmp_path / name, values)
    with pytest.raises(DataError, match=r"It looks like axes='batch time x'; give axes="):
        squall.data.open(tmp_path / name, dt=0.1)
    with pytest.raises(DataError, match=r"time between two states; give dt="):
        squall.data.open(tmp_path / name, axes="batch time x")
    source = squall.data.open(tmp_path / name, axes="batch time x", dt=0.1)
    assert np.array_equal(source.read()[:, :, 0], values)
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read([2]), source.read([2]))


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_archive_with_axes_fields_and_conditions(tmp_path, order):
    u, v = trajectories(B, T, X, Y), trajectories(B, T, X, Y, seed=1)
    viscosity, forcing = np.arange(float(B)), trajectories(B, T, seed=2)
    depth = trajectories(X, Y, seed=3)
    np.savez(
        tmp_path / "a.npz",
        u=np.asarray(u, order=order), v=v, t=np.arange(T) * 0.5, x=np.arange(X) * 2.0, y=np.arange(Y) ** 2.0,
        viscosity=viscosity, forcing=forcing, depth=depth, words=np.array(["a", "b"]),
    )  # fmt: skip
    np.savez(tmp_path / "step.npz", u=u, dt=0.25)
    assert squall.data.open(tmp_path / "step.npz", axes="batch time x y").dt == 0.25
    assert squall.data.open(tmp_path / "step.npz", axes="batch time x y", dt=2.0).dt == 2.0
    source = squall.data.open(tmp_path / "a.npz", axes="batch time x y")
    assert source.fields == ("u", "v")
    assert (source.dt, source.spacing) == (0.5, (2.0, None))
    assert np.array_equal(source.read(), np.stack([u, v], 2))
    kinds = {condition.name: condition.kind for condition in source.conditions}
    assert kinds == {"viscosity": "parameter", "forcing": "forcing", "depth": "static"}
    assert source.condition("viscosity", [2, 0], [0, 0], 1).flatten().tolist() == [2, 0]
    assert np.array_equal(source.condition("forcing", [2], [1], 3).flatten(), forcing[2, 1:4])
    assert any("words" in note for note in source.notes)


def test_lists_as_long_as_the_axes_say_what_the_axes_are(tmp_path):
    values = np.random.default_rng(0).normal(size=(9, 5, 7))
    lists = {"t": np.arange(7) * 0.5, "x": np.arange(5.0), "y": np.arange(9.0)}
    np.savez(tmp_path / "a.npz", T=values, **lists)
    source = squall.data.open(tmp_path / "a.npz")
    assert (source.shape, source.description.axes, source.dt) == ((1, 7, 1, 9, 5), ("y", "x"), 0.5)
    assert np.array_equal(source.read()[0, :, 0], values.transpose(2, 0, 1))
    np.savez(tmp_path / "b.npz", T=values[:, :, :5], **lists | {"t": np.arange(5.0)})
    with pytest.raises(DataError, match="does not say what its axes are"):  # two axes of one length
        squall.data.open(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("shape", "guess"),
    [
        ((3, 9, 12, 10, 2), "batch time x y channel"),
        ((9, 12, 12, 3), "time x y channel"),
        ((5, 9, 64, 2), "batch time x channel"),
        ((3, 9, 2, 12, 10), "batch time channel x y"),
        ((3, 9, 2, 32), "batch time channel x"),
        ((9, 12, 12), "time x y"),
    ],
)
def test_arrays_are_asked_about_and_channels_last_is_said(tmp_path, shape, guess):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    with pytest.raises(DataError) as caught:
        squall.data.open(tmp_path / "a.npy", dt=1.0)
    assert f"axes={guess!r}" in str(caught.value)
    assert ("channels last" in str(caught.value)) == guess.endswith("channel")
    values = trajectories(*shape)
    np.save(tmp_path / "b.npy", values)
    source = squall.data.open(tmp_path / "b.npy", dt=1.0, axes=guess)
    order = [guess.split().index(word) for word in ("batch", "time", "channel", "x", "y") if word in guess.split()]
    assert np.array_equal(source.read().flatten(), values.transpose(order).flatten())


def test_channels_last_is_asked_about_in_memory_too():
    with pytest.raises(DataError, match=r"channels last.*moveaxis"):
        squall.data.InMemory(np.zeros((2, 5, 16, 16, 3)), dt=1.0)
    assert squall.data.InMemory(np.zeros((2, 5, 16, 16, 3)), dt=1.0, fields=[str(i) for i in range(16)]).channels == 16


@pytest.mark.parametrize("axes", ["batch time", "batch time x x", "batch time x y", "batch channel x"])
def test_axes_that_do_not_fit_are_refused(tmp_path, axes):
    np.save(tmp_path / "a.npy", np.zeros((B, T, X)))
    with pytest.raises(DataError, match=r"expected 3 different words.*such as 'batch time x'"):
        squall.data.open(tmp_path / "a.npy", dt=1.0, axes=axes)


def test_python_objects_are_never_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}, []], dtype=object))
    torch.save({"x": np.zeros(3)}, tmp_path / "a.pt")
    for name in ("a.npy", "a.pt"):
        with pytest.raises(DataError, match="never"):
            squall.data.open(tmp_path / name, dt=1.0, axes="time x")


@pytest.mark.parametrize("zipped", [True, False])
def test_neuraloperator_pairs_are_trajectories_of_one_step(tmp_path, zipped):
    x, y = (
        torch.rand(B, X, Y, generator=torch.Generator().manual_seed(0)),
        torch.arange(float(B * X * Y)).reshape(B, X, Y),
    )
    torch.save({"x": x, "y": y}, tmp_path / "ns_train_64.pt", _use_new_zipfile_serialization=zipped)
    source = squall.data.open(tmp_path / "ns_train_64.pt", dt=1.0)
    assert source.shape == (B, 2, 1, X, Y)
    before, after = Transitions(source).fetch([3, 0])
    assert torch.equal(before[:, 0], x[[3, 0]])
    assert torch.equal(after[:, 0], y[[3, 0]])
    with pytest.raises(DataError, match="give dt="):
        squall.data.open(tmp_path / "ns_train_64.pt")


@pytest.mark.parametrize(("shape", "guess"), [((B, 2, 12, 12), "channel x y"), ((B, 12, 12, 2), "x y channel")])
def test_pairs_with_channels_are_asked_about(tmp_path, shape, guess):
    x, y = (torch.from_numpy(trajectories(*shape, seed=seed)) for seed in (0, 1))
    torch.save({"x": x, "y": y}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=f"looks like axes='batch time {guess}'"):
        squall.data.open(tmp_path / "a.pt", dt=1.0)
    source = squall.data.open(tmp_path / "a.pt", dt=1.0, axes=f"batch time {guess}")
    assert source.shape == (B, 2, 2, 12, 12)
    last = y if shape[1] == 2 else y.movedim(-1, 1)
    assert torch.equal(source.read()[:, 1], last)


def test_tensors_with_a_time_axis(tmp_path):
    u = torch.arange(float(B * T * X)).reshape(B, T, X)
    torch.save({"u": u, "t": torch.arange(T) * 0.1}, tmp_path / "a.pt")
    source = squall.data.open(tmp_path / "a.pt", axes="batch time x")
    assert source.dt == 0.1
    assert torch.equal(source.read()[:, :, 0], u)


def matlab(path, **arrays):
    hdf5storage = pytest.importorskip("hdf5storage")
    hdf5storage.savemat(str(path), arrays, format="7.3", oned_as="row", store_python_metadata=False)


def test_matlab_navier_stokes_file_with_its_first_state(tmp_path):
    u, a = trajectories(B, X, Y, T), trajectories(B, X, Y, seed=1)
    matlab(tmp_path / "ns.mat", a=a, u=u, t=np.arange(1.0, T + 1))
    source = squall.data.open(tmp_path / "ns.mat")
    expected = np.concatenate([a[:, None], np.moveaxis(u, -1, 1)], axis=1)[:, :, None]
    assert source.dt == 1.0
    assert source.description.axes == ("x", "y")
    assert np.array_equal(source.read(), expected)
    assert np.array_equal(source.windows([2, 1], [0, 3], 2), np.stack([expected[2, :2], expected[1, 3:5]]))


def test_matlab_pair_and_trajectory_alone(tmp_path):
    a, u = trajectories(B, X), trajectories(B, X, seed=1)
    matlab(tmp_path / "burgers.mat", a=a, u=u)
    assert np.array_equal(squall.data.open(tmp_path / "burgers.mat", dt=1.0).read()[:, :, 0], np.stack([a, u], 1))
    flow = trajectories(B, X, Y, T, seed=2)
    matlab(tmp_path / "flow.mat", a=flow[..., 0], u=flow, t=np.arange(5.0, T + 5))
    source = squall.data.open(tmp_path / "flow.mat")
    assert np.array_equal(source.read()[:, :, 0], np.moveaxis(flow, -1, 1))
    assert np.array_equal(source.condition("a", [1], [0], 1)[0, 0, 0], flow[1, ..., 0])


def test_old_matlab_files_and_other_formats_are_named(tmp_path):
    import scipy.io

    scipy.io.savemat(tmp_path / "old.mat", {"u": np.zeros((3, 4))})
    (tmp_path / "a.grib").write_bytes(b"GRIB" + bytes(40))
    (tmp_path / "a.nc5").write_bytes(b"CDF\x05" + bytes(40))
    for name, advice in (("old.mat", "-v7.3"), ("a.grib", "NetCDF"), ("a.nc5", "nccopy")):
        with pytest.raises(DataError, match=advice):
            squall.data.open(tmp_path / name)


def test_hdf5_of_no_known_layout_is_read_if_its_axes_are_said(tmp_path):
    values = trajectories(T, X, Y)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["vorticity"] = values
    source = squall.data.open(tmp_path / "a.h5", axes="time y x", dt=0.5, fields=["vorticity"], lengths=1.0)
    assert source.fields == ("vorticity",)
    assert source.description.axes == ("y", "x")
    assert np.array_equal(source.read()[0, :, 0], values)


def test_an_unknown_argument_is_refused(path):
    with pytest.raises(DataError, match="got step; allowed are dt, axes"):
        squall.data.open(path, step=3)
    with pytest.raises(DataError, match="describes itself: got dt; allowed are fields and gaps"):
        squall.data.open(path, dt=0.1)


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.partition(".")[0] == "xarray":
            raise ModuleNotFoundError(name, name=name)
        return real(name, *arguments, **options)

    path = tmp_path / "a.nc"
    data, _ = weather()
    write_netcdf3(path, data)
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setitem(__import__("sys").modules, "xarray", None)
    with pytest.raises(ImportError, match=r"xarray is not installed; run: pip install 'squall\[formats\]'"):
        squall.data.open(path)


@pytest.fixture
def well(tmp_path):
    """A data set of The Well: two training files with parameters of their own, one to validate and one to test."""
    states = trajectories(8, T, 2, X)
    files = {"train/a": (0, 3, 1.0), "train/b": (3, 5, 2.0), "valid/a": (5, 6, 1.0), "test/a": (6, 8, 2.0)}
    for name, (first, last, viscosity) in files.items():
        squall.data.write(
            tmp_path / "waves" / "data" / f"{name}.hdf5",
            states[first:last],
            dt=0.1,
            fields=["u", "v"],
            parameters={"viscosity": viscosity, "g": 9.8},
        )
    return tmp_path / "waves", states


def test_a_folder_of_the_well_has_its_own_parts(well):
    path, states = well
    source = squall.data.open(path)
    assert source.format.startswith("4 files, each The Well")
    order = [0, 1, 2, 3, 4, 5, 6, 7]
    assert np.array_equal(source.read(), states[order])
    parts = squall.data.split(source, validation=0.5, test=0.1)
    assert [part.trajectories for part in parts] == [5, 1, 2]
    assert np.array_equal(parts.test.read(), states[6:])
    own = squall.data.split(source, validation=1, test=1, by="trajectory")
    assert [part.trajectories for part in own] == [6, 1, 1]
    assert source.parameters == {"g": 9.8}
    assert source.condition("viscosity", [4, 0], [0, 0], 1).flatten().tolist() == [2.0, 1.0]
    assert np.array_equal(pickle.loads(pickle.dumps(source)).windows([7, 2], [1, 3], 2)[0], states[7, 1:3])


def test_stats_of_a_folder_are_used_and_else_computed(well):
    path, states = well
    computed = squall.data.Normalization.fit(squall.data.split(squall.data.open(path)).train)
    assert np.allclose(computed.mean, states[:5].mean(axis=(0, 1, 3)))
    stats = {key: {"u": 1.5, "v": 2.5} for key in ("mean", "std", "mean_delta", "std_delta")}
    (path / "stats.yaml").write_text(yaml.safe_dump(stats))
    source = squall.data.open(path)
    assert squall.data.Normalization.fit(source).mean == (1.5, 2.5)
    assert squall.data.Normalization.fit(squall.data.load(source)).std == (1.5, 2.5)
    assert squall.data.Normalization.fit(squall.data.split(source).train).mean == (1.5, 2.5)
    assert squall.data.Normalization.fit(squall.data.split(source, test=2, by="trajectory").train).mean != (1.5, 2.5)


def test_files_of_a_folder_that_differ_are_refused(well):
    path, states = well
    squall.data.write(path / "data/train/c.hdf5", states, dt=0.1, fields=["u", "w"])
    with pytest.raises(DataError, match=r"the fields differ between files: a.hdf5 has \('u', 'v'\), c.hdf5"):
        squall.data.open(path)
    (path / "data/train/c.hdf5").unlink()
    squall.data.write(path / "data/train/c.hdf5", states, dt=0.2, fields=["u", "v"])
    with pytest.raises(DataError, match="the time steps differ"):
        squall.data.open(path)
    (path / "data/train/c.hdf5").unlink()
    squall.data.write(path / "data/train/c.hdf5", states, dt=0.1, fields=["u", "v"], lengths=2.0)
    with pytest.raises(DataError, match="the points of the axis x differ"):
        squall.data.open(path)


def test_a_folder_of_pdebench_files_is_one_source(tmp_path):
    first, second = trajectories(B, T, X), trajectories(2, T, X, seed=1)
    write_tensor(tmp_path / "a.hdf5", first)
    write_tensor(tmp_path / "b.hdf5", second)
    source = squall.data.open(tmp_path)
    assert np.array_equal(source.read()[:, :, 0], np.concatenate([first, second]))
    assert source.parts is None


def dedalus(path, times, **fields):
    """As Dedalus 3 writes it: fields on labelled axes, to which their times and points are attached."""
    x, z = np.arange(X) * 0.5, (1 - np.cos(np.pi * (np.arange(Y) + 0.5) / Y)) / 2
    scales = {"t": ("sim_time", times), "x": ("x_hash_1", x), "z": ("z_hash_2", z)}
    with h5py.File(path, "w") as file:
        for name, values in scales.values():
            file[f"scales/{name}"] = values
            file[f"scales/{name}"].make_scale(name)
        for name, values in fields.items():
            task = file.create_dataset(f"tasks/{name}", data=values)
            for number, label in enumerate(("t", *[""] * (values.ndim - 3), "x", "z")):
                task.dims[number].label = label
                if label and values.shape[number] > 1:
                    task.dims[number].attach_scale(file[f"scales/{scales[label][0]}"])
    return x, z


def test_the_sets_of_dedalus_are_one_trajectory_between_walls(tmp_path):
    b, velocity = trajectories(2 * T, X, Y), trajectories(2 * T, 2, X, Y, seed=1)
    for part in range(2):
        now = slice(part * T, (part + 1) * T)
        times = 0.25 * np.arange(2 * T)[now]
        mean = b[now].mean(1, keepdims=True)
        _x, z = dedalus(tmp_path / f"s{part}.h5", times, b=b[now], mean=mean, velocity=velocity[now])
    source = squall.data.open(tmp_path)
    assert source.fields == ("b", "velocity_x", "velocity_z")
    assert source.dt == 0.25
    assert source.shape == (1, 2 * T, 3, X, Y)
    assert source.boundary == ("periodic", "wall")
    np.testing.assert_array_equal(source.read([0])[0], np.concatenate([b[:, None], velocity], 1))
    np.testing.assert_array_equal(source.coordinates[1], z)
    assert any(note.startswith("left out 'mean'") for note in source.notes)
    thickness = source.measure[0]
    assert thickness[0] < thickness[Y // 2]  # points are denser at the walls
    chosen = squall.data.open(tmp_path, fields=["velocity"])
    assert chosen.fields == ("velocity_x", "velocity_z")
    assert [c.name for c in chosen.conditions] == ["b"]
    with pytest.raises(DataError, match=r"fields: got heat; on a grid are b, mean, velocity"):
        squall.data.open(tmp_path, fields=["heat"])


def test_times_that_are_not_in_order_are_to_be_sorted(tmp_path):
    data, _ = weather()
    data.drop_vars("note").isel(time=[3, 4, 5, 0, 1, 2]).to_netcdf(tmp_path / "a.nc", engine="scipy")
    with pytest.raises(DataError, match="the times are not in order: sort the states"):
        squall.data.open(tmp_path / "a.nc")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells how much of a map is in memory")
@pytest.mark.parametrize("name", ["walks.npy", "walks.nc"])
def test_a_pass_over_a_mapped_file_does_not_keep_it_in_memory(tmp_path, monkeypatch, name):
    path = tmp_path / name
    walks = np.random.default_rng(0).standard_normal((4, 64, 1, 64, 64)).cumsum(1)
    if path.suffix == ".npy":
        np.save(path, walks)
    else:
        dims = ("batch", "time", "channel", "x", "y")
        xarray = pytest.importorskip("xarray")
        xarray.Dataset({"u": (dims, walks)}).to_netcdf(path, engine="scipy")
    monkeypatch.setattr(squall.data.arrays, "MAPPED_BYTES", 2**20)
    source = squall.data.open(path, axes="batch time channel x y", dt=1.0)
    for chosen, start, stop in source.chunks(2**20):
        source.read(chosen, start, stop)
    assert _in_memory(path) < 4 * 2**20 < path.stat().st_size


def _in_memory(path: Path) -> int:
    """Bytes of a mapped file that count as memory of this process."""
    maps = Path("/proc/self/smaps").read_text().split(f"{path}\n")[1:]
    return 1024 * sum(int(rest.split("Rss:")[1].split()[0]) for rest in maps)
