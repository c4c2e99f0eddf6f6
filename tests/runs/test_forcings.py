"""A trained run whose model sees past states and conditions is rolled out from arrays and from files."""

import numpy as np
import pytest
import torch

import squall.data
from squall.data import InMemory, Normalization, Split, subset
from squall.integrators import next_state
from squall.models.inputs import Inputs
from squall.runs.build import Experiment
from squall.runs.config import ConfigError, RunConfig
from squall.runs.description import constants, read_description, write_description
from squall.runs.folder import RunFolder, RunFolderError
from squall.runs.predict import predict_to_file, read_start
from squall.runs.trained import TrainedRun

DT, TIMES = 0.5, 30
INPUTS = Inputs(2, ("sun", "depth", "gain"))


class Model(torch.nn.Module):
    """u_{n+1} = 0.9 u_n − 0.3 u_{n−1} + sun + depth · gain."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        past, u, sun, depth, gain = x.split(1, 1)
        return self.one * (0.9 * u - 0.3 * past + sun + depth * gain)


def truth(trajectories: int = 3) -> InMemory:
    generator = torch.Generator().manual_seed(0)
    drawn = {"sun": (trajectories, TIMES), "depth": (6,), "gain": (trajectories,)}
    conditions = {n: torch.randn(*shape, dtype=torch.float64, generator=generator) for n, shape in drawn.items()}
    states = [torch.randn(trajectories, 1, 6, dtype=torch.float64, generator=generator) for _ in range(2)]
    sun, depth, gain = conditions.values()
    for n in range(1, TIMES - 1):
        more = sun[:, n, None, None] + depth * gain[:, None, None]
        states.append(0.9 * states[-1] - 0.3 * states[-2] + more)
    return InMemory(torch.stack(states, 1), dt=DT, conditions=conditions, lengths=3.0)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(Experiment, "inputs", property(lambda self: INPUTS))
    return trained(truth(), tmp_path)


def trained(source, tmp_path) -> TrainedRun:
    split = Split(source, subset(source, []), subset(source, []))
    built = Experiment(RunConfig(), split, None, Normalization.identity(1), Model(), next_state)
    run = TrainedRun(RunFolder(tmp_path), RunConfig(), built, True, constants(source))
    run.checkpoint = "best"
    return run


def forcings(source=None, steps: int = TIMES - 2) -> dict:
    source = source or truth()
    sun = source.condition("sun", [0, 1, 2], [1] * 3, steps)[:, :, 0, 0]
    return {"sun": sun, "gain": source.condition("gain", [0, 1, 2], [0] * 3, 1).flatten()}


def test_a_rollout_from_arrays_has_the_forcing_of_every_step_and_the_static_field_of_the_folder(run):
    states = truth().read()
    found = run.predict(states[:, :2], TIMES - 2, forcings())
    torch.testing.assert_close(found, states[:, 1:], rtol=0, atol=1e-12)
    short = run.predict(states[:, :2], 5, forcings())  # of a longer forcing the first steps
    torch.testing.assert_close(short, states[:, 1:7], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sun": None}, "sees the forcing 'sun', which is missing"),
        ({"gain": None}, "sees the parameter 'gain', which is missing"),
        ({"sun": torch.ones(3, 4)}, r"'sun' ends before the rollout: it has 4 time\(s\), but 10 steps"),
        ({"moon": torch.ones(3)}, "'moon' is given, but the model sees the conditions sun, depth, gain"),
        ({"gain": torch.ones(7)}, "'gain' has the shape"),
    ],
)
def test_a_forcing_that_does_not_fit_is_refused(run, change, message):
    given = {name: value for name, value in (forcings() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        run.predict(truth().read()[:, :2], 10, given)


def test_too_little_history_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"\(batch, 2 states of history, 1 channel\(s\), 6\)"):
        run.predict(truth().read()[:, 0], 10, forcings())
    file = squall.data.convert(truth(), tmp_path / "t.hdf5")
    with pytest.raises(ConfigError, match=r"sees 2 state.*, but .* has 30 times"):
        read_start(run, file, 3, start=29)


@pytest.mark.parametrize("suffix", ["hdf5", "nc", "zarr"])
def test_a_rollout_from_a_file_starts_at_any_time_and_reads_its_forcings(run, tmp_path, monkeypatch, suffix):
    if suffix == "zarr":
        pytest.importorskip("zarr")
    monkeypatch.setattr(squall.data.streaming, "BLOCK_BYTES", 3 * 3 * 6 * 8)  # three times a block
    file = squall.data.convert(truth(), tmp_path / "t.hdf5")
    start = read_start(run, file, 12, start=4)
    out = predict_to_file(run, start, 12, tmp_path / f"p.{suffix}")
    found = squall.data.open(out)
    torch.testing.assert_close(found.read(), truth().read(None, 5, 18), rtol=0, atol=1e-12)
    if suffix == "hdf5":
        assert found.times[0] == pytest.approx(2.5)


def test_forcings_of_a_file_begin_at_the_last_state_of_an_array(run, tmp_path):
    np.save(tmp_path / "u0.npy", truth().read()[:, :2].numpy())
    file = squall.data.convert(truth(), tmp_path / "t.hdf5")
    start = read_start(run, tmp_path / "u0.npy", 10, forcings=file)
    found = run.emulator.roll(start.window, start.conditions(0, 10), 10)
    torch.testing.assert_close(found, truth().read(None, 1, 12), rtol=0, atol=1e-12)


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_rollout_with_history_goes_on_to_the_same_bits(run, tmp_path, monkeypatch, after):
    """After one block of one time, a part of the history is in the file, the rest of it before the rollout."""
    monkeypatch.setattr(squall.data.streaming, "BLOCK_BYTES", 1)
    start = read_start(run, squall.data.convert(truth(), tmp_path / "t.hdf5"), 12)
    whole = squall.data.open(predict_to_file(run, start, 12, tmp_path / "whole.nc")).read()

    class Killed(Exception):
        pass

    def stop(done):
        if done == after - 1:
            raise Killed

    with pytest.raises(Killed):
        predict_to_file(run, start, 12, tmp_path / "p.nc", progress=stop)
    reported = []
    resumed = squall.data.open(predict_to_file(run, start, 12, tmp_path / "p.nc", progress=reported.append)).read()
    assert reported[0] == after
    assert torch.equal(resumed, whole)


def test_a_forcing_of_a_file_that_ends_before_the_rollout_is_refused(run, tmp_path):
    file = squall.data.convert(truth(), tmp_path / "t.hdf5")
    read_start(run, file, 24, start=4)
    with pytest.raises(ConfigError, match=r"'sun' of .*t\.hdf5 ends before the rollout: 26 steps .* there are 25"):
        read_start(run, file, 26, start=4)


def test_a_condition_that_no_file_has_is_refused(run, tmp_path):
    bare = squall.data.convert(InMemory(truth().read(), dt=DT, lengths=3.0), tmp_path / "bare.hdf5")
    with pytest.raises(ConfigError, match=r"sees the condition 'sun', which .*bare\.hdf5 does not have.*--forcings"):
        read_start(run, bare, 3)
    file = squall.data.convert(truth(), tmp_path / "t.hdf5")
    start = read_start(run, bare, 10, forcings=file)
    found = run.emulator.roll(start.window, start.conditions(0, 10), 10)
    torch.testing.assert_close(found, truth().read(None, 1, 12), rtol=0, atol=1e-12)
    drawn = {"light": truth().condition("sun", [0, 1, 2], [0] * 3, TIMES)[:, :, 0, 0]}
    drawn |= {
        "gain": truth().condition("gain", [0, 1, 2], [0] * 3, 1).flatten(),
        "depth": run.constant("depth")[0, 0, 0],
    }
    squall.data.convert(InMemory(truth().read(), dt=DT, lengths=3.0, conditions=drawn), tmp_path / "light.hdf5")
    other = read_start(run, tmp_path / "light.hdf5", 10, fields=["sun=light"])
    assert torch.equal(other.conditions(0, 10), start.conditions(0, 10))


def test_a_forcing_in_time_and_space_is_told_from_the_fields_of_a_foreign_file(run, tmp_path):
    """Such a file does not say which of its variables are the state, and one with levels has a channel for each."""
    xarray = pytest.importorskip("xarray")
    data = truth(1)
    levels = np.stack([data.read()[0, :, 0], data.read()[0, :, 0]], 1)
    variables = {"u": (("time", "level", "x"), levels), "depth": ("x", data.condition("depth", [0], [0], 1).flatten())}
    variables["sun"] = (("time", "x"), data.condition("sun", [0], [0], TIMES)[0, :, 0].expand(-1, 6).numpy())
    variables["gain"] = ((), float(data.condition("gain", [0], [0], 1)))
    axes = {"time": DT * np.arange(TIMES), "x": 0.5 * np.arange(6), "level": [500, 850]}
    xarray.Dataset(variables, axes).to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    start = read_start(run, tmp_path / "a.nc", 10, fields=["u=u_850"])
    found = run.emulator.roll(start.window, start.conditions(0, 10), 10)
    torch.testing.assert_close(found, data.read(None, 1, 12), rtol=0, atol=1e-12)


def test_forcings_of_another_time_step_are_refused(run, tmp_path):
    source = truth()
    values = {c.name: source.condition(c.name, [0, 1, 2], [0] * 3, TIMES) for c in source.conditions}
    other = InMemory(source.read(), dt=2 * DT, conditions=values, lengths=3.0)
    with pytest.raises(ConfigError, match=r"'sun' of .* has the time step 1, but the run predicts by 0\.5"):
        read_start(run, squall.data.convert(other, tmp_path / "t.hdf5"), 3)


def test_masked_points_are_held_and_empty_in_netcdf(tmp_path, monkeypatch):
    monkeypatch.setattr(Experiment, "inputs", property(lambda self: Inputs()))
    states = torch.randn(2, 5, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sea = torch.tensor([True, False, True, True, True, True])
    states[..., 1] = 7.0
    run = trained(InMemory(states, dt=DT, mask=sea, measure=torch.arange(1.0, 7.0)), tmp_path)
    run._built.model.forward = lambda x: x + run.model.one
    assert run.predict(states[:, 0], 3)[:, :, 0, 1].unique().tolist() == [7.0]
    np.save(tmp_path / "u0.npy", states[:, 0].numpy())
    start = read_start(run, tmp_path / "u0.npy", 3)
    for suffix in ("nc", "hdf5"):
        found = squall.data.open(predict_to_file(run, start, 3, tmp_path / f"p.{suffix}"))
        assert found.mask is not None
        assert torch.equal(found.mask[0], sea)
        torch.testing.assert_close(found.measure, run.source.measure)
        torch.testing.assert_close(found.read()[:, 3, 0, 2:], states[:, 0, 0, 2:] + 3)
    with pytest.raises(ConfigError, match="cannot take another: the run has a mask of its grid"):
        run.predict(torch.zeros(1, 1, 9), 2)


def test_the_description_in_a_folder_is_that_of_the_data(tmp_path):
    source = truth()
    mask = torch.tensor([True] * 5 + [False])
    values = {c.name: source.condition(c.name, [0, 1, 2], [0] * 3, TIMES) for c in source.conditions}
    source = InMemory(
        source.read(), dt=DT, conditions=values, mask=mask, measure=torch.arange(1.0, 7.0), boundary="wall", lengths=3.0
    )
    folder = RunFolder(tmp_path)
    split, known = read_description(folder, write_description(folder, source), states=5)
    found = split.train
    assert torch.equal(found.mask, source.mask)
    assert torch.equal(found.measure, source.measure)
    assert np.array_equal(found.coordinates[0], source.coordinates[0])
    assert (found.dt, found.fields, found.boundary, found.space) == (DT, ("u",), ("wall",), (6,))
    assert [(c.name, c.kind) for c in found.conditions] == [(c.name, c.kind) for c in source.conditions]
    assert known == {"depth"}
    assert torch.equal(found.condition("depth", [0], [0], 1), source.condition("depth", [0], [0], 1))
    assert found.shape[1] == 5


@pytest.mark.parametrize(
    "change", [{"dtype": "load"}, {"fields": 3}, {"axes": ["x", "y"]}, {"conditions": [{"name": "sun"}]}, {"dt": None}]
)
def test_a_description_that_makes_no_sense_is_refused(tmp_path, change):
    folder = RunFolder(tmp_path)
    write_description(folder, truth())
    folder.write_json("data.json", {**folder.read_json("data.json"), **change})
    with pytest.raises(RunFolderError, match="damaged"):
        read_description(folder, {}, states=2)
