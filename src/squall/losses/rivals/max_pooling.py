"""Loss max-pooling: the worst case over weights within an ℓ_p ball, with a cap."""

import torch
from torch import Tensor

from squall.losses.rivals.base import Points, Rival, descending, ratio, require


def pooling_weights(errors: Tensor, share: Tensor, p: float, fraction: float) -> Tensor:
    """The maximiser of Σ w l over {w ≥ 0 : Σ π (w/π)^p ≤ 1, w/π ≤ φ^(−1/p)}, π the share and φ the fraction."""
    q = p / (p - 1)
    scaled = errors / errors.max().clamp(min=torch.finfo(errors.dtype).tiny)
    ordered, mass = descending(scaled, share)
    power = ordered.clamp(min=0).double() ** q
    left = fraction - (mass.cumsum(0) - mass)  # of φ, if this point is the first that is not capped
    tail = (mass * power).flip(0).cumsum(0).flip(0)
    fits = ((left > 0) & (power * left <= tail)).nonzero()
    level = scaled.new_tensor(0.0)
    if len(fits):  # Σ π over the capped + Σ π (l/a)^q over the rest = φ
        level = ((tail / left)[fits[0, 0]] ** (1 / q)).to(scaled.dtype)
    capped = ratio(scaled, level).clamp(max=1) ** (q - 1) if level > 0 else (scaled > 0).to(scaled.dtype)
    return share * capped * fraction ** (-1 / p)


class LossMaxPooling(Rival):
    """loss = max Σ w l over {w : ‖w‖_p ≤ n^(−1/q), 0 ≤ w ≤ τ}, τ = n^(−1/q) m^(−1/p), l = (prediction − target)².

        w = τ min(1, (l/a)^(q−1)),  a^q = Σ_unsaturated l^q / (m − #saturated),  1/p + 1/q = 1

    At least m points share the weight, which does not add up to 1; m = n is the mean squared error.

    Args:
        p: p > 1, dimensionless; 1.7, as published.
        fraction: m/n in (0, 1], dimensionless; 0.3, as published.

    Reference:
        Bulò, Neuhold and Kontschieder, Loss max-pooling for semantic image segmentation, CVPR 2017.

    Example:
        >>> LossMaxPooling()(torch.full((4,), 2.0), torch.zeros(4))
        tensor(4.0000)
    """

    def __init__(self, *, p: float = 1.7, fraction: float = 0.3) -> None:
        super().__init__()
        require(1 < p < float("inf"), f"LossMaxPooling: p must be above 1 and finite, got {p}")
        require(0 < fraction <= 1, f"LossMaxPooling: fraction must be in (0, 1], got {fraction}")
        self.p, self.fraction = p, fraction

    def value(self, batch: Points) -> Tensor:
        errors = batch.error.square()
        return (pooling_weights(errors.detach(), batch.share, self.p, self.fraction) * errors).sum()
