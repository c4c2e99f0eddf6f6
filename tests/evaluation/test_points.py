"""Masked points never count, and the others count by their area."""

import numpy as np
import pytest
import torch

from squall.data import InMemory
from squall.evaluation.rollouts import Keep, RolloutValidation, evaluate
from squall.evaluation.tallies import Largest
from squall.integrators import euler, rollout

DT, STEPS = 0.1, 12


def states(points: int = 12, channels: int = 2, trajectories: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(trajectories, channels, points, dtype=torch.float64, generator=generator)
    return rollout(euler, lambda u: -u + 0.3 * u.square(), first, DT, STEPS)


def model(u):
    """Acts on each point alone, so that what it does at one point tells nothing of the others."""
    return -0.8 * u


def test_an_ocean_whose_land_is_masked_scores_like_the_ocean_alone():
    u = states()
    sea = torch.ones(12, dtype=torch.bool)
    sea[[0, 3, 4, 11]] = False
    world = u.masked_fill(~sea, 7.0)
    masked = evaluate(model, InMemory(world, dt=DT, mask=sea), scale=[1.0, 2.0])
    alone = evaluate(model, InMemory(u[..., sea], dt=DT, lengths=8 / 12), scale=[1.0, 2.0])
    for name in ("states", "scaled", "mass"):
        assert masked.rollout[name] == pytest.approx(alone.rollout[name], rel=1e-12)
    assert masked.rollout["vrmse"] == pytest.approx(alone.rollout["vrmse"], rel=1e-12)
    assert masked.one_step == pytest.approx(alone.one_step, rel=1e-12)
    assert masked.curves["states"] == pytest.approx(alone.curves["states"], rel=1e-12)
    for name, item in masked.baselines.items():
        for key in ("states", "mass", "vrmse", "nrmse", "nrmse_p99"):
            assert item[key] == pytest.approx(alone.baselines[name][key], rel=1e-12)
    for (
        name,
        item,
    ) in masked.regimes.items():  # quantiles of weighted values take a value, those of the others interpolate
        assert item["share"] == pytest.approx(alone.regimes[name]["share"], abs=5e-3)


def test_a_cell_of_twice_the_area_counts_like_two_cells():
    u = states(6)
    area = torch.tensor([1, 2, 1, 3, 1, 1])
    by_area = evaluate(model, InMemory(u, dt=DT, measure=area, lengths=6.0))
    repeated = evaluate(model, InMemory(u.repeat_interleave(area, -1), dt=DT, lengths=6.0))
    assert by_area.rollout["states"] == pytest.approx(repeated.rollout["states"], rel=1e-12)
    assert by_area.rollout["vrmse"] == pytest.approx(repeated.rollout["vrmse"], rel=1e-12)
    assert by_area.rollout["mass"] == pytest.approx(repeated.rollout["mass"], rel=1e-12)
    assert by_area.one_step["mean"] == pytest.approx(repeated.one_step["mean"], rel=1e-12)
    assert by_area.one_step["max"] == repeated.one_step["max"]


def test_each_field_has_its_own_mask():
    u = states()
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :6] = mask[1, 10:] = False
    found = evaluate(model, InMemory(u, dt=DT, mask=mask))
    predicted = rollout(euler, model, u[:, 0], DT, STEPS)
    expected = (predicted - u)[:, 1:][..., mask].square().mean()
    assert found.rollout["states"] == pytest.approx(expected.item(), rel=1e-12)


def test_the_figures_of_masked_points_are_empty():
    u = states()
    mask = torch.ones(12, dtype=torch.bool)
    mask[5] = False
    kept = evaluate(model, InMemory(u, dt=DT, mask=mask), keep=Keep(2)).rollouts
    for field in (kept.truth, kept.prediction, kept.step_error):
        assert np.isnan(field[..., 5]).all()
        assert np.isfinite(np.delete(field, 5, -1)).all()


def test_a_model_that_is_not_a_number_on_land_is_finite_at_sea():
    u = states()
    mask = torch.ones(12, dtype=torch.bool)
    mask[5] = False
    source = InMemory(u, dt=DT, mask=mask)
    step = evaluate(lambda u: torch.where(mask, -0.8 * u, torch.nan), source).one_step
    assert step == evaluate(model, source).one_step


def test_a_validation_scores_the_ocean_alone():
    u = states()
    sea = torch.ones(12, dtype=torch.bool)
    sea[:5] = False

    class Model(torch.nn.Module):
        def forward(self, u):
            return model(u)

    masked = RolloutValidation(InMemory(u.masked_fill(~sea, 3.0), dt=DT, mask=sea), scale=(1.0, 3.0))(Model())
    alone = RolloutValidation(InMemory(u[..., sea], dt=DT), scale=(1.0, 3.0))(Model())
    assert masked.score.error == pytest.approx(alone.score.error, rel=1e-12)


def test_the_largest_hundredth_of_weighted_values_piece_by_piece():
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.rand(2, 1000, generator=generator, dtype=torch.float64)
    limit = 50
    largest = Largest(49.5)
    for piece in torch.arange(1000).split(77):
        largest.add(values[piece], weights[piece])
    total = area = 0.0
    for value, weight in sorted(zip(values.tolist(), weights.tolist(), strict=True), reverse=True):
        part = min(weight, limit - area)
        total, area = total + part * value, area + part
    assert largest.mean() == pytest.approx(total / limit, rel=1e-12)
