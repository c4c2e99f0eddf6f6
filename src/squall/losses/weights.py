"""The weights: the tilted distribution, and the guards that keep a few bad points from taking it over."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from squall.losses._tracing import is_traced
from squall.losses.checks import check_any, check_errors, check_finite, check_not_empty, combined_measure
from squall.losses.fused import beta_by_passes
from squall.losses.population import ALONE, Population, Sharding
from squall.losses.temperature import DEFAULT_TEMPERATURE, Schedule, Temperature, TemperatureRule, as_rule

__all__ = ["Over", "Weighed", "Weighing", "imbalance_weights", "to_groups"]

Over = Literal["all", "sample", "channel"]
"""What is normalised over together: everything (the paper), each sample, or each channel."""

LARGE = 1 << 14
"""Points from which a guarded group finds its temperature by the passes of the fused loss."""
BISECTIONS = 40
WATER_FILLINGS = 32


def to_groups(values: Tensor, over: Over) -> Tensor:
    """(batch, channel, *space) → (group, point), a view where the memory allows."""
    if over == "all":
        return values.reshape(1, -1)
    if over == "sample":
        return values.reshape(values.shape[0], math.prod(values.shape[1:]))
    return values.movedim(1, 0).reshape(values.shape[1], values.shape[0] * math.prod(values.shape[2:]))


def from_groups(values: Tensor, shape: torch.Size, over: Over) -> Tensor:
    """The inverse of `to_groups`."""
    if over == "channel":
        batch, channel, *space = shape
        return values.reshape(channel, batch, *space).movedim(0, 1)
    return values.reshape(shape)


class Weighed(NamedTuple):
    """Weights and what they were made with."""

    weights: Tensor
    """w, shape (group, point); sums to 1 over everything (over all processes)."""
    sharpness: Tensor
    """b = l_max / T, shape (group,), float64."""
    population: Population


@dataclass(frozen=True)
class Weighing:
    """How errors become weights; `ImbalanceAwareLoss` documents the fields."""

    rule: TemperatureRule | Schedule
    cap: float | None = None
    mean_share: float = 0.0
    trim: float = 0.0
    winsorize: float = 0.0
    differentiate: bool = False

    def __post_init__(self) -> None:
        if self.cap == math.inf:
            object.__setattr__(self, "cap", None)
        if self.cap is not None and not self.cap >= 1:
            raise ValueError(f"cap is in units of the uniform weight and must be at least 1, got {self.cap}")
        for name in ("mean_share", "trim", "winsorize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a fraction and must be in [0, 1], got {getattr(self, name)}")
        if self.trim == 1:
            raise ValueError("trim=1 drops every point; it must be below 1")

    @property
    def plain(self) -> bool:
        """Nothing but the rule."""
        return self.cap is None and not (self.mean_share or self.trim or self.winsorize or self.differentiate)

    def at(self, step: Tensor | None) -> tuple[TemperatureRule, Tensor | float]:
        """The rule at a step, and how much of it applies."""
        if not isinstance(self.rule, Schedule):
            return self.rule, 1.0
        return self.rule.final, self.rule.softness(torch.zeros((), dtype=torch.int64) if step is None else step)

    def weigh(
        self,
        errors: Tensor,
        measure: Tensor | None = None,
        *,
        sharding: Sharding = ALONE,
        log_inverse_temperature: Tensor | None = None,
        step: Tensor | None = None,
    ) -> Weighed:
        """The weights of errors (group, point); see `imbalance_weights`.

        Args:
            errors: l, shape (group, point).
            measure: μ, the same shape.
            sharding: how the other processes take part.
            log_inverse_temperature: log β of the call before (scalar or one per group), a start for the solver.
            step: number of calls before this one, for a `Schedule`.
        """
        if not self.differentiate:
            errors = errors.detach()
        errors, measure = self._without_extremes(errors, measure, sharding)
        population = Population(errors, measure, sharding)
        check_any(population.everything)
        with torch.no_grad():
            sharpness = self._sharpness(population, log_inverse_temperature, step)
        density = population.density(sharpness)
        partition = population.expectation(density)
        ratio = density / torch.where(partition > 0, partition, 1).unsqueeze(1).to(density.dtype)
        if self.cap is not None:
            ratio = _capped(ratio, self.cap, population)
        if self.mean_share:
            ratio = self.mean_share + (1 - self.mean_share) * ratio
        uniform = (population.share / population.mass).unsqueeze(1).to(ratio.dtype)
        weights = ratio * (uniform if measure is None else uniform * measure)
        return Weighed(weights, sharpness, population)

    def _sharpness(self, population: Population, log_inverse_temperature: Tensor | None, step: Tensor | None) -> Tensor:
        start = torch.full_like(population.scale, math.nan)
        if log_inverse_temperature is not None and log_inverse_temperature.numel() == len(start):
            start = log_inverse_temperature.to(population.scale.device).exp() * population.scale
        rule, softness = self.at(step)
        if not self.plain and _is_large(population):
            beta = beta_by_passes(
                population.errors, population.measure, rule, float(softness), float(start / population.scale)
            )
            if beta is not None:
                return beta * population.scale
        return rule.sharpness(population, start, softness)

    def _without_extremes(
        self, errors: Tensor, measure: Tensor | None, sharding: Sharding
    ) -> tuple[Tensor, Tensor | None]:
        if self.winsorize:
            errors = torch.minimum(errors, _upper_quantile(errors, measure, self.winsorize, sharding))
        if self.trim:
            kept = errors <= _upper_quantile(errors, measure, self.trim, sharding)
            measure = kept.to(errors.dtype) if measure is None else measure * kept
        return errors, measure


def _is_large(population: Population) -> bool:
    """One group on this process's CPU, worth the passes of the fused loss to find its temperature."""
    errors = population.errors
    alone = population.sharding is ALONE and len(errors) == 1 and errors.device.type == "cpu"
    return alone and errors.numel() >= LARGE and not is_traced(errors)


