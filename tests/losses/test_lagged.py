"""Budgets whose temperature lags by one step: what weighs, what is left for the next step, and how many passes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from squall.losses import (
    Accumulation,
    EffectiveFraction,
    ImbalanceAwareLoss,
    KLBudget,
    LaggedAccumulation,
    Schedule,
    fused,
    imbalance_aware_loss,
    recipe,
    weights,
)
from squall.losses.fused_cpu import SMALL
from squall.losses.recipe import LARGE_GROUP
from squall.losses.temperature import LARGEST_STEP

from . import oracle

RULES = [KLBudget(0.3, lagged=True), KLBudget(1.5, lagged=True), EffectiveFraction(0.5, lagged=True)]

pytestmark = pytest.mark.usefixtures("passes")


def batch(*shape: int, seed: int = 0, tail: float = 0.7) -> tuple[Tensor, Tensor]:
    """Residuals with a log-normal factor: another largest error in every batch."""
    generator = torch.Generator().manual_seed(seed)
    residuals = torch.randn(shape, generator=generator) * (tail * torch.randn(shape, generator=generator)).exp()
    return residuals.requires_grad_(), torch.zeros(shape)


def next_beta(rule, errors: np.ndarray, beta: float) -> float:
    """One step of Newton's method on log D over log β, in float64."""
    w, twice = oracle.weights(errors, beta), oracle.weights(errors, 2 * beta)
    if isinstance(rule, KLBudget):
        divergence, slope = oracle.kl(w), beta**2 * (w @ errors**2 - (w @ errors) ** 2)
    else:
        divergence, slope = math.log(errors.size * (w @ w)), 2 * beta * (twice @ errors - w @ errors)
    change = math.log(rule.budget / divergence) * divergence / slope
    return beta * math.exp(min(LARGEST_STEP, max(-LARGEST_STEP, change)))


@pytest.mark.parametrize("n", [1000, 5000, SMALL + 1])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_step_weighs_at_the_temperature_that_the_one_before_has_left(rule, n) -> None:
    loss = ImbalanceAwareLoss(rule)
    loss(*batch(n, tail=0.3))
    for seed in range(1, 6):
        beta = loss.log_inverse_temperature.exp().item()
        prediction, target = batch(n, seed=seed, tail=0.3)
        value = loss(prediction, target)
        value.backward()
        expected, gradient = oracle.loss(prediction.detach().numpy(), target.numpy(), beta)
        errors, report = prediction.detach().double().numpy() ** 2, loss.report()
        precision = 1e-6 * max(1, beta * errors.max() / 10)
        assert value.item() == pytest.approx(expected, rel=precision)
        assert np.linalg.norm(prediction.grad.numpy() - gradient) < 2 * precision * np.linalg.norm(gradient)
        assert report["temperature"] == pytest.approx(1 / beta)
        assert report["kl"] == pytest.approx(oracle.kl(oracle.weights(errors, beta)), rel=1e-4)
        assert loss.log_inverse_temperature.exp().item() == pytest.approx(next_beta(rule, errors, beta), rel=1e-3)


def by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe.Recipe, "_by_passes", lambda *_: None)
    monkeypatch.setattr(weights, "betas_by_passes", lambda *_: None)


CASES = [
    ({}, {}),
    ({}, {"mask": torch.arange(3 * LARGE_GROUP) % 3 > 0}),
    ({}, {"measure": torch.linspace(0, 1, 3 * LARGE_GROUP)}),
    ({"error": "huber"}, {}),
    ({"cap": 3.0}, {}),
    ({"trim": 0.01}, {"measure": torch.linspace(0, 1, 3 * LARGE_GROUP)}),
    ({"over": "channel"}, {}),
    ({"over": "sample"}, {}),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("options", "points"), CASES, ids=lambda case: "-".join(case))
