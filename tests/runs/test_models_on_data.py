"""What a configuration makes of fields with masks, areas, conditions and histories: trained, resumed, rolled out."""

import numpy as np
import pytest
import torch
from problems import Stops

import squall
import squall.data
from squall.cli import main
from squall.data import DataError
from squall.models import FNO, UNet
from squall.models.inputs import join, read_conditions
from squall.models.normalized import Normalized
from squall.runs.build import build, condition_statistics
from squall.runs.config import ConfigError, from_dict, with_defaults
from squall.runs.train import run

pytestmark = pytest.mark.usefixtures("undrawn")

X, Y = 16, 12


def land() -> np.ndarray:
    mask = np.zeros((X, Y), bool)
    mask[3:7, 2:5] = True
    return mask


def states(trajectories: int = 5, times: int = 14) -> np.ndarray:
    """Two waves, with NaN on land."""
    x, y = np.meshgrid(np.arange(X) / X, np.arange(Y) / Y, indexing="ij")
    phase = np.random.default_rng(0).uniform(0, 1, (trajectories, 1, 1, 1))
    t = 0.05 * np.arange(times)[:, None, None]
    u = np.stack([np.sin(2 * np.pi * (x - t + phase)) + 4, 10 * np.cos(2 * np.pi * (y + t - phase))], 2)
    u[..., land()] = np.nan
    return u


def conditions(trajectories: int = 5, times: int = 14) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {
        "viscosity": draw.uniform(1, 2, trajectories),
        "depth": draw.uniform(10, 20, (X, Y)),
        "wind": 100 + draw.normal(size=(trajectories, times)),
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "ocean.hdf5"
    area = np.linspace(0.5, 1.5, X * Y).reshape(X, Y)
    options = {"boundary": ["periodic", "wall"], "measure": area, "conditions": conditions()}
    squall.data.write(path, states(), dt=0.05, fields=["u", "v"], gaps=True, **options)
    return path


def config(path, **groups):
    data = {"path": str(path), "validation": 1, "test": 1, "inputs": ["wind", "depth"], "history": 2}
    model = {"name": "unet", "arguments": {"width": 4, "levels": 1}}
    training = {"steps": 4, "batch": 6, "validate_every": 2, "checkpoint_every": 2, "log_every": 1, "unroll": 2}
    given = {"data": data, "model": model, "training": training}
    return from_dict({name: given.get(name, {}) | groups.get(name, {}) for name in given | groups})


@pytest.mark.filterwarnings("ignore:.*the model sees none of")
def test_a_unet_gets_its_sizes_and_edges_from_the_data(path):
    made = build(config(path, model={"arguments": {"width": 4}}))
    assert isinstance(made.model, Normalized)
    unet = made.model.model
    assert isinstance(unet, UNet)
    assert (unet.channels, unet.conditions, unet.history, unet.boundary) == (2, 2, 2, ("periodic", "wall"))
    assert len(unet.down) == 1  # four points are left of twelve after one and a half halvings
    assert made.transitions.length == 4


@pytest.mark.filterwarnings("ignore:.*the model sees none of")
def test_an_fno_gets_its_sizes_and_edges_from_the_data(path):
    pytest.importorskip("neuralop")
    made = build(config(path, model={"name": "fno", "arguments": {"width": 4, "layers": 1}}))
    assert isinstance(made.model.model, FNO)
    assert made.model(torch.zeros(3, 6, X, Y)).shape == (3, 2, X, Y)


@pytest.mark.filterwarnings("ignore:.*the model sees none of")
def test_a_model_sees_normalized_fields_and_conditions_and_zero_on_land(path):
    made = build(config(path))
    seen = []
    made.model.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    train = made.split.train
    window = torch.cat([train.read(None, n, n + 2) for n in range(0, 12, 2)])
    rows, starts = torch.arange(3).repeat(6), torch.arange(1, 13, 2).repeat_interleave(3)
    held = read_conditions(train, ("wind", "depth"), rows, starts, 1)[:, 0]
    made.model(join(window, held).float())
    v, wet = seen[0], torch.from_numpy(~land())
    assert v.shape == (18, 6, X, Y)
    assert (v[:, :4, ~wet] == 0).all()
    assert v[:, :4, wet].transpose(0, 1).flatten(1).mean(1).abs().max() < 0.3
    torch.testing.assert_close(v[:, :4, wet].transpose(0, 1).flatten(1).std(1), torch.ones(4), rtol=0.1, atol=0)
    assert v[:, 4].mean().abs() < 0.5
    torch.testing.assert_close(v[0, 5].std(correction=0), torch.tensor(1.0), rtol=1e-4, atol=0)


def test_statistics_of_conditions_are_those_of_all_their_values(path):
    source = squall.data.open(path)
    means, stds = condition_statistics(source, ["wind", "depth", "viscosity"])
    given = conditions()
    np.testing.assert_allclose(means, [given[name].mean() for name in ("wind", "depth", "viscosity")], rtol=1e-6)
    np.testing.assert_allclose(stds, [given[name].std() for name in ("wind", "depth", "viscosity")], rtol=1e-5)


def test_a_condition_that_varies_by_rounding_alone_is_constant():
    wind = np.full((5, 14), np.float32(0.3))
    wind[:, ::2] = np.nextafter(np.float32(0.3), np.float32(1))
    source = squall.data.InMemory(np.zeros((5, 14, 1, 4), np.float32), dt=1.0, conditions={"wind": wind})
    means, stds = condition_statistics(source, ["wind"])
    assert means == [pytest.approx(0.3)]
    assert stds == [1.0]


@pytest.mark.filterwarnings("ignore:.*the model sees none of")
@pytest.mark.parametrize("predicts", ["rate", "state", "residual"])
def test_a_run_with_a_history_conditions_masks_and_areas_is_trained_resumed_and_rolled_out(path, tmp_path, predicts):
    model = {"predicts": "rate" if predicts == "rate" else "state", "residual": predicts == "residual"}
    made = config(path, model=model, training={"average": 0.5, "patience": 9, "clip": 1.0, "accumulate": 2})
    whole = run(made, tmp_path / "whole")
    stopped = run(made, tmp_path / "part", Stops(3))
    assert not stopped.finished
    part = run(made, tmp_path / "part")
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, part.model.state_dict()[name]), name
    assert run(made, tmp_path / "whole") is None
    trained = squall.open_run(tmp_path / "whole")
    u0 = torch.from_numpy(np.nan_to_num(states(2)[:, :2], nan=7.0))
    predicted = trained.predict(u0, 3, {"wind": torch.full((2, 3), 100.0)})
    assert predicted.shape == (2, 4, 2, X, Y)
    assert (predicted[..., torch.from_numpy(land())] == 7).all()
    assert torch.isfinite(predicted).all()


