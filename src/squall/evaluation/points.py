"""How much each point of a state counts: masked points never, the others by the area of their cell."""

import functools

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from squall.data import Source
from squall.data.description import AXES
from squall.data.measure import lengths

PointValues = Float[Tensor, "batch step channel point"]
PerField = Float[Tensor, "batch step channel"]


def cell_volumes(source: Source) -> Float64[Tensor, "*space"]:
    """ΔV of every point: the product of the spacings, or of the cells' widths where they differ.

    Where the source has areas, ΔV is in proportion to them, with the same mean.
    """
    volumes = functools.reduce(torch.mul, lengths(source.coordinates, AXES[: len(source.space)]))
    return volumes if source.measure is None else source.measure * volumes.mean()


class Points:
    """Means over the points of a state, Σ μ m x / Σ μ m, with area μ and mask m.

    Values are (batch, step, channel, point), with the space axes as one. Without mask and areas the means are plain.

    Args:
        source: its mask and areas count.

    Attributes:
        weights: μ m (channel, point), or `None` where all points count alike.
    """

    def __init__(self, source: Source) -> None:
        self.weights: Tensor | None = None
        if source.mask is not None or source.measure is not None:
            areas = torch.ones(source.space, dtype=torch.float64) if source.measure is None else source.measure
            mask = torch.ones(source.shape[2:], dtype=torch.bool) if source.mask is None else source.mask
            self.weights = (areas * mask).flatten(1)

    def weighted(self, values: PointValues) -> PointValues:
        """μ m x, and zero at a masked point, whatever its value."""
        if self.weights is None:
            return values
        weights = self.weights.to(values)
        return torch.where(weights > 0, values * weights, 0.0)

    def total(self, like: Float[Tensor, "..."]) -> Float[Tensor, " channel"]:
        """Σ μ m of every field (channel,)."""
        assert self.weights is not None
        return self.weights.to(like).sum(-1)

    def by_field(self, values: PointValues) -> PerField:
        """The mean over points."""
        return values.mean(-1) if self.weights is None else self.weighted(values).sum(-1) / self.total(values)

    def over_time(self, values: PointValues) -> Float[Tensor, "batch channel"]:
        """The mean over steps and points."""
        return values.mean((1, 3)) if self.weights is None else self.by_field(values).mean(1)

    def over_fields(self, values: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch"]:
        """The mean over fields of means over points; a field counts by its points that are not masked."""
        return values.mean(-1) if self.weights is None else values @ (self.total(values) / self.total(values).sum())

    def everywhere(self, values: PointValues) -> Float[Tensor, "batch step"]:
        """The mean over fields and points."""
        return values.mean((2, 3)) if self.weights is None else self.over_fields(self.by_field(values))

    def summed(self, values: PointValues) -> PerField:
        """The sum over points that are not masked, of values that hold the area."""
        if self.weights is not None:
            values = torch.where(self.weights.to(values) > 0, values, 0.0)
        return values.sum(-1)

    def variance(self, values: PointValues) -> PerField:
        """The variance over points."""
        if self.weights is None:
            return values.var(-1, correction=0)
        return self.by_field((values - self.by_field(values)[..., None]).square())

    def hidden(self, states: Float[Tensor, "batch step channel *space"]) -> Float[Tensor, "batch step channel *space"]:
        """States with NaN at masked points, for figures."""
        if self.weights is None or not (self.weights == 0).any():
            return states
        return states.masked_fill((self.weights == 0).reshape(states.shape[2:]).to(states.device), torch.nan)
