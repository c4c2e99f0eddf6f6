"""Masks, gaps, areas and conditions: found, kept through views, splits, loading and files, and never mixed up."""

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import squall.data
from squall.data import DataError, InMemory, Normalization, Transitions

from .conftest import trajectories

B, T, X, Y = 3, 10, 4, 5


def ocean(*, seed: int = 0) -> np.ndarray:
    """Two fields with land of their own, and three states in which a value is missing."""
    states = trajectories(B, T, 2, X, Y, seed=seed)
    states[:, :, 0, 0, :2] = np.nan
    states[:, :, 1, 3, 3] = np.nan
    states[0, 4, 0, 2, 2] = np.nan
    states[1, 0] = np.nan
    states[2, 9, 1, 1, 1] = np.nan
    return states


MASK = np.ones((2, X, Y), bool)
MASK[0, 0, :2] = MASK[1, 3, 3] = False
VALID = np.ones((B, T), bool)
VALID[0, 4] = VALID[1, 0] = VALID[2, 9] = False


def _npz(path, states):
    np.savez(path / "ocean.npz", states=states)
    return squall.data.open(path / "ocean.npz", axes="batch time channel x y", dt=0.5, fields=["u", "v"])


def _fill(path, states):
    np.savez(path / "ocean.npz", states=np.where(np.isnan(states), -9999, states))
    return squall.data.open(path / "ocean.npz", axes="batch time channel x y", dt=0.5, fields=["u", "v"], fill=-9999)


def _memory(path, states):
    return InMemory(states, dt=0.5, fields=["u", "v"], gaps=True)


def _written(path, states):
    squall.data.write(path / "ocean.hdf5", states, dt=0.5, fields=["u", "v"], gaps=True)
    return squall.data.open(path / "ocean.hdf5")


def _well(path, states):
    """Written by others in The Well's layout, NaN and all."""
    squall.data.write(path / "ocean.hdf5", np.zeros_like(states), dt=0.5, fields=["u", "v"])
    with h5py.File(path / "ocean.hdf5", "r+") as file:
        for channel, name in enumerate("uv"):
            file["t0_fields"][name][:] = states[:, :, channel]
    return squall.data.open(path / "ocean.hdf5", gaps=True)


def _loaded(path, states):
    return squall.data.load(_npz(path, states))


def _part(path, states):
    more = np.concatenate([states[:1] * 0, states])
    more[0] = np.where(np.isnan(states[2]), np.nan, 7)
    return squall.data.subset(_npz(path, more), [1, 2, 3])


WAYS = {way.__name__.strip("_"): way for way in (_npz, _fill, _memory, _written, _well, _loaded, _part)}


@pytest.fixture(params=WAYS.values(), ids=list(WAYS))
def source(request, tmp_path):
    return request.param(tmp_path, ocean())


def test_what_never_changes_is_a_mask_and_what_comes_and_goes_a_gap(source):
    assert np.array_equal(source.mask, MASK)
    assert np.array_equal(source.valid, VALID)


def test_values_at_valid_points_are_kept_and_masked_ones_are_the_mean(source):
    states = ocean()
    read = source.read([0, 2], 0, 4).numpy()
    assert np.array_equal(read[:, :, MASK], states[[0, 2], :4][:, :, MASK])
    for channel in range(2):
        filled = read[:, :, channel][:, :, ~MASK[channel]]
        assert np.isfinite(filled).all()
        assert np.ptp(filled) == 0
        if source.trajectories == B and not isinstance(source, squall.data.Subset):
            assert filled.flat[0] == pytest.approx(np.nanmean(states[:, :, channel]), rel=1e-12)


def test_windows_that_touch_a_gap_are_refused(source):
    for trajectory, start in ((0, 3), (0, 4), (1, 0), (2, 8)):
        with pytest.raises(DataError, match=f"trajectory {trajectory} at time index .* has a gap"):
            source.windows([trajectory], [start], 2)
    assert source.windows([0, 1, 2], [5, 1, 7], 2).isfinite().all()


