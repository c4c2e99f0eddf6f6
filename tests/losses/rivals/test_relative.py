"""Relative norms against neuraloperator's and against NumPy's gradient."""

import numpy as np
import pytest
import torch

from squall.losses.rivals import RelativeH1, RelativeL2

from .cases import fields


@pytest.mark.parametrize("shape", [(3, 2, 16), (3, 2, 8, 6)])
def test_neuraloperator_has_the_same_losses(shape):
    losses = pytest.importorskip("neuralop.losses")
    prediction, target = (x.detach() for x in fields(*shape))
    d = len(shape) - 2
    other = losses.LpLoss(d=d, reduction="mean").rel(prediction, target).mean()
    torch.testing.assert_close(RelativeL2()(prediction, target), other, rtol=1e-6, atol=0)
    for length in (1.0, 2.5):
        other = losses.H1Loss(d=d, measure=length, reduction="mean").rel(prediction, target)
        torch.testing.assert_close(RelativeH1(length=length)(prediction, target), other.mean(), rtol=1e-6, atol=0)


def test_h1_without_periodic_ends_uses_one_sided_differences():
    prediction, target = (x.detach() for x in fields(2, 1, 7, 5))

    def density(u):
        slopes = np.gradient(u, 2.0 / 7, 2.0 / 5, axis=(1, 2), edge_order=2)
        return (u**2 + slopes[0] ** 2 + slopes[1] ** 2).sum((1, 2))

    e, y = (prediction - target)[:, 0].numpy(), target[:, 0].numpy()
    expected = np.sqrt(density(e) / density(y)).mean()
    value = RelativeH1(length=2.0, periodic=False)(prediction, target)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_h1_of_a_wave_is_l2_times_the_same_factor():
    """For one wave number the derivative scales error and target alike."""
    x = torch.arange(32, dtype=torch.float64) * (2 * torch.pi / 32)
    target, prediction = x.sin().reshape(1, 1, -1), 0.7 * x.sin().reshape(1, 1, -1)
    for loss in (RelativeL2(), RelativeH1()):
        assert loss(prediction, target).item() == pytest.approx(0.3, rel=1e-12)


def test_a_target_of_zeros_is_refused_unless_it_is_masked():
    prediction, target = torch.ones(2, 1, 4), torch.ones(2, 1, 4)
    target[1] = 0
    with pytest.raises(ValueError, match="0 everywhere, so nothing is relative to it"):
        RelativeL2()(prediction, target)
    mask = torch.tensor([True, False]).reshape(2, 1, 1)
    assert RelativeL2()(2 * prediction, target, mask=mask).item() == 1