def test_the_passes_and_the_formula_leave_the_same(rule, options, points, monkeypatch: pytest.MonkeyPatch) -> None:
    courses = []
    for way in ("passes", "formula"):
        if way == "formula":
            by_formula(monkeypatch)
        loss, course = ImbalanceAwareLoss(rule, **options), []
        for seed in range(4):
            prediction, target = batch(2, 3, 3 * LARGE_GROUP, seed=seed, tail=0.3)
            with torch.no_grad():
                prediction[:, 1] *= seed % 2  # a channel that has no errors in every other step
            value = loss(prediction, target, **points)
            value.backward()
            course.append((value.item(), prediction.grad, loss.report()["temperature"]))
        start = loss.state_dict().get("log_inverse_temperature_of_channels", loss.log_inverse_temperature)
        courses.append((course, start))
    (passes, start), (formula, expected_start) = courses
    for (value, gradient, temperature), (expected, expected_gradient, expected_temperature) in zip(
        passes, formula, strict=True
    ):
        assert value == pytest.approx(expected, rel=1e-5)
        assert (gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()
        if "channel" not in options.values():  # the median over channels is another where one has no errors
            assert temperature == pytest.approx(expected_temperature, rel=1e-4)
    torch.testing.assert_close(start, expected_start, rtol=1e-4, atol=1e-4, equal_nan=True)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that are taken from now on, by name."""
    taken: list[str] = []
    made = fused.passes_for

    def counting(*arguments, **options):
        passes = made(*arguments, **options)
        for name in ("sweep", "largest_and_mean"):
            method = getattr(passes, name)
            monkeypatch.setattr(
                passes, name, lambda *a, _name=name, _method=method, **k: (taken.append(_name), _method(*a, **k))[1],
                raising=False,
            )  # fmt: skip
        return passes

    monkeypatch.setattr(recipe, "passes_for", counting)
    return taken


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_warm_step_is_one_pass_however_the_batches_differ(rule, scale, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, taken, warm = ImbalanceAwareLoss(rule), counted(monkeypatch), 0
    for seed in range(24):
        start = loss.log_inverse_temperature.item()
        taken.clear()
        prediction, target = batch(5000, seed=seed)
        loss(prediction * (scale if seed >= 12 else 1), target)
        if math.isfinite(start):
            assert taken == ["sweep"]
            warm += 1
    assert warm >= 12


def test_every_warm_channel_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, taken = ImbalanceAwareLoss(RULES[0], over="channel"), counted(monkeypatch)
    for seed in range(6):
        taken.clear()
        loss(*batch(4, 3, LARGE_GROUP, seed=seed, tail=0.0))
        assert seed == 0 or taken == 3 * ["sweep"]


@pytest.mark.parametrize("factor", [1e-9, 0.01, 0.03, 0.1, 0.3, 3.0, 10.0, 30.0, 100.0, 1e9])
@pytest.mark.parametrize("rule", [KLBudget(0.05, lagged=True), *RULES], ids=str)
def test_the_budget_is_met_again_some_calls_after_a_jump(rule, factor) -> None:
    loss, (prediction, target) = ImbalanceAwareLoss(rule), batch(10_000, tail=0.0)
    loss(prediction, target)
    off = []
    for _ in range(14):
        prediction.grad = None
        value = loss(prediction * factor, target)
        value.backward()
        report = loss.report()
        assert math.isfinite(value.item())
        assert bool(prediction.grad.isfinite().all())
        met = report["kl"] if isinstance(rule, KLBudget) else -math.log(report["effective_fraction"])
        off.append(abs(met / rule.budget - 1) > 0.01)
    assert off[0]
    assert not any(off[10:])
    if factor in (1e-9, 100.0, 1e9):  # so far away that the next call solves it in full
        assert not any(off[1:])


@pytest.mark.parametrize("size", [0.0, 2.0])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("n", [1000, 20_000])
def test_errors_that_are_all_equal_leave_nothing_to_go_on_from(rule, size, n) -> None:
    loss = ImbalanceAwareLoss(rule)
    loss(*batch(n))
    assert loss(torch.full((n,), size), torch.zeros(n)).item() == pytest.approx(size**2, rel=3e-6)
    assert loss.log_inverse_temperature.isnan()
    loss(*batch(n))
    report = loss.report()
    met = report["kl"] if isinstance(rule, KLBudget) else -math.log(report["effective_fraction"])
    assert met == pytest.approx(rule.budget, rel=1e-3)


def test_what_is_no_step_is_solved_in_full() -> None:
    rule, exact = RULES[0], KLBudget(0.3)
    loss = ImbalanceAwareLoss(rule)
    for seed in range(2):
        loss(*batch(3000, seed=seed, tail=0.0))
    start, other = loss.log_inverse_temperature.clone(), batch(3000, seed=3, tail=0.0)
    shown = loss.weights(*other)
    loss.eval()(*other)
    assert loss.report()["kl"] == pytest.approx(0.3, rel=1e-4)
    assert torch.equal(loss.log_inverse_temperature, start)
    torch.testing.assert_close(imbalance_aware_loss(*other, rule), imbalance_aware_loss(*other, exact))
    torch.testing.assert_close(loss.weights(*other), ImbalanceAwareLoss(exact).weights(*other))
    value = loss.train()(*other)
    assert abs(loss.report()["kl"] / 0.3 - 1) > 1e-2
    torch.testing.assert_close((shown * (other[0] - other[1]).square()).sum(), value)


@pytest.mark.parametrize("points", [100, 2 * LARGE_GROUP])
def test_samples_are_others_in_every_step(points) -> None:
    loss = ImbalanceAwareLoss(RULES[0], over="sample")
    for seed in range(3):
        loss(*batch(1, 1, points, seed=seed))
        assert loss.report()["kl"] == pytest.approx(0.3, rel=1e-4)


def test_a_schedule_lags_as_well() -> None:
    loss, kls = ImbalanceAwareLoss(Schedule(RULES[0], steps=4, begin=2)), []
    for _ in range(9):
        loss(*batch(5000, tail=0.0))
        kls.append(loss.report()["kl"])
    assert kls[:2] == [0, 0]
    steps = 0.3 * np.arange(1, 6) / 5
    assert kls[2] == pytest.approx(steps[0], rel=1e-4)  # solved: a uniform step leaves no temperature
    np.testing.assert_allclose(kls[3:8], steps, rtol=0.05)
    assert kls[8] == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("over", ["all", "channel"])
def test_a_resumed_loss_gives_the_same_bits(over) -> None:
    batches = [batch(4, 3, 500, seed=seed) for seed in range(6)]
    unbroken, first, second = (ImbalanceAwareLoss(Schedule(RULES[0], 3), over=over) for _ in range(3))
    values = [unbroken(*b).item() for b in batches]
    for b in batches[:3]:
        first(*b)
    second.load_state_dict(first.state_dict())
    assert [second(*b).item() for b in batches[3:]] == values[3:]


def test_starts_are_chosen_without_a_look_at_them() -> None:
    """Under vmap: a member that has a start takes it, one that has none is solved."""
    of_rule = ImbalanceAwareLoss(RULES[0]).recipe
    residuals = torch.stack([batch(400, seed=seed, tail=0.0)[0].detach().double() for seed in range(3)])
    starts = torch.tensor([-1.0, math.nan, 0.3], dtype=torch.float64)

    def evaluate(residual: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        value, _, following = of_rule.evaluate(residual, torch.zeros_like(residual), log_inverse_temperature=start)
        return value, torch.as_tensor(following, dtype=torch.float64)

    values, following = torch.func.vmap(evaluate)(residuals, starts)
    for residual, start, value, after in zip(residuals, starts, values, following, strict=True):
        expected, expected_after = evaluate(residual, start)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(after, expected_after, rtol=1e-6, atol=1e-6)
    assert values[0].item() == pytest.approx(oracle.loss(residuals[0].numpy(), np.zeros(400), math.exp(-1.0))[0])


def test_micro_batches_lag_like_the_large_batch() -> None:
    plain, accumulated = ImbalanceAwareLoss(RULES[0]), ImbalanceAwareLoss(RULES[0])
    for seed in range(4):
        prediction, target = batch(3000, seed=seed, tail=0.3)
        value, whole = plain(prediction, target), Accumulation(accumulated)
        parts = list(zip(prediction.split(1100), target.split(1100), strict=True))
        for part in parts:
            whole.observe(*part)
        torch.testing.assert_close(sum(whole.loss(*part) for part in parts), value, rtol=1e-5, atol=0)


def test_lagged_micro_batches_lag_anyway() -> None:
    values = []
    for rule in (KLBudget(0.3), KLBudget(0.3, lagged=True)):
        loss, weight = ImbalanceAwareLoss(rule), torch.nn.Parameter(torch.ones(()))
        for seed in range(3):
            lagged, (residuals, target) = LaggedAccumulation(loss), batch(200, seed=seed)
            for a, b in zip(residuals.detach().split(50), target.split(50), strict=True):
                lagged.loss(weight * a, b).backward()
            values.append(lagged.finish([weight]))
    assert values[:3] == values[3:]