@pytest.mark.parametrize(("unroll", "history"), [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_transitions_are_exactly_the_windows_without_gaps(source, unroll, history):
    transitions = Transitions(source, unroll=unroll, history=history)
    length = unroll + history
    expected = [
        (b, t) for b in range(B) for t in range(T - length + 1) if VALID[b, t : t + length].all()
    ]  # fmt: skip
    trajectory, start = transitions.locate(range(len(transitions)))
    assert list(zip(trajectory.tolist(), start.tolist(), strict=True)) == expected
    past, future = transitions.fetch(range(len(transitions)))
    states = ocean()
    first, last = past.reshape(len(expected), history, 2, X, Y), future.reshape(len(expected), unroll, 2, X, Y)
    for number, (b, t) in enumerate(expected):
        window = torch.cat([first[number], last[number]]).numpy()
        assert np.array_equal(window[:, MASK], states[b, t : t + length][:, MASK])


def test_statistics_are_those_of_the_ocean_alone(source):
    states = ocean()
    states[~VALID] = np.nan
    fit = Normalization.fit(source)
    assert np.allclose(fit.mean, np.nanmean(states, axis=(0, 1, 3, 4)), rtol=1e-12)
    assert np.allclose(fit.std, np.nanstd(states, axis=(0, 1, 3, 4)), rtol=1e-12)


def test_a_copy_in_a_file_keeps_mask_and_gaps(source, tmp_path):
    copy = squall.data.open(squall.data.convert(source, tmp_path / "copy.hdf5"))
    assert np.array_equal(copy.mask, MASK)
    assert np.array_equal(copy.valid, VALID)
    assert torch.equal(copy.read([0, 2], 0, 4), source.read([0, 2], 0, 4))
    assert np.array_equal(
        torch.isnan(copy._gather(torch.arange(B), torch.zeros(B, dtype=torch.int64), T)).flatten(2).any(2), ~VALID
    )
    copy.check()


def test_simulated_states_with_nan_are_refused_with_both_advices():
    with pytest.raises(DataError, match=r"leave them out.*gaps=True|the mask.*gaps=True"):
        InMemory(ocean(), dt=1.0)


def test_infinity_is_never_a_missing_value(tmp_path):
    states = ocean()
    states[0, 7, 1, 2, 2] = np.inf
    source = _npz(tmp_path, states)
    assert np.array_equal(source.valid, VALID)
    with pytest.raises(DataError, match=r"trajectory 0, time index 7, field 'v', point \(2, 2\)"):
        source.read([0], 6, 8)


def test_a_field_that_is_masked_everywhere_is_named(tmp_path):
    states = ocean()
    states[:, :, 1] = np.nan
    with pytest.raises(DataError, match=r"all points of v are masked.*fields="):
        _ = _npz(tmp_path, states).mask


def test_gaps_everywhere_are_refused(tmp_path):
    states = trajectories(1, T, 1, X, Y)
    for time in range(T):
        states[0, time, 0, time % X, 0] = np.nan
    with pytest.raises(DataError, match="no state is whole: NaN comes and goes at every time"):
        _ = InMemory(states, dt=1.0, gaps=True)
    states = trajectories(1, T, 1, X, Y)
    states[0, ::2] = np.nan
    with pytest.raises(DataError, match="every window of 2 states touches a gap"):
        Transitions(InMemory(states, dt=1.0, gaps=True))


def test_a_trajectory_with_a_mask_of_its_own_is_left_out_and_said():
    states = trajectories(B, T, 1, X, Y)
    states[1, :, 0, 2, 2] = np.nan
    with pytest.warns(UserWarning, match=r"trajectories 1 \(1\) lack values at every time"):
        source = InMemory(states, dt=1.0, gaps=True)
    assert source.mask is None
    assert source.valid.all(1).tolist() == [True, False, True]


def test_masks_that_differ_between_files_are_refused(tmp_path):
    for name, column in (("a", 0), ("b", 1)):
        states = trajectories(B, T, X, Y)
        states[..., column] = np.nan
        np.savez(tmp_path / f"{name}.npz", states=states)
    source = squall.data.open(tmp_path, axes="batch time x y", dt=1.0)
    with pytest.raises(DataError, match=r"the mask differs between files: a.npz masks 4 points, b.npz 4"):
        _ = source.mask


def test_one_mask_in_all_files_is_the_mask_of_the_folder(tmp_path):
    states = ocean()
    for name, chosen in (("a", slice(0, 1)), ("b", slice(1, 3))):
        np.savez(tmp_path / f"{name}.npz", states=states[chosen])
    source = squall.data.open(tmp_path, axes="batch time channel x y", dt=0.5, fields=["u", "v"])
    first = source.windows([0, 1, 2], [0, 1, 0], 1)
    assert np.array_equal(source.mask, MASK)
    assert np.array_equal(source.valid, VALID)
    assert torch.equal(first, source.windows([0, 1, 2], [0, 1, 0], 1))
    assert len({float(value) for value in source.windows([0, 1, 2], [0, 1, 0], 1)[:, 0, 0, 0, 0]}) == 1


# What is given, and files


def test_mask_areas_and_conditions_come_back_from_a_file(tmp_path):
    states = trajectories(B, T, 2, X, Y, dtype=np.float32)
    generator = np.random.default_rng(1)
    given = {
        "viscosity": generator.uniform(size=B),
        "sun": generator.uniform(size=(B, T)),
        "clock": generator.uniform(size=(1, T, 1, 1, 1)),
        "depth": generator.uniform(size=(X, Y)),
        "wind": generator.uniform(size=(1, 1, 2, X, Y)),
        "rain": generator.uniform(size=(B, T, 1, X, Y)),
        "columns": generator.uniform(size=(B, 1, 1, X, 1)),
    }
    measure = generator.uniform(1, 2, (X, Y))
    path = squall.data.write(
        tmp_path / "a.hdf5", states, dt=0.5, fields=["u", "v"], mask=MASK, measure=measure, conditions=given
    )
    source = squall.data.open(path)
    assert source.fields == ("u", "v")
    assert np.array_equal(source.read(), states)
    assert np.array_equal(source.mask, MASK)
    assert np.allclose(source.measure, measure / measure.mean(), rtol=1e-14)
    kinds = {c.name: (c.kind, c.shape) for c in source.conditions}
    assert kinds == {
        "viscosity": ("parameter", (B, 1, 1, 1, 1)),
        "sun": ("forcing", (B, T, 1, 1, 1)),
        "clock": ("forcing", (1, T, 1, 1, 1)),
        "depth": ("static", (1, 1, 1, X, Y)),
        "wind": ("static", (1, 1, 2, X, Y)),
        "rain": ("forcing", (B, T, 1, X, Y)),
        "columns": ("static", (B, 1, 1, X, 1)),
    }
    memory = InMemory(states, dt=0.5, conditions=given)
    for views in (source, squall.data.load(source), squall.data.subset(source, [2, 0, 1])):
        for name in given:
            rows = [0, 2, 0] if views.trajectories == B and not isinstance(views, squall.data.Subset) else [1, 0, 1]
            ours = views.condition(name, rows, [3, 0, 6], 4)
            expected = memory.condition(name, [0, 2, 0], [3, 0, 6], 4)
            assert torch.equal(ours.expand(3, 4, -1, X, Y), expected.expand(3, 4, -1, X, Y)), name
            assert (ours + source.windows([0, 2, 0], [3, 0, 6], 4)[:, :, :1]).shape[:2] == (3, 4)


def test_the_well_reads_what_stands_beside_the_states(tmp_path):
    the_well = pytest.importorskip("the_well.data")
    states = trajectories(B, T, 2, X, Y, dtype=np.float32)
    beside = {"conditions": {"viscosity": np.arange(float(B)), "depth": np.ones((X, Y)), "sun": np.ones((B, T))}}
    (tmp_path / "data").mkdir()
    squall.data.write(
        tmp_path / "data/a.hdf5", states, dt=0.5, fields=["u", "v"], mask=MASK, measure=np.eye(X, Y) + 1, **beside
    )
    sample = the_well.WellDataset(path=str(tmp_path / "data"))[0]
    assert np.array_equal(sample["input_fields"][0], np.moveaxis(states[0, 0], 0, -1))
    assert sample["constant_fields"].shape == (X, Y, 4)
    assert sample["constant_scalars"].flatten().tolist() == [0.0]


@pytest.mark.parametrize("trajectories", [1, 3])
def test_a_parameter_alike_for_all_trajectories_comes_back(tmp_path, trajectories):
    states = torch.zeros(trajectories, 5, 1, 4)
    squall.data.write(tmp_path / "a.hdf5", states, dt=0.1, conditions={"gravity": 9.81})
    assert squall.data.open(tmp_path / "a.hdf5").condition("gravity", [0], [2], 1).item() == pytest.approx(9.81)


def test_conditions_of_the_wells_files_are_listed_and_read(tmp_path):
    from .test_foreign_files import add, empty_file

    with empty_file(tmp_path / "a.hdf5", (X, Y), np.arange(T, dtype=np.float32)) as file:
        add(file, 0, "u", trajectories(B, T, X, Y), [True, True])
        floor, slope = trajectories(X, Y, seed=1), trajectories(B, X, seed=2)
        stream = trajectories(X, Y, 2, seed=3)
        add(file, 0, "floor", floor, [True, True], sample=False, time=False)
        add(file, 0, "slope", slope, [True, False], time=False)
        add(file, 1, "stream", stream, [True, True], sample=False, time=False)
        file["scalars"].attrs["field_names"] = ["heat", "age"]
        for name, values, sample, time in (("heat", np.arange(float(B)), True, False), ("age", 3.0, False, False)):
            file["scalars"][name] = values
            file["scalars"][name].attrs.update(sample_varying=sample, time_varying=time)
        file.attrs.update(simulation_parameters=["nu"], nu=0.5)
    source = squall.data.open(tmp_path / "a.hdf5")
    assert source.constant_fields == ("floor", "slope", "stream")
    assert [(c.name, c.kind) for c in source.conditions] == [
        ("floor", "static"), ("slope", "static"), ("stream", "static"),
        ("heat", "parameter"), ("age", "parameter"), ("nu", "parameter"),
    ]  # fmt: skip
    get = lambda name: source.condition(name, [2, 0], [1, 1], 3).double().numpy()  # noqa: E731
    assert np.array_equal(get("floor"), floor[None, None, None])
    assert np.array_equal(get("slope"), slope[[2, 0], None, None, :, None])
    assert np.array_equal(get("stream"), np.moveaxis(stream, -1, 0)[None, None])
    assert get("heat").flatten().tolist() == [2, 0]
    assert get("age").item() == 3
    assert get("nu").item() == 0.5
    with pytest.raises(DataError, match=r"no condition 'flor': did you mean 'floor'"):
        get("flor")


def test_a_field_of_the_wells_files_can_be_a_forcing(path, states):
    source = squall.data.open(path, fields=["v"])
    assert np.array_equal(source.read(), states[:, :, 1:])
    forcing = source.condition("u", [3, 1], [2, 0], 5)
    assert np.array_equal(forcing, np.stack([states[3, 2:7, :1], states[1, 0:5, :1]]))
    with pytest.raises(DataError, match="fields: got w; the file has u, v"):
        squall.data.open(path, fields=["w"])


def test_missing_values_of_a_condition_are_its_mean(tmp_path):
    depth = trajectories(X, Y, seed=1)
    depth[0, 0] = np.nan
    np.savez(tmp_path / "a.npz", u=trajectories(B, T, X, Y), depth=depth)
    source = squall.data.open(tmp_path / "a.npz", axes="batch time x y", dt=1.0)
    read = source.condition("depth", [0], [0], 1)[0, 0, 0]
    assert read[0, 0] == pytest.approx(np.nanmean(depth))
    assert np.array_equal(read[1:], depth[1:])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": np.zeros((X, Y), bool)}, "all points of a channel are masked"),
        ({"mask": np.ones((X, Y))}, "mask: got torch.float64"),
        ({"mask": np.ones(3, bool)}, "mask: got torch.bool of shape"),
        ({"valid": np.zeros((B, T), bool)}, "no state is whole"),
        ({"valid": np.ones(T, bool)}, "valid: got"),
        ({"measure": -np.ones((X, Y))}, "none negative"),
        ({"measure": np.ones(X)}, "measure: got shape"),
        ({"conditions": {"a": np.ones((2, 2, 2))}}, "'a' has the shape"),
        ({"conditions": {"a": np.full(B, np.nan)}}, "holds NaN"),
        ({"conditions": {"u": np.ones((X, Y))}}, "'u' is wanted twice"),
    ],
)
def test_what_does_not_fit_beside_the_states_is_refused(tmp_path, given, message):
    with pytest.raises(DataError, match=message):
        squall.data.write(tmp_path / "a.hdf5", trajectories(B, T, 1, X, Y), dt=1.0, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_file_made_piece_by_piece_keeps_what_stands_beside(tmp_path):
    states = trajectories(B, T, 2, X, Y)
    states[~VALID] = np.nan
    beside = {"mask": MASK, "valid": VALID, "measure": np.eye(X, Y) + 1, "conditions": {"a": np.arange(float(B))}}
    with squall.data.create(tmp_path / "a.hdf5", states.shape, dt=1.0, **beside) as file:
        for number in range(B):
            file.append(states[[number]])
    source = squall.data.open(tmp_path / "a.hdf5")
    assert np.array_equal(source.valid, VALID)
    assert np.array_equal(source.read([0], 5, 10), states[[0], 5:10])
    assert source.condition("a", [2, 1], [0, 0], 2).flatten().tolist() == [2, 1]


# One long trajectory


@given(data=st.data(), total=st.integers(12, 80), gap=st.integers(0, 4))
def test_a_trajectory_is_split_in_time_with_gaps_between(data, total, gap):
    source = InMemory(torch.arange(float(total)).reshape(1, total, 1, 1), dt=0.5)
    validation, test = data.draw(st.integers(0, 12).filter(lambda n: n != 1)), data.draw(st.integers(2, 12))
    apart = gap * ((validation > 0) + 1)
    left = total - validation - test - apart
    if left < 2:
        with pytest.raises(DataError, match="split in time"):
            squall.data.split(source, validation=validation, test=test, gap=gap)
        return
    parts = squall.data.split(source, validation=validation, test=test, gap=gap)
    assert parts.train.read().flatten().tolist() == list(range(left))
    assert parts.test.read().flatten().tolist() == list(range(total - test, total))
    assert parts.test.times[0] == pytest.approx(0.5 * (total - test))
    if validation:
        assert parts.validation.read().flatten().tolist() == list(range(left + gap, left + gap + validation))
    else:
        assert parts.validation.trajectories == 0


def test_parts_in_time_keep_mask_gaps_and_conditions(tmp_path):
    states = ocean()[:1]
    source = InMemory(states, dt=1.0, gaps=True, conditions={"sun": np.arange(float(T))[None]})
    parts = squall.data.split(source, test=4, gap=1)
    assert np.array_equal(parts.train.mask, MASK | ~np.isnan(states[0, 0]))
    assert parts.train.valid[0].tolist() == [True] * 4 + [False]
    assert len(Transitions(parts.train)) == 3
    assert parts.test.condition("sun", [0], [1], 3).flatten().tolist() == [7, 8, 9]
    assert [(c.name, c.shape) for c in parts.test.conditions] == [("sun", (1, 4, 1, 1, 1))]


def test_several_trajectories_are_split_in_time_on_request(path, states):
    parts = squall.data.split(squall.data.open(path), validation=0.25, test=0.25, by="time")
    assert np.array_equal(parts.train.read(), states[:, :6])
    assert np.array_equal(parts.validation.read(), states[:, 6:9])
    assert np.array_equal(parts.test.read(), states[:, 9:])
    with pytest.raises(DataError, match="by: got 'day'"):
        squall.data.split(squall.data.open(path), by="day")


def test_rollouts_start_from_many_times(source):
    pieces = squall.data.windows(source, length=3, stride=1)
    starts = [(b, t) for b in range(B) for t in range(T - 2) if VALID[b, t : t + 3].all()]
    assert list(zip(pieces.rows.tolist(), pieces.starts.tolist(), strict=True)) == starts
    assert pieces.shape == (len(starts), 3, 2, X, Y)
    assert pieces.valid.all()
    states = ocean()
    read = pieces.read().numpy()
    for number, (b, t) in enumerate(starts):
        assert np.array_equal(read[number][:, MASK], states[b, t : t + 3][:, MASK])
    apart = squall.data.windows(source, length=5)
    assert list(zip(apart.rows.tolist(), apart.starts.tolist(), strict=True)) == [(0, 5), (1, 5), (2, 0)]
    for length, stride in ((1, 1), (T + 1, 1), (3, 0)):
        with pytest.raises(DataError, match="windows: got length"):
            squall.data.windows(source, length, stride)
    with pytest.raises(DataError, match="without gaps; make them shorter"):
        squall.data.windows(source, length=10)
