"""Rules that choose the temperature T of the weights w_i ∝ exp(l_i / T) from the errors at hand.

A fixed T has the unit of the errors: it means something else for every field, every unit and every stage of
training. A *budget* has none: T is solved for, so that the weights stray from uniform by a given amount. The
amount is a Rényi divergence D(w‖p) of the weights from the measure: the Kullback-Leibler divergence
(`KLBudget`) or log of n over the effective sample size (`EffectiveFraction`). Both grow monotonically with
1/T, from 0 to log(1/share of the points tied at the maximum).
"""

import abc
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from squall.losses._tracing import is_traced
from squall.losses.population import Number, Population, Tilt

__all__ = [
    "DEFAULT_TEMPERATURE",
    "Budget",
    "EffectiveFraction",
    "Fixed",
    "KLBudget",
    "Relative",
    "Schedule",
    "Temperature",
    "TemperatureRule",
    "as_rule",
]

TOLERANCE = 1e-7
"""Relative accuracy to which a budget is met."""
TRACED_ITERATIONS, MOST_ITERATIONS = 16, 100
LARGEST_SHARPNESS = 1e12
LARGEST_STEP = 1.0
"""Most that log b may change in a step of Newton's method: more overshoots where the divergence saturates."""


class TemperatureRule(abc.ABC):
    """A rule from errors to the sharpness b = l_max / T of every group."""

    @abc.abstractmethod
    def sharpness(self, population: Population, start: Tensor, softness: Tensor | float = 1.0) -> Tensor:
        """b of every group, shape (group,), float64; ∞ allowed.

        Args:
            population: the errors.
            start: a guess of b (group,), NaN where there is none.
            softness: how much of the rule applies: 1 all of it, 0 uniform weights (b = 0).
        """


@dataclass(frozen=True)
class Fixed(TemperatureRule):
    """The same T always: 0 weighs the largest error alone, ∞ is the mean.

    Args:
        temperature: T in [0, ∞], in the unit of the errors. It does not travel between units.
    """

    temperature: float

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(
                f"temperature must be a number from 0 (the largest error alone) to inf (the mean), or a "
                f"rule such as KLBudget(0.3); got {self.temperature}"
            )

    def sharpness(self, population: Population, start: Tensor, softness: Tensor | float = 1.0) -> Tensor:
        if self.temperature == 0:
            sharpest = torch.full_like(population.scale, math.inf)
        else:
            sharpest = population.scale / self.temperature
        if isinstance(softness, Tensor):
            return torch.where(softness > 0, sharpest * softness, 0)
        return sharpest * softness if softness > 0 else torch.zeros_like(sharpest)


@dataclass(frozen=True)
class Relative(TemperatureRule):
    """T = τ · mean(l), for every group.

    Args:
        tau: τ > 0, dimensionless; 3 to 10 is sensible. Gaussian residuals collapse on single points below 2.
    """

    tau: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.tau < math.inf:
            raise ValueError(f"Relative: tau must be positive and finite, got {self.tau}")

    def sharpness(self, population: Population, start: Tensor, softness: Tensor | float = 1.0) -> Tensor:
        mean = population.mean()
        return torch.where(mean > 0, softness * population.scale / (self.tau * mean), 0)


class Spread(NamedTuple):
    """A divergence from uniform and its derivative with respect to log b, each (group,)."""

    divergence: Number
    slope: Number


class Budget(TemperatureRule):
    """A rule by which a divergence D(w‖p) of the weights from uniform is given, and T is solved for."""

    @property
    @abc.abstractmethod
    def budget(self) -> float:
        """The divergence, in nats."""

    @abc.abstractmethod
    def spread(self, sharpness: Number, tilt: Callable[[Any], Tilt]) -> Spread:
        """The divergence and its slope at a sharpness, from the moments at any sharpness."""

    def sharpness(self, population: Population, start: Tensor, softness: Tensor | float = 1.0) -> Tensor:
        return solve_budget(population, self, softness * self.budget, start)


@dataclass(frozen=True)
class KLBudget(Budget):
    """T such that KL(w‖p) = ρ: the worst case over all weightings within ρ of the mean.

        max {Σ w_i l_i : KL(w‖p) ≤ ρ} = min_T  T log Σ p_i exp(l_i/T) + T ρ

    The weights know no unit and no batch size. By Danskin's theorem no gradient through T is missing.

    Args:
        rho: ρ > 0, dimensionless (nats). 0.05 is gentle, 0.3 the default, 2 sharp.

    Reference:
        Hu and Hong, Kullback-Leibler divergence constrained distributionally robust optimization, 2013.
    """

    rho: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.rho < math.inf:
            raise ValueError(f"KLBudget: rho must be positive and finite, got {self.rho}; ∞ is temperature=0")

    @property
    def budget(self) -> float:
        return self.rho

    def spread(self, sharpness: Number, tilt: Callable[[Any], Tilt]) -> Spread:
        log_partition, mean, variance = tilt(sharpness)
        return Spread(sharpness * mean - log_partition, sharpness * sharpness * variance)


@dataclass(frozen=True)
class EffectiveFraction(Budget):
    """T such that the effective sample size 1/Σw² is the fraction f of the points.

    With a measure: 1/Σ(w²/p) = f, which is log(1/f) = A(2β) − 2A(β) for A(β) = log Σ p exp(β l).

    Args:
        fraction: f in (0, 1), dimensionless. 0.9 is gentle, 0.1 sharp.
    """

    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(
                f"EffectiveFraction: fraction must be in (0, 1), got {self.fraction}; 1 is temperature=inf"
            )

    @property
    def budget(self) -> float:
        return -math.log(self.fraction)

    def spread(self, sharpness: Number, tilt: Callable[[Any], Tilt]) -> Spread:
        once, twice = tilt(sharpness), tilt(2 * sharpness)
        divergence = twice.log_partition - 2 * once.log_partition
        return Spread(divergence, 2 * sharpness * (twice.mean - once.mean))


