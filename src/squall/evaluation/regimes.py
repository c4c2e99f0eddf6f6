"""Regimes of the truth by the size of its rate: quiet, active, extreme."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from squall._types import State

REGIMES: Mapping[int, str] = MappingProxyType({0: "quiet", 1: "active", 2: "extreme"})
"""The generic regimes by |du/dt| of the truth: the lower half, the rest, the top 1 %."""


@dataclass(frozen=True)
class RegimeThresholds:
    """|du/dt| above which a point is active, and extreme; du/dt in units of the state per unit of time."""

    active: Tensor
    extreme: Tensor

    def label(self, speed: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The regime of every point, as a key of `REGIMES`, from |du/dt|; channels and space come last."""
        return (speed > self.active).long() + (speed > self.extreme).long()


def regime_thresholds(speed: State, weights: Float[Tensor, "channel point"] | None = None) -> RegimeThresholds:
    """The median and the 99th percentile of |du/dt|, per channel.

    Args:
        speed: |du/dt| of the truth.
        weights: area of every point, zero where it is masked; all alike if left out.

    >>> thresholds = regime_thresholds(torch.arange(1000.0).reshape(1, 1, 1000))
    >>> labels = thresholds.label(torch.tensor([[[3.0, 700.0, 995.0]]]))
    >>> [REGIMES[int(i)] for i in labels.flatten()]
    ['quiet', 'active', 'extreme']
    """
    active, extreme = quantiles(speed, [0.5, 0.99], weights)
    return RegimeThresholds(active, extreme)


def quantiles(
    states: State, levels: list[float], weights: Float[Tensor, "channel point"] | None = None
) -> Float[Tensor, "level channel *ones"]:
    """Quantiles of every field over states and points.

    Weighted ones are the smallest value of a point that counts, below or at which that share of the weight lies.
    """
    flat = states.detach().transpose(0, 1).flatten(1)
    if weights is None:
        values = torch.from_numpy(np.quantile(flat.cpu().numpy(), levels, axis=1)).to(states)
    else:
        ordered, order = flat.sort(1)
        share = weights.to(flat).repeat(1, len(states)).gather(1, order).cumsum(1)
        # A little less: rounding must not pass over the value at which the share is met exactly.
        wanted = share[:, -1:] * (torch.tensor(levels, dtype=torch.float64) * (1 - 1e-12)).to(flat)
        wanted = wanted.clamp(min=torch.finfo(flat.dtype).tiny)
        values = ordered.gather(1, torch.searchsorted(share, wanted).clamp(max=flat.shape[1] - 1)).T
    return values.reshape(len(levels), -1, *[1] * (states.dim() - 2))
