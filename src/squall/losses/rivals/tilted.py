"""Tilted empirical risk (TERM): a soft maximum, or a soft minimum, of the errors."""

import math

from torch import Tensor

from squall.losses.rivals.base import Points, Rival, require


def tilted(errors: Tensor, share: Tensor, temperature: float) -> Tensor:
    """T log Σ p exp(l/T)."""
    if math.isinf(temperature):
        return (share * errors).sum()
    scaled = errors / temperature
    if float(scaled.detach().abs().max()) < 1:  # the sum is near 1: its logarithm would lose what differs from 1
        return temperature * (share * scaled.expm1()).sum().log1p()
    return temperature * (scaled + share.log()).flatten().logsumexp(0)


class Tilted(Rival):
    """loss = T log Σ p exp(l/T), l = (prediction − target)².

    T → ∞ is the mean, T → 0 from above the maximum; T < 0 ignores outliers, down to the minimum for T → 0 from below.
    Its gradient is that of `ImbalanceAwareLoss(temperature=T)`.

    Args:
        temperature: T ≠ 0, in the squared unit of the prediction. No default: T does not travel between units. The
            paper writes t = 1/T and uses −2 (outliers ignored) to 10 and more.

    Reference:
        Li et al., Tilted empirical risk minimization, ICLR 2021 (arXiv 2007.01162).

    Example:
        >>> import torch
        >>> Tilted(temperature=1.0)(torch.tensor([0.0, 1.0]), torch.zeros(2))
        tensor(0.6201)
    """

    def __init__(self, *, temperature: float) -> None:
        super().__init__()
        require(abs(temperature) > 0, f"Tilted: temperature must not be {temperature}; the max is top_k at α = 1/n")
        self.temperature = temperature

    def value(self, batch: Points) -> Tensor:
        return tilted(batch.error.square(), batch.share, self.temperature)