def solve_budget(population: Population, rule: Budget, budget: Tensor | float, start: Tensor) -> Tensor:
    """b with divergence(b) = budget for every group, by Newton's method on log divergence over log b.

    The divergence grows like b² for small b and saturates for large b, so the logarithms are nearly linear;
    a step that leaves the bracket is replaced by its middle. Where the budget exceeds what ties at the
    maximum allow, the answer is ∞ (and a warning); where all errors are equal it is 0, since every b weighs alike.
    """
    top_share = population.tied_share()
    # No number is copied to the device, which the capture of a CUDA graph forbids.
    budget = budget.double().expand_as(top_share) if isinstance(budget, Tensor) else torch.full_like(top_share, budget)
    feasible = budget < -top_share.log() * (1 - 1e-9)
    variance = population.tilt(torch.zeros_like(top_share)).variance
    guess = (2 * budget / variance.clamp(min=1e-300)).sqrt()
    b = torch.where((start > 0) & start.isfinite(), start, guess).clamp(1e-12, LARGEST_SHARPNESS)
    low, high = torch.full_like(b, 1e-14), torch.full_like(b, LARGEST_SHARPNESS * 1e3)
    active = feasible & (budget > 0) & (variance > 0)
    for _ in range(TRACED_ITERATIONS if is_traced(population.errors) else MOST_ITERATIONS):
        divergence, slope = rule.spread(b, population.tilt)
        over = divergence > budget
        low, high = torch.where(over, low, b), torch.where(over, b, high)
        missing = budget.clamp(min=1e-300).log() - divergence.clamp(min=1e-300).log()
        newton = b * (missing * divergence / slope).clamp(-LARGEST_STEP, LARGEST_STEP).exp()
        inside = (newton > low) & (newton < high) | (newton == b)  # not its ends: two steps would lead back and forth
        following = torch.where(inside, newton, (low * high).sqrt())
        settled = ((following / b - 1).abs() < TOLERANCE) | ~active
        b = torch.where(active, following, b)
        if not is_traced(population.errors) and bool(settled.all()):
            break
    unmet = ~feasible & (top_share < 1) & (budget > 0)
    if not is_traced(population.errors) and bool(unmet.any()):
        warnings.warn(
            f"the temperature budget {float(budget.max()):.3g} cannot be met in {int(unmet.sum())} of "
            f"{len(unmet)} groups: too few points, or too many tied at the largest error, which takes all the "
            f"weight there. Use a smaller budget or larger groups.",
            RuntimeWarning,
            stacklevel=2,
        )
    return torch.where(unmet, math.inf, torch.where(active, b, 0.0))


def newton_step(divergence: float, slope: float, budget: float, low: float = 0.0, high: float = math.inf) -> float:
    """The factor on b of the next Newton step (as in `solve_budget`), for plain numbers.

    Args:
        divergence, slope: at the present b, positive.
        budget: the divergence wanted.
        low, high: the bracket, as factors of the present b.
    """
    change = math.log(budget / divergence) * (divergence / slope if slope > 0 else 0.5)
    factor = math.exp(min(LARGEST_STEP, max(-LARGEST_STEP, change)))
    return factor if low < factor < high else math.sqrt(low * high)


@dataclass(frozen=True)
class Schedule:
    """A rule that sets in gradually: uniform weights before `begin`, the whole rule from `begin + steps` on.

    In between, the share s of the rule grows linearly from 0 to 1: a budget is s·ρ (the effective fraction
    f to the power s), a temperature T/s. While nothing is learned yet, the largest errors say little.

    Args:
        rule: the rule of the end, or a number for a fixed temperature.
        steps: length of the ramp, in calls of the loss in training mode; 0 is a switch.
        begin: calls with uniform weights before it (a warm-up).
    """

    rule: "TemperatureRule | float"
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.begin < 0:
            raise ValueError(f"Schedule: steps and begin must not be negative, got {self.steps} and {self.begin}")
        _ = self.final

    @property
    def final(self) -> TemperatureRule:
        """The rule of the end."""
        rule = as_rule(self.rule)
        if isinstance(rule, Schedule):
            raise TypeError("Schedule: the rule of a schedule cannot be a schedule")
        return rule

    def softness(self, step: Tensor) -> Tensor:
        """s in [0, 1] at a step (a count of the calls before this one)."""
        return ((step - self.begin + 1) / (self.steps + 1)).clamp(0, 1)


Temperature = float | int | TemperatureRule | Schedule
"""What the argument `temperature` takes."""


def as_rule(temperature: Temperature) -> TemperatureRule | Schedule:
    """The rule that a number stands for (`Fixed`); a rule stands for itself."""
    if isinstance(temperature, TemperatureRule | Schedule):
        return temperature
    if isinstance(temperature, float | int) and not isinstance(temperature, bool):
        return Fixed(float(temperature))
    raise TypeError(
        f"temperature must be a number or one of KLBudget, EffectiveFraction, Relative, Schedule; "
        f"got {type(temperature).__name__}"
    )


DEFAULT_TEMPERATURE = KLBudget(0.3)
"""Needs no tuning: it knows no unit, and weighs a batch like the worst case within 0.3 nats of the mean."""
