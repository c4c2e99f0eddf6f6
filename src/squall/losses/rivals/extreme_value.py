"""The loss of ExtremeCast: extremes of the target must not be underestimated."""

import torch
from torch import Tensor
from torch.nn.functional import relu

from squall.losses.rivals.base import Points, Rival, ascending, require


def quantile_of(ordered: Tensor, count: Tensor, q: float) -> Tensor:
    """The q-quantile of the first `count` values of the last axis, linearly interpolated."""
    place = q * (count - 1).clamp(min=0).to(ordered.dtype)
    below, above = place.floor().long(), place.ceil().long()
    return torch.lerp(ordered.gather(-1, below), ordered.gather(-1, above), place - below)


class ExtremeValue(Rival):
    """loss = mean e² + λ Σ over both tails of mean(c d²) / (2 (1 − q)).

    In the upper tail d = max(ŷ, t) − max(y, t), t the q-quantile of the target in its field (sample, channel); in the
    lower tail the same of −ŷ and −y. c is `under` where the prediction is less extreme than the target (d < 0), and
    `over` elsewhere. Published for weather: it follows extreme *states*, not large errors.

    Args:
        quantile: q in (0.5, 1), dimensionless; 0.9 (and so 0.1), as published. Over the points that count, each alike.
        under, over: c ≥ 0, dimensionless; 1.2 and 1, as published.
        weight: λ ≥ 0, dimensionless; 1, as published.

    Reference:
        Xu et al., ExtremeCast: boosting extreme value prediction for global weather forecast, 2024 (arXiv 2402.01295).

    Example:
        >>> target = torch.arange(11.0).reshape(1, 1, 11)
        >>> print(f"{ExtremeValue()(target.clamp(max=9), target).item():.3f}")
        0.636
    """

    axes = (1, 9)

    def __init__(self, *, quantile: float = 0.9, under: float = 1.2, over: float = 1.0, weight: float = 1.0) -> None:
        super().__init__()
        require(0.5 < quantile < 1, f"ExtremeValue: quantile is that of the upper tail, in (0.5, 1); got {quantile}")
        require(
            min(under, over, weight) >= 0,
            f"ExtremeValue: under, over and weight must be ≥ 0, got {(under, over, weight)}",
        )
        self.quantile, self.under, self.over, self.weight = quantile, under, over, weight

    def value(self, batch: Points) -> Tensor:
        u, y, share = (x.flatten(2) for x in (batch.prediction, batch.target, batch.share))
        counts, q = share > 0, self.quantile
        ordered = ascending(torch.where(counts, y, torch.inf))  # torch.quantile takes 16 million values at most
        low, high = (quantile_of(ordered, counts.sum(-1, keepdim=True), x) for x in (1 - q, q))
        tails = self._tail(relu(u - high) - relu(y - high)) + self._tail(relu(low - u) - relu(low - y))
        extremes = torch.where(counts, tails, 0) / (2 * (1 - q))  # a field that is masked wholly has no quantile
        return (share * ((u - y).square() + self.weight * extremes)).sum()

    def _tail(self, d: Tensor) -> Tensor:
        return torch.where(d < 0, self.under * d, self.over * d) * d
