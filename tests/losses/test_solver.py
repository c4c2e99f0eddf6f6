"""The temperature of a budget from any start, by passes that say much or little, against float64."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import logsumexp

from squall.losses import EffectiveFraction, KLBudget
from squall.losses.fused import SHARPEST_BUDGET, solve
from squall.losses.fused_cpu import SmallPasses
from squall.losses.fused_measure import measured_passes
from squall.losses.population import Population
from squall.losses.temperature import Budget

from . import oracle

RNG = np.random.default_rng(0)
ROOTS = {
    "Gaussian": RNG.normal(size=3000),
    "heavy": RNG.normal(size=3000) * np.exp(1.2 * RNG.normal(size=3000)),
    "nearly equal": np.sqrt(1 + 0.01 * RNG.random(3000)),
}
MOST_SWEEPS = {0.01: 10, 0.1: 8, 0.3: 5, 0.8: 4, 1.0: 4, 1.5: 3, 3.0: 5, 30.0: 6}
"""By how far from the β wanted, as a factor, the search begins."""


class Watched(SmallPasses):
    """Passes that give so many moments, count their sweeps and know the largest max β l of one."""

    def __init__(self, roots: torch.Tensor, moments: tuple[int, int]) -> None:
        super().__init__(roots, torch.zeros_like(roots))
        self.moments, self.swept, self.sharpest = moments, 0, 0.0

    def sweep(self, beta, moments=None):
        sums = super().sweep(beta, moments)
        self.swept, self.sharpest = self.swept + 1, max(sums.top, self.sharpest)
        return sums


def divergence(rule: Budget, errors: np.ndarray, beta: float) -> float:
    once, twice = (logsumexp(factor * beta * errors) - math.log(errors.size) for factor in (1, 2))
    if isinstance(rule, EffectiveFraction):
        return twice - 2 * once
    return oracle.kl(oracle.weights(errors, beta))


def wanted(rule: Budget, errors: np.ndarray) -> float:
    """β by bisection."""
    unit = errors.std().item()
    missing = lambda log_beta: divergence(rule, errors, math.exp(log_beta) / unit) / rule.budget - 1  # noqa: E731
    return math.exp(brentq(missing, -12, 12, xtol=1e-12)) / unit


@pytest.mark.parametrize("moments", [(14, 3), (8, 4)], ids=str)
@pytest.mark.parametrize(
    "rule",
    [*map(KLBudget, (1e-3, 0.05, 0.3, 1.0)), *map(EffectiveFraction, (0.9, 0.5, 0.1))],
    ids=str,
)
@pytest.mark.parametrize(
    ("name", "dtype", "accuracy"),
    [
        ("Gaussian", torch.float64, 1e-6),
        ("heavy", torch.float64, 1e-6),
        ("nearly equal", torch.float64, 1e-6),
        ("Gaussian", torch.float32, 2e-4),
        ("heavy", torch.float32, 2e-4),
    ],
)
def test_a_budget_is_met_from_any_start_and_declined_only_where_it_gets_too_sharp(name, dtype, accuracy, rule, moments):
    roots = torch.from_numpy(ROOTS[name]).to(dtype)
    errors = roots.double().numpy() ** 2
    beta = wanted(rule, errors)
    for start, most in MOST_SWEEPS.items():
        passes = Watched(roots, moments)
        solution = solve(passes, rule, 1.0, start * beta)
        assert passes.swept <= most
        assert (solution is None) == (passes.sharpest >= SHARPEST_BUDGET)
        if solution is not None:
            assert divergence(rule, errors, solution.beta) == pytest.approx(rule.budget, rel=accuracy)
            assert solution.value == pytest.approx(oracle.weights(errors, solution.beta) @ errors, rel=1e-6)


@pytest.mark.parametrize("by_passes", [False, True])
@pytest.mark.parametrize("rule", [KLBudget(1.0), KLBudget(3.0)], ids=str)
def test_no_start_leads_back_and_forth_where_one_point_takes_over(rule, by_passes):
    """Between a β where nothing is heavy and e times that, where one point has all the weight."""
    bulk = (RNG.normal(size=3000) * np.exp(0.7 * RNG.normal(size=3000))) ** 2
    errors = torch.from_numpy(np.append(bulk / bulk.max(), 3.0))
    measure = torch.ones_like(errors).index_fill(0, torch.tensor(3000), 1e-3)
    population = Population(errors[None], measure[None])
    for start in np.geomspace(0.5, 100, 80).tolist():
        if by_passes:
            found = measured_passes(errors.sqrt(), torch.zeros_like(errors), measure)
            assert found is not None
            solution = solve(found[2], rule, 1.0, start / 3)
            assert solution is not None
            sharpness = torch.tensor([3 * solution.beta], dtype=torch.float64)
        else:
            sharpness = rule.sharpness(population, torch.tensor([start], dtype=torch.float64))
        assert rule.spread(sharpness, population.tilt).divergence.item() == pytest.approx(rule.budget, rel=1e-5)


def test_errors_that_float32_hardly_tells_apart_are_left_to_the_formula():
    passes = Watched(torch.from_numpy(ROOTS["nearly equal"]).float(), (14, 3))
    assert solve(passes, KLBudget(1e-5), 1.0, 1.5) is None
    assert passes.swept == 1
