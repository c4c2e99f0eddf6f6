"""Regimes of the truth by the size of its rate: quiet, active, extreme."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from squall._types import State

__all__ = ["REGIMES", "RegimeThresholds", "regime_thresholds"]

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


def regime_thresholds(speed: State) -> RegimeThresholds:
    """The median and the 99th percentile of |du/dt|, per channel.

    Args:
        speed: |du/dt| of the truth.

    >>> thresholds = regime_thresholds(torch.arange(1000.0).reshape(1, 1, 1000))
    >>> labels = thresholds.label(torch.tensor([[[3.0, 700.0, 995.0]]]))
    >>> [REGIMES[int(i)] for i in labels.flatten()]
    ['quiet', 'active', 'extreme']
    """
    flat = speed.detach().transpose(0, 1).flatten(1).cpu().numpy()
    quantiles = torch.from_numpy(np.quantile(flat, [0.5, 0.99], axis=1)).to(speed)
    active, extreme = quantiles.reshape(2, -1, *[1] * (speed.dim() - 2))
    return RegimeThresholds(active, extreme)