def _upper_quantile(errors: Tensor, measure: Tensor | None, fraction: float, sharding: Sharding) -> Tensor:
    """The smallest error (to rounding) that at most `fraction` of the measure exceeds; shape (group, 1).

    Where points count alike, on one process, an order statistic. Otherwise by bisection on the value: each halving is
    one pass, needs no sort, and sums over processes.
    """
    count = errors.shape[1]
    above = math.floor(fraction * count + 1e-9)
    if measure is None and sharding is ALONE and above < count and not is_traced(errors):
        return errors.detach().kthvalue(count - above, dim=1, keepdim=True).values
    population = Population(errors.detach(), measure, sharding)
    low, high = torch.full_like(population.top, -1), torch.zeros_like(population.top)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = population.expectation((population.below > middle.unsqueeze(1)).to(errors.dtype))
        low, high = torch.where(above > fraction, middle, low), torch.where(above > fraction, high, middle)
    return (population.top + high * population.scale.to(high.dtype)).unsqueeze(1)


def _capped(ratio: Tensor, cap: float, population: Population) -> Tensor:
    """w/p ≤ cap, what is cut off shared out in proportion: w/p = min(cap, λ w⁰/p), with λ ≥ 1 so that Σw = 1.

    Water filling: the set at the cap only grows from round to round, so a few rounds settle it.
    """
    raised = torch.ones_like(population.mass)
    for _ in range(WATER_FILLINGS):
        before = raised
        full = (ratio * raised.unsqueeze(1).to(ratio.dtype) >= cap).to(ratio.dtype)
        full_share, free = population.expectations(full, ratio * (1 - full))
        raised = torch.where(free > 1e-30, (1 - cap * full_share).clamp(min=0) / free.clamp(min=1e-30), raised)
        if not is_traced(ratio) and torch.equal(raised, before):
            break
    filled = (ratio * raised.unsqueeze(1).to(ratio.dtype)).clamp(max=cap)
    # Nothing to be in proportion to (temperature 0): the rest goes evenly to the points below the cap.
    full = (filled >= cap).to(ratio.dtype)
    full_share, total = population.expectations(full, filled)
    rest = (1 - total) / (1 - full_share).clamp(min=1e-30)
    return filled + (1 - full) * rest.unsqueeze(1).to(ratio.dtype)


def imbalance_weights(
    errors: Tensor,
    temperature: Temperature = DEFAULT_TEMPERATURE,
    *,
    mask: Tensor | None = None,
    measure: Tensor | None = None,
    over: Over = "all",
    cap: float | None = None,
    mean_share: float = 0.0,
    trim: float = 0.0,
    winsorize: float = 0.0,
) -> Tensor:
    """Weights w_i = p_i exp(l_i/T) / Σ_j p_j exp(l_j/T) of pointwise errors; detached.

    Args:
        errors: l ≥ 0, shape (batch, channel, *space) or any other shape for `over="all"`.
        temperature: T in the unit of the errors, or a rule that finds it.
        mask: True where a point counts; broadcastable to the errors.
        measure: μ ≥ 0, such as cell areas; broadcastable to the errors. p = μ/Σμ.
        over: what is normalised over together; every group gets its share of the measure.
        cap: no weight above `cap` times the uniform one.
        mean_share: α of uniform weights mixed in.
        trim: fraction of the measure, largest errors first, that gets no weight.
        winsorize: fraction of the measure whose errors are lowered to the largest of the rest.

    Returns:
        w of the shape of the errors, summing to 1.

    Example:
        >>> imbalance_weights(torch.tensor([0.0, 1.0]), temperature=1.0)
        tensor([0.2689, 0.7311])
        >>> imbalance_weights(torch.tensor([1.0, 3.0, 3.0]), temperature=0)
        tensor([0.0000, 0.5000, 0.5000])
    """
    weighing = Weighing(as_rule(temperature), cap, mean_share, trim, winsorize)
    errors = check_errors(errors, over)
    check_not_empty(errors)
    total = combined_measure(mask, measure, errors)
    grouped = None if total is None else to_groups(total, over)
    if mask is not None:
        errors = torch.where(mask, errors, 0)
    check_finite(errors)
    weighed = weighing.weigh(to_groups(errors, over), grouped)
    return from_groups(weighed.weights, errors.shape, over)
