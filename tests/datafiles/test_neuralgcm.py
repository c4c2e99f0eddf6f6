"""The file of examples/neuralgcm_states.py, from states as NeuralGCM hands them out; its model needs JAX."""

from pathlib import Path

import numpy as np
import pytest
import torch

import squall.data
from squall.evaluation.sphere import SphereGrid

xarray = pytest.importorskip("xarray")

EXAMPLE = Path(__file__).parents[2] / "examples" / "neuralgcm_states.py"
NODES, WEIGHTS = np.polynomial.legendre.leggauss(8)
LATITUDE, LONGITUDE, LEVEL = np.degrees(np.arcsin(NODES)), np.arange(16) * 22.5, np.array([200, 500, 850])


@pytest.fixture(scope="module")
def names() -> dict:
    names: dict = {"__name__": "neuralgcm_states"}
    exec(compile(EXAMPLE.read_text(), EXAMPLE, "exec"), names)
    return names


def states(names: dict, member: int) -> "xarray.Dataset":
    """Of (time, level, longitude, latitude), from the south; every value says where it stands."""
    times = names["START"] + np.arange(3) * np.timedelta64(6, "h")
    coordinates = {"time": times, "level": LEVEL, "longitude": LONGITUDE, "latitude": LATITUDE}
    time, level, east, north = np.meshgrid(np.arange(3), LEVEL, LONGITUDE, LATITUDE, indexing="ij")
    fields = ["specific_humidity", *reversed(names["FIELDS"])]
    values = {
        name: (tuple(coordinates), (i + 10 * time + level + east / 1e3 + north + 1e4 * member).astype(np.float32))
        for i, name in enumerate(fields)
    }
    return xarray.Dataset(values, coordinates)


def test_the_file_holds_the_members_fields_and_levels_in_the_order_of_era5(names, tmp_path):
    path = tmp_path / "gcm.nc"
    names["write"]([names["chosen"](states(names, member)) for member in range(2)], path)
    source = squall.data.open(path)
    assert source.fields == tuple(f"{name}_{level}" for name in names["FIELDS"] for level in names["LEVELS"])
    assert source.shape == (2, 3, 8, 8, 16)
    assert source.description.axes == ("latitude", "longitude")
    assert source.boundary[1] == "periodic"
    assert source.dt == 6.0
    grid = SphereGrid.of(source)
    torch.testing.assert_close(grid.areas[:, 0], torch.from_numpy(8 * WEIGHTS / 2), rtol=1e-9, atol=0)
    torch.testing.assert_close(source.measure, grid.areas, rtol=0.05, atol=0)  # cells end halfway between latitudes
    u = source.read()
    row = int(np.argmin(np.abs(grid.latitude - LATITUDE[6])))
    expected = {"geopotential_850": 4 + 850, "temperature_500": 3 + 500}
    for field, value in expected.items():
        found = u[1, 2, source.fields.index(field), row, 5].item()
        assert found == pytest.approx(value + 20 + LONGITUDE[5] / 1e3 + LATITUDE[6] + 1e4, rel=1e-6)


def test_a_file_that_exists_and_a_number_of_days_below_one_are_refused(names, tmp_path):
    (tmp_path / "gcm.nc").touch()
    with pytest.raises(SystemExit, match="exists and is not overwritten"):
        names["main"]([str(tmp_path / "gcm.nc")])
    with pytest.raises(SystemExit, match="--days is 0 and --members 2; both must be at least 1"):
        names["main"]([str(tmp_path / "new.nc"), "--days", "0"])
