import numpy as np
import pytest
import torch

from squall.evaluation.growth import growth_factor
from squall.evaluation.regimes import REGIMES, regime_thresholds
from squall.integrators import euler, next_state, rk4


def linear_map(size: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    matrix = np.random.default_rng(seed).standard_normal((size, size)) / np.sqrt(size)
    return torch.from_numpy(matrix), matrix


@pytest.mark.parametrize("seed", range(3))
def test_growth_of_a_linear_step_is_the_spectral_radius(seed):
    weight, matrix = linear_map(12, seed)
    u = torch.randn(4, 1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = np.abs(np.linalg.eigvals(np.eye(12) + 0.3 * matrix)).max()
    found = growth_factor(euler, lambda u: u @ weight.T, u, dt=0.3)
    np.testing.assert_allclose(found, np.full(4, expected), rtol=1e-10)


def test_large_states_give_the_same_factor_without_a_matrix(monkeypatch):
    weight, _ = linear_map(60, 0)

    def rate(u):
        return torch.tanh(u @ weight.T)

    u = torch.randn(2, 1, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = growth_factor(rk4, rate, u, dt=0.5)
    monkeypatch.setattr("squall.evaluation.growth.DENSE_LIMIT", 0)
    np.testing.assert_allclose(growth_factor(rk4, rate, u, dt=0.5), dense, rtol=1e-3)


@pytest.mark.parametrize(("size", "copies"), [(64, 64), (65, 1), (512, 1)])
def test_only_a_small_state_is_linearised_row_by_row(size, copies):
    """Time would grow with the cube of the size."""
    seen = []

    def rate(u):
        seen.append(u.numel())
        return -u

    growth_factor(euler, rate, torch.ones(1, 1, size), dt=0.1)
    assert sum(seen) == copies * size


@pytest.mark.parametrize("limit", [0, 512])
def test_a_jacobian_that_is_not_finite_has_an_infinite_factor(monkeypatch, limit):
    monkeypatch.setattr("squall.evaluation.growth.DENSE_LIMIT", limit)
    assert growth_factor(next_state, torch.sqrt, torch.zeros(1, 1, 5), dt=1.0).item() == float("inf")


def test_growth_can_be_asked_for_without_gradients():
    with torch.no_grad():
        assert growth_factor(next_state, lambda u: 3 * u, torch.ones(1, 1, 2), dt=1.0).item() == pytest.approx(3)


def test_regimes_hold_half_49_and_1_percent_per_channel():
    speed = torch.rand(20, 2, 500, generator=torch.Generator().manual_seed(0)) * torch.tensor([[[1.0], [100.0]]])
    labels = regime_thresholds(speed).label(speed)
    for channel in range(2):
        shares = torch.bincount(labels[:, channel].flatten(), minlength=3) / labels[:, channel].numel()
        np.testing.assert_allclose(shares, [0.5, 0.49, 0.01], atol=2e-3)
    assert list(REGIMES.values()) == ["quiet", "active", "extreme"]
