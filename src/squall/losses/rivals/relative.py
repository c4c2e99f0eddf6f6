"""Relative norms: every field counts by its own size."""

from types import MappingProxyType

import torch
from torch import Tensor

from squall.losses.rivals.base import Points, Rival, require, root


def relative(errors: Tensor, sizes: Tensor, share: Tensor) -> Tensor:
    """Mean over (sample, channel) of √(Σ p errors / Σ p sizes); fields that are masked wholly do not count."""
    counts = share.flatten(2).sum(2) > 0
    squared, size = ((share * x).flatten(2).sum(2)[counts] for x in (errors, sizes))
    require(bool((size > 0).all()), "a target is 0 everywhere, so nothing is relative to it; leave such fields out")
    return root(squared / size).mean()


class RelativeL2(Rival):
    """loss = mean over samples and channels of ‖e‖/‖y‖, e = prediction − target, y = target. Dimensionless.

    ‖e‖² = Σ μ e² over space. No setting: the usual loss of neural operators.

    Reference:
        Li et al., Fourier neural operator, ICLR 2021; `LpLoss` of neuraloperator.

    Example:
        >>> RelativeL2()(torch.full((1, 1, 4), 3.0), torch.full((1, 1, 4), 2.0))
        tensor(0.5000)
    """

    axes = (1, 9)

    def value(self, batch: Points) -> Tensor:
        return relative(batch.error.square(), batch.target.square(), batch.share)


class RelativeH1(Rival):
    """loss = mean over samples and channels of √((‖e‖² + Σ_a ‖∂_a e‖²) / (‖y‖² + Σ_a ‖∂_a y‖²)).

    ∂ is the central difference over the spacing L/points. The longer the side, the less derivatives weigh.

    Args:
        length: L > 0, side of the domain along every axis; 1, the default of neuraloperator.
        periodic: whether differences wrap around; False: one-sided at the boundary, of second order.

    Reference:
        Czarnecki et al., Sobolev training for neural networks, NeurIPS 2017; `H1Loss` of neuraloperator.

    Example:
        >>> RelativeH1()(torch.full((1, 1, 4), 3.0), torch.full((1, 1, 4), 2.0))
        tensor(0.5000)
    """

    axes = (1, 9)
    refuses = MappingProxyType({"mask": "a difference across a masked point has no meaning; use RelativeL2"})

    def __init__(self, *, length: float = 1.0, periodic: bool = True) -> None:
        super().__init__()
        require(0 < length < float("inf"), f"RelativeH1: length must be positive and finite, got {length}")
        self.length, self.periodic = length, periodic

    def value(self, batch: Points) -> Tensor:
        return relative(self._density(batch.error), self._density(batch.target), batch.share)

    def _density(self, u: Tensor) -> Tensor:
        return u.square() + sum(self._derivative(u, axis).square() for axis in range(2, u.dim()))

    def _derivative(self, u: Tensor, axis: int) -> Tensor:
        h = self.length / u.shape[axis]
        if self.periodic:
            return (u.roll(-1, axis) - u.roll(1, axis)) / (2 * h)
        return torch.gradient(u, spacing=h, dim=axis, edge_order=2)[0]
