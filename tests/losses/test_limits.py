"""The limits of the temperature, and the budgets, on plain batches."""

import math

import pytest
import torch

from squall.losses import EffectiveFraction, ImbalanceAwareLoss, KLBudget, MeanSquaredError, Relative


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 2, 50, generator=generator), torch.randn(20, 2, 50, generator=generator)


def test_infinite_temperature_is_the_mean(batch):
    expected = torch.nn.functional.mse_loss(*batch)
    assert ImbalanceAwareLoss(math.inf)(*batch).item() == pytest.approx(expected.item(), rel=1e-6)
    assert MeanSquaredError()(*batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_zero_temperature_is_the_largest_error(batch):
    largest = (batch[0] - batch[1]).square().max()
    assert ImbalanceAwareLoss(0)(*batch).item() == pytest.approx(largest.item(), rel=1e-6)


@pytest.mark.parametrize("rho", [1e-3, 0.05, 0.3, 1.0, 3.0])
def test_kl_budget_is_met(batch, rho):
    loss = ImbalanceAwareLoss(KLBudget(rho))
    loss(*batch)
    assert loss.report()["kl"] == pytest.approx(rho, rel=1e-3)


@pytest.mark.parametrize("fraction", [0.95, 0.5, 0.05])
def test_effective_fraction_is_met(batch, fraction):
    loss = ImbalanceAwareLoss(EffectiveFraction(fraction))
    loss(*batch)
    assert loss.report()["effective_fraction"] == pytest.approx(fraction, rel=1e-4)


def test_relative_temperature(batch):
    loss = ImbalanceAwareLoss(Relative(4.0))
    loss(*batch)
    assert loss.report()["temperature"] == pytest.approx(4 * loss.report()["mean_error"], rel=1e-6)
