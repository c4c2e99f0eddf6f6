"""Pointwise errors other than squares go by the fused passes over their roots: as by the formula."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from squall.losses import Huber, ImbalanceAwareLoss, KLBudget, MeanSquaredError, Relative
from squall.losses.recipe import Recipe

RULES = [0.5, math.inf, 0.0, Relative(4.0), KLBudget(0.3)]
SHAPE = (4, 3, 1500)
WEIGHT = torch.rand(SHAPE[1:], generator=torch.Generator().manual_seed(5))
OPTIONS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "masked": {"mask": torch.arange(1500) % 4 > 0},
    "measured": {"measure": WEIGHT},
    "both": {"mask": torch.arange(1500) % 4 > 0, "measure": WEIGHT},
}


def quartic(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target) ** 4


def fields() -> tuple[Tensor, Tensor]:
    """With some points predicted exactly, where a root has no slope."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    return torch.where(torch.arange(1500) % 10 == 1, target, prediction).requires_grad_(), target


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("error", ["absolute", Huber(0.3), quartic], ids=["absolute", "huber", "own"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_as_by_the_formula(rule, error, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(Recipe, "_by_passes", lambda *_: None)
        prediction, target = fields()
        loss = ImbalanceAwareLoss(rule, error=error)
        for _ in range(2):  # cold, then warm
            prediction.grad = None
            value = loss(prediction, target, **OPTIONS[options])
            value.backward()
        assert ("Fused" in type(value.grad_fn).__name__) == (fused and rule != 0.0)
        results.append((value, prediction.grad, loss.report()))
    (value, gradient, report), (expected, expected_gradient, expected_report) = results
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert bool(gradient.isfinite().all())
    assert (gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()
    for name, theirs in expected_report.items():
        close = {"top_share": 0.1, "effective_fraction": 0.05, "max_weight": 0.05}.get(name, 1e-3)  # of a sample
        assert report[name] == pytest.approx(theirs, rel=close, abs=1e-6), name


def test_the_parameters_of_an_error_learn_too() -> None:
    """A callable may have weights of its own: the gradient goes through it."""
    prediction, target = fields()
    scale = torch.tensor(2.0, requires_grad=True)

    def scaled(prediction: Tensor, target: Tensor) -> Tensor:
        return scale * (prediction - target).abs()

    value = ImbalanceAwareLoss(1.0, error=scaled)(prediction, target)
    value.backward()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(value.item() / 2, rel=1e-5)


def test_the_mean_absolute_error() -> None:
    prediction, target = fields()
    value = MeanSquaredError("absolute")(prediction, target)
    torch.testing.assert_close(value, (prediction - target).abs().mean())


def test_a_second_derivative_of_a_smooth_error() -> None:
    prediction, target = (x.detach().double() for x in fields())
    prediction = (target + 0.5 + (prediction - target).abs()).requires_grad_()
    value = ImbalanceAwareLoss(2.0, error=quartic)(prediction, target)
    (gradient,) = torch.autograd.grad(value, prediction, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), prediction)
    torch.testing.assert_close(second, 3 * gradient.detach() / (prediction - target).detach(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "error", [lambda p, t: p - t, lambda p, t: (p - t).square().mean()], ids=["negative", "scalar"]
)
def test_an_error_that_is_none(error: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"negative|shape"):
        ImbalanceAwareLoss(error=error)(*fields())
