"""Ocean models: latitude and longitude vary along both axes, areas are missing on land, dates have calendars."""

import numpy as np
import pytest
import torch

import squall.data
from squall.data.measure import closes, curvilinear_areas, on_sphere

netCDF4 = pytest.importorskip("netCDF4")
xarray = pytest.importorskip("xarray")


def ocean(path, latitude, longitude, **fixed):
    """A file as ROMS and MOM write them, with land at the first points."""
    rows, columns = latitude.shape
    states = np.ma.array(np.random.default_rng(0).normal(size=(5, rows, columns)))
    states[:, :2, :2] = np.ma.masked
    with netCDF4.Dataset(path, "w") as file:
        for name, size in (("ocean_time", 5), ("eta_rho", rows), ("xi_rho", columns)):
            file.createDimension(name, size)
        clock = file.createVariable("ocean_time", "f8", ("ocean_time",))
        clock.units, clock.calendar = "days since 1990-01-01 00:00:00", "noleap"
        clock[:] = 12345.25 + np.arange(5)
        for name, values, unit in (("lat_rho", latitude, "degrees_N"), ("lon_rho", longitude, "degree_east")):
            file.createVariable(name, "f8", ("eta_rho", "xi_rho"))[:] = values
            file[name].units = unit
        file.createVariable("zeta", "f4", ("ocean_time", "eta_rho", "xi_rho"), fill_value=np.float32(1e37))[:] = states
        for name, values in fixed.items():
            file.createVariable(name, "f8", ("eta_rho", "xi_rho"), fill_value=1e20)[:] = values
    return path


def tilted(rows=6, columns=8):
    j, i = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return 30 + 2.0 * j - 0.3 * i, -60 + 2.0 * i + 0.5 * j


def test_a_regional_curvilinear_grid_is_open_with_the_areas_of_its_cells(tmp_path):
    latitude, longitude = tilted()
    source = squall.data.open(ocean(tmp_path / "o.nc", latitude, longitude))
    assert source.boundary == ("open", "open")
    assert source.description.spacing == (1, 1)
    expected = np.cos(np.radians(latitude)) * (2 * 2 + 0.3 * 0.5)  # cos φ |∂(φ, λ)/∂(j, i)|, for small cells
    assert source.measure is not None
    assert source.measure.numpy() == pytest.approx(
        expected / expected.mean(), rel=4e-3
    )  # one-sided differences at the edges
    assert source.mask is not None
    assert int((~source.mask).sum()) == 4
    assert "curvilinear" in "".join(source.notes)


def test_areas_of_the_file_come_before_those_of_its_coordinates(tmp_path):
    latitude, longitude = tilted()
    width = 1 + 0.1 * np.arange(8) + np.zeros((6, 1))
    source = squall.data.open(ocean(tmp_path / "roms.nc", latitude, longitude, pm=1 / width, pn=np.full((6, 8), 0.5)))
    assert source.measure is not None
    assert torch.allclose(source.measure, torch.from_numpy(width / width.mean()))
    assert {"pm", "pn"} <= {condition.name for condition in source.conditions}
    area = np.ma.array(width, mask=np.zeros_like(width, bool))
    area[:2, :2] = np.ma.masked  # stored as 1e20
    source = squall.data.open(ocean(tmp_path / "mom.nc", latitude, longitude, areacello=area))
    assert source.measure is not None
    assert source.measure[:, 5:].numpy() == pytest.approx(width[:, 5:] / area.mean())


def test_a_grid_around_the_earth_closes_along_its_longitudes():
    j, i = np.meshgrid(np.linspace(-70, 70, 15), np.arange(0.0, 360.0, 15), indexing="ij")
    vectors = on_sphere(j + 5 * np.sin(np.radians(i)), i)
    assert (closes(vectors, 0), closes(vectors, 1)) == (False, True)
    total = curvilinear_areas(vectors)[1:-1].sum() / (2 * np.pi * 2 * np.sin(np.radians(65)))
    assert total == pytest.approx(1, rel=0.03)


def test_the_first_date_is_said_with_its_calendar(tmp_path):
    source = squall.data.open(ocean(tmp_path / "o.nc", *tilted()))
    assert source.dt == 24
    assert source.description.provenance == {
        "first_time": "296286 hours since 1990-01-01 00:00:00",
        "calendar": "noleap",
    }


@pytest.mark.parametrize("clock", ["XTIME", "Times"])
def test_a_file_of_wrf_has_its_dates_and_its_curvilinear_grid(tmp_path, clock):
    """Its time axis has no variable, latitudes and longitudes repeat at every time, and dates may be text alone."""
    south, west = np.meshgrid(np.linspace(20, 30, 5), np.linspace(-95, -80, 6), indexing="ij")
    axes = ("Time", "south_north", "west_east")
    variables = {
        "XLAT": (axes, np.broadcast_to(south, (4, 5, 6)).astype("f4")),
        "XLONG": (axes, np.broadcast_to(west, (4, 5, 6)).astype("f4")),
        "T2": (axes, np.random.default_rng(0).normal(size=(4, 5, 6)).astype("f4"), {"units": "K"}),
    }
    if clock == "Times":
        variables["Times"] = (
            "Time",
            np.array([f"2005-08-{28 + n // 2}_{12 * (n % 2):02}:00:00" for n in range(4)], "S19"),
        )
    else:
        variables["XTIME"] = ("Time", np.arange(4) * 720.0, {"units": "minutes since 2005-08-28 00:00:00"})
    xarray.Dataset(variables).to_netcdf(tmp_path / "wrfout", engine="netcdf4")
    source = squall.data.open(tmp_path / "wrfout")
    assert (source.fields, source.dt, source.boundary) == (("T2",), 12.0, ("open", "open"))
    assert source.provenance["first_time"] == "0 hours since 2005-08-28 00:00:00"
    assert [condition.name for condition in source.conditions] == ["XLAT", "XLONG"]
    assert np.array_equal(source.condition("XLAT", [0], [2], 1)[0, 0, 0], south.astype("f4"))
    assert source.measure[0, 0] > source.measure[-1, 0]
