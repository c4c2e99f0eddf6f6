"""Rules that choose the temperature T of the weights w_i ∝ exp(l_i / T) from the errors at hand.

A fixed T has the unit of the errors: it means something else for every field, every unit and every stage of
training. A *budget* has none: T is solved for, so that the weights stray from uniform by a given amount. The
amount is a Rényi divergence D(w‖p) of the weights from the measure: the Kullback-Leibler divergence
(`KLBudget`) or log of n over the effective sample size (`EffectiveFraction`). Both grow monotonically with
1/T, from 0 to log(1/share of the points tied at the maximum).
"""

import abc
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "DEFAULT_TEMPERATURE",
    "EffectiveFraction",
    "Fixed",
    "KLBudget",
    "Relative",
    "Schedule",
    "Temperature",
    "TemperatureRule",
    "as_rule",
]


TEMPERATURE, RELATIVE, KL, RENYI = range(4)
"""What a rule prescribes: T, T over the mean error, or a divergence of order 1 or 2 from the measure, in nats."""

SHARPEST = 1e18
"""b = l_max/T of T = 0: it tells errors apart that differ by one rounding of float64."""
LARGEST_EXPONENT = 700.0
"""Of float64. Only atoms that are far above a cap have a larger one."""


class Demand(NamedTuple):
    """What a rule asks of the solver."""

    kind: int
    number: Any
    """A float, or a tensor where a schedule runs on a device."""
    cap: float = math.inf
    """A cap on w/p that is part of the budget."""


class TemperatureRule(abc.ABC):
    """A rule from the errors to their temperature."""

    @abc.abstractmethod
    def demand(self, softness: Any = 1.0) -> Demand:
        """What is asked for where a share `softness` of the rule applies: 1 all of it, 0 uniform weights."""


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

    def demand(self, softness: Any = 1.0) -> Demand:
        return Demand(TEMPERATURE, _over(self.temperature, softness))


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

    def demand(self, softness: Any = 1.0) -> Demand:
        return Demand(RELATIVE, _over(self.tau, softness))


def _over(temperature: float, softness: Any) -> Any:
    """T/s, ∞ for s = 0."""
    if not isinstance(softness, Tensor):
        return temperature / softness if softness > 0 else math.inf
    return (temperature / softness).masked_fill(softness <= 0, math.inf)


@dataclass(frozen=True)
class KLBudget(TemperatureRule):
    """T such that KL(w‖p) = ρ: the worst case over all weightings within ρ of the mean.

        max {Σ w_i l_i : KL(w‖p) ≤ ρ, w ≤ c p}

    Without a cap (c = ∞) this is min_T T log Σ p_i exp(l_i/T) + T ρ, with weights in proportion to p exp(l/T). With
    one, w = p min(c, a exp(l/T)); where ρ ≥ log c it is the mean of the largest 1/c of the errors (CVaR, top-k). The
    weights know no unit and no batch size. By Danskin's theorem no gradient through T is missing.

    Args:
        rho: ρ > 0, dimensionless (nats). 0.05 is gentle, 0.3 the default, 2 sharp.
        cap: c > 1, in units of the uniform weight: no point may weigh more.

    Reference:
        Hu and Hong, Kullback-Leibler divergence constrained distributionally robust optimization, 2013.
        Levy et al., Large-scale methods for distributionally robust optimization, NeurIPS 2020 (CVaR).
    """

    rho: float = 0.3
    cap: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.rho < math.inf:
            raise ValueError(f"KLBudget: rho must be positive and finite, got {self.rho}; ∞ is temperature=0")
        if not self.cap > 1:
            raise ValueError(
                f"KLBudget: cap is in units of the uniform weight and must be above 1, got {self.cap}; "
                f"1 would be the mean, temperature=inf"
            )

    def demand(self, softness: Any = 1.0) -> Demand:
        return Demand(KL, softness * self.rho, self.cap)


@dataclass(frozen=True)
class EffectiveFraction(TemperatureRule):
    """T such that the effective sample size 1/Σw² is the fraction f of the points.

    With a measure: 1/Σ(w²/p) = f, which is log(1/f) = A(2β) − 2A(β) for A(β) = log Σ p exp(β l), Rényi's divergence of
    order 2.

    Args:
        fraction: f in (0, 1), dimensionless. 0.9 is gentle, 0.1 sharp.

    Reference:
        Kish, Survey Sampling, 1965 (effective sample size); Rényi, On measures of entropy and information, 1961.
    """

    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(
                f"EffectiveFraction: fraction must be in (0, 1), got {self.fraction}; 1 is temperature=inf"
            )

    def demand(self, softness: Any = 1.0) -> Demand:
        return Demand(RENYI, softness * -math.log(self.fraction))


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
    """Convert a number to `Fixed`; pass rules through."""
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
