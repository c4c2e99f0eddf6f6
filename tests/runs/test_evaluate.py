"""The evaluation of a run on a map with land, gaps and areas, as the command makes it."""

import json
import shutil

import numpy as np
import pytest
from shortcuts import without_drawing

import squall
import squall.data
from squall.cli import main
from squall.report.fields import Field
from squall.runs.folder import RunFolder

xarray = pytest.importorskip("xarray")
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def sea(tmp_path_factory):
    """A run on one trajectory of two fields, with land, one missing time, and cells of different areas."""
    folder = tmp_path_factory.mktemp("sea")
    rng = np.random.default_rng(0)
    latitude, longitude, time = np.linspace(-40, 60, 6), np.arange(0, 360, 45.0), 6.0 * np.arange(60)
    wave = np.sin(np.radians(longitude - 5 * time[:, None]))[:, None] * np.cos(np.radians(latitude))[:, None]
    fields = {"sst": 15 + wave + 0.01 * rng.normal(size=wave.shape), "wind": wave + 0.01 * rng.normal(size=wave.shape)}
    for values in fields.values():
        values[:, 4:, 2:4] = np.nan
        values[50] = np.nan
    dims = ("time", "latitude", "longitude")
    units = {"sst": "degC", "wind": "m/s"}
    axes = {
        "time": ("time", time, {"units": "hours since 1996-01-01"}),
        "latitude": ("latitude", latitude, {"units": "degrees_north"}),
        "longitude": ("longitude", longitude, {"units": "degrees_east"}),
    }
    variables = {name: (dims, values, {"units": units[name]}) for name, values in fields.items()}
    xarray.Dataset(variables, axes).to_netcdf(folder / "sea.nc", engine="h5netcdf")
    data = ["--data.path", str(folder / "sea.nc"), "--data.validation", "0.2", "--data.test", "0.4"]
    small = ["--model.hidden", "4", "--training.batch", "8", "--training.steps", "4", "--device.threads", "1"]
    assert main(["train", *data, *small, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("options", "steps"), [(["--steps", "4"], 4), (["--steps", "7", "--stride", "2"], 7), ([], None)]
)
def test_what_is_recorded_is_what_was_rolled_out(sea, tmp_path, options, steps):
    """The record, the curves and the NetCDF file agree on lead times and rollouts."""
    assert main(["evaluate", str(sea), *options, "--netcdf", str(tmp_path / "e.nc")]) == 0
    found = json.loads((sea / "evaluation.json").read_text())
    item = next(iter(found["checkpoints"].values()))
    assert steps is None or found["steps"] == steps
    assert found["steps"] >= 2
    for name in ("states", "time"):
        assert len(item["curves"][name]) == found["steps"]
    assert item["rollout"]["trajectories"] == found["trajectories"] > 1
    with xarray.open_dataset(tmp_path / "e.nc", engine="h5netcdf") as file:
        assert file.sizes["lead_time"] == found["steps"]
        assert file.attrs["trajectories"] == found["trajectories"]


def test_netcdf_has_coordinates_units_and_land(sea, tmp_path):
    assert main(["evaluate", str(sea), "--steps", "4", "--netcdf", str(tmp_path / "e.nc")]) == 0
    found = json.loads((sea / "evaluation.json").read_text())
    item = next(iter(found["checkpoints"].values()))
    with xarray.open_dataset(tmp_path / "e.nc", engine="h5netcdf") as file:
        assert file["sst_truth"].dims == ("rollout", "time", "latitude", "longitude")
        assert file["sst_truth"].attrs["units"] == "degC"
        assert file["latitude"].attrs["units"] == "degrees_north"
        assert np.isnan(file["sst_prediction"].isel(latitude=5, longitude=2)).all()
        assert np.isfinite(file["sst_prediction"].isel(latitude=0)).all()
        assert file["nrmse"].sel(field="wind").to_numpy() == pytest.approx(item["curves"]["nrmse"]["wind"])
    assert main(["evaluate", str(sea), "--netcdf", str(tmp_path / "e.nc")]) == 2  # it is there


def test_maps_have_longitude_across_units_and_the_colours_of_the_truth(sea):
    assert main(["evaluate", str(sea), "--steps", "4"]) == 0
    folder = RunFolder(sea)
    field = Field.of(folder.read_arrays("rollouts.npz"), 0, 0, folder.read_json("evaluation.json"))
    assert field.axes == ["longitude [°E]", "latitude [°N]"]
    assert field.name == "sst [degC]"
    assert [len(points) for points in field.points] == [8, 6] == list(field.truth.shape[1:])
    (_, truth, ours), (_, prediction, theirs), (_, error, colours) = field.rows()
    assert ours == theirs
    assert ours["vmin"] == np.nanmin(truth)
    assert colours["vmin"] == -colours["vmax"]
    assert np.isnan(truth[:, 2:4, 4:]).all()
    assert np.nanmax(np.abs(error - (prediction - truth))) == 0


def test_rollouts_are_drawn_as_animations(sea):
    image = pytest.importorskip("PIL.Image")
    assert main(["evaluate", str(sea), "--steps", "4", "--animate", "gif"]) == 0
    with image.open(sea / "figures" / "rollout_wind_1.gif") as picture:
        assert picture.n_frames == 5


def test_an_mp4_without_ffmpeg_is_explained(sea, monkeypatch, capsys):
    from matplotlib.animation import FFMpegWriter

    monkeypatch.setattr(FFMpegWriter, "isAvailable", classmethod(lambda cls: False))
    assert main(["evaluate", str(sea), "--steps", "4", "--animate", "mp4"]) == 2
    assert "ffmpeg, which is not installed" in capsys.readouterr().err


def test_events_and_conserved_quantities_are_named_on_the_command_line(sea, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("def square(u):\n    return u.square().flatten(1).sum(1)\n")
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", str(sea), "--steps", "4", "--events", "{wind: 0.5}", "--conserved", "sst", "mine.square"]
    assert main(words) == 0
    item = next(iter(json.loads((sea / "evaluation.json").read_text())["checkpoints"].values()))
    assert item["scores"]["events"].keys() == {"wind"}
    assert item["scores"]["events"]["wind"]["threshold"] == 0.5
    assert item["scores"]["conserved"].keys() == {"sst", "square"}
    assert "drift of square" in capsys.readouterr().out
    assert main(["evaluate", str(sea), "--conserved", "mine.cube"]) == 2
    assert "'mine.cube' cannot be imported" in capsys.readouterr().err
    assert main(["evaluate", str(sea), "--conserved", "salt"]) == 2
    assert "no field 'salt': the data have sst, wind" in capsys.readouterr().err


@pytest.fixture(scope="module")
def forced(tmp_path_factory):
    """A run whose model sees two states, a forcing and a static field, on a map with land."""
    folder = tmp_path_factory.mktemp("forced")
    x, time = 2 * np.pi * np.arange(8) / 8, np.arange(80)
    sun = np.sin(0.2 * time)
    waves = np.sin(x[:, None] - 0.1 * time[:, None, None]) * np.cos(x) + 0.5 * sun[:, None, None]
    waves[:, 5:, :3] = np.nan
    conditions = {"sun": sun[None], "depth": np.cos(x)[:, None] * np.ones(8)}
    about = {"dt": 1.0, "fields": ["sst"], "gaps": True, "conditions": conditions, "boundary": ["periodic", "wall"]}
    squall.data.write(folder / "forced.hdf5", waves[None, :, None], **about)
    data = ["--data.path", str(folder / "forced.hdf5"), "--data.validation", "0.2", "--data.test", "0.3"]
    sees = ["--data.history", "2", "--data.inputs", "[sun, depth]", "--training.unroll", "2"]
    model = ["--model.name", "unet", "--model.arguments", "{width: 4, levels: 1}", "--model.predicts", "state"]
    small = [
        "--training.batch",
        "8",
        "--training.steps",
        "4",
        "--training.validate_every",
        "4",
        "--device.threads",
        "1",
    ]
    words = [*data, *sees, *model, "--model.residual", "true", "--training.residual", "state", *small]
    assert main(["train", *words, "--out", str(folder / "run")]) == 0
    with without_drawing():
        assert main(["evaluate", str(folder / "run"), "--steps", "5"]) == 0
    return folder


def test_evaluation_prediction_and_python_agree_on_history_forcings_and_land(forced, tmp_path, monkeypatch):
    kept = RunFolder(forced / "run").read_arrays("rollouts.npz")
    moved = tmp_path / "moved.hdf5"
    shutil.copy(forced / "forced.hdf5", moved)
    monkeypatch.setattr("squall.runs.trained.open_data", None)  # nothing asks for the training file
    first = 80 - 24  # the test part; its rollouts start from the second of two states
    out = tmp_path / "p.nc"
    words = ["predict", str(forced / "run"), "--initial", str(moved), "--start", str(first), "--steps", "5"]
    assert main([*words, "--out", str(out)]) == 0
    predicted = squall.data.open(out).read()[0]
    source = squall.data.open(moved)
    run = squall.open_run(forced / "run")
    sun = source.condition("sun", [0], [first + 1], 5)[:, :, 0, 0, 0]
    ours = run.predict(source.read(None, first, first + 2), 5, forcings={"sun": sun})[0]
    sea = source.mask[0].numpy()
    assert not sea.all()
    assert np.array_equal(predicted.numpy()[:, :, sea], ours.numpy()[:, :, sea])
    np.testing.assert_allclose(kept["prediction"][0][:, :, sea], ours.numpy()[:, :, sea], rtol=1e-5, atol=1e-6)
    held = source.read(None, first + 1, first + 2)[0, 0, 0].numpy()
    assert np.array_equal(ours.numpy()[:, 0, ~sea], np.broadcast_to(held[~sea].astype("f4"), (6, (~sea).sum())))


def test_a_forcing_that_is_missing_or_too_short_is_refused_by_the_command(forced, tmp_path, capsys):
    words = ["predict", str(forced / "run"), "--initial", str(forced / "forced.hdf5"), "--out", str(tmp_path / "p.nc")]
    assert main([*words, "--steps", "100"]) == 2
    assert "the forcing 'sun'" in (told := capsys.readouterr().err)
    assert "ends before the rollout: 100 steps need it at 100 times" in told
    assert main([*words, "--start", "79", "--steps", "1"]) == 2
    assert "the model sees 2 state(s)" in capsys.readouterr().err
    bare = squall.data.write(
        tmp_path / "bare.hdf5", squall.data.open(forced / "forced.hdf5").read(), dt=1.0, fields=["sst"]
    )
    assert main([*words[:3], str(bare), *words[4:], "--steps", "3"]) == 2
    assert "sees the condition 'sun', which" in capsys.readouterr().err
    assert not list(tmp_path.glob("p*"))
