"""A trained run is rolled out without its data file, into files of every kind that resume."""

import json
import shutil

import h5py
import numpy as np
import pytest
import torch

import squall
import squall.data
from squall.cli import main
from squall.data import streaming
from squall.report.fields import Field
from squall.runs.folder import RunFolderError

xarray = pytest.importorskip("xarray")


def waves(trajectories: int = 6, times: int = 12, channels: int = 2) -> np.ndarray:
    x = 2 * np.pi * np.arange(16) / 16
    phase = np.random.default_rng(0).uniform(0, 6, (trajectories, 1, channels, 1))
    return np.sin(x + phase + 0.1 * np.arange(times)[:, None, None]) + 3.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two fields whose data file is gone."""
    folder = tmp_path_factory.mktemp("run")
    squall.data.write(folder / "waves.hdf5", waves(), dt=0.1, fields=["u", "v"], lengths=2.0)
    words = ["--data.path", str(folder / "waves.hdf5"), "--data.validation", "1", "--data.test", "1"]
    small = ["--model.hidden", "6", "--training.batch", "8", "--training.steps", "12", "--device.threads", "1"]
    assert main(["train", *words, *small, "--out", str(folder / "run")]) == 0
    (folder / "waves.hdf5").rename(folder / "elsewhere.hdf5")
    return folder / "run"


def test_a_run_is_rolled_out_without_its_data(trained):
    run = squall.open_run(trained)
    u0 = torch.from_numpy(waves(3)[:, 0])
    states = run.predict(u0, steps=5)
    assert states.shape == (3, 6, 2, 16)
    assert states.dtype == torch.float32
    with torch.no_grad():  # a small model computes otherwise where gradients are asked for
        expected = squall.rollout(squall.euler, run.model, u0.float(), 0.1, 5)
    assert torch.equal(states, expected)
    assert run.normalization.mean == pytest.approx([3, 3], abs=0.2)
    assert run.description.fields == ("u", "v")
    assert run.description.spacing == (0.125,)
    assert run.checkpoint == "best"


def test_the_data_are_asked_for_where_they_are_needed(trained):
    run = squall.open_run(trained)
    with pytest.raises(squall.data.MissingFileError, match=r"waves\.hdf5"):
        _ = run.experiment
    assert len(squall.open_run(trained, str(trained.parent / "elsewhere.hdf5")).experiment.split.test.read()) == 1


@pytest.mark.parametrize("name", ["data.json", "data.npz"])
def test_a_description_that_was_edited_is_refused(trained, tmp_path, name):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(RunFolderError, match=rf"{name} was edited after the training"):
        squall.open_run(tmp_path / "run")


def test_a_run_of_an_earlier_version_asks_for_its_data(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    environment = json.loads((trained / "environment.json").read_text())
    del environment["description"], environment["record"]
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment))
    for name in ("data.json", "data.npz"):
        (tmp_path / "run" / name).unlink()
    with pytest.warns(UserWarning, match="earlier version"):
        run = squall.open_run(tmp_path / "run", str(trained.parent / "elsewhere.hdf5"))
    assert run.predict(torch.from_numpy(waves(3)[:, 0]), 2).shape == (3, 3, 2, 16)


@pytest.fixture
def initial(tmp_path):
    np.save(tmp_path / "initial.npy", waves(3)[:, 0])
    return tmp_path / "initial.npy"


def words(trained, initial, out, *more: str) -> list[str]:
    return ["predict", str(trained), "--initial", str(initial), "--steps", "40", "--out", str(out), *more]


def read(path) -> dict[str, np.ndarray]:
    if path.suffix == ".zarr":
        with xarray.open_zarr(path) as file:
            return {name: file[name].to_numpy() for name in ("u", "v", "time", "x")}
    with xarray.open_dataset(path, engine="h5netcdf") as file:
        return {name: file[name].to_numpy() for name in ("u", "v", "time", "x")}


@pytest.mark.parametrize("suffix", ["hdf5", "nc", "zarr"])
def test_predictions_are_those_of_python_in_every_format(trained, initial, tmp_path, suffix):
    out = tmp_path / f"p.{suffix}"
    assert main(words(trained, initial, out)) == 0
    expected = squall.open_run(trained).predict(torch.from_numpy(waves(3)[:, 0]), 40)
    found = squall.data.open(out)
    assert found.fields == ("u", "v")
    assert found.dt == pytest.approx(0.1)
    assert torch.equal(found.read(), expected)
    if suffix != "hdf5":
        assert np.array_equal(read(out)["v"], expected[:, :, 1].numpy())
        assert read(out)["time"] == pytest.approx(0.1 * np.arange(41))
        assert read(out)["x"] == pytest.approx(0.125 * np.arange(16))
    assert main(words(trained, initial, out)) == 2  # it is there


def test_netcdf_is_read_by_another_package(trained, initial, tmp_path):
    netCDF4 = pytest.importorskip("netCDF4")
    assert main(words(trained, initial, tmp_path / "p.nc")) == 0
    with netCDF4.Dataset(tmp_path / "p.nc") as file:
        assert file["u"].dimensions == ("trajectory", "time", "x")
        assert file["u"].shape == (3, 41, 16)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("suffix", ["hdf5", "nc", "zarr"])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_a_prediction_that_was_killed_can_be_read_and_goes_on(trained, initial, tmp_path, monkeypatch, suffix, blocks):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 7 * 3 * 2 * 16 * 4)  # seven times a block
    out, part = tmp_path / f"p.{suffix}", tmp_path / f"p.part.{suffix}"
    kind = streaming._Zarr if suffix == "zarr" else streaming._Raw
    write, seen = kind.write, []

    def die(self, start, states):
        if len(seen) == blocks:
            if suffix != "zarr":  # in the middle of a block
                write(self, start, states[:, :3])
            raise Killed
        seen.append(start)
        write(self, start, states)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "write", die)
        with pytest.raises(Killed):
            main(words(trained, initial, out))
    assert not out.exists()
    expected = squall.open_run(trained).predict(torch.from_numpy(waves(3)[:, 0]), 40).numpy()
    if suffix == "hdf5":
        with h5py.File(part) as file:
            there = file["t0_fields/u"][:]
    else:
        there = read(part)["u"]
    assert np.array_equal(there[:, : 7 * blocks], expected[:, : 7 * blocks, 0])
    assert np.isnan(there[:, 7 * blocks + 3 :]).all()
    resumed = []
    monkeypatch.setattr(kind, "write", lambda self, start, states: (resumed.append(start), write(self, start, states)))
    assert main(words(trained, initial, out)) == 0
    assert resumed[0] == 7 * blocks
    assert np.array_equal(squall.data.open(out).read().numpy(), expected)
    assert not part.exists()


def test_the_part_of_another_prediction_is_not_touched(trained, initial, tmp_path, monkeypatch, capsys):
    write = streaming._Raw.write
    with monkeypatch.context() as patch:
        patch.setattr(streaming._Raw, "write", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            main(words(trained, initial, tmp_path / "p.nc"))
    before = (tmp_path / "p.part.nc").read_bytes()
    assert write is streaming._Raw.write
    assert main(words(trained, initial, tmp_path / "p.nc", "--checkpoint", "last", "--steps", "41")) == 2
    assert "unfinished part of another prediction" in capsys.readouterr().err
    assert (tmp_path / "p.part.nc").read_bytes() == before


def test_a_full_disk_keeps_what_is_written(trained, initial, tmp_path, monkeypatch, capsys):
    import errno

    monkeypatch.setattr(streaming, "BLOCK_BYTES", 7 * 3 * 2 * 16 * 4)
    write, seen = streaming._Zarr.write, []

    def full(self, start, states):
        if seen:
            raise OSError(errno.ENOSPC, "No space left on device")
        seen.append(start)
        write(self, start, states)

    monkeypatch.setattr(streaming._Zarr, "write", full)
    assert main(words(trained, initial, tmp_path / "p.zarr")) == 2
    assert "disk is full" in capsys.readouterr().err
    assert np.isfinite(read(tmp_path / "p.part.zarr")["u"][:, :7]).all()


def test_no_room_is_known_before_anything_is_computed(trained, initial, tmp_path, monkeypatch, capsys):
    import errno

    def none(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streaming, "write_all", none)
    monkeypatch.setattr("squall.runs.emulator.Emulator.roll", none)
    before = {*tmp_path.iterdir()}
    assert main(words(trained, initial, tmp_path / "p.nc")) == 2
    assert "p.nc" in capsys.readouterr().err
    assert {*tmp_path.iterdir()} == before


def test_initial_states_are_taken_from_files_of_other_formats(trained, tmp_path):
    states = waves(4)
    variables = {name: (("batch", "time", "x"), states[:, :, i]) for i, name in ((1, "v"), (0, "u"))}
    variables["other"] = (("batch", "time", "x"), states[:, :, 0])
    axes = {"time": 0.1 * np.arange(12), "x": 0.125 * np.arange(16)}
    xarray.Dataset(variables, axes).to_netcdf(tmp_path / "start.nc", engine="h5netcdf")
    out = tmp_path / "p.zarr"
    assert main(words(trained, tmp_path / "start.nc", out, "--start", "3")) == 0
    found = read(out)
    assert np.array_equal(found["u"][:, 0], states[:, 3, 0].astype(np.float32))
    assert np.array_equal(found["v"][:, 0], states[:, 3, 1].astype(np.float32))
    assert found["time"][0] == pytest.approx(0.3)


def test_a_file_without_the_fields_of_the_run_is_refused(trained, tmp_path, capsys):
    squall.data.write(tmp_path / "w.hdf5", waves(), dt=0.1, fields=["u", "w"])
    assert main(words(trained, tmp_path / "w.hdf5", tmp_path / "p.nc")) == 2
    said = capsys.readouterr().err
    assert "no field 'v': the run was trained on u, v, and the file has u, w" in said
    assert "--fields v=u" in said


def test_fields_that_are_called_otherwise_in_the_file_are_named(trained, tmp_path, capsys):
    states = waves(4)
    squall.data.write(tmp_path / "u.hdf5", states, dt=0.1, fields=["u", "v"])
    squall.data.write(tmp_path / "w.hdf5", states, dt=0.1, fields=["zonal", "v"])
    assert main(words(trained, tmp_path / "w.hdf5", tmp_path / "w.nc", "--fields", "u=zonal")) == 0
    assert main(words(trained, tmp_path / "u.hdf5", tmp_path / "u.nc")) == 0
    assert np.array_equal(read(tmp_path / "w.nc")["u"], read(tmp_path / "u.nc")["u"])
    assert main(words(trained, tmp_path / "w.hdf5", tmp_path / "p.nc", "--fields", "zonal")) == 2
    assert "--fields zonal: expected NAME=NAME_IN_THE_FILE, where NAME is" in " ".join(capsys.readouterr().err.split())


def test_another_grid_is_taken_where_the_model_can(trained, tmp_path):
    run = squall.open_run(trained)
    with pytest.warns(UserWarning, match="grid of 24 points, the training was on 16"):
        assert run.predict(torch.ones(1, 2, 24), 3).shape == (1, 4, 2, 24)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 16), r"\(batch, 2 channel\(s\), 16\)"), ((2, 16), "fields are u, v")],
)
def test_states_that_do_not_fit_are_refused(trained, shape, message):
    with pytest.raises(ValueError, match=message):
        squall.open_run(trained).predict(torch.ones(shape), 3)


def test_a_forcing_that_no_model_sees_is_refused(trained):
    with pytest.raises(ValueError, match="'sun' is given, but the model sees no conditions"):
        squall.open_run(trained).predict(torch.ones(1, 2, 16), 3, forcings={"sun": torch.ones(1, 3)})


def test_an_unknown_suffix_is_refused(trained, initial, tmp_path, capsys):
    assert main(words(trained, initial, tmp_path / "p.csv")) == 2
    assert "'.csv' is none of .hdf5, .h5, .nc, .zarr" in capsys.readouterr().err


def one_time(path, states):
    """The states at one time as a stranger would save them; the options that their axes need."""
    channels = {"u": states[:, 0], "v": states[:, 1]}
    if path.suffix == ".npz":
        np.savez(path, **channels)
    elif path.suffix == ".pt":
        torch.save({name: torch.from_numpy(values) for name, values in channels.items()}, path)
    elif path.suffix == ".mat":
        with h5py.File(path, "w") as file:
            for name, values in channels.items():
                file[name] = values.T
                file[name].attrs["MATLAB_class"] = np.bytes_("double")
        return ["--axes", "x batch"]
    else:
        data = xarray.Dataset({name: (("sample", "x"), values) for name, values in channels.items()})
        data = data.assign_coords(time=np.datetime64("2021-03-04T06:00", "ns"))
        data.to_netcdf(path) if path.suffix == ".nc" else data.to_zarr(path)
        return []
    return ["--axes", "batch x"]


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("suffix", ["npz", "pt", "mat", "nc", "zarr"])
def test_initial_states_come_from_files_of_one_time(trained, tmp_path, suffix):
    path, out = tmp_path / f"one.{suffix}", tmp_path / "p.hdf5"
    options = one_time(path, waves(3)[:, 0])
    assert main([*words(trained, path, out), *options]) == 0
    expected = squall.open_run(trained).predict(torch.from_numpy(waves(3)[:, 0]), 40)
    assert torch.equal(squall.data.open(out).read(), expected)


def test_a_file_of_one_time_has_no_step_to_train_on(tmp_path):
    np.savez(tmp_path / "one.npz", u=np.zeros((3, 16)))
    with pytest.raises(squall.data.DataError, match="time"):
        squall.data.open(tmp_path / "one.npz", axes="batch x", dt=0.1)
    assert squall.data.open(tmp_path / "one.npz", axes="batch x", initial=0.1).read().shape == (3, 1, 1, 16)


def test_more_fields_than_those_of_the_run_are_passed_over(trained, tmp_path):
    states = waves(3)[:, :1]
    squall.data.write(
        tmp_path / "more.hdf5",
        np.concatenate([states, states[:, :, ::-1]], 2).repeat(2, 1),
        dt=0.1,
        fields=["w", "u2", "v", "u"],
        lengths=2.0,
    )
    assert main(words(trained, tmp_path / "more.hdf5", tmp_path / "p.hdf5")) == 0
    expected = squall.open_run(trained).predict(torch.from_numpy(states[:, 0].copy()), 40)
    assert torch.equal(squall.data.open(tmp_path / "p.hdf5").read(), expected)


def test_a_folder_in_place_of_an_array_is_refused(trained, tmp_path, capsys):
    (tmp_path / "a.npy").mkdir()
    assert main(words(trained, tmp_path / "a.npy", tmp_path / "p.hdf5")) == 2
    assert "is a folder" in capsys.readouterr().err


def test_initial_states_with_holes_where_the_run_has_none_are_refused(trained, tmp_path, capsys):
    data = xarray.Dataset({name: (("sample", "time", "x"), waves(3)[:, :4, c]) for c, name in enumerate("uv")})
    data = data.assign_coords(time=0.1 * np.arange(4)).where(data.x != 5)
    data.to_netcdf(tmp_path / "holes.nc")
    assert main(words(trained, tmp_path / "holes.nc", tmp_path / "p.hdf5")) == 2
    assert "no value at 2 points" in capsys.readouterr().err


def test_a_prediction_keeps_the_dates_of_its_initial_states(tmp_path):
    netcdf4 = pytest.importorskip("netCDF4")
    with netcdf4.Dataset(tmp_path / "dated.nc", "w") as file:
        file.createDimension("time", 20)
        file.createDimension("x", 16)
        file.createVariable("time", "f8", ("time",))[:] = 86400.0 * 58 + 7200 * np.arange(20)
        file["time"].units, file["time"].calendar = "seconds since 2000-01-01 00:00:00", "noleap"
        file.createVariable("u", "f8", ("time", "x"))[:] = waves(1, 20)[0, :, 0]
    data = ["--data.path", str(tmp_path / "dated.nc"), "--data.validation", "4", "--data.test", "4"]
    small = ["--model.hidden", "6", "--training.batch", "4", "--training.steps", "2", "--device.threads", "1"]
    assert main(["train", *data, *small, "--out", str(tmp_path / "run")]) == 0
    for suffix in ("nc", "zarr"):
        out = tmp_path / f"p.{suffix}"
        assert main(words(tmp_path / "run", tmp_path / "dated.nc", out, "--start", "11")) == 0
        with xarray.open_zarr(out) if suffix == "zarr" else xarray.open_dataset(out) as found:
            assert str(found.time.values[0]) == "2000-02-28 22:00:00"
            assert str(found.time.values[1]) == "2000-03-01 00:00:00"  # no 29 February in this calendar


def test_predictions_are_drawn_as_animations(trained, initial, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    rest = ["--steps=2", "--out", str(tmp_path / "p.nc"), "--animate", "gif"]
    assert main(["predict", str(trained), "--initial", str(initial), *rest]) == 0
    names = [f"p_{field}_{i}.gif" for field in "uv" for i in (0, 1)]
    assert sorted(path.name for path in tmp_path.glob("p*")) == sorted(["p.nc", *names])
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in ["p.nc", *names]]
    with image.open(tmp_path / "p_v_1.gif") as picture:
        assert picture.n_frames == 3
    (tmp_path / "p.nc").unlink()
    assert main([*words(trained, initial, tmp_path / "p.nc"), "--animate", "gif"]) == 2
    assert "p_u_0.gif exists" in capsys.readouterr().err
    assert not (tmp_path / "p.nc").exists()


def test_an_animation_without_ffmpeg_is_refused_before_the_rollout(trained, initial, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*words(trained, initial, tmp_path / "p.nc"), "--animate", "mp4"]) == 2
    assert "ffmpeg, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "p.nc").exists()


def test_a_forecast_in_the_plane_is_drawn_as_a_map_with_grey_land(tmp_path):
    states = np.random.default_rng(0).normal(size=(1, 3, 1, 4, 6))
    states[..., :2, :2] = np.nan
    about = {"fields": ["sst"], "coordinates": [np.arange(4), np.arange(6)], "boundary": "open"}
    squall.data.write(tmp_path / "p.hdf5", states, dt=1.0, gaps=True, **about)
    field = Field.forecast(squall.data.open(tmp_path / "p.hdf5"), 0, 0)
    assert field.prediction.shape == (3, 4, 6)
    assert np.isnan(field.prediction[:, :2, :2]).all()
    assert np.array_equal(field.prediction[:, 2:], states[0, :, 0, 2:])
    assert [name for name, *_ in field.rows()] == ["prediction"]


@pytest.mark.parametrize(("names", "across"), [(("eta_rho", "xi_rho"), "xi_rho"), (("x", "y"), "x"), (("y", "x"), "x")])
def test_the_axis_that_runs_north_is_drawn_upwards(names, across):
    arrays = {"truth": np.zeros((1, 2, 1, 3, 5)), "prediction": np.zeros((1, 2, 1, 3, 5)), "time": np.arange(2)}
    arrays |= {"axis_0": np.arange(3), "axis_1": np.arange(5)}
    field = Field.of(arrays, 0, 0, {"axes": names, "fields": ["u"]})
    assert field.axes[0] == across
    assert len(field.points[0]) == field.prediction.shape[1] == (3 if names[0] == across else 5)
