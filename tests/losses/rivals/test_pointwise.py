"""Losses of the set of points against sorting, convex solvers, limits and their closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from squall.losses import ImbalanceAwareLoss, MeanSquaredError
from squall.losses.rivals import Focal, LossMaxPooling, Tilted, TopK
from squall.losses.rivals.max_pooling import pooling_weights
from squall.losses.rivals.tilted import tilted
from squall.losses.rivals.top_k import top_mean


def errors(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).square()


def uniform(n: int) -> torch.Tensor:
    return torch.tensor(1 / n, dtype=torch.float64).expand(n)


def measured(n: int) -> torch.Tensor:
    share = torch.rand(n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return share / share.sum()


def cvar(l: np.ndarray, share: np.ndarray, alpha: float) -> float:
    """Sorted, the largest first, until their share is α, the last one in part."""
    total, left = 0.0, alpha
    for i in np.argsort(-l):
        taken = min(left, share[i])
        total, left = total + taken * l[i], left - taken
    return total / alpha


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.25, 0.3, 0.333, 1.0])
@pytest.mark.parametrize("share", [uniform(40), measured(40)], ids=["uniform", "measured"])
def test_top_k_is_the_mean_of_the_largest_by_sorting(alpha, share):
    l = errors(40)
    assert top_mean(l, share, alpha).item() == pytest.approx(cvar(l.numpy(), share.numpy(), alpha), rel=1e-12)


def test_the_ends_of_top_k_are_mse_and_the_maximum():
    prediction = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.zeros_like(prediction)
    torch.testing.assert_close(TopK(alpha=1.0)(prediction, target), MeanSquaredError()(prediction, target))
    torch.testing.assert_close(TopK(alpha=1 / 50)(prediction, target), prediction.square().max())


def test_tied_errors_share_the_weight_of_top_k():
    prediction = torch.tensor([3.0, 1.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    TopK(alpha=0.5)(prediction, torch.zeros_like(prediction)).backward()
    torch.testing.assert_close(prediction.grad, torch.tensor([3.0, 0.5, -0.5, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(("p", "fraction"), [(1.7, 0.3), (1.2, 0.15), (3.0, 0.5), (1.7, 0.77)])
@pytest.mark.parametrize("share", [uniform(12), measured(12)], ids=["uniform", "measured"])
def test_loss_max_pooling_is_the_maximum_that_a_convex_solver_finds(p, fraction, share):
    l, pi = errors(12).numpy(), share.numpy()
    cap = fraction ** (-1 / p) * pi
    found = minimize(
        lambda w: -(w @ l),
        0.5 * cap,
        jac=lambda w: -l,
        bounds=list(zip(np.zeros(12), cap, strict=True)),
        constraints={"type": "ineq", "fun": lambda w: 1 - (pi * (np.maximum(w, 0) / pi) ** p).sum()},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 2000},
    )
    weights = pooling_weights(torch.from_numpy(l), share, p, fraction)
    assert float(weights @ torch.from_numpy(l)) == pytest.approx(-found.fun, rel=1e-5)
    assert (weights <= torch.from_numpy(cap) * (1 + 1e-12)).all()
    assert float((share * (weights / share) ** p).sum()) == pytest.approx(1, rel=1e-9)


def test_loss_max_pooling_keeps_the_published_constraints_and_saturates():
    n, p, m = 200, 1.7, 60
    q = p / (p - 1)
    weights = pooling_weights(errors(n), uniform(n), p, m / n)
    tau = n ** (-1 / q) * m ** (-1 / p)
    assert float(weights.pow(p).sum() ** (1 / p)) == pytest.approx(n ** (-1 / q), rel=1e-12)
    assert float(weights.max()) == pytest.approx(tau, rel=1e-12)
    assert 0 < int((weights > tau * (1 - 1e-12)).sum()) < m


def test_loss_max_pooling_over_all_points_is_mse():
    for n, dtype in ((50, torch.float64), (100_000, torch.float32)):
        prediction = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=dtype)
        target = torch.zeros_like(prediction)
        value = LossMaxPooling(fraction=1.0)(prediction, target)
        torch.testing.assert_close(value, prediction.square().mean(), rtol=1e-5, atol=0)


def test_loss_max_pooling_takes_errors_that_are_mostly_zero():
    prediction = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    value = LossMaxPooling(fraction=0.5)(prediction, torch.zeros(4).double())
    assert value.item() == pytest.approx(0.25 * 0.5 ** (-1 / 1.7), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_is_its_formula(gamma):
    e = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    x = 0.8 * np.abs(e) / np.sqrt((e**2).mean())
    expected = ((2 / (1 + np.exp(-x)) - 1) ** gamma * e**2).mean()
    value = Focal(beta=0.8, gamma=gamma)(torch.from_numpy(e), torch.zeros(30).double())
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_focal_is_mse_for_gamma_0_and_for_large_beta():
    prediction = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.zeros_like(prediction)
    mse = prediction.square().mean()
    torch.testing.assert_close(Focal(gamma=0.0)(prediction, target), mse, rtol=1e-12, atol=0)
    torch.testing.assert_close(Focal(beta=1e9)(prediction, target), mse, rtol=1e-12, atol=0)


def test_focal_holds_its_scale_and_differentiates_its_factor():
    e = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = float(e.square().mean().sqrt())
    prediction = e.clone().requires_grad_()
    Focal(beta=1.3, gamma=0.5)(prediction, torch.zeros_like(e)).backward()

    def value(x: np.ndarray) -> float:
        return float((np.tanh(1.3 * np.abs(x) / (2 * scale)) ** 0.5 * x**2).mean())

    for i in range(20):
        step = np.zeros(20)
        step[i] = 1e-6
        slope = (value(e.numpy() + step) - value(e.numpy() - step)) / 2e-6
        assert prediction.grad[i].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_a_point_without_error_has_no_slope_in_focal(gamma):
    prediction = torch.tensor([0.0, 1.0], requires_grad=True)
    Focal(gamma=gamma)(prediction, torch.zeros(2)).backward()
    assert prediction.grad[0] == 0


@pytest.mark.parametrize("temperature", [0.5, 3.0, -0.5, -3.0])
def test_tilted_is_its_formula(temperature):
    l, share = errors(30), measured(30)
    expected = temperature * math.log((share.numpy() * np.exp(l.numpy() / temperature)).sum())
    assert tilted(l, share, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_tilted_goes_from_the_minimum_over_the_mean_to_the_maximum():
    l, share = errors(30), uniform(30)
    assert tilted(l, share, 1e-4).item() == pytest.approx(l.max().item(), rel=1e-3)
    assert tilted(l, share, -1e-4).item() == pytest.approx(l.min().item(), abs=1e-3)
    for temperature in (1e9, -1e9, math.inf, -math.inf):
        assert tilted(l, share, temperature).item() == pytest.approx(l.mean().item(), rel=1e-7)
    values = [tilted(l, share, 1 / t).item() for t in (-10, -1, -0.1, 0.1, 1, 10)]
    assert values == sorted(values)


def test_tilted_neither_overflows_nor_loses_digits_in_float32():
    l, share = errors(30), uniform(30)
    for temperature in (1e-6, 1e-3, 1.0, 1e3, 1e6):
        value = tilted(l.float(), share.float(), temperature).item()
        assert value == pytest.approx(tilted(l, share, temperature).item(), rel=1e-5)


def test_the_gradient_of_tilted_is_that_of_the_imbalance_aware_loss():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    for loss in (Tilted(temperature=1.5), ImbalanceAwareLoss(1.5)):
        prediction = values.clone().requires_grad_()
        loss(prediction, torch.zeros_like(values)).backward()
        gradients.append(prediction.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=0)
