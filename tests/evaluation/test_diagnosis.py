"""The ladder of unevenness against direct computation on all points, with masks, areas and gaps; errors of a model."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from squall.data import DataError, InMemory
from squall.evaluation import diagnosis
from squall.evaluation.diagnosis import RULE, advise, change, errors
from squall.integrators import euler, next_state
from squall.losses import ErrorSketch


def spiky(shape, seed: int = 0) -> torch.Tensor:
    """Trajectories whose changes have heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).pow(3).cumsum(1)


def top(squares: torch.Tensor, share: float) -> float:
    ordered = squares.flatten().sort(descending=True).values
    return float(ordered[: round(share * len(ordered))].sum() / ordered.sum())


def gini(squares: torch.Tensor) -> float:
    x, n = squares.flatten().sort().values, squares.numel()
    return float((2.0 * torch.arange(1, n + 1).double() - n - 1) @ x / (n * x.sum()))


def test_the_ladder_is_that_of_all_points():
    u = spiky((20, 31, 2, 50))
    squares = u.diff(dim=1).square()
    found = change(InMemory(u, dt=0.1, fields=["a", "b"]))
    for c, name in enumerate("ab"):
        ladder, own = found.ladder[name], squares[:, :, c]
        assert ladder["top 1 % of points"] == pytest.approx(top(own, 0.01), rel=5e-3)
        assert ladder["quiet half of points"] == pytest.approx(1 - top(own, 0.5), rel=5e-3)
        assert ladder["Gini coefficient"] == pytest.approx(gini(own), rel=5e-3)
        assert ladder["top 10 % of places"] == pytest.approx(top(own.mean((0, 1)), 0.1))
        assert ladder["top 10 % of times"] == pytest.approx(top(own.mean((0, 2)), 0.1))
        assert ladder["top 10 % of trajectories"] == pytest.approx(top(own.mean((1, 2)), 0.1))
        relative = found.time[c] / found.time[c].mean()
        np.testing.assert_allclose(relative, own.mean((0, 2)) / own.mean(), rtol=1e-5)
    assert found.top == pytest.approx(np.mean([top(squares[:, :, c], 0.01) for c in (0, 1)]), rel=5e-3)


def test_pieces_add_up_to_the_whole(monkeypatch):
    source = InMemory(spiky((3, 40, 1, 8, 6)), dt=0.1)
    whole = change(source)
    monkeypatch.setattr(diagnosis, "PIECE_BYTES", 5 * 8 * 6 * 8)
    monkeypatch.setattr(diagnosis, "BLOCK", 100)
    pieces = change(source)
    assert pieces.sketches[0].count == whole.sketches[0].count == 3 * 39 * 48
    assert pieces.ladder["u"] == pytest.approx(whole.ladder["u"], nan_ok=True)
    np.testing.assert_allclose(pieces.place, whole.place, rtol=1e-5)