def test_one_long_trajectory_is_cut_in_time_with_a_gap_of_the_unrolled_steps(tmp_path):
    squall.data.write(tmp_path / "one.hdf5", np.nan_to_num(states(1, 60)), dt=0.05, fields=["u", "v"])
    data = {"inputs": [], "history": 1, "validation": 0.1, "test": 0.2}
    for gap, train in ((None, 60 - 6 - 12 - 2 * 2), (5, 60 - 6 - 12 - 2 * 5)):
        made = build(config(tmp_path / "one.hdf5", data=data | {"gap": gap}))
        assert [part.shape[1] for part in made.split] == [train, 6, 12]


def test_a_run_on_one_long_trajectory_is_trained_and_evaluated(tmp_path):
    squall.data.write(tmp_path / "one.hdf5", np.nan_to_num(states(1, 60)), dt=0.05, fields=["u", "v"])
    data = {"inputs": [], "history": 2, "validation": 0.2, "test": 0.2}
    result = run(config(tmp_path / "one.hdf5", data=data), tmp_path / "run")
    assert result.best is not None
    assert main(["evaluate", str(tmp_path / "run")]) == 0


@pytest.mark.filterwarnings("ignore:.*the model sees none of")
@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"data": {"inputs": ["winds"]}}, "no condition 'winds': did you mean 'wind'"),
        ({"data": {"history": 13}}, r"data.history is 13 and training.unroll is 2, which takes 15 states.*has 14"),
        ({"model": {"arguments": {"widht": 3}}}, "model.arguments.widht is unknown to 'unet'.*did you mean 'width'"),
        ({"model": {"arguments": {"levels": 0}}}, "do not fit 'unet': UNet: levels is 0, but must be at least 1"),
        ({"model": {"name": "node", "arguments": {}}}, "data.history is set, but 'node' sees the present state alone"),
        ({"model": {"name": "torch.nn.Identity", "arguments": {}}}, r"cannot take states of shape \(2, 6, 16, 12\)"),
        ({"loss": {"over": "lead"}, "training": {"unroll": 1}}, "with training.unroll 1 .* the loss sees one"),
        (
            {"training": {"patience": 2}, "data": {"validation": 0}},
            "training.patience is set, but data.validation is 0",
        ),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(path, tmp_path, groups, message):
    with pytest.raises((ConfigError, DataError), match=message):
        run(config(path, **groups), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"residual": True}}, "model.residual is true, but model.predicts is 'rate'"),
        ({"data": {"history": 0}}, "data.history is 0, but must be at least 1"),
        ({"data": {"gap": -1}}, "data.gap is -1"),
        ({"data": {"inputs": ["a", "a"]}}, "data.inputs names 'a' twice"),
        ({"training": {"unrol": 2}}, "did you mean 'training.unroll'"),
        ({"training": {"schedule": "cosin"}}, "cosin"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


def test_a_condition_that_the_model_does_not_see_is_still_warned_of(path):
    with pytest.warns(UserWarning, match="the model sees none of .*: viscosity; data.inputs names"):
        build(config(path))


def test_a_configuration_of_an_earlier_version_has_the_defaults_of_later_keys():
    values = {"data": {"path": "x.hdf5"}, "integrator": "rk4"}
    assert with_defaults(values)["training"]["unroll"] == 1
    assert with_defaults(values)["data"]["path"] == "x.hdf5"
    assert with_defaults(values)["integrator"] == "rk4"
