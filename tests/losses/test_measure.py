"""The passes over points that carry a measure, against float64, the formula, and points repeated."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from squall.losses import EffectiveFraction, ImbalanceAwareLoss, KLBudget, MeanSquaredError, Relative, Schedule, recipe
from squall.losses.fused_cpu import BLOCK

RULES = [0.5, 100.0, math.inf, 0.0, Relative(4.0), KLBudget(0.3), KLBudget(2.0), EffectiveFraction(0.4)]
LATITUDES = torch.linspace(-89, 89, 40).deg2rad().cos().unsqueeze(1)


def fields(samples: int = 3, longitudes: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, 2, len(LATITUDES), longitudes)
    return torch.randn(shape, generator=generator).requires_grad_(), torch.randn(shape, generator=generator)


def is_fused(value: Tensor) -> bool:
    return "Fused" in type(value.grad_fn).__name__


@pytest.mark.parametrize("rule", [r for r in RULES if r not in (0.0, math.inf)], ids=str)
def test_value_and_gradient_are_those_of_float64(rule) -> None:
    loss = ImbalanceAwareLoss(rule)
    for seed in range(5):  # cold, then warm
        prediction, target = fields(seed=seed)
        value = loss(prediction, target, measure=LATITUDES)
        assert is_fused(value)
        value.backward()
        difference = (prediction.detach().double() - target.double()).numpy()
        report = loss.report()
        z = difference**2 / report["temperature"]
        weights = np.broadcast_to(LATITUDES.double().numpy(), z.shape) * np.exp(z - z.max())
        weights = weights / weights.sum()
        assert value.item() == pytest.approx((weights * difference**2).sum(), rel=2e-6)
        expected = 2 * weights * difference
        assert np.linalg.norm(prediction.grad.numpy() - expected) < 3e-6 * np.linalg.norm(expected)
        assert report["max_weight"] == pytest.approx(
            weights.max(), rel=0.01
        )  # of the point that was largest in the pass


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_as_by_the_formula(rule, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With zeros in the measure, under the largest errors, and with NaN behind a mask."""
    mask = torch.rand(40, 50, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    measure = torch.where(torch.arange(50) % 7 == 0, 0.0, LATITUDES)
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(recipe, "measured_passes", lambda *_: None)
        prediction, target = fields()
        with torch.no_grad():
            prediction[..., 7] = 100.0
        seen = prediction if mask is None else torch.where(mask, prediction, math.nan)
        loss = ImbalanceAwareLoss(rule)
        for _ in range(2):
            prediction.grad = None
            value = loss(seen, target, mask=mask, measure=measure)
            value.backward(retain_graph=True)
        assert is_fused(value) == (fused and rule != 0.0)
        results.append((value, prediction.grad, loss.report()))
    (value, gradient, report), (expected, expected_gradient, expected_report) = results
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()
    for name, theirs in expected_report.items():
        close = {"top_share": 0.05, "effective_fraction": 0.05, "max_weight": 0.05}.get(name, 1e-3)
        assert report[name] == pytest.approx(theirs, rel=close, abs=1e-6), name


def test_many_blocks_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, target = (torch.randn(3 * BLOCK + 17, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    measure = torch.rand(len(prediction), generator=torch.Generator().manual_seed(2))
    loss = ImbalanceAwareLoss()
    value = loss(prediction, target, measure=measure)
    z = (prediction.double() - target.double()).square() / loss.report()["temperature"]
    weights = measure.double() * (z - z.max()).exp()
    expected = (weights * z).sum() / weights.sum() * loss.report()["temperature"]
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_whole_number_of_times_is_a_repetition() -> None:
    prediction, target = (torch.randn(5000, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    times = torch.arange(5000) % 3 + 1
    value = ImbalanceAwareLoss()(prediction, target, measure=times.float())
    repeated = ImbalanceAwareLoss()(prediction.repeat_interleave(times), target.repeat_interleave(times))
    torch.testing.assert_close(value, repeated, rtol=1e-5, atol=0)


def test_the_mean_is_the_integral() -> None:
    prediction, target = fields()
    measure = LATITUDES.expand(3, 2, -1, 50)
    value = MeanSquaredError()(prediction, target, measure=LATITUDES)
    assert is_fused(value)
    torch.testing.assert_close(value, (measure * (prediction - target) ** 2).sum() / measure.sum())


def test_a_second_derivative() -> None:
    prediction, target = fields(samples=1)
    value = ImbalanceAwareLoss(2.0)(prediction, target, measure=LATITUDES)
    (gradient,) = torch.autograd.grad(value, prediction, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), prediction)
    torch.testing.assert_close(second, gradient.detach() / (prediction - target).detach(), rtol=1e-4, atol=1e-9)


def test_a_schedule_sharpens_as_by_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, target = fields()
    courses = []
    for _ in range(2):
        loss = ImbalanceAwareLoss(Schedule(KLBudget(0.3), steps=4))
        courses.append([loss(prediction, target, measure=LATITUDES).item() for _ in range(5)])
        monkeypatch.setattr(recipe, "measured_passes", lambda *_: None)
    assert courses[0] == pytest.approx(courses[1], rel=1e-5)
    assert courses[0] == sorted(courses[0])


def test_what_does_not_count_must_still_be_a_number() -> None:
    """Only a mask hides NaN: a measure of 0 may be a mistake."""
    prediction, target = fields()
    with torch.no_grad():
        prediction[0, 0, 0, 0] = math.nan
    measure = torch.where(torch.arange(50) == 0, 0.0, LATITUDES)
    with pytest.raises(ValueError, match="prediction has 1 non-finite"):
        ImbalanceAwareLoss()(prediction, target, measure=measure)


@pytest.mark.parametrize("measure", [torch.zeros(1), torch.tensor([-1.0]), torch.tensor([math.nan])])
def test_a_measure_that_is_none(measure: Tensor) -> None:
    with pytest.raises(ValueError, match="measure"):
        ImbalanceAwareLoss()(*fields(), measure=measure)