def test_the_fast_sketch_is_the_sketch_of_the_same_errors():
    squares = spiky((1, 5, 1, 400)).square().float()
    squares[0, 0, 0, :7] = 0.0
    ours = diagnosis._sketch(squares.reshape(1, -1), None)
    theirs = ErrorSketch()
    theirs.add(squares)
    for name, values in theirs.arrays().items():
        np.testing.assert_allclose(ours.arrays()[name], values, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("unit", [1e-30, 1e25])
def test_the_unit_of_a_field_does_not_matter(unit):
    u = spiky((2, 30, 1, 50))
    plain = change(InMemory(u, dt=1.0)).ladder["u"]
    assert change(InMemory(unit * u, dt=1.0)).ladder["u"] == pytest.approx(plain, rel=0.02, nan_ok=True)


def test_masked_points_and_steps_across_gaps_are_left_out_and_areas_count():
    u = spiky((4, 20, 1, 30))
    mask = torch.ones(1, 30, dtype=torch.bool)
    mask[0, :10] = False
    u[:, :, :, :10] = 0.0
    u[:, ::2, :, 3] = 1e6  # masked: what stands there is nothing
    valid = torch.ones(4, 20, dtype=torch.bool)
    valid[1, 7] = False
    u[1, 7] = 1e9
    measure = torch.linspace(0.5, 1.5, 30, dtype=torch.float64)
    found = change(InMemory(u, dt=1.0, mask=mask, valid=valid, measure=measure))
    squares = u.diff(dim=1).square()[:, :, :, 10:]
    whole = (valid[:, 1:] & valid[:, :-1])[:, :, None, None].expand_as(squares)
    direct = ErrorSketch()
    direct.add(squares[whole], measure[10:].expand_as(squares)[whole])
    assert found.sketches[0].count == int(whole.sum())
    assert found.top == pytest.approx(direct.share_of_top(0.01), rel=1e-3)
    assert np.isnan(found.place[0, :10]).all()
    assert np.isfinite(found.place[0, 10:]).all()
    assert np.isfinite(found.time).all()


def test_constant_data_are_refused_and_a_constant_field_is_named():
    u = spiky((2, 10, 2, 16))
    u[:, :, 1] = 3.0
    found = change(InMemory(u, dt=1.0, fields=["a", "b"]))
    assert found.constant == ("b",)
    assert list(found.ladder) == ["a"]
    with pytest.raises(DataError, match="no field changes in time"):
        change(InMemory(torch.full((2, 10, 1, 16), 5.0), dt=1.0))


def test_one_trajectory_has_no_shares_of_trajectories():
    ladder = change(InMemory(spiky((1, 30, 1, 50)), dt=1.0)).ladder["u"]
    assert np.isnan(ladder["top 10 % of trajectories"])
    assert ladder["top 10 % of times"] > 0.1


def test_the_advice_goes_by_what_the_model_predicts_where_the_change_is_uneven():
    even = InMemory(torch.randn(5, 40, 1, 200, generator=torch.Generator().manual_seed(0)), dt=1.0)
    found = change(even)
    assert found.top == pytest.approx(0.085, abs=0.003), "Gaussian noise"
    assert advise(found).verdict == "no"
    assert "mse" in advise(found).options
    assert advise(found, "rate").verdict == "no"
    uneven = change(InMemory(spiky((5, 40, 1, 200)), dt=1.0))
    verdicts = {predicts: advise(uneven, predicts).verdict for predicts in (None, "rate", "state")}
    assert verdicts == {None: "perhaps", "rate": "try", "state": "no"}
    assert "kl_budget" in advise(uneven, "rate").options
    assert advise(uneven, "state").options == "--loss.name mse"


@pytest.mark.filterwarnings("ignore:the runs on korteweg-de-vries are on 2")  # paper-small: see docs/study.md
def test_the_hit_rates_that_the_advice_prints_are_those_of_the_committed_results(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    advice = importlib.import_module("advice")
    found = list(advice.cases())
    for loss, share, never, rate, count in (("cap 3", 4, 7, 7, 11), ("KL budget 0.3", 7, 11, 14, 15)):
        some = [case for case in found if (case.loss, case.outcome) == (loss, "rollout, best weights")]
        assert len(some) == count
        assert sum(not case.helped for case in some) == never
        assert advice.hits(some, "share of the top 1 %") == share
        assert advice.hits(some, "the model predicts the rate") == rate
    for words in ("14 of 15", "7 of 15, and in 4 of 11", "(11 and 7)"):
        assert words in RULE


def test_the_errors_of_a_model_are_found_where_they_are():
    u = spiky((3, 20, 1, 32))
    wrong = torch.zeros(32, dtype=torch.float64)
    wrong[5] = 2.0
    true = {float(u[i, t].sum()): u[i, t + 1] for i in range(3) for t in range(19)}

    def model(states: torch.Tensor) -> torch.Tensor:
        return torch.stack([true[float(x.sum())] for x in states]) + wrong

    found = errors(model, InMemory(u, dt=0.5), next_state, [2.0])
    assert found.top == pytest.approx(0.32), "a hundredth of the points, of one in 32 that carry all"
    assert found.place[0].argmax() == 5
    assert found.place[0, 5] == pytest.approx((2.0 / 0.5 / 2.0) ** 2)
    assert {worst.point for worst in found.worst} == {(5,)}
    assert sum(found.regimes["u"]) == pytest.approx(1)


def test_errors_of_persistence_are_the_change_by_regime():
    u = spiky((10, 30, 1, 40))
    found = errors(torch.zeros_like, InMemory(u, dt=0.5), euler, [1.0])
    squares = u.diff(dim=1).square()
    quiet, active, extreme = found.regimes["u"]
    assert extreme == pytest.approx(top(squares, 0.01), rel=0.05)
    assert quiet == pytest.approx(1 - top(squares, 0.5), rel=0.05)
    assert active == pytest.approx(1 - quiet - extreme)
    largest = found.worst[0]
    assert squares[largest.trajectory, largest.step, 0][largest.point] == squares.max()
