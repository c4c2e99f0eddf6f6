"""Files in the layouts of ERA5 (Copernicus) and WeatherBench 2: levels, latitude in either order, longitude first."""

import numpy as np
import pytest
import torch

import squall.data
from squall.data import DataError
from squall.evaluation.sphere import SphereGrid

from .conftest import trajectories

TIMES, LEVELS, LATITUDES, LONGITUDES = 5, (500, 850), 9, 16
LATITUDE = np.linspace(90, -90, LATITUDES)
LONGITUDE = np.arange(LONGITUDES) * 22.5


def era5(time: str = "time", level: str = "level"):
    """Geopotential and temperature on levels and surface pressure, as Copernicus names them."""
    xarray = pytest.importorskip("xarray")
    hours = np.datetime64("2020-01-01T00", "ns") + np.arange(TIMES) * np.timedelta64(6, "h")
    deep, flat = (time, level, "latitude", "longitude"), (time, "latitude", "longitude")
    shape = (TIMES, len(LEVELS), LATITUDES, LONGITUDES)
    data = xarray.Dataset(
        {
            "z": (deep, trajectories(*shape, dtype=np.float32), {"units": "m**2 s**-2"}),
            "t": (deep, trajectories(*shape, dtype=np.float32, seed=1), {"units": "K"}),
            "sp": (flat, trajectories(TIMES, LATITUDES, LONGITUDES, dtype=np.float32, seed=2), {"units": "Pa"}),
            "lsm": (flat[1:], np.zeros((LATITUDES, LONGITUDES), np.float32)),
        },
        coords={time: hours, level: list(LEVELS), "latitude": LATITUDE, "longitude": LONGITUDE},
    )
    data.latitude.attrs["units"] = "degrees_north"
    data.longitude.attrs["units"] = "degrees_east"
    return data


def write(data, path):
    if path.suffix == ".zarr":
        data.to_zarr(path, zarr_format=2, consolidated=True)
    else:
        data.to_netcdf(path, engine="h5netcdf")
    return path


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize(("time", "level"), [("time", "level"), ("valid_time", "pressure_level")])
def test_levels_become_channels_by_name(suffix, time, level, tmp_path):
    data = era5(time, level)
    source = squall.data.open(write(data, tmp_path / f"era5{suffix}"))
    assert source.shape == (1, TIMES, 5, LATITUDES, LONGITUDES)
    assert sorted(source.fields) == ["sp", "t_500", "t_850", "z_500", "z_850"]
    assert (source.dt, source.boundary) == (6.0, ("open", "periodic"))
    read = source.read()[0, :, source.fields.index("t_850")]
    assert np.array_equal(read, data.t[:, 1])
    assert [c.name for c in source.conditions] == ["lsm"]
    grid = SphereGrid.of(source)
    assert grid.closes
    assert torch.allclose(source.measure, grid.areas)
    chosen = squall.data.open(tmp_path / f"era5{suffix}", fields=["t", "sp"])
    assert chosen.fields == ("t_500", "t_850", "sp")


def test_a_variable_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    path = write(era5(), tmp_path / "era5.nc")
    with pytest.raises(DataError, match=r"no vorticity; the fields in time and space are z, t, sp"):
        squall.data.open(path, fields=["vorticity"])


def test_weatherbench_stores_longitude_first_and_latitude_from_the_south(tmp_path):
    """WeatherBench 2's 64 × 32 grid: (time, level, longitude, latitude), cell centres without poles."""
    latitude = np.arange(-90 + 90 / LATITUDES, 90, 180 / LATITUDES)
    names = {"z": "geopotential", "t": "temperature", "sp": "surface_pressure", "lsm": "land_sea_mask"}
    data = era5().rename(names).assign_coords(latitude=("latitude", latitude, {"units": "degrees_north"}))
    stored = data.transpose("time", "level", "longitude", "latitude")
    source = squall.data.open(write(stored, tmp_path / "wb2.zarr"), fields=["temperature"])
    assert source.description.axes == ("longitude", "latitude")
    assert source.boundary == ("periodic", "open")
    assert np.array_equal(source.read()[0, :, 0], data.temperature[:, 0].transpose("time", "longitude", "latitude"))
    with pytest.raises(ValueError, match=r"transpose\("):
        SphereGrid.of(source)
