"""The fused passes against float64, against the eager formula, and through autograd."""

import math

import numpy as np
import pytest
import torch

from squall.losses import EffectiveFraction, ImbalanceAwareLoss, KLBudget, Relative, fused, fused_cpu, recipe, weights
from squall.losses.fused_cpu import SMALL
from squall.losses.tilting import Tilting

from . import oracle

RULES = [0.5, 3.0, 100.0, math.inf, Relative(4.0), KLBudget(0.05), KLBudget(0.3), KLBudget(2.0), EffectiveFraction(0.4)]


pytestmark = pytest.mark.usefixtures("passes")


def batch(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator).requires_grad_(), torch.randn(n, generator=generator)


def relative(value: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("n", [20, 1000, SMALL + 1, 3 * SMALL + 17])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_value_and_gradient_are_those_of_float64(n, rule):
    prediction, target = batch(n)
    loss = ImbalanceAwareLoss(rule)
    for _ in range(2):  # cold, then warm
        prediction.grad = None
        value = loss(prediction, target)
        assert "Fused" in type(value.grad_fn).__name__
        value.backward()
        expected, gradient = oracle.loss(prediction.detach().numpy(), target.numpy(), 1 / loss.report()["temperature"])
        report = loss.report()
        sharpness = report["max_error"] / report["temperature"]  # an exponent b carries a rounding of b · 2⁻²⁴
        assert value.item() == pytest.approx(expected, rel=1e-6 * max(1, sharpness / 10))
        assert relative(prediction.grad.numpy(), gradient) < 1e-6 * max(1, sharpness / 10)


@pytest.mark.parametrize("rho", [0.01, 0.3, 1.5])
@pytest.mark.parametrize("n", [1000, SMALL + 1])
def test_budget_is_met_by_float64_count_on_moving_batches(n, rho):
    loss = ImbalanceAwareLoss(KLBudget(rho))
    for seed in range(4):
        prediction, target = batch(n, seed)
        loss(prediction * (1 + 0.1 * seed), target)
        errors = (prediction * (1 + 0.1 * seed) - target).detach().numpy() ** 2
        assert oracle.kl(oracle.weights(errors, 1 / loss.report()["temperature"])) == pytest.approx(rho, rel=1e-4)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for every sweep from now on; any other pass is an error."""
    swept, made = [], fused.passes_for

    def counting(*arguments, **options):
        passes = made(*arguments, **options)
        sweep = passes.sweep
        monkeypatch.setattr(passes, "sweep", lambda *a, **k: (swept.append(1), sweep(*a, **k))[1], raising=False)
        monkeypatch.setattr(passes, "largest_and_mean", lambda: pytest.fail("another pass"), raising=False)
        return passes

    monkeypatch.setattr(recipe, "passes_for", counting)
    return swept


@pytest.mark.parametrize("rule", [KLBudget(0.05), KLBudget(0.3)], ids=str)
def test_a_warm_solver_takes_one_pass_over_a_fresh_batch(monkeypatch, rule):
    """Its temperature is another, by a percent or so; the value is that of float64 there."""
    loss = ImbalanceAwareLoss(rule)
    loss(*batch(3 * SMALL + 17))
    swept = counted(monkeypatch)

    temperatures = set()
    for seed in range(1, 12):
        prediction, target = batch(3 * SMALL + 17, seed)
        value = loss(prediction, target)
        temperatures.add(loss.report()["temperature"])
        errors = (prediction - target).detach().double().numpy() ** 2
        expected = oracle.weights(errors, 1 / loss.report()["temperature"])
        assert value.item() == pytest.approx(expected @ errors, rel=1e-6)
        assert oracle.kl(expected) == pytest.approx(rule.rho, rel=2e-5)
        assert loss.report()["kl"] == pytest.approx(rule.rho, rel=2e-5)
        assert loss.report()["max_weight"] == pytest.approx(expected.max(), rel=1e-5)
        fraction = 1 / (np.square(expected).sum() * errors.size)
        assert loss.report()["effective_fraction"] == pytest.approx(fraction, rel=3e-3)
    assert len(temperatures) == 11
    assert len(swept) == 11 if fused_cpu.compiled_passes() else len(swept) <= 13


@pytest.mark.parametrize("rule", [KLBudget(0.05), KLBudget(0.3), KLBudget(1.0)], ids=str)
def test_a_warm_solver_takes_few_passes_over_batches_that_single_points_rule(monkeypatch, rule):
    """Another largest error in every batch, so that the temperature moves by tens of percents and up to tenfold."""
    loss, betas = ImbalanceAwareLoss(rule), []
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        residuals = torch.randn(10_000, generator=generator) * (0.7 * torch.randn(10_000, generator=generator)).exp()
        value = loss(residuals, torch.zeros(10_000))
        if seed == 0:
            swept = counted(monkeypatch)
        errors, beta = residuals.double().numpy() ** 2, 1 / loss.report()["temperature"]
        expected = oracle.weights(errors, beta)
        assert value.item() == pytest.approx(expected @ errors, rel=1e-6 * max(1, beta * errors.max() / 10))
        assert oracle.kl(expected) == pytest.approx(rule.rho, rel=2e-5)
        betas.append(beta)
    assert np.abs(np.diff(np.log(betas))).max() > 1
    assert len(swept) <= (1.5 if fused_cpu.compiled_passes() else 2) * 24


@pytest.mark.parametrize("rho", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("spread", [1e-3, 1e-2, 0.1])
def test_the_budget_is_met_where_errors_are_nearly_equal(spread, rho):
    loss = ImbalanceAwareLoss(KLBudget(rho))
    for seed in range(6):
        prediction = 1 + spread * batch(2000, seed)[0].detach().double().sigmoid()
        value = loss(prediction, torch.zeros_like(prediction))
        errors = prediction.numpy() ** 2
        expected = oracle.weights(errors, 1 / loss.report()["temperature"])
        assert oracle.kl(expected) == pytest.approx(rho, rel=1e-4)
        assert value.item() == pytest.approx(expected @ errors, rel=1e-6)


def test_a_budget_that_is_met_is_left_alone():
    errors = batch(5000)[0].detach().double()
    near, rule = Tilting(), KLBudget(0.3)
    near.add(fused_cpu.cpu_passes(errors, torch.zeros_like(errors)).sweep(0.3, (14, 3)), 0.3)
    assert fused._met(rule, rule.spread(0.3, near).divergence, near, 0.3, 1) == 0.3


@pytest.mark.parametrize("n", [1000, SMALL + 1])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_fused_and_eager_agree(monkeypatch, n, rule):
    results = []
    for passes in (recipe.passes_for, lambda *_: None):
        monkeypatch.setattr(recipe, "passes_for", passes)
        prediction, target = batch(n)
        loss = ImbalanceAwareLoss(rule)
        value = loss(prediction, target)
        value.backward()
        report = loss.report()
        results.append((value.item(), prediction.grad.numpy(), report))
    (fused, fused_gradient, fused_report), (eager, eager_gradient, eager_report) = results
    assert fused == pytest.approx(eager, rel=5e-6)
    assert relative(fused_gradient, eager_gradient) < 2e-5
    assert fused_report.keys() == eager_report.keys()
    for name in ("temperature", "kl", "max_weight", "mean_error", "max_error", "loss"):
        assert fused_report[name] == pytest.approx(eager_report[name], rel=1e-4, abs=1e-6)
    for name in ("effective_fraction", "top_share"):  # at the temperature of the pass; of a sample
        assert fused_report[name] == pytest.approx(eager_report[name], rel=0.05)


@pytest.mark.parametrize("n", [1000, SMALL + 1, 3 * SMALL + 17])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_is_masked_is_removed(n, rule):
    """Also by the fused passes, with NaN behind the mask, and for every share of masked points that they take."""
    for share in (0.05, 0.7):
        prediction, target = batch(n)
        mask = torch.rand(n, generator=torch.Generator().manual_seed(1)) >= share
        kept = prediction.detach()[mask].numpy(), target[mask].numpy()
        hidden = torch.where(mask, prediction, math.nan)
        loss = ImbalanceAwareLoss(rule)
        for _ in range(2):  # cold, then warm
            prediction.grad = None
            value = loss(hidden, torch.where(mask, target, math.inf), mask=mask)
            assert "Fused" in type(value.grad_fn).__name__
            value.backward(retain_graph=True)
            report = loss.report()
            expected, gradient = oracle.loss(*kept, 1 / report["temperature"])
            precision = 2e-6 * max(1, report["max_error"] / report["temperature"] / 10)
            assert value.item() == pytest.approx(expected, rel=precision)
            assert prediction.grad[~mask].abs().max() == 0
            assert relative(prediction.grad[mask].numpy(), gradient) < precision
        removed = ImbalanceAwareLoss(rule)
        removed(prediction[mask], target[mask])
        for name, theirs in removed.report().items():
            close = {"top_share": 0.25, "effective_fraction": 0.05}.get(name, 1e-3)  # of a sample; of the pass
            assert report[name] == pytest.approx(theirs, rel=close, abs=1e-6), name


def test_a_mask_that_leaves_little_goes_by_the_formula():
    prediction, target = batch(1000)
    mask = torch.arange(1000) < 200
    value = ImbalanceAwareLoss()(prediction, target, mask=mask)
    assert "Fused" not in type(value.grad_fn).__name__
    torch.testing.assert_close(value, ImbalanceAwareLoss()(prediction[:200], target[:200]))


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("guard", [{"cap": 3.0}, {"mean_share": 0.2}, {"trim": 0.01}, {"winsorize": 0.01}], ids=str)
@pytest.mark.parametrize("rule", [2.0, KLBudget(0.3), EffectiveFraction(0.4), Relative(4.0)], ids=str)
def test_a_guarded_batch_finds_its_temperature_by_passes(monkeypatch, rule, guard, measured):
    results = []
    for by_passes in (weights.beta_by_passes, lambda *_: None):
        monkeypatch.setattr(weights, "beta_by_passes", by_passes)
        prediction, target = batch(weights.LARGE)
        measure = torch.linspace(0, 1, weights.LARGE) if measured else None
        loss = ImbalanceAwareLoss(rule, **guard)
        for _ in range(2):
            prediction.grad = None
            value = loss(prediction, target, measure=measure)
            value.backward()
        results.append((value.item(), prediction.grad.numpy(), loss.report()))
    (value, gradient, report), (expected, expected_gradient, expected_report) = results
    assert value == pytest.approx(expected, rel=2e-6)
    assert relative(gradient, expected_gradient) < 1e-5
    assert report == pytest.approx(expected_report, rel=1e-4)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.29, 0.5, 0.999])
@pytest.mark.parametrize("count", [1, 10, 100, 1001])
def test_a_fraction_of_the_errors_is_above_their_quantile_at_most(count, fraction):
    errors = torch.randn(1, count, generator=torch.Generator().manual_seed(count)).square().round(decimals=1)
    threshold = weights._upper_quantile(errors, None, fraction, weights.ALONE)
    assert (errors > threshold).double().mean() <= fraction
    below = errors[errors < threshold]
    if len(below):
        assert (errors > below.max()).double().mean() > fraction
    bisected = weights._upper_quantile(errors, torch.ones_like(errors), fraction, weights.ALONE)
    assert threshold.item() == pytest.approx(bisected.item(), abs=1e-6)


@pytest.mark.parametrize("factor", [3.0, -2.0, 0.0])
@pytest.mark.parametrize("rule", [2.0, math.inf, KLBudget()], ids=str)
@pytest.mark.parametrize("n", [100, SMALL + 1])
def test_backward_scales_repeats_and_reaches_the_target(n, rule, factor):
    prediction, target = batch(n)
    target.requires_grad_()
    value = ImbalanceAwareLoss(rule)(prediction, target)
    once = torch.autograd.grad(value, (prediction, target), retain_graph=True)
    scaled = torch.autograd.grad(factor * value, (prediction, target))
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(b, factor * a, rtol=2e-5, atol=1e-12)
    torch.testing.assert_close(once[0], -once[1])


def test_second_derivative_holds_the_weights_fixed():
    prediction, target = (x.double().detach() for x in batch(50))
    prediction.requires_grad_()
    (gradient,) = torch.autograd.grad(ImbalanceAwareLoss(2.0)(prediction, target), prediction, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), prediction)
    expected = 2 * oracle.weights((prediction - target).detach().numpy() ** 2, 0.5)
    np.testing.assert_allclose(second.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_no_scale_overflows(scale):
    prediction, target = batch(1000)
    reference = ImbalanceAwareLoss()(prediction, target).item()
    assert ImbalanceAwareLoss()(prediction * scale, target * scale).item() == pytest.approx(
        reference * scale**2, rel=1e-5
    )


def test_changing_the_prediction_in_place_before_backward_is_refused():
    prediction, target = batch(100)
    moved = prediction * 1
    value = ImbalanceAwareLoss()(moved, target)
    moved.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("seed", [83, 252, 553])
def test_errors_that_differ_by_rounding_alone_still_meet_the_budget(seed):
    """From a temperature at which float32 sums do not tell their divergence from rounding: weights were uniform."""
    generator = torch.Generator().manual_seed(seed)
    prediction = (0.5 + 1.5 * torch.rand((), generator=generator)) * (1 + 2e-7 * torch.randn(3000, generator=generator))
    loss = ImbalanceAwareLoss(KLBudget(0.003))
    loss.log_inverse_temperature.fill_(math.log(650 / float(prediction.square().max())))
    loss(prediction, torch.zeros(3000))
    weights = oracle.weights(prediction.double().numpy() ** 2, 1 / loss.report()["temperature"])
    assert oracle.kl(weights) == pytest.approx(0.003, rel=0.3)
