"""The mean of the largest errors: top-k, CVaR, online hard example mining."""

import torch
from torch import Tensor

from squall.losses.rivals.base import Points, Rival, descending, require


def top_mean(errors: Tensor, share: Tensor, alpha: float) -> Tensor:
    """Mean of the largest share α of the errors: max {Σ w l : Σw = 1, 0 ≤ w ≤ p/α}, ties at the threshold shared."""
    ordered, mass = descending(errors, share)
    reached = mass.cumsum(0) >= alpha * (1 - 1e-9)  # but for rounding
    threshold = ordered[reached.to(torch.int8).argmax()]
    above, tied = errors.detach() > threshold, errors.detach() == threshold
    inside = (share * above).sum(dtype=torch.float64)
    rest = (alpha - inside).clamp(min=0) / (share * tied).sum(dtype=torch.float64)
    return (share * torch.where(tied, rest.to(share.dtype), above) * errors).sum() / alpha


class TopK(Rival):
    """loss = mean of the largest share α of the squared errors l: CVaR at level 1 − α, OHEM.

        max {Σ w l : Σw = 1, 0 ≤ w ≤ p/α} = min_t t + Σ p max(l − t, 0)/α

    α n need not be whole. α = 1 is the mean squared error.

    Args:
        alpha: α in (0, 1], dimensionless; 0.1 (the default) and 0.3 are usual.

    Reference:
        Rockafellar and Uryasev, Optimization of conditional value-at-risk, 2000; Shrivastava et al., Training
        region-based object detectors with online hard example mining, CVPR 2016; Levy et al., NeurIPS 2020.

    Example:
        >>> TopK(alpha=0.5)(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4))
        tensor(12.5000)
    """

    def __init__(self, *, alpha: float = 0.1) -> None:
        super().__init__()
        require(0 < alpha <= 1, f"TopK: alpha is the share of points that count, in (0, 1]; got {alpha}")
        self.alpha = alpha

    def value(self, batch: Points) -> Tensor:
        return top_mean(batch.error.square(), batch.share, self.alpha)
