"""Plain losses under the same call, to compare with."""

import math

from squall.losses.errors import PointwiseError
from squall.losses.imbalance import ImbalanceAwareLoss

__all__ = ["MeanSquaredError"]


class MeanSquaredError(ImbalanceAwareLoss):
    """loss = Σ p_i l_i, every point weighed alike: the limit T → ∞ with the same call, checks and report.

    Args:
        error: l: "squared", "absolute", "huber", or a callable.

    Example:
        >>> import torch
        >>> MeanSquaredError()(torch.tensor([1.0, 2.0]), torch.zeros(2))
        tensor(2.5000)
    """

    def __init__(self, error: str | PointwiseError = "squared") -> None:
        super().__init__(math.inf, error)
