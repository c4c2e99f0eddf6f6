"""Binned spectral power: every scale must have its energy."""

import numpy as np
import torch
from torch import Tensor

from squall.losses.rivals.amse import NO_SPECTRUM
from squall.losses.rivals.base import Points, Rival, require
from squall.losses.rivals.spectra import by_shell, power, shells, transform


class BinnedSpectral(Rival):
    """loss = mean e² + μ mean_b (1 − (P_b + ε′) / (Q_b + ε′))², the mean over samples, channels and bins.

    P_b and Q_b are the mean powers of prediction and target over the wave numbers of bin b, ε′ is ε times the mean
    power of a coefficient of the target. The second term is dimensionless and knows no phase.

    Args:
        mu: μ ≥ 0, in the squared unit of the prediction (standardise); 1, as published.
        bins: bins of equal width, 32 as published; fewer where they would be narrower than one wave.
        epsilon: ε > 0, dimensionless; 1e-8. Raise it for data whose smallest scales are empty but for rounding.

    Reference:
        Chakraborty, Mohan and Maulik, Binned spectral power loss for improved prediction of chaotic systems, 2025
        (arXiv 2502.00472), with λ = 1 and the mean over channels in place of the sum.

    Example:
        >>> wave = torch.tensor([0.0, 1.0, 0.0, -1.0]).reshape(1, 1, 4)
        >>> print(f"{BinnedSpectral(bins=1)(2 * wave, wave).item():.2f}")
        9.50
    """

    axes = (1, 3)
    refuses = NO_SPECTRUM

    def __init__(self, *, mu: float = 1.0, bins: int = 32, epsilon: float = 1e-8) -> None:
        super().__init__()
        given = f"got {mu}, {bins} and {epsilon}"
        require(mu >= 0 and bins >= 1 and epsilon > 0, f"BinnedSpectral: mu ≥ 0, bins ≥ 1, epsilon > 0; {given}")
        self.mu, self.bins, self.epsilon = mu, bins, epsilon

    def value(self, batch: Points) -> Tensor:
        shell, times = shells(tuple(batch.error.shape[2:]), self.bins)
        counts = torch.from_numpy(np.bincount(shell, times)).to(batch.error)
        p, q = (by_shell(power(transform(u)), shell, times) for u in (batch.prediction, batch.target))
        floor = (self.epsilon * q.sum(-1, keepdim=True) / counts.sum()).clamp(min=torch.finfo(q.dtype).tiny)
        off = 1 - (p / counts + floor) / (q / counts + floor)
        return batch.error.square().mean() + self.mu * off.square().mean()
