"""Losses that look at the target: rarity against a density by hand, tails against NumPy's quantiles."""

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde

from squall.losses.rivals import DensityWeights, ExtremeValue

from .cases import fields


def skewed(n: int) -> torch.Tensor:
    """Mostly calm, with a tail."""
    return torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_weights_by_density_are_those_of_scipys_kernels(alpha):
    y = skewed(500).numpy()
    n, order = len(y), np.sort(y)
    spread = min(y.std(), (order[3 * n // 4] - order[n // 4]) / 1.349)
    density = gaussian_kde(y, bw_method=spread * (0.75 * n) ** -0.2 / y.std(ddof=1))(y)
    scaled = (density - density.min()) / (density.max() - density.min())
    expected = np.maximum(1 - alpha * scaled, 1e-6)
    expected /= expected.mean()
    loss = DensityWeights(torch.from_numpy(y).reshape(-1, 1, 1), alpha=alpha).double()
    found = loss.weights(torch.from_numpy(y).reshape(1, 1, -1)).flatten().numpy()
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_weights_by_density_average_to_1_and_alpha_0_is_mse():
    y = skewed(300).reshape(10, 1, 30)
    assert DensityWeights(y).double().weights(y).mean().item() == pytest.approx(1, rel=1e-6)
    prediction = y + 0.1 * y.square()
    value = DensityWeights(y, alpha=0.0).double()(prediction, y)
    torch.testing.assert_close(value, (prediction - y).square().mean(), rtol=1e-12, atol=0)


def test_every_channel_has_its_own_density():
    y = torch.cat([skewed(60).reshape(6, 1, 10), 3 * skewed(60).reshape(6, 1, 10) - 7], dim=1)
    weights = DensityWeights(y).double().weights(y)
    torch.testing.assert_close(weights[:, 0], weights[:, 1], rtol=1e-5, atol=1e-6)


def test_targets_beyond_the_training_data_weigh_as_its_ends():
    y = skewed(60).reshape(6, 1, 10)
    loss = DensityWeights(y).double()
    ends = torch.stack([y.min(), y.max()]).reshape(1, 1, 2)
    beyond = torch.tensor([-100.0, 1e3], dtype=torch.float64).reshape(1, 1, 2)
    torch.testing.assert_close(loss.weights(beyond), loss.weights(ends), rtol=1e-4, atol=0)


def test_weights_by_density_are_saved():
    y = skewed(60).reshape(6, 1, 10)
    loss, other = DensityWeights(y), DensityWeights(-y)
    assert not torch.equal(loss.weights(y), other.weights(y))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(loss.weights(y), other.weights(y))


def test_targets_without_a_density_are_refused():
    for bad in (torch.ones(4, 1, 3), torch.tensor([1.0, torch.nan]).reshape(2, 1, 1)):
        with pytest.raises(ValueError, match="not finite, or all the same"):
            DensityWeights(bad)
    with pytest.raises(ValueError, match="made for 1 channels, got 2"):
        DensityWeights(skewed(6).reshape(6, 1, 1))(torch.ones(1, 2, 3), torch.zeros(1, 2, 3))


def extreme_by_hand(u: np.ndarray, y: np.ndarray, counts: np.ndarray, quantile: float) -> float:
    """Of one field: areas beyond the quantiles, point by point."""
    high, low = np.quantile(y[counts], [quantile, 1 - quantile])
    total = 0.0
    for a, b in zip(u[counts], y[counts], strict=True):
        for ahead, truth in ((max(a - high, 0), max(b - high, 0)), (max(low - a, 0), max(low - b, 0))):
            total += (1.2 if ahead < truth else 1.0) * (ahead - truth) ** 2
    return ((u - y)[counts] ** 2).mean() + total / counts.sum() / (2 * (1 - quantile))


@pytest.mark.parametrize("quantile", [0.75, 0.9])
def test_extreme_values_are_weighed_as_published(quantile):
    prediction, target = (x.detach() for x in fields(2, 2, 40))
    everywhere = np.ones(40, dtype=bool)
    expected = np.mean(
        [
            extreme_by_hand(prediction[b, c].numpy(), target[b, c].numpy(), everywhere, quantile)
            for b in range(2)
            for c in range(2)
        ]
    )
    assert ExtremeValue(quantile=quantile)(prediction, target).item() == pytest.approx(expected, rel=1e-12)


def test_quantiles_are_over_the_points_that_count():
    prediction, target = (x.detach() for x in fields(1, 1, 40))
    counts = np.arange(40) % 3 > 0
    expected = extreme_by_hand(prediction[0, 0].numpy(), target[0, 0].numpy(), counts, 0.9)
    value = ExtremeValue()(prediction, target, mask=torch.from_numpy(counts))
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_underestimated_extremes_cost_more_than_overestimated_ones():
    target = torch.arange(11.0).reshape(1, 1, 11)
    for end in (0, 10):
        sign = 1 if end == 10 else -1
        less, more = (target.clone() for _ in range(2))
        less[..., end] -= sign
        more[..., end] += sign
        assert ExtremeValue()(less, target) > ExtremeValue()(more, target) > torch.tensor(1 / 11)


def test_a_field_that_is_masked_wholly_has_no_part_and_a_finite_gradient():
    prediction, target = fields(2, 1, 20)
    mask = torch.tensor([True, False]).reshape(2, 1, 1)
    value = ExtremeValue()(prediction, target, mask=mask)
    torch.testing.assert_close(value, ExtremeValue()(prediction[:1], target[:1]))
    value.backward()
    assert prediction.grad.isfinite().all()
