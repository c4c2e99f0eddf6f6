"""The errors of each group as a distribution, and that distribution tilted towards its large errors.

A group g is a set of points that is normalised over together: everything, one sample, or one channel. Its
points carry a measure μ_i ≥ 0 (1 where none is given, 0 where masked) and p_i = μ_i / Σμ. The distribution
tilted by the inverse temperature β = 1/T is

    w_i = p_i exp(β l_i) / Σ_j p_j exp(β l_j).

Everything here is computed from y_i = (l_i − l_max)/l_max ≤ 0 and the dimensionless sharpness b = β l_max,
since β l_i = b y_i + b: no unit, no overflow, whatever the scale of the errors. Elements keep their own
precision (float32 at least); sums run in float64, since a float32 sum over 5·10⁷ elements is off by percents.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ALONE", "Number", "Population", "Reduce", "Sharding", "Tilt"]

Number = Any  # Tensor | float: arithmetic on both

Reduce = Callable[[Tensor, str], Tensor]
"""(tensor, "sum" | "max") → the tensor reduced over all ranks that share the groups."""


def here(value: Tensor, _operation: str) -> Tensor:
    """The reduction over this process alone: nothing to do."""
    return value


class Sharding(NamedTuple):
    """How sums and maxima are completed where other processes hold other points."""

    within: Reduce = here
    """Over the processes that hold points of the same group."""
    across: Reduce = here
    """Over the processes that hold other groups."""
    world: int = 1
    """Number of processes."""


ALONE = Sharding()


class Tilt(NamedTuple):
    """Moments of the distribution tilted with sharpness b; each of shape (group,), float64, dimensionless.

    Plain numbers where the sums came from a fused pass.
    """

    log_partition: Number
    """A = log Σ p_i exp(b y_i)."""
    mean: Number
    """E_w y = dA/db."""
    variance: Number
    """Var_w y = d²A/db²."""


class Population:
    """The errors l of every group, with their measure.

    Args:
        errors: l ≥ 0, shape (group, point), detached or not.
        measure: μ ≥ 0, shape (group, point); None is 1 everywhere.
        sharding: how sums and maxima are completed over the processes that hold the other points.
    """

    def __init__(self, errors: Tensor, measure: Tensor | None = None, sharding: Sharding = ALONE) -> None:
        self.errors, self.measure, self.sharding = errors, measure, sharding
        reduce = sharding.within
        self.top = reduce(self._local_top(), "max")
        """Largest error of each group, shape (group,); 0 for an empty group."""
        scale = torch.where(self.top > 0, self.top, 1).unsqueeze(1)
        self.below = ((errors - self.top.unsqueeze(1)) / scale).clamp(max=0)
        """y, shape (group, point)."""
        self.scale = scale.squeeze(1).double()
        """l_max, or 1 where every error is zero: b = β · scale."""
        self.total = reduce(self._local_total(), "sum")
        """Σμ, shape (group,), float64."""
        self.everything = sharding.across(self.total.sum(), "sum")
        """Σμ over all groups."""

    def _local_top(self) -> Tensor:
        if self.errors.shape[1] == 0:
            return self.errors.new_zeros(self.errors.shape[0])
        errors = self.errors.detach()
        return (errors if self.measure is None else torch.where(self.measure > 0, errors, 0)).amax(1)

    def _local_total(self) -> Tensor:
        if self.measure is None:
            return torch.full_like(self.top, self.errors.shape[1], dtype=torch.float64)
        return self.measure.sum(1, dtype=torch.float64)

    @property
    def mass(self) -> Tensor:
        """Σμ, or 1 for a group of no measure, so that dividing by it is safe; shape (group,)."""
        return torch.where(self.total > 0, self.total, 1)

    @property
    def share(self) -> Tensor:
        """Share of each group in the measure of everything, shape (group,), float64."""
        return self.total / self.everything

    def expectations(self, *values: Tensor) -> tuple[Tensor, ...]:
        """E_p of several `values` (group, point) in each group, float64: the measure-weighted means."""
        weighted = [v if self.measure is None else v * self.measure for v in values]
        sums = torch.stack([v.sum(1, dtype=torch.float64) for v in weighted])
        return tuple((self.sharding.within(sums, "sum") / self.mass).unbind())

    def expectation(self, values: Tensor) -> Tensor:
        """E_p of `values` (group, point) in each group, float64."""
        return self.expectations(values)[0]

    def mean(self) -> Tensor:
        """Mean error of each group, in the unit of the errors."""
        scale = self.scale.to(self.errors.dtype).unsqueeze(1)  # their sum may be too large where their mean is not
        return self.scale * self.expectation(self.errors / scale)

    def tied_share(self) -> Tensor:
        """Share of each group's measure that sits exactly at its largest error."""
        return self.expectation((self.below == 0).to(self.errors.dtype))

    def density(self, sharpness: Tensor) -> Tensor:
        """exp(b y), shape (group, point): 1 at the largest error, for b = 0 … ∞ included."""
        sharpness = sharpness.to(self.below.dtype).unsqueeze(1)
        infinite = sharpness.isinf()  # ∞ · 0 at the maximum would be NaN
        density = (torch.where(infinite, 0, sharpness) * self.below).exp()
        return torch.where(infinite, (self.below == 0).to(density.dtype), density)

    def tilt(self, sharpness: Tensor) -> Tilt:
        """Moments at sharpness b (group,), float64: one pass over the points."""
        density = self.density(sharpness)
        first = density * self.below
        partition, mean, second = self.expectations(density, first, first * self.below)
        partition = torch.where(partition > 0, partition, 1)
        mean, second = mean / partition, second / partition
        return Tilt(partition.log(), mean, (second - mean.square()).clamp(min=0))
