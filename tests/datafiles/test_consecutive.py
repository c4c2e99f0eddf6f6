"""Folders of files that follow each other in time, written by xarray."""

import numpy as np
import pytest
import torch

import squall.data
from squall.data import DataError
from squall.data.formats.consecutive import date_hours

xarray = pytest.importorskip("xarray")
pytest.importorskip("h5netcdf")
pytest.importorskip("zarr")


def year(number: int, days: int | None = None, fields=("sst",)):
    """Daily states of a year with land and a forcing."""
    time = np.arange(f"{number}-01-01", f"{number + 1}-01-01", dtype="datetime64[D]")[:days].astype("datetime64[ns]")
    generator = np.random.default_rng(number)
    axes = ("time", "lat", "lon")
    variables = {name: (axes, generator.standard_normal((len(time), 3, 4)).astype("f4")) for name in fields}
    for _, values in variables.values():
        values[:, 0, 0] = np.nan
    variables["sun"] = ("time", generator.standard_normal(len(time)).astype("f4"))
    return xarray.Dataset(variables, {"time": time, "lat": np.linspace(0, 20, 3), "lon": np.linspace(0, 30, 4)})


def write(data, path):
    """Dates count from the first day of the file, as they do in files of one year each."""
    first = str(data.time.values.ravel()[0])[:10]
    data.to_netcdf(path, engine="h5netcdf", encoding={"time": {"units": f"hours since {first}"}})


def test_files_of_a_year_each_are_one_trajectory(tmp_path):
    years = [year(number) for number in (2000, 2001, 2002)]
    for data, name in zip(years, ("b", "c", "a"), strict=True):  # the order is that of the times
        write(data, tmp_path / f"{name}.nc")
    source = squall.data.open(tmp_path)
    whole = np.concatenate([data.sst.values for data in years])
    sea = ~np.isnan(whole[0])
    assert source.shape == (1, 366 + 365 + 365, 1, 3, 4)
    assert np.array_equal(source.mask[0].numpy(), sea)
    assert source.valid is None
    found = source.windows([0, 0, 0], [364, 10, 729], 5)[:, :, 0].numpy()
    for window, start in zip(found, (364, 10, 729), strict=True):
        assert np.array_equal(window[:, sea], whole[start : start + 5, sea])
    sun = np.concatenate([data.sun.values for data in years])
    assert np.array_equal(source.condition("sun", [0], [364], 5).flatten(), sun[364:369])
    assert "3 files, each NetCDF-4, joined in time from b.nc to a.nc" in squall.data.summary(source)


def test_a_year_that_is_missing_is_a_gap(tmp_path):
    for number in (2000, 2002):
        write(year(number), tmp_path / f"{number}.nc")
    source = squall.data.open(tmp_path)
    assert source.valid.sum() == 366 + 365 == source.shape[1] - 365
    assert len(squall.data.Transitions(source, unroll=4)) == 362 + 361
    assert "times: 365 of 1096 are in no file; they are gaps" in source.notes
    assert torch.isfinite(squall.data.source.load(source).condition("sun", [0], [0], 1096)).all()


@pytest.mark.parametrize("axis", [True, False])
def test_snapshots_of_one_time_each_are_one_trajectory(tmp_path, monkeypatch, axis):
    monkeypatch.setattr(squall.data.formats.consecutive, "OPEN_FILES", 3)
    data = year(2001, 6)
    for time in range(data.sizes["time"]):  # no suffix says that they are NetCDF
        write(data.isel(time=[time] if axis else time), tmp_path / f"wrfout_{time:04}")
    source = squall.data.open(tmp_path, fields=["sst"])
    assert source.shape == (1, data.sizes["time"], 1, 3, 4)
    assert source.dt == 24
    sea = source.mask[0].numpy()
    assert np.array_equal(source.read()[0, :, 0].numpy()[:, sea], data.sst.values[:, sea])
    assert np.array_equal(source.condition("sun", [0], [2], 3).flatten(), data.sun.values[2:5])


def test_stores_of_zarr_are_joined_too(tmp_path):
    for number in (2001, 2002):
        year(number).to_zarr(tmp_path / f"{number}.zarr", zarr_format=2, consolidated=False)
    assert squall.data.open(tmp_path).shape[:2] == (1, 730)


def test_files_of_the_same_time_are_trajectories(tmp_path):
    for name in "ab":
        write(year(2001), tmp_path / f"{name}.nc")
    assert squall.data.open(tmp_path).shape[:2] == (2, 365)


def test_files_of_one_month_in_every_year_are_trajectories(tmp_path):
    for number in (2001, 2002):
        write(year(number, 31), tmp_path / f"{number}.nc")
    assert squall.data.open(tmp_path).shape[:2] == (2, 31)


def test_months_are_joined_where_dt_takes_them_as_equal(tmp_path):
    for number in (2001, 2002):
        write(year(number).resample(time="MS").mean(), tmp_path / f"{number}.nc")
    with pytest.raises(DataError, match="not equally spaced"):
        squall.data.open(tmp_path)
    source = squall.data.open(tmp_path, dt=1.0, fields=["sst"])
    assert (source.shape[:2], source.dt) == ((1, 24), 1.0)


def test_a_mask_that_changes_between_consecutive_files_is_said(tmp_path):
    first, second = year(2001, 365), year(2002)
    second.sst.values[:, 1, 1] = np.nan
    for data in (first, second):
        write(data, tmp_path / f"{str(data.time.values[0])[:4]}.nc")
    source = squall.data.open(tmp_path)
    with pytest.warns(UserWarning, match=r"mask differs between files: every state of 2002\.nc .* left out as a gap"):
        assert source.valid.sum() == 365
    assert (~source.mask).sum() == 1


def test_consecutive_files_with_other_fields_are_refused(tmp_path):
    write(year(2001), tmp_path / "2001.nc")
    write(year(2002, fields=("sst", "u")), tmp_path / "2002.nc")
    with pytest.raises(DataError, match=r"fields differ between files: 2001\.nc has \('sst',\), 2002\.nc"):
        squall.data.open(tmp_path)


@pytest.mark.parametrize("calendar", ["noleap", "360_day", "standard"])
def test_dates_count_as_cftime_counts_them(calendar):
    cftime = pytest.importorskip("cftime")
    texts = ["2000-02-28", "2000-03-01 06:30:00", "2101-12-30T12:00Z"]
    dates = [cftime.datetime(*n, calendar=calendar) for n in ((2000, 2, 28), (2000, 3, 1, 6, 30), (2101, 12, 30, 12))]
    theirs = [cftime.date2num(date, "hours since 1900-01-01", calendar=calendar) for date in dates]
    ours = [date_hours(text, calendar) - date_hours("1900-01-01", calendar) for text in texts]
    assert ours == pytest.approx(theirs)
