import math

import numpy as np
import pytest
import torch

import squall.evaluation.rolling
from squall.data import InMemory
from squall.evaluation.growth import growth_factor
from squall.evaluation.rollouts import Keep, RolloutValidation, evaluate
from squall.integrators import euler, next_state, rk4, rollout, substeps

DT = 0.1


class Quadratic:
    """A system whose energy is Σ u²/2."""

    def energy(self, u):
        return u.square().sum((-2, -1)) / 2


def rate(u):
    return -u + 0.1 * torch.roll(u, 1, -1)


def truth(n: int = 6, steps: int = 30, channels: int = 1) -> InMemory:
    first = torch.randn(n, channels, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return InMemory(rollout(euler, rate, first, DT, steps), dt=DT, lengths=2.0)


def test_the_true_model_has_no_error():
    found = evaluate(rate, truth(), system=Quadratic())
    assert found.rollout["states"] < 1e-28
    assert found.rollout["energy"] < 1e-28
    assert found.rollout["mass"] < 1e-28
    assert found.rollout["vrmse"]["u"] < 1e-13
    assert found.one_step["max"] < 1e-24
    assert found.rollout["diverged"] == 0


def test_errors_are_the_means_that_the_docstring_says():
    source = truth()
    u = source.read()
    predicted = rollout(euler, lambda u: -0.9 * u, u[:, 0], DT, 30)
    found = evaluate(lambda u: -0.9 * u, source, system=Quadratic())
    error = predicted[:, 1:] - u[:, 1:]
    energies = [v.square().sum((-2, -1)) / 2 for v in (predicted[:, 1:], u[:, 1:])]
    assert found.rollout["states"] == pytest.approx(error.square().mean().item())
    assert found.rollout["energy"] == pytest.approx((energies[0] - energies[1]).square().mean().item())
    assert found.rollout["mass"] == pytest.approx((error.sum(-1) * 0.2).square().mean().item())
    np.testing.assert_allclose(found.curves["states"], error.square().mean((0, 2, 3)))
    assert found.rollout["per_trajectory"]["states"][2] == pytest.approx(error[2].square().mean().item())


def test_one_step_errors_against_numpy():
    source = truth()
    u = source.read()
    squared = (-0.9 * u[:, :-1] - (u[:, 1:] - u[:, :-1]) / DT).square().numpy().ravel()
    found = evaluate(lambda u: -0.9 * u, source).one_step
    largest = np.sort(squared)[-math.ceil(len(squared) / 100) :]
    assert found["mean"] == pytest.approx(squared.mean())
    assert found["top_1_percent"] == pytest.approx(largest.mean())
    assert found["max"] == pytest.approx(squared.max())


def test_regimes_share_all_points_and_all_of_the_error():
    regimes = evaluate(lambda u: -0.9 * u, truth(20)).regimes
    assert sum(item["share"] for item in regimes.values()) == pytest.approx(1)
    assert sum(item["share_of_error"] for item in regimes.values()) == pytest.approx(1)
    assert regimes["quiet"]["share"] == pytest.approx(0.5, abs=0.01)
    assert regimes["extreme"]["share"] == pytest.approx(0.01, abs=0.002)
    mean = sum(item["share"] * item["error"] for item in regimes.values())
    assert mean == pytest.approx(evaluate(lambda u: -0.9 * u, truth(20)).one_step["mean"])


def test_a_diverged_rollout_is_counted_and_is_no_number():
    source = truth()
    limit = source.read()[:, 0].abs().amax((1, 2)).median()

    def explosive(u):  # blows up where a trajectory starts large
        return torch.where(u.abs().amax((1, 2), keepdim=True) > limit, 1e3 * u.abs() ** 3, rate(u))

    found = evaluate(explosive, source, system=Quadratic())
    diverged = [error is None for error in found.rollout["per_trajectory"]["states"]]
    assert found.rollout["diverged"] == sum(diverged) == 3
    assert found.rollout["states"] is None
    assert found.rollout["energy"] is None
    assert found.rollout["states_of_finite"] == pytest.approx(0, abs=1e-28)
    assert found.curves["states"][-1] is None
    assert found.to_dict()["rollout"]["diverged"] == 3


def test_the_baselines_are_persistence_and_the_climatology():
    source = truth()
    u = source.read()
    baselines = evaluate(rate, source, system=Quadratic()).baselines
    assert baselines["persistence"]["states"] == pytest.approx((u[:, 1:] - u[:, :1]).square().mean().item())
    assert baselines["mean state"]["states"] == pytest.approx((u[:, 1:] - u.mean((0, 1))).square().mean().item())
    assert baselines["mean state"]["energy"] >= 0


def test_a_baseline_has_the_scores_of_a_model_that_predicts_it():
    source = truth()
    found = evaluate(torch.zeros_like, source)
    persistence = found.baselines["persistence"]
    assert persistence["vrmse"] == found.rollout["vrmse"]
    assert {name: persistence[name] for name in found.scores} == found.scores


def test_chunks_do_not_change_the_result(monkeypatch):
    whole = evaluate(lambda u: -0.9 * u, truth(7), system=Quadratic()).to_dict()
    monkeypatch.setattr(squall.evaluation.rolling, "CHUNK_NUMBERS", 700)
    parts = evaluate(lambda u: -0.9 * u, truth(7), system=Quadratic()).to_dict()
    for name in ("rollout", "one_step", "regimes", "growth", "baselines"):
        assert _flat(parts[name]) == pytest.approx(_flat(whole[name]), rel=1e-12)


def test_another_integrator_is_used_where_asked_for():
    source = truth()
    by_euler = evaluate(rate, source).rollout["states"]
    by_rk4 = evaluate(rate, source, integrator=substeps(rk4, 4)).rollout["states"]
    assert by_euler < 1e-28 < by_rk4


def test_growth_of_the_learned_step():
    found = evaluate(lambda u: 2.0 * u, truth(), keep=1)
    assert found.growth["median"] == pytest.approx(1 + 2 * DT)
    assert found.rollouts.truth.shape == found.rollouts.prediction.shape
    assert len(found.rollouts.truth) == 1
    assert len(found.rollouts.time) == found.rollouts.truth.shape[1]


def test_what_is_kept_is_every_so_many_times_in_the_type_asked_for():
    source = truth(4, steps=40)
    whole = evaluate(lambda u: -0.9 * u, source, system=Quadratic(), keep=2)
    thin = evaluate(
        lambda u: -0.9 * u,
        source,
        system=Quadratic(),
        keep=Keep(2, times=5, fields=("prediction", "regime"), dtype="f2"),
    )
    assert set(whole.rollouts.arrays()) == {"time", "truth", "prediction", "step_error", "regime"}
    assert set(thin.rollouts.arrays()) == {"time", "prediction", "regime"}
    np.testing.assert_array_equal(thin.rollouts.time, whole.rollouts.time[::10])
    np.testing.assert_array_equal(thin.rollouts.prediction, whole.rollouts.prediction[:, ::10].astype("f2"))
    np.testing.assert_array_equal(thin.rollouts.regime, whole.rollouts.regime[:, ::10])
    for name in ("time", "states", "energy"):
        expected = whole.curves[name][9::10]
        assert thin.curves[name] == pytest.approx(expected, rel=1e-5)
        assert all(x == float(f"{x:.6g}") for x in thin.curves[name])
    assert [len(row) for row in thin.curves["energy_truth"]] == [4, 4]
    assert thin.rollout == whole.rollout


def test_the_old_name_of_the_integrator_still_works_and_warns():
    source = truth(2)
    with pytest.warns(DeprecationWarning, match="`step` is now named `integrator`"):
        old = evaluate(rate, source, step=rk4)
    assert old.to_dict() == evaluate(rate, source, integrator=rk4).to_dict()
    with pytest.warns(DeprecationWarning, match="`step` is now named `integrator`"):
        assert RolloutValidation(source, step=rk4) == RolloutValidation(source, integrator=rk4)
    with pytest.warns(DeprecationWarning, match="`step` is now named `integrator`"):
        growth_factor(step=euler, rate=rate, u=source.read()[:1, 0], dt=DT)
    assert RolloutValidation(source, rk4) == RolloutValidation(source, integrator=rk4)


def test_validation_prefers_fewer_divergences_then_the_smaller_error():
    validate = RolloutValidation(truth(3))
    good, bad, broken = (validate(_Module(f)) for f in (rate, lambda u: -0.5 * u, lambda u: 1e3 * u.abs() ** 3))
    assert good.score < bad.score < broken.score
    assert broken.score.diverged == 3
    assert good.metrics["growth_factor"] < 1


class _Module(torch.nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, u):
        return self.rate(u)


def _flat(values, prefix=""):
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            found[prefix + name] = value
    return found


def test_relative_errors_do_not_depend_on_the_unit():
    u = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1)
    found = [
        evaluate(lambda v: 0.5 * v, InMemory(unit * u, dt=1.0), integrator=next_state).rollout["vrmse"]["u"]
        for unit in (1.0, 1e-6)
    ]
    assert found[0] == pytest.approx(found[1])
