"""The focal loss for regression: small errors count less."""

import torch
from torch import Tensor

from squall.losses.rivals.base import Points, Rival, require


def focal(error: Tensor, share: Tensor, beta: float, gamma: float) -> Tensor:
    """Σ p (2σ(β|e|/s) − 1)^γ e² with s² = Σ p e² held; 2σ(x) − 1 = tanh(x/2)."""
    scale = (share * error.detach().square()).sum().sqrt()
    factor = (beta * error.abs() / (2 * torch.where(scale > 0, scale, 1))).tanh()
    factor = torch.where(factor > 0, factor, 1)  # where e = 0 the product is 0, but the slope of 0^γ may be infinite
    return (share * factor**gamma * error.square()).sum()


class Focal(Rival):
    """loss = Σ p (2σ(β|e|/s) − 1)^γ e², with σ the logistic function and s the root mean square of e in the batch.

    s is held (no gradient), the factor is not, as published. β → ∞ and γ = 0 are the mean squared error.

    Args:
        beta: β > 0, in units of 1/s (the published one has the unit of the data); 1 weighs an error of s by 0.46.
        gamma: γ ≥ 0, dimensionless; 1, that of Yang et al.

    Reference:
        Lin et al., Focal loss for dense object detection, ICCV 2017; Yang et al., Delving into deep imbalanced
        regression, ICML 2021 (the form for regression).

    Example:
        >>> Focal(gamma=0.0)(torch.tensor([1.0, 3.0]), torch.zeros(2))
        tensor(5.)
    """

    def __init__(self, *, beta: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        require(0 < beta < float("inf"), f"Focal: beta must be positive and finite, got {beta}; ∞ is MeanSquaredError")
        require(0 <= gamma < float("inf"), f"Focal: gamma must be finite and not negative, got {gamma}")
        self.beta, self.gamma = beta, gamma

    def value(self, batch: Points) -> Tensor:
        return focal(batch.error, batch.share, self.beta, self.gamma)
